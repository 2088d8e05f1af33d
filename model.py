"""The U-Nets of ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs") and of Stable Diffusion 1.x, 2.x and XL
(Rombach et al. 2022; Podell et al. 2023), which is ADM's with cross-attention: one class, under the authors' key names.

    net = UNet(PRESETS["toy-281m"])
    out = net(x, t)                  # x (B, C, H, W), t (B,) in [0, 1000]  ->  (B, out, H, W)
    out = UNet(PRESETS["sd15"])(x, t, context=tokens)                          # tokens (B, M, 768) from a text encoder
    out, h = net(x, t, features=("middle_block",))                             # and what a block returned: h["middle_block"]

A guided-diffusion or LDM state dict with the same config loads as it is, 1×1-convolution projections squeezed (layouts.py).
Everything runs channels_last.
"""

import math
import re
from dataclasses import dataclass, fields, replace
from reprlib import repr as brief                # a damaged file can hold a value of any length and depth
from typing import Any, Literal, Mapping, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blocks import GROUPS, AttentionBlock, Downsample, ResBlock, SpatialTransformer, Upsample, norm_act, timestep_embedding, zero
from harness.cli import UserError, closest

# From, to; 0 to 65536 where nothing is said. Far beyond any network: a damaged file must end in a message, not in hours of building.
LIMITS = {"in_channels": (1, 65536), "out_channels": (1, 65536), "model_channels": (1, 65536), "channel_mult": (2 ** -16, 65536),
          "num_res_blocks": (1, 64), "attention": (0, 64), "middle_attention": (1, 64), "num_classes": (0, 2 ** 24), "dropout": (0, 0.999)}
