"""Sets of images and their features: opened from anything, computed once, kept on disk in chunks.

    images = open_images("toyfaces:glasses & !smile", 64)   # or FOLDER[:tags], robohash:2000,
                                                            # hf:org/name, arr_0 in an npz
    extractor = load_inception()                            # any callable with a dict `id`:
                                                            # uint8 (B, 3, H, W) -> (B, d)
    features = extract(images, extractor, folder, ranks)    # the same call again reads what is
                                                            # there, also after a kill
    features.statistics(ranks), features.rows()

A chunk of features is a function of its images and the extractor alone, so ranks, batches and
interruptions leave no trace. It has a fingerprint, and says of what it is: one that is damaged,
half written or in another's place is made anew.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ckpt.containers import open_weights
from data.cache import is_cache, read_manifest
from data.images import BadImage, read_size, to_float
from data.sources import find_files, open_source
from data.tags import TagTable, compile_tags, printable
from harness.archives import read_npz
from harness.cli import UserError
from harness.files import fingerprint, make_dir, read_meta, sweep_old, write_tensors, write_text
from harness.ranks import Ranks
from harness.typed import Open, check
from metrics.distances import Statistics, finite
from vae import LinearVAE, fit_pca, pca_samples

CHUNK = 256  # images a file of features
SIDE = 8  # FD-pca: latents are averaged down to 8 × 8, 2048 numbers at most
FOLD = 1024  # rows of features that are added to statistics at once, at least
DEFAULT_RESOLUTION = 64  # of embedded sets
EMBEDDED = r"(?:toyfaces|robohash)(?::\d+)?"


class Extractor(Protocol):
    id: dict[str, Any]  # what two results must share to be compared; "features" is its name

    def __call__(self, images: Tensor) -> Tensor: ...


# ---- images -------------------------------------------------------------------------------------


@dataclass
class Images:
    """A set of uint8 images of one size."""

    spec: str
    hash: str  # of all images of the source: names, tags, contents
    resolution: int  # of the shorter side
    load: Callable[[int], np.ndarray]  # number in the source -> uint8 (H, W, 3)
    total: int  # images of the source
    index: np.ndarray  # those that count
    table: TagTable | None = None
    held: np.ndarray | None = None  # (total,) uint32, see sources.held_hash
    filter: str = ""
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the first; batch() refuses others."""
        if not len(self):
            return self.resolution, self.resolution
        return self.load(int(self.index[0])).shape[1::-1]

    def batch(self, numbers: Any) -> Tensor:
        """uint8 (B, 3, H, W) of numbers in the source."""
        arrays = [self.load(int(i)) for i in numbers]
        sizes = {a.shape[1::-1] for a in arrays}
        if len(sizes) > 1:
            raise mixed_sizes(self.spec, sorted(sizes))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def where(self, text: str) -> "Images":
        """The images that fit a tag expression (tags.py)."""
        if self.table is None:
            raise UserError(
                f"{self.spec} has no tags, so {text!r} selects nothing", do="Leave the filter out."
            )
        test, _ = compile_tags(text, self.table.counts(), f"--ref {self.spec}", self.total)
        fits = np.flatnonzero(test(self.table))
        return replace(self, index=np.intersect1d(self.index, fits), filter=text)

    def take(self, n: int, seed: int) -> "Images":
        """n of them, chosen at random; 0 = all."""
        keep = self.index
        if 0 < n < len(self):
            keep = np.random.default_rng(seed).permutation(self.index)[:n]
        return replace(self, index=np.sort(keep))

    def split(self, holdout: float) -> tuple["Images", "Images"]:
        """(what training sees, what it does not), as data.open_dataset holds images out."""
        out = np.zeros(len(self), bool)
        if self.held is not None:
            out = self.held[self.index] < holdout * 2**32
        return replace(self, index=self.index[~out]), replace(self, index=self.index[out])


def open_images(spec: str, resolution: int = 0) -> Images:
    """DATA[:tag expression]. resolution 0: folders as they are, in which all images must have one
    size; embedded sets 64."""
    data, text = split_spec(spec)
    if is_cache(data):
        raise UserError(
            f"{data} is a latent cache, which keeps no images",
            do=f"Name what it was made from: {cached_data(data)}",
        )
    if data.endswith(".npz"):
        images = open_batch(Path(data))
    else:
        images = of_source(data, resolution)
    return images.where(text) if text else images


