"""What other code bases call our tensors: the exact, bijective maps between layouts, and configs in their terms. No file IO.

A *native* name is one of UNet(cfg).state_dict(), which is guided-diffusion's and LDM's; *foreign* is what a file holds.

    layout "native"      LDM's own files: the same names, but proj_in/out.weight are (C, C, 1, 1) if not cfg.linear_projection
    layout "diffusers"   UNet2DConditionModel for Stable Diffusion, UNet2DModel for ADM

    unet_map(cfg, layout)                        -> (Rename(native, foreign, rule), …), in state-dict order; both sides unique
    foreign_shapes(cfg, layout)                  -> {foreign name: shape}, the header of a file before any tensor is read
    foreign_names(cfg, layout)                   -> {foreign name: native name}
    to_foreign(cfg, layout, native, tensor)      -> [(foreign name, tensor)]: one, or three for ADM's qkv in diffusers
    to_native(cfg, layout, native, tensors)      -> tensor, from a mapping that holds (at least) the foreign names of `native`

One native tensor at a time in either direction is enough, so converters stream. Values are moved, never computed with.
"""

import re
import time
from functools import lru_cache
from reprlib import repr as brief
from typing import Any, Iterable, Literal, Mapping, NamedTuple

import torch
from torch import Tensor

from harness.cli import UserError, closest
from ckpt.native import config_from
from model import UNet, UNetConfig, multiplier

LAYOUTS = ("native", "diffusers")


class Rename(NamedTuple):
    native: str
    foreign: str
    rule: str      # "" the same | "squeeze" foreign (C,C,1,1), native (C,C) | "conv1d" foreign (O,I), native (O,I,1)
                   # "q" "k" "v": foreign (C,C) or (C,) is a third of the native qkv's rows, picked in cfg.attention_order


# ---- U-Net maps -----------------------------------------------------------------------------------------------------

TOP = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
       "out.0": "conv_norm_out", "out.2": "conv_out", "label_emb.0.0": "add_embedding.linear_1",
       "label_emb.0.2": "add_embedding.linear_2", "label_emb": "class_embedding"}
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


@lru_cache
def native_shapes(cfg: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in UNet(cfg).state_dict().items()}


