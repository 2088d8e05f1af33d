"""Sets of images and their features: opened from anything, computed once, kept on disk in chunks.

    images = open_images("toyfaces:glasses & !smile", 64)     # or FOLDER[:tags], robohash:2000, hf:org/name, arr_0 in an npz
    extractor = load_inception()                              # any callable: uint8 (B, 3, H, W) -> (B, d), with a dict `id`
    features = extract(images, extractor, folder, ranks)      # the same call again reads what is there, also after a kill
    features.statistics(ranks), features.rows()

A chunk of features is a function of its images and the extractor alone, so ranks, batches and interruptions leave no trace.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from harness.cli import UserError
from data.images import to_float
from harness.files import make_dir, write_tensors, write_text
from ckpt.containers import open_weights
from data.images import FORMATS
from data.cache import is_cache, read_sealed
from vae import LinearVAE, fit_pca, pca_samples
from metrics.distances import Statistics, finite, read_npz
from harness.ranks import Ranks
from data.sources import Source, find_files, open_source
from data.tags import TagTable, compile_tags, printable

CHUNK = 256                                  # images a file of features
SIDE = 8                                     # FD-pca: latents are averaged down to 8 × 8, 2048 numbers at most


class Extractor(Protocol):
    id: dict[str, Any]                       # what two results must share to be compared; "features" is its name

    def __call__(self, images: Tensor) -> Tensor: ...


# ---- images ---------------------------------------------------------------------------------------------------------

@dataclass
class Images:
    """A set of uint8 images of one size."""
    spec: str
    hash: str                                # of all images of the source: names, tags, contents
    resolution: int                          # of the shorter side
    load: Callable[[int], np.ndarray]        # number in the source -> uint8 (H, W, 3)
    total: int                               # images of the source
    index: np.ndarray                        # those that count
    table: TagTable | None = None
    held: np.ndarray | None = None           # (total,) uint32, see sources.held_hash
    filter: str = ""
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the first; batch() refuses others."""
        return self.load(int(self.index[0])).shape[1::-1] if len(self) else (self.resolution, self.resolution)

    def batch(self, numbers: Any) -> Tensor:
        """uint8 (B, 3, H, W) of numbers in the source."""
        arrays = [self.load(int(i)) for i in numbers]
        if len({a.shape for a in arrays}) > 1:
            raise mixed(self.spec, sorted({a.shape[1::-1] for a in arrays}))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def where(self, text: str) -> "Images":
        """The images that fit a tag expression (tags.py)."""
        if self.table is None:
            raise UserError(f"{self.spec} has no tags, so {text!r} selects nothing.  Leave the filter out.")
        test, _ = compile_tags(text, self.table.counts(), f"--ref {self.spec}", self.total)
        return replace(self, index=np.intersect1d(self.index, np.flatnonzero(test(self.table))), filter=text)

    def take(self, n: int, seed: int) -> "Images":
        """n of them, chosen at random; 0 = all."""
        keep = np.random.default_rng(seed).permutation(self.index)[:n] if 0 < n < len(self) else self.index
        return replace(self, index=np.sort(keep))

    def split(self, holdout: float) -> tuple["Images", "Images"]:
        """(what training sees, what it does not), as data.open_dataset holds images out."""
        out = self.held[self.index] < holdout * 2 ** 32 if self.held is not None else np.zeros(len(self), bool)
        return replace(self, index=self.index[~out]), replace(self, index=self.index[out])


def open_images(spec: str, resolution: int = 0) -> Images:
    """DATA[:tag expression]. resolution 0: folders as they are, in which all images must have one size; embedded sets 64."""
    data, text = split_spec(spec)
    if data.endswith(".npz"):
        images = open_batch(Path(data))
    else:
        if is_cache(data):
            raise UserError(f"{data} is a latent cache, which keeps no images.  Name what it was made from: {cached_data(data)}")
        images = of_source(data, resolution)
    return images.where(text) if text else images


def split_spec(spec: str) -> tuple[str, str]:
    """"toyfaces:2000:glasses & !smile" -> ("toyfaces:2000", "glasses & !smile"); of a path, the longest part that exists is the data."""
    match = re.fullmatch(r"((?:toyfaces|robohash)(?::\d+)?|hf:[^:]+)(?::(.+))?", spec)
    if match:
        return match[1], match[2] or ""
    parts = spec.split(":")
    for i in range(len(parts), 0, -1):
        if Path(":".join(parts[:i])).exists():
            return ":".join(parts[:i]), ":".join(parts[i:])
    raise UserError(f"no data at {spec}: wanted a folder of images, an npz, a parquet file, hf:org/name, toyfaces or robohash, and after a colon "
                    "tags.")


def cached_data(folder: str) -> str:
    return str(read_sealed(Path(folder) / "manifest.json")["plan"]["data"])


