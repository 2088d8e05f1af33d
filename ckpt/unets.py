"""Checkpoints: look into any U-Net's file, turn it into another layout, compare two.

    python ckpt.py inspect FILE                                  # what it is, and what is missing for sampling
    python ckpt.py convert SRC DST --layout diffusers --dtype fp16   # DST: a file.safetensors, or a new folder
    python ckpt.py verify A B                                    # the same weights? exit code 0 = yes, 1 = no, 2 = cannot tell

A name may be a file, a run's folder, a diffusers folder, or hf:org/name[/file][@revision].
A run keeps its checkpoints in runs/<name>/ckpt/<images seen, 12 digits>/: model.safetensors, the weights being trained;
ema-0.050.safetensors, one per EMA width; state.safetensors, for resuming. Our weight files are safetensors under native
(guided-diffusion) names, with all else (config, objective, autoencoder, fingerprint …) as JSON under the metadata key
"twinpath". Foreign files load too: completely, or not at all.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Mapping, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import ckpt.layouts as layouts
from harness.cli import UserError, cli, closest, parse
from harness.files import (
    META, Container, Entry, fsync, is_ours, make_dir, raw_bytes, read_meta, stream_tensors,
    text_meta, write_tensors, write_text,
)
from ckpt.containers import WEIGHTS, open_weights, rounded, weights_in
from ckpt.hub import origin, resolve
from ckpt.native import config_from
from model import UNet, UNetConfig, infer_config
from objectives import Objective, make_objective
from ckpt.probe import PROBE_LIMIT, probe
from harness.run import checkpoints

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
# What our metadata may hold, as far as this code reads it.
KINDS = {"unet": dict, "layout": str, "fingerprint": str, "images": int, "source": str, "sha256": str, "run": str, "resolution": int,
         "classes": list, "vae": dict, "ema": (float, int, str, type(None)), "objective": (str, dict, type(None)), "probe": list}


# ---- weights --------------------------------------------------------------------------------------------------------

def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while hasattr(module, "module") or hasattr(module, "_orig_mod"):
        module = module.module if hasattr(module, "module") else module._orig_mod
    return module


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over sorted (name, dtype, shape, bytes), one tensor at a time. Of native names, it is the same in every layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(raw_bytes(t))
        del t                                                                   # before the next one is read
    return digest.hexdigest()


def save_unet(path: Path | str, unet: nn.Module, meta: dict[str, Any], weights: Mapping[str, Tensor] | None = None) -> str:
    """Write a U-Net (or `weights` in its place, such as an EMA) with its config and metadata; returns the fingerprint.

    With base_fingerprint in meta, where training began: trained weights that equal it are refused. The file is read back
    before it takes its place.
    """
    unet = unwrap(unet)
    tensors = {k: v.detach().cpu() for k, v in (unet.state_dict() if weights is None else weights).items()}
    wrapped = [k for k in tensors if WRAPPERS.match(k)]
    assert not wrapped and tensors.keys() == unet.state_dict().keys(), f"not this U-Net's own names: {wrapped[:3]}"
    mark = fingerprint(tensors)
    if meta.get("images") and meta.get("base_fingerprint") == mark:
        raise UserError(f"{path} is not written: after {meta['images']:,} images the weights are bit for bit those training started from "
                        f"({mark[:12]}).  Is --lr 0, or are other weights being trained than saved?")
    if sum(t.numel() for t in tensors.values()) <= PROBE_LIMIT:
        meta = {**meta, "probe": probe(unet.cfg, tensors)}
    write_tensors(Path(path), tensors, {**meta, "unet": asdict(unet.cfg), "fingerprint": mark}, partial(check_written, path, mark))
    return mark


def check_written(what: Path | str, mark: str, path: Path) -> None:
    if (got := fingerprint(open_weights(path))) != mark:
        raise UserError(f"{what} was read back with other weights ({got[:12]}) than were written ({mark[:12]}).  Is the disk sound?")


def check_marks(source: "Source", tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of tensors, which must be the one the file names; and the network must compute what its probe says."""
    path, meta, mark = source.weights.path, source.meta, fingerprint(tensors)
    if meta.get("fingerprint", mark) != mark:
        raise UserError(f"{path}: the weights do not match their own fingerprint; the file was altered or damaged.")
    if "probe" in meta:
        got, wanted = (torch.tensor(v, dtype=torch.float64) for v in (probe(source.cfg, tensors), meta["probe"]))
        scale = wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else 0.0
        if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=0, atol=1e-3 * float(scale) + 1e-7, equal_nan=True):
            raise UserError(f"{path}: the network computes {got[:2].tolist()} … where the one that was saved computed {wanted[:2].tolist()} …; "
                            "its config (heads? attention order?) is not that of these weights.")
    return mark