@lru_cache
def unet_map(cfg: UNetConfig, layout: str) -> tuple[Rename, ...]:
    """Every tensor of UNet(cfg) and what it is called in files of that layout."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}.{closest(layout, LAYOUTS)}")
    if layout == "diffusers":
        diffusers_config(cfg)                                                   # raises where no diffusers class computes this
    places, renames = _places(cfg), []
    for name in native_shapes(cfg):
        squeeze = not cfg.linear_projection and name.endswith(("proj_in.weight", "proj_out.weight")) and cfg.context_dim
        if layout == "native":
            renames.append(Rename(name, name, "squeeze" if squeeze else ""))
            continue
        module, leaf = name.rsplit(".", 1)
        prefix = next((p for p in places if name.startswith(p + ".")), None)
        if prefix is None:
            renames.append(Rename(name, f"{TOP[module]}.{leaf}", ""))
            continue
        place, inner = places[prefix], module[len(prefix) + 1:]
        if ".attentions." in place and not cfg.context_dim:
            renames += _adm_attention(name, place, inner, leaf)
        else:
            renames.append(Rename(name, ".".join(p for p in (place, RESNET.get(inner, inner), leaf) if p), "squeeze" if squeeze else ""))
    foreign = {r.foreign for r in renames}
    assert len(foreign) == len(renames) and {r.native for r in renames} == set(native_shapes(cfg)), "the map is not bijective"
    return tuple(renames)


def _adm_attention(name: str, place: str, inner: str, leaf: str) -> list[Rename]:
    if inner == "norm":
        return [Rename(name, f"{place}.group_norm.{leaf}", "")]
    if inner == "proj_out":
        return [Rename(name, f"{place}.to_out.0.{leaf}", "conv1d" if leaf == "weight" else "")]
    return [Rename(name, f"{place}.to_{part}.{leaf}", part) for part in "qkv"]


def _places(cfg: UNetConfig) -> dict[str, str]:
    """{native prefix: diffusers prefix} of residual blocks, attentions and resamplers, counted as UNet builds them."""
    n, levels = cfg.num_res_blocks, len(cfg.channel_mult)
    places = {f"middle_block.{i}": f"mid_block.{name}" for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1"))}
    for level in range(levels):
        for j in range(n + 1):
            k, i = 1 + level * (n + 1) + j, levels - 1 - level
            here, up = f"input_blocks.{k}", f"output_blocks.{i * (n + 1) + j}"
            if j < n:
                places |= {f"{here}.0": f"down_blocks.{level}.resnets.{j}", f"{here}.1": f"down_blocks.{level}.attentions.{j}"}
            elif level < levels - 1:                                            # .0.op is a convolution, .0 a residual block
                places |= {f"{here}.0.op": f"down_blocks.{level}.downsamplers.0.conv", f"{here}.0": f"down_blocks.{level}.downsamplers.0"}
            places[f"{up}.0"] = f"up_blocks.{i}.resnets.{j}"
            last = 1
            if cfg.attention[level]:
                places[f"{up}.1"], last = f"up_blocks.{i}.attentions.{j}", 2
            if level and j == n:
                places |= {f"{up}.{last}.conv": f"up_blocks.{i}.upsamplers.0.conv", f"{up}.{last}": f"up_blocks.{i}.upsamplers.0"}
    return places


@lru_cache
def _by_native(cfg: UNetConfig, layout: str) -> dict[str, list[Rename]]:
    table: dict[str, list[Rename]] = {}
    for rename in unet_map(cfg, layout):
        table.setdefault(rename.native, []).append(rename)
    return table


def foreign_names(cfg: UNetConfig, layout: str) -> dict[str, str]:
    return {r.foreign: r.native for r in unet_map(cfg, layout)}


def foreign_shapes(cfg: UNetConfig, layout: str) -> dict[str, tuple[int, ...]]:
    shapes = native_shapes(cfg)
    change = {"": lambda s: s, "squeeze": lambda s: (*s, 1, 1), "conv1d": lambda s: s[:2]}
    for part in "qkv":
        change[part] = lambda s: (s[0] // 3, *s[1:2])
    return {r.foreign: change[r.rule](shapes[r.native]) for r in unet_map(cfg, layout)}


def to_foreign(cfg: UNetConfig, layout: str, native: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A native tensor under its foreign name(s), in the foreign shape; views where possible."""
    renames = _by_native(cfg, layout)[native]
    rule = renames[0].rule
    if rule == "squeeze":
        tensor = tensor[..., None, None]
    elif rule == "conv1d":
        tensor = tensor[..., 0]
    elif rule == "q":
        rows = reorder_attention(tensor, _heads(cfg, tensor), "new") if cfg.attention_order == "legacy" else tensor
        return [(r.foreign, part.flatten(1) if part.ndim > 1 else part) for r, part in zip(renames, rows.chunk(3))]
    return [(renames[0].foreign, tensor)]


