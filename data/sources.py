"""Where images come from: the embedded sets, a folder, parquet files, a dataset on the Hub. Every image is used or named.

    source = open_source("robohash:2000", 64)        # or toyfaces[:count], DIR, FILE.parquet, hf:org/name[/folder][@revision]
    source.pixel(0), source.tags[0], source.names[0]
    source.unreadable                                # name -> why

A folder may be nested and linked. Files without an ending are used if their first bytes are those of an image; any other file
that is no image by its name is counted. Tags lie in tags.jsonl, metadata.jsonl, metadata.csv or in a.txt beside a.png. Parquet
files have an image column (bytes, or Hugging Face's {"bytes", "path"}) and one of the columns tags, text, caption: text or lists.
"""

import bisect
import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np
from tqdm import tqdm

import data.robohash as robo
import data.toyfaces as toyfaces
from harness.cli import UserError
from ckpt.hub import HUB, explained
from data.images import EXTENSIONS, OTHERS, WIDE, BadImage, cut, read_strip, sniff
from data.tags import COLUMNS, TABLES, TagTable, printable, read_tags, tags_of

IN_MEMORY = 2_000_000_000                    # bytes of decoded pixels kept; larger data sets are decoded again when used
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")
TEXT = r"(large_)?string(_view)?|dictionary<values=(large_)?string,.*>"           # as Arrow spells its types
Load = Callable[[int], np.ndarray]           # number of an image -> uint8 (h, w, 3), see images.read_strip


@dataclass
class Source:
    """All readable images of a spec, before any stage is cut out of them."""
    names: list[str]
    tags: list[tuple[str, ...]]
    resolution: int
    unreadable: dict[str, str]               # name -> why
    pixels: Sequence[np.ndarray] | None      # n strips, uint8 (h, w, 3); None = load(i) makes one when asked
    load: Load | None
    hash: str                                # of names, tags and contents
    crop: str = "center"                     # "random": strips are longer than a square, for positions to choose from
    notes: list[str] = field(default_factory=list)

    @cached_property
    def table(self) -> TagTable:
        return TagTable.of(self.tags)

    @cached_property
    def held(self) -> np.ndarray:
        return held_hash(self.names)

    def pixel(self, i: int, where: float | None = None) -> np.ndarray:
        """uint8 (resolution, resolution, 3): the middle, or the square at `where` in [0, 1) along the longer side."""
        try:
            return cut(self.pixels[i] if self.pixels is not None else self.load(i), where)
        except BadImage as error:
            raise UserError(f"{printable(self.names[i])}: {error}; it could be read when the data was opened.  Restore it, and run the same "
                            "command again.") from None


def open_source(spec: str, resolution: int, crop: str = "center") -> Source:
    """Open whatever a spec names; images are decoded once, to know which can be read."""
    if re.fullmatch(r"toyfaces(:\d+)?", spec):
        return open_toyfaces(spec, resolution)
    if re.fullmatch(r"robohash(:\d+)?", spec):
        return open_robohash(spec, resolution)
    root = fetch_dataset(spec) if spec.startswith("hf:") else Path(spec)
    if root.is_file() and root.suffix == ".parquet":
        return open_parquet(root.parent, Found(parquet=[root]), resolution, crop)
    if not root.is_dir():
        raise UserError(f"no data at {root}: wanted a folder of images, a parquet file, hf:org/name, toyfaces or robohash.")
    found = find_files(root)
    if found.parquet and not found.names:
        return open_parquet(root, found, resolution, crop)
    return open_folder(root, found, resolution, crop)


