"""Where images come from: the embedded sets, a folder, parquet files, a dataset on the Hub. Every
image is used or named.

    source = open_source("robohash:2000", 64)   # or toyfaces[:count], DIR, FILE.parquet,
                                                # hf:org/name[/folder][@revision]
    source.pixel(0), source.tags[0], source.names[0]
    source.unreadable                           # name -> why

A folder may be nested and linked. Files without an ending are used if their first bytes are those
of an image; any other file that is no image by its name is counted. Tags lie in tags.jsonl,
metadata.jsonl, metadata.csv or in a.txt beside a.png. Parquet files have an image column (bytes, or
Hugging Face's {"bytes", "path"}) and one of the columns tags, text, caption: text or lists.
"""

import bisect
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import data.robohash as robohash
import data.toyfaces as toyfaces
from ckpt.hub import HUB, ONLY_CACHED, explained, quoted
from ckpt.patience import watched
from data.buckets import Buckets, Frames
from data.captions import ENDING, read_captions
from data.found import Found, find_files, of_no_image, unused
from data.images import EXTENSIONS, WIDE, BadImage, Size, cut, read_fitted, read_strip, upright_size
from data.tags import COLUMNS, TABLES, TagTable, of_one_form, printable
from data.tags import read_tags, tags_of
from harness.cli import UserError, clipped
from harness.memory import check_memory

IN_MEMORY = 2_000_000_000  # bytes of decoded pixels kept; larger sets are decoded again when used
MOST = 10_000_000  # pictures of the embedded data sets
AT_A_TIME = 1024  # images that are handed to the threads; they accept any number, memory does not
# Text, and lists of it, as Arrow spells its types.
TEXT = r"(large_)?string(_view)?|dictionary<values=(large_)?string,.*>"
TEXTS = rf"{TEXT}|(large_)?list(_view)?<\w+: ({TEXT})>"
Load = Callable[[int], np.ndarray]  # number of an image -> uint8 (h, w, 3), see images.read_strip