def to_native(cfg: UNetConfig, layout: str, native: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The inverse. A "squeeze" tensor that already is (C, C), as in our own files, passes; other shapes are left for load_strict."""
    renames = _by_native(cfg, layout)[native]
    rule, tensor = renames[0].rule, tensors[renames[0].foreign]
    if rule == "squeeze":
        return tensor[..., 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor
    if rule == "conv1d":
        return tensor[..., None]
    if rule == "q":
        rows = torch.cat([tensors[r.foreign] for r in renames])
        rows = rows[..., None] if rows.ndim > 1 else rows
        return reorder_attention(rows, _heads(cfg, rows), "legacy") if cfg.attention_order == "legacy" else rows
    return tensor


def _heads(cfg: UNetConfig, qkv: Tensor) -> int:
    C = qkv.shape[0] // 3
    return C // cfg.head_channels(C)


def reorder_attention(qkv: Tensor, heads: int, to: Literal["new", "legacy"]) -> Tensor:
    """Rows of a qkv weight (3C, …) or bias (3C,): legacy [head][q,k,v][d] -> new [q,k,v][head][d], or back. Exact."""
    if to not in ("new", "legacy") or qkv.shape[0] % (3 * heads):
        raise ValueError(f"to={to!r}, heads={heads}, {qkv.shape[0]} rows: wanted 'new' or 'legacy', and rows a multiple of 3 · heads.")
    split = (heads, 3) if to == "new" else (3, heads)
    return qkv.unflatten(0, (*split, -1)).transpose(0, 1).flatten(0, 2)


# ---- configs --------------------------------------------------------------------------------------------------------
# What diffusers assumes where a config.json is silent (0.42.1). A key that is not here is not known to us.

SHARED = dict(in_channels=4, out_channels=4, center_input_sample=False, time_embedding_type="positional", time_embedding_dim=None,
              freq_shift=0, flip_sin_to_cos=True, layers_per_block=2, mid_block_scale_factor=1, downsample_padding=1, dropout=0.0,
              act_fn="silu", attention_head_dim=8, norm_num_groups=32, norm_eps=1e-5, resnet_time_scale_shift="default",
              class_embed_type=None, num_class_embeds=None)
DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {**SHARED, **dict(
        in_channels=3, out_channels=3, mid_block_type="UNetMidBlock2D", add_attention=True, attn_norm_num_groups=None,
        block_out_channels=(224, 448, 672, 896), down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
        up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"), downsample_type="conv", upsample_type="conv")},
    "UNet2DConditionModel": {**SHARED, **dict(
        mid_block_type="UNetMidBlock2DCrossAttn", block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"), up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        cross_attention_dim=1280, transformer_layers_per_block=1, use_linear_projection=False, num_attention_heads=None,
        addition_embed_type=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None,
        only_cross_attention=False, mid_block_only_cross_attention=None, dual_cross_attention=False, cross_attention_norm=None,
        reverse_transformer_layers_per_block=None, encoder_hid_dim=None, encoder_hid_dim_type=None, attention_type="default",
        resnet_skip_time_act=False, resnet_out_scale_factor=1.0, time_embedding_act_fn=None, timestep_post_act=None,
        time_cond_proj_dim=None, conv_in_kernel=3, conv_out_kernel=3, class_embeddings_concat=False)},
}
IGNORED = ("sample_size", "upcast_attention", "num_train_timesteps", "addition_embed_type_num_heads")   # they change no result


def diffusers_config(cfg: UNetConfig, sample_size: int | None = None) -> dict[str, Any]:
    """config.json for diffusers' from_pretrained: the same network. UserError where no diffusers class computes it.

    sample_size, H/8 of a pipeline's default image, is not in the weights: by default 64, or 128 with a vector (SDXL).
    """
    conv = not cfg.resblock_updown
    kind = "CrossAttn" if cfg.context_dim else "Attn"
    plain = "DownBlock2D" if conv else "ResnetDownsampleBlock2D"
    down = [f"{kind}DownBlock2D" if depth else plain for depth in cfg.attention]
    problem = ("average pooling between levels (conv_resample=False)" if conv and not cfg.conv_resample and len(down) > 1 else
               f"channel_mult[0] = {cfg.channel_mult[0]:g}, not 1" if cfg.channels[0] != cfg.model_channels else "")
    common = dict(
        in_channels=cfg.in_channels, out_channels=cfg.out_channels, block_out_channels=list(cfg.channels), layers_per_block=cfg.num_res_blocks,
        down_block_types=down, up_block_types=[_up(name) for name in reversed(down)], dropout=cfg.dropout,
        resnet_time_scale_shift="scale_shift" if cfg.use_scale_shift_norm else "default",
        act_fn="silu", norm_eps=1e-5, norm_num_groups=32, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1,
        num_class_embeds=cfg.num_classes or None)
    if cfg.context_dim:
        depths = [depth or 1 for depth in cfg.attention[:-1]] + [cfg.middle_attention]      # the last one is also the middle's
        heads = [max(C // cfg.head_channels(C), 1) for C in cfg.channels]
        problem = (problem or "resampling inside residual blocks with cross-attention" * cfg.resblock_updown or
                   "another transformer depth in the middle than in the last level" * (cfg.attention[-1] not in (0, cfg.middle_attention)))
        config = dict(_class_name="UNet2DConditionModel", **common, mid_block_type="UNetMidBlock2DCrossAttn",
                      cross_attention_dim=cfg.context_dim, transformer_layers_per_block=_one(depths),
                      attention_head_dim=_one(heads),                           # diffusers' name; its meaning is the head count
                      use_linear_projection=cfg.linear_projection, sample_size=sample_size or (128 if cfg.vector_dim else 64))
        if cfg.vector_dim:
            config |= dict(addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=cfg.vector_dim)
    else:
        used = [C for C, depth in zip(cfg.channels, cfg.attention) if depth] + [cfg.channels[-1]]
        dims = {cfg.head_channels(C) for C in used}
        one_head = all(cfg.head_channels(C) == C for C in used)
        problem = (problem or "class vectors without cross-attention" * bool(cfg.vector_dim) or
                   f"head dims {sorted(dims)} at different levels" * (len(dims) > 1 and not one_head))
        resample = "conv" if conv else "resnet"
        config = dict(_class_name="UNet2DModel", **common, attn_norm_num_groups=32, downsample_type=resample, upsample_type=resample,
                      attention_head_dim=dims.pop() if len(dims) == 1 else None, sample_size=sample_size)
    if problem:
        raise UserError(f"diffusers has no U-Net with {problem}.  Keep this network in the native layout.")
    return config


def _up(down_block_type: str) -> str:
    return down_block_type.replace("Downsample", "Upsample").replace("Down", "Up")


def _one(values: list[Any]) -> Any:
    """An int for a list of equal ints, as diffusers' configs have it."""
    return values[0] if values and all(value == values[0] for value in values) else values


def from_diffusers_config(config: Mapping[str, Any], attention_order: Literal["legacy", "new"] = "new") -> UNetConfig:
    """A config.json of diffusers as ours, or a UserError that names what we do not compute. qkv rows are in no order there:
    for ADM choose the one the native tensors shall have."""
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in DEFAULTS:
        raise UserError(f"config _class_name is {brief(name)}: wanted one of {', '.join(DEFAULTS)}.")
    c = DEFAULTS[name] | {k: v for k, v in config.items() if not k.startswith("_") and k not in IGNORED}
    unknown = sorted(c.keys() - DEFAULTS[name].keys())
    if unknown:
        raise UserError(f"config of {name} has {brief(unknown[0])}, which is not known here.{closest(unknown[0][:60], DEFAULTS[name])}")
    for key in {"layers_per_block", "cross_attention_dim"} & c.keys():
        c[key] = _one(c[key]) if isinstance(c[key], (list, tuple)) else c[key]
        if type(c[key]) is not int or c[key] < 1:
            raise UserError(f"config of {name} has {key} = {brief(c[key])}: wanted one number for all levels.")
    for key, kind, alone in (("block_out_channels", int, ()), ("down_block_types", str, ()), ("up_block_types", str, ()),
                             ("attention_head_dim", int, (int,) if "Condition" in name else (int, type(None))),
                             ("transformer_layers_per_block", int, (int,))):
        value, many = c.get(key, 1), isinstance(c.get(key), (list, tuple))
        if not (type(value) in alone or many and value and all(type(v) is kind and (kind is str or 0 < v <= 65536) for v in value)):
            raise UserError(f"config of {name} has {key} = {brief(value)}: wanted {'names' if kind is str else 'numbers from 1 to 65536'}, one a level.")
    channels, cross, down = c["block_out_channels"], name == "UNet2DConditionModel", c["down_block_types"]
    levels, heads, depths = len(channels), c["attention_head_dim"], c.get("transformer_layers_per_block", 1)
    depths = (depths,) * levels if isinstance(depths, int) else depths
    if not len(down) == len(c["up_block_types"]) == len(depths) == levels or isinstance(heads, (list, tuple)) and len(heads) != levels:
        raise UserError(f"config of {name}: block_out_channels has {levels} levels; down_block_types, up_block_types, "
                        "transformer_layers_per_block or attention_head_dim another number.")
    if not cross:                                                               # here it is what its name says; None = one head
        head = dict(num_heads=1) if heads is None else dict(num_head_channels=heads)
    elif isinstance(heads, int):
        head = dict(num_heads=heads)
    else:
        head = dict(num_heads=heads[-1]) if len(set(heads)) == 1 else dict(num_head_channels=channels[-1] // heads[-1])
    resamples = [c.get("downsample_type", "conv") if "Attn" in d and not cross else "resnet" if "Resnet" in d else "conv" for d in down[:-1]]
    try:
        cfg = config_from(UNetConfig, dict(
            in_channels=c["in_channels"], out_channels=c["out_channels"], model_channels=channels[0],
            channel_mult=tuple(multiplier(C, channels[0]) for C in channels),
            num_res_blocks=c["layers_per_block"],
            attention=tuple(depth * ("Attn" in d) for depth, d in zip(depths, down)), middle_attention=depths[-1], **head,
            attention_order="legacy" if cross else attention_order, use_scale_shift_norm=c["resnet_time_scale_shift"] == "scale_shift",
            resblock_updown="resnet" in resamples, num_classes=c["num_class_embeds"] or 0, dropout=c["dropout"],
            vector_dim=(c["projection_class_embeddings_input_dim"] or 0) if c.get("addition_embed_type") else 0,
            context_dim=c["cross_attention_dim"] if cross else 0, linear_projection=not cross or c["use_linear_projection"]))
    except ValueError as error:
        raise UserError(f"config of {name}: {error}") from None
    # Whatever was read wrongly or not at all comes back different.
    theirs, ours = _canonical(c), _canonical(DEFAULTS[name] | {k: v for k, v in diffusers_config(cfg).items() if k in c})
    for key in theirs:
        if theirs[key] != ours[key]:
            raise UserError(f"config of {name} has {key} = {brief(c[key])}; this U-Net computes {ours[key]!r} only.")
    return cfg


def _canonical(config: dict[str, Any]) -> dict[str, Any]:
    """Different ways to write the same network, written the same: synonyms, an int for equal entries, entries nobody reads."""
    c = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in config.items()}
    down, channels, levels = c["down_block_types"], c["block_out_channels"], len(c["block_out_channels"])
    attends, cross = ["Attn" in d for d in down[:-1]] + [True], "cross_attention_dim" in c
    for key in ("transformer_layers_per_block", "attention_head_dim"):
        values = c[key] if isinstance(c.get(key), list) else [c.get(key)] * levels
        c[key] = [C if v is None else v for v, C, used in zip(values, channels, attends) if used]   # no head dim = one head
    if isinstance(c.get("only_cross_attention"), list):
        c["only_cross_attention"] = _one(c["only_cross_attention"])
    for key, blocks in (("down_block_types", down), ("up_block_types", c["up_block_types"])):
        c[key] = [*blocks[:-1], blocks[-1].replace("Resnet", "").replace("sample", "")]       # the last one resamples nothing
    if not cross:
        c["downsample_type"] = c["downsample_type"] if any(attends[:-1]) else None
        c["upsample_type"] = c["upsample_type"] if any("Attn" in d for d in down[1:]) else None
        if c["attn_norm_num_groups"] is None and c["resnet_time_scale_shift"] == "default":
            c["attn_norm_num_groups"] = c["norm_num_groups"]
    if c["time_embedding_dim"] == 4 * channels[0]:
        c["time_embedding_dim"] = None
    c["act_fn"] = "silu" if c["act_fn"] == "swish" else c["act_fn"]
    return c


def guided_diffusion(image_size: int | None = None, in_channels: int | None = None, model_channels: int | None = None,
                     out_channels: int | None = None, num_res_blocks: int | None = None, attention_resolutions: Iterable[int] | None = None,
                     dropout: float = 0.0, channel_mult: Iterable[float] = (1, 2, 4, 8), conv_resample: bool = True, dims: int = 2,
                     num_classes: int | None = None, use_checkpoint: bool = False, use_fp16: bool = False, num_heads: int = 1,
                     num_head_channels: int = -1, num_heads_upsample: int = -1, use_scale_shift_norm: bool = False,
                     resblock_updown: bool = False, use_new_attention_order: bool = False) -> UNet:
    """guided-diffusion's UNetModel(...), its arguments in its order, and defaults: `from layouts import guided_diffusion as UNetModel`.

    attention_resolutions are downsample factors (8 = at H/8), as its constructor takes them; one that no level has is
    ignored, as there. image_size never mattered and may be left out; the others up to attention_resolutions may not.
    """
    needed = dict(in_channels=in_channels, model_channels=model_channels, out_channels=out_channels, num_res_blocks=num_res_blocks,
                  attention_resolutions=attention_resolutions)
    if absent := [name for name, value in needed.items() if value is None]:
        raise TypeError(f"guided_diffusion() is missing {', '.join(absent)}.")
    for name, value in (("channel_mult", channel_mult), ("attention_resolutions", attention_resolutions)):
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise UserError(f"{name}={value!r}: wanted numbers such as (1, 2, 4); strings are for guided-diffusion's create_model, not its UNetModel.")
    if dims != 2 or use_fp16:
        raise UserError(f"dims={dims}, use_fp16={use_fp16}: wanted 2 and False.  For half precision call .half() on the U-Net, or autocast.")
    if num_heads_upsample not in (-1, num_heads) and num_head_channels == -1:
        raise UserError(f"num_heads_upsample={num_heads_upsample} with num_heads={num_heads}: wanted the same heads on both ways.")
    factors, mult = set(attention_resolutions), tuple(channel_mult)
    net = UNet(UNetConfig(
        in_channels, out_channels, model_channels, mult, num_res_blocks, attention=tuple(int(2 ** level in factors) for level in range(len(mult))),
        num_heads=num_heads, num_head_channels=max(num_head_channels, 0), attention_order="new" if use_new_attention_order else "legacy",
        use_scale_shift_norm=use_scale_shift_norm, resblock_updown=resblock_updown, conv_resample=conv_resample,
        num_classes=num_classes or 0, dropout=dropout))
    net.checkpointing = use_checkpoint
    return net


def family(cfg: UNetConfig) -> str:
    """Which of the known families a U-Net belongs to, by what it is conditioned on."""
    names = {(768, 0): "sd1", (1024, 0): "sd2", (2048, 2816): "sdxl", (1280, 2560): "sdxl-refiner"}
    return names.get((cfg.context_dim, cfg.vector_dim), "latent diffusion") if cfg.context_dim else "adm"


def target_of(meta: Mapping[str, Any]) -> str | None:
    """What the network was trained to output, if the file says: eps, v, x0 or fm, as in --objective."""
    objective = meta.get("objective")
    target = objective.get("target") if isinstance(objective, dict) else objective
    return {"u": "fm", "ddpm": "eps"}.get(target, target) if isinstance(target, str) else None


def modelspec(cfg: UNetConfig, layout: str, meta: Mapping[str, Any], title: str) -> dict[str, str]:
    """The metadata keys by which other programs know a Stable Diffusion file (Stability AI's ModelSpec 1.0)."""
    target = target_of(meta)
    names = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-768-v" if target == "v" else "stable-diffusion-v2-512",
             "sdxl": "stable-diffusion-xl-v1-base", "sdxl-refiner": "stable-diffusion-xl-v1-refiner"}
    if family(cfg) not in names:
        return {}
    spec = {"sai_model_spec": "1.0.0", "architecture": names[family(cfg)], "title": title, "date": time.strftime("%Y-%m-%d"),
            "implementation": "diffusers" if layout == "diffusers" else "https://github.com/Stability-AI/generative-models"}
    if target in ("eps", "v"):
        spec["prediction_type"] = {"eps": "epsilon", "v": "v"}[target]
    return {f"modelspec.{key}": value for key, value in spec.items()}


