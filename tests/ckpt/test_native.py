"""Our own checkpoints: a config is checked before anything is built."""

import functools
import math
import time
from dataclasses import asdict, fields

import pytest
import torch

from ckpt.native import config_from
from model import UNetConfig, num_params

SMALL = UNetConfig(
    4, 4, model_channels=32, channel_mult=(1, 2, 2), attention=(0, 1, 1), num_head_channels=16
)
SD = UNetConfig(
    4, 4, model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention=(2, 0),
    num_head_channels=16, vector_dim=12, context_dim=24, use_scale_shift_norm=False,
    resblock_updown=False,
)  # fmt: skip


# ---- what a config of a file may hold -----------------------------------------------------------

ODD = (
    None, "x", "", [], [1, 2], {}, (), (1, "x"), (1, (2,)), ((),), True, -1, 1.5, 10**9, 10**400,
    math.inf, math.nan, 1j, b"x", (math.nan, 1), (0, 10**9), (True, 1), "a" * 10**6, (1,) * 10**6,
    torch.zeros(3), functools.reduce(lambda inner, _: [inner], range(500), 1),
)  # fmt: skip
SAYS = ("wanted", "not a multiple", "do not split", "give one each", "set one")


@pytest.mark.parametrize("name", [f.name for f in fields(UNetConfig)])
@pytest.mark.parametrize("base", [SMALL, SD], ids=["adm", "sd"])
def test_every_odd_field_of_a_config_is_named_at_once(base, name):
    """Configs come from other people's files: an odd one is a ValueError in one short line, or
    builds, quickly."""
    start, fine = time.monotonic(), []
    for value in ODD:
        try:
            cfg = config_from(UNetConfig, asdict(base) | {name: value})
            hash(cfg)
            num_params(cfg)
            fine.append(value)
        except ValueError as error:
            assert len(str(error)) < 400 and any(word in str(error) for word in SAYS), error
    # True is one of two; a depth or number of 1.5 is none.
    assert len(fine) <= 1 and time.monotonic() - start < 5


@pytest.mark.parametrize("base, changes, message", [
    (SMALL, {"model_channels": 32768, "channel_mult": (1, 4, 1)}, "131072 channels"),
    (SMALL, {"channel_mult": (1,) * 17, "attention": (0,) * 17}, "for 1 to 16 levels"),
    (SMALL, {"channel_mult": (), "attention": ()}, "for 1 to 16 levels"),
    (SD, {"num_res_blocks": 64, "attention": (64, 64)}, "16770 blocks: wanted up to 1024"),
    (SD, {"middle_attention": 0}, "middle_attention is 0: wanted whole numbers from 1 to 64"),
])  # fmt: skip
def test_sizes_that_nobody_builds_are_named(base, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from(UNetConfig, asdict(base) | changes)
