"""The latent cache: a data set encoded once, so that training needs no images and no encoder.

    python -m data.encode --data DIR --vae flux2 --resolution 256 --out CACHE
    python train.py --data CACHE --resolution 256

A cache is a folder:

    plan.json                   what is encoded, how and on what: written first
    vae.safetensors             the autoencoder, or where it is
    shard-00000.safetensors …   latents (n, 1 or 2, C, h, w) of one shape: the posterior's mean
                                before it is normalised, and that of the mirrored image
    index.safetensors           names, tags, captions if there are any, the first images; sizes
                                of those in buckets
    contents.safetensors        a hash of every image, of sources that were read from files
    manifest.json               plan, statistics, checksums of the other files and its own:
                                written last
    .source.safetensors         names, sizes and times of the files it was made of, see stamps.py

A shard is a function of the plan and its number, so ranks and interruptions leave no trace. Its
last bits depend on torch, the device and the number of threads: they are part of the plan, and
whoever goes on uses as many threads as there were at first. Latents are read with pread: of a
mapped file, every page that was ever looked at, and its neighbours, counts as memory of the
process.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ckpt.containers import open_weights
from ckpt.hub import quoted
from ckpt.notes import LinearNote, VaeNote
from data.buckets import Buckets, Frames
from data.images import to_float
from data.shards import Layout, buckets_of
from data.tags import TagTable
from harness.cli import UserError
from harness.files import Container, raw_bytes, read_meta, write_tensors
from harness.files import digest as file_digest
from harness.reading import read_file
from harness.typed import Count, Hash, Length, Open, Range, check, parse_json
from vae import AnyVAE, choose

VERSION = 2
OPEN = 256  # shards kept open; a process may have 1024 files
CHECKED = 4  # images kept in the index, to be encoded again when a run opens the cache
# How far the result may be away, beyond rounding, in units of the latents' standard deviation or 1.
CLOSE = 2e-2
PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}
AGAIN = "Repeat the command that encodes the cache."


# ---- what its files say --------------------------------------------------------------------------


@dataclass
class InBuckets:
    """The flags of pictures that keep their shape (dataset.BucketFlags)."""

    area: str
    step: Annotated[int, Range(1, 8192)]
    small: Literal["upscale", "skip"]


@dataclass
class Plan:
    """What is encoded, how and on what (encode.make_plan)."""

    version: Literal[VERSION]
    data: str
    resolution: Annotated[int, Range(1, 65536)]
    crop: Literal["center"]
    resize: Literal["lanczos"]
    flip: bool
    dtype: Literal["fp16", "bf16"]
    batch: Annotated[int, Range(1, 65536)]
    images: Annotated[int, Range(1, 10**10)]
    source: Hash
    vae: str
    shape: Annotated[list[Annotated[int, Range(1, 65536)]], Length(3, 3)]
    shard: Annotated[int, Range(1, 10**10)]
    threads: Annotated[int, Range(1, 65536)]
    torch: str
    device: str
    written_for: Hash = ""  # the source when the shards were written, where only tags changed since
    # Of pictures that keep their shape: then resolution and shape are those of the square ones.
    buckets: InBuckets | None = None
    # Width, height and images of each bucket that has any.
    counts: list[Annotated[list[Annotated[int, Range(1, 10**10)]], Length(3, 3)]] = ()


@dataclass
class Shard(Open):
    """What the manifest says of a shard (shard_record)."""

    file: str
    images: Annotated[int, Range(1, 10**10)]
    bytes: Count
    head: Hash
    sha256: Hash


@dataclass
class Manifest(Open):
    """What manifest.json says (encode.finish)."""

    plan: Plan
    mean: Annotated[float, Range(-1e6, 1e6)]
    std: Annotated[float, Range(0, 1e6)]
    index: Hash
    vae: Hash
    shards: list[Shard]
    contents: Hash = ""
    # Of the index as it would be without captions, where it has some: those are compared only by
    # runs that tell them (training/texts.py). Caches that are older have none.
    bare: Hash = ""


@dataclass
class ShardMeta(Open):
    """What a shard says of itself."""

    plan: Hash
    sha256: Hash
    sums: Annotated[list[list[float]], Length(3, 3)]


@dataclass
class IndexMeta(Open):
    """What the index says beside its arrays."""

    vocabulary: list[str]
    notes: list[str]
    unreadable: dict[str, str]


# ---- files and their checksums ------------------------------------------------------------------


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def identity(plan: dict[str, Any]) -> str:
    """Equal identities, equal shards. How --data was spelled is a note; what it led to is in the
    plan as a hash: where only tags changed since, as it was when the shards were written."""
    own = {key: value for key, value in plan.items() if key not in ("data", "written_for")}
    if "written_for" in plan:
        own["source"] = plan["written_for"]
    return digest(own)


def retagged(old: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The plan of a cache whose shards stay while names or tags change to those of another plan."""
    first = old.get("written_for", old["source"])
    own = {key: value for key, value in old.items() if key != "written_for"}
    own |= {"data": plan["data"], "source": plan["source"]}
    return own if first == plan["source"] else {**own, "written_for": first}