def load_unet(path: Path | str, *, ema: bool | None = None, dtype: torch.dtype | None = None, **known: Any) -> tuple[UNet, dict[str, Any]]:
    """A U-Net on the CPU and its metadata, from any file open_unet() takes; dtype=None keeps the file's.

    Every tensor must be there, fit, and match the file's own fingerprint and probe, if it has them.
    """
    source = open_unet(path, ema=ema, **known)
    tensors, meta = dict(source.weights), source.meta
    meta["fingerprint"] = check_marks(source, tensors)
    with torch.device("meta"):
        net = UNet(source.cfg)
    load_strict(net, {k: v.to(dtype or v.dtype) for k, v in tensors.items()}, f"{path}", assign=True)
    return net.to(memory_format=torch.channels_last), meta


def load_strict(net: nn.Module, tensors: Mapping[str, Tensor], what: str, assign: bool = False) -> None:
    """load_state_dict where every difference is an error that lists both sides."""
    check_shapes({k: tuple(v.shape) for k, v in net.state_dict().items()}, {k: tuple(v.shape) for k, v in tensors.items()}, what)
    net.load_state_dict(tensors, assign=assign)


def check_shapes(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], what: str) -> None:
    missing, extra = [k for k in own if k not in given], [k for k in given if k not in own]
    wrong = [f"{k} {given[k]} for {own[k]}" for k in own if k in given and given[k] != own[k]]
    if missing or extra or wrong:
        parts = [f"{len(v)} {name}: {', '.join(v[:3])}{' …' if len(v) > 3 else ''}" for name, v in
                 (("missing", missing), ("unexpected", extra), ("of another shape", wrong)) if v]
        raise UserError(f"{what} is of another architecture ({len(given)} tensors, wanted {len(own)}): {'; '.join(parts)}.")


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file of ours. Truncated, foreign and mislabelled files are named as what they are."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}.")
    box = open_weights(path)
    if "pickle" in box.kind:
        raise UserError(f"{path} is a Python pickle, whatever its name says; wanted safetensors.")
    if META not in box.meta:
        raise UserError(f"{path} was not written by twinpath: it has {len(box)} tensors but no '{META}' metadata.")
    return dict(box), read_meta(box)


# ---- opening any U-Net ----------------------------------------------------------------------------------------------

class Source(NamedTuple):
    cfg: UNetConfig
    weights: Container                       # under native names, in the shapes of UNet(cfg); read on access
    meta: dict[str, Any]
    layout: str                              # of the file
    left_out: dict[str, int]                 # what else the file holds: {"vae": 248 tensors, …}


def open_unet(path: Path | str, *, ema: bool | None = None, **known: Any) -> Source:
    """Any U-Net file under native names, without reading a tensor yet.

    Ours; guided-diffusion's .pt; Stable Diffusion's single files (ema=True takes their model_ema. part); diffusers files
    and folders; each bare or under wrapper prefixes, as safetensors, shards or pickles. known: what a foreign file cannot
    say (num_heads | num_head_channels, attention_order, objective); what it can say must agree.
    """
    box, known = open_weights(find_checkpoint(path)), {k: v for k, v in known.items() if v is not None}
    return _open_own(box, ema, known) if is_ours(box) else _open_foreign(box, ema, known)