def of_source(data: str, resolution: int) -> Images:
    """Everything sources.py opens. At its own size, an image is not touched; otherwise it is resized and cut as for training."""
    crop = "center"
    if not resolution and Path(data).is_dir():
        resolution, crop = own_size(Path(data)), "random"                       # "random" keeps the whole of an image that is not square
    source = open_source(data, resolution or 64, crop)
    if source.unreadable:
        bad = [f"{printable(name)} ({why})" for name, why in sorted(source.unreadable.items())]
        print(f"warning: {len(bad):,} unreadable images of {data} do not count: {', '.join(bad[:5])}{' …' * (len(bad) > 5)}", file=sys.stderr)

    def load(i: int) -> np.ndarray:
        return whole(source, i) if crop == "random" else source.pixel(i)
    return Images(data, source.hash, resolution or 64, load, len(source.names), np.arange(len(source.names)), source.table, source.held,
                  unreadable=len(source.unreadable))


def whole(source: Source, i: int) -> np.ndarray:
    return source.pixels[i] if source.pixels is not None else source.load(i)


def own_size(root: Path) -> int:
    """The shorter side of a folder's images, which must all have one size."""
    names, sizes = find_files(root).names, set()
    for name in names:
        try:
            with Image.open(root / name, formats=FORMATS) as file:
                sizes.add(file.size)
        except (OSError, ValueError, SyntaxError):                              # reported with a reason when it is read
            continue
        if len(sizes) > 1:
            raise mixed(str(root), sorted(sizes))
    if len(names) < 2:
        raise UserError(f"{root} has {len(names)} images; a distance between sets needs at least 2, and means something from 2,048 on.")
    return min(next(iter(sizes), (64, 64)))


def mixed(what: str, sizes: list) -> UserError:
    shown = ", ".join(f"{w}×{h}" for w, h in sizes[:4])
    return UserError(f"{what} mixes image sizes ({shown}{' …' * (len(sizes) > 4)}).  Resizing is part of the metric, so it is not done unasked: give "
                     "--resolution N, and both sides are resized to it as for training (shorter side by Lanczos, middle cut out).")


def open_batch(path: Path) -> Images:
    """arr_0 of an npz, uint8 (N, H, W, 3): how ADM's code exchanges samples."""
    array = read_npz(path, ["arr_0"])[1].get("arr_0")
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        got = f"arr_0 of {array.dtype} {array.shape}" if array is not None else "no arr_0"
        raise UserError(f"{path} has {got}; wanted images as arr_0, uint8 (N, H, W, 3), or statistics as mu and sigma.")
    return Images(str(path), hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest(), min(array.shape[1:3]), array.__getitem__, len(array), np.arange(len(array)))


def is_statistics(spec: str) -> bool:
    """Does the spec name an npz of moments rather than images?"""
    if not spec.endswith(".npz") or not Path(spec).is_file():
        return False
    return "arr_0" not in read_npz(Path(spec), [])[0]


# ---- an extractor that needs no download ----------------------------------------------------------------------------

def pooled(z: Tensor, side: int) -> Tensor:
    """Latents (B, C, h, w), averaged to at most side × side, as features (B, d)."""
    return F.adaptive_avg_pool2d(z, tuple(min(s, side) for s in z.shape[-2:])).flatten(1)


class Pca:
    """FD-pca: latents of the linear autoencoder as features. Instant; sees layout and colour, and little of what they mean."""

    def __init__(self, vae: LinearVAE, fitted: dict[str, Any]):
        self.vae, self.id = vae, {"features": "pca", **fitted}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        z = self.vae.to(images.device).encode(to_float(images))
        return pooled(z, SIDE)


def fit_extractor(images: Images) -> Pca:
    """Fitted to the images of the whole source, whatever its filter: subsets of one data set share it."""
    side = images.load(0).shape[:2]
    if any(s % 8 for s in side):
        raise UserError(f"--features pca works on patches of 8×8 pixels; {images.spec} has {side[1]}×{side[0]}.  Give --resolution, a multiple of 8.")
    some = images.batch(np.linspace(0, images.total - 1, min(images.total, pca_samples(images.resolution))).astype(int))
    return Pca(fit_pca(to_float(some)), {"fitted to": images.hash[:16], "fitted on": len(some), "resolution": images.resolution})


# ---- features on disk -----------------------------------------------------------------------------------------------

