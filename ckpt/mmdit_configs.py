"""A transformer's config (mmdit.py) from what its file shows, and in diffusers' terms.

    infer(shapes, known, objective)   -> MMDiTConfig, from the authors' names and shapes
    transformer_config(cfg)           -> config.json of the diffusers class that computes the same
    from_transformer_config(config)   -> the inverse; UserError names what we do not compute
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from reprlib import repr as brief
from typing import Any

from ckpt.configs import config_from
from diffusion.schedules import flux2_shift, flux_shift
from harness.cli import UserError, closest
from mmdit import FLUX, FLUX2, SD3, SIT, MMDiTConfig

Shapes = Mapping[str, tuple[int, ...]]
# Without norms of q and k no tensor shows the heads: DiT's by its widths. SD3's have 64 numbers.
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
SD3_HEAD = 64

# ---- of the authors' tensors --------------------------------------------------------------------


def infer(shapes: Shapes, known: Mapping[str, Any], objective: str | None) -> MMDiTConfig:
    """The config of a file of DiT's, SiT's, SD3's or Flux's authors. ValueError where it cannot be
    told. What is left is found by a strict load.

    known: num_heads or num_head_channels, for a DiT of another width than the paper's. objective:
    the user's. A SiT and a DiT have the same tensors, and are told apart by it.
    """
    if "img_in.weight" in shapes:
        return of_flux(shapes)
    if "joint_blocks.0.x_block.attn.qkv.weight" in shapes:
        return of_sd3(shapes)
    return of_dit(shapes, known, objective)


def shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        what = f"cannot tell the architecture: no tensor {name!r}"
        raise ValueError(f"{what}.  Is the file complete?")
    return tuple(shapes[name])


def count(shapes: Shapes, blocks: str, inner: str = "") -> int:
    """How many blocks of a list there are, or have an inner name."""
    found = (re.match(rf"{blocks}\.(\d{{1,4}})\.{inner}", name) for name in shapes)
    return len({m[1] for m in found if m})


def patches(shapes: Shapes) -> dict[str, int]:
    """What the first and last layers of DiT and SD3 show."""
    W, C, p, _ = (*shape(shapes, "x_embedder.proj.weight"), 0, 0, 0, 0)[:4]
    rows = shape(shapes, "final_layer.linear.weight")[0]
    side = math.isqrt(shape(shapes, "pos_embed")[1])
    sizes = {"width": W, "in_channels": C, "patch": p, "pos_max": side}
    return sizes | {"out_channels": rows // max(p * p, 1)}


def of_dit(shapes: Shapes, known: Mapping[str, Any], objective: str | None) -> MMDiTConfig:
    sizes = patches(shapes)
    W, table = sizes["width"], "y_embedder.embedding_table.weight"
    heads = known.get("num_heads") or DIT_HEADS.get(W, 0)
    if known.get("num_head_channels"):
        heads = W // known["num_head_channels"]
    if not heads:
        raise ValueError(f"no tensor shows the number of attention heads (width {W}).")
    if objective not in ("fm", "eps"):
        raise ValueError(
            "a SiT and a DiT have the same tensors.  Add --objective fm (SiT) or eps (DiT); for "
            "--init, convert the file with it first (python -m ckpt convert)."
        )
    values = sizes | {
        "heads": heads,
        "blocks": count(shapes, "blocks"),
        "mlp_ratio": shape(shapes, "blocks.0.mlp.fc1.weight")[0] // W,
        "num_classes": shape(shapes, table)[0] - 1 if table in shapes else 0,
        "reversed_time": objective == "fm",
    }
    return checked(SIT, values)


def of_sd3(shapes: Shapes) -> MMDiTConfig:
    sizes, norm = patches(shapes), "joint_blocks.0.x_block.attn.ln_q.weight"
    D = shape(shapes, norm)[0] if norm in shapes else SD3_HEAD
    values = sizes | {
        "heads": sizes["width"] // max(D, 1),
        "joint": count(shapes, "joint_blocks"),
        "dual": count(shapes, "joint_blocks", r"x_block\.attn2\."),
        "qk_norm": norm in shapes,
        "vector_dim": shape(shapes, "y_embedder.mlp.0.weight")[1],
        "context_dim": shape(shapes, "context_embedder.weight")[1],
    }
    return checked(SD3, values)


def of_flux(shapes: Shapes) -> MMDiTConfig:
    base = FLUX2 if "single_stream_modulation.lin.weight" in shapes else FLUX
    W, numbers = shape(shapes, "img_in.weight")
    D = shape(shapes, "double_blocks.0.img_attn.norm.query_norm.scale")[0]
    vector, told = "vector_in.in_layer.weight", "guidance_in.in_layer.weight"
    values = {
        "width": W,
        "heads": W // max(D, 1),
        "in_channels": numbers // base.patch**2,
        "out_channels": shape(shapes, "final_layer.linear.weight")[0] // base.patch**2,
        "joint": count(shapes, "double_blocks"),
        "single": count(shapes, "single_blocks"),
        "mlp_ratio": shape(shapes, "double_blocks.0.img_mlp.2.weight")[1] // W,
        "vector_dim": shape(shapes, vector)[1] if vector in shapes else 0,
        "context_dim": shape(shapes, "txt_in.weight")[1],
        "guidance": told in shapes,
    }
    return checked(base, values)


def checked(base: MMDiTConfig, values: dict[str, Any]) -> MMDiTConfig:
    """A config with other values, of which types and sizes are looked at first."""
    whole = {f.name: getattr(base, f.name) for f in fields(base)} | values
    return config_from(MMDiTConfig, whole)


def usual_shift(cfg: MMDiTConfig, height: int, width: int, steps: int) -> float:
    """The shift of times, once, with which its authors sample latents of this size: 1 is none."""
    tokens = height // cfg.patch * (width // cfg.patch)
    if cfg.modulation == "shared":
        return flux2_shift(tokens, steps)
    if cfg.rope:
        # schnell, which is told no strength of guidance, has none.
        return flux_shift(tokens) if cfg.guidance else 1.0
    return 3.0 if cfg.joint else 1.0


# ---- diffusers ----------------------------------------------------------------------------------

# What diffusers assumes where a config.json is silent (0.42.1), and what it has no choice in.
SHARED = {"patch_size": 1, "in_channels": 16, "out_channels": None}
CLASSES: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": SHARED | dict(
        sample_size=128, patch_size=2, num_layers=18, attention_head_dim=64,
        num_attention_heads=18, joint_attention_dim=4096, caption_projection_dim=1152,
        pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=96,
        dual_attention_layers=(), qk_norm=None,
    ),
    "FluxTransformer2DModel": SHARED | dict(
        in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
        guidance_embeds=False, axes_dims_rope=(16, 56, 56),
    ),
    "Flux2Transformer2DModel": SHARED | dict(
        in_channels=128, num_layers=8, num_single_layers=48, attention_head_dim=128,
        num_attention_heads=48, joint_attention_dim=15360, timestep_guidance_channels=256,
        mlp_ratio=3.0, axes_dims_rope=(32, 32, 32, 32), rope_theta=2000, eps=1e-6,
        guidance_embeds=True,
    ),
}  # fmt: skip
ASIDE = ("sample_size",)  # it changes no result


def transformer_config(cfg: MMDiTConfig) -> dict[str, Any]:
    """config.json for diffusers' from_pretrained. UserError where no class computes this."""
    config = written_as(cfg)
    if config is None:
        raise UserError(
            "diffusers' DiT has other frequencies of time than its authors', and no diffusers "
            "class computes this network",
            do="Keep it in the native layout.",
        )
    again = read_as(config)
    wrong = [f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(again, f.name)]
    if wrong:
        shown = ", ".join(f"{name} {getattr(cfg, name)}" for name in wrong)
        raise UserError(
            f"{config['_class_name']} of diffusers has no {shown}",
            do="Keep this network in the native layout.",
        )
    return config