def sealed(value: dict[str, Any]) -> str:
    """A JSON object with its own checksum, as text. There is only one text for it, so a change of
    any bit shows."""
    return json.dumps({**value, "sha256": digest(value)}, indent=1, sort_keys=True) + "\n"


def read_sealed(path: Path, kind: Any = dict[str, Any], do: str = AGAIN) -> dict[str, Any]:
    """The inverse of sealed(), checked by a dataclass, or a UserError."""
    try:
        text = read_file(path)
    except OSError as error:
        raise UserError(f"{path} is damaged ({type(error).__name__})", do=do) from None
    value = check(parse_json(text, path, do), dict[str, Any], path, do)
    if "sha256" not in value:
        raise UserError(f"{path} is damaged, or of an older version: it has no checksum", do=do)
    value.pop("sha256")
    if text != sealed(value).encode():
        raise UserError(f"{path} is damaged: it does not match its own checksum", do=do)
    return check(value, kind, path, do)


def read_plan(root: Path, do: str = AGAIN) -> dict[str, Any]:
    return read_sealed(root / "plan.json", Plan, do)


def read_manifest(root: Path) -> dict[str, Any]:
    return read_sealed(root / "manifest.json", Manifest)


def shard_meta(box: Container) -> dict[str, Any]:
    """What a shard says of itself."""
    return check(read_meta(box), ShardMeta, box.path, AGAIN)


def shard_path(out: Path, k: int) -> Path:
    return out / f"shard-{k:05d}.safetensors"


def save_shard(out: Path, plan: dict[str, Any], k: int, latents: Tensor, sums: Tensor) -> None:
    """latents (n, 1 or 2, C, h, w) with their checksum and their part of the statistics."""
    checksum = hashlib.sha256(raw_bytes(latents)).hexdigest()
    meta = {"plan": identity(plan), "sha256": checksum, "sums": sums.tolist()}
    write_tensors(shard_path(out, k), {"latents": latents}, meta)


def shard_record(out: Path, k: int) -> dict[str, Any]:
    """What the manifest keeps of shard k. Its latents are not read; their checksum is in its
    header, which is."""
    box = open_weights(shard_path(out, k))
    size = box.path.stat().st_size
    shape = box.shape("latents")
    with open(box.path, "rb") as file:
        head = file.read(size - box.dtype("latents").itemsize * math.prod(shape))
    return {
        "file": box.path.name,
        "images": shape[0],
        "bytes": size,
        "head": hashlib.sha256(head).hexdigest(),
        "sha256": shard_meta(box)["sha256"],
    }


