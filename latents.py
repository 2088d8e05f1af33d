"""The latent cache: a data set encoded once, so that training needs neither its images nor the encoder.

    python vae.py encode --data DIR --vae flux2 --resolution 256 --out CACHE     # also under torchrun; again = it goes on
    python vae.py encode --out CACHE --verify                                    # every byte against its checksum
    python train.py --data CACHE --resolution 256

    CACHE/plan.json                   what is encoded, and how: written first; a cache of another plan is refused
          shard-00000.safetensors …   latents (n, 1 or 2, C, h, w): the posterior's mean before it is normalised, and of the mirrored image
          index.safetensors           names, tags, the first images
          vae.safetensors             the autoencoder, or where it is
          manifest.json               plan, statistics, checksums: written last
A shard is a function of the plan and its number (and, in its last bits, of the device and the number of threads), so ranks
and interruptions leave no trace. Latents are read with pread: of a mapped file, every page that was ever looked at, and its neighbours, counts as memory of the process.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError, parse
from data import to_float
from files import make_dir, open_weights, raw_bytes, read_meta, stream_tensors, write_tensors, write_text
from run import Ranks, join_ranks, lock
from sources import Source, open_source
from tags import TagTable
from vae import VAE, AnyVAE, enough, fit_pca, load_vae, pixel, save_vae

VERSION = 1
SHARD = 64 * 2 ** 20                         # bytes of latents a shard
OPEN = 256                                   # shards kept open; a process may have 1024 files
CHECKED = 4                                  # images kept in the index, to be encoded again when a run opens the cache
CLOSE = 2e-2                                 # how far the result may be away, in units of the latents' standard deviation or 1
PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Encode:
    out: str                           # folder of the cache
    data: str = "toyfaces"             # toyfaces[:count] | robohash[:count] | DIR | FILE.parquet | hf:org/name, with tags
    vae: str = "pca"                   # as for train.py
    resolution: int = 64               # pixels; the centre of each image
    flip: bool = False                 # also the mirrored images, for train.py --flip
    dtype: Literal["fp16", "bf16"] = "fp16"   # of the latents on disk
    batch: int = 16                    # images at a time; part of the plan, as sums of another size round differently
    device: str = "auto"
    verify: bool = False               # only check the cache at --out


# ---- between images, what is kept, and what a U-Net sees --------------------------------------------------------------

def raw_latents(vae: AnyVAE, images: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> what a cache keeps (B, C, h, w), fp32: constants of normalisation can change later."""
    return vae.moments(images)[0] if isinstance(vae, VAE) else vae.encode(images)


def from_raw(vae: AnyVAE, raw: Tensor) -> Tensor:
    """What a cache keeps -> model-space latents, fp32."""
    return vae.normalise(raw.float()) if isinstance(vae, VAE) else raw.float()


def latents_of(vae: AnyVAE, batch: dict[str, Tensor]) -> Tensor:
    """Model-space latents of a batch: from its images, or from what a cache kept of them."""
    return vae.encode(to_float(batch["image"])) if "image" in batch else from_raw(vae, batch["raw"])


# ---- writing --------------------------------------------------------------------------------------------------------

