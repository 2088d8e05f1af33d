"""Checkpoints of our own: written whole, read back, and checked by fingerprint and probe.

A run keeps its checkpoints in runs/<name>/ckpt/<images seen, 12 digits>/: model.safetensors, the
weights being trained; ema-0.050.safetensors, one per EMA width; state.safetensors, for resuming;
digests.safetensors, the sha256 of each of them and the step they are of, by which they are checked.
Of a sharded run (train.py --shard) state-rank0of4.safetensors and so on stand for the state.
Weight files are safetensors under the network's own names, with all else (config, objective,
autoencoder, fingerprint …) as JSON under the metadata key "twinpath":

    "unet"           the network's config, whatever the network
    "network"        its name in model.NETWORKS; absent = UNet
    "fingerprint"    sha256 of the weights
    "probe"          eight numbers that the network computes
    "layout"         of the names, where `python -m ckpt convert` wrote the file
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ckpt.configs import check_known, config_from, written
from ckpt.containers import WEIGHTS, open_weights, weights_in
from ckpt.diffusers import check_config_beside
from ckpt.hub import hub_spelling, origin, resolve
from ckpt.layouts import LAYOUTS, MARKERS, native_view, target_of
from ckpt.meaning import ANOTHER, is_table
from ckpt.notes import check_note
from harness.cli import UserError
from harness.files import META, Container, check_place, fingerprint, fsync, listed, read_digests
from harness.files import read_meta, remove, temporary_name, write_digests, write_tensors
from harness.run import Recorded, checkpoints, sweep
from harness.typed import AnyFloat, Count, Hash, Length, Open, Range, Rule, check
from harness.whole import LISTED, check_file
from kernels.dispatch import reference
from model import NETWORKS, build, network_name
from objectives import Objective

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
PROBE_LIMIT = 1e9  # parameters: above, one more pass over the weights would be felt
# An objective that is one word; edm is known by name only, and another not even that.
TARGETS = (None, "fm", "u", "eps", "ddpm", "v", "x0", "edm", ANOTHER)


@dataclass
class ToldBy(Open):
    """The text encoders by which a network was told what to draw."""

    encoders: Hash
    source: str = ""  # what --text would be given; "" = not known
    chunks: Annotated[int, Range(1, 64)] = 1
    skip: Annotated[int, Range(0, 64)] = 0


@dataclass
class Init(Open):
    """What a run started from."""

    path: str | None = None
    fingerprint: str | None = None
    teacher: str | None = None
    assessor: str | None = None
    context: str | None = None
    text: ToldBy | None = None


@dataclass
class Schedule(Open):
    """A noise schedule, as far as another program's file told it."""

    table: Annotated[str, Rule(is_table, "a noise schedule")] | None = None
    zero_snr: bool = False


@dataclass
class Meta(Open):
    """What our metadata may hold, as far as this code reads it."""

    unet: dict[str, Any]
    network: str = "UNet"
    layout: Literal[LAYOUTS] = "native"
    fingerprint: Hash = ""
    base_fingerprint: Hash | None = None
    images: Count = 0
    source: str = ""
    sha256: str = ""
    said: list[str] = ()
    latent: bool = False
    run: str = ""
    resolution: Annotated[int, Range(1, 65536)] = 1
    classes: list[str] = ()
    vae: dict[str, Any] = ()
    probe: Annotated[list[AnyFloat], Length(0, 64)] = ()
    ema: Annotated[float, Range(above=0, high=1e6)] | Literal["the file's"] | None = None
    objective: Objective | Literal[TARGETS] = None
    schedule: Schedule = ()
    diffusers: dict[str, Any] = ()
    config: Recorded = ()
    init: Init = ()


class Source(NamedTuple):
    """A checkpoint that is open: all names and shapes are checked, no tensor is read yet."""

    cfg: Any
    weights: Container  # under the network's own names, in its shapes; read on access
    meta: dict[str, Any]
    layout: str  # of the file
    left_out: dict[str, int]  # what else the file holds: {"vae": 248 tensors, …}
    taken: str = ""  # where in the file it stands, and what could be taken in its place


# ---- writing ------------------------------------------------------------------------------------


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while hasattr(module, "module") or hasattr(module, "_orig_mod"):
        module = module.module if hasattr(module, "module") else module._orig_mod
    return module


