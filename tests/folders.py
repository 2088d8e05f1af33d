"""Folders of pictures for tests of metrics."""

from pathlib import Path

import numpy as np
from PIL import Image


def pictures(folder: Path, n: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """Smooth noise as n PNGs; size: (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    r = np.random.default_rng(seed)
    for i in range(n):
        noise = Image.fromarray(r.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return folder


def read_all(folder: Path) -> np.ndarray:
    """The pictures of a folder, uint8 (N, H, W, 3)."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