def held_hash(names: Sequence[str]) -> np.ndarray:
    """(n,) uint32 by which images are held out: a function of the name alone, so the same in every stage."""
    return np.array([int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big") for name in names], dtype=np.uint32)


def content_hash(names: list[str], tags: list[tuple[str, ...]], contents: list[str]) -> str:
    return hashlib.sha256(json.dumps([names, tags, contents]).encode()).hexdigest()


def survey(load: Load, names: list[str], resolution: int, what: str) -> tuple[list[int], dict[str, str], list[str], list[np.ndarray] | None]:
    """Decode everything once -> (which can be read, name and reason of the others, hashes, the pixels if they fit in memory)."""
    good, bad, hashes, size = [], {}, [], 0
    kept: list[np.ndarray] | None = [] if len(names) * resolution * resolution * 3 <= IN_MEMORY else None   # strips can be longer

    def read(i: int) -> tuple[str, np.ndarray | None] | str:
        try:
            strip = load(i)
        except BadImage as error:
            return str(error)
        return hashlib.sha256(f"{strip.shape}".encode() + strip.tobytes()).hexdigest(), strip if kept is not None else None

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(names), desc=f"reading {what}", unit="img", disable=None, leave=False) as bar:
        for start in range(0, len(names), 1024):                                # a pool accepts any number of tasks; memory does not
            for i, result in enumerate(pool.map(read, range(start, min(start + 1024, len(names)))), start):
                bar.update()
                if isinstance(result, str):
                    bad[names[i]] = result
                    continue
                good.append(i)
                hashes.append(result[0])
                if kept is not None:
                    kept.append(result[1])
                    size += result[1].nbytes
                    kept = kept if size <= IN_MEMORY else None
    if not good:
        first, why = next(iter(bad.items()))
        raise UserError(f"none of the {len(names):,} images in {what} can be read (first: {printable(first)}: {why}).")
    return good, bad, hashes, kept


# ---- folders --------------------------------------------------------------------------------------------------------

@dataclass
class Found:
    names: list[str] = field(default_factory=list)           # images, relative to the root
    tables: list[Path] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)             # .txt files, relative to the root
    parquet: list[Path] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)


def find_files(root: Path) -> Found:
    """Everything below a folder. Links are followed; a folder that is reached twice, or contains itself, is read once."""
    found, visited = Found(), {os.path.realpath(root)}

    def locked(error: OSError) -> None:
        found.unusable[os.path.relpath(error.filename, root)] = f"a folder: {error.strerror}"

    for folder, folders, files in os.walk(root, followlinks=True, onerror=locked):
        folders.sort()
        fresh = [f for f in folders if os.path.realpath(os.path.join(folder, f)) not in visited]
        visited.update(os.path.realpath(os.path.join(folder, f)) for f in fresh)
        folders[:] = fresh
        for file in files:
            path = Path(folder, file)
            name, end = str(path.relative_to(root)), path.suffix.lower()
            if end in EXTENSIONS and path.is_file():
                found.names.append(name)
            elif end in EXTENSIONS:                                             # a pipe would be waited for
                found.unusable[name] = "a link to nothing" if path.is_symlink() else "not a file"
            elif end in OTHERS:
                found.unusable[name] = f"{end} files are not read"
            elif file in TABLES:
                found.tables.append(path)
            elif end == ".txt":
                found.texts.add(name)
            elif end == ".parquet":
                found.parquet.append(path)
            elif file.lower().endswith(ARCHIVES):
                found.archives.append(name)
            elif not end and path.is_file() and (what := sniff(path)):
                found.names += [name] * (what == "image")
                found.unusable |= {name: what} if what != "image" else {}
            else:
                found.others.append(name)
    found.names.sort()
    found.parquet.sort()
    return found


def unused(found: Found, more: dict[str, Iterable[str]]) -> list[str]:
    """A line for each kind of file that is not used, and no image."""
    kinds = {"archives, not opened: unpack them": found.archives,
             "other files, no images by name or, without an ending, by content": found.others, **more}
    return [f"{len(files):,} {what} (first: {printable(min(files))})" for what, files in kinds.items() if files]


def open_folder(root: Path, found: Found, resolution: int, crop: str) -> Source:
    names = found.names
    sidecars = {str(Path(name).with_suffix(".txt")) for name in [*names, *found.unusable]}
    notes = unused(found, {"parquet files beside images, not read": {str(p.relative_to(root)) for p in found.parquet},
                           "text files of no image's name (the tags of a.png lie in a.txt)": found.texts - sidecars})
    if not names:
        more = [*notes, *(f"{printable(name)}: {why}" for name, why in found.unusable.items())]
        raise UserError(f"{root} has no images ({', '.join(EXTENSIONS)}), nested folders included.{'  ' * bool(more)}{'; '.join(more[:3])}")
    load = partial(load_file, root, names, resolution, WIDE if crop == "random" else 1)
    good, bad, hashes, pixels = survey(load, names, resolution, str(root))
    tags = read_tags(root, [*names, *found.unusable], found.tables, found.texts)
    kept = [names[i] for i in good]
    kept_tags = [tags.get(name, ()) for name in kept]
    return Source(kept, kept_tags, resolution, {**bad, **found.unusable}, pixels, partial(load.func, root, kept, *load.args[2:]),
                  content_hash(kept, kept_tags, hashes), crop, notes)