def save_unet(
    path: Path | str,
    unet: nn.Module,
    meta: dict[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """Write a network (or `weights` in its place, such as an EMA) with its config and metadata.

    Returns the fingerprint. With base_fingerprint in meta, where training began, trained weights
    that equal it are refused. The file is read back before it takes its place.
    """
    unet = unwrap(unet)
    own = unet.state_dict()
    # Averages are of parameters; what else a network keeps is the same for all.
    buffers = {name: own[name] for name, _ in unet.named_buffers() if name in own}
    weights = own if weights is None else {**buffers, **weights}
    tensors = {k: v.detach().cpu() for k, v in weights.items()}
    wrapped = [k for k in tensors if WRAPPERS.match(k)]
    assert not wrapped and tensors.keys() == own.keys(), f"not this network's names: {wrapped[:3]}"
    digest = fingerprint(tensors)
    if meta.get("images") and meta.get("base_fingerprint") == digest:
        raise UserError(
            f"{path} is not written: after {meta['images']:,} images the weights are bit for bit "
            f"those training started from ({digest[:12]})",
            do="Is --lr 0, or are other weights being trained than saved?",
        )
    meta = {**meta, "unet": written(unet.cfg), "fingerprint": digest}
    if network_name(unet.cfg) != "UNet":
        meta["network"] = network_name(unet.cfg)
    if sum(t.numel() for t in tensors.values()) <= PROBE_LIMIT:
        meta["probe"] = probe(unet.cfg, tensors)
    write_tensors(Path(path), tensors, meta, partial(check_written, path, digest))
    return digest


def check_written(what: Path | str, digest: str, path: Path) -> None:
    """Read a file back before it takes its place."""
    got = fingerprint(open_weights(path))
    if got != digest:
        raise UserError(
            f"{what} was read back with other weights ({got[:12]}) than were written "
            f"({digest[:12]})",
            do="Is the disk sound?",
        )


def save_checkpoint(
    run: Path,
    images: int,
    unet: nn.Module,
    meta: dict[str, Any],
    emas: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    state_meta: dict[str, Any],
    keep: int,
    keep_every: int,
) -> Path:
    """Write a checkpoint under a temporary name, rename it into place, then remove those that are
    no longer kept: all but the last `keep`, and the first at or after each multiple of keep_every.
    """
    temporary = begin_checkpoint(run, images)
    meta = {**meta, "images": images}
    save_unet(temporary / "model.safetensors", unet, {**meta, "ema": None})
    for width, weights in emas.items():
        path = temporary / f"ema-{width}.safetensors"
        save_unet(path, unet, {**meta, "ema": float(width)}, weights)
    state_meta = {**state_meta, "kind": "training state", "images": images, LISTED: True}
    write_tensors(temporary / "state.safetensors", state, state_meta)
    return end_checkpoint(temporary, meta.get("run"), keep, keep_every)


def begin_checkpoint(run: Path, images: int) -> Path:
    """The folder into which a checkpoint is written, under its temporary name."""
    temporary = run / "ckpt" / f"{images:012d}.tmp"
    sweep(run)
    temporary.mkdir(parents=True)
    return temporary


def end_checkpoint(temporary: Path, name: str | None, keep: int, keep_every: int) -> Path:
    """List what a checkpoint of the run `name` holds, rename it into place, and remove older ones:
    see save_checkpoint()."""
    run, final = temporary.parent.parent, temporary.with_suffix("")
    written = [path.name for path in temporary.iterdir()]
    write_digests(temporary, written, run=name, images=int(final.name))
    os.replace(temporary, final)
    fsync(final.parent)
    milestones = firsts(checkpoints(run), keep_every)
    for old in checkpoints(run)[:-keep]:
        if old in milestones:
            continue
        trash = temporary_name(old)  # a kill while it is removed leaves no numbered half
        os.replace(old, trash)
        remove(trash)
    return final


def firsts(found: list[Path], every: int) -> list[Path]:
    """Of checkpoints, oldest first, those that are the first at or after a multiple of `every`;
    0 = none. A multiple need not be one of the batch."""
    if not every:
        return []
    counts = [0, *(int(path.name) // every for path in found)]
    crossed = zip(found, counts[1:], counts[:-1])
    return [path for path, now, before in crossed if now > before or int(path.name) == 0]


# ---- reading ------------------------------------------------------------------------------------


def find_checkpoint(path: Path | str, ema: bool | None = None) -> Path:
    """A weight file from what a user names: a file, a name on the Hub, a run's folder (newest;
    first EMA), one of its checkpoints, or a folder as diffusers writes it (raw weights, if it has
    them and ema is not True).

    If a list lies beside it, it has to be the file that the list names.
    """
    name = str(path)
    path = resolve(path) if name.startswith("hf:") else Path(path)
    if path.is_file():
        one = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})((?:\.\w+)?)(\.safetensors|\.bin)", path.name)
        if one and int(one[2]) > 1:
            index = f"{path.with_name(one[1] + one[4])}.index{one[3]}.json"
            raise UserError(
                f"{path} is one of {int(one[2])} shards", do=f"Name their index: {index}"
            )
        return check_file(path)
    if not path.is_dir():
        do = "Name a file or a folder that exists."
        if on_hub := hub_spelling(name):
            do = f"Name a file or a folder that exists, or on the Hub {on_hub}."
        raise UserError(f"no checkpoint at {name}", do=do)
    folder = (checkpoints(path) or [path])[-1]
    if ema and (average := weights_in(folder / "unet_ema")):
        return average
    check_place(folder, "a folder")
    # What the list names and is gone must not be passed over for the next one.
    names = read_digests(folder).files or [file.name for file in folder.iterdir()]
    emas = sorted(folder / name for name in names if re.fullmatch(r"ema-.*\.safetensors", name))
    plain = weights_in(folder)
    if emas or plain:
        return check_file(emas[0] if emas else plain)
    found = [p for p in [*folder.glob("*"), *folder.glob("unet/*")] if p.suffix in WEIGHTS]
    names = listed(sorted(str(p.relative_to(path)) for p in found), 8)
    raise UserError(
        f"no checkpoint in {path}: wanted a weight file, a run's folder, one of its ckpt/ folders, "
        "or a diffusers folder",
        do=f"It has {names}; name one." if found else "Name another folder, or a file.",
    )


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file of ours, whatever it holds: open_tensors(), all read."""
    box, meta = open_tensors(path)
    return dict(box), meta


def open_tensors(path: Path | str) -> tuple[Container, dict[str, Any]]:
    """(tensors, which are read on access; metadata) of a file of ours. Truncated, foreign and
    mislabelled files are named as what they are."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}", do="Name a file that exists.")
    check_file(Path(path))
    box = open_weights(path)
    if "pickle" in box.kind:
        raise UserError(
            f"{path} is a Python pickle, whatever its name says; wanted safetensors",
            do="Name a file that this code wrote.",
        )
    if META not in box.meta:
        raise UserError(
            f"{path} was not written by twinpath: it has {len(box)} tensors but no '{META}' "
            "metadata",
            do="Name a file that this code wrote.",
        )
    return box, read_meta(box)


def open_own(box: Container, ema: bool | None, known: dict[str, Any]) -> Source:
    """A file of ours. `ema` and `known` (heads, objective …) have to agree with what it says."""
    path, meta = box.path, read_meta(box)
    if part := known.get("part"):
        raise UserError(f"{path} holds one network, got --part {part}", do="Leave it out.")
    if "unet" not in meta:
        raise UserError(
            f"{path} holds no U-Net (its kind: {meta.get('kind', 'another')})",
            do="Name a network's file, such as model.safetensors.",
        )
    check(meta, Meta, path)
    try:
        cfg = describe(meta)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        what = f"{path}: its metadata is not of this version's networks ({error})"
        raise UserError(what, do="Load it with the code that wrote it.") from None
    if known:
        check_known(cfg, known, str(path))
    wanted = known.get("objective")
    if wanted and target_of(meta) not in (None, wanted):
        target = target_of(meta)
        raise UserError(f"{path} says its objective is {target}, got {wanted}", do="Leave it out.")
    if ema is not None and ema != (meta.get("ema") is not None):
        what = "the raw weights" if ema else f"an EMA of width {meta['ema']}"
        wanted = "an EMA" if ema else "the raw weights"
        raise UserError(f"{path} holds {what}, wanted {wanted}", do="Take the file beside it.")
    meta["objective"] = meta.get("objective") or known.get("objective")
    if "snapshots" in path.parts:
        place = origin(path)
        meta |= place if "sha256" in place else {}
    if "layout" not in meta:
        return Source(cfg, box, meta, "native", {})
    check_config_beside(cfg, path, meta["layout"])
    box = box.over({name: entry for name, entry in box.table.items() if name not in MARKERS})
    return Source(cfg, native_view(box, cfg, meta["layout"]), meta, meta["layout"], {})


def describe(meta: dict[str, Any]) -> Any:
    """The config that metadata describes. TypeError or ValueError where it is not ours."""
    name = meta.get("network", "UNet")
    if name not in NETWORKS:
        raise ValueError(f"network is {name[:40]!r}: wanted one of {', '.join(NETWORKS)}")
    if "vae" in meta:
        check_note(meta["vae"], "vae")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["unet"].items()}
    cfg = config_from(NETWORKS[name][1], values)
    if isinstance(meta.get("objective"), dict):
        Objective(**meta["objective"])
        if not Range(-1e9, 1e9).holds([*meta["objective"].values()]):
            raise ValueError(f"its objective holds a number beyond 1e9: {meta['objective']!r:.200}")
    config = meta.get("config", {})
    if config.get("mode") == "progressive" and "end_steps" not in config:
        raise ValueError("its config is of mode progressive, and has no end_steps")
    classes = getattr(cfg, "num_classes", 0)
    if "classes" in meta and len(meta["classes"]) != classes:
        raise ValueError(f"it names {len(meta['classes'])} classes, and its network has {classes}")
    return cfg