def _open_own(box: Container, ema: bool | None, known: dict[str, Any]) -> Source:
    meta, path = read_meta(box), box.path
    if "unet" not in meta:
        raise UserError(f"{path} holds no U-Net (its kind: {meta.get('kind', 'another')}).")
    try:
        for key, kind in KINDS.items():
            if key in meta and not isinstance(meta[key], kind):
                raise TypeError(f"{key} is {str(meta[key])[:40]!r}")
        cfg = config_from(UNetConfig, {k: tuple(v) if isinstance(v, list) else v for k, v in meta["unet"].items()})
        if isinstance(meta.get("objective"), dict):
            Objective(**meta["objective"])
        elif layouts.target_of(meta) not in (None, "fm", "eps", "v", "x0"):
            raise ValueError(f"objective is {meta['objective']!r}")
        torch.tensor(meta.get("probe", []), dtype=torch.float64)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: its metadata is not of this version's U-Nets ({error}).") from None
    check_known(cfg, known, str(path))
    wanted = known.get("objective")
    if wanted and layouts.target_of(meta) not in (None, wanted):
        raise UserError(f"{path} says its objective is {layouts.target_of(meta)}, got {wanted}.  Leave it out.")
    if ema is not None and ema != (meta.get("ema") is not None):
        holds, wanted = ("the raw weights", "an EMA") if ema else (f"an EMA of width {meta['ema']}", "the raw weights")
        raise UserError(f"{path} holds {holds}, wanted {wanted}.  Take the file beside it.")
    layout, place = meta.get("layout", "native"), origin(path)
    if layout == "diffusers" and path.name.startswith("diffusion_pytorch_model") and (path.parent / "config.json").exists():
        beside = diffusers_config_beside(path, {"attention_order": cfg.attention_order})   # diffusers itself would believe it
        if found := differences(cfg, beside):
            raise UserError(f"{path.parent / 'config.json'} is not the config of the weights beside it: {'; '.join(found)}.  Restore it.")
    meta |= {"objective": meta.get("objective") or wanted, **(place if "sha256" in place else {})}
    return Source(cfg, native_view(box, cfg, layout), meta, layout, {})


def _open_foreign(box: Container, ema: bool | None, known: dict[str, Any]) -> Source:
    path, beside, is_ema = box.path, dict(box.beside), False
    if box.emas and (ema or not len(box)):                                      # a pickle keeps its EMA under a name of its own
        if len(box.emas) > 1:
            raise UserError(f"{path} holds several EMAs: {some(box.emas)}.  Save the one you want alone.")
        beside |= {"raw": len(box)} if len(box) else {}
        box, is_ema = box.over(next(iter(box.emas.values()))), True
    else:
        beside |= {name: len(table) for name, table in box.emas.items()}
    is_ema = is_ema or "ema." in layouts.strip_prefix(box)[0]
    if is_ema and ema is False:
        raise UserError(f"{path} holds an EMA ({some(box)}), wanted the raw weights.")
    groups, part = layouts.parts(box), "ema" if ema and not is_ema else "unet"
    if groups.get("other"):
        raise UserError(f"{path}: {len(groups['other'])} of {len(box)} tensors belong to nothing known: {some(groups['other'])}.  "
                        "Wanted a U-Net, bare or beside its EMA, autoencoder and text encoders.")
    if part not in groups:
        found = some(f"{len(v)} {k} tensors" for k, v in groups.items()) or "nothing"
        do = "  Take the raw weights: leave ema out." if "unet" in groups else "  Ask for its EMA." * ("ema" in groups)
        raise UserError(f"{path} holds no {'EMA of a U-Net' if part == 'ema' else 'U-Net'}, but {found} ({some(box)}).{do}")
    inner = box.over({name: box.table[full] for full, name in groups[part].items()})
    layout, objective = layouts.detect(inner), known.pop("objective", None)
    if layout is None:
        raise UserError(f"{path}: {len(inner)} tensors under names of no known layout: {some(inner)}.")
    if layout == "diffusers":
        cfg = diffusers_config_beside(path, known)
    else:
        cfg = infer_known(inner, known)
    meta = {"layout": layout, "family": layouts.family(cfg), "objective": objective, **origin(path), "ema": "the file's" if ema or is_ema else None}
    left_out = {k: len(v) for k, v in groups.items() if k != part} | beside
    return Source(cfg, native_view(inner, cfg, layout), meta, layout, left_out)


