"""What other code bases call a transformer's tensors (mmdit.py), each way and exactly. No file IO.

    layout "native"      as its authors have it: DiT's and SD3's names are ours, Flux has its own.
                         SiT's output is of the opposite sign
    layout "diffusers"   SD3Transformer2DModel, FluxTransformer2DModel, Flux2Transformer2DModel

    pieces(cfg, layout)  -> {native: tuple of Piece}, in state-dict order; a tensor's rows lie in
                            its pieces, one after another; foreign names are unique
    to_foreign(parts, tensor), to_native(parts, shape, tensors)     one tensor, each way
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ckpt.configs import native_shapes
from mmdit import MMDiTConfig

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """Some rows of a native tensor, or all of them, under a foreign name."""

    foreign: str
    rows: int
    # "" the same | "flat" foreign (W, C·p·p), native (W, C, p, p) | "negated" |
    # "swapped" the two halves of the rows are exchanged: (shift, scale) is (scale, shift)
    rule: str = ""


# ---- names --------------------------------------------------------------------------------------
# Module names, ours -> theirs. Of several, the rows lie in them one after another.

FLUX = {
    "x_embedder.proj": "img_in", "context_embedder": "txt_in",
    "t_embedder.mlp.0": "time_in.in_layer", "t_embedder.mlp.2": "time_in.out_layer",
    "y_embedder.mlp.0": "vector_in.in_layer", "y_embedder.mlp.2": "vector_in.out_layer",
    "guidance_embedder.mlp.0": "guidance_in.in_layer",
    "guidance_embedder.mlp.2": "guidance_in.out_layer",
    "adaLN_modulation.x_block.1": "double_stream_modulation_img.lin",
    "adaLN_modulation.context_block.1": "double_stream_modulation_txt.lin",
    "adaLN_modulation.single.1": "single_stream_modulation.lin",
    "final_layer.linear": "final_layer.linear",
    "final_layer.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}  # fmt: skip
FLUX_SINGLE = {
    "linear1": "linear1", "linear2": "linear2", "adaLN_modulation.1": "modulation.lin",
    "ln_q": "norm.query_norm", "ln_k": "norm.key_norm",
}  # fmt: skip


def flux_stream(side: str) -> dict[str, str]:
    return {
        "attn.qkv": f"{side}_attn.qkv", "attn.proj": f"{side}_attn.proj",
        "attn.ln_q": f"{side}_attn.norm.query_norm", "attn.ln_k": f"{side}_attn.norm.key_norm",
        "mlp.fc1": f"{side}_mlp.0", "mlp.fc2": f"{side}_mlp.2",
        "adaLN_modulation.1": f"{side}_mod.lin",
    }  # fmt: skip


def diffusers_top(cfg: MMDiTConfig) -> dict[str, str]:
    told = "time_text_embed" if cfg.vector_dim else "time_guidance_embed"
    patches = "pos_embed.proj" if cfg.pos_max else "x_embedder"
    names = {"t": "timestep", "y": "text", "guidance": "guidance"}
    embedders = {
        f"{ours}_embedder.mlp.{i}": f"{told}.{theirs}_embedder.linear_{1 + i // 2}"
        for ours, theirs in names.items()
        for i in (0, 2)
    }
    return embedders | {
        "x_embedder.proj": patches, "context_embedder": "context_embedder",
        "adaLN_modulation.x_block.1": "double_stream_modulation_img.linear",
        "adaLN_modulation.context_block.1": "double_stream_modulation_txt.linear",
        "adaLN_modulation.single.1": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    }  # fmt: skip


def diffusers_stream(cfg: MMDiTConfig, side: str) -> dict[str, str | tuple[str, ...]]:
    text = side == "context_block"
    ff, end = ("ff_context", "_context") if text else ("ff", "")
    first, last = ("linear_in", "linear_out") if cfg.mlp == "swiglu" else ("net.0.proj", "net.2")
    names = {
        "mlp.fc1": f"{ff}.{first}", "mlp.fc2": f"{ff}.{last}",
        "adaLN_modulation.1": f"norm1{end}.linear",
    }  # fmt: skip
    if text:
        return names | {
            "attn.qkv": tuple(f"attn.add_{part}_proj" for part in "qkv"),
            "attn.proj": "attn.to_add_out",
            "attn.ln_q": "attn.norm_added_q", "attn.ln_k": "attn.norm_added_k",
        }  # fmt: skip
    for attn in ("attn", "attn2"):
        names[f"{attn}.qkv"] = tuple(f"{attn}.to_{part}" for part in "qkv")
        names[f"{attn}.proj"] = f"{attn}.to_out.0"
        names |= {f"{attn}.ln_{part}": f"{attn}.norm_{part}" for part in "qk"}
    return names


def diffusers_single(cfg: MMDiTConfig) -> dict[str, str | tuple[str, ...]]:
    norms = {"ln_q": "attn.norm_q", "ln_k": "attn.norm_k", "adaLN_modulation.1": "norm.linear"}
    if cfg.modulation == "shared":
        return norms | {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
    return norms | {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                    "linear2": "proj_out"}  # fmt: skip


def foreign_modules(cfg: MMDiTConfig, layout: str, module: str) -> tuple[str, ...]:
    """What a module is called in files of that layout."""
    if layout == "native" and not cfg.rope:
        return (module,)
    block = re.match(r"(joint|single)_blocks\.(\d+)\.((?:x|context)_block|)\.?", module)
    if layout == "native":
        lists, top = {"joint": "double_blocks", "single": "single_blocks"}, FLUX
    else:
        lists = {"joint": "transformer_blocks", "single": "single_transformer_blocks"}
        top = diffusers_top(cfg)
    if not block:
        return (top[module],)
    kind, i, side = block.groups()
    if layout == "native":
        names = flux_stream("img" if side == "x_block" else "txt") if side else FLUX_SINGLE
    else:
        names = diffusers_stream(cfg, side) if side else diffusers_single(cfg)
    found = names[module[block.end() :]]
    found = (found,) if isinstance(found, str) else found
    return tuple(f"{lists[kind]}.{i}.{name}" for name in found)


def rule_of(cfg: MMDiTConfig, layout: str, native: str) -> str:
    """What happens to a tensor beside being renamed (Piece.rule)."""
    last = f"joint_blocks.{cfg.joint - 1}.context_block." if cfg.last_pre_only else "final_layer."
    if layout == "native":
        if cfg.rope and native == "x_embedder.proj.weight":
            return "flat"
        return "negated" if cfg.reversed_time and native.startswith("final_layer.linear.") else ""
    if native.startswith((f"{last}adaLN_modulation.", "final_layer.adaLN_modulation.")):
        return "swapped"
    return "flat" if cfg.rope and native == "x_embedder.proj.weight" else ""


def family(cfg: MMDiTConfig) -> str:
    """Which of the known families a transformer belongs to."""
    if cfg.blocks:
        return "sit" if cfg.reversed_time else "dit"
    if cfg.pos_max:
        return "sd3.5" if cfg.qk_norm else "sd3"
    return "flux1" if cfg.modulation == "own" else "flux2"


def is_sd3(cfg: Any) -> bool:
    """Is a config that of a network which is told by CLIP's states, as Stable Diffusion 3 is?"""
    return isinstance(cfg, MMDiTConfig) and family(cfg) in ("sd3", "sd3.5")