@dataclass
class Source:
    """All readable images of a spec, before any stage is cut out of them."""

    names: list[str]
    tags: list[tuple[str, ...]]
    resolution: int
    unreadable: dict[str, str]  # name -> why
    pixels: Sequence[np.ndarray] | None  # n strips, uint8 (h, w, 3); None = load(i) makes one
    load: Load | None
    hash: str  # of names, tags and contents
    crop: str = "center"  # "random": strips are longer than a square, for positions to choose from
    notes: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)  # a hash of each image, if it was read
    # The caption of each image, "" where there is none; read when a network is told of them.
    captions: Callable[[], list[str]] | None = None
    frames: Frames | None = None  # where images keep their shape: the bucket of each

    def __post_init__(self) -> None:
        self.tags = [of_one_form(tags) for tags in self.tags]

    @cached_property
    def table(self) -> TagTable:
        return TagTable.of(self.tags)

    @cached_property
    def held(self) -> np.ndarray:
        return held_hash(self.names)

    def pixel(self, i: int, where: float | None = None) -> np.ndarray:
        """uint8 (resolution, resolution, 3), or as large as its bucket: the middle, or what is at
        `where` in [0, 1) along the side that is too long."""
        return cut(self.strip(i), where, self.frames and self.frames.size(i))

    def strip(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3): all that is kept of image i."""
        if self.pixels is not None:
            return self.pixels[i]
        try:
            return self.load(i)
        except BadImage as error:
            raise UserError(
                f"{printable(self.names[i])}: {error}; it could be read when the data was opened",
                do="Restore it, and run the same command again.",
            ) from None


def open_source(
    spec: str, resolution: int, crop: str = "center", buckets: Buckets | None = None
) -> Source:
    """Open whatever a spec names; images are decoded once, to know which can be read.

    buckets: images keep their shape; resolution is the side of the square one, then.
    """
    if buckets and re.fullmatch(r"(toyfaces|robohash)(:\d+)?", spec):
        raise UserError(
            f"--buckets: the pictures of {spec} are all square", do="Leave --buckets out."
        )
    if re.fullmatch(r"toyfaces(:\d+)?", spec):
        return open_toyfaces(spec, resolution)
    if re.fullmatch(r"robohash(:\d+)?", spec):
        return open_robohash(spec, resolution)
    root = fetch_dataset(spec) if spec.startswith("hf:") else Path(spec)
    if root.is_file() and root.suffix == ".parquet":
        return open_parquet(root.parent, Found(parquet=[root]), resolution, crop, buckets)
    if not root.is_dir():
        raise UserError(
            f"no data at {root}",
            wanted="a folder of images, a parquet file, hf:org/name, toyfaces or robohash",
            do="Check --data.",
        )
    found = find_files(root)
    if found.parquet and not found.names:
        return open_parquet(root, found, resolution, crop, buckets)
    return open_folder(root, found, resolution, crop, buckets)


def held_hash(names: Sequence[str]) -> np.ndarray:
    """(n,) uint32 by which images are held out: a function of the name alone, so the same in every
    stage."""
    hashes = (hashlib.sha256(os.fsencode(name)).digest() for name in names)
    return np.array([int.from_bytes(digest[:4], "big") for digest in hashes], dtype=np.uint32)


def content_hash(names: list[str], tags: list[tuple[str, ...]], contents: list[str]) -> str:
    return hashlib.sha256(json.dumps([names, tags, contents]).encode()).hexdigest()


def strip_hash(strip: np.ndarray) -> str:
    """Of an image as it was read: uint8 (h, w, 3)."""
    return hashlib.sha256(f"{strip.shape}".encode() + strip.tobytes()).hexdigest()


# ---- reading everything once --------------------------------------------------------------------


class Survey(NamedTuple):
    good: list[int]  # which images can be read
    bad: dict[str, str]  # name of the others -> why
    hashes: list[str]  # of the good ones
    pixels: list[np.ndarray] | None  # of the good ones, if they fit in memory
    frames: Frames | None = None  # of the good ones, in buckets


def survey(load: Load, names: list[str], resolution: int, what: str) -> Survey:
    """Decode everything once."""
    good, bad, hashes, size = [], {}, [], 0
    # Squares at least have to fit; strips can be longer, see below.
    keep = len(names) * resolution * resolution * 3 <= IN_MEMORY
    pixels: list[np.ndarray] | None = [] if keep else None

    def read(i: int) -> tuple[str, np.ndarray | None] | BadImage:
        try:
            strip = load(i)
        except BadImage as error:
            return error
        return strip_hash(strip), strip if pixels is not None else None

    bar = tqdm(total=len(names), desc=f"reading {what}", unit="img", disable=None, leave=False)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(names), AT_A_TIME):
            numbers = range(start, min(start + AT_A_TIME, len(names)))
            for i, result in zip(numbers, pool.map(read, numbers)):
                bar.update()
                if isinstance(result, BadImage):
                    bad[names[i]] = str(result)
                    continue
                digest, strip = result
                good.append(i)
                hashes.append(digest)
                if pixels is not None:
                    pixels.append(strip)
                    size += strip.nbytes
                    if size > IN_MEMORY:
                        pixels = None
    check_any(good, bad, what)
    return Survey(good, bad, hashes, pixels)


def check_any(good: list[int], bad: dict[str, str], what: str) -> None:
    """Refuse a set of which nothing can be used."""
    if good:
        return
    first, why = next(iter(bad.items()))
    raise UserError(
        f"none of the {len(bad):,} images in {what} can be read (first: {printable(first)}: {why})",
        do="Check --data.",
    )


def survey_of(reader: "Reader", names: list[str], what: str, buckets: Buckets | None) -> Survey:
    """survey() of what a reader loads; where there are buckets, as large as theirs. The sizes of
    all images, by their headers, come first."""
    if buckets is None:
        return survey(reader, names, reader.resolution, what)

    def measured(i: int) -> Size | BadImage:
        try:
            return upright_size(reader.file(i))
        except BadImage as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = dict(enumerate(pool.map(measured, range(len(names)))))
    bad = {names[i]: str(size) for i, size in sizes.items() if isinstance(size, BadImage)}
    good = [i for i, size in sizes.items() if not isinstance(size, BadImage)]
    # One bucket after the other, as a latent cache keeps them.
    order = buckets.assign([sizes[i] for i in good]).bucket.argsort(kind="stable")
    good = [good[k] for k in order]
    frames = buckets.assign([sizes[i] for i in good])
    if buckets.skip_small:
        bad |= {names[good[k]]: frames.why_small(k) for k in np.flatnonzero(frames.small)}
        large = np.flatnonzero(~frames.small)
        if good and not len(large):
            raise UserError(
                f"--small skip: each of the {len(good):,} images in {what} is smaller than its "
                "bucket",
                do="Lower --area, or use --small upscale.",
            )
        good, frames = [good[k] for k in large], frames.take(large)
    check_any(good, bad, what)
    fitted = Fitted(reader, good, frames)
    seen = survey(fitted, [names[i] for i in good], reader.resolution, what)
    used = [good[k] for k in seen.good]
    return Survey(used, bad | seen.bad, seen.hashes, seen.pixels, frames.take(seen.good))


# ---- folders ------------------------------------------------------------------------------------


def open_folder(
    root: Path, found: Found, resolution: int, crop: str, buckets: Buckets | None = None
) -> Source:
    """A folder of images with their tags beside them."""
    names = found.names
    everything = [*names, *found.unusable]
    parquet = {str(path.relative_to(root)) for path in found.parquet}
    notes = unused(
        found,
        {
            "parquet files beside images, not read": parquet,
            **of_no_image(found),
        },
    )
    if not names:
        unusable = [f"{printable(name)}: {why}" for name, why in found.unusable.items()]
        instead = "; ".join([*notes, *unusable][:3])
        raise UserError(
            f"{root} has no images ({', '.join(EXTENSIONS)}), nested folders included",
            do=f"It has: {instead}" if instead else "Check --data.",
        )
    wide = WIDE if crop == "random" else 1
    reader = FileReader(root, names, resolution, wide)
    seen = survey_of(reader, names, str(root), buckets)
    tags = read_tags(root, everything, found.tables, found.texts)
    kept = [names[i] for i in seen.good]
    kept_tags = [tags.get(name, ()) for name in kept]
    return Source(
        kept,
        kept_tags,
        resolution,
        {**seen.bad, **found.unusable},
        seen.pixels,
        loader(seen, reader, FileReader(root, kept, resolution, wide)),
        content_hash(kept, kept_tags, seen.hashes),
        crop,
        notes,
        seen.hashes,
        partial(read_captions, root, kept, found.tables, found.captions),
        seen.frames,
    )


@dataclass
class FileReader:
    """Loads image number i, the file `names[i]`."""

    root: Path
    names: list[str]
    resolution: int
    wide: int

    def file(self, i: int) -> Path:
        return self.root / self.names[i]

    def __call__(self, i: int) -> np.ndarray:
        return read_strip(self.file(i), self.resolution, self.wide)


@dataclass
class Fitted:
    """Loads image number k, the reader's numbers[k], as large as its bucket."""

    reader: "Reader"
    numbers: list[int]
    frames: Frames

    def __call__(self, k: int) -> np.ndarray:
        file = self.reader.file(self.numbers[k])
        return read_fitted(file, self.frames.size(k), self.reader.wide)


