"""Aspect-ratio buckets: pictures keep their shape, and a batch has one.

    buckets = Buckets.of("1024x1024", step=64)     # 33 sizes of about a megapixel, 512 to 2048 px
    frames = buckets.assign(originals)             # the bucket of each image, by its own size
    told = size_numbers((1000, 1200), (896, 1152), mirrored=True)   # what SDXL is told of a crop

The rule is sd-scripts': the sizes with sides that are multiples of `step` and as much of the area
as fits; an image goes where the ratio of width to height differs least. There it is resized to
cover the bucket, and what is too long is cut off.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.images import Size, covering, kept_of, start_of
from harness.cli import UserError
from text import parse_size


def bucket_sizes(area: int, step: int, low: int, high: int) -> list[Size]:
    """(width, height) of all buckets, from tall to wide: multiples of `step` from `low` to `high`
    pixels, each height the largest that keeps width · height within `area`, or `high`; the same
    turned; and the largest square."""
    side = math.isqrt(area) // step * step
    found = {(side, side)}
    for width in range(-(-low // step) * step, high + 1, step):
        height = min(area // width, high) // step * step
        if height >= low:
            found |= {(width, height), (height, width)}
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def nearest(sizes: Sequence[Size], originals: np.ndarray) -> np.ndarray:
    """(n,): which of the sizes each image of size (width, height), (n, 2), is nearest to by the
    difference of width / height; of equal ones the largest, of equally large ones the first."""
    ratios = originals[:, 0] / originals[:, 1]
    best = np.full(len(ratios), np.inf)
    found = np.zeros(len(ratios), np.int64)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k][0] * sizes[k][1]):
        width, height = sizes[k]
        apart = np.abs(ratios - width / height)
        found[apart < best] = k
        best = np.minimum(best, apart)
    return found


def size_numbers(
    original: Size,
    size: Size,
    mirrored: bool = False,
    where: float | None = None,
    wide: int = 1,
) -> Tensor:
    """What SDXL is told of a picture (Podell et al. 2023), fp32 (6,): its height and width before
    it was resized, the pixels cut off at its top and left afterwards, the height and width that are
    left. The order is that of text.size_vector(): height first, top first.

    original, size: (width, height) of the file and of the bucket. where, wide: as in images.cut and
    images.kept_of. Of a mirrored picture the left is what was the right.
    """
    whole = covering(original, size)
    kept = kept_of(whole, size, wide)
    left, top = (
        (all_ - strip) // 2 + start_of(strip - part, where)
        for all_, strip, part in zip(whole, kept, size)
    )
    if mirrored:
        left = whole[0] - size[0] - left
    width, height = size
    return torch.tensor(
        [original[1], original[0], top, left, height, width], dtype=torch.float32
    )


@dataclass(frozen=True)
class Buckets:
    """All sizes of a run, and what to do with images that are smaller than theirs."""

    sizes: tuple[Size, ...]
    step: int
    side: int  # of the square one
    skip_small: bool = False  # else they are enlarged

    @classmethod
    def of(cls, area: str, step: int, skip_small: bool = False) -> "Buckets":
        """Sides from half the square's to twice. area: WIDTHxHEIGHT, of which only the product
        counts. UserError: what cannot be."""
        height, width = parse_size(area, "--area")
        side = math.isqrt(width * height) // step * step
        if not side:
            raise UserError(
                f"--step {step} is larger than a picture of --area {area}",
                do="Lower --step, or raise --area.",
            )
        sizes = bucket_sizes(width * height, step, side // 2, 2 * side)
        return cls(tuple(sizes), step, side, skip_small)

    def check_step(self, unit: int, who: str) -> None:
        """Refuse sides that are no multiples of `unit`, which `who` needs."""
        if self.step % unit:
            raise UserError(
                f"--step {self.step}: {who} needs sides that are divisible by {unit}",
                do=f"Try --step {math.lcm(self.step, unit)}.",
            )

    def assign(self, originals: Sequence[Size]) -> "Frames":
        """The frames of images of these sizes (width, height)."""
        table = np.array(originals, np.int64).reshape(-1, 2)
        return Frames(self, table, nearest(self.sizes, table))


@dataclass(frozen=True)
class Frames:
    """Which bucket each image of a data set goes to."""

    buckets: Buckets
    originals: np.ndarray  # (n, 2) width and height of each image, upright
    bucket: np.ndarray  # (n,) number of a size

    def size(self, i: int) -> Size:
        """(width, height) of image i as it is trained on."""
        return self.buckets.sizes[self.bucket[i]]

    def numbers(self, i: int, mirrored: bool, where: float | None, wide: int) -> Tensor:
        """size_numbers() of image i."""
        width, height = map(int, self.originals[i])
        return size_numbers((width, height), self.size(i), mirrored, where, wide)

    @property
    def small(self) -> np.ndarray:
        """(n,) bool: has to be enlarged to cover its bucket."""
        sizes = np.array(self.buckets.sizes)[self.bucket]
        return (self.originals < sizes).any(1)

    def why_small(self, i: int) -> str:
        """Why image i is skipped."""
        width, height = self.originals[i]
        wanted = "×".join(map(str, self.size(i)))
        return f"{width}×{height} is smaller than its bucket, {wanted}"

    def take(self, images: Iterable[int]) -> "Frames":
        """Those of some images."""
        index = np.array(list(images), np.int64)
        return Frames(self.buckets, self.originals[index], self.bucket[index])

    def counts(self) -> list[list[int]]:
        """[width, height, images] of each bucket that has any."""
        found = np.bincount(self.bucket, minlength=len(self.buckets.sizes))
        return [[*size, int(n)] for size, n in zip(self.buckets.sizes, found) if n]

    def members(self, index: np.ndarray) -> list[np.ndarray]:
        """For each bucket, the places in `index` of its images."""
        bucket = self.bucket[index]
        return [np.flatnonzero(bucket == k) for k in range(len(self.buckets.sizes))]
