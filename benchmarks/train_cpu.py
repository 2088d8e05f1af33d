"""Training speed on a CPU:  python benchmarks/train_cpu.py

1. A training step (forward, backward, AdamW) of our U-Net against diffusers' UNet2DModel with the
   same weights, input and optimizer, each in fp32 and in bf16 autocast; alternating, medians, as a
   ratio (above 1 = ours is faster).
2. A step of train.py with real data against the same step on one constant batch (1 = loading costs
   nothing).
"""

import copy
import itertools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data.dataset as data
import train
from benchmarks.peer_unet import peer_unet
from benchmarks.race import alternate
from harness import record
from harness.ranks import Ranks, autocast
from model import PRESETS, UNet, UNetConfig

ROUNDS, STEPS = 15, 2  # a round = STEPS steps of each side in turn
ADM = UNetConfig(
    model_channels=64, channel_mult=(1, 2, 2, 4), attention=(0, 1, 1, 0), num_head_channels=64
)
CASES = {
    "tiny, batch 16, 32×8×8": (PRESETS["tiny"], 16, 8),
    "tiny, batch 64, 32×8×8": (PRESETS["tiny"], 64, 8),
    "ADM 64 ch (1,2,2,4), batch 8, 32×32×32": (ADM, 8, 32),
}


def stepper(net: torch.nn.Module, call, batch: int, side: int, dtype: str = "fp32"):
    """A function that runs one training step of a copy of net on fixed random data."""
    net = copy.deepcopy(net)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 32, side, side, generator=g)
    t = torch.rand(batch, generator=g) * 1000
    goal = torch.randn(batch, 32, side, side, generator=g)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def step() -> None:
        with autocast(x.device, dtype):
            out = call(net, x, t)
        (out.float() - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def against_diffusers(cfg: UNetConfig, batch: int, side: int) -> dict[str, float]:
    net = UNet(cfg)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            # zero-initialised layers, so that outputs can be compared
            torch.nn.init.normal_(p, std=0.02)
    stock = peer_unet(net)
    nhwc = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    x, t = torch.randn(batch, 32, side, side), torch.rand(batch) * 1000
    with torch.no_grad():
        error = float((net(x, t) - stock(x, t).sample).abs().max())
    assert error < 1e-3, f"not the same function: {error}"

    def ours(net: torch.nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return net(x, t)

    def plain(net: torch.nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return net(x, t).sample

    def wide(net: torch.nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return net(x.contiguous(memory_format=torch.channels_last), t).sample

    sides = {
        "ours": stepper(net, ours, batch, side),
        "ours bf16": stepper(net, ours, batch, side, "bf16"),
        "diffusers": stepper(stock, plain, batch, side),
        "diffusers channels_last": stepper(nhwc, wide, batch, side),
        "diffusers channels_last bf16": stepper(nhwc, wide, batch, side, "bf16"),
    }
    times = alternate(sides, ROUNDS, STEPS)
    best = min(seconds for name, seconds in times.items() if name.startswith("diffusers"))
    return {
        **{f"{k} s/step": v for k, v in times.items()},
        "images/s": batch / times["ours"],
        "bf16 images/s": batch / times["ours bf16"],
        "ratio to diffusers": times["diffusers"] / times["ours"],
        "ratio to diffusers channels_last": times["diffusers channels_last"] / times["ours"],
        "bf16 ratio to fp32": times["ours"] / times["ours bf16"],
        "bf16 ratio to diffusers' best": best / times["ours bf16"],
        "max output difference": error,
    }


def loading() -> dict[str, float]:
    """A step of the default run, its batches from the data set or one kept batch."""
    with tempfile.TemporaryDirectory() as out:
        cfg = train.resolve(train.Config(data="toyfaces:1024", out=out))
        tr = train.setup(cfg, Ranks(0, 1, torch.device("cpu")))
        stream = data.Stream(tr.ds, None, tr.latent_shape, cfg.seed)
        real = data.batches(stream, train.positions(cfg, tr.ranks, 0))
        constant = itertools.repeat(next(data.batches(stream, train.positions(cfg, tr.ranks, 0))))
        sides = {"real": lambda: train.step(tr, real), "constant": lambda: train.step(tr, constant)}
        times = alternate(sides, ROUNDS, STEPS)
    return {
        "real data s/step": times["real"],
        "constant batch s/step": times["constant"],
        "ratio": times["real"] / times["constant"],
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    result = {name: against_diffusers(*case) for name, case in CASES.items()}
    for name, row in result.items():
        print(
            f"{name:<42} {row['images/s']:7.1f} images/s   "
            f"{row['ratio to diffusers']:.2f}× diffusers   "
            f"{row['ratio to diffusers channels_last']:.2f}× diffusers channels_last"
        )
        print(
            f"{'  bf16':<42} {row['bf16 images/s']:7.1f} images/s   "
            f"{row['bf16 ratio to fp32']:.2f}× fp32   "
            f"""{row["bf16 ratio to diffusers' best"]:.2f}× diffusers at its best"""
        )
    result["loading"] = loading()
    print(f"real data / constant batch: {result['loading']['ratio']:.3f}")
    record.write("train_cpu", {"rounds": ROUNDS, "steps a round": STEPS, "results": result})