def framed(file: Path | bytes, buckets: Buckets) -> np.ndarray:
    """An image as a survey in buckets reads it."""
    frames = buckets.assign([upright_size(file)])
    if buckets.skip_small and frames.small[0]:
        raise BadImage(frames.why_small(0))
    return read_fitted(file, frames.size(0))


def loader(seen: Survey, reader: "Reader", plain: Load) -> Load:
    """What loads the good images of a survey: `plain`, but for those in buckets."""
    return plain if seen.frames is None else Fitted(reader, seen.good, seen.frames)


# ---- the Hub ------------------------------------------------------------------------------------


def fetch_dataset(spec: str) -> Path:
    """hf:org/name[/folder][@revision]: what we can read of a dataset repository, in
    huggingface_hub's cache."""
    match = HUB.fullmatch(spec)
    if not match:
        raise UserError(
            f"{spec!r} is not a dataset on the Hub",
            do="Write hf:org/name, hf:org/name/folder or hf:org/name@revision.",
        )
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise UserError(
            f"{spec} needs a package that is not installed", do="pip install huggingface_hub"
        ) from None
    repo, folder, revision = match.groups()
    below = f"{folder.rstrip('/')}/" if folder else ""
    endings = [*EXTENSIONS, ".parquet", ".txt", ENDING]
    patterns = [f"{below}*{e}" for end in endings for e in (end, end.upper())]
    patterns += [f"{below}*{table}" for table in TABLES]
    how = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
    if repo in ONLY_CACHED:
        how["local_files_only"] = True
    with explained(spec, f"datasets/{repo}"):
        try:
            root = watched(hub.snapshot_download, repo, **how)
        except (OfflineModeIsEnabled, LocalEntryNotFoundError):
            command = f"hf download --repo-type dataset {repo}"
            if revision:
                command += f" --revision {quoted(revision)}"
            if repo in ONLY_CACHED:
                raise UserError(
                    f"{quoted(spec)} is named by a file and not by you, so the Hub is not asked "
                    "for it, and the local cache does not have it",
                    do=f"If you trust it, run: {command}{ONLY_CACHED[repo]}",
                ) from None
            raise UserError(
                f"{spec} is not in the local cache, and the Hub cannot be reached "
                "(offline, or HF_HUB_OFFLINE is set)",
                do=f"Fetch it first where there is a network: {command}",
            ) from None
    if not (Path(root) / below).is_dir():
        raise UserError(
            f"{spec}: no images, parquet files or tags below {below or 'it'}",
            do=f"Its files: https://huggingface.co/datasets/{repo}/tree/main",
        )
    return Path(root) / below


