"""The text of a training sample: its caption or its tags, changed by chance.

    flags = Captions(caption_share=0.5, caption_shuffle=True, caption_keep=1, caption_empty=0.1)
    flags.say(caption, tags, rng)                # one string; "" is the null text

A caption is whole: it is never split at commas and never lower-cased. Tags are words of a list:
they may come in any order, and some may be missing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ckpt.byteunet import ByteUNetConfig, byte_ids
from data.tags import Spellings, is_text, read_text, split_tags, table_rows
from harness.cli import UserError, clipped, flag
from text import Told

ENDING = ".caption"  # of a picture's own, beside it: sd-scripts' usual one


@dataclass(frozen=True)
class Captions:
    """The --caption-… flags."""

    caption_share: float = flag(
        0.5, "of captions, where there are tags too", low=0, high=1, of="--text"
    )
    caption_shuffle: bool = flag(False, "tags in a new order each time", of="--text")
    caption_drop: float = flag(0.0, "share of tags left out", low=0, high=1, of="--text")
    caption_keep: int = flag(0, "so many first tags stay, and first", low=0, high=1e4, of="--text")
    caption_empty: float = flag(
        0.1, "share of texts that are empty, for guidance", low=0, high=1, of="--text"
    )

    def say(self, caption: str, tags: Sequence[str], rng: np.random.Generator) -> str:
        """What a network is told of an image; "" says nothing of it.

        rng is one sample's own. It is asked for the same numbers under all flags, so that none
        of them changes what another one draws.
        """
        if caption and split_tags(caption) == tuple(tags):
            tags = ()  # they are its own pieces: a table had no other column
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


class ByteTexts:
    """Prompts for a network that reads bytes: a teller (data/prompts.py)."""

    context_dim = vector_dim = 0
    # Its encoder is a part of the network, which has a fingerprint.
    fingerprint = ""

    def __init__(self, net: ByteUNetConfig):
        self.places = net.text_places

    def tell(self, texts: Sequence[str], *, chunks: int = 1, skip: int = 0) -> Told:
        """The ids of each text (n, places); what of it is cut off is said."""
        if chunks != 1 or skip:
            raise UserError(
                "--chunks and --clip-skip are for CLIP's text encoders; this network reads bytes",
                do="Leave them out.",
            )
        for text in dict.fromkeys(texts):
            rest = text.encode()[self.places :].decode(errors="replace")
            if rest:
                print(
                    f"warning: {self.places} bytes of a text are read; cut off: {clipped(rest)!r}",
                    file=sys.stderr,
                )
        return Told(byte_ids(texts, self.places), None)

    def null(self, negative: str | None, *, chunks: int = 1, skip: int = 0) -> Told:
        """The ids (1, places) of the negative prompt; None is "", as in training."""
        return self.tell([negative or ""], chunks=chunks, skip=skip)

    def to(self, device: torch.device) -> "ByteTexts":
        """Itself: it has no weights of its own."""
        return self


# ---- files --------------------------------------------------------------------------------------


def read_captions(
    root: Path, names: Sequence[str], tables: Sequence[Path], sidecars: set[str]
) -> list[str]:
    """The caption of each image, "" where there is none: from the column "caption" of tables that
    name their images, and from files beside them (a.png -> a.caption), which win."""
    found: dict[str, str] = {}
    named, texts = Spellings(names), Spellings(sidecars)
    for table in sorted(tables):
        for number, key, row in table_rows(root, table):
            value = row.get("caption") or ""
            if isinstance(value, list) and row.get("tags") is None and row.get("text") is None:
                value = ""  # it is the row's list of tags
            if not isinstance(value, str) or not is_text(value):
                raise UserError(
                    f"{table}:{number}: the caption {ascii(str(value))[:60]} is not a text",
                    do="Mend this line.",
                )
            found[named.find(key) or key] = value.strip()
    for name in names:
        sidecar = texts.find(str(Path(name).with_suffix(ENDING)))
        if sidecar:
            found[name] = " ".join(read_text(root / sidecar).splitlines()).strip()
    return [found.get(name, "") for name in names]
