"""Autoencoders in other people's files: their names, shapes, families, and how latents are scaled.

    part, layout = vae_part(box)      # the autoencoder in a file, without prefixes
    table = vae_map(shapes, layout)   # {native name: (name, shape) in files of that layout}
    scaling = scaling_of(box, z)      # what the file and the config.json beside it say, or {}
    name, family = pick_family(cfg, given, scaling, path)

The network itself is in vae.py, which is above this folder: its shapes are arguments.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple

from torch import Tensor

from ckpt.containers import ENDINGS
from ckpt.layouts import modern_name
from ckpt.parts import autoencoders, buffers, choose
from harness.cli import UserError, closest
from harness.files import Container, Entry, listed
from harness.reading import read_file

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

Shape = tuple[int, ...]


class Family(NamedTuple):
    z: int  # channels of the network's own latents
    scale: float  # model-space latents are (mean - shift) · scale …
    hub: str
    shift: float = 0.0
    stats: bool = False  # … or, instead of scale and shift, are normalised by running statistics
    quant: bool = True  # has the two 1×1 convolutions around the latents
    fp16: bool = True  # activations stay below 65,504
    # Per channel, of a file that has them: the latents are (mean - means) · scale / stds.
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()


# No revision is pinned, for none was checked; what a name led to (commit, sha256, fingerprint) is
# recorded with every use.
FILE = "diffusion_pytorch_model.safetensors"
SD = f"hf:stable-diffusion-v1-5/stable-diffusion-v1-5/vae/{FILE}"
SD3 = f"hf:stabilityai/stable-diffusion-3-medium-diffusers/vae/{FILE}"
FLUX1 = "hf:black-forest-labs/FLUX.1-schnell/ae.safetensors"
FLUX2 = "hf:black-forest-labs/FLUX.2-dev/ae.safetensors"
FAMILIES = {
    "sd": Family(4, 0.18215, SD),
    "sdxl": Family(4, 0.13025, f"hf:stabilityai/sdxl-vae/{FILE}", fp16=False),
    "sdxl-fp16-fix": Family(4, 0.13025, f"hf:madebyollin/sdxl-vae-fp16-fix/{FILE}"),
    "flux1": Family(16, 0.3611, FLUX1, shift=0.1159, quant=False),
    "sd3": Family(16, 1.5305, SD3, shift=0.0609, quant=False),
    "flux2": Family(32, 1.0, FLUX2, stats=True),
}
# Where a folder or a repository keeps its autoencoder, most specific first.
USUAL_VAE = [
    *(f"{folder}diffusion_pytorch_model{end}" for folder in ("", "vae/") for end in ENDINGS),
    "ae.safetensors",
    "vae.safetensors",
]
SCALING = ("scale", "shift", "means", "stds")  # the fields of a Family that a file may say
# What no tensor shows, and a config.json may say.
COMPUTED = {"norm_num_groups": (32,), "act_fn": ("silu", "swish")}
DIFFUSERS_SCALE = 0.18215  # of an AutoencoderKL whose config.json is silent
EDM_SCALE = 0.5  # of a file with edm_mean and edm_std (Playground 2.5): EDM's sigma_data


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
    """(the autoencoder in a file, without prefixes; its layout)."""
    names = choose(autoencoders(box), "autoencoder", box).names
    # LDM saved its training loss with it.
    inner = {full: name for full, name in names.items() if not name.startswith("loss.")}
    table = {modern_name(name): box.table[full] for full, name in inner.items()}
    if len(table) < len(inner):
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
    for name, entry in table.items():
        table[name] = with_rank(name, entry, 2 if layout == "diffusers" else 4)
    return box.over(table), layout


def with_rank(name: str, entry: Entry, rank: int) -> Entry:
    """A weight of attention as a linear layer (C, C) or a 1×1 convolution (C, C, 1, 1), whichever
    the layout has: programs write both."""
    linear = re.search(r"\.(attn_1\.(q|k|v|proj_out)|attentions\.0\.to_.+)\.weight$", name)
    shape = entry.shape
    if not linear or len(shape) == rank or shape[2:] not in ((), (1, 1)):
        return entry
    shape = (*shape, 1, 1) if rank == 4 else shape[:2]
    return Entry(entry.dtype, shape, lambda: entry.read().reshape(shape))


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


# ---- normalisation ------------------------------------------------------------------------------


def scaling_of(box: Container, z: int, own: Any = None) -> dict[str, Any]:
    """The fields of SCALING that a file says itself, in its tensors or in a config.json of
    diffusers beside it. Where both speak, they must agree. {} is silence. own: what metadata of
    ours says, which counts alone."""
    if own is not None:
        if not isinstance(own, dict) or not set(own) <= set(SCALING):
            what = f"{box.path}: its metadata says its normalisation is {brief(own)}"
            raise UserError(what, do="Use an undamaged copy.")
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
        check_scaling(own, z, f"{box.path}: its metadata")
        return own
    found = {"config.json": scaling_beside(box.path), "its tensors": scaling_inside(box)}
    found = {where: said for where, said in found.items() if said}
    for where, said in found.items():
        check_scaling(said, z, f"{box.path}: {where}")
    # Of an fp16 file, the buffers may be fp16 too.
    if len(found) == 2 and not same_scaling(*found.values(), rel_tol=1e-3):
        raise UserError(
            f"{box.path} and the config.json beside it say different things of how latents are "
            f"normalised: {shown_scaling(found['its tensors'])} and "
            f"{shown_scaling(found['config.json'])}",
            do="Find out which is right, and remove the other.",
        )
    return {key: value for said in found.values() for key, value in said.items()}


def scaling_beside(path: Path) -> dict[str, Any]:
    """What diffusers would read from the config.json beside a file. Diffusers' defaults count only
    where it is an autoencoder's."""
    file = path.parent / "config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(read_file(file))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        # It may have said how latents are normalised.
        what = f"{file}, beside an autoencoder, cannot be read ({type(error).__name__})"
        raise UserError(what, do="Restore it, or move it away.") from None
    if not isinstance(config, dict):
        return {}  # somebody else's
    if str(config.get("_class_name")).startswith("Autoencoder"):
        for key, own in COMPUTED.items():
            if config.get(key, own[0]) not in own:
                raise UserError(
                    f"{file} says {key} = {brief(config[key])}; this autoencoder computes "
                    f"{own[0]!r} only",
                    do="Use it in diffusers.",
                )
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    said = {key: config[name] for key, name in zip(SCALING, names) if config.get(name) is not None}
    if config.get("_class_name") == "AutoencoderKL":
        said = {"scale": DIFFUSERS_SCALE, "shift": 0.0, **said}
    for key in ("means", "stds"):
        if isinstance(said.get(key), list):
            said[key] = tuple(said[key])
    return said