def verify_shard(
    out: Path, plan: dict[str, Any], k: int, record: dict[str, Any] | None = None
) -> bool:
    """Is shard k there, whole and of this plan (and the one that was recorded)? All of it is
    read."""
    shard = Layout(plan)[k]
    header = {
        "latents": (PRECISION[plan["dtype"]], (shard.images, 1 + plan["flip"], *shard.shape))
    }
    try:
        box = open_weights(shard_path(out, k))
        meta = shard_meta(box)
        if box.header() != header or meta["plan"] != identity(plan):
            return False
        if hashlib.sha256(raw_bytes(box["latents"])).hexdigest() != meta["sha256"]:
            return False
        return record is None or record == shard_record(out, k)
    except (UserError, KeyError):
        return False


# ---- reading ------------------------------------------------------------------------------------


class Names(Sequence):
    """Many texts as one: bytes, and where each ends."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text = text
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = self.ends[i - 1] if i else 0
        return self.text[start : self.ends[i]].tobytes().decode("utf-8", "surrogateescape")


@dataclass
class LatentSource:
    """A cache in the place of a Source of images, with raw() instead of pixel()."""

    root: Path
    manifest: dict[str, Any]
    names: Names
    tags: TagTable
    held: np.ndarray  # (n,) uint32: sources.held_hash of the names
    first: np.ndarray  # (4, H, W, 3) uint8
    resolution: int
    unreadable: dict[str, str]
    hash: str
    notes: list[str] = field(default_factory=list)
    watch: Any = None  # data.watch.Watch, once something is read
    pixels: None = None
    crop: str = "center"
    frames: Frames | None = None
    captions: Callable[[], list[str]] | None = None  # as a Source's

    @property
    def table(self) -> TagTable:
        return self.tags

    def __post_init__(self) -> None:
        plan = self.manifest["plan"]
        self.layout = Layout(plan)
        self.views = 1 + plan["flip"]
        self.dtype = np.float16 if plan["dtype"] == "fp16" else np.int16  # numpy has no bf16
        self.files: dict[int, tuple[int, int]] = {}

    def shard(self, k: int) -> tuple[int, int]:
        """(file descriptor, where the latents begin) of shard k."""
        if k in self.files:
            return self.files[k]
        if len(self.files) >= OPEN:
            os.close(self.files.pop(next(iter(self.files)))[0])
        path = shard_path(self.root, k)
        shard = self.manifest["shards"][k]
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:  # a loader's worker would wrap it in a traceback
            raise UserError(
                f"{path}: {error.strerror}; it was there when the data was opened",
                do="Check the cache with --verify.",
            ) from None
        self.files[k] = file, self.head_bytes(k)
        return self.files[k]

    def head_bytes(self, k: int) -> int:
        """Where the latents begin in shard k."""
        shard = self.manifest["shards"][k]
        return shard["bytes"] - shard["images"] * self.views * self.layout[k].latent_bytes

    def raw(self, i: int, mirrored: bool = False) -> Tensor:
        """What is kept of image i (C, h, w)."""
        k = int(self.layout.shard_of(int(i)))
        file, start = self.shard(k)
        first, _, shape = shard = self.layout[k]
        value = np.empty(shape, self.dtype)
        place = start + ((int(i) - first) * self.views + mirrored) * shard.latent_bytes
        if os.preadv(file, (value,), place) != shard.latent_bytes:
            raise UserError(
                f"{shard_path(self.root, k)} became shorter while it was read",
                do="Check the cache with --verify.",
            )
        tensor = torch.from_numpy(value)
        return tensor if self.dtype is np.float16 else tensor.view(torch.bfloat16)

    def __getstate__(self) -> dict[str, Any]:
        # A process that is not forked opens for itself, and watches nothing.
        return {**self.__dict__, "files": {}, "watch": None}


def is_cache(spec: str) -> bool:
    return (Path(spec) / "plan.json").is_file()


def contents_path(root: Path) -> Path:
    """Where a cache keeps a hash of every image, with which data.reuse knows them again."""
    return root / "contents.safetensors"


def vae_path(root: Path | str) -> Path:
    """Where a cache keeps its autoencoder."""
    return Path(root) / "vae.safetensors"


def encode_command(root: Path, plan: dict[str, Any]) -> str:
    """The command that a cache of this plan was made by, which mends it too."""
    words = ["--data", plan["data"], "--resolution", plan["resolution"]]
    vae = autoencoder_name(root)
    for flag, value, default in (
        ("--vae", vae, "pca"),
        ("--dtype", plan["dtype"], "fp16"),
        ("--batch", plan["batch"], 16),
    ):
        if value != default:
            words += [flag, value]
    if plan["flip"]:
        words.append("--flip")
    if buckets := plan.get("buckets"):
        words += ["--buckets", "--area", buckets["area"], "--step", buckets["step"]]
        words += ["--small", buckets["small"]]
    if plan["device"].startswith("cpu"):
        words += ["--device", "cpu"]
    words += ["--out", root]
    return " ".join(["python -m data.encode", *(quoted(str(word)) for word in words)])


def autoencoder_name(root: Path) -> str:
    """A cache's autoencoder as --vae names it."""
    meta = read_meta(open_weights(vae_path(root)))
    check(meta, VaeNote if "source" in meta else LinearNote, vae_path(root))
    if "source" not in meta:
        return meta["name"]
    return ":".join(filter(None, (meta["family"], meta["latents"], meta["source"])))


