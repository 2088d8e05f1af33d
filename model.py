"""The U-Net of ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs"), under guided-diffusion's key names.

    net = UNet(PRESETS["toy-281m"])
    out = net(x, t)                  # x (B, C, H, W), t (B,) in [0, 1000]  ->  (B, out, H, W)

A checkpoint of guided-diffusion with the same config loads as it is. Everything runs channels_last.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention
from kernels.groupnorm import group_norm_silu

GROUPS = 32                                  # of every GroupNorm in the family


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. Levels are counted from the input: level l works at H / 2^l."""
    in_channels: int = 32
    out_channels: int = 32
    model_channels: int = 64                 # channels at multiplier 1
    channel_mult: tuple[float, ...] = (1, 2)
    num_res_blocks: int = 2                  # residual blocks a level on the way down; one more on the way up
    attention: tuple[int, ...] = (0, 1)      # per level: 1 = self-attention after each residual block
    num_heads: int = 1                       # used when num_head_channels is 0
    num_head_channels: int = 0               # channels a head; 0 = use num_heads
    attention_order: Literal["legacy", "new"] = "legacy"   # qkv rows: [head][q,k,v][d] | [q,k,v][head][d]; same shapes!
    use_scale_shift_norm: bool = True        # FiLM: (1 + scale) · norm + shift; False adds the embedding before the norm
    resblock_updown: bool = True             # resample inside residual blocks; False = a convolution (or pooling)
    conv_resample: bool = True               # resblock_updown=False only; False = average pool / nearest, no weights
    num_classes: int = 0                     # 0 = unconditional. The label -1 stands for "no class" (guidance)
    dropout: float = 0.0

    def __post_init__(self):
        if len(self.attention) != len(self.channel_mult):
            raise ValueError(f"attention has {len(self.attention)} levels, channel_mult {len(self.channel_mult)}; give one each.")
        for level, C in enumerate(self.channels):
            if C % GROUPS:
                raise ValueError(f"level {level} has {C} channels, not a multiple of {GROUPS} (GroupNorm groups).")
            if (self.attention[level] or level == len(self.channels) - 1) and C % self.head_channels(C):
                raise ValueError(f"level {level}: {C} channels do not split into heads of {self.head_channels(C)}.")

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(int(m * self.model_channels) for m in self.channel_mult)

    def head_channels(self, C: int) -> int:
        """Channels a head (D) of an attention block over C channels."""
        return self.num_head_channels or max(C // self.num_heads, 1)


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

    def __init__(self, cfg: UNetConfig, channels: int, out: int, resample: Literal["up", "down"] | None = None):
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

    def __init__(self, cfg: UNetConfig, channels: int):
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


class Block(nn.Sequential):
    """One entry of input_blocks / middle_block / output_blocks: layers in order, the embedding where it is wanted."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """ADM's U-Net. Its state dict has guided-diffusion's names, so the building order below is the file format."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        E, levels = 4 * cfg.model_channels, len(cfg.channel_mult)
        self.time_embed = nn.Sequential(nn.Linear(cfg.model_channels, E), nn.SiLU(), nn.Linear(E, E))
        if cfg.num_classes:
            self.label_emb = nn.Embedding(cfg.num_classes, E)
        C = cfg.channels[0]
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(cfg.in_channels, C, 3, padding=1))])
        skips = [C]                                                             # channels of each input block's output
        for level, out in enumerate(cfg.channels):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(Block(ResBlock(cfg, C, out), *self._attention(level, out)))
                C = out
                skips.append(C)
            if level < levels - 1:
                self.input_blocks.append(Block(ResBlock(cfg, C, C, "down") if cfg.resblock_updown
                                               else Downsample(C, cfg.conv_resample)))
                skips.append(C)
        self.middle_block = Block(ResBlock(cfg, C, C), AttentionBlock(cfg, C), ResBlock(cfg, C, C))
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(cfg.channels))):
            for i in range(cfg.num_res_blocks + 1):
                block = Block(ResBlock(cfg, C + skips.pop(), out), *self._attention(level, out))
                C = out
                if level and i == cfg.num_res_blocks:
                    block.append(ResBlock(cfg, C, C, "up") if cfg.resblock_updown else Upsample(C, cfg.conv_resample))
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, C), nn.Identity(),
                                 zero(nn.Conv2d(C, cfg.out_channels, 3, padding=1)))
        self.to(memory_format=torch.channels_last)

    def _attention(self, level: int, channels: int) -> list[nn.Module]:
        return [AttentionBlock(self.cfg, channels)] if self.cfg.attention[level] else []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); t (B,) float in [0, 1000]; y (B,) class labels, -1 = none. Returns (B, out, H, W)."""
        factor = 2 ** (len(self.cfg.channel_mult) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"H×W = {x.shape[2]}×{x.shape[3]} must be divisible by {factor} ({len(self.cfg.channel_mult)} levels).")
        if context is not None:
            raise ValueError("this U-Net has no cross-attention: context must be None.")
        if y is not None and not self.cfg.num_classes:
            raise ValueError("this U-Net is unconditional: y must be None.")
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels).to(x.dtype))
        if y is not None:
            # The null label adds nothing: a learned null row would only duplicate time_embed.2.bias.
            emb = emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]
        emb = F.silu(emb)                                                       # (B, E), shared by every ResBlock
        h, skips = x.contiguous(memory_format=torch.channels_last), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out[2](norm_act(self.out[0], h))


def num_params(cfg: UNetConfig) -> int:
    """Parameter count of a config, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(cfg).parameters())


TOY = UNetConfig(model_channels=256, channel_mult=(1, 1, 2, 4), attention=(0, 0, 0, 1), use_scale_shift_norm=False)
ADM = UNetConfig(3, 6, model_channels=256, num_head_channels=64, num_classes=1000)   # 6 = eps and its learned variance
PRESETS: dict[str, UNetConfig] = {
    "tiny": UNetConfig(model_channels=128, channel_mult=(1, 1), num_res_blocks=1, attention=(0, 1), num_head_channels=64),
    "nano": UNetConfig(model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention=(0, 1)),   # for tests of the loop
    # Two readings of the 281M U-Net in Toy-Diffusion's card: (16, 8) as downsample factors, as its constructor call
    # takes them, so that attention sees only the 4×4 map; or as resolutions, with FiLM (full ADM).
    "toy-281m": TOY,
    "toy-281m-attn": replace(TOY, attention=(0, 1, 1, 0), use_scale_shift_norm=True, num_head_channels=64),
    # guided-diffusion's released models. They take pixels and were trained as eps with learned variance.
    "adm-64": replace(ADM, model_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3, attention=(0, 1, 1, 1),
                      attention_order="new", dropout=0.1),
    "adm-128": replace(ADM, channel_mult=(1, 1, 2, 3, 4), attention=(0, 0, 1, 1, 1), num_head_channels=0, num_heads=4),
    "adm-256": replace(ADM, channel_mult=(1, 1, 2, 2, 4, 4), attention=(0, 0, 0, 1, 1, 1)),
    "adm-256-uncond": replace(ADM, channel_mult=(1, 1, 2, 2, 4, 4), attention=(0, 0, 0, 1, 1, 1), num_classes=0),
    "adm-512": replace(ADM, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention=(0, 0, 0, 0, 1, 1, 1)),
}