def load_file(root: Path, names: list[str], resolution: int, wide: int, i: int) -> np.ndarray:
    return read_strip(root / names[i], resolution, wide)


def fetch_dataset(spec: str) -> Path:
    """hf:org/name[/folder][@revision]: what we can read of a dataset repository, in huggingface_hub's cache."""
    match = HUB.fullmatch(spec)
    if not match:
        raise UserError(f"{spec!r} is not a dataset on the Hub.  Wanted hf:org/name, hf:org/name/folder or hf:org/name@revision.")
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise UserError(f"{spec} needs a package that is not installed.  pip install huggingface_hub") from None
    repo, folder, revision = match.groups()
    below = f"{folder.rstrip('/')}/" if folder else ""
    ends = [f"*{e}" for end in (*EXTENSIONS, ".parquet", ".txt") for e in (end, end.upper())] + [f"*{table}" for table in TABLES]
    with explained(spec, f"datasets/{repo}"):
        try:
            root = hub.snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[below + end for end in ends])
        except (OfflineModeIsEnabled, LocalEntryNotFoundError):
            raise UserError(f"{spec} is not in the local cache, and the Hub cannot be reached (offline, or HF_HUB_OFFLINE is set).  "
                            f"Fetch it first where there is a network: hf download --repo-type dataset {repo}"
                            + f" --revision {revision}" * bool(revision)) from None
    if not (Path(root) / below).is_dir():
        raise UserError(f"{spec}: no images, parquet files or tags below {below or 'it'}.  Its files: "
                        f"https://huggingface.co/datasets/{repo}/tree/main")
    return Path(root) / below


# ---- parquet --------------------------------------------------------------------------------------------------------

def parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need a package that is not installed.  pip install pyarrow") from None
    return pyarrow.parquet


def open_parquet(root: Path, found: Found, resolution: int, crop: str) -> Source:
    """Images in columns. Those that memory does not hold are read again a row group at a time, best in order."""
    groups, tags, names = [], [], []                                            # groups: (first row, file, number in it, column)
    notes = unused(found, {"files of tags beside parquet, not read": {str(p.relative_to(root)) for p in found.tables} | found.texts})
    for path in found.parquet:
        try:
            with parquet().ParquetFile(path) as file:
                image, text, note = columns_of(path, file.schema_arrow)
                notes += [note] if note else []
                for number in range(file.num_row_groups):
                    groups.append((len(names), path, number, image))
                    rows = file.metadata.row_group(number).num_rows
                    start = len(names) - next(first for first, where, *_ in groups if where == path)
                    names += [f"{path.relative_to(root)}:{start + k}" for k in range(rows)]
                    values = file.read_row_group(number, [text]).column(0).to_pylist() if text else [None] * rows
                    tags += [row_tags(name, text, value) for name, value in zip(names[-rows:], values)]
        except (OSError, ValueError, TypeError) as error:                       # Arrow's own errors are these
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged or not a parquet file ({' '.join(str(error).split())[:120]}).  Copy it again.") from None
    if not names:
        raise UserError(f"the parquet files in {root} have no rows.")
    every = ParquetRows(groups, list(range(len(names))), resolution, WIDE if crop == "random" else 1)
    good, bad, hashes, pixels = survey(every, names, resolution, str(root))
    kept, kept_tags = [names[i] for i in good], [tags[i] for i in good]
    return Source(kept, kept_tags, resolution, {**bad, **found.unusable}, pixels, ParquetRows(groups, good, resolution, every.wide),
                  content_hash(kept, kept_tags, hashes), crop, notes)


def row_tags(name: str, column: str | None, value: Any) -> tuple[str, ...]:
    try:
        return () if value is None else tags_of(value)
    except ValueError as error:
        raise UserError(f"{printable(name)}, column {column}: {error}, got {str(value)[:60]!r}.") from None