# ---- parquet ------------------------------------------------------------------------------------


class Group(NamedTuple):
    """A row group of a parquet file."""

    first: int  # row of the data set
    path: Path
    number: int  # in the file
    column: str  # of the images


def parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet files need a package that is not installed", do="pip install pyarrow"
        ) from None
    return pyarrow.parquet


def open_parquet(
    root: Path, found: Found, resolution: int, crop: str, buckets: Buckets | None = None
) -> Source:
    """Images in columns. Those that memory does not hold are read again a row group at a time,
    best in order."""
    tables = {str(path.relative_to(root)) for path in found.tables}
    beside = tables | found.texts | found.captions
    notes = unused(found, {"files of tags or captions beside parquet, not read": beside})
    groups: list[Group] = []
    names: list[str] = []
    tags: list[tuple[str, ...]] = []
    for path in found.parquet:
        note, more_groups, more_tags = read_parquet(path, str(path.relative_to(root)), len(names))
        if note:
            notes.append(note)
        groups += more_groups
        names += [f"{path.relative_to(root)}:{row}" for row in range(len(more_tags))]
        tags += more_tags
    if not names:
        raise UserError(f"the parquet files in {root} have no rows", do="Check --data.")
    wide = WIDE if crop == "random" else 1
    every = ParquetRows(groups, list(range(len(names))), resolution, wide)
    seen = survey_of(every, names, str(root), buckets)
    kept = [names[i] for i in seen.good]
    kept_tags = [tags[i] for i in seen.good]
    return Source(
        kept,
        kept_tags,
        resolution,
        {**seen.bad, **found.unusable},
        seen.pixels,
        loader(seen, every, ParquetRows(groups, seen.good, resolution, wide)),
        content_hash(kept, kept_tags, seen.hashes),
        crop,
        notes,
        seen.hashes,
        partial(parquet_captions, groups, seen.good),
        seen.frames,
    )


def parquet_captions(groups: list[Group], rows: list[int]) -> list[str]:
    """The column "caption" of each row, "" where there is none or it is no text."""
    found: list[str] = []
    for group in groups:
        with explained_parquet(group.path), parquet().ParquetFile(group.path) as file:
            kinds = {field.name: str(field.type) for field in file.schema_arrow}
            values = [None] * file.metadata.row_group(group.number).num_rows
            if re.fullmatch(TEXT, kinds.get("caption", "")):
                values = file.read_row_group(group.number, ["caption"]).column(0).to_pylist()
        found += [(value or "").strip() for value in values]
    return [found[row] for row in rows]