HEADS = (
    "--num-heads or --num-head-channels (num_heads, num_head_channels), from the model's card or "
    "training command"
)
ORDER = (
    "--attention-order (attention_order) legacy, guided-diffusion's default, or new (its "
    "use_new_attention_order=True)"
)


def infer_known(box: Container, known: dict[str, Any]) -> UNetConfig:
    """infer_config of a file; its errors with the flags that help."""
    names = [f.name for f in fields(UNetConfig)]
    for key in known:
        if key not in names:
            raise UserError(f"{key!r} is not a field of UNetConfig", do=closest(key, names) or "Leave it out.")
    try:
        cfg = infer_config(box.table, **known)
        return config_from(UNetConfig, {f.name: getattr(cfg, f.name) for f in fields(cfg)})
    except (ValueError, ArithmeticError, LookupError) as error:
        what, _, do = str(error).partition("  ")
        asked = [HEADS] if "number of attention heads" in what else []
        asked += [ORDER] if "order of the qkv rows" in what else []
        do = do or ("Add " + "; and ".join(asked) + "." if asked else "Give what its training command says, or leave it out.")
        raise UserError(f"{box.path}: {what}", do=do) from None


def diffusers_config_beside(path: Path, known: dict[str, Any]) -> UNetConfig:
    """The config of diffusers weights: their names and shapes alone do not tell the heads."""
    file, order = path.parent / "config.json", known.get("attention_order", "new")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} has diffusers' names and needs diffusers' config.json beside it ({type(error).__name__}).  Copy it there.") from None
    try:
        cfg = layouts.from_diffusers_config(config, order)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:       # JSON of other types than wanted
        raise UserError(f"{file} is not a config of diffusers ({type(error).__name__}: {error}).  Restore it.") from None
    check_known(cfg, known, str(file))
    return cfg


def differences(a: UNetConfig, b: UNetConfig) -> list[str]:
    """In what two networks differ. How their heads are told, dropout, and how files write them are no differences."""
    silent = ("dropout", "linear_projection", "num_heads", "num_head_channels", "attention_order")
    found = [f"{f.name} {getattr(a, f.name)} / {getattr(b, f.name)}" for f in fields(a) if f.name not in silent and getattr(a, f.name) != getattr(b, f.name)]
    widths = [[c.head_channels(C) for C, depth in zip(c.channels, (*c.attention[:-1], 1)) if depth] for c in (a, b)]
    return found + ([f"channels a head {widths[0]} / {widths[1]}"] if widths[0] != widths[1] else [])


def check_known(cfg: UNetConfig, known: dict[str, Any], what: str) -> None:
    """What the user says must be what the file says, if it says it. Heads may be told by number or by width."""
    for key, value in known.items():
        if key not in ("num_heads", "num_head_channels", "attention_order", "objective") and getattr(cfg, key, None) != value:
            raise UserError(f"{what} says {key} = {getattr(cfg, key, 'nothing')!r}, got {value!r}.  Leave it out.")
    heads = {k: known.get(k, 0) for k in ("num_heads", "num_head_channels")}
    try:
        wanted = replace(cfg, **heads if any(heads.values()) else {}, attention_order=known.get("attention_order", cfg.attention_order))
        same = all(wanted.head_channels(C) == cfg.head_channels(C) for C in cfg.channels) and wanted.attention_order == cfg.attention_order
    except ValueError:
        same = False
    if not same:
        raise UserError(f"{what} says num_heads {cfg.num_heads}, num_head_channels {cfg.num_head_channels}, attention_order {cfg.attention_order}; "
                        f"got {', '.join(f'{k} {v}' for k, v in known.items() if k != 'objective')}.  Leave them out.")


