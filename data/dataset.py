"""Tagged images, the stages cut out of them by tag, and the order they are seen in.

    ds = open_dataset("toyfaces", stage="fine", exclude_tags=["character:nova"], resolution=64)
    ds[0].image, ds[0].tags                  # uint8 (3, H, W), tuple of tags
    for batch in batches(ds, positions, …)   # what train.py consumes

What a spec can be is told in sources.py, what exclude_tags can say in tags.py.

Randomness is a function: which image is seen at position p of the run, its crop, flip, caption, noise, time and label
dropout depend on (seed, p) and on nothing else. So a resumed run, more ranks or another objective see exactly the same.
"""

import hashlib
import signal
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Iterator, Literal, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from harness.cli import UserError
from data.sources import Source, open_source
from data.tags import Captions, compile_tags, match_tags, printable


class Item(NamedTuple):
    image: Tensor           # uint8 (3, H, W)
    tags: tuple[str, ...]
    name: str


class Dataset:
    """The images `index` of a source. `heldout` is a Dataset of images that training never sees."""

    def __init__(self, source: Source, index: np.ndarray, heldout: "Dataset | None" = None, report: str = ""):
        self.source, self.index, self.heldout, self.report = source, index, heldout, report

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Item:
        j = self.index[i]
        return Item(self.image(i), self.source.tags[j], self.source.names[j])

    def image(self, i: int, where: float | None = None) -> Tensor:
        """uint8 (3, H, W): the middle of the image, or the crop at `where` in [0, 1)."""
        return torch.from_numpy(self.source.pixel(self.index[i], where).copy()).permute(2, 0, 1)

    def images(self, indices: Sequence[int]) -> Tensor:
        """uint8 (n, 3, H, W)."""
        return torch.stack([self.image(i) for i in indices])

    def view(self, i: int, mirrored: bool = False, where: float | None = None) -> dict[str, Tensor]:
        """What training sees of image i: {"image": uint8 (3, H, W)}, or of a latent cache {"raw": (C, h, w)}."""
        if self.source.pixels is None and hasattr(self.source, "raw"):
            return {"raw": self.source.raw(self.index[i], mirrored)}
        image = self.image(i, where)
        return {"image": image.flip(-1) if mirrored else image}

    def counts(self) -> Counter:
        return self.source.table.counts(self.index)


# ---- opening --------------------------------------------------------------------------------------------------------

def open_dataset(spec: str, *, stage: Literal["standard", "fine", "stage2"] = "standard", exclude_tags: Sequence[str] = (),
                 resolution: int = 64, holdout: float = 0.02, crop: Literal["center", "random"] = "center", flip: bool = False) -> Dataset:
    """Open a spec and cut out a stage: standard = all, fine = all without exclude_tags, stage2 = only those with them.

    exclude_tags are expressions (tags.py), of which an image has to fit one. A share `holdout` of the images, chosen by a
    hash of their names (so that it is the same images in every stage), is kept from training as `.heldout`. `.report` says
    what was found, left out and why, and counts the tags.
    """
    if resolution < 1:
        raise UserError(f"resolution {resolution}: wanted at least 1 pixel.")
    if stage not in ("standard", "fine", "stage2"):
        raise UserError(f"stage {stage!r} is not one of standard, fine, stage2.")
    if stage != "standard" and not exclude_tags:
        raise UserError(f"stage={stage} needs --exclude-tags: the tags it leaves out (fine) or keeps (stage2).")
    from data.cache import is_cache, open_cache                                    # here, for they build on this file
    source = open_cache(spec, resolution, flip, crop) if is_cache(spec) else open_source(spec, resolution, crop)
    everything = source.table.counts()
    tests = {text: compile_tags(text, everything, f"stage={stage}", len(source.names)) for text in exclude_tags}
    fits = {text: test(source.table) for text, (test, _) in tests.items()}
    tagged = np.any(list(fits.values()), axis=0) if fits else np.zeros(len(source.names), bool)
    inside = {"standard": np.ones(len(tagged), bool), "fine": ~tagged, "stage2": tagged}[stage]
    held = source.held < holdout * 2 ** 32
    ds = Dataset(source, np.flatnonzero(inside & ~held), Dataset(source, np.flatnonzero(inside & held)))
    if not len(ds):
        raise UserError(f"stage={stage} of {spec} has no images to train on ({len(tagged)} readable, {tagged.sum()} with the tags).")
    named = {tag for _, tags in tests.values() for tag in tags}
    found = {repr(text): np.flatnonzero(hits) for text, hits in fits.items() if len(tests[text][1]) > 1}
    lines = [f"  {stage} {text}: {len(hits):,} found, {len(np.intersect1d(hits, ds.index)):,} used" for text, hits in found.items()]
    used = ds.counts()
    lines += [f"  {stage} tag {tag!r}: {everything[tag]:,} found, {used[tag]:,} used" for tag in sorted(named)]
    ds.report = describe(spec, stage, ds, int((~inside).sum()), lines)
    return ds


