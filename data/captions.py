"""The text of a training sample: its caption or its tags, changed by chance.

    flags = Captions(caption_share=0.5, caption_shuffle=True, caption_keep=1, caption_empty=0.1)
    flags.text(caption, tags, rng)               # one string; "" is the null text

A caption is whole: it is never split at commas and never lower-cased. Tags are words of a list:
they may come in any order, and some may be missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.cli import flag


@dataclass(frozen=True)
class Captions:
    """The --caption-… flags."""

    caption_share: float = flag(0.5, "of captions, where tags are there too", low=0, high=1)
    caption_shuffle: bool = flag(False, "tags in a new order each time")
    caption_drop: float = flag(0.0, "share of the tags left out", low=0, high=1)
    caption_keep: int = flag(0, "so many first tags stay first and are never left out", low=0)
    caption_empty: float = flag(0.1, "share of texts that are empty, for guidance", low=0, high=1)

    def text(self, caption: str, tags: Sequence[str], rng: np.random.Generator) -> str:
        """What a network is told of an image; "" says nothing of it.

        rng is one sample's own. It is asked for the same numbers under all flags, so that none
        of them changes what another one draws.
        """
        empty, share = rng.random(2)
        order = rng.permutation(len(tags))
        dropped = rng.random(len(tags)) < self.caption_drop
        if empty < self.caption_empty:
            return ""
        if caption and (not tags or share < self.caption_share):
            return caption
        if not self.caption_shuffle:
            order = np.arange(len(tags))
        first = list(tags[: self.caption_keep])
        rest = [tags[i] for i in order if i >= self.caption_keep and not dropped[i]]
        return ", ".join(first + rest)
