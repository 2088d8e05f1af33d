"""What of a finished cache still holds after its images or tags changed.

Latents depend on an image and not on its name, tags or place, so the cache keeps a hash of every
image. Those that are still there are not encoded again: with other tags only, no shard changes;
else new shards are written into a folder of their own, .update, and then take the old ones' place.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckpt.containers import open_weights
from data.cache import (
    LatentSource,
    Names,
    contents_path,
    identity,
    open_cache,
    read_manifest,
    sealed,
    shard_path,
    verify_shard,
)
from data.shards import buckets_of
from data.sources import Source, content_hash
from data.tags import TagTable
from harness.cli import UserError
from harness.files import digest, write_tensors, write_text

MAY_CHANGE = {
    "data",
    "source",
    "written_for",
    "images",
    "counts",
}  # of a plan, without a latent becoming another


@dataclass
class Reuse:
    """The latents that an earlier cache has of the images of a source."""

    cache: LatentSource
    places: np.ndarray  # (n,): where the cache has image i, -1 = nowhere

    @property
    def in_place(self) -> bool:
        """Are they all where they should be?"""
        n = len(self.places)
        images = self.cache.manifest["plan"]["images"]
        return n == images and bool((self.places == np.arange(n)).all())

    def latents(self, i: int) -> torch.Tensor:
        """(1 or 2, C, h, w) of image i."""
        views = [self.cache.raw(self.places[i], bool(k)) for k in range(self.cache.views)]
        return torch.stack(views)

    def __str__(self) -> str:
        n, kept = len(self.places), int((self.places >= 0).sum())
        return f"{kept:,} of {n:,} images are encoded already, {n - kept:,} are not"


def write_contents(out: Path, source: Source) -> str:
    """Keep a hash of every image -> the file's checksum."""
    data = bytearray.fromhex("".join(source.contents))
    hashes = torch.frombuffer(data, dtype=torch.uint8).reshape(len(source.contents), -1)
    write_tensors(contents_path(out), {"contents": hashes}, {"kind": "contents of a cache"})
    return digest(contents_path(out))


def find_reuse(
    out: Path, old: dict[str, Any], plan: dict[str, Any], source: Source
) -> Reuse | None:
    """What the cache at `out`, of the plan `old`, has of a source; None where it cannot be told, or
    more than the source changed."""
    same = all(old.get(key) == plan[key] for key in plan.keys() - MAY_CHANGE)
    if not old or not same or not source.contents:
        return None
    try:
        manifest = read_manifest(out)
        if identity(manifest["plan"]) != identity(old):
            return None
        hashes = read_contents(out, manifest, source)
    except (UserError, OSError):
        return None
    if not hashes:
        return None
    reuse = Reuse(latents_of_cache(out, manifest), find_places(hashes, source.contents))
    if not reuse.in_place:
        # A damaged latent would get a new checksum: those shards are encoded again.
        shards = enumerate(manifest["shards"])
        damaged = [k for k, record in shards if not verify_shard(out, old, k, record)]
        reuse.places[np.isin(reuse.cache.layout.shard_of(reuse.places), damaged)] = -1
    return reuse


def read_contents(out: Path, manifest: dict[str, Any], source: Source) -> list[bytes]:
    """A hash of every image of a cache; [] if that cannot be told."""
    if "contents" in manifest:
        if digest(contents_path(out)) != manifest["contents"]:
            return []
        return [row.tobytes() for row in open_weights(contents_path(out))["contents"].numpy()]
    # A cache that is older than that file: its images are those of the same names, if all are.
    plan = manifest["plan"]
    cache = open_cache(str(out), plan["resolution"], buckets=buckets_of(plan))
    now = dict(zip(source.names, source.contents))
    hashes = [now.get(name, "") for name in cache.names]
    if content_hash(list(cache.names), list(cache.tags), hashes) != manifest["plan"]["source"]:
        return []
    return [bytes.fromhex(content) for content in hashes]


def find_places(hashes: list[bytes], contents: list[str]) -> np.ndarray:
    """(n,): where each content is among the hashes, best at its own place; -1 = nowhere."""
    number = {content: i for i, content in enumerate(hashes)}
    places = []
    for i, content in enumerate(map(bytes.fromhex, contents)):
        own = i < len(hashes) and hashes[i] == content
        places.append(i if own else number.get(content, -1))
    return np.array(places)


def latents_of_cache(out: Path, manifest: dict[str, Any]) -> LatentSource:
    """The latents alone: after a kill, names and tags can be newer than the manifest."""
    none = np.zeros(0, np.int64)
    names, tags = Names(none, none), TagTable.of([])
    resolution = manifest["plan"]["resolution"]
    return LatentSource(out, manifest, names, tags, none, none, resolution, {}, "")


def update_folder(out: Path) -> Path:
    return out / ".update"


def clear_update(out: Path, plan: dict[str, Any], shards: int) -> None:
    """Before the plan of a cache is gone on with: end what a kill left half moved, or, if that
    never began to move, drop it."""
    if not update_folder(out).is_dir():
        return
    with contextlib.suppress(UserError):
        if read_manifest(out)["plan"] == plan:
            shutil.rmtree(update_folder(out))
            return
    take_over(out, plan, shards)


def take_over(out: Path, plan: dict[str, Any], shards: int) -> None:
    """Put the shards that were written beside the old ones in their place. A kill on the way leaves
    a cache of the new plan that is not finished; then the rest is moved the next time."""
    write_text(out / "plan.json", sealed(plan))
    (out / "manifest.json").unlink(missing_ok=True)
    for k in range(shards):
        if verify_shard(update_folder(out), plan, k):
            os.replace(shard_path(update_folder(out), k), shard_path(out, k))
    for path in out.glob("shard-*.safetensors"):
        if path not in {shard_path(out, k) for k in range(shards)}:
            path.unlink()
    shutil.rmtree(update_folder(out), ignore_errors=True)
