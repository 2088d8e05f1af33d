"""Where a token is: DiT's table of places, which is added, and Flux's rotations of q and k.

    table = sincos(16, 1152)                       # (1, 256, 1152)
    turns = rotations((16, 56, 56), 10_000, 0, M=512, h=64, w=64)
    q, k = rotate(q, turns), rotate(k, turns)      # (B, heads, 512 + 64·64, 128)
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sincos(side: int, width: int) -> Tensor:
    """(1, side², width) fp32: of a token's numbers, half tell its column and half its row, each by
    sines, then cosines, of frequencies 10000^(-i / (width / 4)) (Peebles & Xie 2023)."""
    quarter = width // 4
    freqs = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * freqs
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    return torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], 1).float()[None]


def rotations(
    axes: Sequence[int], theta: int, text_axis: int, M: int, h: int, w: int,
    device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """(2, M + h·w, D / 2) fp32: cos and sin of the angles by which the pairs of numbers of a head
    turn, for M text tokens and then an image of h rows and w columns (Su et al. 2021).

    axes: how many of the D numbers tell of each: the first of nothing, then row, column, and what
    else there is. Text tokens are counted along text_axis; 0 = they are all at the origin.
    """
    places = torch.zeros(M + h * w, len(axes), dtype=torch.float64, device=device)
    steps = torch.arange(max(M, h, w), dtype=torch.float64, device=device)
    if text_axis:
        places[:M, text_axis] = steps[:M]
    places[M:, 1] = steps[:h].repeat_interleave(w)
    places[M:, 2] = steps[:w].repeat(h)
    angles = []
    for axis, D in enumerate(axes):
        powers = torch.arange(0, D, 2, dtype=torch.float64, device=device) / D
        angles.append(places[:, axis, None] * float(theta) ** -powers)
    turns = torch.cat(angles, 1)  # fp64 until here: far places turn many times
    return torch.stack([turns.cos(), turns.sin()]).float()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, heads, N, D) with its pairs of neighbours (2i, 2i + 1) turned, in fp32 at least; its
    dtype is kept."""
    cos, sin = turns
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