def read_parquet(
    path: Path, name: str, first: int
) -> tuple[str, list[Group], list[tuple[str, ...]]]:
    """(what is to be said, row groups, tags of each row) of a file whose rows are the data set's
    from `first` on."""
    groups: list[Group] = []
    tags: list[tuple[str, ...]] = []
    with explained_parquet(path), parquet().ParquetFile(path) as file:
        image, text, note = columns_of(path, file.schema_arrow)
        for number in range(file.num_row_groups):
            groups.append(Group(first + len(tags), path, number, image))
            values = [None] * file.metadata.row_group(number).num_rows
            if text:
                values = file.read_row_group(number, [text]).column(0).to_pylist()
            for value in values:
                tags.append(row_tags(f"{name}:{len(tags)}", text, value))
    return note, groups, tags


@contextlib.contextmanager
def explained_parquet(path: Path) -> Iterator[None]:
    """What Arrow says of a file that it cannot read, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:  # Arrow's own errors are these
        raise UserError(
            f"{path} is damaged or not a parquet file ({' '.join(str(error).split())[:120]})",
            do="Copy it again.",
        ) from None


def row_tags(name: str, column: str | None, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    try:
        return tags_of(value)
    except ValueError as error:
        raise UserError(
            f"{printable(name)}, column {column}: {error}, got {str(value)[:60]!r}",
            do="Mend this row, or rename the column, which then is not read.",
        ) from None


def columns_of(path: Path, schema: Any) -> tuple[str, str | None, str]:
    """The column of images, that of tags, and what is to be said about it."""
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise UserError(
            f"{path}: two columns are named {twice[0]}", do="Rename or drop one of them."
        )
    types = {name: str(schema.field(name).type) for name in schema.names}
    images = [name for name, kind in types.items() if holds_bytes(kind)]
    if len(images) != 1 and "image" not in images:
        got = ", ".join(f"{name} ({kind[:40]})" for name, kind in types.items())
        raise UserError(
            f"{path}: which column holds the images?  Wanted one of bytes, or one named image, "
            f"got {got}",
            do="Rename the column of images to image.",
        )
    present = [column for column in COLUMNS if column in types]
    texts = [column for column in present if re.fullmatch(TEXTS, types[column])]
    note = ""
    if present and not texts:
        column = f"{present[0]} ({types[present[0]][:40]})"
        note = (
            f"{path.name}: no tags are read from the column {column}, which is not text or lists "
            "of it"
        )
    elif "caption" in types and texts[0] != "caption" and not re.fullmatch(TEXT, types["caption"]):
        kind = types["caption"][:40]
        note = f"{path.name}: no captions are read from the column caption ({kind}), no text"
    return "image" if "image" in images else images[0], next(iter(texts), None), note


def holds_bytes(kind: str) -> bool:
    """Is this an Arrow type of bytes, or of Hugging Face's {"bytes", "path"}?"""
    return kind in ("binary", "large_binary") or (kind.startswith("struct<") and "bytes: " in kind)


@dataclass
class ParquetRows:
    """Loads image number i, the row `rows[i]`."""

    groups: list[Group]
    rows: list[int]
    resolution: int
    wide: int

    def file(self, i: int) -> bytes:
        row = self.rows[i]
        k = bisect.bisect_right(self.groups, row, key=lambda group: group.first) - 1
        first, path, number, column = self.groups[k]
        with reading:  # threads that want one group should read it once
            group = row_group(path, number, column)
        if isinstance(group, str):
            raise BadImage(group)
        value = group[row - first].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise BadImage("no bytes in this row")
        return data

    def __call__(self, i: int) -> np.ndarray:
        return read_strip(self.file(i), self.resolution, self.wide)


Reader = FileReader | ParquetRows
reading = threading.Lock()


