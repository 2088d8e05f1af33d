"""The latent cache: a data set encoded once, so that training needs neither its images nor the encoder.

    python vae.py encode --data DIR --vae flux2 --resolution 256 --out CACHE     # also under torchrun; again = it goes on
    python vae.py encode --out CACHE --verify                                    # every byte against its checksum
    python train.py --data CACHE --resolution 256

    CACHE/plan.json                   what is encoded, how and on what: written first; a cache of another plan is refused
          vae.safetensors             the autoencoder, or where it is
          shard-00000.safetensors …   latents (n, 1 or 2, C, h, w): the posterior's mean before it is normalised, and of the mirrored image
          index.safetensors           names, tags, the first images
          manifest.json               plan, statistics, checksums of the other files and its own: written last
A shard is a function of the plan and its number, so ranks and interruptions leave no trace. Its last bits depend on torch, the
device and the number of threads: they are part of the plan, and whoever goes on uses as many threads as there were at first.
Latents are read with pread: of a mapped file, every page that was ever looked at, and its neighbours, counts as memory of the process.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from harness.cli import UserError
from data.images import to_float
from ckpt.containers import open_weights
from harness.files import raw_bytes, read_meta, write_tensors
from data.tags import TagTable
from vae import VAE, AnyVAE, load_vae

VERSION = 2
OPEN = 256                                   # shards kept open; a process may have 1024 files
CHECKED = 4                                  # images kept in the index, to be encoded again when a run opens the cache
CLOSE = 2e-2                                 # how far the result may be away, beyond rounding, in units of the latents' standard deviation or 1
PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


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


def raw_mark(vae: AnyVAE) -> str:
    """Equal raw marks, equal raw latents: the two layouts of flux2 are views of the same."""
    return vae.raw_mark if isinstance(vae, VAE) else vae.mark


# ---- files and their checksums --------------------------------------------------------------------------------------

def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def identity(plan: dict[str, Any]) -> str:
    """Equal identities, equal shards. How --data was spelled is a note; what it led to is in the plan as a hash."""
    return digest({key: value for key, value in plan.items() if key != "data"})


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(value: dict[str, Any]) -> str:
    """A JSON object with its own checksum, as text. There is only one text for it, so a change of any bit shows."""
    return json.dumps({**value, "sha256": digest(value)}, indent=1, sort_keys=True) + "\n"


def read_sealed(path: Path, do: str = "Repeat the command that encodes the cache.") -> dict[str, Any]:
    """The inverse of sealed(), or a UserError."""
    try:
        text = path.read_bytes()
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}).  {do}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds {type(value).__name__}, wanted an object.  {do}")
    if "sha256" not in value:
        raise UserError(f"{path} is damaged, or of an older version: it has no checksum.  {do}")
    value.pop("sha256")
    if text != sealed(value).encode():
        raise UserError(f"{path} is damaged: it does not match its own checksum.  {do}")
    return value


def shard_path(out: Path, k: int) -> Path:
    return out / f"shard-{k:05d}.safetensors"


def save_shard(out: Path, plan: dict[str, Any], k: int, latents: Tensor, sums: Tensor) -> None:
    """latents (n, 1 or 2, C, h, w) with their checksum and their part of the statistics."""
    meta = {"plan": identity(plan), "sha256": hashlib.sha256(raw_bytes(latents)).hexdigest(), "sums": sums.tolist()}
    write_tensors(shard_path(out, k), {"latents": latents}, meta)


def shard_record(out: Path, k: int) -> dict[str, Any]:
    """What the manifest keeps of shard k. Its latents are not read; their checksum is in its header, which is."""
    box = open_weights(shard_path(out, k))
    size = box.path.stat().st_size
    with open(box.path, "rb") as file:
        head = file.read(size - box.dtype("latents").itemsize * math.prod(box.shape("latents")))
    return {"file": box.path.name, "images": box.shape("latents")[0], "bytes": size, "head": hashlib.sha256(head).hexdigest(),
            "sha256": read_meta(box)["sha256"]}


def sound(out: Path, plan: dict[str, Any], k: int, record: dict[str, Any] | None = None) -> bool:
    """Is shard k there, whole and of this plan (and the one that was recorded)? All of it is read."""
    try:
        box = open_weights(shard_path(out, k))
        meta, n = read_meta(box), min(plan["shard"], plan["images"] - k * plan["shard"])
        return box.header() == {"latents": (PRECISION[plan["dtype"]], (n, 1 + plan["flip"], *plan["shape"]))} and meta["plan"] == identity(plan) \
            and hashlib.sha256(raw_bytes(box["latents"])).hexdigest() == meta["sha256"] and record in (None, shard_record(out, k))
    except (UserError, KeyError):
        return False


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
            try:
                self.files[k] = os.open(path, os.O_RDONLY), shard["bytes"] - shard["images"] * self.views * self.size
            except OSError as error:                                            # a loader's worker would wrap it in a traceback
                raise UserError(f"{path}: {error.strerror}; it was there when the data was opened.  Check the cache with --verify.") from None
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
    manifest = read_sealed(root / "manifest.json")
    plan = manifest["plan"]
    if plan["version"] != VERSION:
        raise UserError(f"{root} is a cache of version {plan['version']}, wanted {VERSION}.  Encode it again.")
    short = [shard["file"] for shard in manifest["shards"] if not (root / shard["file"]).is_file() or
             (root / shard["file"]).stat().st_size != shard["bytes"]]
    if short:
        raise UserError(f"{root}: {len(short)} of {len(manifest['shards'])} shards are missing or cut short, first {short[0]}.  Repeat the command "
                        "that encodes the cache.")
    for what, got, wanted, do in (("resolution", plan["resolution"], resolution, f"Use --resolution {plan['resolution']}, or encode again."),
                                  ("crop", "center", crop, "Leave --crop out; a cache holds the centre of each image.")):
        if got != wanted:
            raise UserError(f"the cache {root} was encoded with {what} {got}, wanted {wanted}.  {do}")
    if flip and not plan["flip"]:
        raise UserError(f"--flip, but the cache {root} has no mirrored images.  Encode it with --flip, or leave it out.")
    for name, what in (("index", "the names and tags of the cache"), ("vae", "its autoencoder, or where that is")):
        file = root / f"{name}.safetensors"
        if not file.is_file() or file_digest(file) != manifest[name]:
            raise UserError(f"{file}, {what}, is damaged.  Repeat the command that encodes the cache.")
    box = open_weights(root / "index.safetensors")
    meta, index = read_meta(box), {name: box[name].numpy() for name in box}
    if not -0.5 <= manifest["mean"] <= 0.5 or not 0.5 <= manifest["std"] <= 2:
        print(f"warning: the latents of {root} have mean {manifest['mean']:.2f} and std {manifest['std']:.2f}; a U-Net wants about 0 and 1.  "
              "Is it the right autoencoder?", file=sys.stderr, flush=True)
    tags = TagTable(meta["vocabulary"], index["tag_starts"], index["tag_ids"])
    return LatentSource(root, manifest, Names(index["names"], index["name_ends"]), tags, index["held"].astype(np.uint32), index["first"], resolution, meta["unreadable"],
                        digest([identity(plan), manifest["index"], manifest["shards"]]), meta["notes"])


@lru_cache
def cache_vae(root: Path) -> AnyVAE:
    """The autoencoder of a cache."""
    return load_vae(root / "vae.safetensors")


@torch.no_grad()
def self_check(source: LatentSource, vae: AnyVAE) -> None:
    """Encode the first images again: stale caches, changed autoencoders and mixed-up shards end here."""
    if raw_mark(vae) != source.manifest["plan"]["vae"]:
        raise UserError(f"the cache {source.root} holds latents of another autoencoder than {vae.name}.  Leave --vae out, or encode again.")
    device = next(iter(vae.state_dict().values())).device
    now = raw_latents(vae, to_float(torch.from_numpy(source.first).permute(0, 3, 1, 2)).to(device)).cpu()
    kept = torch.stack([source.raw(i) for i in range(len(now))]).float()
    rounding = kept.abs() * torch.finfo(PRECISION[source.manifest["plan"]["dtype"]]).eps / 2       # bf16 keeps 50 as far as 0.125 away
    apart = float(((now - kept).abs() - rounding).max() / kept.std().clamp(min=1))
    if not apart < CLOSE:
        raise UserError(f"the cache {source.root} is stale or damaged: its first images are now encoded {apart:.3g} away (wanted below {CLOSE}).  "
                        "Check it with --verify, or encode it again.")


def verify(root: Path, vae: str = "pca") -> list[str]:
    """What is wrong with a cache, file by file. `vae` is where the autoencoder lies now, if that is not where it was."""
    try:
        plan = read_sealed(root / "plan.json")
        source, wrong = open_cache(str(root), plan["resolution"]), []
    except UserError as error:
        return [str(error)]
    if plan != source.manifest["plan"]:
        wrong.append("plan.json: not that of the manifest")
    for k, shard in enumerate(tqdm(source.manifest["shards"], desc=f"reading {root}", unit="shard", disable=None, leave=False)):
        wrong += [] if sound(root, plan, k, shard) else [f"{shard['file']}: checksum"]
    if not wrong:
        self_check(source, cache_vae(root) if vae == "pca" else load_vae(vae))
    return wrong
