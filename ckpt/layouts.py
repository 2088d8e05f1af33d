"""What other code bases call our tensors: the exact, bijective maps between layouts. No file IO.

A *native* name is one of UNet(cfg).state_dict(), which is guided-diffusion's and LDM's, or of
MMDiT(cfg).state_dict(), which is DiT's and SD3's; *foreign* is what a file holds.

    layout "native"      LDM's own files: the same names, but proj_in/out.weight are (C, C, 1, 1)
                         if not cfg.linear_projection
    layout "diffusers"   UNet2DConditionModel for Stable Diffusion, UNet2DModel for ADM
                         (of transformers, either: mmdits.py)

    unet_map(cfg, layout)         -> (Rename(native, foreign, rule), …), in state-dict order;
                                     both sides are unique
    foreign_shapes(cfg, layout)   -> {foreign name: shape}, a file's header before any tensor
    foreign_names(cfg, layout)    -> {foreign name: native name}
    to_foreign(cfg, layout, native, tensor)  -> [(foreign name, tensor)]: one, or three for
                                                ADM's qkv in diffusers
    to_native(cfg, layout, native, tensors)  -> tensor, from a mapping that holds (at least) the
                                                foreign names of `native`
    native_view(box, cfg, layout) -> a whole file under native names, read on access

One native tensor at a time in either direction is enough, so converters stream. Values are moved,
never computed with; only SiT's authors have one of the opposite sign.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import ckpt.mmdits as mmdits
from ckpt.configs import MAX_LEVELS, OF_UNET, differences, native_shapes
from ckpt.diffusers import diffusers_config
from harness.cli import UserError, closest
from harness.files import Container, Entry, check_shapes, listed
from mmdit import MMDiTConfig
from model import PRESETS, UNetConfig

LAYOUTS = ("native", "diffusers")
Config = UNetConfig | MMDiTConfig


class Rename(NamedTuple):
    native: str
    foreign: str
    # "" the same | "squeeze" foreign (C,C,1,1), native (C,C) | "conv1d" foreign (O,I), native
    # (O,I,1) | "q" "k" "v": foreign (C,C) or (C,) is a third of the native qkv's rows, picked in
    # cfg.attention_order
    rule: str


# ---- U-Net maps ---------------------------------------------------------------------------------

TOP = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "label_emb": "class_embedding", "guidance_proj": "time_embedding.cond_proj",
}  # fmt: skip
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


def check_layout(cfg: Config, layout: str) -> None:
    """Refuse a layout that is none, or that cannot say what a network computes."""
    if layout not in LAYOUTS:
        raise UserError(
            f"layout {layout!r} is not one of {', '.join(LAYOUTS)}",
            do=closest(layout, LAYOUTS) or "Choose one of them.",
        )
    if layout == "diffusers":
        diffusers_config(cfg)  # raises where no diffusers class computes this


@lru_cache
def transformer_map(cfg: MMDiTConfig, layout: str) -> dict[str, tuple[mmdits.Piece, ...]]:
    """The same of MMDiT(cfg): {native name: the pieces that files of that layout have of it}."""
    check_layout(cfg, layout)
    return mmdits.pieces(cfg, layout)


@lru_cache
def unet_map(cfg: UNetConfig, layout: str) -> tuple[Rename, ...]:
    """Every tensor of UNet(cfg) and what it is called in files of that layout."""
    check_layout(cfg, layout)
    places = _places(cfg.num_res_blocks, cfg.attention)
    renames, shapes = [], native_shapes(cfg)
    squeezed = ("proj_in.weight", "proj_out.weight")
    squeezed = () if cfg.linear_projection or not cfg.context_dim else squeezed
    for name in shapes:
        rule = "squeeze" if name.endswith(squeezed) else ""
        if layout == "native":
            renames.append(Rename(name, name, rule))
            continue
        module, leaf = name.rsplit(".", 1)
        prefix = next((p for p in places if name.startswith(p + ".")), None)
        if prefix is None:
            renames.append(Rename(name, f"{TOP[module]}.{leaf}", ""))
            continue
        place, inner = places[prefix], module[len(prefix) + 1 :]
        if ".attentions." in place and not cfg.context_dim:
            renames += _adm_attention(name, place, inner, leaf)
        else:
            foreign = ".".join(p for p in (place, RESNET.get(inner, inner), leaf) if p)
            renames.append(Rename(name, foreign, rule))
    assert len({r.foreign for r in renames}) == len(renames), "the map is not bijective"
    assert {r.native for r in renames} == set(shapes), "the map is not bijective"
    return tuple(renames)


def _adm_attention(name: str, place: str, inner: str, leaf: str) -> list[Rename]:
    if inner == "norm":
        return [Rename(name, f"{place}.group_norm.{leaf}", "")]
    if inner == "proj_out":
        return [Rename(name, f"{place}.to_out.0.{leaf}", "conv1d" if leaf == "weight" else "")]
    return [Rename(name, f"{place}.to_{part}.{leaf}", part) for part in "qkv"]


def _places(n: int, attention: Sequence[int]) -> dict[str, str]:
    """{native prefix: diffusers prefix} of residual blocks, attentions and resamplers, counted as
    UNet builds them: n residual blocks a level, levels with attention or without."""
    levels = len(attention)
    places = {
        f"middle_block.{i}": f"mid_block.{name}"
        for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }
    for level in range(levels):
        for j in range(n + 1):
            k, i = 1 + level * (n + 1) + j, levels - 1 - level
            here, up = f"input_blocks.{k}", f"output_blocks.{i * (n + 1) + j}"
            if j < n:
                places |= {
                    f"{here}.0": f"down_blocks.{level}.resnets.{j}",
                    f"{here}.1": f"down_blocks.{level}.attentions.{j}",
                }
            elif level < levels - 1:  # .0.op is a convolution, .0 a residual block
                places |= {
                    f"{here}.0.op": f"down_blocks.{level}.downsamplers.0.conv",
                    f"{here}.0": f"down_blocks.{level}.downsamplers.0",
                }
            places[f"{up}.0"] = f"up_blocks.{i}.resnets.{j}"
            last = 1
            if attention[level]:
                places[f"{up}.1"], last = f"up_blocks.{i}.attentions.{j}", 2
            if level and j == n:
                places |= {
                    f"{up}.{last}.conv": f"up_blocks.{i}.upsamplers.0.conv",
                    f"{up}.{last}": f"up_blocks.{i}.upsamplers.0",
                }
    return places


# In attention, in diffusers' first years.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_name(name: str) -> str:
    """A name of diffusers' first years as it is today."""
    return re.sub(r"(?<=\.attentions\.)(\d+\.)(\w+)", lambda m: m[1] + OLD.get(m[2], m[2]), name)


