"""The precision of a run: what it computes in, and what its weights are kept in.

--dtype auto is bf16 on GPUs that have it; on a CPU that has it, if a short race shows that it pays
there. A run is raced once, before it begins, and its config keeps what was found: it goes on in
that, on whatever machine. --weights bf16 keeps no fp32 copy of a weight: its optimizer rounds
stochastically (kernels/rounding.py), since to nearest an update of less than half a spacing, 0.2 to
0.4% of a weight, would be lost in every step.
"""

import copy
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.cli import UserError
from harness.files import fingerprint
from harness.ranks import Ranks, autocast, precision
from harness.run import begun_with, checkpoints
from training.optimizer import FUSED

# What Linux calls the instructions that multiply bf16; where there are none it is emulated.
FLAGS = {"avx512_bf16", "amx_bf16"}
# bf16 has to be so many times as fast as fp32 …
GAIN = 1.1
# … by the fastest step of each in so many seconds, and at least so many steps of each.
SECONDS = 1.0
LEAST = 3
# A run that takes fewer seconds is not raced: it would gain less than the race costs.
WORTH = 60.0
# Tokens of a text, for networks that read one: CLIP's.
TOKENS = 77


def with_weights(cfg: Any) -> Any:
    """cfg with the --dtype that its --weights need; refuses what cannot train such weights."""
    if cfg.weights == "fp32":
        return cfg
    what = f"--weights {cfg.weights}"
    if cfg.optim not in FUSED:
        raise UserError(
            f"{what} with --optim {cfg.optim}, which rounds to nearest and loses small updates",
            do=f"Add --optim {' or '.join(FUSED)}.",
        )
    if cfg.dtype == "fp32":
        raise UserError(
            f"{what} with --dtype fp32: a network computes in what its weights are",
            do="Leave --dtype out.",
        )
    return replace(cfg, dtype=cfg.weights)


def cast_weights(net: nn.Module, init: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """Round net's weights, in place, to --weights. init says where they came from, as a checkpoint
    does; returned with the fingerprint that they begin with. Buffers stay as they are."""
    if cfg.weights == "fp32":
        return init
    for p in net.parameters():
        p.data = p.data.to(torch.bfloat16)
    if init["fingerprint"] is None:
        return init
    return {**init, "rounded": fingerprint(net.state_dict())}


def as_begun(cfg: Any) -> Any:
    """cfg with the dtype that its run began with, if that has begun and --dtype is auto."""
    if cfg.dtype != "auto":
        return cfg
    return replace(cfg, dtype=begun_with(Path(cfg.out) / cfg.name, "dtype", "auto") or "auto")


def without_race(cfg: Any, device: torch.device) -> Any:
    """cfg of a new run with a dtype that is not raced for: runs that are compared share one, and
    a clock might give them two."""
    if cfg.dtype != "auto" or (Path(cfg.out) / cfg.name / "config.json").exists():
        return cfg
    return replace(cfg, dtype=precision(device, "auto"))


def settle_dtype(cfg: Any, ranks: Ranks, net: nn.Module, latent_shape: tuple[int, int, int]) -> Any:
    """cfg with fp32 or bf16 in place of --dtype auto. Rank 0 decides for all; every rank calls.

    net is as it was afterwards, and so are torch's random numbers. A run that has begun without
    a word on this stays at auto: precision() knows what that is.
    """
    if cfg.dtype != "auto" or checkpoints(Path(cfg.out) / cfg.name):
        return cfg
    parts = ranks.world * cfg.accum
    # Of one rank, which passes its micro-batches one by one.
    passes = -(-cfg.images // cfg.batch) * cfg.accum
    inputs = partial(inputs_of, net.cfg, cfg.batch // parts, latent_shape)
    return replace(cfg, dtype=ranks.broadcast(partial(decide, ranks.device, net, inputs, passes)))


def decide(device: torch.device, net: nn.Module, inputs: Any, passes: int) -> str:
    """ "fp32" or "bf16" for a run of so many passes through net, each of inputs() or alike."""
    if device.type != "cpu" or not has_bf16():
        return precision(device, "auto")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        gain = race(copy.deepcopy(net), inputs(), passes)
    if gain is None:
        return "fp32"
    if gain >= GAIN:
        print(f"dtype: bf16, {gain:.2f} times as fast here as fp32", flush=True)
        return "bf16"
    print(f"dtype: fp32; bf16 would be {gain:.2f} times as fast here", flush=True)
    return "fp32"


def has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Do all cores multiply bf16? False where Linux does not say."""
    if not cpuinfo.exists():
        return False
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
    found = [not FLAGS.isdisjoint(line.split()) for line in lines]
    return bool(found) and all(found)


def inputs_of(cfg: Any, batch: int, latent_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Random inputs of a network with this config, of the shapes that a run gives it."""
    generator = torch.Generator().manual_seed(0)
    noise = partial(torch.randn, generator=generator)
    vector_dim, context_dim = getattr(cfg, "vector_dim", 0), getattr(cfg, "context_dim", 0)
    found = {
        "x": noise(batch, cfg.in_channels, *latent_shape[1:]),
        "t": torch.rand(batch, generator=generator) * 1000,
    }
    if vector_dim:
        found["y"] = noise(batch, vector_dim)
    elif cfg.num_classes:
        found["y"] = torch.randint(cfg.num_classes, (batch,), generator=generator)
    if context_dim:
        found["context"] = noise(batch, TOKENS, context_dim)
    if hasattr(cfg, "text_places"):  # its encoder is a part of it
        found.pop("y")
        found["context"] = torch.randint(257, (batch, cfg.text_places), generator=generator)
    return found


def race(net: nn.Module, inputs: dict[str, Tensor], passes: int) -> float | None:
    """How many times as fast as in fp32 net runs in bf16; None if `passes` are too few to ask."""
    # The first pass prepares what the later ones find.
    pass_seconds(net, inputs, "fp32")
    if pass_seconds(net, inputs, "fp32") * passes < WORTH:
        return None
    pass_seconds(net, inputs, "bf16")
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    while len(times["bf16"]) < LEAST or sum(map(sum, times.values())) < SECONDS:
        for dtype, seconds in times.items():
            seconds.append(pass_seconds(net, inputs, dtype))
    # The fastest: what a step takes when no other process holds up a core.
    return min(times["fp32"]) / min(times["bf16"])


def pass_seconds(net: nn.Module, inputs: dict[str, Tensor], dtype: str) -> float:
    """Seconds of a forward and a backward pass."""
    begun = time.perf_counter()
    with autocast(inputs["x"].device, dtype):
        out = net(**inputs)
    out.float().square().mean().backward()
    took = time.perf_counter() - begun
    net.zero_grad(set_to_none=True)
    return took
