"""Tagged images, the stages cut out of them by tag, and the order they are seen in.

    ds = open_dataset("toyfaces", stage="fine", exclude_tags=["character:nova"], resolution=64)
    ds[0].image, ds[0].tags                  # uint8 (3, H, W), tuple of tags
    for batch in batches(ds, positions, …)   # what train.py consumes

A spec is "toyfaces", "toyfaces:1000" (drawn here, see toyfaces.py) or a folder of images with tags in tags.jsonl,
metadata.jsonl or sidecar .txt files.

Randomness is a function: which image is seen at position p of the run, its flip, noise, time and label dropout depend
on (seed, p) and on nothing else. So a resumed run, more ranks or another objective see exactly the same.
"""

import fnmatch
import hashlib
import json
import os
import re
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator, Literal, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import toyfaces
from config import UserError, closest

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
IN_MEMORY = 2_000_000_000                    # bytes of decoded pixels kept; larger data sets are decoded again when used


class Item(NamedTuple):
    image: Tensor           # uint8 (3, H, W)
    tags: tuple[str, ...]
    name: str


@dataclass
class Source:
    """All readable images of a spec, before any stage is cut out of them."""
    names: list[str]
    tags: list[tuple[str, ...]]
    resolution: int
    unreadable: list[str]
    pixels: np.ndarray | None                # (n, H, W, 3) uint8; None = decode from `root` when asked
    root: Path | None
    hash: str                                # of names, tags and contents

    def pixel(self, i: int) -> np.ndarray:
        return self.pixels[i] if self.pixels is not None else decode(self.root / self.names[i], self.resolution)


class Dataset:
    """The images `index` of a source. `heldout` is a Dataset of images that training never sees."""

    def __init__(self, source: Source, index: np.ndarray, heldout: "Dataset | None" = None, report: str = ""):
        self.source, self.index, self.heldout, self.report = source, index, heldout, report

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Item:
        j = self.index[i]
        return Item(torch.from_numpy(self.source.pixel(j)).permute(2, 0, 1), self.source.tags[j], self.source.names[j])

    def images(self, indices: Sequence[int]) -> Tensor:
        """uint8 (n, 3, H, W)."""
        return torch.stack([self[i].image for i in indices])

    def counts(self) -> Counter:
        return Counter(tag for j in self.index for tag in self.source.tags[j])


# ---- opening --------------------------------------------------------------------------------------------------------

def open_dataset(spec: str, *, stage: Literal["standard", "fine", "stage2"] = "standard", exclude_tags: Sequence[str] = (),
                 resolution: int = 64, holdout: float = 0.02) -> Dataset:
    """Open a spec and cut out a stage: standard = all, fine = all without exclude_tags, stage2 = only those with them.

    A share `holdout` of the images, chosen by a hash of their names (so that it is the same images in every stage), is
    kept from training as `.heldout`. `.report` says what was found, left out and why, and counts the tags.
    """
    if resolution < 1:
        raise UserError(f"resolution {resolution}: wanted at least 1 pixel.")
    if stage not in ("standard", "fine", "stage2"):
        raise UserError(f"stage {stage!r} is not one of standard, fine, stage2.")
    if stage != "standard" and not exclude_tags:
        raise UserError(f"stage={stage} needs --exclude-tags: the tags it leaves out (fine) or keeps (stage2).")
    source = open_toyfaces(spec, resolution) if re.fullmatch(r"toyfaces(:\d+)?", spec) else open_folder(Path(spec), resolution)
    everything = Counter(tag for tags in source.tags for tag in tags)
    wanted = {tag for pattern in exclude_tags for tag in match_tags(pattern, everything, f"stage={stage}", len(source.names))}
    tagged = np.array([bool(wanted.intersection(tags)) for tags in source.tags])
    inside = {"standard": np.ones(len(tagged), bool), "fine": ~tagged, "stage2": tagged}[stage]
    held = np.array([is_held_out(name, holdout) for name in source.names])
    ds = Dataset(source, np.flatnonzero(inside & ~held), Dataset(source, np.flatnonzero(inside & held)))
    if not len(ds):
        raise UserError(f"stage={stage} of {spec} has no images to train on ({len(tagged)} readable, {tagged.sum()} with the tags).")
    ds.report = describe(spec, stage, wanted, ds, int((~inside).sum()), everything)
    return ds