@dataclass
class Stored:
    """Features of images 0 … n - 1 in chunks, of which `index` counts."""
    folder: Path
    n: int
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def select(self, index: np.ndarray) -> "Stored":
        return replace(self, index=np.sort(index))

    def batches(self, ranks: Ranks | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(places in `index`, features (B, d)) chunk by chunk; every rank its share."""
        starts = [lo for lo in range(0, self.n, CHUNK)][ranks.rank if ranks else 0::ranks.world if ranks else 1]
        for lo in starts:
            first, last = np.searchsorted(self.index, [lo, lo + CHUNK])
            if first < last:
                chunk = read_chunk(chunk_path(self.folder, lo, self.n))
                if chunk is None:
                    raise UserError(f"{chunk_path(self.folder, lo, self.n)} is gone.  Do all ranks see the same --cache?")
                yield np.arange(first, last), chunk[torch.from_numpy(self.index[first:last] - lo)]

    def rows(self) -> Tensor:
        """(N, d) fp32, in memory."""
        return torch.cat([f for _, f in self.batches()])

    def statistics(self, ranks: Ranks, groups: int = 1) -> list[Statistics]:
        """Of `groups` equal parts (image i belongs to part i mod groups), over all ranks; their sum is that of all."""
        if not len(self):
            raise UserError("no images to take statistics of.")
        d = next(self.batches())[1].shape[1]
        parts = [Statistics(0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)) for _ in range(groups)]
        waiting: list[list[Tensor]] = [[] for _ in range(groups)]

        def fold(g: int, least: int) -> None:
            if sum(map(len, waiting[g])) >= least:                              # a d × d is touched once for many rows, not for each chunk
                parts[g] = parts[g] + Statistics.of(torch.cat(waiting[g]))
                waiting[g].clear()
        for places, chunk in self.batches(ranks):
            for g in range(groups):
                waiting[g].append(chunk[torch.from_numpy(places % groups == g)])
                fold(g, 1024)
        for g in range(groups):
            fold(g, 1)
        return [part.reduce(ranks) for part in parts]


def chunk_path(folder: Path, lo: int, n: int) -> Path:
    return folder / f"{lo:09d}-{min(lo + CHUNK, n):09d}.safetensors"


def read_chunk(path: Path) -> Tensor | None:
    """A chunk's features, or None if it is not there or not whole."""
    try:
        features = open_weights(path)["features"] if path.is_file() else None
    except (UserError, KeyError):
        return None
    low, high = map(int, path.stem.split("-"))
    return features if features is not None and len(features) == high - low and features.isfinite().all() else None


def compute(folder: Path, n: int, index: np.ndarray, produce: Callable[[range], Tensor], ranks: Ranks, what: dict[str, Any], label: str) -> Stored:
    """Make the chunks that hold `index` and are not there; every rank its share. produce(range) gives their features (len, d)."""
    ranks.broadcast(lambda: begin(folder, what))
    index = np.sort(index)
    wanted = [lo for lo in range(0, n, CHUNK) if np.searchsorted(index, lo) < np.searchsorted(index, lo + CHUNK)]
    mine = wanted[ranks.rank::ranks.world]
    todo = [lo for lo in mine if read_chunk(chunk_path(folder, lo, n)) is None]
    with tqdm(total=len(mine) * CHUNK, initial=(len(mine) - len(todo)) * CHUNK, unit="img", desc=label,
              disable=None if ranks.rank == 0 and todo else True) as bar:
        for lo in todo:
            chunk = range(lo, min(lo + CHUNK, n))
            features = finite(produce(chunk).float().cpu(), f"{label}, images {chunk.start} to {chunk.stop - 1}")
            write_tensors(chunk_path(folder, lo, n), {"features": features}, {"kind": "features", "of": what})
            bar.update(len(chunk))
    ranks.barrier()
    return Stored(folder, n, index)


def begin(folder: Path, what: dict[str, Any]) -> None:
    make_dir(folder)
    write_text(folder / "what.json", json.dumps(what, indent=1, sort_keys=True, default=str) + "\n")


def key_of(what: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:24]


def look(extractor: Extractor, load: Callable[[range], Tensor], numbers: range, device: torch.device) -> Tensor:
    """Features (len(numbers), d) of load(numbers), in batches of one size, the last one filled up: convolutions round differently
    at another, and no flag should move a metric. On a CPU few at a time are also faster."""
    size, out = 4 if device.type == "cpu" else 64, []
    for lo in range(numbers.start, numbers.stop, size):
        part = load(range(lo, min(lo + size, numbers.stop))).to(device)
        full = torch.cat([part, part[:1].expand(size - len(part), -1, -1, -1)]) if len(part) < size else part
        out.append(extractor(full)[:len(part)].cpu())
    return torch.cat(out)


def extract(images: Images, extractor: Extractor, cache: Path, ranks: Ranks) -> Stored:
    """Features of a set of images, from the cache or made now. Subsets of a source share its chunks."""
    if len(images) < 2:
        what = images.spec + f" with {images.filter!r}" * bool(images.filter)
        raise UserError(f"{what} has {len(images)} images; a distance between sets needs at least 2, and means something from 2,048 on.")
    name = getattr(extractor, "id", {"features": getattr(extractor, "__name__", "custom")})
    what = {"images": images.hash, "resolution": images.resolution, "extractor": name}

    def produce(chunk: range) -> Tensor:
        return look(extractor, images.batch, chunk, ranks.device)
    return compute(cache / key_of(what), images.total, images.index, produce, ranks, what, f"features of {images.spec}")


def short(n: int) -> str:
    """10000 -> "10k", as in FID10k."""
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)

