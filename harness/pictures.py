"""Pictures that were drawn, as PNG, as one grid, as NumPy."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.files import atomic, make_dir


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_image(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """uint8 images (B, 3, H, W) -> one PNG, row by row, on a white 2-pixel grid."""
    B, _, H, W = images.shape
    columns = columns or math.ceil(B**0.5)
    rows = -(-B // columns)
    grid = Image.new("RGB", (columns * (W + 2) + 2, rows * (H + 2) + 2), "white")
    for i, image in enumerate(images.cpu()):
        row, column = divmod(i, columns)
        grid.paste(to_image(image), (2 + column * (W + 2), 2 + row * (H + 2)))
    make_dir(path.parent)
    save_png(grid, path)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture, atomically."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def save_npz(images: Tensor, path: Path) -> None:
    """uint8 images (n, 3, H, W) as arr_0 (n, H, W, 3), atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy())


def save_all(images: Tensor, folder: Path, first: int, npz: str = "", grid: bool = True) -> None:
    """uint8 images (n, 3, H, W) as 000000.png … in a folder, by their seeds from `first` on; and,
    if asked for, as an npz and as grid.png."""
    for seed, image in enumerate(images, first):
        save_png(to_image(image), folder / f"{seed:06d}.png")
    if npz:
        save_npz(images, Path(npz))
    if grid:
        save_grid(images, folder / "grid.png")
