"""What fine-tuning SDXL comes to on 1, 8 and 32 GPUs: images/s, GPU-hours, disk, from shapes.

    python benchmarks/budget.py

FLOP of a step are counted without memory (torch's meta device). How much of a GPU's rate a step
uses is assumed, not measured: UTILISATION. `benchmarks/gpu_day.sh sdxl` measures it. Beside it
stands the budget that nyaflow-xl's authors name: 32 H100 for 48 hours, 3.6 million pictures.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness import record
from model import PRESETS, build
from text import CONTEXT, TEXT_PRESETS, TextEncoder
from training.optimizer import state_bytes
from training.precision import inputs_of

SIDE = 128  # of the latents of 1024 px
GPUS = (1, 8, 32)
PEAK = 989e12  # FLOP/s of an H100 SXM in bf16 without sparsity, by NVIDIA's data sheet
UTILISATION = 0.4  # of PEAK: assumed
TRAINING = 3  # FLOP of a step, in forward passes
SOURCE = {"gpus": 32, "hours": 48, "images": 3_600_000}
HALF = 2  # bytes of a cache's number
KEPT = 3  # checkpoints: --keep 2, and the one that is being written


def forward_flops(cfg: Any, side: int) -> int:
    """Of one evaluation for one image; a multiply-add is two."""
    shape = (cfg.in_channels, side, side)
    given = {name: x.to("meta") for name, x in inputs_of(cfg, 1, shape).items()}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(cfg)(**given)
    return counter.get_total_flops()


def caption_flops(encoder: str) -> int:
    """Of one text of a text encoder's preset."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        TextEncoder(TEXT_PRESETS[encoder])(torch.zeros(1, CONTEXT, dtype=torch.long))
    return counter.get_total_flops()


def checkpoint_bytes(net: nn.Module, optim: str, emas: int) -> int:
    """Weights in fp32, moments and averages, as train.py saves them."""
    flags = SimpleNamespace(optim=optim, weights="fp32", ema=(0.1,) * emas)
    return sum(state_bytes(net, flags))


def speeds(flops: float, captions: float) -> list[dict[str, float]]:
    """Of each number of GPUs; flops: of a step, an image; captions: of a text."""
    rate = PEAK * UTILISATION / flops
    passes = SOURCE["images"] / rate / 3600
    return [
        {
            "gpus": gpus,
            "images/s": gpus * rate,
            "hours a pass": passes / gpus,
            "GPU-hours a pass": passes,
            "text FLOP/s a GPU": rate * captions,
        }
        for gpus in GPUS
    ]


def budget() -> dict[str, Any]:
    cfg = PRESETS["sdxl"]
    with torch.device("meta"):
        net = build(cfg)
    flops = TRAINING * forward_flops(cfg, SIDE)
    captions = sum(map(caption_flops, ("clip-l", "clip-bigg")))
    gpu_hours = SOURCE["gpus"] * SOURCE["hours"]
    images = gpu_hours * 3600 * PEAK * UTILISATION / flops
    latents = HALF * cfg.in_channels * SIDE**2
    texts = HALF * (CONTEXT * cfg.context_dim + cfg.vector_dim)
    checkpoints = [("adamw", 2), ("adamw8bit", 2), ("adamw8bit", 1)]
    return {
        "flops of a step, an image": flops,
        "flops of a text": captions,
        "peak": PEAK,
        "utilisation": UTILISATION,
        "speeds": speeds(flops, captions),
        "source": SOURCE | {"GPU-hours": gpu_hours, "shown": images},
        "bytes": {
            "latents of an image": latents,
            "latents": latents * SOURCE["images"],
            "encoded text of an image": texts,
            "encoded texts": texts * SOURCE["images"],
        },
        "checkpoints": [
            {"optim": optim, "emas": emas, "bytes": checkpoint_bytes(net, optim, emas)}
            for optim, emas in checkpoints
        ],
        "kept": KEPT,
    }


if __name__ == "__main__":
    record.write("budget", budget())