def check_weights(source: Source, tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of tensors, which must be the one the file names; and the network must
    compute what its probe says."""
    path, meta, digest = source.weights.path, source.meta, fingerprint(tensors)
    if meta.get("fingerprint", digest) != digest:
        raise UserError(
            f"{path}: the weights do not match their own fingerprint; the file was altered or "
            "damaged",
            do="Copy it again, or use an older one.",
        )
    if "probe" not in meta:
        return digest
    got = torch.tensor(probe(source.cfg, tensors), dtype=torch.float64)
    wanted = torch.tensor(meta["probe"], dtype=torch.float64)
    finite = wanted[wanted.isfinite()]
    scale = float(finite.abs().max()) if len(finite) else 0.0
    close = dict(rtol=0, atol=1e-3 * scale + 1e-7, equal_nan=True)
    if got.shape != wanted.shape or not torch.allclose(got, wanted, **close):
        raise UserError(
            f"{path}: the network computes {got[:2].tolist()} … where the one that was saved "
            f"computed {wanted[:2].tolist()} …; its config (heads? attention order?) is not that "
            "of these weights",
            do="Use an undamaged copy, or the code that wrote it.",
        )
    return digest


# ---- the probe ----------------------------------------------------------------------------------


class Reader(TorchFunctionMode):
    """While it is on, an op that is given one of a network's own tensors gets the weight instead.

    It is read then, in fp32 on the CPU, and forgotten after the op: one at a time is in memory.
    """

    def __init__(self, net: nn.Module, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.names = {id(v): k for k, v in net.state_dict(keep_vars=True).items()}
        self.tensors = tensors

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = self.read(list(args))
        kwargs = {key: self.read(arg) for key, arg in (kwargs or {}).items()}
        return lean_convolution(*args, **kwargs) if func is F.conv2d else func(*args, **kwargs)

    def read(self, arg: Any) -> Any:
        if type(arg) in (list, tuple):  # torch.cat([…])
            return type(arg)(self.read(entry) for entry in arg)
        if id(arg) not in self.names:
            return arg
        tensor = self.tensors[self.names[id(arg)]].detach().cpu()
        return tensor.float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def probe(cfg: Any, tensors: Mapping[str, Tensor]) -> list[float]:
    """Eight output values on a fixed input, in fp32 on the CPU: what names and shapes cannot show
    (heads, their order, eps).

    The lowest level sees 2×2: a softmax over one position would hide the heads.
    """
    net = skeleton(cfg).eval()
    side = 2 * cfg.multiple
    vector_dim, context_dim = getattr(cfg, "vector_dim", 0), getattr(cfg, "context_dim", 0)

    def wave(*shape: int) -> Tensor:
        steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        return torch.sin(1.7 * steps).float().view(shape) * 1.4

    y = torch.tensor([cfg.num_classes - 1]) if cfg.num_classes else None
    y = wave(1, vector_dim) if vector_dim else y
    context = wave(1, 3, context_dim) if context_dim else None
    if hasattr(cfg, "text_places"):  # its encoder is a part of it
        y, context = None, torch.arange(cfg.text_places)[None] % 257
    # Only networks that are told a strength of guidance have the argument.
    more = {"guidance": torch.tensor([3.5])} if getattr(cfg, "guidance", False) else {}
    x, t = wave(1, cfg.in_channels, side, side), torch.tensor([371.0])
    with reference(), torch.autocast("cpu", enabled=False), Reader(net, tensors):
        out = net(x, t, y, context, **more)
    return out.flatten()[:: max(out.numel() // 8, 1)][:8].tolist()


def lean_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    """A convolution that copies the smaller of picture and weights: the CPU's own kernels copy
    weights into another order."""
    plain = groups == 1 and dilation in (1, (1, 1)) and not isinstance(padding, str)
    if x.numel() > weight.numel() or bias is None or len(x) > 1 or not plain:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    kernel = weight.shape[2:]
    columns = F.unfold(x, kernel, padding=padding, stride=stride)[0]  # (in · k · k, H' · W')
    steps, pads = nn.modules.utils._pair(stride), nn.modules.utils._pair(padding)
    side = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], pads, kernel, steps)]
    return (weight.flatten(1) @ columns + bias[:, None]).view(1, -1, *side)


def skeleton(cfg: Any) -> nn.Module:
    """The network of a config, without memory for its weights."""
    with torch.device("meta"):
        net = build(cfg)
    if all(name in net.state_dict() for name, _ in net.named_buffers()):
        return net
    # It has buffers that no file holds.
    with torch.random.fork_rng(devices=[]):
        return build(cfg)
