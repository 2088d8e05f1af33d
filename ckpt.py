"""Checkpoints: what is on disk, and the promise that it is whole, strict and self-describing.

    runs/<name>/ckpt/<images seen, 12 digits>/model.safetensors       the weights being trained
                                              ema-0.050.safetensors   one per EMA width; samplers.py prefers the first
                                              state.safetensors       optimizer state and counters, for resuming

A weight file is a plain safetensors file under native (guided-diffusion) key names, with all else (config, objective,
autoencoder, images seen, fingerprint …) as JSON under the metadata key "twinpath".
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Mapping

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import UserError
from model import UNet, UNetConfig

META = "twinpath"
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


# ---- files ----------------------------------------------------------------------------------------------------------

def make_dir(path: Path) -> None:
    """Create a folder we can write to, or say why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}.  Give a writable folder with --out.") from None


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Tensors + JSON metadata as one safetensors file, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    packed = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(packed, temporary, metadata={"format": "pt", META: json.dumps(meta)})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)                                         # safetensors writes 0600; be an ordinary file
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file of ours. Truncated, foreign and mislabelled files are named as what they are."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}.")
    with open(path, "rb") as file:
        magic = file.read(9)
    if magic[8:9] != b"{" and (magic[:2] == b"PK" or magic[:1] == b"\x80"):   # the length of a header may begin with the same byte
        raise UserError(f"{path} is a Python pickle, whatever its name says; wanted safetensors.  Convert it with torch.load("
                        "…, weights_only=True) and safetensors.torch.save_file.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors, raw = {k: file.get_tensor(k) for k in file.keys()}, (file.metadata() or {}).get(META)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({path.stat().st_size:,} bytes: {error}).  "
                        "Delete it and use an older one.") from None
    if raw is None:
        raise UserError(f"{path} was not written by twinpath: it has {len(tensors)} tensors but no '{META}' metadata.")
    return tensors, json.loads(raw)


# ---- weights --------------------------------------------------------------------------------------------------------

def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while hasattr(module, "module") or hasattr(module, "_orig_mod"):
        module = module.module if hasattr(module, "module") else module._orig_mod
    return module


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over sorted (name, dtype, shape, bytes)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_unet(path: Path | str, unet: nn.Module, meta: dict[str, Any], weights: Mapping[str, Tensor] | None = None) -> str:
    """Write a U-Net (or `weights` in its place, such as an EMA) with its config and metadata; returns the fingerprint."""
    unet = unwrap(unet)
    tensors = dict(unet.state_dict() if weights is None else weights)
    wrapped = [k for k in tensors if WRAPPERS.match(k)]
    assert not wrapped and tensors.keys() == unet.state_dict().keys(), f"not this U-Net's own names: {wrapped[:3]}"
    mark = fingerprint(tensors)
    write_tensors(Path(path), tensors, {**meta, "unet": asdict(unet.cfg), "fingerprint": mark})
    return mark


def load_unet(path: Path | str) -> tuple[UNet, dict[str, Any]]:
    """A U-Net on the CPU and its metadata. Every tensor must be there, fit, and match the fingerprint."""
    tensors, meta = read_tensors(path)
    if "unet" not in meta:
        raise UserError(f"{path} holds no U-Net (it looks like a {meta.get('kind', 'different')} file).")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["unet"].items()}
    with torch.device("meta"):
        net = UNet(UNetConfig(**fields))
    load_strict(net, tensors, f"{path}", assign=True)
    if fingerprint(tensors) != meta["fingerprint"]:
        raise UserError(f"{path}: the weights do not match their own fingerprint; the file was altered or damaged.")
    return net.to(memory_format=torch.channels_last), meta


def load_strict(net: nn.Module, tensors: Mapping[str, Tensor], what: str, assign: bool = False) -> None:
    """load_state_dict where every difference is an error that lists both sides."""
    own = net.state_dict()
    missing, extra = [k for k in own if k not in tensors], [k for k in tensors if k not in own]
    wrong = [f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}" for k in own if k in tensors and tensors[k].shape != own[k].shape]
    if missing or extra or wrong:
        parts = [f"{len(v)} {name}: {', '.join(v[:3])}{' …' if len(v) > 3 else ''}" for name, v in
                 (("missing", missing), ("unexpected", extra), ("of another shape", wrong)) if v]
        raise UserError(f"{what} is of another architecture ({len(tensors)} tensors, wanted {len(own)}): {'; '.join(parts)}.")
    net.load_state_dict(tensors, assign=assign)


# ---- a run's checkpoints --------------------------------------------------------------------------------------------

def checkpoints(run: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first. A folder gets its number only once it is whole."""
    return sorted(p for p in (run / "ckpt").glob("*") if re.fullmatch(r"\d{12}", p.name))


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


def find_checkpoint(path: Path | str) -> Path:
    """A weight file from what a user names: the file, a checkpoint folder, or a run's folder (newest; first EMA)."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}.")
    folder = (checkpoints(path) or [path])[-1]
    files = sorted(folder.glob("ema-*.safetensors")) + sorted(folder.glob("model.safetensors"))
    if not files:
        raise UserError(f"no checkpoint in {path}: wanted a .safetensors file, a run's folder, or one of its ckpt/ folders.")
    return files[0]
