"""Does a folder still hold what a latent cache was made of?

The cache keeps names, sizes and times of the files it was made from, in .source.safetensors: a
hint, without which the cache works as well. What differs in them is read, a thousand images at
most, and compared with what the cache has.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from ckpt.containers import open_weights
from data.cache import LatentSource, Names, contents_path, encode_command
from data.captions import ENDING, read_captions
from data.found import Found, find_files
from data.images import BadImage
from data.sources import FileReader, framed, strip_hash
from data.tags import TABLES, Spellings, of_one_form, read_tags
from harness.cli import UserError
from harness.files import digest, fingerprint, read_meta, write_tensors
from harness.typed import Hash, Open, check

READ = 1_000  # images of other size or time that are compared by content, at most
TAIL = 1 << 20  # bytes
SPARE = 10_000  # files more than the cache knows of, after which no more are looked for

# The arrays of the file: their types and numbers of dimensions.
KINDS = {"names": (torch.uint8, 1), "ends": (torch.int64, 1), "stamps": (torch.int64, 2)}


class Stamp(NamedTuple):
    size: int  # bytes
    time: int  # of the last change, in ns
    tail: int = 0  # of a parquet file: a hash of its end, which tells of all its columns


@dataclass
class StampsMeta(Open):
    """What the file says beside its arrays."""

    kind: Literal["stamps"]
    root: str
    fingerprint: Hash


class Stamps(NamedTuple):
    root: Path
    files: dict[str, Stamp]  # by name, relative to root


def stamps_path(cache: Path) -> Path:
    return cache / ".source.safetensors"


def take_stamps(data: str) -> Stamps | None:
    """The files of a folder, before they are read; None of what is no folder."""
    root = Path(data)
    return Stamps(root.resolve(), stamped(root, find_files(root))) if root.is_dir() else None


def stamped(root: Path, found: Found) -> dict[str, Stamp]:
    tables = [str(path.relative_to(root)) for path in (*found.tables, *found.parquet)]
    stamps = {}
    for name in (*found.names, *found.texts, *found.captions, *tables):
        with contextlib.suppress(OSError):  # a link to nothing, or gone since
            stat = os.stat(root / name)
            tail = tail_hash(root / name) if name.endswith(".parquet") else 0
            stamps[name] = Stamp(stat.st_size, stat.st_mtime_ns, tail)
    return stamps


def tail_hash(path: Path) -> int:
    with open(path, "rb") as file:
        file.seek(max(os.stat(path).st_size - TAIL, 0))
        return int.from_bytes(hashlib.sha256(file.read()).digest()[:7], "big")


def write_stamps(cache: Path, stamps: Stamps | None) -> None:
    """Keep them beside the cache; None = what it is made from is no folder."""
    if stamps is None:
        stamps_path(cache).unlink(missing_ok=True)
        return
    names = [os.fsencode(name) for name in stamps.files]
    tensors = {
        "names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        "ends": torch.tensor([len(name) for name in names]).cumsum(0),
        "stamps": torch.tensor(list(stamps.files.values()), dtype=torch.int64),
    }
    meta = {"kind": "stamps", "root": str(stamps.root), "fingerprint": fingerprint(tensors)}
    write_tensors(stamps_path(cache), tensors, meta)


def read_stamps(source: LatentSource) -> Stamps:
    """What is known of a cache's files; of an older one, or if that is damaged, only where they
    were."""
    unknown = Stamps(Path(source.manifest["plan"]["data"]), {})
    if not stamps_path(source.root).is_file():
        return unknown
    try:
        box = open_weights(stamps_path(source.root))
        meta = check(read_meta(box), StampsMeta, box.path)
        tensors = dict(box)
    except UserError:
        return unknown
    kinds = {name: (x.dtype, x.ndim) for name, x in tensors.items()}
    if kinds != KINDS or meta["fingerprint"] != fingerprint(tensors):
        return unknown
    if tensors["stamps"].shape != (len(tensors["ends"]), len(Stamp._fields)):
        return unknown
    names = Names(tensors["names"].numpy(), tensors["ends"].numpy())
    return Stamps(
        Path(meta["root"]), dict(zip(names, map(Stamp._make, tensors["stamps"].tolist())))
    )


# ---- what changed -------------------------------------------------------------------------------


def difference(source: LatentSource) -> str:
    """One line of how a cache's folder differs from it, with the command that updates the cache;
    "" if it does not, or is not there."""
    root, before = read_stamps(source)
    if not root.is_dir():
        return ""
    most = 2 * (len(before) + len(source.names)) + SPARE
    found = find_files(root, most)
    now = stamped(root, found)
    if found.more:
        changes = {"files and more are there": most}
    elif found.parquet and not found.names:
        changes = {"parquet files changed": parquet_changes(before, now)}
    else:
        changes = image_changes(source, root, found, before, now)
    parts = [f"{n:,} {what}" for what, n in changes.items() if n]
    if not parts:
        return ""
    plan = {**source.manifest["plan"], "data": str(root)}
    command = encode_command(source.root, plan)
    return f"{root} differs from this cache of it: {', '.join(parts)}.  Update it with: {command}"


def parquet_changes(before: dict[str, Stamp], now: dict[str, Stamp]) -> int:
    """Files that came, went, or have another size or end; their times alone say nothing, and
    reading all of them is no small thing."""
    if not before:
        return 0
    old, new = (
        {name: (s.size, s.tail) for name, s in stamps.items() if name.endswith(".parquet")}
        for stamps in (before, now)
    )
    return sum(old.get(name) != new.get(name) for name in old.keys() | new.keys())


def image_changes(
    source: LatentSource, root: Path, found: Found, before: dict[str, Stamp], now: dict[str, Stamp]
) -> dict[str, int]:
    place = {name: i for i, name in enumerate(source.names)}
    images = set(found.names)
    new = images - place.keys() - source.unreadable.keys()
    # Nothing is known of the times of an older cache, and so many images are not read.
    touched = [name for name in found.names if before and before.get(name) != now.get(name)]
    known = [name for name in touched if name in place]
    return {
        "images added": len(new) + mended(source, root, touched),
        "images gone": len(place.keys() - images),
        "images changed": other_images(source, root, known, place),
        "images with other tags": other_tags(source, root, found, before, now, place),
        "images with other captions": other_captions(source, root, found, before, now),
    }


def mended(source: LatentSource, root: Path, touched: list[str]) -> int:
    """Images that could not be read, and now can."""
    names = [name for name in touched if name in source.unreadable][:READ]
    return sum(bool(content) for content in contents_of(source, root, names))


def contents_of(source: LatentSource, root: Path, names: list[str]) -> list[str]:
    """A hash of each image as it is now, "" if it cannot be read."""
    load, hashes = FileReader(root, names, source.resolution, 1), []
    for i in range(len(names)):
        try:
            square = source.frames is None
            strip = load(i) if square else framed(load.file(i), source.frames.buckets)
            hashes.append(strip_hash(strip))
        except BadImage:
            hashes.append("")
    return hashes


def other_images(
    source: LatentSource, root: Path, touched: list[str], place: dict[str, int]
) -> int:
    """How many of these are not as they were; where they are too many to read, those that are read
    stand for all. 0 of a cache that has no hashes of its images."""
    path = contents_path(source.root)
    if not touched or not path.is_file():
        return 0
    if digest(path) != source.manifest.get("contents"):
        return 0
    kept = open_weights(path)["contents"].numpy()
    some = touched[:: -(-len(touched) // READ)]
    now = contents_of(source, root, some)
    changed = sum(kept[place[name]].tobytes().hex() != hash for name, hash in zip(some, now))
    return -(-changed * len(touched) // len(some))


def other_tags(
    source: LatentSource,
    root: Path,
    found: Found,
    before: dict[str, Stamp],
    now: dict[str, Stamp],
    place: dict[str, int],
) -> int:
    """Images whose tags differ. Only files of tags that are new, gone or of another time are
    read; of tables, all."""
    texts = found.texts | {name for name in before if name.lower().endswith(".txt")}
    tables = {str(path.relative_to(root)) for path in found.tables}
    tables |= before.keys() - now.keys() - place.keys() - texts - captions_in(before)
    changed = {name for name in tables | texts if before.get(name) != now.get(name)}
    if not changed:
        return 0
    names = [*found.names, *found.unusable]
    if not tables:
        sidecars = Spellings(changed)
        names = [name for name in names if sidecars.find(str(Path(name).with_suffix(".txt")))]
    try:
        tags = read_tags(root, names, found.tables, found.texts)
    except UserError:  # the encoder says what is wrong with them
        return len(names)
    kept = [name for name in names if name in place]
    return sum(of_one_form(tags.get(name, ())) != source.tags[place[name]] for name in kept)


def captions_in(stamps: dict[str, Stamp]) -> set[str]:
    return {name for name in stamps if name.lower().endswith(ENDING)}


def other_captions(
    source: LatentSource,
    root: Path,
    found: Found,
    before: dict[str, Stamp],
    now: dict[str, Stamp],
) -> int:
    """Images whose captions differ. They are read only if a file that may hold some has changed;
    an older cache has none, and knows no times of theirs."""
    files = captions_in(before) | captions_in(now)
    files |= {name for name in before.keys() | now.keys() if Path(name).name in TABLES}
    if all(before.get(name) == now.get(name) for name in files):
        return 0
    there = set(found.names)
    names = [name for name in source.names if name in there]
    try:
        captions = read_captions(root, names, found.tables, found.captions)
    except UserError:  # the encoder says what is wrong with them
        return len(names)
    kept = source.captions() if source.captions else [""] * len(source.names)
    before_of = dict(zip(source.names, kept))
    return sum(before_of[name] != text for name, text in zip(names, captions))