def native_view(box: Container, cfg: UNetConfig, layout: str) -> Container:
    """A file in some layout as a mapping of native names. All names and shapes are checked now, tensors are read on access."""
    wanted, native = layouts.foreign_shapes(cfg, layout), layouts.native_shapes(cfg)
    given = {k: e.shape for k, e in box.table.items()}
    for _, name, rule in layouts.unet_map(cfg, layout):                         # (C, C) in files that save_unet wrote, (C, C, 1, 1) in SD1's
        if rule == "squeeze" and given.get(name) == wanted[name][:2]:
            given[name] = wanted[name]
    check_shapes(wanted, given, str(box.path))
    odd = {k: e.dtype for k, e in box.table.items() if not e.dtype.is_floating_point}
    if odd:
        raise UserError(f"{box.path}: {len(odd)} weights are not floating-point numbers: {some(f'{k} ({v})' for k, v in odd.items())}.  "
                        "Save them in fp32, fp16 or bf16.")
    table: dict[str, Entry] = {}
    for foreign, name in layouts.foreign_names(cfg, layout).items():
        entry = table.setdefault(name, Entry(box.dtype(foreign), native[name], partial(layouts.to_native, cfg, layout, name, box)))
        if entry.dtype != box.dtype(foreign):
            raise UserError(f"{box.path}: parts of {name} have dtypes {entry.dtype} and {box.dtype(foreign)}, wanted one.")
    return box.over({name: table[name] for name in native})


def some(words: Any, n: int = 3) -> str:
    words = list(words)
    return ", ".join(map(str, words[:n])) + " …" * (len(words) > n)


def find_checkpoint(path: Path | str) -> Path:
    """A weight file from what a user names: a file, a name on the Hub, a run's folder (newest; first EMA), one of its
    checkpoints, or a folder as diffusers writes it."""
    path = resolve(path)
    if path.is_file():
        one = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})((?:\.\w+)?)(\.safetensors|\.bin)", path.name)
        if one and int(one[2]) > 1:
            raise UserError(f"{path} is one of {int(one[2])} shards.  Name their index: {path.with_name(one[1] + one[4])}.index{one[3]}.json")
        return path
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}.")
    folder = (checkpoints(path) or [path])[-1]
    files = sorted(folder.glob("ema-*.safetensors")) + [f for f in [weights_in(folder)] if f]
    if not files:
        there = sorted(str(p.relative_to(path)) for p in [*folder.glob("*"), *folder.glob("unet/*")] if p.suffix in WEIGHTS)
        raise UserError(f"no checkpoint in {path}: wanted a weight file, a run's folder, one of its ckpt/ folders, or a diffusers folder."
                        + f"  It has {some(there, 8)}; name one." * bool(there))
    return files[0]


# ---- converting -----------------------------------------------------------------------------------------------------