MAX_LEVELS, MAX_BLOCKS = 16, 1024


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. Levels are counted from the input: level l works at H / 2^l."""
    in_channels: int = 32
    out_channels: int = 32
    model_channels: int = 64                 # channels at multiplier 1
    channel_mult: tuple[float, ...] = (1, 2)
    num_res_blocks: int = 2                  # residual blocks a level on the way down; one more on the way up
    attention: tuple[int, ...] = (0, 1)      # per level: 1 = self-attention after each residual block; with context_dim
                                             # the depth of a transformer there: 2 = two transformer blocks
    middle_attention: int = 1                # the same for the middle block
    num_heads: int = 1                       # used when num_head_channels is 0
    num_head_channels: int = 0               # channels a head; 0 = use num_heads
    attention_order: Literal["legacy", "new"] = "legacy"   # qkv rows: [head][q,k,v][d] | [q,k,v][head][d]; same shapes!
    use_scale_shift_norm: bool = True        # FiLM: (1 + scale) · norm + shift; False adds the embedding before the norm
    resblock_updown: bool = True             # resample inside residual blocks; False = a convolution (or pooling)
    conv_resample: bool = True               # resblock_updown=False only; False = average pool / nearest, no weights
    num_classes: int = 0                     # 0 = unconditional. The label -1 stands for "no class" (guidance)
    vector_dim: int = 0                      # instead of classes: y is a vector (B, vector_dim), as in SDXL (pooled text, sizes)
    context_dim: int = 0                     # 0 = ADM's self-attention; else transformers that attend to context (B, M, context_dim)
    linear_projection: bool = True           # of this family's *files*: False = proj_in/out are (C, C, 1, 1) there (SD1.x)
    dropout: float = 0.0

    def __post_init__(self):
        """Anything may come from a file. ValueError says what is wrong, before anything is built."""
        for f in fields(self):
            value, args, (low, high) = getattr(self, f.name), get_args(f.type), LIMITS.get(f.name, (0, 65536))
            many, kinds = get_origin(f.type) is tuple, (int, float) if float in (f.type, *args) else (int,)
            values = value if many and type(value) is tuple else (value,)
            if f.type is bool or get_origin(f.type) is Literal:
                ok, wanted = type(value) in (bool, str) and value in (args or (True, False)), " or ".join(map(repr, args or (True, False)))
            else:
                ok = many == (type(value) is tuple) and all(type(v) in kinds and low <= v <= high for v in values)   # NaN fails too
                wanted = f"{'a tuple of ' * many}{'numbers' if float in kinds else 'whole numbers'} from {low:g} to {high:g}"
            if not ok:
                raise ValueError(f"{f.name} is {brief(value)}: wanted {wanted}.")
        levels, D, n = len(self.channel_mult), self.num_head_channels, self.num_heads
        if len(self.attention) != levels or not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"attention has {len(self.attention)} levels, channel_mult {levels}; give one each, for 1 to {MAX_LEVELS} levels.")
        if (blocks := sum((2 * self.num_res_blocks + 1) * (1 + depth) for depth in self.attention)) > MAX_BLOCKS:
            raise ValueError(f"num_res_blocks {self.num_res_blocks} and attention {brief(self.attention)} make {blocks} blocks: wanted up to {MAX_BLOCKS}.")
        if not self.context_dim and max(*self.attention, self.middle_attention) > 1:
            raise ValueError(f"attention is {self.attention}, middle_attention {self.middle_attention}: wanted 0 or 1 without context_dim.")
        if self.num_classes and self.vector_dim:
            raise ValueError(f"num_classes {self.num_classes} and vector_dim {self.vector_dim}: y is either labels or a vector, set one.")
        for level, C in enumerate(self.channels):
            if C % GROUPS or not GROUPS <= C <= 65536:
                raise ValueError(f"level {level} has {C} channels, not a multiple of {GROUPS} (GroupNorm groups) from {GROUPS} to 65536.")
            attends = self.attention[level] or level == levels - 1              # the middle block's channels are the last level's
            if attends and (C % D if D else n < 1 or C % n):
                raise ValueError(f"level {level}: {C} channels do not split into {f'heads of {D}' if D else f'{n} heads'}.")

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(int(m * self.model_channels) for m in self.channel_mult)

    def head_channels(self, C: int) -> int:
        """Channels a head (D) of an attention block over C channels."""
        return self.num_head_channels or max(C // self.num_heads, 1)            # a level without attention may be narrower than heads are many


class Block(nn.Sequential):
    """One entry of input_blocks / middle_block / output_blocks: layers in order, each given what it wants."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            x = layer(x, *((emb,) if isinstance(layer, ResBlock) else (context,) if isinstance(layer, SpatialTransformer) else ()))
        return x


