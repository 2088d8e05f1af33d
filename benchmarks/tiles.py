"""Which tiles of the kernels are fastest on this GPU:  python benchmarks/tiles.py [--out FOLDER]

Times attention and GroupNorm with other tiles than the ones that ship, one setting changed at a
time, at shapes of a U-Net in bf16, and writes FOLDER/tiles-attention.json and
tiles-groupnorm.json: [microseconds, tile] by kernel and shape, the fastest first. What ships is
called "now". Times are the GPU's, with cold caches (benchmarks/race.py). A tile that does not
compile or does not fit is left out.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.race import DEVICE, race
from harness import record
from harness.cli import UserError, cli, flag, parse
from kernels import attention, groupnorm

REPEATS = 25
Row = tuple[int, int, int, int]
# (B, heads, N, D)
ATTENTION = [(64, 6, 256, 64), (64, 3, 1024, 64), (64, 9, 64, 64), (64, 8, 256, 32)]
ATTENTION += [(64, 4, 256, 128)]
# (C, side), of 64 images
GROUPNORM = [(192, 32), (384, 16), (384, 32), (576, 8), (768, 4), (1536, 4)]
# (BN, BM, warps, stages)
ROWS: dict[str, list[Row]] = {
    "forward": [
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 32, 4, 4)),
        *((128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4)),
        *((128, 128, 8, 2), (128, 128, 8, 3)),
    ],
    "backward_kv": [
        *((32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2), (64, 64, 4, 1)),
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 4, 2), (64, 128, 8, 2)),
        *((64, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2)),
    ],
    "backward_q": [
        *((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3)),
        *((64, 128, 4, 2), (128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2)),
        *((128, 64, 8, 3), (128, 128, 8, 2)),
    ],
    "small": [(256, 32, 4, 1), (256, 32, 8, 1), (256, 32, 8, 2), (256, 64, 8, 1), (256, 64, 16, 1)],
}
# Settings of kernels/groupnorm.py. SUM_TILE is that of NHWC.
SETTINGS: dict[str, list[Any]] = {
    "CHUNK": [64, 256, 512],
    "ROWS": [16, 64],
    "COLS": [32, 128],
    "WARPS": [2, 8],
    "SMALL": [2048, 8192],
    "SUM_TILE": [(8, 64), (32, 32), (32, 64), (8, 128), (16, 128)],
}
# What ships.
NOW = {name: getattr(groupnorm, name) for name in SETTINGS}


@dataclass(frozen=True)
class Config:
    out: str = flag("benchmarks/results/tiles", "where the two files go", writes="folder")


def ranked(label: str, makers: dict[str, Callable[[], Callable]]) -> list[list[Any]]:
    """[microseconds, name] of a race, the fastest first."""
    times = race(makers, REPEATS)
    found = [[t["seconds"] * 1e6, name] for name, t in times.items() if "seconds" in t]
    found.sort()
    best = "  ".join(f"{name} {us:.1f}" for us, name in found[:5])
    print(f"{label:<36} {best}", flush=True)
    return found


# ---- attention -----------------------------------------------------------------------------------


def attention_tiles() -> dict[str, list]:
    """Every kernel of attention at every shape."""
    found = {}
    for B, heads, N, D in ATTENTION:
        q, k, v, do = (
            torch.randn(B, heads, N, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)
        )
        for kind, call in attention_calls(q, k, v, do):
            label = f"{kind} {B}x{heads}x{N} d{D}"
            found[label] = ranked(label, dict(with_rows(kind, N, D, call)))
    return found


def attention_calls(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What times each kernel: (kind, call). The two of the backward pass run together."""
    N, D = q.shape[2:]
    scale = D**-0.5
    o, lse = attention.forward(q, k, v, scale)
    given = (q, k, v, o, do, lse, *(attention.like(t) for t in (q, k, v)), scale)
    blocks = partial(attention.launch_blocks, *given)
    yield "forward", partial(attention.forward, q, k, v, scale)
    yield "backward_kv", blocks
    yield "backward_q", blocks
    if N <= attention.largest(D, q.dtype):
        yield "small", partial(attention.launch_small, *given)


def with_rows(kind: str, N: int, D: int, call: Callable) -> Iterator[tuple[str, Callable]]:
    """(name, maker) of every row of a kernel's table that this shape may use."""
    few = f"{kind} few"
    if N <= attention.FEW and few in attention.CONFIG:
        kind = few
    now = attention.CONFIG[kind][D]
    for row in [row for row in ROWS[kind.removesuffix(" few")] if row != now]:
        yield str(row), partial(with_row, kind, D, row, call)
    # Last, and so what stays.
    yield f"now {now}", partial(with_row, kind, D, now, call)


def with_row(kind: str, D: int, row: Row, call: Callable) -> Callable:
    attention.CONFIG[kind][D] = row
    return call


# ---- GroupNorm -----------------------------------------------------------------------------------


def groupnorm_tiles() -> dict[str, list]:
    """Forward and backward passes at every shape."""
    found = {}
    for C, side in GROUPNORM:
        x = torch.randn(64, C, side, side, device=DEVICE, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        w, b = torch.rand(C, device=DEVICE), torch.rand(C, device=DEVICE)
        s, t = (torch.randn(64, C, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        forward = partial(groupnorm.forward, x, w, b, s, t, 32, True, 1e-5)
        _, *kept = forward()
        backward = partial(groupnorm.backward, torch.randn_like(x), x, w, b, s, *kept, True)
        for way, call in (("forward", forward), ("backward", backward)):
            label = f"groupnorm {way} {C}@{side}"
            found[label] = ranked(label, dict(with_settings(call)))
    return found


def with_settings(call: Callable) -> Iterator[tuple[str, Callable]]:
    """(name, maker): one setting changed at a time."""
    for name, values in SETTINGS.items():
        for value in values:
            yield f"{name} {value}", partial(with_setting, name, value, call)
    yield "now", partial(with_setting, "", None, call)


def with_setting(name: str, value: Any, call: Callable) -> Callable:
    if name == "SUM_TILE":
        value = {**NOW[name], True: value}
    for own, shipped in NOW.items():
        setattr(groupnorm, own, value if own == name else shipped)
    return call


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    if DEVICE.type != "cuda":
        raise UserError("there is no GPU here", wanted="one", do="Run it where the kernels run.")
    torch.manual_seed(0)
    for name, measure in (("attention", attention_tiles), ("groupnorm", groupnorm_tiles)):
        path = Path(cfg.out) / f"tiles-{name}.json"
        record.save(path, {**record.context(), "tiles": measure()})
        print(path)


if __name__ == "__main__":
    cli(main)
