"""What each GPU holds of full-size SDXL, on 1, 8 and 32 GPUs: a plan, from shapes alone.

    python benchmarks/sharding.py

The network is built without memory (torch's meta device) and cut as training/sharding.py cuts it.
Counted: fp32 weights, gradients, moments and averages, and what a step gathers. Not counted:
activations, the autoencoder, text encoders, and what torch and NCCL keep for themselves.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch import Tensor, nn

from harness import record
from kernels.adamw8bit import BLOCK, SMALLEST
from model import PRESETS, build, num_params
from training.sharding import units

GIB = 2**30
# (GPUs, hosts): each host holds all shards.
SIZES = ((1, 1), (8, 1), (32, 4))
EMAS = 2  # as many as train.py has if nobody says more


def rows_of(p: Tensor, shards: int) -> int:
    """Elements of the largest shard of a parameter."""
    return -(-len(p) // shards) * p[0].numel()


def moments(p: Tensor, shards: int, optim: str) -> int:
    """Bytes of the moments of the largest shard of a parameter."""
    n = rows_of(p, shards)
    if optim == "adamw" or n < SMALLEST or p.ndim < 2:
        return 8 * n
    return 2 * (n + 4 * -(-n // BLOCK))


def plan(net: nn.Module, shards: int, optim: str, emas: int) -> dict[str, int]:
    """Bytes of the largest rank, by what they are. gathered: with shards, the bf16 weights of two
    blocks (one computes, one is under way) and the gradients of one, in bf16 and in fp32, while
    they are summed; on one GPU, autocast's bf16 copies of all weights."""
    params = list(net.parameters())
    held = sum(rows_of(p, shards) for p in params)
    blocks = sorted(sum(p.numel() for p in unit.parameters()) for unit in units(net))
    gathered = 2 * held
    if shards > 1:
        gathered = 2 * sum(blocks[-2:]) + (2 + 4) * blocks[-1]
    return {
        "weights": 4 * held,
        "gradients": 4 * held,
        "moments": sum(moments(p, shards, optim) for p in params),
        "EMAs": 4 * emas * held,
        "gathered": gathered,
    }


def rows() -> list[dict]:
    """The plans of full-size SDXL."""
    with torch.device("meta"):
        net = build(PRESETS["sdxl"])
    return [
        {"gpus": gpus, "hosts": hosts, "optim": optim}
        | {"bytes": plan(net, gpus // hosts, optim, emas)}
        for gpus, hosts in SIZES
        for optim, emas in (("adamw", EMAS), ("adamw8bit", EMAS), ("adamw8bit", 0))
    ]


if __name__ == "__main__":
    found = rows()
    for row in found:
        print(row, f"{sum(row['bytes'].values()) / GIB:.2f} GiB")
    record.write("sharding", {"parameters": num_params(PRESETS["sdxl"]), "rows": found})
