"""Opening any network's file: ours, or another program's. Ours and theirs part at the first line.

    net, meta = load_unet(path)                         # a file, a run, a folder, hf:org/name
    source = open_unet(path)                            # names and shapes; no tensor is read yet
    net, meta = load_like(path, PRESETS["tiny"])        # what the file cannot say, the preset says

Foreign networks load completely or not at all: guided-diffusion's, Stable Diffusion's, diffusers';
bare or under any prefix (ckpt/parts.py), as safetensors, shards or pickles. Of raw weights and EMA
the raw ones are taken, unless ema=True; of several, the one under part=.
"""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ckpt.configs import check_fields, config_from, head_widths
from ckpt.containers import open_weights, rounded
from ckpt.diffusers import config_beside, is_average
from ckpt.hub import origin
from ckpt.layouts import Config, detect, family, modern, native_names, native_view, target_of
from ckpt.lcm import LCMUNetConfig
from ckpt.meaning import record
from ckpt.mmdit_configs import infer
from ckpt.native import Source, check_weights, find_checkpoint, open_own, skeleton
from ckpt.parts import Part, beside, buffers, choose, is_transformer, lies_in, unets
from ckpt.vaes import vae_file
from harness.cli import UserError, closest
from harness.files import Container, check_fits, is_ours, listed, load_strict
from model import PRESETS, UNetConfig, infer_config, network_name

# What no tensor shows, and what a user is asked to give.
HEADS = (
    "--num-heads or --num-head-channels (num_heads, num_head_channels), from the model's card or "
    "training command"
)
ORDER = (
    "--attention-order (attention_order) legacy, guided-diffusion's default, or new (its "
    "use_new_attention_order=True)"
)


class Unsaid(UserError):
    """A file does not say its heads or their order; .what: "heads", "order"."""

    def __init__(self, message: str, what: list[str]):
        flags = {"heads": HEADS, "order": ORDER}
        super().__init__(message, do=f"Add {'; and '.join(flags[key] for key in what)}.")
        self.what = what