def modern(box: Container) -> Container:
    """A file under diffusers' names of today. One that has a tensor under both keeps both."""
    table = {}
    for name, entry in box.table.items():
        new = modern_name(name)
        table[name if new in box.table else new] = entry
    return box.over(table)


def native_names(box: Container) -> Container:
    """A UNet2DConditionModel under native names, as far as its names alone tell which is which: so
    that infer_config can read its shapes. Other names stay as they are."""

    def numbers(pattern: str) -> set[int]:
        return {int(m[1]) for name in box if (m := re.match(pattern, name))}

    levels = numbers(r"down_blocks\.(\d{1,3})\.")
    n = numbers(r"down_blocks\.0\.resnets\.(\d{1,3})\.")
    if not 1 <= len(levels) <= MAX_LEVELS or not 1 <= len(n) <= OF_UNET["num_res_blocks"][1]:
        raise UserError(
            f"{box.path} has diffusers' names, with {len(levels)} levels of {len(n)} blocks",
            do="Is the file complete?  Copy it again.",
        )
    attends = numbers(r"down_blocks\.(\d{1,3})\.attentions\.")
    places = _places(len(n), [int(level in attends) for level in range(len(levels))])
    inner = {foreign: native for native, foreign in RESNET.items()}
    outer = {foreign: native for native, foreign in (*places.items(), *TOP.items())}
    table = {}
    for name, entry in box.table.items():
        cuts = [i for i, letter in enumerate(name) if letter == "."]
        # The longest place first: a resampler's convolution lies in a resampler.
        cut = next((i for i in reversed(cuts) if name[:i] in outer), None)
        if cut is None:
            table[name] = entry
            continue
        module, _, leaf = name[cut + 1 :].rpartition(".")
        place = outer[name[:cut]]
        table[".".join(p for p in (place, inner.get(module, module), leaf) if p)] = entry
    return box.over(table)