def columns_of(path: Path, schema: Any) -> tuple[str, str | None, str]:
    """The column of images, that of tags, and what is to be said about it."""
    types = {name: str(schema.field(name).type) for name in schema.names}
    images = [name for name, kind in types.items() if kind in ("binary", "large_binary") or kind.startswith("struct<") and "bytes: " in kind]
    if len(images) != 1 and "image" not in images:
        raise UserError(f"{path}: which column holds the images?  Wanted one of bytes, or one named image, got "
                        f"{', '.join(f'{name} ({kind[:40]})' for name, kind in types.items())}.")
    texts = [c for c in COLUMNS if re.fullmatch(rf"{TEXT}|(large_)?list(_view)?<\w+: ({TEXT})>", types.get(c, ""))]
    other = [f"{c} ({types[c][:40]})" for c in COLUMNS if c in types and c not in texts]
    note = f"{path.name}: no tags are read from the column {other[0]}, which is not text or lists of it" if other and not texts else ""
    return "image" if "image" in images else images[0], next(iter(texts), None), note


@dataclass
class ParquetRows:
    """Loads image number i, the row `rows[i]`."""
    groups: list[tuple[int, Path, int, str]]
    rows: list[int]
    resolution: int
    wide: int

    def __call__(self, i: int) -> np.ndarray:
        k = bisect.bisect_right(self.groups, self.rows[i], key=lambda group: group[0]) - 1
        first, *where = self.groups[k]
        with reading:                                                           # threads that want one group should read it once
            group = row_group(*where)
        if isinstance(group, str):
            raise BadImage(group)
        value = group[self.rows[i] - first].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise BadImage("no bytes in this row")
        return read_strip(data, self.resolution, self.wide)


reading = threading.Lock()


@lru_cache(maxsize=2)
def row_group(path: Path, number: int, column: str) -> Any:
    """The images of a row group, or why it cannot be read."""
    try:
        with parquet().ParquetFile(path) as file:
            return file.read_row_group(number, [column], use_threads=False).column(0)   # threads do not survive a loader's fork
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        return f"row group {number} is damaged ({' '.join(str(error).split())[:60]})"


# ---- embedded -------------------------------------------------------------------------------------------------------

def open_toyfaces(spec: str, resolution: int) -> Source:
    """Draw the embedded faces: deterministic per index, so more of them contain the fewer."""
    n = int(spec.partition(":")[2] or 4096)
    if not n or not 32 <= resolution <= 256:
        raise UserError(f"{spec} at resolution {resolution}: wanted at least one face, 32 to 256 pixels.")
    faces = [toyfaces.sample_face(i) for i in range(n)]
    bar = tqdm(faces, desc="drawing toyfaces", unit="img", disable=None, leave=False)
    pixels = np.stack([np.asarray(toyfaces.draw(face, resolution)) for face in bar])
    names, tags = [f"toyface-{i:06d}" for i in range(n)], [tuple(toyfaces.tags(face)) for face in faces]
    return Source(names, tags, resolution, {}, pixels, None, content_hash(names, tags, [hashlib.sha256(pixels).hexdigest()]))


def open_robohash(spec: str, resolution: int) -> Source:
    """Kittens from the robohash package, put together now or, if there are too many to keep, when used."""
    n = int(spec.partition(":")[2] or robo.COUNT)
    if not n or not robo.SIZES[0] <= resolution <= robo.SIZES[1]:
        raise UserError(f"{spec} at resolution {resolution}: wanted at least one kitten, {robo.SIZES[0]} to {robo.SIZES[1]} pixels.")
    art = robo.load_art(resolution)
    kittens = [robo.sample_kitten(i) for i in range(n)]
    names, tags = [f"kitten-{i:06d}" for i in range(n)], [tuple(robo.tags(kitten)) for kitten in kittens]
    keep = n * resolution * resolution * 3 <= IN_MEMORY
    bar = tqdm(kittens, desc="drawing kittens", unit="img", disable=None, leave=False)
    pixels = np.stack([art.draw(kitten) for kitten in bar]) if keep else None
    first = [hashlib.sha256(art.draw(kitten)).hexdigest() for kitten in kittens[:16]]   # the rest follows from art and tags
    return Source(names, tags, resolution, {}, pixels, partial(draw_kitten, resolution, kittens), content_hash(names, tags, [art.digest(), *first]),
                  notes=[robo.CREDIT])


def draw_kitten(resolution: int, kittens: list[robo.Kitten], i: int) -> np.ndarray:
    return robo.load_art(resolution).draw(kittens[i])
