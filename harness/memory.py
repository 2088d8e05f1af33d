"""Does it fit? What a command needs at least, against what the machine has.

Estimates are low, and only what is far beyond the machine is refused: what may fit is tried.
"""

import os
from typing import Any

import torch

from harness.cli import UserError

# Times the machine's memory, from which on nothing helps: no swap, no thriftier allocation.
FAR = 4
CPU = torch.device("cpu")


def capacity(device: torch.device) -> int:
    """Bytes of a GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(what: str, need: int, device: torch.device = CPU) -> None:
    """Refuse what needs far more bytes than there are; `what` names the flags that say how much."""
    there = capacity(device)
    if need <= FAR * there:
        return
    where = "this GPU" if device.type == "cuda" else "this machine"
    raise UserError(
        f"{what} needs about {need / 1e9:,.0f} GB, {where} has {there / 1e9:,.0f} GB",
        do="Lower one of them.",
    )


def check_batch_memory(
    flags: str,
    batch: int,
    resolution: int,
    latent_shape: tuple[int, int, int],
    device: torch.device,
    width: int = 0,
) -> None:
    """Refuse a batch of images (B, 3, R, R) whose pixels, latents (C, h, w) and, in training, the
    network's first features (width, h, w) cannot be held.

    A step of training keeps eight such features at least: four blocks at full resolution, two each.
    """
    C, h, w = latent_shape
    numbers = 3 * resolution**2 + 4 * C * h * w + 8 * width * h * w
    check_memory(f"{flags} {batch} at --resolution {resolution}", 4 * batch * numbers, device)


def check_drawing(generator: Any, batch: int, n: int) -> None:
    """Refuse n images, of which a samplers.Generator draws `batch` at a time, that cannot be
    held."""
    R = generator.resolution
    check_memory(f"--n {n} at --resolution {R}", 2 * n * 3 * R**2)
    shape, device = generator.latent_shape, generator.device
    check_batch_memory("--batch", min(batch, n), R, shape, device)
