"""A U-Net that reads bytes: its text encoder is a part of it and is trained with it, without a
vocabulary and without a download.

    net = ByteUNet(byte_config(PRESETS["tiny"]))
    net(x, t, context=byte_ids(["red hair, glasses", ""]))    # ids (2, 128) in place of vectors

Every text fills the same number of places, PAD behind its UTF-8 bytes, so that what a text says
does not depend on the others of its batch. The null text is "": PAD alone, and what that means is
learnt. Who imports this file finds the network in model.NETWORKS.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.attention import attention
from model import NETWORKS, UNet, UNetConfig

PAD = 256  # behind the 256 bytes
# Bytes that end at a place and are known there at once, as one: hash n-gram embeddings (Pagnoni et
# al. 2024, "Byte Latent Transformer", section 3.2.1). Without them a small network trains for long
# before letters become words.
GRAMS = (3, 4, 6, 8)
PRIME, MODULUS = 1_000_003, 2**31 - 1  # of the polynomial hash


@dataclass(frozen=True)
class ByteUNetConfig(UNetConfig):
    """A U-Net whose transformers read what its encoder, context_dim wide, makes of bytes."""

    text_layers: int = 2
    text_heads: int = 2
    text_places: int = 128
    text_rows: int = 2048  # of the table for each length of GRAMS

    def __post_init__(self):
        super().__post_init__()
        if self.vector_dim != self.context_dim:
            raise ValueError(f"vector_dim is {self.vector_dim}: wanted {self.context_dim}.")
        if not self.context_dim or self.context_dim % self.text_heads:
            split = f"{self.context_dim} channels do not split into {self.text_heads} heads"
            raise ValueError(f"context_dim: {split}.")


def byte_config(cfg: UNetConfig, width: int = 64) -> ByteUNetConfig:
    """A U-Net's config with an encoder so wide."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    return ByteUNetConfig(**{**values, "context_dim": width, "vector_dim": width})


def byte_ids(texts: Sequence[str], places: int = ByteUNetConfig.text_places) -> Tensor:
    """int64 (B, places): the bytes of each text; what is behind them is cut off."""
    ids = torch.full((len(texts), places), PAD)
    for row, text in zip(ids, texts, strict=True):
        data = text.encode()[:places]
        row[: len(data)] = torch.tensor(list(data), dtype=torch.int64)
    return ids


def gram_rows(ids: Tensor, length: int, rows: int) -> tuple[Tensor, Tensor]:
    """For each place of ids (B, N): the row, of so many, of the `length` ids that end there; and
    whether they all are bytes of the text, bool (B, N)."""
    N = ids.shape[1]
    row, whole = torch.zeros_like(ids), ids != PAD
    for back in reversed(range(length)):
        earlier = F.pad(ids, (back, 0), value=PAD)[:, :N]
        row = (row * PRIME + earlier + 1) % MODULUS
        whole = whole & (earlier != PAD)
    return row % rows, whole


class ByteLayer(nn.Module):
    """A transformer layer that normalises before each part (Xiong et al. 2020, figure 1b)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) to the same."""
        B, N, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, C))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ByteEncoder(nn.Module):
    def __init__(self, cfg: ByteUNetConfig):
        super().__init__()
        width = cfg.context_dim
        self.token = nn.Embedding(PAD + 1, width)
        self.grams = nn.ModuleList(nn.Embedding(cfg.text_rows, width) for _ in GRAMS)
        self.position = nn.Parameter(torch.randn(cfg.text_places, width) * 0.02)
        self.layers = nn.ModuleList(
            ByteLayer(width, cfg.text_heads) for _ in range(cfg.text_layers)
        )
        self.norm = nn.LayerNorm(width)

    def embed(self, ids: Tensor) -> Tensor:
        """What each of ids (B, places) is, alone and with those before: (B, places, width)."""
        x = self.token(ids) + self.position
        for length, table in zip(GRAMS, self.grams, strict=True):
            row, whole = gram_rows(ids, length, table.num_embeddings)
            x = x + table(row) * whole[..., None]
        return x

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, places) of byte_ids() to a context (B, places, width), and its mean over the
        bytes (B, width): zeros of the empty text."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        said = (ids != PAD)[..., None]
        return x, (x * said).sum(1) / said.sum(1).clamp(min=1)


class ByteUNet(UNet):
    def __init__(self, cfg: ByteUNetConfig):
        super().__init__(cfg)
        self.text = ByteEncoder(cfg)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None,
        features: tuple[str, ...] | None = None,
    ) -> Any:  # fmt: skip
        """As UNet's, with context (B, text_places): the ids of byte_ids(). y is None: the vector is
        the text's mean, which tells every block at once what it is about."""
        places = self.cfg.text_places
        if context is None or context.shape != (len(x), places) or context.is_floating_point():
            got = None if context is None else f"{context.dtype} {tuple(context.shape)}"
            raise ValueError(f"context is {got}: wanted byte ids ({len(x)}, {places}).")
        if y is not None:
            raise ValueError("y is a part of what the text says: it must be None.")
        context, mean = self.text(context)
        return super().forward(x, t, mean, context, features)


NETWORKS["ByteUNet"] = (ByteUNet, ByteUNetConfig)
