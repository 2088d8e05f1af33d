"""Blockwise dynamic 8-bit numbers, in the format of bitsandbytes.

256 neighbours share A = max |x|, and code[i] = the level nearest to x[i]/A of a fixed map with 7
decades of range.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # elements that share one absmax
TINY = 1e-36  # a block below this is zero next to any eps; 1 / absmax must not overflow


def dynamic_map(signed: bool) -> Tensor:
    """(256,) fp32 levels, rising: 0, 1 and evenly spaced ones in each decade 10^-6 … 1.

    A decade has twice as many as the one below it.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        intervals = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, intervals + 1, device="cpu")  # the same on any device
        middles = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += middles
        if signed:
            levels += [-x for x in middles]
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


def boundaries(levels: Tensor) -> Tensor:
    """(256,) fp32 bounds: x lies nearest to level i iff bound[i-1] < x <= bound[i].

    Ties go to the lower level; the last bound is inf.
    """
    exact = (levels[:-1].double() + levels[1:].double()) / 2
    bound = exact.float()
    lower = bound.nextafter(torch.full_like(bound, -torch.inf))
    bound = torch.where(bound.double() > exact, lower, bound)  # rounded down
    return F.pad(bound, (0, 1), value=torch.inf)


def buckets(bound: Tensor) -> Tensor:
    """(65536,) uint8: the lowest code among the floats that share their upper 16 bits.

    No such bucket holds two bounds, so one comparison more gives the code: two lookups where a
    search takes eight.
    """
    upper = torch.arange(2**16, dtype=torch.int32, device=bound.device) << 16
    lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32).nan_to_num()
    return torch.bucketize(lowest, bound[:255]).to(torch.uint8)


@lru_cache
def codec(device: torch.device) -> tuple[Tensor, Tensor]:
    """(4, 256) fp32: levels of m, bounds of m, levels of v, bounds of v;
    and (2, 65536) uint8: buckets of m, of v."""
    m, v = dynamic_map(True), dynamic_map(False)
    m_bound, v_bound = boundaries(m), boundaries(v)
    table = torch.stack([buckets(m_bound), buckets(v_bound)])
    return torch.stack([m, m_bound, v, v_bound]).to(device), table.to(device)


def blocks(x: Tensor) -> Tensor:
    """x (n,) as (ceil(n / 256), 256), zeros at the end."""
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def quantize(x: Tensor, second: bool) -> tuple[Tensor, Tensor]:
    """codes (n,) uint8 and absmax (ceil(n / 256),) of x (n,) fp32.

    second: x is v (unsigned, its code never 0 where x > 0), else it is m.
    """
    levels, table = codec(x.device)
    rows = blocks(x)
    absmax = (rows if second else rows.abs()).amax(1)
    inverse = torch.where(absmax > TINY, 1 / absmax.clamp(min=TINY), 0)
    scaled = (rows * inverse[:, None]).view(-1)[: len(x)]
    low = table[int(second)].index_select(0, scaled.view(torch.int32) >> 16 & 0xFFFF)
    low += scaled > levels[1 + 2 * second].index_select(0, low.int())
    return torch.maximum(low, x > 0) if second else low, absmax


def dequantize(codes: Tensor, absmax: Tensor, second: bool) -> Tensor:
    """(n,) fp32 of codes (n,) uint8 and absmax (ceil(n / 256),)."""
    levels = codec(codes.device)[0][2 * second].index_select(0, codes.int())
    return (blocks(levels) * absmax[:, None]).view(-1)[: len(codes)]