def split_spec(spec: str) -> tuple[str, str]:
    """ "toyfaces:2000:glasses & !smile" -> ("toyfaces:2000", "glasses & !smile"); of a path, the
    longest part that exists is the data."""
    match = re.fullmatch(rf"({EMBEDDED}|hf:[^:]+)(?::(.+))?", spec)
    if match:
        return match[1], match[2] or ""
    parts = spec.split(":")
    for i in range(len(parts), 0, -1):
        if Path(":".join(parts[:i])).exists():
            return ":".join(parts[:i]), ":".join(parts[i:])
    raise UserError(
        f"no data at {spec}: wanted a folder of images, an npz, a parquet file, hf:org/name, "
        "toyfaces or robohash, and after a colon tags",
        do="Check the path.",
    )


def cached_data(folder: str) -> str:
    """The data set that a latent cache was made from."""
    return str(read_manifest(Path(folder))["plan"]["data"])


def of_source(data: str, resolution: int) -> Images:
    """Everything sources.py opens. At its own size, an image is not touched; otherwise it is
    resized and cut as for training."""
    untouched = not resolution and Path(data).is_dir()
    if untouched:
        # A random crop keeps the whole of an image that is not square.
        source = open_source(data, own_size(Path(data)), "random")
    else:
        source = open_source(data, resolution or DEFAULT_RESOLUTION)
    if source.unreadable:
        bad = [f"{printable(name)} ({why})" for name, why in sorted(source.unreadable.items())]
        more = " …" if len(bad) > 5 else ""
        print(
            f"warning: {len(bad):,} unreadable images of {data} do not count: "
            f"{', '.join(bad[:5])}{more}",
            file=sys.stderr,
        )
    return Images(
        data,
        source.hash,
        source.resolution,
        source.strip if untouched else source.pixel,
        len(source.names),
        np.arange(len(source.names)),
        source.table,
        source.held,
        unreadable=len(source.unreadable),
    )


def own_size(root: Path) -> int:
    """The shorter side of a folder's images, which must all have one size."""
    names, sizes = find_files(root).names, set()
    for name in names:
        try:
            sizes.add(read_size(root / name))
        except BadImage:  # reported with a reason when it is read
            continue
        if len(sizes) > 1:
            raise mixed_sizes(str(root), sorted(sizes))
    if len(names) < 2:
        raise too_few(str(root), len(names))
    return min(sizes.pop()) if sizes else DEFAULT_RESOLUTION


def too_few(what: str, n: int) -> UserError:
    return UserError(
        f"{what} has {n} images; a distance between sets needs at least 2",
        do="Give more: it means something from 2,048 on.",
    )


def mixed_sizes(what: str, sizes: list[tuple[int, int]]) -> UserError:
    shown = ", ".join(f"{w}×{h}" for w, h in sizes[:4]) + (" …" if len(sizes) > 4 else "")
    return UserError(
        f"{what} mixes image sizes ({shown}).  Resizing is part of the metric, so it is not done "
        "unasked: give --resolution N",
        do="Both sides are then resized to it as for training (shorter side by Lanczos, middle "
        "cut out).",
    )


def open_batch(path: Path) -> Images:
    """arr_0 of an npz, uint8 (N, H, W, 3): how ADM's code exchanges samples."""
    array = read_npz(path, ["arr_0"])[1].get("arr_0")
    got = "no arr_0" if array is None else f"arr_0 of {array.dtype} {array.shape}"
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(
            f"{path} has {got}; wanted images as arr_0, uint8 (N, H, W, 3), or statistics as mu "
            "and sigma",
            do="Give another npz.",
        )
    digest = hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()
    side, n = min(array.shape[1:3]), len(array)
    return Images(str(path), digest, side, array.__getitem__, n, np.arange(n))


def is_statistics(spec: str) -> bool:
    """Does the spec name an npz of moments rather than images?"""
    if not spec.endswith(".npz") or not Path(spec).is_file():
        return False
    return "arr_0" not in read_npz(Path(spec), [])[0]


# ---- an extractor that needs no download --------------------------------------------------------


def pooled(z: Tensor, side: int) -> Tensor:
    """Latents (B, C, h, w), averaged to at most side × side, as features (B, d)."""
    return F.adaptive_avg_pool2d(z, tuple(min(s, side) for s in z.shape[-2:])).flatten(1)


class Pca:
    """FD-pca: latents of the linear autoencoder as features. Instant; sees layout and colour, and
    little of what they mean."""

    def __init__(self, vae: LinearVAE, fitted: dict[str, Any]):
        self.vae, self.id = vae, {"features": "pca", **fitted}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        z = self.vae.to(images.device).encode(to_float(images))
        return pooled(z, SIDE)