def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def encode(cfg: Encode, ranks: Ranks) -> None:
    """Encode a whole source; what is there already, of the same plan, stays."""
    out = Path(cfg.out)
    named = None if cfg.vae == "pca" else load_vae(cfg.vae)
    (named or pixel(8)).latent_shape(cfg.resolution)                            # before anything is read
    source = open_source(cfg.data, cfg.resolution)
    vae = (named or fitted(out, source)).to(ranks.device)                       # every rank for itself, the same
    shape = list(raw_latents(vae, torch.zeros(1, 3, cfg.resolution, cfg.resolution, device=ranks.device)).shape[1:])
    per = max(SHARD // (math.prod(shape) * (1 + cfg.flip) * 2), 1)
    plan = {"version": VERSION, "data": cfg.data, "resolution": cfg.resolution, "crop": "center", "resize": "lanczos", "flip": cfg.flip,
            "dtype": cfg.dtype, "batch": cfg.batch, "images": len(source.names), "source": source.hash, "vae": vae.mark,
            "shape": shape, "shard": per}
    held: list[Any] = []                                                        # the lock, until this process ends
    ranks.share(lambda: begin(out, plan, vae, held))
    numbers = range(ranks.rank, -(-plan["images"] // per), ranks.world)
    ranks.barrier()                                                             # nobody writes before the plan is agreed on
    with tqdm(total=len(numbers) * per, unit="img", desc=f"encoding to {out}", disable=None if ranks.rank == 0 else True) as bar:
        for k in numbers:
            path = shard_path(out, k)
            if not sound(path, plan):
                write_shard(path, plan, k, source, vae, ranks.device)
            bar.update(per)
    ranks.barrier()
    ranks.share(lambda: finish(out, plan, source))


def fitted(out: Path, source: Source) -> AnyVAE:
    """pca, fitted once: what is in the cache already stays, since another number of threads may round it otherwise."""
    if (out / "vae.safetensors").exists() and (vae := load_vae(out / "vae.safetensors")).name == "pca":
        return vae
    return fit_pca(to_float(torch.stack([torch.from_numpy(source.pixel(i).copy()).permute(2, 0, 1) for i in range(min(len(source.names), enough(source.resolution)))])))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the cache, or a UserError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}).  Remove the cache and encode it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds {type(value).__name__}, wanted an object.  Remove the cache and encode it again.")
    return value


def begin(out: Path, plan: dict[str, Any], vae: AnyVAE, held: list[Any]) -> None:
    """Write the plan, or compare it with the one that is there; and lock the folder."""
    make_dir(out)
    held.append(lock(out))
    if (out / "plan.json").exists():
        differs = differences(read_json(out / "plan.json"), plan)
        if differs:
            raise UserError(f"{out} was begun with another plan: {differs}.  Give another --out, or remove it.")
    elif [p for p in out.iterdir() if not p.name.startswith(".")]:              # what a kill leaves behind begins with a dot
        raise UserError(f"{out} is there and is not a cache.  Give another --out.")
    write_text(out / "plan.json", json.dumps(plan, indent=1, sort_keys=True) + "\n")
    if not (out / "vae.safetensors").exists():
        save_vae(out / "vae.safetensors", vae, weights=False)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """"resolution 64, now 128"; hashes are named, not shown."""
    named = {"source": "the images or their tags", "vae": "the autoencoder"}
    return ", ".join(f"{named[k]} changed" if k in named else f"{k} {old.get(k)}, now {new.get(k)}"
                     for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))


def shard_path(out: Path, k: int) -> Path:
    return out / f"shard-{k:05d}.safetensors"


def sound(path: Path, plan: dict[str, Any], sha256: str = "") -> bool:
    """Is this a whole shard of this plan? Its payload is read."""
    try:
        box = open_weights(path)
        return box.meta["plan"] == digest(plan) and hashlib.sha256(raw_bytes(box["latents"])).hexdigest() == box.meta["sha256"] == (sha256 or box.meta["sha256"])
    except (UserError, KeyError):
        return False


