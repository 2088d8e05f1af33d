"""The U-Nets of ADM (Dhariwal & Nichol 2021) and of Stable Diffusion 1.x, 2.x, XL (Rombach et al.
2022; Podell et al. 2023), which is ADM's with cross-attention: one class, the authors' key names.

    net = UNet(PRESETS["toy-281m"])
    out = net(x, t)            # x (B, C, H, W), t (B,) in [0, 1000]  ->  (B, out, H, W)
    out = UNet(PRESETS["sd15"])(x, t, context=tokens)      # tokens (B, M, 768) of a text encoder
    out, h = net(x, t, features=("middle_block",))         # also what a block returned

A guided-diffusion or LDM state dict of the same config loads as it is, with the 1×1 convolutions
of its transformers squeezed (ckpt/layouts.py). Everything runs channels_last. Another network joins
by one line of NETWORKS. This file and kernels/ need nothing else of the repository.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.groupnorm import group_norm_silu

GROUPS = 32  # of every GroupNorm in the family
Maybe = Tensor | None

# ---- config -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. Levels are counted from the input: level l works at H / 2^l."""

    in_channels: int = 32
    out_channels: int = 32
    model_channels: int = 64  # channels at multiplier 1
    channel_mult: tuple[float, ...] = (1, 2)
    num_res_blocks: int = 2  # residual blocks a level on the way down; one more on the way up
    # Per level: 1 = self-attention after each residual block; with context_dim the depth of a
    # transformer there (2 = two transformer blocks). Then the same for the middle block.
    attention: tuple[int, ...] = (0, 1)
    middle_attention: int = 1
    num_heads: int = 1  # used when num_head_channels is 0
    num_head_channels: int = 0  # channels a head; 0 = use num_heads
    # Rows of qkv: legacy [head][q,k,v][d], new [q,k,v][head][d]. Both have the same shapes!
    attention_order: Literal["legacy", "new"] = "legacy"
    use_scale_shift_norm: bool = True  # FiLM: (1 + scale) · norm + shift; False adds before it
    resblock_updown: bool = True  # resample inside residual blocks; False = a layer between them:
    conv_resample: bool = True  # … a convolution; False = average pooling / nearest, no weights
    num_classes: int = 0  # 0 = unconditional. The label -1 stands for "no class" (guidance)
    vector_dim: int = 0  # instead of classes: y is a vector (B, vector_dim), as in SDXL
    context_dim: int = 0  # 0 = self-attention; else transformers over context (B, M, context_dim)
    linear_projection: bool = True  # of *files*: False = proj_in/out are (C, C, 1, 1) there (SD1.x)
    dropout: float = 0.0
    # As Ho et al. 2020 (google/ddpm-*): another timestep_embedding, an eps of 1e-6, and where a
    # convolution halves H and W, padding on the right and below only.
    like_ho: bool = False

    def __post_init__(self):
        """What fits together. Of a config from a file, ckpt/ has checked types and sizes before."""
        levels, D, heads = len(self.channel_mult), self.num_head_channels, self.num_heads
        if not levels == len(self.attention) > 0:
            given = f"attention has {len(self.attention)} levels, channel_mult {levels}"
            raise ValueError(f"{given}; give one each.")
        depths = (*self.attention, self.middle_attention)
        if not self.context_dim and max(depths) > 1:
            raise ValueError(f"attention depths {depths}: wanted 0 or 1 without context_dim.")
        if self.num_classes and self.vector_dim:
            raise ValueError("y is either labels (num_classes) or a vector (vector_dim), set one.")
        # The middle block attends, and its channels are the last level's.
        for level, (C, attends) in enumerate(zip(self.channels, (*self.attention[:-1], 1))):
            if C % GROUPS or C < GROUPS:
                raise ValueError(f"level {level} has {C} channels, not a multiple of {GROUPS}.")
            if attends and (C % D if D else heads < 1 or C % heads):
                split = f"heads of {D}" if D else f"{heads} heads"
                raise ValueError(f"level {level}: {C} channels do not split into {split}.")

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(int(m * self.model_channels) for m in self.channel_mult)

    @property
    def multiple(self) -> int:
        """What H and W of the input have to be divisible by."""
        return 2 ** (len(self.channel_mult) - 1)

    def head_channels(self, C: int) -> int:
        """Channels a head (D) of an attention block over C channels."""
        # A level without attention may have fewer channels than there are heads.
        return self.num_head_channels or max(C // self.num_heads, 1)


# ---- blocks -------------------------------------------------------------------------------------

def timestep_embedding(t: Tensor, dim: int, like_ho: bool = False) -> Tensor:
    """Sinusoids of t (B,) in [0, 1000] -> (B, dim): cos, then sin; frequencies 10000^(-i/half).
    Ho et al.: sin, then cos; 10000^(-i/(half-1))."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10000.0) * steps / (half - 1 if like_ho else half))
    angles = t.float()[:, None] * freqs  # fp32: bf16 rounds t=988.5 to 988
    waves = [angles.sin(), angles.cos()] if like_ho else [angles.cos(), angles.sin()]
    embedding = torch.cat(waves, dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def zero(module: nn.Module) -> nn.Module:
    """Zero a layer's parameters, so that its residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def norm_act(
    norm: nn.GroupNorm, x: Tensor, scale: Maybe = None, shift: Maybe = None, silu: bool = True
) -> Tensor:
    """GroupNorm, FiLM with scale and shift (B, C) if given, SiLU; one kernel."""
    groups, eps = norm.num_groups, norm.eps
    return group_norm_silu(x, norm.weight, norm.bias, groups, scale, shift, silu, eps)


