"""Transformers that match a U-Net, by parameters or by arithmetic, and what each of them costs.

    networks = matched("small", 64)     # {"unet": "unet-64", "sit-params": …, "sit-flops": …}

A transformer is matched by its depth alone: its width is the family's. The two matches are
different questions: a third of a SiT's parameters are modulations, which are applied once a sample
and not once a token, so that one with a U-Net's parameters takes more arithmetic than it.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from experiments.costs import flops_of, parameters_of
from harness.cli import UserError
from harness.ranks import autocast
from mmdit import MMDiTConfig
from model import PRESETS, build
from training.precision import inputs_of, pass_seconds

UNET = "unet"
SIT_PARAMS, SIT_FLOPS = "sit-params", "sit-flops"
ARMS = (UNET, SIT_PARAMS, SIT_FLOPS)
DEEPEST = 40
# How far from the U-Net's a number may be, up or down, and still be called equal.
APART = 0.15
# Passes of each network, in turn, of which the fastest is taken.
ROUNDS = 8


class Family(NamedTuple):
    """A U-Net, a preset or the shape of one, and the transformers that are held against it."""

    unet: str
    width: int
    heads: int
    patch: int


FAMILIES = {
    "nano": Family("nano", 64, 2, 1),
    "small": Family("unet-64", 96, 3, 1),
    "tiny": Family("tiny", 192, 3, 1),
    "71m": Family("toy-71m", 512, 8, 2),
    "281m": Family("toy-281m", 1024, 16, 2),
}
# U-Nets between the presets: the same, narrower.
NARROWER = {
    "unet-64": replace(PRESETS["tiny"], model_channels=64),
    "toy-71m": replace(PRESETS["toy-281m"], model_channels=128),
}


def matched(size: str, resolution: int) -> dict[str, str]:
    """{arm: name of its network} at a resolution. Names that train.py does not know yet are added
    to its presets. UserError if no depth comes within APART of the U-Net."""
    family, side = FAMILIES[size], max(resolution // 8, 1)
    unet = NARROWER.get(family.unet) or PRESETS[family.unet]
    wanted = {SIT_PARAMS: parameters_of(unet), SIT_FLOPS: flops_of(unet, side)}
    shapes = {
        depth: MMDiTConfig(
            patch=family.patch, width=family.width, heads=family.heads, blocks=depth,
            pos_max=side // family.patch,
        )
        for depth in range(1, DEEPEST + 1)
    }
    found = {UNET: family.unet}
    # Both grow by the same with every block: two depths tell of all.
    for arm, goal in wanted.items():
        first, second = (number_of(arm, shapes[depth], side) for depth in (1, 2))
        exact = 1 + (goal - first) / (second - first)
        depth = min(max(round(exact), 1), DEEPEST)
        share = number_of(arm, shapes[depth], side) / goal
        if abs(math.log(share)) > math.log1p(APART):
            raise UserError(
                f"--sizes {size} --resolutions {resolution}: {depth} blocks of width "
                f"{family.width} have {share:.2f} of what {arm} should equal",
                wanted=f"within {APART:.0%}",
                do="Leave out this size or resolution.",
            )
        found[arm] = f"sit-w{family.width}-d{depth}-p{family.patch}"
        PRESETS.setdefault(found[arm], shapes[depth])
    PRESETS.setdefault(family.unet, unet)
    return found


def network_at(model: str, side: int) -> Any:
    """The config of a preset for latents of a side: a transformer's table of places is as large as
    the image, as training/start.py makes it."""
    cfg = PRESETS[model]
    return replace(cfg, pos_max=side // cfg.patch) if isinstance(cfg, MMDiTConfig) else cfg


def number_of(arm: str, cfg: Any, side: int) -> float:
    """What an arm is matched by."""
    return parameters_of(cfg) if arm == SIT_PARAMS else flops_of(cfg, side)


# ---- what they cost ------------------------------------------------------------------------------


def costs_of(
    models: Mapping[str, str], resolution: int, batch: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """{arm: {"model", "parameters", "flops", "bytes", "seconds"}}: flops of one evaluation of one
    image, bytes that training keeps of an image for the backward pass, seconds that the two passes
    take an image."""
    side = max(resolution // 8, 1)
    found, nets, inputs = {}, {}, {}
    for arm, model in models.items():
        cfg = network_at(model, side)
        nets[arm] = build(cfg).to(device)
        given = inputs_of(cfg, batch, (cfg.in_channels, side, side))
        inputs[arm] = {name: tensor.to(device) for name, tensor in given.items()}
        found[arm] = {
            "model": model,
            "parameters": parameters_of(cfg),
            "flops": flops_of(cfg, side),
            "bytes": kept_bytes(nets[arm], inputs[arm]) / batch,
        }
    for arm, seconds in fastest(nets, inputs, device).items():
        found[arm]["seconds"] = seconds / batch
    return found


def kept_bytes(net: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward one, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    device = next(iter(inputs.values())).device
    with saved_tensors_hooks(note, lambda x: x), autocast(device, dtype_on(device)):
        # Held: what is freed would leave its place to the next.
        out = net(**inputs)
    total = sum(kept.values())
    del out
    return total


def fastest(
    nets: Mapping[str, nn.Module], inputs: Mapping[str, Any], device: torch.device
) -> dict[str, float]:
    """Seconds of a forward and a backward pass of a batch: the fastest of several, in turn, since
    another process can only slow one down."""
    found = dict.fromkeys(nets, math.inf)
    for _ in range(ROUNDS):
        for arm, net in nets.items():
            begun = time.perf_counter()
            pass_seconds(net, inputs[arm], dtype_on(device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[arm] = min(found[arm], time.perf_counter() - begun)
    return found


def dtype_on(device: torch.device) -> str:
    return "bf16" if device.type == "cuda" else "fp32"
