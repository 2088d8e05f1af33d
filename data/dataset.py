"""Tagged images, the stages cut out of them by tag, and the samples that are made of them.

    ds = open_dataset("toyfaces", stage="fine", exclude_tags=["character:nova"], resolution=64)
    ds[0].image, ds[0].tags                  # uint8 (3, H, W), tuple of tags
    for batch in batches(stream, positions): # what train.py consumes

sources.py lists what a spec can be, tags.py what exclude_tags can say, order.py which image is seen
when.

Randomness is a function: which image is seen at position p of the run, its crop, flip, noise, time
and label dropout depend on (seed, p) and on nothing else. So a resumed run, more ranks or another
objective see exactly the same.
"""

import atexit
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from data.buckets import Buckets, Frames
from data.cache import LatentSource, is_cache, open_cache, self_check, vae_path
from data.images import WIDE, to_float
from data.order import BucketOrder, index_at, rng
from data.sources import Source, open_source
from data.stamps import difference
from data.tags import compile_tags, match_tags, printable
from data.watch import look, start
from diffusion.coupling import upsampled
from harness.cli import UserError, flag
from harness.memory import check_memory
from vae import AnyVAE, choose, fit_pca, pca_samples, pixel, psnr

STAGES = ("standard", "fine", "stage2")
SHOWN_TAGS = 24  # in a report
SHOWN_FILES = 10


class Item(NamedTuple):
    image: Tensor  # uint8 (3, H, W)
    tags: tuple[str, ...]
    name: str