def describe(spec: str, stage: str, wanted: set[str], ds: Dataset, left_out: int, everything: Counter) -> str:
    """found = used + held out + left out by the stage + unreadable; then the counts per tag."""
    source, used = ds.source, ds.counts()
    found = len(source.names) + len(source.unreadable)
    lines = [f"data {spec}: {found:,} found = {len(ds):,} used + {len(ds.heldout):,} held out + {left_out:,} left out by "
             f"stage={stage} + {len(source.unreadable):,} unreadable"]
    if source.unreadable:
        more = len(source.unreadable) - 10
        lines.append(f"  unreadable: {', '.join(source.unreadable[:10])}{f' … and {more} more' if more > 0 else ''}")
    for tag in sorted(wanted):
        lines.append(f"  {stage} tag {tag!r}: {everything[tag]:,} found, {used[tag]:,} used")
    untagged = sum(not source.tags[j] for j in ds.index)
    if untagged:
        lines.append(f"  without tags: {untagged:,} of the used")
    shown = [f"{tag} {n:,}" for tag, n in used.most_common(24)]
    lines.append(f"  tags used: {', '.join(shown) or 'none'}{f' … and {len(used) - 24} more' if len(used) > 24 else ''}")
    return "\n".join(lines)


def is_held_out(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2 ** 32


def match_tags(pattern: str, vocabulary: Counter, what: str, images: int) -> list[str]:
    """The tags a pattern names: itself, or all that fit its * and ?. None is an error with the nearest tags."""
    pattern = normalize_tag(pattern)
    if "*" in pattern or "?" in pattern:
        hits = sorted(t for t in vocabulary if fnmatch.fnmatchcase(t, pattern.replace("[", "[[]")))
    else:
        hits = [pattern] if pattern in vocabulary else []
    if not hits:
        raise UserError(f"{what}: {pattern!r} matches 0 of {images:,} images.{closest(pattern, vocabulary)}")
    return hits


def classes_of(ds: Dataset, patterns: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Class names from tag patterns, and each image's label (n,): the first class among its tags, -1 if none."""
    vocabulary = Counter(tag for tags in ds.source.tags for tag in tags)
    names = list(dict.fromkeys(t for p in patterns for t in match_tags(p, vocabulary, "--classes", len(ds.source.names))))
    labels = [next((k for k, name in enumerate(names) if name in ds.source.tags[j]), -1) for j in ds.index]
    return names, np.array(labels, dtype=np.int64)


def open_toyfaces(spec: str, resolution: int) -> Source:
    """Draw the embedded faces: deterministic per index, so more of them contain the fewer."""
    n = int(spec.partition(":")[2] or 4096)
    if not n or not 32 <= resolution <= 256:
        raise UserError(f"{spec} at resolution {resolution}: wanted at least one face, 32 to 256 pixels.")
    faces = [toyfaces.sample_face(i) for i in range(n)]
    bar = tqdm(faces, desc="drawing toyfaces", unit="img", disable=None, leave=False)
    pixels = np.stack([np.asarray(toyfaces.draw(face, resolution)) for face in bar])
    names, tags = [f"toyface-{i:06d}" for i in range(n)], [tuple(toyfaces.tags(face)) for face in faces]
    return Source(names, tags, resolution, [], pixels, None, content_hash(names, tags, [hashlib.sha256(pixels).hexdigest()]))


def open_folder(root: Path, resolution: int) -> Source:
    """Every image below a folder, decoded once to know which can be read."""
    if not root.is_dir():
        raise UserError(f"no data at {root}: wanted a folder of images, or toyfaces.")
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not names:
        raise UserError(f"{root} has no images ({', '.join(EXTENSIONS)}), nested folders included.")
    keep = len(names) * resolution * resolution * 3 <= IN_MEMORY

    def read(name: str) -> tuple[str, np.ndarray | None] | None:
        try:
            array = decode(root / name, resolution)
            return hashlib.sha256(array).hexdigest(), array if keep else None
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            return None                                                         # reported by name below

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(tqdm(pool.map(read, names), total=len(names), desc=f"reading {root}", unit="img", disable=None, leave=False))
    good = [i for i, r in enumerate(results) if r is not None]
    bad = [names[i] for i, r in enumerate(results) if r is None]
    if not good:
        raise UserError(f"none of the {len(names):,} images in {root} can be read (first: {names[0]}).")
    tags = read_tags(root, names)
    kept, kept_tags = [names[i] for i in good], [tags.get(names[i], ()) for i in good]
    pixels = np.stack([results[i][1] for i in good]) if keep else None
    return Source(kept, kept_tags, resolution, bad, pixels, root, content_hash(kept, kept_tags, [results[i][0] for i in good]))


def decode(path: Path, resolution: int) -> np.ndarray:
    """An image file to (resolution, resolution, 3) uint8: RGB over white, shorter side resized (Lanczos), centre crop."""
    with Image.open(path) as file:
        file = ImageOps.exif_transpose(file)
        if file.mode.startswith("I"):                                           # 16-bit grey: convert() would clip it at 255
            file = Image.fromarray((np.asarray(file).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        image = file.convert("RGBA") if "A" in file.getbands() or "transparency" in file.info else file.convert("RGB")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = resolution / min(image.size)
    W, H = (max(round(side * scale), resolution) for side in image.size)
    image = image.resize((W, H), Image.Resampling.LANCZOS)
    left, top = (W - resolution) // 2, (H - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def content_hash(names: list[str], tags: list[tuple[str, ...]], contents: list[str]) -> str:
    return hashlib.sha256(json.dumps([names, tags, contents]).encode()).hexdigest()


# ---- tags -----------------------------------------------------------------------------------------------------------

def normalize_tag(tag: str) -> str:
    """One spelling of a booru tag: 'Albedo_\\(Overlord\\)' -> 'albedo (overlord)'."""
    return re.sub(r"\s+", " ", re.sub(r"\\([()])", r"\1", tag).replace("_", " ")).strip().lower()


def split_tags(text: str | Sequence[str]) -> tuple[str, ...]:
    """Comma-separated text, or a list, to normalized tags in order, without repeats."""
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(dict.fromkeys(t for t in map(normalize_tag, parts) if t))


def read_tags(root: Path, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Tags by image name: from tags.jsonl or metadata.jsonl lines {"file_name": …, "tags" | "text": …} in any folder,
    and from sidecar files (a.png -> a.txt), which win."""
    tags: dict[str, tuple[str, ...]] = {}
    for table in sorted(p for p in root.rglob("*.jsonl") if p.name in ("tags.jsonl", "metadata.jsonl") and p.is_file()):
        for number, line in enumerate(read_text(table).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key, value = str((table.parent / row["file_name"]).relative_to(root)), row["tags"] if "tags" in row else row["text"]
                if not isinstance(value, (str, list)) or not all(isinstance(tag, str) for tag in value):
                    raise ValueError("tags are text or a list of texts")
                tags[key] = split_tags(value)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{table}:{number}: wanted {{\"file_name\": …, \"tags\": …}}, got {line[:60]!r} "
                                f"({type(error).__name__}: {error}).") from None
    absent = sorted(tags.keys() - set(names))
    if absent:
        print(f"warning: tags for {len(absent):,} files that are not there, first {absent[0]}", file=sys.stderr, flush=True)
    for name in names:
        sidecar = (root / name).with_suffix(".txt")
        if sidecar.is_file():
            tags[name] = split_tags(read_text(sidecar))
    return tags


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).  Save it as UTF-8.") from None


# ---- the stream of samples ------------------------------------------------------------------------------------------

def rng(seed: int, stream: str, number: int) -> np.random.Generator:
    """A counter-based generator (Philox) for one purpose: a pure function of its three arguments."""
    word = int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:8], "big")
    return np.random.Generator(np.random.Philox(key=[word, number]))


@lru_cache(maxsize=2)
def permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    return rng(seed, f"order of {n}", epoch).permutation(n)


def index_at(seed: int, n: int, position: int) -> int:
    """Which of n images is the position-th one seen: every image once per n positions, each time in a new order."""
    epoch, offset = divmod(position, n)
    return int(permutation(seed, n, epoch)[offset])


@dataclass(frozen=True)
class Stream:
    """Position in the run -> everything random about that sample. A torch map-style dataset over positions."""
    ds: Dataset
    labels: np.ndarray | None                # (n,) or None
    latent_shape: tuple[int, int, int]
    seed: int
    flip: bool = False                       # mirror half of the images
    label_drop: float = 0.0                  # share of labels replaced by -1, for classifier-free guidance

    def __getitem__(self, position: int) -> dict[str, Any]:
        i, r = index_at(self.seed, len(self.ds), position), rng(self.seed, "sample", position)
        q, mirror, drop = r.random(3)                                           # always drawn, so no flag moves the noise
        image = self.ds[i].image
        sample = {"image": image.flip(-1) if self.flip and mirror < 0.5 else image, "q": q, "position": position,
                  "eps": torch.from_numpy(r.standard_normal(self.latent_shape, dtype=np.float32))}
        if self.labels is not None:
            sample["y"] = -1 if drop < self.label_drop else int(self.labels[i])
        return sample


def batches(stream: Stream, groups: Iterator[list[int]], workers: int = 0, pin: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collated samples for each list of positions: image uint8, eps, q (time quantile, float64), y, position."""
    loader = DataLoader(stream, batch_sampler=groups, num_workers=workers, pin_memory=pin,
                        prefetch_factor=4 if workers else None, worker_init_fn=outlive_signals)
    return iter(loader)


def outlive_signals(worker: int) -> None:
    """A signal to stop reaches the whole process group (Ctrl-C, timeout, Slurm); the trainer, which needs its workers to finish
    the step, ends them itself. Should it die, they notice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1
