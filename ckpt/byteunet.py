"""A U-Net that reads bytes: its text encoder is a part of it and is trained with it, without a
vocabulary and without a download.

    net = ByteUNet(byte_config(PRESETS["tiny"]))
    net(x, t, context=byte_ids(["red hair, glasses", ""]))    # ids (2, 256) in place of vectors

The encoder is a sum over words: each word has a row of one table, and each two words with one
space between them a row of another, both found by a hash of their bytes (Joulin et al. 2016, "Bag
of Tricks for Efficient Text Classification", section 2.1). The sum joins the time embedding. Of
the order of words it knows no more than these pairs, and a word that training never showed is a
random vector, best left out of a prompt.

Every text fills the same number of places, PAD behind its UTF-8 bytes. The null text is "".
Who imports this file finds the network in model.NETWORKS.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import NETWORKS, UNet, UNetConfig

PAD = 256  # behind the 256 bytes
SPACE = 32
SPREAD = 0.3  # standard deviation of a row's first values
PRIME, MODULUS = 1_000_003, 2**31 - 1  # of the polynomial hash


@dataclass(frozen=True)
class ByteUNetConfig(UNetConfig):
    """A U-Net whose vector, vector_dim wide, is what its encoder makes of bytes."""

    text_places: int = 256
    text_rows: int = 2048  # of the table of words, and of the table of pairs

    def __post_init__(self):
        super().__post_init__()
        if not self.vector_dim or self.context_dim:
            given = f"vector_dim is {self.vector_dim}, context_dim {self.context_dim}"
            raise ValueError(f"{given}: wanted a vector and no context.")


def byte_config(cfg: UNetConfig, width: int = 128) -> ByteUNetConfig:
    """A U-Net's config with an encoder so wide."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    return ByteUNetConfig(**{**values, "vector_dim": width})


def byte_ids(texts: Sequence[str], places: int = ByteUNetConfig.text_places) -> Tensor:
    """int64 (B, places): the bytes of each text; what is behind them is cut off."""
    ids = torch.full((len(texts), places), PAD)
    for row, text in zip(ids, texts, strict=True):
        data = text.encode()[:places]
        row[: len(data)] = torch.tensor(list(data), dtype=torch.int64)
    return ids


def between(ids: Tensor, low: str, high: str) -> Tensor:
    return (ids >= ord(low)) & (ids <= ord(high))


def span_hash(ids: Tensor, first: Tensor) -> Tensor:
    """For each place i of ids (B, N) a hash, in [0, MODULUS), of ids[first[i] : i + 1].

    It is the polynomial sum of (id + 1) · PRIME^k, k from 0 at the span's own beginning: a
    difference of two prefix sums, divided by PRIME^first.
    """
    N = ids.shape[1]
    powers = [pow(PRIME, k, MODULUS) for k in range(N)]
    inverses = [pow(PRIME, -k, MODULUS) for k in range(N)]
    terms = (ids + 1) * ids.new_tensor(powers) % MODULUS
    sums = F.pad(terms.cumsum(1), (1, 0))  # of all before a place; below N · 2^31
    span = (sums[:, 1:] - sums.gather(1, first)) % MODULUS
    return span * ids.new_tensor(inverses)[first] % MODULUS


def word_hashes(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Two of (B, N) for ids (B, N): at the last byte of each word a hash of the word, and, where
    one space stands between it and the word before, a hash of both; -1 at every other place.

    A word is a run of letters, digits and bytes of UTF-8 beyond ASCII. A and a are one.
    """
    ids = ids + 32 * between(ids, "A", "Z")
    inside = between(ids, "a", "z") | between(ids, "0", "9") | between(ids, "\x80", "\xff")
    before = F.pad(inside, (1, 0))[:, :-1]
    after = F.pad(inside, (0, 1))[:, 1:]
    last = inside & ~after
    # Where the word begins in which a place is, or the nearest one before it.
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = torch.where(inside & ~before, place, 0).cummax(1).values
    word = span_hash(ids, first)
    gap = (first - 1).clamp(min=0)
    one_space = (ids.gather(1, gap) == SPACE) & inside.gather(1, (gap - 1).clamp(min=0))
    both = span_hash(ids, first.gather(1, gap))
    return torch.where(last, word, -1), torch.where(last & one_space, both, -1)


class ByteEncoder(nn.Module):
    def __init__(self, cfg: ByteUNetConfig):
        super().__init__()
        self.words = nn.Embedding(cfg.text_rows, cfg.vector_dim)
        self.pairs = nn.Embedding(cfg.text_rows, cfg.vector_dim)
        for table in (self.words, self.pairs):
            nn.init.normal_(table.weight, std=SPREAD)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, places) of byte_ids() to (B, vector_dim); zeros of the empty text."""
        said = 0
        for hashes, table in zip(word_hashes(ids), (self.words, self.pairs), strict=True):
            rows = table(hashes.clamp(min=0) % table.num_embeddings)
            said = said + (rows * (hashes >= 0)[..., None]).sum(1)
        return said


class ByteUNet(UNet):
    def __init__(self, cfg: ByteUNetConfig):
        super().__init__(cfg)
        self.text = ByteEncoder(cfg)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None,
        features: tuple[str, ...] | None = None,
    ) -> Any:  # fmt: skip
        """As UNet's, with context (B, text_places): the ids of byte_ids(). y is None: the vector is
        what the text says."""
        places = self.cfg.text_places
        if context is None or context.shape != (len(x), places) or context.is_floating_point():
            got = None if context is None else f"{context.dtype} {tuple(context.shape)}"
            raise ValueError(f"context is {got}: wanted byte ids ({len(x)}, {places}).")
        if y is not None:
            raise ValueError("y is a part of what the text says: it must be None.")
        return super().forward(x, t, self.text(context), None, features)


NETWORKS["ByteUNet"] = (ByteUNet, ByteUNetConfig)
