"""Autoencoders in other people's files: the names of their tensors, their shapes, their families.

    part, layout = vae_part(box)      # the autoencoder in a file, without prefixes
    table = vae_map(shapes, layout)   # {native name: (name, shape) in files of that layout}

The network itself is in vae.py, which is above this folder: its shapes and families are arguments.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.layouts import parts
from harness.cli import UserError, closest
from harness.files import Container, listed

# bfl: native, but the 1×1 convolutions are inside encoder and decoder (flux2's own file).
LAYOUTS = ("native", "diffusers", "bfl")
OPTIONAL = "bn.num_batches_tracked"  # the only tensor that a file may lack
DIFFUSERS = {
    "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
    "block": "resnets",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
}
# In attention, in diffusers' first years.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Shape = tuple[int, ...]


def vae_map(shapes: Mapping[str, Shape], layout: str) -> dict[str, tuple[str, Shape]]:
    """{native name: (name, shape) in files of that layout}, for every tensor; one to one.

    shapes: {native name: shape} of the whole autoencoder.
    """
    if layout not in LAYOUTS:
        raise UserError(
            f"layout {layout!r} is not one of {', '.join(LAYOUTS)}",
            do=closest(layout, LAYOUTS) or "Choose one of them.",
        )
    levels = [int(m[1]) for name in shapes if (m := re.match(r"decoder\.up\.(\d+)\.", name))]
    table = {}
    for name, shape in shapes.items():
        if layout == "bfl":
            table[name] = (bfl_name(name), shape)
        elif layout == "diffusers":
            other = diffusers_name(name, max(levels))
            # Linear layers, not 1×1 convolutions.
            table[name] = (other, shape[:2] if ".attentions." in other else shape)
        else:
            table[name] = (name, shape)
    names = {name for name, _ in table.values()}
    assert len(names) == len(table), "the map is not one to one"
    return table


def bfl_name(name: str) -> str:
    name = re.sub("^post_quant_conv", "decoder.post_quant_conv", name)
    return re.sub("^quant_conv", "encoder.quant_conv", name)


def diffusers_name(name: str, last: int) -> str:
    """`last` is the decoder's last level: diffusers counts them in the order in which they run."""
    for native, other in DIFFUSERS.items():
        name = name.replace(f".{native}.", f".{other}.")
    name = name.replace(".down.", ".down_blocks.")
    return re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{last - int(m[1])}.", name)


def vae_part(box: Container) -> tuple[Container, str]:
    """(the autoencoder in a file, without prefixes; its layout). Everything beside it must be
    something known."""
    groups = parts(box)
    other = groups.get("other", {})
    inner = groups.get("vae")
    if inner is None:  # a bare one; LDM saved its training loss with it
        inner = {full: name for full, name in other.items() if not name.startswith("loss.")}
        other = {}
    if other:
        raise UserError(
            f"{box.path}: {len(other)} of {len(box)} tensors belong to nothing known: "
            f"{listed(other)}",
            do="Save the autoencoder alone.",
        )
    table = {modern_name(name): box.table[full] for full, name in inner.items()}
    if "encoder.conv_in.weight" not in table or len(table) < len(inner):
        raise UserError(
            f"{box.path} holds no autoencoder of a known kind, but {len(box)} tensors: "
            f"{listed(box)}",
            do="In a repository of several models, write hf:org/name/vae/FILE.",
        )
    layout = "native"
    if any(name.startswith("encoder.down_blocks.") for name in table):
        layout = "diffusers"
    elif "encoder.quant_conv.weight" in table:
        layout = "bfl"
    return box.over(table), layout


def modern_name(name: str) -> str:
    return re.sub(r"(?<=\.attentions\.0\.)\w+", lambda m: OLD.get(m[0], m[0]), name)


def infer_vae(box: Container, layout: str) -> dict[str, Any]:
    """The fields of vae.VAEConfig for a file's autoencoder, from names and shapes."""

    def widths(place: str) -> tuple[int, ...]:
        block = re.compile(place + r"\.(\d+)\.(?:block|resnets)\.\d\.conv1\.weight")
        found = {int(m[1]): box.shape(name)[0] for name in box if (m := block.fullmatch(name))}
        return tuple(found[i] for i in sorted(found))

    if layout == "diffusers":
        down = widths(r"encoder\.down_blocks")
        up = widths(r"decoder\.up_blocks")
    else:
        down = widths(r"encoder\.down")
        up = widths(r"decoder\.up")
    z = 0
    if "decoder.conv_in.weight" in box:
        z = box.shape("decoder.conv_in.weight")[1]
    if not z or not down or len(down) != len(up) or any(C % 32 or not C for C in down + up):
        raise UserError(
            f"{box.path}: no autoencoder has {down} channels down, {up} up, and {z} between",
            do="Is the file complete?  Copy it again.",
        )
    return {
        "z": z,
        "encoder": down,
        "decoder": up[::-1] if layout == "diffusers" else up,
        "quant": any(name.endswith("quant_conv.weight") for name in box),
        "stats": "bn.running_mean" in box,
    }


def pick_family(cfg: Any, given: str | None, path: Path, families: Mapping[str, Any]) -> str:
    """What a file is: shapes tell flux2 alone; of the others, a diffusers config.json beside it may
    tell the scale. No guess.

    cfg and the families have .z, .quant and .stats; a family also has .scale.
    """
    try:
        scale = json.loads((path.parent / "config.json").read_text()).get("scaling_factor")
    except (OSError, ValueError, AttributeError):
        scale = None  # none there, or somebody else's
    fits = []
    for name, family in families.items():
        same = (family.z, family.quant, family.stats) == (cfg.z, cfg.quant, cfg.stats)
        if same and (family.stats or scale is None or math.isclose(family.scale, scale)):
            fits.append(name)
    traits = f"{cfg.z} latent channels"
    if cfg.stats:
        traits += ", running statistics"
    if scale is not None:
        traits += f", scaling_factor {scale}"
    what = f"{path} ({traits}) can be {' or '.join(fits) or 'nothing known here'}"
    if fits == ["flux1"]:
        what += " (or Stable Diffusion 3, not known here)"
    if given and given not in fits:
        raise UserError(f"{what}, not {given}", do="Name what it is, or another file.")
    if given:
        return given
    if len(fits) != 1 or not cfg.stats and scale is None:
        spelling = f"{fits[0] if len(fits) == 1 else 'FAMILY'}:FILE"
        raise UserError(
            what, do=f"What it is changes what its latents mean; say it: --vae {spelling}"
        )
    return fits[0]