def written_as(cfg: MMDiTConfig) -> dict[str, Any] | None:
    """As far as diffusers can say it; None of a family that it has not."""
    if cfg.blocks:
        return None
    config = dict(
        num_layers=cfg.joint, attention_head_dim=cfg.width // cfg.heads,
        num_attention_heads=cfg.heads, joint_attention_dim=cfg.context_dim,
    )  # fmt: skip
    if cfg.pos_max:
        return config | dict(
            _class_name="SD3Transformer2DModel", patch_size=cfg.patch, in_channels=cfg.in_channels,
            out_channels=cfg.out_channels, sample_size=128, caption_projection_dim=cfg.width,
            pooled_projection_dim=cfg.vector_dim, pos_embed_max_size=cfg.pos_max,
            dual_attention_layers=list(range(cfg.dual)),
            qk_norm="rms_norm" if cfg.qk_norm else None,
        )  # fmt: skip
    numbers = cfg.patch**2
    same = cfg.in_channels == cfg.out_channels
    config |= dict(
        patch_size=1, in_channels=cfg.in_channels * numbers,
        out_channels=None if same else cfg.out_channels * numbers, num_single_layers=cfg.single,
        guidance_embeds=cfg.guidance, axes_dims_rope=list(cfg.rope),
    )  # fmt: skip
    if cfg.modulation == "own":
        more = {"_class_name": "FluxTransformer2DModel", "pooled_projection_dim": cfg.vector_dim}
        return config | more
    return config | dict(
        _class_name="Flux2Transformer2DModel", mlp_ratio=float(cfg.mlp_ratio),
        rope_theta=cfg.theta, timestep_guidance_channels=256, eps=1e-6,
    )  # fmt: skip