def load_unet(
    path: Path | str, *, ema: bool | None = None, dtype: torch.dtype | None = None, **known: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A network on the CPU and its metadata, from any file; dtype=None keeps the file's.

    Every tensor must be there, fit, and match the file's own fingerprint and probe, if it has them.
    known: what a foreign file cannot say (num_heads | num_head_channels, attention_order,
    objective; part: which of several networks); what it can say must agree.
    """
    box = open_weights(find_checkpoint(path, ema))
    known = {k: v for k, v in known.items() if v is not None}
    if is_ours(box):
        source = open_own(box, ema, known)
    else:
        source = open_foreign(box, ema, known)
    tensors, meta = dict(source.weights), source.meta
    net = skeleton(source.cfg)
    cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in tensors.items()}
    load_strict(net, cast, str(path), assign=True)
    meta["fingerprint"] = check_weights(source, tensors)
    return net.to(memory_format=torch.channels_last), meta


def open_unet(path: Path | str, *, ema: bool | None = None, **known: Any) -> Source:
    """Any network's file under the network's own names, without reading a tensor yet."""
    box = open_weights(find_checkpoint(path, ema))
    known = {k: v for k, v in known.items() if v is not None}
    if not is_ours(box):
        return open_foreign(box, ema, known)
    source = open_own(box, ema, known)
    check_fits(skeleton(source.cfg), source.weights.header(), str(source.weights.path))
    return source


def open_checked(path: Path | str, dtype: str = "", **known: Any) -> Source:
    """A network's file of which nothing stays in memory: load_unet()'s checks have read every
    tensor, one by one, and each is read again when it is asked for. dtype: "fp32", or the file's
    own."""
    source = open_unet(path, **known)
    check_fits(skeleton(source.cfg), source.weights.header(), str(path))
    meta = source.meta | {"fingerprint": check_weights(source, source.weights)}
    weights = rounded(source.weights, dtype) if dtype else source.weights
    return source._replace(weights=weights, meta=meta)


def open_foreign(box: Container, ema: bool | None, known: dict[str, Any]) -> Source:
    """A file of another program."""
    path, known = box.path, dict(known)
    found = unets(box)
    if is_average(path):
        found = [p._replace(ema=True) for p in found]
    one = choose(found, "U-Net", box, ema, known.pop("part", ""))
    around = {name: box.table[full] for name, full in buffers(box, one.prefix).items()}
    inner = box.over({name: box.table[full] for full, name in one.names.items()})
    said = record(box.over(around), known.pop("objective", None) or objective_of(inner))
    layout = detect(inner)
    if layout is None:
        raise UserError(
            f"{path}: {len(inner)} tensors under names of no known layout: {listed(inner)}",
            do="Wanted guided-diffusion's, LDM's or diffusers' names.",
        )
    inner = modern(inner) if layout == "diffusers" else inner
    if is_transformer(inner):
        check_transformer(inner, said)
        cfg, aside = transformer_of(inner, layout, known, target_of(said)), {}
    else:
        cfg, aside = described(inner, layout, known)
    meta = {"layout": layout, "family": family(cfg), **said, **origin(path)}
    meta |= aside
    meta["ema"] = "the file's" if one.ema else None
    left_out = beside(box, one, found)
    if "vae" in left_out or vae_file(path.absolute().parent.parent / "vae").is_file():
        meta["latent"] = True  # an autoencoder lies beside: its images are no pixels
    view = native_view(inner, cfg, layout)
    return Source(cfg, view, meta, layout, left_out, taken(one, found))


def taken(one: Part, found: list[Part]) -> str:
    """Which network of a file this is, and which could be asked for in its place; "" for a bare
    one alone."""
    if len(found) == 1 and not one.prefix:
        return ""
    others = listed([p.place() for p in found if p.ema and p is not one], 8)
    words = f"{one.place()}, {'an EMA' if one.ema else 'raw weights'}"
    return words + (f" (--ema takes {others})" if others and not one.ema else "")


def has_part(path: Path, part: str) -> bool:
    """Does a file hold a network under this prefix?"""
    box = open_weights(path)
    return not is_ours(box) and any(lies_in(p.prefix, part) for p in unets(box))


def described(
    box: Container, layout: str, known: dict[str, Any]
) -> tuple[UNetConfig, dict[str, Any]]:
    """(the config of a U-Net's tensors, metadata that says what else is known of it).

    Distilled networks are passed round as one file under diffusers' names, without a config.json:
    their names and shapes are enough where the family fixes the heads.
    """
    if layout == "native":
        return config_of(box, known), {}
    if (box.path.parent / "config.json").exists():
        cfg, aside = config_beside(box.path, known)
        return cfg, {"diffusers": aside} if aside else {}
    if any(".transformer_blocks." in name for name in box):
        return config_of(native_names(box), known), {}
    raise UserError(
        f"{box.path} has the names of diffusers' UNet2DModel and needs diffusers' config.json "
        "beside it: no tensor shows its heads, its eps and its padding",
        do="Copy it there.",
    )


# Of those that read text, all are flow matching.
READS_TEXT = re.compile(r"(joint_blocks|double_blocks|transformer_blocks)\.0\.")
QUANTISED = re.compile(r"\.(absmax|quant_map|nested_\w+|quant_state\.\w+|SCB|weight_format)$")
EIGHT_BITS = {torch.float8_e4m3fn, torch.float8_e5m2}


def objective_of(box: Container) -> str | None:
    """What a network says by what it is."""
    reads_text = is_transformer(box) and any(READS_TEXT.match(name) for name in box)
    return "fm" if reads_text else None


def check_transformer(box: Container, said: dict[str, Any]) -> None:
    """Refuse what is no network of ours: numbers that were rounded away, another objective."""
    dtypes = {entry.dtype for entry in box.table.values()}
    odd = {dtype for dtype in dtypes if not dtype.is_floating_point} | (dtypes & EIGHT_BITS)
    odd = {str(dtype).removeprefix("torch.") for dtype in odd}
    if odd or any(QUANTISED.search(name) for name in box):
        raise UserError(
            f"{box.path} is quantised ({', '.join(sorted(odd)) or 'by the names of its tensors'}): "
            "its weights are rounded to a few bits, in a form of the program that did it",
            do="Name a file of the same network in bf16, fp16 or fp32.",
        )
    if objective_of(box) and target_of(said) != "fm":
        raise UserError(
            f"{box.path} is a transformer that reads text, and those are flow matching, got "
            f"{target_of(said)}",
            do="Leave --objective out.",
        )


def transformer_of(
    box: Container, layout: str, known: dict[str, Any], objective: str | None
) -> Config:
    """The config of a transformer's tensors, or of the config.json beside them."""
    if layout == "diffusers":
        return config_beside(box.path, known)[0]
    if "attention_order" in known:
        raise UserError(f"{box.path} is a transformer, which has one order", do="Leave it out.")
    shapes = {name: entry.shape for name, entry in box.table.items()}
    try:
        return infer(shapes, known, objective)
    except (ValueError, ArithmeticError, TypeError) as error:
        what, _, do = str(error).partition("  ")
    if "number of attention heads" in what:
        raise Unsaid(f"{box.path}: {what}", ["heads"])
    raise UserError(f"{box.path}: {what}", do=do or "Copy it again.")


def config_of(box: Container, known: dict[str, Any]) -> UNetConfig:
    """The config of native names and shapes. An error says with which flag to give what they do not
    show."""
    names = [f.name for f in fields(UNetConfig)]
    for key in known:
        if key not in names:
            near = closest(key, names) or "Leave it out."
            raise UserError(f"{box.path}: {key!r} is not a field of UNetConfig", do=near)
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    try:
        check_fields(UNetConfig, known)
        table = {k: e for k, e in box.table.items() if not k.startswith("guidance_proj.")}
        own = UNetConfig if len(table) == len(box.table) else LCMUNetConfig
        cfg = infer_config(table, **known)
        return config_from(own, {name: getattr(cfg, name) for name in names})
    except (ValueError, ArithmeticError, LookupError) as error:
        what, _, do = str(error).partition("  ")
    unsaid = {"heads": "number of attention heads", "order": "order of the qkv rows"}
    unsaid = [key for key, words in unsaid.items() if words in what]
    if unsaid:
        raise Unsaid(f"{box.path}: {what}", unsaid)
    own = "Give the values that the network was made with."
    do = do or (own if known else "Is the file damaged?  Copy it again.")
    raise UserError(f"{box.path}: {what}", do=do)


# ---- what a file cannot say ---------------------------------------------------------------------


def open_guessing(path: Path, **known: Any) -> tuple[Source, set[str]]:
    """A file with guesses for what its tensors do not show; and which of "heads", "order" it does
    not say and `known` does not give. Whatever else is wrong with it is raised."""
    guesses = {"heads": {"num_heads": 1}, "order": {"attention_order": "legacy"}}
    try:
        return open_unet(path, **known), set()
    except Unsaid as error:
        unsaid = set(error.what)
    for key in unsaid:
        known |= guesses[key]
    return open_unet(path, **known), unsaid


def load_like(
    path: Path | str, preset: Any, name: str = "", dtype: torch.dtype | None = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """The network to start from. Where its file does not say its heads and their order, `preset`
    does, and must be what it was made with. `name`: the preset's, for messages."""
    file, heads = file_like(path, preset, name)
    return load_unet(file, dtype=dtype, **heads)


def open_like(path: Path | str, preset: Any, name: str = "") -> Source:
    """load_like() of weights in fp32 of which none stays in memory: see open_checked()."""
    file, heads = file_like(path, preset, name)
    return open_checked(file, "fp32", **heads)


def file_like(path: Path | str, preset: Any, name: str) -> tuple[Path, dict[str, Any]]:
    """(the file of a network to start from, what it does not say of its heads)."""
    file = find_checkpoint(path)
    source, unsaid = open_guessing(file)
    if "unet" not in source.meta and isinstance(source.cfg, UNetConfig):
        unsaid.add("order")  # diffusers' files have none: theirs becomes the preset's
    its, wanted = traits(source.cfg, unsaid), traits(preset, unsaid)
    differs = [key for key in its if key in wanted and its[key] != wanted[key]]
    if differs:
        same = [key for key, cfg in PRESETS.items() if traits(cfg, unsaid) == its]
        has = ", ".join(f"{key} {its[key]}" for key in differs)
        preset_has = ", ".join(f"{key} {wanted[key]}" for key in differs)
        advice = f" (--model {' or '.join(same)})" if same else ""
        raise UserError(
            f"--init {path} is of another architecture: it has {has}; --model {name} is "
            f"{preset_has}",
            do=f"Choose the preset it was made with{advice}.",
        )
    heads = {}
    if "heads" in unsaid:
        heads = {"num_heads": preset.num_heads, "num_head_channels": preset.num_head_channels}
    if "order" in unsaid:
        heads["attention_order"] = preset.attention_order
    return file, heads


def traits(cfg: Any, unsaid: set[str]) -> dict[str, Any]:
    """What has to be equal for weights of one config to be loaded under another: all but the
    channels in and out, the classes, the size of pictures and dropout; of heads and their order
    what a file says."""
    free = {"in_channels", "out_channels", "num_classes", "dropout", "pos_max"}
    if isinstance(cfg, UNetConfig):
        free |= {"linear_projection", "num_heads", "num_head_channels", "attention_order"}
    shape = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in free}
    shape["network"] = network_name(cfg)
    if not isinstance(cfg, UNetConfig):
        return shape
    widths = head_widths(cfg)
    attends = (*cfg.attention[:-1], 1)
    one_head = widths == [C for C, depth in zip(cfg.channels, attends) if depth]
    if "heads" not in unsaid:
        shape["channels a head"] = widths
    if "order" not in unsaid and not one_head:
        shape["attention_order"] = cfg.attention_order
    return shape