@lru_cache(maxsize=2)
def row_group(path: Path, number: int, column: str) -> Any:
    """The images of a row group, or why it cannot be read."""
    try:
        with parquet().ParquetFile(path) as file:
            # Arrow's threads do not survive a loader's fork.
            return file.read_row_group(number, [column], use_threads=False).column(0)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        return f"row group {number} is damaged ({' '.join(str(error).split())[:60]})"


# ---- embedded -----------------------------------------------------------------------------------


def embedded_tags(data: str, stage: str) -> tuple[str, ...]:
    """What a stage excludes if nobody says: some tags of the embedded data sets, none of others."""
    excluded = {"toyfaces": toyfaces.EXCLUDED, "robohash": robohash.EXCLUDED}
    return () if stage == "standard" else excluded.get(data.partition(":")[0], ())


def count_of(spec: str, usual: int) -> int:
    """The pictures that toyfaces:N or robohash:N asks for."""
    text = spec.partition(":")[2] or str(usual)
    if len(text) > len(str(MOST)) or not 1 <= int(text) <= MOST:
        raise UserError(
            f"--data {clipped(spec)}", wanted=f"1 to {MOST:,} pictures", do="Ask for fewer."
        )
    return int(text)


def open_toyfaces(spec: str, resolution: int) -> Source:
    """Draw the embedded faces: deterministic per index, so more of them contain the fewer."""
    n = count_of(spec, 4096)
    if not 32 <= resolution <= 256:
        raise UserError(
            f"{spec} at resolution {resolution}",
            wanted="32 to 256 pixels",
            do="Give another --data or --resolution.",
        )
    check_memory(f"--data {spec} at --resolution {resolution}", n * 3 * resolution**2)
    pixels = drawn_faces(n, resolution)
    names = [f"toyface-{i:06d}" for i in range(n)]
    tags = [tuple(toyfaces.tags(toyfaces.sample_face(i))) for i in range(n)]
    contents = content_hash(names, tags, [hashlib.sha256(pixels).hexdigest()])
    return Source(names, tags, resolution, {}, pixels, None, contents)


@lru_cache(1)
def drawn_faces(n: int, resolution: int) -> np.ndarray:
    """uint8 (n, R, R, 3). Kept, since a process that trains many runs opens the same ones for
    each."""
    faces = [toyfaces.sample_face(i) for i in range(n)]
    bar = tqdm(faces, desc="drawing toyfaces", unit="img", disable=None, leave=False)
    pixels = np.stack([np.asarray(toyfaces.draw(face, resolution)) for face in bar])
    pixels.setflags(write=False)
    return pixels


def open_robohash(spec: str, resolution: int) -> Source:
    """Kittens from the robohash package, put together now or, if there are too many to keep, when
    used."""
    n = count_of(spec, robohash.COUNT)
    low, high = robohash.SIZES
    if not low <= resolution <= high:
        raise UserError(
            f"{spec} at resolution {resolution}",
            wanted=f"{low} to {high} pixels",
            do="Give another --data or --resolution.",
        )
    art = robohash.load_art(resolution)
    kittens = [robohash.sample_kitten(i) for i in range(n)]
    names = [f"kitten-{i:06d}" for i in range(n)]
    tags = [tuple(robohash.tags(kitten)) for kitten in kittens]
    pixels = None
    if n * resolution * resolution * 3 <= IN_MEMORY:
        bar = tqdm(kittens, desc="drawing kittens", unit="img", disable=None, leave=False)
        pixels = np.stack([art.draw(kitten) for kitten in bar])
    # The first pictures; the rest follows from the art and the tags.
    first = [hashlib.sha256(art.draw(kitten)).hexdigest() for kitten in kittens[:16]]
    contents = content_hash(names, tags, [art.digest(), *first])
    load = partial(draw_kitten, resolution, kittens)
    notes = [robohash.CREDIT]
    return Source(names, tags, resolution, {}, pixels, load, contents, notes=notes)


def draw_kitten(resolution: int, kittens: list[robohash.Kitten], i: int) -> np.ndarray:
    return robohash.load_art(resolution).draw(kittens[i])