@lru_cache
def _by_native(cfg: UNetConfig, layout: str) -> dict[str, list[Rename]]:
    table: dict[str, list[Rename]] = {}
    for rename in unet_map(cfg, layout):
        table.setdefault(rename.native, []).append(rename)
    return table


def foreign_names(cfg: Config, layout: str) -> dict[str, str]:
    if isinstance(cfg, MMDiTConfig):
        table = transformer_map(cfg, layout)
        return {piece.foreign: native for native, parts in table.items() for piece in parts}
    return {r.foreign: r.native for r in unet_map(cfg, layout)}


def foreign_shapes(cfg: Config, layout: str) -> dict[str, tuple[int, ...]]:
    shapes = native_shapes(cfg)
    if isinstance(cfg, MMDiTConfig):
        return {
            piece.foreign: mmdits.piece_shape(piece, shapes[native])
            for native, parts in transformer_map(cfg, layout).items()
            for piece in parts
        }
    change = {"": lambda s: s, "squeeze": lambda s: (*s, 1, 1), "conv1d": lambda s: s[:2]}
    for part in "qkv":
        change[part] = lambda s: (s[0] // 3, *s[1:2])
    return {r.foreign: change[r.rule](shapes[r.native]) for r in unet_map(cfg, layout)}


def to_foreign(cfg: Config, layout: str, native: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A native tensor under its foreign name(s), in the foreign shape; views where possible."""
    if isinstance(cfg, MMDiTConfig):
        return mmdits.to_foreign(transformer_map(cfg, layout)[native], tensor)
    renames = _by_native(cfg, layout)[native]
    rule = renames[0].rule
    if rule == "squeeze":
        tensor = tensor[..., None, None]
    elif rule == "conv1d":
        tensor = tensor[..., 0]
    elif rule == "q":
        rows = tensor.flatten(1) if tensor.ndim > 1 else tensor
        if cfg.attention_order == "legacy":
            rows = reorder_attention(rows, _heads(cfg, rows), "new")
        return [(r.foreign, part) for r, part in zip(renames, rows.chunk(3))]
    return [(renames[0].foreign, tensor)]


def to_native(cfg: Config, layout: str, native: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The inverse. A "squeeze" tensor that already is (C, C), as in our own files, passes; other
    shapes are left for load_strict."""
    if isinstance(cfg, MMDiTConfig):
        shape = native_shapes(cfg)[native]
        return mmdits.to_native(transformer_map(cfg, layout)[native], shape, tensors)
    renames = _by_native(cfg, layout)[native]
    rule, tensor = renames[0].rule, tensors[renames[0].foreign]
    if rule == "squeeze":
        return tensor[..., 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor
    if rule == "conv1d":
        return tensor[..., None]
    if rule == "q":
        rows = torch.cat([tensors[r.foreign] for r in renames])
        rows = rows[..., None] if rows.ndim > 1 else rows
        if cfg.attention_order == "legacy":
            rows = reorder_attention(rows, _heads(cfg, rows), "legacy")
        return rows
    return tensor


def _heads(cfg: UNetConfig, qkv: Tensor) -> int:
    C = qkv.shape[0] // 3
    return C // cfg.head_channels(C)


def reorder_attention(qkv: Tensor, heads: int, to: Literal["new", "legacy"]) -> Tensor:
    """Rows of a qkv weight (3C, …) or bias (3C,): legacy [head][q,k,v][d] -> new
    [q,k,v][head][d], or back. Exact."""
    if to not in ("new", "legacy") or qkv.shape[0] % (3 * heads):
        raise ValueError(
            f"to={to!r}, heads={heads}, {qkv.shape[0]} rows: wanted 'new' or 'legacy', and rows a "
            "multiple of 3 · heads."
        )
    split = (heads, 3) if to == "new" else (3, heads)
    return qkv.unflatten(0, (*split, -1)).transpose(0, 1).flatten(0, 2)


def native_view(box: Container, cfg: Config, layout: str) -> Container:
    """A file in some layout as a mapping of native names. All names and shapes are checked now,
    tensors are read on access."""
    wanted, native = foreign_shapes(cfg, layout), native_shapes(cfg)
    given = {k: e.shape for k, e in box.table.items()}
    # (C, C) in files that save_unet wrote, (C, C, 1, 1) in those of Stable Diffusion 1.
    for _, name, rule in unet_map(cfg, layout) if isinstance(cfg, UNetConfig) else ():
        if rule == "squeeze" and given.get(name) == wanted[name][:2]:
            given[name] = wanted[name]
    check_shapes(wanted, given, str(box.path))
    odd = [f"{k} ({e.dtype})" for k, e in box.table.items() if not e.dtype.is_floating_point]
    if odd:
        raise UserError(
            f"{box.path}: {len(odd)} weights are not floating-point numbers: {listed(odd)}",
            do="Save them in fp32, fp16 or bf16.",
        )
    table: dict[str, Entry] = {}
    for foreign, name in foreign_names(cfg, layout).items():
        read = partial(to_native, cfg, layout, name, box)
        entry = table.setdefault(name, Entry(box.dtype(foreign), native[name], read))
        if entry.dtype != box.dtype(foreign):
            raise UserError(
                f"{box.path}: parts of {name} have dtypes {entry.dtype} and "
                f"{box.dtype(foreign)}, wanted one",
                do="Save all of them in one dtype.",
            )
    return box.over({name: table[name] for name in native})


def family(cfg: Config) -> str:
    """Which of the known families a network belongs to."""
    if isinstance(cfg, MMDiTConfig):
        return mmdits.family(cfg)
    if not cfg.context_dim:
        return "adm"
    names = {(768, 0): "sd1", (1024, 0): "sd2", (2048, 2816): "sdxl", (1280, 2560): "sdxl-refiner"}
    return names.get((cfg.context_dim, cfg.vector_dim), "latent diffusion")


def target_of(meta: Mapping[str, Any]) -> str | None:
    """What the network was trained to output, if the file says: eps, v, x0 or fm, as in
    --objective."""
    objective = meta.get("objective")
    target = objective.get("target") if isinstance(objective, dict) else objective
    return {"u": "fm", "ddpm": "eps"}.get(target, target) if isinstance(target, str) else None


def architecture(cfg: UNetConfig, target: str | None) -> str | None:
    """ModelSpec's name of a network that is one of Stable Diffusion's to the last block; None where
    it is only like one."""
    names = {
        "sd15": "stable-diffusion-v1",
        "sd21": {"eps": "stable-diffusion-v2-512", "v": "stable-diffusion-v2-768-v"}.get(target),
        "sdxl": "stable-diffusion-xl-v1-base",
        "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    }
    return next((name for key, name in names.items() if not differences(cfg, PRESETS[key])), None)


def modelspec(
    cfg: UNetConfig, layout: str, meta: Mapping[str, Any], title: str, kept: Mapping[str, str]
) -> dict[str, str]:
    """The metadata keys by which other programs know a Stable Diffusion file (Stability AI's
    ModelSpec 1.0). kept: the source's own, which say more than can be seen."""
    target, kept = target_of(meta), dict(kept)
    kept.pop("modelspec.implementation", None)
    name = kept.get("modelspec.architecture") or architecture(cfg, target)
    if not name:
        return kept
    ldm = "https://github.com/Stability-AI/generative-models"
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": name,
        "title": title,
        "date": time.strftime("%Y-%m-%d"),
        "implementation": "diffusers" if layout == "diffusers" else ldm,
    }
    if target in ("eps", "v"):
        spec["prediction_type"] = spec["predict_key"] = {"eps": "epsilon", "v": "v"}[target]
    return {f"modelspec.{key}": value for key, value in spec.items()} | kept


MARKERS = ("v_pred", "ztsnr")  # empty tensors by which other programs know a file


# ---- names --------------------------------------------------------------------------------------

def detect(names: Iterable[str]) -> Literal["native", "diffusers"] | None:
    """The layout of a network's inner names; None if they are of neither, or of both."""
    heads = {name.split(".", 1)[0] for name in names}
    native = bool({"input_blocks", "final_layer"} & heads)
    diffusers = {"down_blocks", "time_embedding"} <= heads or {"norm_out", "proj_out"} <= heads
    if native == diffusers:
        return None
    return "native" if native else "diffusers"