class UNet(nn.Module):
    """The U-Net. Its state dict has guided-diffusion's and LDM's names, so the building order below is the file format.

    `net.checkpointing = True` keeps only each block's inputs for the backward pass and computes the block again there.
    """

    checkpointing = False

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        E, levels = 4 * cfg.model_channels, len(cfg.channel_mult)
        self.time_embed = nn.Sequential(nn.Linear(cfg.model_channels, E), nn.SiLU(), nn.Linear(E, E))
        if cfg.num_classes:
            self.label_emb = nn.Embedding(cfg.num_classes, E)
        elif cfg.vector_dim:                                                    # twice Sequential: the names label_emb.0.0, .0.2
            self.label_emb = nn.Sequential(nn.Sequential(nn.Linear(cfg.vector_dim, E), nn.SiLU(), nn.Linear(E, E)))
        C = cfg.channels[0]
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(cfg.in_channels, C, 3, padding=1))])
        skips = [C]                                                             # channels of each input block's output
        for level, out in enumerate(cfg.channels):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(Block(ResBlock(cfg, C, out), *self._attention(cfg.attention[level], out)))
                C = out
                skips.append(C)
            if level < levels - 1:
                self.input_blocks.append(Block(ResBlock(cfg, C, C, "down") if cfg.resblock_updown
                                               else Downsample(C, cfg.conv_resample)))
                skips.append(C)
        self.middle_block = Block(ResBlock(cfg, C, C), *self._attention(cfg.middle_attention, C), ResBlock(cfg, C, C))
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(cfg.channels))):
            for i in range(cfg.num_res_blocks + 1):
                block = Block(ResBlock(cfg, C + skips.pop(), out), *self._attention(cfg.attention[level], out))
                C = out
                if level and i == cfg.num_res_blocks:
                    block.append(ResBlock(cfg, C, C, "up") if cfg.resblock_updown else Upsample(C, cfg.conv_resample))
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, C), nn.Identity(),
                                 zero(nn.Conv2d(C, cfg.out_channels, 3, padding=1)))
        self.to(memory_format=torch.channels_last)

    def _attention(self, depth: int, channels: int) -> list[nn.Module]:
        if not depth:
            return []
        return [SpatialTransformer(self.cfg, channels, depth) if self.cfg.context_dim else AttentionBlock(self.cfg, channels)]

    @property
    def block_names(self) -> tuple[str, ...]:
        """What `features` may name, in the order of the forward pass."""
        return (*(f"input_blocks.{i}" for i in range(len(self.input_blocks))), "middle_block",
                *(f"output_blocks.{i}" for i in range(len(self.output_blocks))))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                features: tuple[str, ...] | None = None) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """x (B, C, H, W); t (B,) float in [0, 1000] -> (B, out, H, W).

        y: class labels (B,), -1 = none; or (B, vector_dim). context: (B, M, context_dim). With `features`, names from
        block_names, also {name: what that block returned (B, C', H', W')}.
        """
        self._check(x, y, context, features)
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels).to(x.dtype))
        if self.cfg.vector_dim:
            emb = emb + self.label_emb(y.to(x.dtype))
        elif y is not None:
            # The null label adds nothing: a learned null row would only duplicate time_embed.2.bias.
            emb = emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]
        emb = F.silu(emb)                                                       # (B, E), shared by every ResBlock
        context = None if context is None else context.to(x.dtype)
        h, skips, seen = x.contiguous(memory_format=torch.channels_last), [], dict.fromkeys(features or ())
        blocks = [*self.input_blocks, self.middle_block, *self.output_blocks]
        for i, (name, block) in enumerate(zip(self.block_names, blocks)):
            skip = (skips.pop(),) if i > len(self.input_blocks) else ()
            h = self._run(block, h, emb, context, *skip)
            if i < len(self.input_blocks):
                skips.append(h)
            if name in seen:
                seen[name] = h
        out = self.out[2](norm_act(self.out[0], h))
        return out if features is None else (out, seen)

    def _run(self, block: Block, *inputs: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _check(self, x: Tensor, y: Tensor | None, context: Tensor | None, features: tuple[str, ...] | None) -> None:
        cfg, B, factor = self.cfg, x.shape[0], 2 ** (len(self.cfg.channel_mult) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"H×W = {x.shape[2]}×{x.shape[3]} must be divisible by {factor} ({len(cfg.channel_mult)} levels).")
        if not cfg.context_dim and context is not None:
            raise ValueError("this U-Net has no cross-attention: context must be None.")
        if cfg.context_dim and (context is None or context.ndim != 3 or (context.shape[0], context.shape[2]) != (B, cfg.context_dim)):
            raise ValueError(f"context is {shape(context)}: wanted ({B}, tokens, {cfg.context_dim}), a text encoder's output.")
        if y is not None and not cfg.num_classes and not cfg.vector_dim:
            raise ValueError("this U-Net is unconditional: y must be None.")
        if cfg.vector_dim and (y is None or y.shape != (B, cfg.vector_dim)):
            raise ValueError(f"y is {shape(y)}: wanted a vector ({B}, {cfg.vector_dim}), such as pooled text and sizes.")
        if cfg.num_classes and y is not None and (y.shape != (B,) or y.is_floating_point()):
            raise ValueError(f"y is {y.dtype} {shape(y)}: wanted integer class labels ({B},), -1 = none.")
        if cfg.num_classes and y is not None and y.device.type == "cpu" and B and not torch.compiler.is_compiling():   # a GPU would have to wait
            low, high = y.min().item(), y.max().item()
            if low < -1 or high >= cfg.num_classes:
                raise ValueError(f"y has labels {low} to {high}: wanted 0 to {cfg.num_classes - 1}, or -1 = none.")
        for name in features or ():
            if name not in self.block_names:
                raise ValueError(f"features: no block {name!r}.{closest(name, self.block_names)}  block_names lists all "
                                 f"{len(self.block_names)}.")


def shape(x: Tensor | None) -> str:
    return "None" if x is None else str(tuple(x.shape))


def num_params(cfg: UNetConfig) -> int:
    """Parameter count of a config, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(cfg).parameters())


def multiplier(channels: int, model_channels: int) -> float:
    """The m of channel_mult with int(m · model_channels) == channels; an int where it is one."""
    m = channels / model_channels
    m = m if int(m * model_channels) == channels else math.nextafter(m, math.inf)
    return int(m) if m == int(m) else m


TOY = UNetConfig(model_channels=256, channel_mult=(1, 1, 2, 4), attention=(0, 0, 0, 1), use_scale_shift_norm=False)
ADM = UNetConfig(3, 6, model_channels=256, num_head_channels=64, num_classes=1000)   # 6 = eps and its learned variance
SD = UNetConfig(4, 4, model_channels=320, channel_mult=(1, 2, 4, 4), attention=(1, 1, 1, 0), use_scale_shift_norm=False,
                resblock_updown=False)
XL = replace(SD, num_head_channels=64, vector_dim=2816, context_dim=2048)
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
    # Stable Diffusion. They take latents of 4 channels at 1/8; heads are 8 in number in 1.x, 64 channels wide since.
    "sd15": replace(SD, num_heads=8, context_dim=768, linear_projection=False),
    "sd21": replace(SD, num_head_channels=64, context_dim=1024),
    "sdxl": replace(XL, channel_mult=(1, 2, 4), attention=(0, 2, 10), middle_attention=10),
    "sdxl-refiner": replace(XL, model_channels=384, attention=(0, 4, 4, 0), middle_attention=4, vector_dim=2560, context_dim=1280),
}

# What the family fixes and no file says: (model_channels, context_dim) -> whose heads they are, and which.
FAMILY_HEADS = {(320, 768): ("Stable Diffusion 1.x", {"num_heads": 8}), (320, 1024): ("Stable Diffusion 2.x", {"num_head_channels": 64}),
                (320, 2048): ("SDXL", {"num_head_channels": 64}), (384, 1280): ("SDXL's refiner", {"num_head_channels": 64})}


def infer_config(state_dict: Mapping[str, Any], **known: Any) -> UNetConfig:
    """The config of a U-Net's native names and shapes. `known` gives what they cannot show, or must agree with them.

    Heads (num_heads or num_head_channels) and, for ADM, attention_order leave no trace: a wrong guess loads strictly and
    computes something else. They must be given, except for the heads of Stable Diffusion. dropout is 0 unless given.
    """
    names = [f.name for f in fields(UNetConfig)]
    for key in known:
        if key not in names:
            raise UserError(f"infer_config: {key!r} is not a field of UNetConfig.{closest(key, names)}")
    seen = _shapes_to_fields(state_dict)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    for key in given.keys() & seen.keys():
        if given[key] != seen[key]:
            raise UserError(f"{key}={given[key]!r} was given, but the tensors say {seen[key]!r}.  Leave it out.")
    channels, context_dim = seen["model_channels"], seen["context_dim"]
    owner, fixed = FAMILY_HEADS.get((channels, context_dim), ("", {}))
    asked = {k: given[k] for k in ("num_heads", "num_head_channels") if given.get(k)}
    given |= {} if asked else fixed
    missing = ["the number of attention heads"] * (not asked and not fixed)
    do = ["--num-heads or --num-head-channels (num_heads, num_head_channels), from the model's card or training command"] * len(missing)
    # One head has no order; and of transformers none is asked.
    if not context_dim and "attention_order" not in given and asked != {"num_heads": 1}:
        missing.append("the order of the qkv rows")
        do.append("--attention-order (attention_order) legacy, guided-diffusion's default, or new (its use_new_attention_order=True)")
    if missing:
        raise UserError(f"{' and '.join(missing)} leave{'s' * (len(missing) == 1)} no trace in the tensors (model_channels {channels}, context_dim "
                        f"{context_dim}), and a wrong one computes something else without an error.  Add {'; and '.join(do)}.")
    try:
        own = UNetConfig(**(seen | given | {"num_heads": 1, "num_head_channels": 0} | fixed))
        wrong = fixed and asked and any((asked.get("num_head_channels") or C / asked["num_heads"]) != own.head_channels(C) for C in own.channels)
        cfg = own if wrong else UNetConfig(**(seen | given))
    except ValueError as error:
        raise UserError(f"infer_config: {error}") from None
    if wrong:
        flags = [" ".join(f"--{k.replace('_', '-')} {v}" for k, v in heads.items()) for heads in (asked, fixed)]
        raise UserError(f"{flags[0]} was given, but the tensors are {owner}'s (model_channels {channels}, context_dim {context_dim}), which has "
                        f"{flags[1]}.  Leave it out.")
    return cfg


def _shapes_to_fields(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of UNetConfig that names and shapes determine. Missing and extra tensors are left for a strict load to name."""
    def size(name: str) -> tuple[int, ...]:
        if name not in state_dict:
            raise UserError(f"cannot tell the architecture: no tensor {name!r} among {len(state_dict)} ({', '.join(list(state_dict)[:3])} …); "
                            "wanted a U-Net under guided-diffusion's or LDM's names.")
        return tuple(state_dict[name].shape)

    def numbers(pattern: str) -> set[int]:
        return {int(m[1]) for name in state_dict if (m := re.match(pattern, name))}

    def depth(block: str) -> int:
        return len(numbers(rf"{block}\.1\.transformer_blocks\.(\d+)\.")) or int(f"{block}.1.qkv.weight" in state_dict)

    channels, total = size("time_embed.0.weight")[1], max(numbers(r"output_blocks\.(\d+)\."), default=0) + 1
    convs, resnets = numbers(r"output_blocks\.(\d+)\.[12]\.conv\."), numbers(r"output_blocks\.(\d+)\.[12]\.in_layers\.")
    pools = set(range(total)) - numbers(r"input_blocks\.(\d+)\.")               # average pooling leaves gaps in the numbers
    levels = 1 + len(convs or resnets or pools)
    if total % levels or total // levels < 2:
        raise UserError(f"cannot tell the architecture: {total} output blocks do not split into {levels} levels.")
    blocks = [f"input_blocks.{1 + level * (total // levels)}" for level in range(levels)]
    rows = [size(f"{block}.0.out_layers.3.weight")[0] for block in blocks]
    context_dim = 0 if "middle_block.1.qkv.weight" in state_dict else size("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
    return dict(
        in_channels=size("input_blocks.0.0.weight")[1], out_channels=size("out.2.weight")[0], model_channels=channels,
        channel_mult=tuple(multiplier(C, channels) for C in rows), num_res_blocks=total // levels - 1,
        attention=tuple(depth(block) for block in blocks), middle_attention=depth("middle_block"), context_dim=context_dim,
        use_scale_shift_norm=size(f"{blocks[0]}.0.emb_layers.1.weight")[0] == 2 * rows[0], resblock_updown=bool(resnets) and not convs,
        conv_resample=bool(convs or resnets or not pools), num_classes=size("label_emb.weight")[0] if "label_emb.weight" in state_dict else 0,
        vector_dim=size("label_emb.0.0.weight")[1] if "label_emb.0.0.weight" in state_dict else 0,
        linear_projection=not context_dim or len(size("middle_block.1.proj_in.weight")) == 2)
