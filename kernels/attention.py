"""Scaled dot-product attention: softmax(q kᵀ · scale) v, per head, without a mask.

The one place the model goes through for attention. `attention_ref` is the definition of correct;
`attention` is what runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The formula, in the dtype it is given (fp64 in the tests). q (B, heads, N, D); k, v (B, heads, M, D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)           # (B, heads, N, M)
    return weights @ v                                                          # (B, heads, N, D)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention for q (B, heads, N, D) and k, v (B, heads, M, D), any strides; returns (B, heads, N, D)."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