def describe(spec: str, stage: str, ds: Dataset, left_out: int, stage_lines: list[str]) -> str:
    """found = used + held out + left out by the stage + unreadable; then the counts per tag."""
    source, used = ds.source, ds.counts()
    found = len(source.names) + len(source.unreadable)
    lines = [f"data {spec}: {found:,} found = {len(ds):,} used + {len(ds.heldout):,} held out + {left_out:,} left out by "
             f"stage={stage} + {len(source.unreadable):,} unreadable"]
    lines += [f"  {note}" for note in source.notes]
    bad = [f"{printable(name)} ({why})" for name, why in sorted(source.unreadable.items())]
    if bad:
        lines.append(f"  unreadable: {', '.join(bad[:10])}{f' … and {len(bad) - 10} more' if len(bad) > 10 else ''}")
    untagged = int((source.table.lengths()[ds.index] == 0).sum())
    lines += stage_lines + [f"  without tags: {untagged:,} of the used"] * (untagged > 0)
    shown = [f"{tag} {n:,}" for tag, n in used.most_common(24)]
    lines.append(f"  tags used: {', '.join(shown) or 'none'}{f' … and {len(used) - 24} more' if len(used) > 24 else ''}")
    return "\n".join(lines)


def classes_of(ds: Dataset, patterns: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Class names from tag patterns, and each image's label (n,): the first class among its tags, -1 if none."""
    table = ds.source.table
    vocabulary = table.counts()
    names = list(dict.fromkeys(t for p in patterns for t in match_tags(p, vocabulary, "--classes", len(ds.source.names))))
    labels = np.full(len(table), -1)
    for k, name in reversed(list(enumerate(names))):
        labels[table.any_of([name])] = k
    return names, labels[ds.index]


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
    captions: Captions | None = None         # tags as text, made anew at each position: see tags.Captions

    def __getitem__(self, position: int) -> dict[str, Any]:
        i, r = index_at(self.seed, len(self.ds), position), rng(self.seed, "sample", position)
        q, mirror, drop = r.random(3)                                           # always drawn, so no flag moves the noise
        where = rng(self.seed, "crop", position).random() if self.ds.source.crop == "random" else None
        sample = {**self.ds.view(i, self.flip and mirror < 0.5, where), "q": q, "position": position,
                  "eps": torch.from_numpy(r.standard_normal(self.latent_shape, dtype=np.float32))}
        if self.labels is not None:
            sample["y"] = -1 if drop < self.label_drop else int(self.labels[i])
        if self.captions:
            sample["caption"] = self.captions.text(self.ds.source.tags[self.ds.index[i]], rng(self.seed, "caption", position))
        return sample


def batches(stream: Stream, groups: Iterator[list[int]], workers: int = 0, pin: bool = False) -> Iterator[dict[str, Any]]:
    """Collated samples for each list of positions: image uint8 or raw, eps, q (time quantile, float64), y, position, caption.

    Worker processes decode ahead, four batches each; what comes out does not depend on how many there are."""
    loader = iter(DataLoader(stream, batch_sampler=groups, num_workers=workers, pin_memory=pin,
                             prefetch_factor=4 if workers else None, worker_init_fn=outlive_signals))
    fault = ""
    while not fault:
        try:
            batch = next(loader)
        except StopIteration:
            return
        except UserError as error:                                              # from a worker it comes wrapped in a traceback
            fault = str(error).strip().splitlines()[-1].removeprefix("config.UserError: ")
            traceback.clear_frames(error.__traceback__)                         # a cycle in them would keep the workers until the exit
        else:
            yield batch
    del loader
    raise UserError(fault)


def outlive_signals(worker: int) -> None:
    """A signal to stop reaches the whole process group (Ctrl-C, timeout, Slurm); the trainer, which needs its workers to finish
    the step, ends them itself. Should it die, they notice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))                  # by then the step is done; an exit that waits for us must end