def convert(src: Path | str, dst: Path | str, layout: str, dtype: str | None = None, *, ema: bool | None = None, table: str = "", **known: Any) -> str:
    """Write a U-Net in another layout and read it back; returns the fingerprint. One tensor is in memory at a time.

    "native": one file as LDM and guided-diffusion name things. "diffusers": one file if dst ends in .safetensors, else a
    folder for from_pretrained. The dtype stays unless asked. Nothing is overwritten, and dst appears only once it is
    proven to hold the source's weights, bit for bit. With table, the noise schedule, the objective is written in full.
    """
    dst, source = Path(dst), open_unet(src, ema=ema, **known)
    cfg, weights, meta = source.cfg, source.weights, dict(source.meta)
    shapes = layouts.foreign_shapes(cfg, layout)                                # refuses what the layout cannot say
    folder = layout == "diffusers" and dst.suffix != ".safetensors"
    if os.path.lexists(dst) or dst.name in ("", ".."):
        raise UserError(f"{dst} exists{' and is the source' if dst.resolve() == weights.path.resolve() else ''}.  "
                        "Give another name, or remove it first.")
    if not folder and dst.suffix != ".safetensors":
        raise UserError(f"{dst}: wanted a name that ends in .safetensors, for that is what will be written.")
    if table:
        meta["objective"] = with_table(meta, table, str(src))
    mark = check_marks(source, weights)
    if dtype:
        weights = rounded(weights, dtype)
        mark, changed = fingerprint(weights), mark
        if mark != changed:                                                     # the probe's tolerance is for arithmetic, not for rounding
            meta = {k: v for k, v in meta.items() if k != "probe"} | {"cast_from": changed}
    if "probe" not in meta and parameters(weights) <= PROBE_LIMIT:
        meta["probe"] = probe(cfg, weights)
    meta |= {"unet": asdict(cfg), "layout": layout, "fingerprint": mark}
    if "source" in meta and "sha256" not in meta:
        meta["source"] = Path(meta["source"]).name                              # the folders of this machine are nobody's business
    make_dir(dst.parent)
    # A name of our own: whatever else lies there is the user's. A kill leaves a hidden folder.
    with tempfile.TemporaryDirectory(prefix=f".{dst.name[:50]}.", dir=dst.parent) as scratch:
        part = Path(scratch) / dst.name
        if folder:
            part.mkdir()
            write_text(part / "config.json", json.dumps(layouts.diffusers_config(cfg), indent=2) + "\n")
        file = part / "diffusion_pytorch_model.safetensors" if folder else part
        natives = layouts.foreign_names(cfg, layout)
        stream_tensors(file, {name: (weights.dtype(natives[name]), shape) for name, shape in shapes.items()},
                       {**text_meta(meta), **layouts.modelspec(cfg, layout, meta, dst.stem)},
                       lambda name: dict(layouts.to_foreign(cfg, layout, natives[name], weights[natives[name]]))[name])
        again = open_unet(part)                                                 # config.json is compared there
        if (got := fingerprint(again.weights)) != mark or again.cfg != cfg:
            raise UserError(f"{dst} was read back with other weights ({got[:12]}) than were written ({mark[:12]}).  Is the disk sound?")
        os.replace(part, dst)
        fsync(dst.parent)
    return mark


def with_table(meta: dict[str, Any], table: str, what: str) -> dict[str, Any]:
    """The objective in full, where a file or the user says only eps, v or x0."""
    target, told = layouts.target_of(meta), meta.get("objective")
    if target in (None, "fm"):
        raise UserError(f"--table {table} is a noise schedule of eps, v and x0; {what} " +
                        ("is fm, which has none." if target else "does not say its objective.  Add --objective."))
    if isinstance(told, dict) and told.get("table") != table:
        raise UserError(f"{what} says its table is {told.get('table')!r}, got {table!r}.  Leave it out.")
    return told if isinstance(told, dict) else asdict(make_objective("ddpm" if target == "eps" else target, table=table))


def parameters(box: Container) -> int:
    return sum(torch.Size(e.shape).numel() for e in box.table.values())


# ---- the command line -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Options:
    layout: Literal["", "native", "diffusers"] = ""   # convert: of the result
    dtype: Literal["", "fp32", "fp16", "bf16"] = ""   # convert: of the result; as it is if not given
    ema: bool = False                      # of a Stable Diffusion file: its EMA instead of its raw weights
    num_heads: int = 0                     # where the file cannot say: attention heads …
    num_head_channels: int = 0             # … or channels a head,
    attention_order: Literal["", "legacy", "new"] = ""   # … and for ADM the order of the qkv rows
    objective: Literal["", "fm", "eps", "v", "x0"] = ""   # what it was trained to output; convert writes it
    table: Literal["", "linear", "cosine", "scaled_linear"] = ""   # noise schedule of eps, v, x0; convert writes it


COMMANDS = {"inspect": ("FILE",), "convert": ("SRC", "DST"), "verify": ("A", "B")}


