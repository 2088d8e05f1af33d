"""Pictures that were drawn, as PNG, as one grid, as NumPy; a folder of samples, which is a set."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from harness.cli import UserError
from harness.files import atomic, make_dir

# The text of a PNG by which the next command knows that it may be replaced.
SEAL = "twinpath sample"


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def decibels(error: Tensor, peak: float) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(peak² / error) of mean squared errors, in any shape;
    peak: the range of the values. Infinite where the error is 0."""
    return 10 * (peak**2 / error.double()).log10()


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


def save_png(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a picture, atomically."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_npz(images: Tensor, path: Path) -> None:
    """uint8 images (n, 3, H, W) as arr_0 (n, H, W, 3), atomically."""
    make_dir(path.parent)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy())


def progress(bar: tqdm, n: int) -> Callable[[float, Tensor], None]:
    """A callback of sample() that moves the bar by its share of n images."""
    done = 0.0

    def advance(share: float, _: Tensor) -> None:
        nonlocal done
        bar.update((share - done) * n)
        done = share

    return advance


# ---- a folder of samples: the set of the images of one command -----------------------------------


def save_all(
    images: Tensor,
    folder: Path,
    first: int,
    npz: str = "",
    grid: bool = True,
    said: Callable[[int], dict[str, str]] = lambda seed: {},
) -> None:
    """uint8 images (n, 3, H, W) as 000000.png … in a folder, by their seeds from `first` on, in
    place of those of an earlier command; and, if asked for, as an npz and as a grid. said: what
    the text chunks of a seed's picture say, {key: text}."""
    old = set(drawn_before(folder))
    for seed, image in enumerate(map(to_image, images), first):
        path, info = folder / f"{seed:06d}.png", PngInfo()
        info.add_text(SEAL, seal_of(image, folder))
        for key, text in said(seed).items():
            info.add_text(key, text)
        save_png(image, path, info)
        old.discard(path)
    for path in old:
        path.unlink(missing_ok=True)
    if old:
        print(f"{len(old):,} pictures of an earlier command in {folder} are replaced")
    if npz:
        save_npz(images, Path(npz))
    if grid:
        save_grid(images, grid_of(folder))


def check_set(folder: Path, endings: tuple[str, ...], grid: bool) -> None:
    """Make a folder for samples. Pictures in it that no such command drew are refused: they would
    be taken for samples.

    endings: of what counts as a picture, nested folders included.
    """
    make_dir(folder)
    if grid:
        make_dir(grid_of(folder).parent)
    known = set(drawn_before(folder))
    others = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in endings)
    other = next((path for path in others if path not in known and not is_hidden(path, folder)), "")
    if other:
        raise UserError(
            f"{folder} holds pictures that were not drawn into it ({other.relative_to(folder)})",
            do="Name another --out, so that the folder is the set of its samples; or move them.",
        )


def drawn_before(folder: Path) -> list[Path]:
    """The pictures in a folder that are still as save_all() wrote them, there and nowhere else."""
    found = []
    for path in filter(Path.is_file, folder.glob("*.png")):
        try:
            with Image.open(path, formats=["PNG"]) as image:
                seal = image.info.get(SEAL)
                if seal and seal == seal_of(image, folder):
                    found.append(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return found


def seal_of(image: Image.Image, folder: Path) -> str:
    """What a picture's file says of its pixels and of the folder that it was drawn into."""
    place = f"{folder.resolve()} {image.mode} {image.size} "
    return hashlib.sha256(place.encode() + image.tobytes()).hexdigest()


def is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def grid_of(folder: Path) -> Path:
    """The picture of all, beside the folder: in it, it would be one of the samples."""
    return beside(folder, "-grid.png")


def beside(folder: Path, ending: str) -> Path:
    """A file that belongs to a folder of samples."""
    folder = folder if folder.name else folder.absolute()
    return folder.with_name(f"{folder.name or 'samples'}{ending}")