def group_norm(cfg: UNetConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6 if cfg.like_ho else 1e-5)


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1)


class Downsample(nn.Module):
    """Halve H and W: a strided convolution `op`, or 2×2 average pooling without weights."""

    def __init__(self, channels: int, conv: bool, like_ho: bool = False):
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2) if conv else nn.AvgPool2d(2)
        self.like_ho = like_ho and conv

    def forward(self, x: Tensor) -> Tensor:
        if self.like_ho:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.op.weight, self.op.bias, stride=2)
        return self.op(x)


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a convolution if asked for."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = conv3x3(channels, channels) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


RESAMPLE = {"up": Upsample, "down": Downsample}


class ResBlock(nn.Module):
    """norm·silu·conv, + time embedding, norm·silu·dropout·conv, + skip.

    `resample` moves H, W first ("up" | "down"). The embedding, emb = silu(time embedding) (B, E),
    enters as FiLM on the second norm, or is added before it.
    """

    def __init__(self, cfg: UNetConfig, channels: int, out: int, resample: str = ""):
        super().__init__()
        self.film = cfg.use_scale_shift_norm
        rows = 2 * out if self.film else out
        # The names and indices are guided-diffusion's; an Identity holds the place of an
        # activation that forward() computes.
        first = conv3x3(channels, out)
        self.in_layers = nn.Sequential(group_norm(cfg, channels), nn.Identity(), first)
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(4 * cfg.model_channels, rows))
        dropout, last = nn.Dropout(cfg.dropout), zero(conv3x3(out, out))
        self.out_layers = nn.Sequential(group_norm(cfg, out), nn.Identity(), dropout, last)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.resample = RESAMPLE[resample](channels, False) if resample else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = norm_act(self.in_layers[0], x)
        h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)  # (B, out, H', W')
        e = self.emb_layers[1](emb)
        if self.film:
            scale, shift = e.chunk(2, dim=1)  # 2 × (B, out)
            h = norm_act(self.out_layers[0], h, scale, shift)
        else:
            h = norm_act(self.out_layers[0], h + e[..., None, None])
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[2](h))


