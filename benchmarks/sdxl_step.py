"""How fast one GPU fine-tunes SDXL to a flow, and in how much memory; no weights, no pictures.

    python benchmarks/sdxl_step.py [--batches 1,2,4]    # writes benchmarks/results/sdxl_step.json

A step is that of `train.py --model sdxl --objective fm`: loss, backward pass, norm of the
gradients, clipping and update, on random latents of 1024 px, texts and sizes, and random weights.
Averages are not in it, as with --ema-device cpu between two updates. MFU is three times the forward
pass's FLOP, as a share of what a matrix product of bf16 reaches in the same process.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch import nn

from benchmarks.budget import SIDE, TRAINING, forward_flops
from harness import record
from harness.cli import cli, flag, parse
from harness.ranks import autocast, pick_device
from kernels.adamw8bit import AdamW8bit
from model import PRESETS, UNetConfig, build
from objectives import Objective, make_objective
from training.optimizer import make_optimizer
from training.precision import cast_weights, inputs_of

WARM, STEPS = 3, 8


@dataclass(frozen=True)
class Config:
    batches: tuple[int, ...] = flag((1, 2, 4), "images a step, one after the other", low=1, high=64)
    weights: Literal["fp32", "bf16"] = flag("bf16", "as train.py's")
    optim: Literal["adamw", "adamw8bit"] = flag("adamw8bit", "as train.py's")
    checkpointing: bool = flag(False, "as train.py's")
    mini: bool = flag(False, "SDXL in miniature, to show that it runs")
    device: str = flag("auto", "auto | cpu | cuda")
    out: str = flag("", "JSON file; default benchmarks/results/sdxl_step.json", writes=".json")


def network(cfg: Config) -> tuple[UNetConfig, int]:
    """(config, side of its latents)."""
    if not cfg.mini:
        return PRESETS["sdxl"], SIDE
    small = {"model_channels": 32, "num_head_channels": 32, "context_dim": 48, "vector_dim": 24}
    return replace(PRESETS["sdxl"], attention=(0, 1, 1), middle_attention=1, **small), 8


def matmul_rate(device: torch.device, n: int) -> float:
    """FLOP/s of a product of square bf16 matrices."""
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * n**3 / statistics.median(seconds_of(lambda: torch.mm(x, x, out=y), device))


def seconds_of(work: Callable[[], Any], device: torch.device) -> list[float]:
    """Of STEPS calls, after WARM."""
    found = []
    for _ in range(WARM + STEPS):
        finish(device)
        begun = time.perf_counter()
        work()
        finish(device)
        found.append(time.perf_counter() - begun)
    return found[WARM:]


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_network(cfg: Config, device: torch.device) -> nn.Module:
    """In the dtype of --weights, without zeros: they would multiply faster than a trained one's."""
    with device:
        net = build(network(cfg)[0])
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.02)
    cast_weights(net, {"fingerprint": None}, cfg)
    return net.to(memory_format=torch.channels_last)


def measure(cfg: Config, batch: int, device: torch.device) -> dict[str, Any]:
    """One row: of steps of a batch."""
    like, side = network(cfg)
    net = random_network(cfg, device)
    net.checkpointing = cfg.checkpointing
    flags = SimpleNamespace(lr=1e-5, weight_decay=0.01, seed=0, **vars(cfg))
    optimizer, flow = make_optimizer(net, flags), make_objective("fm")
    given = inputs_of(like, batch, (like.in_channels, side, side))
    given = {name: x.to(device) for name, x in given.items()}
    x0, t = given.pop("x"), given.pop("t") / 1000
    eps = torch.randn_like(x0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        one_step(net, optimizer, flow, {"x0": x0, "eps": eps, "t": t, **given}, device)

    times = seconds_of(step, device)
    return {
        "batch": batch,
        "seconds": statistics.median(times),
        "all seconds": times,
        "images/s": batch / statistics.median(times),
        "peak bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def one_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    flow: Objective,
    batch: dict[str, torch.Tensor],
    device: torch.device,
) -> None:
    with autocast(device, "bf16"):
        loss = flow.loss(net, **batch).loss
    loss.backward()
    params = list(net.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in params])
    if isinstance(optimizer, AdamW8bit):
        optimizer.step(clip=1.0, norm=norm)
    else:
        nn.utils.clip_grads_with_norm_(params, 1.0, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    device = pick_device(cfg.device)
    like, side = network(cfg)
    rate = matmul_rate(device, 8192 if device.type == "cuda" else 256)
    flops = forward_flops(like, side)
    rows = []
    for batch in cfg.batches:
        try:
            row = measure(cfg, batch, device)
        except torch.OutOfMemoryError as error:
            rows.append({"batch": batch, "left out": str(error).partition(". ")[0]})
            print(f"batch {batch}: out of memory", flush=True)
            break
        row["MFU"] = TRAINING * flops * row["images/s"] / rate
        rows.append(row)
        peak = f", {row['peak bytes'] / 1e9:.1f} GB" if row["peak bytes"] else ""
        text = f"batch {batch}: {row['images/s']:.2f} images/s, MFU {row['MFU']:.1%}{peak}"
        print(text, flush=True)
    result = {
        **record.context(),
        "weights": cfg.weights,
        "optim": cfg.optim,
        "checkpointing": cfg.checkpointing,
        "mini": cfg.mini,
        "forward FLOP an image": flops,
        "matmul FLOP/s": rate,
        "rows": rows,
    }
    path = Path(cfg.out) if cfg.out else record.RESULTS / "sdxl_step.json"
    record.save(path, result)
    print(path)


if __name__ == "__main__":
    cli(main)