def open_cache(
    spec: str,
    resolution: int,
    flip: bool = False,
    crop: str = "center",
    buckets: Buckets | None = None,
) -> LatentSource:
    """A finished cache, or what is wrong with it. Nothing in it is read but the manifest and the
    index."""
    root = Path(spec)
    if not (root / "manifest.json").is_file():
        raise UserError(
            f"the cache {root} is not finished",
            do=f"Repeat the command that encodes it: python -m data.encode --out {root} …",
        )
    manifest = read_manifest(root)
    check_whole(root, manifest)
    check_plan(root, manifest["plan"], resolution, flip, crop, buckets)
    check_statistics(root, manifest)
    box = open_weights(root / "index.safetensors")
    meta = check(read_meta(box), IndexMeta, box.path, AGAIN)
    index = {name: box[name].numpy() for name in box}
    check_index(box.path, index, len(meta["vocabulary"]), manifest["plan"])
    tags = TagTable(meta["vocabulary"], index["tag_starts"], index["tag_ids"])
    captions = None
    if "captions" in index:
        captions = partial(list, Names(index["captions"], index["caption_ends"]))
    return LatentSource(
        root=root,
        manifest=manifest,
        names=Names(index["names"], index["name_ends"]),
        tags=tags.of_one_form(),
        held=index["held"].astype(np.uint32),
        first=index["first"],
        resolution=resolution,
        unreadable=meta["unreadable"],
        hash=digest([identity(manifest["plan"]), bare_index(manifest), manifest["shards"]]),
        notes=meta["notes"],
        frames=frames_of(box.path, index, manifest["plan"], buckets),
        captions=captions,
    )


def bare_index(manifest: dict[str, Any]) -> str:
    """The hash of a cache's index without captions."""
    return manifest.get("bare") or manifest["index"]


