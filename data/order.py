"""Which image is seen at a position of a run: a function of (seed, position), of nothing else.

    index_at(seed, n, position)                    # of n images, all of them once in n positions
    BucketOrder(seed, members, batch).image(position)   # of images in buckets (data/buckets.py)

So a resumed run, more ranks or another objective see the same images in the same order.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


def rng(seed: int, stream: str, number: int) -> np.random.Generator:
    """A counter-based generator (Philox) for one purpose: a pure function of its arguments."""
    word = int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:8], "big")
    return np.random.Generator(np.random.Philox(key=[word, number]))


@lru_cache(maxsize=2)
def permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    return rng(seed, f"order of {n}", epoch).permutation(n)


def index_at(seed: int, n: int, position: int) -> int:
    """Which of n images is the position-th one seen: every image once per n positions, each time
    in a new order."""
    epoch, offset = divmod(position, n)
    return int(permutation(seed, n, epoch)[offset])


class Epoch(NamedTuple):
    """The batches of one epoch, in their order."""

    number: int
    first: int  # batches of the run before it
    bucket: np.ndarray  # (batches,): of which bucket each is
    turn: np.ndarray  # (batches,): how many of its bucket the run had before


class BucketOrder:
    """The order of a run whose global batches are of one bucket each.

    members: the images of each bucket. Buckets without any are allowed, as they are never drawn.
    batch: images a global batch.

    A bucket of n images hands them out as index_at() does, all of them in a new order again and
    again, in whole batches. By the end of epoch e it has handed out as many batches as fit into
    e · n images. What does not fill one, fewer images than a batch, is not lost: it opens the
    bucket's next batch. So after e epochs an image was seen e times, or e - 1 times if it is among
    those fewer than `batch` of its bucket that wait. The batches of all buckets mix in an order
    that is new each epoch.

    It keeps what it computed last, and nothing that its answers depend on.
    """

    def __init__(self, seed: int, members: Sequence[np.ndarray], batch: int):
        self.seed, self.members, self.batch = seed, members, batch
        self.counts = [len(images) for images in members]
        if not sum(self.counts):
            raise ValueError("no bucket has an image.")
        self.epoch = Epoch(-1, 0, np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.orders: dict[int, tuple[int, np.ndarray]] = {}

    def image(self, position: int) -> int:
        """Which image is the position-th one seen."""
        number, slot = divmod(position, self.batch)
        epoch = self.epoch_of(number)
        at = number - epoch.first
        bucket, turn = int(epoch.bucket[at]), int(epoch.turn[at])
        passed, offset = divmod(turn * self.batch + slot, self.counts[bucket])
        return int(self.members[bucket][self.order(bucket, passed)[offset]])

    def bucket(self, position: int) -> int:
        """Of which bucket the batch is that this position belongs to."""
        number = position // self.batch
        epoch = self.epoch_of(number)
        return int(epoch.bucket[number - epoch.first])

    def before(self, epoch: int) -> list[int]:
        """Batches of each bucket in all epochs before this one."""
        return [epoch * n // self.batch for n in self.counts]

    def total(self, epoch: int) -> int:
        return sum(self.before(epoch))

    def epoch_of(self, number: int) -> Epoch:
        """The epoch of the run's batch `number`. Epochs of a few images may be without any."""
        kept = self.epoch
        if not kept.first <= number < kept.first + len(kept.bucket):
            # By then every bucket has rounded down by less than a batch.
            end = (number + len(self.counts) + 1) * self.batch // sum(self.counts) + 2
            self.epoch = self.made(bisect_right(range(end), number, key=self.total) - 1)
        return self.epoch

    def made(self, number: int) -> Epoch:
        before, after = np.array(self.before(number)), np.array(self.before(number + 1))
        share = after - before
        batches = np.repeat(np.arange(len(share)), share)
        bucket = rng(self.seed, "order of batches", number).permutation(batches)
        # Sorted by bucket, those of one bucket keep their order: they are counted there.
        place = np.argsort(bucket, kind="stable")
        turn = np.empty(len(bucket), np.int64)
        turn[place] = np.arange(len(bucket)) - np.repeat(np.cumsum(share) - share, share)
        return Epoch(number, self.total(number), bucket, turn + before[bucket])

    def order(self, bucket: int, epoch: int) -> np.ndarray:
        """(n,): the order in which a bucket hands out its images for the epoch-th time."""
        kept = self.orders.get(bucket)
        if kept is None or kept[0] != epoch:
            draw = rng(self.seed, f"order of bucket {bucket}", epoch)
            kept = self.orders[bucket] = epoch, draw.permutation(self.counts[bucket])
        return kept[1]