class Dataset:
    """The images `index` of a source. `heldout` is a Dataset of images that training never sees."""

    def __init__(
        self,
        source: Source | LatentSource,
        index: np.ndarray,
        heldout: "Dataset | None" = None,
        report: str = "",
    ):
        self.source, self.index, self.heldout, self.found = source, index, heldout, report

    @property
    def report(self) -> str:
        """What was found, and of a latent cache whether its images are still the same. Those are
        looked at only here, for one rank alone shows it."""
        other = difference(self.source) if isinstance(self.source, LatentSource) else ""
        return f"{self.found}\n  {other}" if other else self.found

    @property
    def frames(self) -> Frames | None:
        """The bucket of each of the source's images; None where all are square."""
        return self.source.frames

    def __len__(self) -> int:
        return len(self.index)

    def bucket(self, i: int) -> int:
        """Which images have one shape: the number of image i's bucket, 0 without buckets."""
        return int(self.frames.bucket[self.index[i]]) if self.frames else 0

    def latent_shape(self, i: int, square: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, h, w) of image i's latents, where `square` is that of the source's resolution."""
        if self.frames is None:
            return square
        C, side, _ = square
        width, height = self.frames.size(self.index[i])
        factor = self.source.resolution // side
        return C, height // factor, width // factor

    def __getitem__(self, i: int) -> Item:
        j = self.index[i]
        return Item(self.image(i), self.source.tags[j], self.source.names[j])

    def image(self, i: int, where: float | None = None) -> Tensor:
        """uint8 (3, H, W): the middle of the image, or the crop at `where` in [0, 1). In buckets
        each has the size of its own."""
        return torch.from_numpy(self.source.pixel(self.index[i], where).copy()).permute(2, 0, 1)

    def images(self, indices: Sequence[int]) -> Tensor:
        """uint8 (n, 3, H, W)."""
        return torch.stack([self.image(i) for i in indices])

    def view(self, i: int, mirrored: bool = False, where: float | None = None) -> dict[str, Tensor]:
        """What training sees of image i: {"image": uint8 (3, H, W)}, or of a latent cache
        {"raw": (C, h, w)}; in buckets also {"sizes": (6,)}, see buckets.size_numbers."""
        seen = {}
        if self.frames:
            wide = WIDE if self.source.crop == "random" else 1
            seen["sizes"] = self.frames.numbers(self.index[i], mirrored, where, wide)
        if isinstance(self.source, LatentSource):
            return seen | {"raw": self.source.raw(self.index[i], mirrored)}
        image = self.image(i, where)
        return seen | {"image": image.flip(-1) if mirrored else image}

    def views(self, indices: Sequence[int], device: Any = "cpu") -> dict[str, Tensor]:
        """view() of several images, stacked; in buckets all of one."""
        views = [self.view(i) for i in indices]
        return {key: torch.stack([view[key] for view in views]).to(device) for key in views[0]}

    def counts(self) -> Counter:
        """How many of these images have each tag."""
        return self.source.table.counts(self.index)


def vae_for(ds: Dataset, name: str, **known: Any) -> AnyVAE:
    """The autoencoder for a data set; name and known as vae.choose() takes them.

    A cache brings its own, and its latents have to be that one's; pca is fitted to the images.
    """
    cache = ds.source.root if isinstance(ds.source, LatentSource) else None
    cached = vae_path(cache) if cache else None
    vae = choose(name, cached=cached, fit=lambda: fit_vae(ds), **known)
    if ds.frames:
        ds.frames.buckets.check_step(vae.unit, f"--vae {vae.name}")
    if cache:
        self_check(ds.source, vae)
    return vae


def fit_vae(ds: Dataset) -> AnyVAE:
    """pca, fitted to a data set."""
    resolution, shown = ds.source.resolution, 256
    if ds.frames:
        ds.frames.buckets.check_step(8, "--vae pca")
    pixel(8).latent_shape(resolution)  # of the same factor: refused before any image is read
    count = min(len(ds), pca_samples(resolution))
    # The images, and their patches in double precision.
    check_memory(f"--vae pca at --resolution {resolution}", 12 * count * 3 * resolution**2)
    images = pca_images(ds.image, count, ds.frames is not None)
    if ds.frames:
        shown *= (resolution // 8) ** 2
    vae = fit_pca(images)
    quality = psnr(vae.decode(vae.encode(images[:shown])), images[:shown])
    print(f"vae pca: fitted on {count:,} images, PSNR {quality:.2f} dB", flush=True)
    return vae


def pca_images(image: Callable[[int], Tensor], count: int, framed: bool) -> Tensor:
    """What pca is fitted to, in [-1, 1]: image(i), uint8 (3, H, W), for i below count. Those of
    several shapes are cut into patches (n, 3, 8, 8), which are all that it sees."""
    images = (image(i) for i in range(count))
    if framed:
        return torch.cat([patches_of(to_float(each), 8) for each in images])
    return to_float(torch.stack(list(images)))


def patches_of(image: Tensor, side: int) -> Tensor:
    """An image (3, H, W) cut into (n, 3, side, side)."""
    rows = image.unfold(1, side, side).unfold(2, side, side)
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1)


def latents_of(vae: AnyVAE, batch: dict[str, Tensor]) -> Tensor:
    """Model-space latents (B, C, h, w) of a batch: from its images, or from what a cache kept."""
    if "image" in batch:
        return vae.encode(to_float(batch["image"]))
    return vae.from_raw(batch["raw"])


def low_latents_of(
    vae: AnyVAE, batch: dict[str, Tensor], x0: Tensor, factor: int, upsample: str
) -> Tensor:
    """What `factor` times smaller versions of a batch say of its latents x0, in its shape
    (B, C, h, w); upsample as in diffusion.coupling.upsampled."""
    images = to_float(batch["image"]) if "image" in batch else None
    return upsampled(images, x0, vae.encode, factor, upsample)


# ---- opening ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFlags:
    """The flags of open_dataset()."""

    data: str = flag(
        "toyfaces",
        "toyfaces[:N] | robohash[:N] | DIR | FILE.parquet | hf:org/name | a latent cache",
        head="data",
    )
    stage: Literal["standard", "fine", "stage2"] = flag(
        "standard", "all | without --exclude-tags | only those, from the fine run"
    )
    exclude_tags: tuple[str, ...] = flag((), 'a,b or "a & !(b | c*)"; stage2: its fine run\'s')
    resolution: int = flag(64, "pixels", low=1, high=8192)
    crop: Literal["center", "random"] = flag("center", "of images that are not square")
    flip: bool = flag(False, "mirror half of the images")
    holdout: float = flag(0.02, "share of the images kept for the held-out loss", low=0, high=0.9)

    def open_data(self) -> Dataset:
        return open_dataset(
            self.data,
            stage=self.stage,
            exclude_tags=self.exclude_tags,
            resolution=self.resolution,
            holdout=self.holdout,
            crop=self.crop,
            flip=self.flip,
            buckets=self.bucket_sizes(),
        )

    def bucket_sizes(self) -> Buckets | None:
        return None


@dataclass(frozen=True)
class BucketFlags(ImageFlags):
    """The flags of pictures that keep their shape."""

    buckets: bool = flag(False, "pictures keep their shape; a batch has one")
    area: str = flag("1024x1024", "of a picture, in pixels", of="--buckets")
    step: int = flag(64, "sides are multiples of it", low=1, high=8192, of="--buckets")
    small: Literal["upscale", "skip"] = flag(
        "upscale", "images that are smaller than their bucket", of="--buckets"
    )

    def bucket_sizes(self) -> Buckets | None:
        if not self.buckets:
            return None
        return Buckets.of(self.area, self.step, self.small == "skip")

    def squared(self) -> "BucketFlags":
        """The flags with the --resolution that goes with --area: what previews and samples are
        drawn at, and what --shift auto says of a picture of no bucket."""
        sizes = self.bucket_sizes()
        if sizes is None:
            return self
        if self.resolution not in (BucketFlags.resolution, sizes.side):
            raise UserError(
                f"--resolution {self.resolution} with --buckets, whose pictures are about "
                f"{sizes.side}×{sizes.side}",
                do="Leave --resolution out, or change --area.",
            )
        return replace(self, resolution=sizes.side)


def open_dataset(
    spec: str,
    *,
    stage: Literal["standard", "fine", "stage2"] = "standard",
    exclude_tags: Sequence[str] = (),
    resolution: int = 64,
    holdout: float = 0.02,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    buckets: Buckets | None = None,
) -> Dataset:
    """Open a spec and cut out a stage: standard = all, fine = all without exclude_tags,
    stage2 = only those with them.

    exclude_tags are expressions (tags.py), of which an image has to fit one. A share `holdout` of
    the images, chosen by a hash of their names (so that it is the same images in every stage), is
    kept from training as `.heldout`. `.report` says what was found, left out and why, and counts
    the tags.

    buckets: images keep their shape, and resolution is the side of the square one.
    """
    check_stage(stage, exclude_tags, resolution)
    if is_cache(spec):
        source = open_cache(spec, resolution, flip, crop, buckets)
    else:
        source = open_source(spec, resolution, crop, buckets)
    found = len(source.names)
    fits = fitting(source, stage, exclude_tags)
    tagged = np.zeros(found, bool)
    for images, _ in fits.values():
        tagged |= images
    inside = {"standard": np.ones(found, bool), "fine": ~tagged, "stage2": tagged}[stage]
    held = source.held < holdout * 2**32
    heldout = Dataset(source, np.flatnonzero(inside & held))
    ds = Dataset(source, np.flatnonzero(inside & ~held), heldout)
    if not len(ds) and len(heldout):
        raise UserError(
            f"stage={stage} of {spec}: all {len(heldout)} images are held out, so that none is "
            "left to train on",
            do="Add images, or give --holdout 0: which are held out follows from their names.",
        )
    if not len(ds):
        raise UserError(
            f"stage={stage} of {spec} has no images to train on "
            f"({found} readable, {tagged.sum()} with the tags)",
            do="Choose another stage, other tags or a smaller --holdout.",
        )
    lines = describe_stage(stage, ds, fits)
    ds.found = describe(spec, stage, ds, int((~inside).sum()), lines)
    return ds


def check_stage(stage: str, exclude_tags: Sequence[str], resolution: int) -> None:
    if resolution < 1:
        raise UserError(
            f"resolution {resolution}", wanted="at least 1 pixel", do="Give another --resolution."
        )
    if stage not in STAGES:
        choices = ", ".join(STAGES)
        raise UserError(f"stage {stage!r} is not one of {choices}", do="Choose one of them.")
    if stage != "standard" and not exclude_tags:
        raise UserError(
            f"stage={stage} needs --exclude-tags",
            do="Give the tags it leaves out (fine) or keeps (stage2).",
        )


Fits = dict[str, tuple[np.ndarray, list[str]]]


def fitting(source: Source | LatentSource, stage: str, expressions: Sequence[str]) -> Fits:
    """Each expression -> (which images fit it, (n,) bool; the tags it names)."""
    vocabulary = source.table.counts()
    fits: Fits = {}
    for text in expressions:
        test, tags = compile_tags(text, vocabulary, f"stage={stage}", len(source.names))
        fits[text] = test(source.table), tags
    return fits


def describe_stage(stage: str, ds: Dataset, fits: Fits) -> list[str]:
    """A line for each expression of several tags, and for each tag."""
    lines = []
    for text, (images, tags) in fits.items():
        if len(tags) > 1:
            found, used = images.sum(), images[ds.index].sum()
            lines.append(f"  {stage} {text!r}: {found:,} found, {used:,} used")
    everything, counts = ds.source.table.counts(), ds.counts()
    for tag in sorted({tag for _, tags in fits.values() for tag in tags}):
        lines.append(f"  {stage} tag {tag!r}: {everything[tag]:,} found, {counts[tag]:,} used")
    return lines


def describe(spec: str, stage: str, ds: Dataset, left_out: int, stage_lines: list[str]) -> str:
    """found = used + held out + left out by the stage + unreadable; then the counts per tag."""
    source, used = ds.source, ds.counts()
    unreadable = len(source.unreadable)
    found = len(source.names) + unreadable
    lines = [
        f"data {spec}: {found:,} found = {len(ds):,} used + {len(ds.heldout):,} held out + "
        f"{left_out:,} left out by stage={stage} + {unreadable:,} unreadable"
    ]
    lines += [f"  {note}" for note in source.notes]
    if unreadable:
        lines.append(unreadable_line(source.unreadable))
    lines += stage_lines
    untagged = int((source.table.lengths()[ds.index] == 0).sum())
    if untagged:
        lines.append(f"  without tags: {untagged:,} of the used")
    if ds.frames:
        lines += describe_buckets(ds.frames.take(ds.index))
    tags = [f"{tag} {n:,}" for tag, n in used.most_common()]
    lines.append(f"  tags used: {first_of(tags, SHOWN_TAGS) or 'none'}")
    return "\n".join(lines)


def describe_buckets(used: Frames) -> list[str]:
    """How many of the used images each bucket has, and how many are enlarged."""
    lines = [bucket_line(used.counts(), used.buckets)]
    small = int(used.small.sum())
    if small:
        lines.append(f"  smaller than their bucket, and enlarged: {small:,} of the used")
    return lines


def bucket_line(counts: Sequence[Sequence[int]], buckets: Buckets) -> str:
    """How many images each bucket has, of those with any (Frames.counts)."""
    shares = [f"{width}×{height} {n:,}" for width, height, n in counts]
    sizes = len(buckets.sizes)
    return f"  buckets, {len(shares)} of {sizes} with images: {', '.join(shares)}"


def unreadable_line(reasons: dict[str, str]) -> str:
    """Which images cannot be used, and why each of them."""
    bad = [f"{printable(name)} ({why})" for name, why in sorted(reasons.items())]
    return f"  unreadable: {first_of(bad, SHOWN_FILES)}"


def first_of(words: Sequence[str], most: int) -> str:
    """ "a, b, c … and 4 more"."""
    more = f" … and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def classes_of(ds: Dataset, patterns: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Class names from tag patterns, and each image's label (n,): the first class among its tags,
    -1 if none."""
    table = ds.source.table
    vocabulary = table.counts()
    found: list[str] = []
    for pattern in patterns:
        found += match_tags(pattern, vocabulary, "--classes", len(ds.source.names))
    names = list(dict.fromkeys(found))
    labels = np.full(len(table), -1)
    for k, name in reversed(list(enumerate(names))):
        labels[table.any_of([name])] = k
    return names, labels[ds.index]