@torch.no_grad()
def write_shard(path: Path, plan: dict[str, Any], k: int, source: Source, vae: AnyVAE, device: torch.device) -> None:
    """Encode images k·per … and write them with their checksum and their part of the statistics."""
    per, dtype = plan["shard"], PRECISION[plan["dtype"]]
    index, parts = range(k * per, min((k + 1) * per, plan["images"])), []
    sums = torch.zeros(3, vae.channels, dtype=torch.float64)                    # of the model-space latents: number, values, squares
    for start in range(index.start, index.stop, plan["batch"]):
        chunk = range(start, min(start + plan["batch"], index.stop))
        images = to_float(torch.stack([torch.from_numpy(source.pixel(i).copy()).permute(2, 0, 1) for i in chunk])).to(device)
        both = torch.cat([images, images.flip(-1)]) if plan["flip"] else images     # a mirrored latent is not the latent of the mirrored image
        raw = raw_latents(vae, both)
        kept = raw.to(dtype)
        if not kept.isfinite().all():
            bad = source.names[chunk[int((~kept.isfinite()).flatten(1).any(1).nonzero()[0]) % len(chunk)]]
            raise UserError(f"the latents of {bad} do not fit {plan['dtype']} (largest {float(raw.abs().max()):.3g}).  Use --dtype bf16.")
        z = from_raw(vae, kept).double().cpu()
        sums += torch.stack([torch.full((vae.channels,), z.numel() / vae.channels), z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])
        parts.append(kept.cpu().unflatten(0, (-1, len(chunk))).transpose(0, 1))
    latents = torch.cat(parts).contiguous()
    meta = {"plan": digest(plan), "sha256": hashlib.sha256(raw_bytes(latents)).hexdigest(), "sums": json.dumps(sums.tolist())}
    stream_tensors(path, {"latents": (dtype, tuple(latents.shape))}, meta, lambda name: latents)


