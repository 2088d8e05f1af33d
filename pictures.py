"""Pictures in and out: images that editing starts from, and what was drawn, as PNG, as one grid, as NumPy."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import UserError
from files import fsync
from images import BadImage, decode


def read_picture(path: str, resolution: int) -> Tensor:
    """An image file as uint8 (3, resolution, resolution): shorter side resized, centre crop."""
    try:
        return torch.from_numpy(decode(Path(path), resolution).copy()).permute(2, 0, 1)
    except BadImage as error:
        raise UserError(f"{path}: {error}.  Give an image.") from None


def read_mask(path: str, like: tuple[str, ...], resolution: int) -> Tensor:
    """A mask file as bool (1, 1, resolution, resolution), white = True, resized and cropped as the images `like` it, whose size it must have."""
    mask = read_picture(path, resolution).float().mean(0) > 127
    sizes = {}
    for name in (path, *like):
        with Image.open(name) as file:
            sizes[name] = f"{file.width}×{file.height}"
        if sizes[name] != sizes[path]:
            raise UserError(f"--mask {path} is {sizes[path]}, but {name} is {sizes[name]}.  Make them the same size.")
    return mask[None, None]


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """uint8 images (B, 3, H, W) -> one PNG, row by row, on a white 2-pixel grid."""
    B, _, H, W = images.shape
    columns = columns or math.ceil(B ** 0.5)
    grid = Image.new("RGB", (columns * (W + 2) + 2, -(-B // columns) * (H + 2) + 2), "white")
    for i, image in enumerate(images.cpu()):
        grid.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (2 + i % columns * (W + 2), 2 + i // columns * (H + 2)))
    save_png(grid, path)


def save_png(image: Image.Image, path: Path) -> None:
    """Write through a temporary file, so that no half picture is ever seen."""
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format="PNG")
    fsync(temporary)
    temporary.replace(path)


def save_npz(images: Tensor, path: Path) -> None:
    """uint8 images (n, 3, H, W) as arr_0 (n, H, W, 3), through a temporary file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy())
    fsync(temporary)
    temporary.replace(path)