def from_transformer_config(config: Mapping[str, Any]) -> MMDiTConfig:
    """A config.json of diffusers as ours, or a UserError that names what we do not compute."""
    name = config["_class_name"]
    known = CLASSES[name]
    own = {k: v for k, v in config.items() if not k.startswith("_")}
    for key in own:
        if key not in known:
            near = closest(key[:60], known)
            what = f"config of {name} has {brief(key)}, which is not known here"
            raise UserError(what, do=near or "Use it in diffusers.")
    try:
        cfg = read_as(config)
        again = written_as(cfg) or {}
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"config of {name}: {error}", do="Restore the file.") from None
    for key, value in (known | own).items():
        given = list(value) if isinstance(value, tuple) else value
        if key == "out_channels" and given == again["in_channels"]:
            given = again[key]
        if key not in ASIDE and (key not in again or again[key] != given):
            raise UserError(
                f"config of {name} has {key} = {brief(value)}; this transformer computes "
                f"{again.get(key)!r} only",
                do="Use it in diffusers.",
            )
    return cfg


def read_as(config: Mapping[str, Any]) -> MMDiTConfig:
    """What a config says; whatever it says otherwise comes back different from written_as()."""
    name = config["_class_name"]
    c = {**CLASSES[name], **config}
    D, heads = c["attention_head_dim"], c["num_attention_heads"]
    values = {
        "width": D * heads,
        "heads": heads,
        "joint": c["num_layers"],
        "context_dim": c["joint_attention_dim"],
    }
    if name == "SD3Transformer2DModel":
        values |= {
            "in_channels": c["in_channels"],
            "out_channels": c["out_channels"],
            "patch": c["patch_size"],
            "vector_dim": c["pooled_projection_dim"],
            "pos_max": c["pos_embed_max_size"],
            "dual": len(c["dual_attention_layers"]),
            "qk_norm": c["qk_norm"] is not None,
        }
        return checked(SD3, values)
    base = FLUX if name == "FluxTransformer2DModel" else FLUX2
    numbers = base.patch**2
    values |= {
        "in_channels": c["in_channels"] // numbers,
        "out_channels": (c["out_channels"] or c["in_channels"]) // numbers,
        "single": c["num_single_layers"],
        "rope": tuple(c["axes_dims_rope"]),
        "guidance": c["guidance_embeds"],
    }
    if name == "FluxTransformer2DModel":
        values["vector_dim"] = c["pooled_projection_dim"]
    else:
        values |= {"mlp_ratio": int(c["mlp_ratio"]), "theta": c["rope_theta"]}
    return checked(base, values)