def finish(out: Path, plan: dict[str, Any], source: Source) -> None:
    """The index and, from the shards' headers, the manifest."""
    names = [name.encode("utf-8", "surrogateescape") for name in source.names]
    first = np.stack([source.pixel(i) for i in range(min(CHECKED, len(names)))])
    tags = source.table
    index = {"names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8), "first": torch.from_numpy(first),
             "name_ends": torch.tensor([len(name) for name in names]).cumsum(0), "held": torch.from_numpy(source.held.astype(np.int64)),
             "tag_starts": torch.from_numpy(tags.starts), "tag_ids": torch.from_numpy(tags.ids)}
    write_tensors(out / "index.safetensors", index, {"kind": "latent cache", "vocabulary": tags.vocabulary, "notes": source.notes,
                                                     "unreadable": source.unreadable})
    foreign = [k for k in range(-(-plan["images"] // plan["shard"])) if open_weights(shard_path(out, k)).meta.get("plan") != digest(plan)]
    if foreign:
        raise UserError(f"{shard_path(out, foreign[0])} was written by a rank that saw other images or another autoencoder.  Do all ranks see the same files?")
    shards = [open_weights(shard_path(out, k)) for k in range(-(-plan["images"] // plan["shard"]))]
    total = torch.tensor([json.loads(box.meta["sums"]) for box in shards], dtype=torch.float64).sum(0)
    mean = total[1] / total[0]
    std = (total[2] / total[0] - mean.square()).clamp(min=0).sqrt()
    overall = float(total[1].sum() / total[0].sum())
    spread = float((total[2].sum() / total[0].sum() - overall ** 2).clamp(min=0).sqrt())
    manifest = {"plan": plan, "mean": overall, "std": spread, "channel_mean": mean.tolist(), "channel_std": std.tolist(),
                "index": hashlib.sha256((out / "index.safetensors").read_bytes()).hexdigest(),
                "shards": [{"file": box.path.name, "images": box.shape("latents")[0], "bytes": box.path.stat().st_size, "sha256": box.meta["sha256"]}
                           for box in shards]}
    write_text(out / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")


# ---- reading --------------------------------------------------------------------------------------------------------

class Names(Sequence):
    """Many texts as one: bytes, and where each ends."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.text[self.ends[i - 1] if i else 0:self.ends[i]].tobytes().decode("utf-8", "surrogateescape")


@dataclass
class LatentSource:
    """A cache, where a Source of images could be: what data.py asks for, and raw() instead of pixel()."""
    root: Path
    manifest: dict[str, Any]
    names: Names
    tags: TagTable
    held: np.ndarray                         # (n,) uint32: sources.held_hash of the names
    first: np.ndarray                        # (4, H, W, 3) uint8
    resolution: int
    unreadable: dict[str, str]
    hash: str
    notes: list[str] = field(default_factory=list)
    pixels: None = None
    crop: str = "center"

    @property
    def table(self) -> TagTable:
        return self.tags

    def __post_init__(self) -> None:
        plan = self.manifest["plan"]
        self.per, self.views = plan["shard"], 1 + plan["flip"]
        self.shape, self.kind = tuple(plan["shape"]), np.float16 if plan["dtype"] == "fp16" else np.int16
        self.size = 2 * math.prod(self.shape)
        self.files: dict[int, tuple[int, int]] = {}

    def shard(self, k: int) -> tuple[int, int]:
        """(file descriptor, where the latents begin) of shard k."""
        if k not in self.files:
            if len(self.files) >= OPEN:
                os.close(self.files.pop(next(iter(self.files)))[0])
            path, shard = shard_path(self.root, k), self.manifest["shards"][k]
            self.files[k] = os.open(path, os.O_RDONLY), shard["bytes"] - shard["images"] * self.views * self.size
        return self.files[k]

    def raw(self, i: int, mirrored: bool = False) -> Tensor:
        """What is kept of image i (C, h, w)."""
        k, j = divmod(int(i), self.per)
        file, start = self.files.get(k) or self.shard(k)
        value = np.empty(self.shape, self.kind)
        if os.preadv(file, (value,), start + (j * self.views + mirrored) * self.size) != self.size:
            raise UserError(f"{shard_path(self.root, k)} became shorter while it was read.  Check the cache with --verify.")
        tensor = torch.from_numpy(value)
        return tensor if self.kind is np.float16 else tensor.view(torch.bfloat16)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}                                   # a process that is not forked opens for itself


def is_cache(spec: str) -> bool:
    return (Path(spec) / "plan.json").is_file()


def open_cache(spec: str, resolution: int, flip: bool = False, crop: str = "center") -> LatentSource:
    """A finished cache, or what is wrong with it. Nothing in it is read but the manifest and the index."""
    root = Path(spec)
    if not (root / "manifest.json").is_file():
        raise UserError(f"the cache {root} is not finished.  Repeat the command that encodes it: python vae.py encode --out {root} …")
    manifest = read_json(root / "manifest.json")
    try:
        plan = manifest["plan"]
        if plan["version"] != VERSION:
            raise UserError(f"{root} is a cache of version {plan['version']}, wanted {VERSION}.  Encode it again.")
        short = [shard["file"] for shard in manifest["shards"] if not (root / shard["file"]).is_file() or
                 (root / shard["file"]).stat().st_size != shard["bytes"]]
        wanted = sum(shard["images"] for shard in manifest["shards"]) == plan["images"] and all(
            isinstance(manifest[key], float) for key in ("mean", "std")) and all(isinstance(plan[key], int) for key in ("shard", "flip", "resolution")) \
            and plan["dtype"] in PRECISION and all(isinstance(n, int) for n in plan["shape"]) and isinstance(manifest["index"], str)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / 'manifest.json'} is damaged ({type(error).__name__}: {error}).  Repeat the command that encodes the cache.") from None
    if not wanted:
        raise UserError(f"{root / 'manifest.json'} is damaged: its parts contradict each other.  Repeat the command that encodes the cache.")
    if short:
        raise UserError(f"{root}: {len(short)} of {len(manifest['shards'])} shards are missing or cut short, first {short[0]}.  Remove what is left "
                        "of them and repeat the command that encodes the cache.")
    for what, got, wanted, do in (("resolution", plan["resolution"], resolution, f"Use --resolution {plan['resolution']}, or encode again."),
                                  ("crop", "center", crop, "Leave --crop out; a cache holds the centre of each image.")):
        if got != wanted:
            raise UserError(f"the cache {root} was encoded with {what} {got}, wanted {wanted}.  {do}")
    if flip and not plan["flip"]:
        raise UserError(f"--flip, but the cache {root} has no mirrored images.  Encode it with --flip, or leave it out.")
    box = open_weights(root / "index.safetensors")
    meta, index = read_meta(box), {name: box[name].numpy() for name in box}
    if hashlib.sha256((root / "index.safetensors").read_bytes()).hexdigest() != manifest["index"]:
        raise UserError(f"{root / 'index.safetensors'}, the names and tags of the cache, is damaged.  Repeat the command that encodes it.")
    if not -0.5 <= manifest["mean"] <= 0.5 or not 0.5 <= manifest["std"] <= 2:
        print(f"warning: the latents of {root} have mean {manifest['mean']:.2f} and std {manifest['std']:.2f}; a U-Net wants about 0 and 1.  "
              "Is it the right autoencoder?", file=sys.stderr, flush=True)
    return LatentSource(root, manifest, Names(index["names"], index["name_ends"]), TagTable(meta["vocabulary"], index["tag_starts"], index["tag_ids"]),
                        index["held"].astype(np.uint32), index["first"], resolution, meta["unreadable"], digest(manifest), meta["notes"])


@lru_cache
def cache_vae(root: Path) -> AnyVAE:
    """The autoencoder of a cache."""
    return load_vae(root / "vae.safetensors")


@torch.no_grad()
def self_check(source: LatentSource, vae: AnyVAE) -> None:
    """Encode the first images again: stale caches, changed autoencoders and mixed-up shards end here."""
    if vae.mark != source.manifest["plan"]["vae"]:
        raise UserError(f"the cache {source.root} holds latents of another autoencoder than {vae.name}.  Leave --vae out, or encode again.")
    device = next(iter(vae.state_dict().values())).device
    now = raw_latents(vae, to_float(torch.from_numpy(source.first).permute(0, 3, 1, 2)).to(device)).cpu()
    kept = torch.stack([source.raw(i) for i in range(len(now))]).float()
    apart = float((now - kept).abs().max() / kept.std().clamp(min=1))
    if not apart < CLOSE:
        raise UserError(f"the cache {source.root} is stale or damaged: its first images are now encoded {apart:.3g} away (wanted below {CLOSE}).  "
                        "Check it with --verify, or encode it again.")


def verify(root: Path) -> list[str]:
    """What is wrong with a cache, file by file."""
    try:
        plan = read_json(root / "plan.json")
        source, wrong = open_cache(str(root), plan.get("resolution", 0)), []
    except UserError as error:
        return [str(error)]
    if differences(plan, source.manifest["plan"]):
        wrong.append("plan.json: not that of the manifest")
    for shard in tqdm(source.manifest["shards"], desc=f"reading {root}", unit="shard", disable=None, leave=False):
        wrong += [] if sound(root / shard["file"], source.manifest["plan"], shard["sha256"]) else [f"{shard['file']}: checksum"]
    if not wrong:
        self_check(source, cache_vae(root))
    return wrong


def main() -> None:
    """`python vae.py encode …`"""
    if sys.argv[1:2] != ["encode"] and not {"--help", "-h"} & set(sys.argv):
        raise UserError(f"command {' '.join(sys.argv[1:2])!r}: wanted encode.  See python vae.py --help.")
    cfg, dry_run = parse(Encode, __doc__, sys.argv[1 + (sys.argv[1:2] == ["encode"]):])
    if cfg.batch < 1:
        raise UserError(f"--batch {cfg.batch}: wanted at least 1.")
    if dry_run:
        print(cfg)
    elif cfg.verify:
        wrong = verify(Path(cfg.out)) if is_cache(cfg.out) else [f"{cfg.out} is not a cache."]
        print("\n".join([*wrong, "Repeat the command that encodes the cache: what is damaged is written again."] if wrong else
                        [f"{cfg.out}: latents, names and tags are as they were written."]))
        sys.exit(bool(wrong))
    else:
        ranks = join_ranks(cfg)
        encode(cfg, ranks)
        ranks.leave()
        if ranks.rank == 0:
            manifest = json.loads((Path(cfg.out) / "manifest.json").read_text())
            print(f"{manifest['plan']['images']:,} images in {len(manifest['shards'])} shards, mean {manifest['mean']:.3f}, std {manifest['std']:.3f}")
            print(cfg.out)
