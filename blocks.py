"""What the U-Nets are made of: ADM's residual and attention blocks, Stable Diffusion's transformer, under their authors' names."""

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention
from kernels.groupnorm import group_norm_silu

if TYPE_CHECKING:
    from model import UNetConfig

GROUPS = 32                                  # of every GroupNorm in the family


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of t (B,) in [0, 1000] -> (B, dim): cos first, then sin; frequencies 10000^(-i/half)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs                                         # fp32: bf16 rounds t=988.5 to 988
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def zero(module: nn.Module) -> nn.Module:
    """Zero a layer's parameters, so that its residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Downsample(nn.Module):
    """Halve H and W: a strided convolution `op`, or 2x2 average pooling without weights."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a convolution if asked for."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResBlock(nn.Module):
    """norm·silu·conv, + time embedding, norm·silu·dropout·conv, + skip. `resample` moves H, W first ("up" | "down").

    The embedding enters as FiLM on the second norm, or is added before it. emb is silu(time embedding) (B, E).
    """

    def __init__(self, cfg: "UNetConfig", channels: int, out: int, resample: Literal["up", "down"] | None = None):
        super().__init__()
        self.film = cfg.use_scale_shift_norm
        E = 4 * cfg.model_channels
        # The names and indices are guided-diffusion's; Identity holds the place of activations done in forward().
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.Identity(),
                                       nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(E, 2 * out if self.film else out))
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out), nn.Identity(), nn.Dropout(cfg.dropout),
                                        zero(nn.Conv2d(out, out, 3, padding=1)))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.resample = {"up": Upsample(channels, conv=False), "down": Downsample(channels, conv=False),
                         None: nn.Identity()}[resample]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = norm_act(self.in_layers[0], x)
        h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)                                                # (B, out, H', W')
        e = self.emb_layers[1](emb)
        if self.film:
            scale, shift = e.chunk(2, dim=1)                                    # 2 × (B, out)
            h = norm_act(self.out_layers[0], h, scale, shift)
        else:
            h = norm_act(self.out_layers[0], h + e[..., None, None])
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[2](h))


class AttentionBlock(nn.Module):
    """Self-attention over the H·W positions, residual. qkv and proj_out are ADM's 1×1 Conv1d weights."""

    def __init__(self, cfg: "UNetConfig", channels: int):
        super().__init__()
        self.heads = channels // cfg.head_channels(channels)
        self.legacy = cfg.attention_order == "legacy"
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = norm_act(self.norm, x, silu=False)
        h = h.permute(0, 2, 3, 1).reshape(B, H * W, C)                          # a view in channels_last
        qkv = F.linear(h, self.qkv.weight[..., 0], self.qkv.bias)               # (B, N, 3C)
        if self.legacy:
            q, k, v = qkv.view(B, H * W, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = qkv.view(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)   # 3 × (B, heads, N, D), strided
        h = attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        h = F.linear(h, self.proj_out.weight[..., 0], self.proj_out.bias)
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


def norm_act(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
             silu: bool = True) -> Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, scale, shift, silu, norm.eps)


class Attention(nn.Module):
    """Multi-head attention from x (B, N, C) to context (B, M, context_dim), or to x itself without one."""

    def __init__(self, cfg: "UNetConfig", channels: int, context_dim: int):
        super().__init__()
        self.heads = channels // cfg.head_channels(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (h.unflatten(2, (self.heads, -1)).transpose(1, 2)             # (B, heads, N or M, D), strided
                   for h in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """value · gelu(gate), both halves from one projection (Shazeer 2020)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each on a LayerNorm of x, each residual. x (B, N, C)."""

    def __init__(self, cfg: "UNetConfig", C: int):
        super().__init__()
        self.attn1 = Attention(cfg, C, C)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(GEGLU(C, 4 * C), nn.Identity(), nn.Linear(4 * C, C))
        self.attn2 = Attention(cfg, C, cfg.context_dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(C), nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the H·W positions, residual: Stable Diffusion's place for the text."""

    def __init__(self, cfg: "UNetConfig", channels: int, depth: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)                    # 1e-5 everywhere else, as in LDM
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(cfg, channels) for _ in range(depth))
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = norm_act(self.norm, x, silu=False).permute(0, 2, 3, 1)              # a view in channels_last
        h = self.proj_in(h.reshape(B, H * W, C))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).view(B, H, W, C).permute(0, 3, 1, 2)
