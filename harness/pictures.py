"""Pictures that were drawn, as PNG, as one grid, as NumPy."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.files import atomic


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """uint8 images (B, 3, H, W) -> one PNG, row by row, on a white 2-pixel grid."""
    B, _, H, W = images.shape
    columns = columns or math.ceil(B**0.5)
    grid = Image.new("RGB", (columns * (W + 2) + 2, -(-B // columns) * (H + 2) + 2), "white")
    for i, image in enumerate(images.cpu()):
        grid.paste(
            Image.fromarray(image.permute(1, 2, 0).numpy()),
            (2 + i % columns * (W + 2), 2 + i // columns * (H + 2)),
        )
    save_png(grid, path)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture, atomically."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def save_npz(images: Tensor, path: Path) -> None:
    """uint8 images (n, 3, H, W) as arr_0 (n, H, W, 3), atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy())