def scaling_inside(box: Container) -> dict[str, Any]:
    """What buffers in a file say: LDM's scale_factor; edm_mean and edm_std."""
    known = buffers(box, choose(autoencoders(box), "autoencoder", box).prefix)

    def values(key: str) -> tuple[float, ...]:
        return tuple(box[known[key]].float().flatten()[:4096].tolist())

    said: dict[str, Any] = {}
    if "edm_mean" in known or "edm_std" in known:
        keys = {"means": "edm_mean", "stds": "edm_std"}
        said = {key: values(name) for key, name in keys.items() if name in known}
        said |= {"scale": EDM_SCALE, "shift": 0.0}
    elif "scale_factor" in known:
        scale = values("scale_factor")
        # LDM multiplies by it, and shifts by nothing.
        said = {"scale": scale[0] if len(scale) == 1 else scale, "shift": 0.0}
    return said


def check_scaling(said: Mapping[str, Any], z: int, what: str) -> None:
    """Refuse constants that cannot be."""

    def numbers(value: Any, positive: bool) -> bool:
        # NaN fails every comparison.
        kinds = all(type(v) in (int, float) and abs(v) <= 1e6 for v in value)
        return kinds and (not positive or all(v > 0 for v in value))

    for key, value in said.items():
        if key in ("scale", "shift"):
            fits = numbers([value], key == "scale")
            wanted = "one number, above 0" if key == "scale" else "one number"
        else:
            fits = type(value) is tuple and len(value) == z and numbers(value, key == "stds")
            wanted = f"{z} numbers, one a channel" + (", above 0" if key == "stds" else "")
        if not fits:
            raise UserError(
                f"{what}: {key} of the latents", got=brief(value), wanted=wanted, do="Restore it."
            )
    if ("means" in said) != ("stds" in said) or said.get("means") and said.get("shift"):
        raise UserError(
            f"{what}: latents are normalised by {shown_scaling(said)}",
            wanted="mean and standard deviation of every channel, or one shift",
            do="Restore it.",
        )