def positional(argv: list[str]) -> tuple[list[str], list[str]]:
    """Words and flags, in whatever order they come; after -- all are words."""
    words, flags, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return words + rest, flags
        (flags if word.startswith("-") else words).append(word)
        if word.startswith("--") and word.partition("=")[0] in (flag.partition("=")[0] for flag in flags[:-1]):
            raise UserError(f"{word.partition('=')[0]} is given twice.")
        alone = "=" in word or word in ("--ema", "--no-ema", "--help", "-h", "--dry-run")
        if word.startswith("-") and not alone and rest and not rest[0].startswith("--"):
            flags.append(rest.pop(0))
    return words, flags


def main() -> None:
    from ckpt.examine import inspect, verify                                         # here, for it builds on this file
    words, flags = positional(sys.argv[1:])
    o, dry_run = parse(Options, __doc__.replace("\n\n", "\n", 1), flags)
    command, names = (words[0], words[1:]) if words else ("", [])
    if command not in COMMANDS:
        raise UserError(f"command {command!r} is not one of {', '.join(COMMANDS)}.{closest(command, COMMANDS)}  See --help.")
    if len(names) != len(COMMANDS[command]):
        raise UserError(f"{command} takes {' '.join(COMMANDS[command])}, got {len(names)} names.  See --help.")
    if command == "convert" and not o.layout:
        raise UserError("convert needs --layout native or --layout diffusers.")
    if command != "convert" and (o.layout or o.dtype) or command == "verify" and (o.objective or o.table):
        raise UserError(f"--layout and --dtype are convert's, not {command}'s; verify takes no --objective and --table either.")
    known = {k: v for k, v in asdict(o).items() if v and k not in ("layout", "dtype")}
    if dry_run:
        print(json.dumps({"command": command, "names": names, **asdict(o)}, indent=1))
    elif command == "inspect":
        print("\n".join(inspect(*names, **known)))
    elif command == "convert":
        mark = convert(*names, o.layout, o.dtype or None, **known)
        print(f"{names[1]}: {o.layout}, read back bit for bit, fingerprint {mark}")
    else:
        same, lines = verify(*names, **known)
        print("\n".join(lines))
        sys.exit(0 if same else 1)


# ---- its checkpoints ------------------------------------------------------------------------------------------------

def save_checkpoint(run: Path, images: int, unet: nn.Module, meta: dict[str, Any], emas: Mapping[str, Mapping[str, Tensor]],
                    state: Mapping[str, Tensor], state_meta: dict[str, Any], keep: int, keep_every: int) -> Path:
    """Write a checkpoint under a temporary name, rename it into place, then remove those that are no longer kept."""
    final = run / "ckpt" / f"{images:012d}"
    temporary = final.with_name(final.name + ".tmp")
    sweep(run)
    temporary.mkdir(parents=True)
    save_unet(temporary / "model.safetensors", unet, {**meta, "images": images, "ema": None})
    for width, weights in emas.items():
        save_unet(temporary / f"ema-{width}.safetensors", unet, {**meta, "images": images, "ema": float(width)}, weights)
    write_tensors(temporary / "state.safetensors", state, {**state_meta, "kind": "training state", "images": images})
    os.replace(temporary, final)
    fsync(final.parent)
    done = checkpoints(run)
    for old in done[:-keep]:
        if not (keep_every and int(old.name) % keep_every == 0):
            trash = old.with_name(old.name + ".old")
            os.replace(old, trash)                                              # a kill in rmtree leaves no numbered half
            shutil.rmtree(trash)
    return final


def sweep(run: Path) -> None:
    """Remove what a kill in mid-save left behind: only names that save_checkpoint uses before and after."""
    for leftover in (run / "ckpt").glob("*"):
        if re.fullmatch(r"\d{12}\.(tmp|old)", leftover.name):
            shutil.rmtree(leftover)


if __name__ == "__main__":
    cli(main, crash=3)                                                          # 1 is verify's "no"