def check_whole(root: Path, manifest: dict[str, Any]) -> None:
    """Of this version, with all its files, as far as sizes and the checksums of small ones show."""
    plan, short = manifest["plan"], []
    for k, shard in enumerate(manifest["shards"]):
        file = shard_path(root, k)
        # A name in a manifest is no path: it could lead out of the folder.
        if shard["file"] != file.name:
            raise UserError(
                f"{root / 'manifest.json'} names shard {k} {shard['file']!r}, wanted {file.name}",
                do=AGAIN,
            )
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            size = f"{file.stat().st_size:,} bytes" if file.is_file() else "not there"
            short.append(f"{file.name} ({size}, wanted {shard['bytes']:,})")
    counts = [shard["images"] for shard in manifest["shards"]]
    layout, views = Layout(plan), 1 + plan["flip"]
    sound = layout.firsts[-1] == plan["images"] and len(layout) == len(counts)
    sound = sound and counts == [shard.images for shard in layout]
    tiny = sound and any(
        shard["bytes"] < layout[k].images * views * layout[k].latent_bytes
        for k, shard in enumerate(manifest["shards"])
    )
    if tiny or not sound:
        raise UserError(
            f"{root / 'manifest.json'}: its {len(counts)} shards do not hold the "
            f"{plan['images']:,} images of its plan",
            do=AGAIN,
        )
    small = {"index": "the names and tags of the cache", "vae": "its autoencoder, or where that is"}
    for name, what in small.items():
        file = root / f"{name}.safetensors"
        if not file.is_file() or file_digest(file) != manifest[name]:
            raise UserError(f"{file}, {what}, is damaged", do=AGAIN)
    if short:
        raise UserError(
            f"{root}: {len(short)} of {len(manifest['shards'])} shards are missing or cut short, "
            f"first {short[0]}",
            do=f"Encode them again, and nothing else: {encode_command(root, manifest['plan'])}",
        )


def check_index(
    path: Path, index: dict[str, np.ndarray], tags: int, plan: dict[str, Any]
) -> None:
    """Refuse arrays that are not the names and tags of a plan's images."""
    images = plan["images"]
    wanted = {
        "names": (np.uint8, 1),
        "name_ends": (np.int64, 1),
        "held": (np.int64, 1),
        "tag_starts": (np.int64, 1),
        "tag_ids": (np.int32, 1),
        "first": (np.uint8, 4),
    }
    if plan.get("buckets"):
        wanted["originals"] = (np.int64, 2)
    if "captions" in index:
        wanted |= {"captions": (np.uint8, 1), "caption_ends": (np.int64, 1)}
    sound = {name: (x.dtype.type, x.ndim) for name, x in index.items()} == wanted
    if sound:
        ends, starts, ids = index["name_ends"], index["tag_starts"], index["tag_ids"]
        counts = (len(ends), len(index["held"]), len(starts) - 1, len(index["first"]))
        sound = counts == (images, images, images, min(CHECKED, Layout(plan).firsts[1]))
        sound = sound and is_partition(ends, len(index["names"]))
        sound = sound and starts[0] == 0 and is_partition(starts, len(ids))
        sound = sound and not (len(ids) and (ids.min() < 0 or ids.max() >= tags))
        sound = sound and 0 <= index["held"].min() and index["held"].max() < 2**32
        sound = sound and index["first"].shape[3] == 3
    if sound and "captions" in index:
        ends = index["caption_ends"]
        sound = len(ends) == images and is_partition(ends, len(index["captions"]))
    if not sound:
        raise UserError(f"{path} does not hold the names and tags of {images:,} images", do=AGAIN)


def frames_of(
    path: Path, index: dict[str, np.ndarray], plan: dict[str, Any], buckets: Buckets | None
) -> Frames | None:
    """The bucket of each image of a cache, which has to be the one that it was encoded for."""
    if buckets is None:
        return None
    originals = index["originals"]
    sound = originals.shape == (plan["images"], 2) and originals.min() > 0
    if sound:
        frames = buckets.assign(originals)
        now = np.array(buckets.sizes)[frames.bucket]
        sizes = [[width, height] for width, height, _ in plan["counts"]]
        sound = np.array_equal(now, np.repeat(sizes, [n for _, _, n in plan["counts"]], axis=0))
    if not sound:
        raise UserError(f"{path}: its images are not of the buckets of the plan", do=AGAIN)
    return frames


def is_partition(ends: np.ndarray, n: int) -> bool:
    """Do these places cut n things into pieces, in order?"""
    return bool(ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] == n)