def fit_extractor(images: Images) -> Pca:
    """Fitted to the images of the whole source, whatever its filter: subsets of one data set share
    it."""
    if not images.total:
        raise too_few(images.spec, 0)
    height, width = images.load(0).shape[:2]
    if height % 8 or width % 8:
        raise UserError(
            f"--features pca works on patches of 8×8 pixels; {images.spec} has {width}×{height}",
            do="Give --resolution, a multiple of 8.",
        )
    n = min(images.total, pca_samples(images.resolution))
    sample = images.batch(np.linspace(0, images.total - 1, n).astype(int))
    fitted = {"fitted to": images.hash[:16], "fitted on": n, "resolution": images.resolution}
    return Pca(fit_pca(to_float(sample)), fitted)


# ---- features on disk ---------------------------------------------------------------------------


class Chunk(NamedTuple):
    """What a file of features holds."""

    features: Tensor
    notes: dict[str, Any]  # what else was found while they were made


@dataclass
class ChunkMeta(Open):
    """What it says beside them."""

    key: str
    images: list[int]
    fingerprint: str
    notes: dict[str, float]


@dataclass
class Stored:
    """Features of images 0 … n - 1 in chunks, of which `index` counts. key: see key_of()."""

    folder: Path
    n: int
    index: np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.index)

    def select(self, index: np.ndarray) -> "Stored":
        return replace(self, index=np.sort(index))

    def batches(self, ranks: Ranks | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(places in `index`, features (B, d)) chunk by chunk; every rank its share."""
        starts = range(0, self.n, CHUNK)
        if ranks:
            starts = starts[ranks.rank :: ranks.world]
        for lo in starts:
            first, last = np.searchsorted(self.index, [lo, lo + CHUNK])
            if first == last:
                continue
            rows = torch.from_numpy(self.index[first:last] - lo)
            yield np.arange(first, last), self.chunk(lo).features[rows]

    def chunk(self, lo: int) -> Chunk:
        """The one that begins with image lo; compute() has made it."""
        path = chunk_path(self.folder, lo, self.n)
        chunk = read_chunk(path, self.key)
        if chunk is None:
            raise UserError(
                f"{path} is gone or damaged since it was written",
                do="Run the same command again.  Do all ranks see the same --cache?",
            )
        return chunk

    def notes(self) -> list[dict[str, Any]]:
        """Those of all chunks."""
        return [self.chunk(lo).notes for lo in range(0, self.n, CHUNK)]

    def rows(self) -> Tensor:
        """(N, d) fp32, in memory."""
        return torch.cat([features for _, features in self.batches()])

    def statistics(self, ranks: Ranks, groups: int = 1) -> list[Statistics]:
        """Of `groups` equal parts (image i belongs to part i mod groups), over all ranks; their sum
        is that of all."""
        if not len(self):
            raise UserError("no images to take statistics of", do="Give at least two.")
        d = next(self.batches())[1].shape[1]
        zeros = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        parts = [Statistics(0, *zeros) for _ in range(groups)]
        waiting: list[list[Tensor]] = [[] for _ in range(groups)]

        def fold(g: int, least: int) -> None:
            # A d × d is touched once for many rows, not for each chunk.
            if sum(map(len, waiting[g])) >= least:
                parts[g] = parts[g] + Statistics.of(torch.cat(waiting[g]))
                waiting[g].clear()

        for places, chunk in self.batches(ranks):
            for g in range(groups):
                waiting[g].append(chunk[torch.from_numpy(places % groups == g)])
                fold(g, FOLD)
        for g in range(groups):
            fold(g, 1)
        return [part.reduce(ranks) for part in parts]


def chunk_path(folder: Path, lo: int, n: int) -> Path:
    return folder / f"{lo:09d}-{min(lo + CHUNK, n):09d}.safetensors"


def read_chunk(path: Path, key: str) -> Chunk | None:
    """A chunk, or None if it is not there, not whole, of something else than `key`, or older than
    the fingerprints: then a broken network may have drawn its images."""
    if not path.is_file():
        return None
    try:
        box = open_weights(path)
        meta = check(read_meta(box), ChunkMeta, path)
        features = box["features"]
    except (UserError, KeyError, OSError):  # also where the disk cannot be read
        return None
    low, high = map(int, path.stem.split("-"))
    found = [meta[name] for name in ("key", "images", "fingerprint")]
    if found != [key, [low, high], fingerprint_of(features, meta["notes"])]:
        return None
    whole = features.ndim == 2 and len(features) == high - low and features.isfinite().all()
    return Chunk(features, meta["notes"]) if whole else None


def fingerprint_of(features: Tensor, notes: dict[str, float]) -> str:
    """Of all that a chunk says."""
    words = json.dumps(notes, sort_keys=True) + fingerprint({"features": features})
    return hashlib.sha256(words.encode()).hexdigest()


def write_chunk(path: Path, features: Tensor, what: dict[str, Any], notes: dict[str, Any]) -> None:
    meta = {
        "kind": "features",
        "of": what,
        "key": key_of(what),
        "images": list(map(int, path.stem.split("-"))),
        "fingerprint": fingerprint_of(features, notes),
        "notes": notes,
    }
    write_tensors(path, {"features": features}, meta)


def missing(folder: Path, n: int, starts: Iterable[int], key: str) -> list[range]:
    """The images of those chunks, by their first image, that cannot be read."""
    absent = [lo for lo in starts if read_chunk(chunk_path(folder, lo, n), key) is None]
    return [range(lo, min(lo + CHUNK, n)) for lo in absent]


def compute(
    folder: Path,
    n: int,
    index: np.ndarray,
    produce: Callable[[range], Tensor],
    ranks: Ranks,
    what: dict[str, Any],
    label: str,
    notes: Callable[[range], dict[str, Any]] = lambda chunk: {},
) -> Stored:
    """Make the chunks that hold `index` and are not there; every rank its share. produce(range)
    gives their features (len, d), and notes(range), asked afterwards, what is kept beside them."""
    ranks.broadcast(lambda: describe_folder(folder, what))
    index, key = np.sort(index), key_of(what)
    wanted = [lo for lo in range(0, n, CHUNK) if any_between(index, lo, lo + CHUNK)]
    share = wanted[ranks.rank :: ranks.world]
    todo = missing(folder, n, share, key)
    say_damaged([chunk_path(folder, chunk.start, n) for chunk in todo])
    bar = tqdm(
        total=len(share) * CHUNK,
        initial=(len(share) - len(todo)) * CHUNK,
        unit="img",
        desc=label,
        disable=None if ranks.rank == 0 and todo else True,
    )
    with bar:
        for chunk in todo:
            place = f"{label}, images {chunk.start} to {chunk.stop - 1}"
            features = finite(produce(chunk).float().cpu(), place)
            write_chunk(chunk_path(folder, chunk.start, n), features, what, notes(chunk))
            bar.update(len(chunk))
    ranks.barrier()
    return Stored(folder, n, index, key)


def say_damaged(absent: list[Path]) -> None:
    """Of files that cannot be read, say how many are there."""
    there = [path for path in absent if path.exists()]
    if there:
        print(
            f"{len(there):,} files of features are damaged, of something else, or older than their "
            f"fingerprints, and are made anew (first: {there[0]})",
            flush=True,
        )


def any_between(index: np.ndarray, low: int, high: int) -> bool:
    """Does a sorted index have a number from low to high - 1?"""
    return bool(np.searchsorted(index, low) < np.searchsorted(index, high))


def describe_folder(folder: Path, what: dict[str, Any]) -> None:
    make_dir(folder)
    sweep_old(folder)
    text = json.dumps(what, indent=1, sort_keys=True, default=str)
    write_text(folder / "what.json", text + "\n")


def key_of(what: dict[str, Any]) -> str:
    """The name of a folder of features: equal keys, equal features."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def features_in_batches(
    extractor: Extractor, load: Callable[[range], Tensor], numbers: range, device: torch.device
) -> Tensor:
    """Features (len(numbers), d) of load(numbers), in batches of one size, the last one filled up:
    convolutions round differently at another, and no flag should move a metric. On a CPU few at a
    time are also faster."""
    size = 4 if device.type == "cpu" else 64
    out = []
    for lo in range(numbers.start, numbers.stop, size):
        part = load(range(lo, min(lo + size, numbers.stop))).to(device)
        n = len(part)
        if n < size:
            part = torch.cat([part, part[:1].expand(size - n, -1, -1, -1)])
        out.append(extractor(part)[:n].cpu())
    return torch.cat(out)


def extract(images: Images, extractor: Extractor, cache: Path, ranks: Ranks) -> Stored:
    """Features of a set of images, from the cache or made now. Subsets of a source share its
    chunks."""
    if len(images) < 2:
        filtered = f" with {images.filter!r}" if images.filter else ""
        raise too_few(images.spec + filtered, len(images))
    name = getattr(extractor, "id", {"features": getattr(extractor, "__name__", "custom")})
    what = {"images": images.hash, "resolution": images.resolution, "extractor": name}

    def produce(chunk: range) -> Tensor:
        return features_in_batches(extractor, images.batch, chunk, ranks.device)

    label = f"features of {images.spec}"
    folder = cache / key_of(what)
    return compute(folder, images.total, images.index, produce, ranks, what, label)


def short(n: int) -> str:
    """10000 -> "10k", as in FID10k."""
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)