def same_scaling(a: Mapping[str, Any], b: Mapping[str, Any], rel_tol: float = 1e-6) -> bool:
    """Do they agree in all that both say? An fp32 file rounds what a config writes out."""

    def flat(value: Any) -> tuple[float, ...]:
        return value if isinstance(value, tuple) else (value,)

    for key in a.keys() & b.keys():
        pairs = list(zip(flat(a[key]), flat(b[key])))
        if len(flat(a[key])) != len(flat(b[key])):
            return False
        if not all(math.isclose(x, y, rel_tol=rel_tol, abs_tol=1e-6) for x, y in pairs):
            return False
    return True


def shown_scaling(said: Mapping[str, Any]) -> str:
    names = {"scale": "scaling_factor", "shift": "shift_factor"}
    return ", ".join(f"{names.get(k, k)} {v}" for k, v in said.items() if v not in (0.0, ()))


def scaled(family: Family, like: Tensor) -> tuple[Any, Any]:
    """(shift, scale) of a family, each a number or one a channel of latents such as `like`."""
    if not family.means:
        return family.shift, family.scale
    means, stds = (like.new_tensor(v)[:, None, None] for v in (family.means, family.stds))
    return means, family.scale / stds


def pick_family(
    cfg: Any, given: str | None, said: Mapping[str, Any], path: Path
) -> tuple[str, Family]:
    """What a file is: shapes tell flux2 alone; of the others, what the file says of its scale may.
    No guess.

    A scale that no family has is used as it is said, whatever the name: the name is then that of
    the shape. cfg has .z, .quant and .stats.
    """
    traits = (cfg.z, cfg.quant, cfg.stats)
    shaped = {k: f for k, f in FAMILIES.items() if (f.z, f.quant, f.stats) == traits}
    said = {} if cfg.stats else dict(said)
    fits = {k: f for k, f in shaped.items() if same_scaling(said, own_scaling(f))}
    if said and not fits and given in (None, *shaped) and shaped:
        name = given or next(iter(shaped))
        # A shift that a family has is none of these constants, unless they name it.
        return name, shaped[name]._replace(**{"shift": 0.0, **said})
    words = f"{cfg.z} latent channels"
    if cfg.stats:
        words += ", running statistics"
    if said:
        words += f", {shown_scaling(said)}"
    what = f"{path} ({words}) can be {' or '.join(fits) or 'nothing known here'}"
    if given and given not in fits:
        raise UserError(f"{what}, not {given}", do="Name what it is, or another file.")
    if not given and (len(fits) != 1 or not cfg.stats and not said):
        spelling = f"{next(iter(fits)) if len(fits) == 1 else 'FAMILY'}:FILE"
        raise UserError(
            what, do=f"What it is changes what its latents mean; say it: --vae {spelling}"
        )
    name = given or next(iter(fits))
    return name, fits[name]


def own_scaling(family: Family) -> dict[str, Any]:
    return {key: getattr(family, key) for key in SCALING}


def constants_of(family: Family) -> dict[str, Any]:
    """What scaling_of() reads, as JSON has it."""
    both = {"means": list(family.means), "stds": list(family.stds)} if family.means else {}
    return {"scale": family.scale, "shift": family.shift, **both}


def vae_file(path: Path) -> Path:
    """The autoencoder's file in a folder: of a run, of diffusers, or of a whole pipeline."""
    return next((path / name for name in USUAL_VAE if (path / name).is_file()), path)
