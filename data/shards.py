"""Which images a shard of a latent cache holds.

A shard has latents of one shape. Where images keep theirs (data/buckets.py), a cache holds one
bucket after the other, and each begins a shard.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from data.buckets import Buckets


class Shard(NamedTuple):
    first: int  # image
    images: int
    shape: tuple[int, int, int]  # (C, h, w) of the latents

    @property
    def latent_bytes(self) -> int:
        """Of one latent."""
        return 2 * math.prod(self.shape)


class Layout:
    """The shards of a plan (cache.Plan), none of which is listed: a plan may promise many."""

    def __init__(self, plan: Mapping[str, Any]):
        C, h, w = plan["shape"]
        self.per, self.shapes, counts = plan["shard"], [(C, h, w)], [plan["images"]]
        if plan.get("buckets"):
            factor = plan["resolution"] // h
            self.shapes = [(C, high // factor, wide // factor) for wide, high, _ in plan["counts"]]
            counts = [images for _, _, images in plan["counts"]]
        shards = [-(-images // self.per) for images in counts]
        # Of each bucket, its first image and shard; and where the last one ends.
        self.firsts = np.cumsum([0, *counts])
        self.begins = np.cumsum([0, *shards])

    def __len__(self) -> int:
        return int(self.begins[-1])

    def __getitem__(self, k: int) -> Shard:
        if not 0 <= k < len(self):
            raise IndexError(k)
        bucket = bisect_right(self.begins, k) - 1
        first = int(self.firsts[bucket] + (k - self.begins[bucket]) * self.per)
        images = min(self.per, int(self.firsts[bucket + 1]) - first)
        return Shard(first, images, self.shapes[bucket])

    def shard_of(self, images: Any) -> Any:
        """The shard of an image or of each of an array; -1 where an image is -1."""
        bucket = np.searchsorted(self.firsts, images, side="right") - 1
        inside = self.begins[bucket] + (images - self.firsts[bucket]) // self.per
        return np.where(np.asarray(images) < 0, -1, inside)


def buckets_of(plan: Mapping[str, Any]) -> Buckets | None:
    """The buckets that a cache was encoded with; None of squares."""
    how = plan.get("buckets")
    return Buckets.of(how["area"], how["step"], how["small"] == "skip") if how else None
