"""Stochastic rounding of fp32 to bf16, for weights that have no fp32 copy.

x lies between two neighbours in bf16; it goes to the one farther from 0 with the probability
(x - nearer) / (farther - nearer), so that the mean of many roundings is x, and an update smaller
than half a spacing is not lost. The randomness is a hash of (two keys, element): no state, so a
resumed step draws the same, and so does every rank. All in integers on the bits of fp32.
The hash: MurmurHash3's 32-bit finaliser (Appleby), once for each key.
"""

import torch
from torch import Tensor

from kernels.dispatch import tl, triton


def signed(word: int) -> int:
    """A word of 32 bits as the int32 that has the same bits."""
    return word - 2**32 if word >= 2**31 else word


def shifted(x: Tensor, k: int) -> Tensor:
    """int32 x, shifted right as if it were unsigned."""
    return (x >> k) & (2 ** (32 - k) - 1)


def mix(x: Tensor) -> Tensor:
    """int32, any shape: a bijection of words in which every bit depends on all."""
    x = (x ^ shifted(x, 16)) * signed(0x85EBCA6B)
    x = (x ^ shifted(x, 13)) * signed(0xC2B2AE35)
    return x ^ shifted(x, 16)


def base_key(seed: int, place: int) -> int:
    """The first key, as int32, of parameter number `place`: all 64 bits of the seed count."""
    word = torch.tensor(signed(seed % 2**32), dtype=torch.int32, device="cpu")
    for part in (seed // 2**32 % 2**32, place):
        word = mix(word) ^ signed(part)
    return int(mix(word))


def noise(keys: tuple[int, int], element: Tensor) -> Tensor:
    """Uniform on 0 … 65535, int32, of two keys (int32 or words) and the index of the element."""
    return shifted(mix(mix(element ^ signed(keys[0])) ^ signed(keys[1])), 16)


def round_up_by(x: Tensor, extra: Tensor) -> Tensor:
    """fp32 x cut to bf16 after `extra` (int32, 0 … 65535) was added below the last kept bit.

    Fp32 again, its low 16 bits 0: the cast to bf16 is exact. Beyond the greatest bf16 it may become
    inf, as nearest rounding does; NaN stays NaN.
    """
    cut = ((x.view(torch.int32) + extra) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, cut)


def stochastic(x: Tensor, keys: tuple[int, int], first: int = 0) -> Tensor:
    """Contiguous fp32 x (n,), rounded to bf16's values; `first` is the index of x[0]."""
    element = torch.arange(first, first + x.numel(), dtype=torch.int32, device=x.device)
    return round_up_by(x, noise(keys, element))


@triton.jit
def mix_tile(x):
    """mix() of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def stochastic_tile(x, element, keys):
    """stochastic() of a tile: x fp32, element int32, keys a pointer to two int32."""
    key0 = tl.load(keys).to(tl.uint32, bitcast=True)
    key1 = tl.load(keys + 1).to(tl.uint32, bitcast=True)
    word = mix_tile(mix_tile(element.to(tl.uint32, bitcast=True) ^ key0) ^ key1)
    cut = (x.to(tl.uint32, bitcast=True) + (word >> 16)) & 0xFFFF0000
    return tl.where(x != x, x, cut.to(tl.float32, bitcast=True))