# ---- names ----------------------------------------------------------------------------------------------------------

WRAPPERS = ("module.", "_orig_mod.", "unet.", "student.", "ema.", "model.diffusion_model.", "diffusion_model.", "model.")
PARTS = {"model.diffusion_model.": "unet", "diffusion_model.": "unet", "unet.": "unet", "model_ema.": "ema", "first_stage_model.": "vae",
         "vae.": "vae", "cond_stage_model.": "text", "conditioner.": "text", "text_encoder.": "text", "text_encoder_2.": "text",
         "text_encoders.": "text"}
SCHEDULE = frozenset((
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar", "scale_factor", "denoiser.sigmas", "edm_mean", "edm_std",
    "v_pred", "ztsnr", "model_ema.decay", "model_ema.num_updates"))


def strip_prefix(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """(wrapper prefix that *all* names start with, {full name: name without it}); known wrappers only, nested ones too."""
    names, prefix = list(names), ""
    while names and (found := next((w for w in WRAPPERS if all(n.startswith(prefix + w) for n in names)), "")):
        prefix += found
    return prefix, {n: n[len(prefix):] for n in names}


def parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Sort a checkpoint's names: {part: {full name: inner name}}, parts in use only.

    unet, vae: inner names without prefix. ema: the U-Net's inner names (LDM writes them without dots and with one
    `diffusion_model` before; unresolved without the U-Net beside it, then as written). text, schedule: as written.
    other: whatever is nobody's, for the caller to refuse. A bare or wrapped U-Net is all unet.
    """
    names = list(names)
    outer, inner = strip_prefix(names)
    if detect(inner.values()):
        return {"unet": inner}
    outer = re.match(r"((module|_orig_mod)\.)*", outer).group()                 # "model." can be part of what tells the parts
    table: dict[str, dict[str, str]] = {}
    for full in names:
        name = full[len(outer):]
        prefix = next((p for p in PARTS if name.startswith(p)), None)
        part = "schedule" if name in SCHEDULE else PARTS[prefix] if prefix else "other"
        table.setdefault(part, {})[full] = name[len(prefix):] if part in ("unet", "vae", "ema") else name
    return _resolve_ema(table)


def _resolve_ema(table: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    if "ema" in table and "unet" in table:
        unet = list(table["unet"].values())
        dotless = {"diffusion_model" + name.replace(".", ""): name for name in unet}
        if len(dotless) < len(unet):
            raise UserError("two U-Net names differ only in their dots, so the EMA's names cannot be told apart.")
        for full, name in list(table["ema"].items()):
            if name in dotless:
                table["ema"][full] = dotless[name]
            else:
                table.setdefault("other", {})[full] = table["ema"].pop(full)
    return table


def detect(names: Iterable[str]) -> Literal["native", "diffusers"] | None:
    """The layout of a U-Net's inner names; None if they are of neither, or of both."""
    heads = {name.split(".", 1)[0] for name in names}
    native, diffusers = "input_blocks" in heads, "down_blocks" in heads and "time_embedding" in heads
    return None if native == diffusers else "native" if native else "diffusers"