def pieces(cfg: MMDiTConfig, layout: str) -> dict[str, tuple[Piece, ...]]:
    """{native: its pieces}: every tensor of MMDiT(cfg) in files of that layout."""
    table = {}
    for native, shape in native_shapes(cfg).items():
        module, _, leaf = native.rpartition(".")
        if native == "pos_embed":
            names = ("pos_embed.pos_embed" if layout == "diffusers" else native,)
        else:
            scale = layout == "native" and cfg.rope and ".ln_" in native
            leaf = "scale" if scale else leaf
            names = tuple(f"{m}.{leaf}" for m in foreign_modules(cfg, layout, module))
        # q, k, v are as wide as the network; what is left of the rows lies in the last piece.
        rows = [cfg.width] * (len(names) - 1)
        rows.append(shape[0] - sum(rows))
        rule = rule_of(cfg, layout, native)
        table[native] = tuple(Piece(name, n, rule) for name, n in zip(names, rows))
    names = [piece.foreign for each in table.values() for piece in each]
    assert len(set(names)) == len(names), "the map is not bijective"
    return table


# ---- tensors ------------------------------------------------------------------------------------


def piece_shape(piece: Piece, shape: Shape) -> Shape:
    """The shape of a piece of a native tensor of this shape."""
    rest = (math.prod(shape[1:]),) if piece.rule == "flat" else shape[1:]
    return (piece.rows, *rest)


def changed(piece: Piece, tensor: Tensor) -> Tensor:
    """A piece's rows as the other side has them; its own inverse, but for "flat"."""
    if piece.rule == "negated":
        return -tensor
    if piece.rule == "swapped":
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor.flatten(1) if piece.rule == "flat" else tensor


def to_foreign(parts: tuple[Piece, ...], tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A native tensor under its foreign names, in the foreign shapes."""
    split = tensor.split([piece.rows for piece in parts])
    return [(piece.foreign, changed(piece, rows)) for piece, rows in zip(parts, split)]


def to_native(parts: tuple[Piece, ...], shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor:
    """The inverse."""
    if parts[0].rule == "flat":
        return tensors[parts[0].foreign].reshape(shape)
    rows = [changed(piece, tensors[piece.foreign]) for piece in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
