"""GroupNorm, then FiLM, then SiLU: the sandwich around every convolution of an ADM U-Net.

    n = (x - mean_g) / sqrt(var_g + eps) · weight + bias          per sample and group of C/G channels
    y = silu((1 + scale) · n + shift)                             scale, shift (B, C) from the time embedding

The one place the model goes through for it. `group_norm_silu_ref` is the definition of correct;
`group_norm_silu` is what runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu_ref(x: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: Tensor | None = None,
                        shift: Tensor | None = None, silu: bool = True, eps: float = 1e-5) -> Tensor:
    """The formula, written out in the dtype it is given (fp64 in the tests). x (B, C, H, W)."""
    B, C = x.shape[:2]
    g = x.reshape(B, groups, -1)
    mean = g.mean(-1, keepdim=True)
    var = (g - mean).square().mean(-1, keepdim=True)                # two passes: no E[x²]-E[x]² cancellation
    n = ((g - mean) / (var + eps).sqrt()).reshape(x.shape)
    per_channel = (1, C) + (1,) * (x.ndim - 2)
    n = n * weight.view(per_channel) + bias.view(per_channel)
    if scale is not None:
        n = n * (1 + scale[..., None, None])
    if shift is not None:
        n = n + shift[..., None, None]
    return n * torch.sigmoid(n) if silu else n


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: Tensor | None = None,
                    shift: Tensor | None = None, silu: bool = True, eps: float = 1e-5) -> Tensor:
    """GroupNorm + optional FiLM + optional SiLU for x (B, C, H, W); scale, shift (B, C). Keeps x's layout.

    Statistics are at least fp32 whatever x is; the result has x's dtype (Ho et al.'s GroupNorm32).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    n = F.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    if scale is not None:
        n = n * (1 + scale.to(wide)[..., None, None])
    if shift is not None:
        n = n + shift.to(wide)[..., None, None]
    return (F.silu(n) if silu else n).to(x.dtype)