def check_plan(
    root: Path,
    plan: dict[str, Any],
    resolution: int,
    flip: bool,
    crop: str,
    buckets: Buckets | None = None,
) -> None:
    """Does a cache hold what is asked for?"""
    if buckets_of(plan) != buckets:
        how = plan.get("buckets")
        flags = "--area {area} --step {step} --small {small}".format_map(how) if how else ""
        raise UserError(
            f"the cache {root} holds {f'buckets of {flags}' if how else 'square pictures'}",
            do=f"Use --buckets {flags}, or encode again." if how else "Leave --buckets out.",
        )
    if plan["resolution"] != resolution:
        raise UserError(
            f"the cache {root} was encoded with resolution {plan['resolution']}, wanted "
            f"{resolution}",
            do=f"Use --resolution {plan['resolution']}, or encode again.",
        )
    if crop != "center":
        raise UserError(
            f"the cache {root} was encoded with crop center, wanted {crop}",
            do="Leave --crop out; a cache holds the centre of each image.",
        )
    if flip and not plan["flip"]:
        raise UserError(
            f"--flip, but the cache {root} has no mirrored images",
            do="Encode it with --flip, or leave it out.",
        )


def check_statistics(root: Path, manifest: dict[str, Any]) -> None:
    mean, std = manifest["mean"], manifest["std"]
    if not -0.5 <= mean <= 0.5 or not 0.5 <= std <= 2:
        print(
            f"warning: the latents of {root} have mean {mean:.2f} and std {std:.2f}; a U-Net wants "
            "about 0 and 1.  Is it the right autoencoder?",
            file=sys.stderr,
            flush=True,
        )


# ---- is it still true? --------------------------------------------------------------------------


@torch.no_grad()
def self_check(source: LatentSource, vae: AnyVAE) -> None:
    """Encode the first images again: stale caches, changed autoencoders and mixed-up shards end
    here."""
    plan = source.manifest["plan"]
    if vae.raw_fingerprint != plan["vae"]:
        raise UserError(
            f"the cache {source.root} holds latents of another autoencoder than {vae.name}",
            do="Leave --vae out, or encode again.",
        )
    device = next(iter(vae.state_dict().values())).device
    images = to_float(torch.from_numpy(source.first).permute(0, 3, 1, 2)).to(device)
    now = vae.raw(images).cpu()
    kept = torch.stack([source.raw(i) for i in range(len(now))]).float()
    if now.shape != kept.shape:
        raise UserError(
            f"the cache {source.root} says that its latents are {tuple(kept.shape[1:])}; its "
            f"autoencoder makes {tuple(now.shape[1:])} of its images",
            do="Check it with --verify, or encode it again.",
        )
    # bf16 keeps 50 as far as 0.125 away.
    rounding = kept.abs() * torch.finfo(PRECISION[plan["dtype"]]).eps / 2
    apart = float(((now - kept).abs() - rounding).max() / kept.std().clamp(min=1))
    if not apart < CLOSE:
        raise UserError(
            f"the cache {source.root} is stale or damaged: its first images are now encoded "
            f"{apart:.3g} away (wanted below {CLOSE})",
            do="Check it with --verify, or encode it again.",
        )


def verify(root: Path, vae: str = "pca") -> list[str]:
    """What is wrong with a cache, file by file. `vae` is where the autoencoder lies now, if that is
    not where it was."""
    try:
        plan = read_plan(root)
        source = open_cache(str(root), plan["resolution"], buckets=buckets_of(plan))
    except UserError as error:
        return [str(error)]
    wrong = []
    if plan != source.manifest["plan"]:
        wrong.append("plan.json: not that of the manifest")
    contents = source.manifest.get("contents")
    if contents and not (
        contents_path(root).is_file() and file_digest(contents_path(root)) == contents
    ):
        wrong.append(f"{contents_path(root).name}: checksum")
    shards = source.manifest["shards"]
    bar = tqdm(shards, desc=f"reading {root}", unit="shard", disable=None, leave=False)
    for k, shard in enumerate(bar):
        if not verify_shard(root, plan, k, shard):
            wrong.append(f"{shard['file']}: checksum")
    if not wrong:
        self_check(source, choose(vae, cached=vae_path(root)))
    return wrong