# ---- the stream of samples ----------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Position in the run -> everything random about that sample. A torch map-style dataset over
    positions."""

    ds: Dataset
    labels: np.ndarray | None  # (n,) or None
    latent_shape: tuple[int, int, int]
    seed: int
    flip: bool = False  # mirror half of the images
    label_drop: float = 0.0  # share of labels replaced by -1, for classifier-free guidance
    # What a network that reads is told of image i, of these sizes (training/texts.py).
    texts: Callable[[int, np.random.Generator, Tensor | None], dict[str, Tensor]] | None = None
    batch: int = 0  # of the run, over all ranks: in buckets each such batch is of one

    @cached_property
    def order(self) -> Callable[[int], int]:
        """Position -> which image."""
        if self.ds.frames is None:
            return partial(index_at, self.seed, len(self.ds))
        return BucketOrder(self.seed, self.ds.frames.members(self.ds.index), self.batch).image

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = self.order(position)
        r = rng(self.seed, "sample", position)
        q, mirror, drop = r.random(3)  # always drawn, so that no flag moves the noise
        shape = self.ds.latent_shape(i, self.latent_shape)
        eps = torch.from_numpy(r.standard_normal(shape, dtype=np.float32))
        where = None
        if self.ds.source.crop == "random":
            where = rng(self.seed, "crop", position).random()
        view = self.ds.view(i, self.flip and mirror < 0.5, where)
        sample = {**view, "q": q, "position": position, "eps": eps}
        if self.labels is not None:
            sample["y"] = -1 if drop < self.label_drop else int(self.labels[i])
        if self.texts is not None:
            draw = rng(self.seed, "caption", position)
            sample |= self.texts(i, draw, view.get("sizes"))
        return sample

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]] | UserError:
        """What a DataLoader asks for. An error that the user can mend is the result, not raised:
        a worker process would wrap it in a traceback."""
        try:
            return [self[position] for position in positions]
        except UserError as error:
            return error


def collate(samples: list[dict[str, Any]] | UserError) -> dict[str, Any] | UserError:
    return samples if isinstance(samples, UserError) else default_collate(samples)


def batches(
    stream: Stream, groups: Iterator[list[int]], workers: int = 0, pin: bool = False
) -> Iterator[dict[str, Any]]:
    """Collated samples for each list of positions: image uint8 or raw, eps, q (time quantile,
    float64), y, position.

    Worker processes decode ahead, four batches each; what comes out does not depend on how many
    there are. A latent cache is checked meanwhile: call data.watch.wait before saving what was
    learnt.
    """
    loader = DataLoader(
        stream,
        batch_sampler=groups,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=outlive_signals,
    )
    iterator = iter(loader)
    start(stream.ds.source)  # after the workers were forked
    # Workers outlive signals, so whoever is done with them has to end them: here, or, where
    # nobody reads to the end, at the script's exit, which would wait for them.
    if workers:
        atexit.register(iterator._shutdown_workers)
    error = None
    try:
        for batch in iterator:
            if isinstance(batch, UserError):
                error = batch
                break
            look(stream.ds.source)
            yield batch
    finally:
        if workers:
            atexit.unregister(iterator._shutdown_workers)
            iterator._shutdown_workers()
    if error:
        raise error


def workers_for(ds: Dataset, ranks: int, device: torch.device) -> int:
    """Loader processes of a rank: none for data in memory on a CPU, else up to 8."""
    if ds.source.pixels is not None and device.type == "cpu":
        return 0
    return min(8, (os.cpu_count() or 1) // ranks)


def outlive_signals(worker: int) -> None:
    """A signal to stop reaches the whole process group (Ctrl-C, timeout, Slurm). The trainer needs
    its workers to finish the step, and ends them itself. Should it die, they notice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # By then the step is done; an exit that waits for the workers must end.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