class AttentionBlock(nn.Module):
    """Self-attention over H·W positions, residual. qkv, proj_out: ADM's 1×1 Conv1d weights."""

    def __init__(self, cfg: UNetConfig, channels: int):
        super().__init__()
        self.heads = channels // cfg.head_channels(channels)
        self.legacy = cfg.attention_order == "legacy"
        self.norm = group_norm(cfg, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = norm_act(self.norm, x, silu=False)
        h = h.permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view in channels_last
        qkv = F.linear(h, self.qkv.weight.squeeze(2), self.qkv.bias)  # (B, N, 3C)
        if self.legacy:
            q, k, v = qkv.view(B, H * W, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = qkv.view(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = attention(q, k, v).transpose(1, 2).flatten(2)  # q, k, v (B, heads, N, D)
        h = F.linear(h, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head attention from x (B, N, C) to context (B, M, context_dim), or to x without one."""

    def __init__(self, cfg: UNetConfig, channels: int, context_dim: int):
        super().__init__()
        self.heads = channels // cfg.head_channels(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        rows = [self.to_q(x), self.to_k(context), self.to_v(context)]
        q, k, v = [h.unflatten(2, (self.heads, -1)).transpose(1, 2) for h in rows]
        h = attention(q, k, v)  # (B, heads, N, D)
        return self.to_out(h.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """value · gelu(gate), both halves from one projection (Shazeer 2020)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward of x (B, N, C); each normed, each residual."""

    def __init__(self, cfg: UNetConfig, C: int):
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
    """`depth` transformer blocks over the H·W positions, residual: where SD reads the text."""

    def __init__(self, cfg: UNetConfig, channels: int, depth: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)  # 1e-5 everywhere else, as in LDM
        self.proj_in = nn.Linear(channels, channels)
        blocks = [TransformerBlock(cfg, channels) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = norm_act(self.norm, x, silu=False).permute(0, 2, 3, 1)  # a view in channels_last
        h = self.proj_in(h.reshape(B, H * W, C))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).view(B, H, W, C).permute(0, 3, 1, 2)


class Block(nn.Sequential):
    """One entry of input_blocks, middle_block, output_blocks: layers, each given its inputs."""

    def forward(self, x: Tensor, emb: Tensor, context: Maybe, skip: Maybe) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


# ---- the network --------------------------------------------------------------------------------

class UNet(nn.Module):
    """The U-Net. Names are guided-diffusion's and LDM's: the building order is the file format."""

    checkpointing = False  # True: the backward pass computes each block again from its inputs

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        emb = 4 * cfg.model_channels
        self.time_embed = mlp(cfg.model_channels, emb)
        if cfg.num_classes:
            self.label_emb = nn.Embedding(cfg.num_classes, emb)
        elif cfg.vector_dim:  # a Sequential in another one: the names are label_emb.0.0, .0.2
            self.label_emb = nn.Sequential(mlp(cfg.vector_dim, emb))
        C = cfg.channels[0]
        self.input_blocks = nn.ModuleList([Block(conv3x3(cfg.in_channels, C))])
        skips = [C]  # channels of each input block's output
        levels = list(enumerate(cfg.channels))
        for level, out in levels:
            for _ in range(cfg.num_res_blocks):
                layers = [ResBlock(cfg, C, out), *self._attention(cfg.attention[level], out)]
                self.input_blocks.append(Block(*layers))
                C = out
                skips.append(C)
            if level < len(levels) - 1:
                self.input_blocks.append(Block(self._resample("down", C)))
                skips.append(C)
        # In the order of the forward pass, which a seed's first weights depend on.
        first = ResBlock(cfg, C, C)
        attends = self._attention(cfg.middle_attention, C)
        self.middle_block = Block(first, *attends, ResBlock(cfg, C, C))
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(levels):
            for i in range(cfg.num_res_blocks + 1):
                layers = [ResBlock(cfg, C + skips.pop(), out)]
                layers += self._attention(cfg.attention[level], out)
                C = out
                if level and i == cfg.num_res_blocks:
                    layers.append(self._resample("up", C))
                self.output_blocks.append(Block(*layers))
        last = zero(conv3x3(C, cfg.out_channels))
        self.out = nn.Sequential(group_norm(cfg, C), nn.Identity(), last)
        self.to(memory_format=torch.channels_last)

    def _attention(self, depth: int, channels: int) -> list[nn.Module]:
        if not depth:
            return []
        if self.cfg.context_dim:
            return [SpatialTransformer(self.cfg, channels, depth)]
        return [AttentionBlock(self.cfg, channels)]

    def _resample(self, way: str, C: int) -> nn.Module:
        if self.cfg.resblock_updown:
            return ResBlock(self.cfg, C, C, way)
        if way == "up":
            return Upsample(C, self.cfg.conv_resample)
        return Downsample(C, self.cfg.conv_resample, self.cfg.like_ho)

    def _blocks(self) -> dict[str, Block]:
        inputs = {f"input_blocks.{i}": block for i, block in enumerate(self.input_blocks)}
        outputs = {f"output_blocks.{i}": block for i, block in enumerate(self.output_blocks)}
        return inputs | {"middle_block": self.middle_block} | outputs

    @property
    def block_names(self) -> tuple[str, ...]:
        """What `features` may name, in the order of the forward pass."""
        return tuple(self._blocks())

    def forward(
        self, x: Tensor, t: Tensor, y: Maybe = None, context: Maybe = None,
        features: tuple[str, ...] | None = None, added: Maybe = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """x (B, C, H, W); t (B,) float in [0, 1000] -> (B, out, H, W).

        y: class labels (B,), -1 = none; or (B, vector_dim). context: (B, M, context_dim). With
        `features`, of block_names, also {name: what that block returned (B, C', H', W')}.
        added (B, model_channels): joins the sinusoids of t.
        """
        check_input(self, x, y, context, features or ())
        waves = timestep_embedding(t, self.cfg.model_channels, self.cfg.like_ho)
        waves = waves if added is None else waves + added
        emb = self.time_embed(waves.to(x.dtype))
        if self.cfg.vector_dim:
            emb = emb + self.label_emb(y.to(x.dtype))
        elif y is not None:
            # The null label adds nothing: a learned row would only duplicate time_embed.2.bias.
            emb = emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]
        emb = F.silu(emb)  # (B, E), shared by every ResBlock
        if context is not None:
            context = context.to(x.dtype)
        h = x.contiguous(memory_format=torch.channels_last)
        skips, seen = [], dict.fromkeys(features or ())
        for i, (name, block) in enumerate(self._blocks().items()):
            inputs = h, emb, context, skips.pop() if i > len(self.input_blocks) else None
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, *inputs, use_reentrant=False)
            else:
                h = block(*inputs)
            if i < len(self.input_blocks):
                skips.append(h)
            if name in seen:
                seen[name] = h
        out = self.out[2](norm_act(self.out[0], h))
        return out if features is None else (out, seen)


def mlp(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, out), nn.SiLU(), nn.Linear(out, out))


def check_input(net: Any, x: Tensor, y: Maybe, context: Maybe, features: Sequence[str]) -> None:
    """Refuse what a network cannot read; its config and its block_names say what it can."""
    cfg, B, (H, W) = net.cfg, len(x), x.shape[2:]
    if H % cfg.multiple or W % cfg.multiple:
        raise ValueError(f"H×W = {H}×{W} must be divisible by {cfg.multiple}.")
    takes = {"context": cfg.context_dim, "y": cfg.num_classes or cfg.vector_dim}
    for name, given in (("context", context), ("y", y)):
        if given is not None and not takes[name]:
            raise ValueError(f"this {type(net).__name__} takes no {name}: it must be None.")
    if cfg.context_dim:
        check_shape("context", context, B, "tokens", cfg.context_dim)
    if cfg.vector_dim:
        check_shape("y", y, B, cfg.vector_dim)
    elif y is not None:
        check_labels(y, B, cfg.num_classes)
    for name in features:
        if name not in net.block_names:
            near = ", ".join(difflib.get_close_matches(name, net.block_names))
            raise ValueError(f"features: no block {name!r}.  Closest: {near or 'none'}.")


def check_shape(name: str, x: Maybe, *wanted: int | str) -> None:
    given = () if x is None else tuple(x.shape)
    if len(given) != len(wanted) or any(w not in ("tokens", n) for n, w in zip(given, wanted)):
        raise ValueError(f"{name} is {given or None}: wanted ({', '.join(map(str, wanted))}).")


def check_labels(y: Tensor, B: int, classes: int) -> None:
    if y.shape != (B,) or y.is_floating_point():
        raise ValueError(f"y is {y.dtype} {tuple(y.shape)}: wanted integer class labels ({B},).")
    # Their values only on the CPU: a GPU would have to wait.
    if y.device.type == "cpu" and B and not torch.compiler.is_compiling():
        low, high = y.min().item(), y.max().item()
        if low < -1 or high >= classes:
            raise ValueError(f"y: labels {low} to {high}: wanted 0 to {classes - 1}, or -1 = none.")


def num_params(cfg: Any) -> int:
    """Parameter count of a network's config, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(cfg).parameters())


# ---- networks and presets -----------------------------------------------------------------------

# What a checkpoint may hold: the name in its metadata -> (class, its frozen config dataclass).
# A network takes its config, keeps it as .cfg, and has forward(x, t, y=None, context=None). Of a
# config are used: in_channels, out_channels, num_classes, `multiple`; and context_dim, vector_dim,
# dropout, which are 0 where it has none.
NETWORKS: dict[str, tuple[type, type]] = {"UNet": (UNet, UNetConfig)}


def network_name(cfg: Any) -> str:
    """The name in NETWORKS of a config's network."""
    for name, (_, config) in NETWORKS.items():
        if type(cfg) is config:
            return name
    raise ValueError(f"no network has a {type(cfg).__name__}: add a line to model.NETWORKS.")


def build(cfg: Any) -> nn.Module:
    """The network of a config."""
    return NETWORKS[network_name(cfg)][0](cfg)


TINY = UNetConfig(32, 32, 128, (1, 1), 1, (0, 1), num_head_channels=64)
TOY = UNetConfig(32, 32, 256, (1, 1, 2, 4), 2, (0, 0, 0, 1), use_scale_shift_norm=False)
# The 6 outputs are eps and its learned variance.
ADM = UNetConfig(3, 6, model_channels=256, num_head_channels=64, num_classes=1000)
SD = UNetConfig(
    4, 4, 320, (1, 2, 4, 4), 2, (1, 1, 1, 0), use_scale_shift_norm=False, resblock_updown=False
)
XL = replace(SD, num_head_channels=64, vector_dim=2816, context_dim=2048)


def variant(cfg: UNetConfig, mult: tuple, attention: tuple, **changes: Any) -> UNetConfig:
    return replace(cfg, channel_mult=mult, attention=attention, **changes)


PRESETS: dict[str, Any] = {
    "tiny": TINY,
    "nano": replace(TINY, model_channels=32, num_head_channels=0),  # for tests of the loop
    # Two readings of the 281M U-Net in Toy-Diffusion's card: (16, 8) as downsample factors, as its
    # constructor takes them: attention sees only the 4×4 map; or as resolutions, with FiLM.
    "toy-281m": TOY,
    "toy-281m-attn": variant(
        TOY, (1, 1, 2, 4), (0, 1, 1, 0), use_scale_shift_norm=True, num_head_channels=64
    ),
    # guided-diffusion's released models: pixels, eps with learned variance.
    "adm-64": variant(
        ADM, (1, 2, 3, 4), (0, 1, 1, 1), model_channels=192, num_res_blocks=3,
        attention_order="new", dropout=0.1,
    ),
    "adm-128": variant(ADM, (1, 1, 2, 3, 4), (0, 0, 1, 1, 1), num_head_channels=0, num_heads=4),
    "adm-256": variant(ADM, (1, 1, 2, 2, 4, 4), (0, 0, 0, 1, 1, 1)),
    "adm-256-uncond": variant(ADM, (1, 1, 2, 2, 4, 4), (0, 0, 0, 1, 1, 1), num_classes=0),
    "adm-512": variant(ADM, (0.5, 1, 1, 2, 2, 4, 4), (0, 0, 0, 0, 1, 1, 1)),
    # Stable Diffusion: latents of 4 channels at 1/8; 8 heads in 1.x, heads of 64 channels since.
    "sd15": replace(SD, num_heads=8, context_dim=768, linear_projection=False),
    "sd21": replace(SD, num_head_channels=64, context_dim=1024),
    "sdxl": variant(XL, (1, 2, 4), (0, 2, 10), middle_attention=10),
    "sdxl-refiner": variant(
        XL, (1, 2, 4, 4), (0, 4, 4, 0), model_channels=384, middle_attention=4, vector_dim=2560,
        context_dim=1280,
    ),
}  # fmt: skip

# ---- the config of anybody's tensors ------------------------------------------------------------

# What the family fixes and no file says: (model_channels, context_dim) -> whose heads, and which.
FAMILY_HEADS = {
    (320, 768): ("Stable Diffusion 1.x", {"num_heads": 8}),
    (320, 1024): ("Stable Diffusion 2.x", {"num_head_channels": 64}),
    (320, 2048): ("SDXL", {"num_head_channels": 64}),
    (384, 1280): ("SDXL's refiner", {"num_head_channels": 64}),
}


def infer_config(state_dict: Mapping[str, Any], **known: Any) -> UNetConfig:
    """The config of a U-Net's native names and shapes. `known`: what they cannot show, or must say.

    Heads (num_heads or num_head_channels) and, for ADM, attention_order leave no trace: a wrong
    guess loads strictly and computes something else. They must be given, except for the heads of
    Stable Diffusion. dropout is 0 unless given.
    """
    seen = shapes_to_fields(state_dict)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    for key in given.keys() & seen.keys():
        if given[key] != seen[key]:
            what = f"{key}={given[key]!r} was given, but the tensors say {seen[key]!r}"
            raise ValueError(f"{what}.  Leave it out.")
    C, context_dim = seen["model_channels"], seen["context_dim"]
    family, fixed = FAMILY_HEADS.get((C, context_dim), ("", {}))
    heads = {k: given[k] for k in ("num_heads", "num_head_channels") if given.get(k)}
    missing = [] if heads or fixed else ["the number of attention heads"]
    # One head has no order, and neither have transformers.
    if not context_dim and "attention_order" not in given and heads != {"num_heads": 1}:
        missing.append("the order of the qkv rows")
    if missing:
        raise ValueError(
            f"no tensor shows {' and '.join(missing)} (model_channels {C}, context_dim "
            f"{context_dim}), and a wrong one computes something else without an error."
        )
    if not fixed:
        return UNetConfig(**(seen | given))
    cfg = UNetConfig(**(seen | given | {"num_heads": 1, "num_head_channels": 0} | fixed))
    D = heads.get("num_head_channels")
    if heads and any((D or C / heads["num_heads"]) != cfg.head_channels(C) for C in cfg.channels):
        what = f"{heads} was given, but the tensors are {family}'s, which has {fixed}"
        raise ValueError(f"{what}.  Leave it out.")
    return replace(cfg, **heads)


def shapes_to_fields(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What names and shapes determine; a strict load names the tensors that miss or do not fit."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state_dict:
            first = ", ".join(list(state_dict)[:3])
            raise ValueError(
                f"cannot tell the architecture: no tensor {name!r} among {len(state_dict)} "
                f"({first} …); wanted guided-diffusion's or LDM's names.  Is the file complete?"
            )
        return tuple(state_dict[name].shape)

    def numbers(pattern: str) -> set[int]:
        return {int(m[1]) for name in state_dict if (m := re.match(pattern, name))}

    def depth(block: str) -> int:
        transformers = numbers(rf"{block}\.1\.transformer_blocks\.(\d+)\.")
        return len(transformers) or int(f"{block}.1.qkv.weight" in state_dict)

    channels = shape("time_embed.0.weight")[1]
    total = max(numbers(r"output_blocks\.(\d+)\."), default=0) + 1
    convs = numbers(r"output_blocks\.(\d+)\.[12]\.conv\.")
    resnets = numbers(r"output_blocks\.(\d+)\.[12]\.in_layers\.")
    # Average pooling has no tensors and leaves gaps in the numbers.
    pools = set(range(total)) - numbers(r"input_blocks\.(\d+)\.")
    levels = 1 + len(convs or resnets or pools)
    if total % levels or total // levels < 2:
        what = f"{total} output blocks do not split into {levels} levels"
        raise ValueError(f"cannot tell the architecture: {what}.  Is the file complete?")
    blocks = [f"input_blocks.{1 + level * (total // levels)}" for level in range(levels)]
    rows = [shape(f"{block}.0.out_layers.3.weight")[0] for block in blocks]
    context_dim, square = 0, True
    if "middle_block.1.qkv.weight" not in state_dict:
        context_dim = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
        square = len(shape("middle_block.1.proj_in.weight")) == 2
    labels, vectors = "label_emb.weight", "label_emb.0.0.weight"
    return dict(
        in_channels=shape("input_blocks.0.0.weight")[1], out_channels=shape("out.2.weight")[0],
        model_channels=channels, channel_mult=tuple(multiplier(C, channels) for C in rows),
        num_res_blocks=total // levels - 1, attention=tuple(depth(block) for block in blocks),
        middle_attention=depth("middle_block"), context_dim=context_dim, linear_projection=square,
        use_scale_shift_norm=shape(f"{blocks[0]}.0.emb_layers.1.weight")[0] == 2 * rows[0],
        resblock_updown=bool(resnets) and not convs,
        conv_resample=bool(convs or resnets or not pools),
        num_classes=shape(labels)[0] if labels in state_dict else 0,
        vector_dim=shape(vectors)[1] if vectors in state_dict else 0,
    )  # fmt: skip


def multiplier(channels: int, model_channels: int) -> float:
    """The m of channel_mult with int(m · model_channels) == channels; an int where it is one."""
    m = channels / model_channels
    if int(m * model_channels) != channels:
        m = math.nextafter(m, math.inf)
    return int(m) if m == int(m) else m
