"""FID and its company, with a card that says what the number means.   A stopped command goes on.

    python eval_fid.py --ckpt runs/toyfaces-fm-standard --n 10000  # against what it was trained on
    python eval_fid.py --ckpt RUN --ref "toyfaces:character:nova"  # against the images with a tag
    python eval_fid.py --fake DIR --ref DIR         # folders or npz: nothing is sampled
    python eval_fid.py --boost CFM [--ckpt BASE]    # networks that enlarge: alone, or from noise on
    python eval_fid.py compare a.json b.json        # a table, unless the cards do not fit together
    torchrun --nproc_per_node=8 -- eval_fid.py --ckpt RUN  # without the -- torchrun takes --n

Generated images are rounded to uint8 and never touch a lossy format; features are kept on disk. FID
against training images rewards copies, so the floor (real against real) and a memorisation check
stand beside it.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from ckpt.hub import data_from_file
from data.boosts import Boosting, Enlarger, load_stage, open_enlarger
from data.cache import is_cache
from data.dataset import Dataset
from data.images import to_float
from diffusion.sampling import NonFinite
from harness.cli import UserError, check_flags, cli, dashed, flag, parse
from harness.files import make_dir, write_text
from harness.memory import check_drawing
from harness.ranks import PATIENCE, Ranks, join_ranks
from harness.run import versions
from metrics.boosted import Others, paired_card
from metrics.cards import Card, card_name, card_text, compare, show
from metrics.clip_score import clip_card
from metrics.distances import (
    Statistics,
    compact,
    frechet,
    frechet_distance,
    frechet_from_features,
    kernel_distance,
    load_statistics,
    precision_recall,
    save_statistics,
)
from metrics.features import (
    CHUNK,
    Images,
    Stored,
    cached_data,
    compute,
    extract,
    features_in_batches,
    fit_extractor,
    is_statistics,
    key_of,
    missing,
    open_images,
    pooled,
    short,
    split_spec,
)
from metrics.inception import FIDInception, cache_folder, load_inception
from metrics.sides import HELD, NAMES, Side, floor, measure, name_of, random_rows, side
from samplers import Drawn, Generator, Sampling, asked, open_generator
from vae import AnyVAE

__all__ = [
    "FIDInception",
    "frechet_distance",
    "frechet_from_features",
    "kernel_distance",
    "precision_recall",
]
# Images; below this Inception's covariance has not full rank.
LOW = 2_048
# Images of --ckpt if the user does not say.
DRAWN = 10_000
# Samples of an FID in training: enough to see it fall, too few for a table.
FID_IMAGES = 2_048
# Images drawn or encoded at once by distance().
AT_ONCE = 64
# Parts of the jackknife.
GROUPS = 10


@dataclass(frozen=True)
class Config(Boosting, Sampling):
    ckpt: str = flag("", "what to sample: a file, a run's folder, hf:org/name[/file] …")
    fake: str = flag(
        "",
        "… or images that are there: a folder, arr_0 in an npz, or mu and sigma in one",
        head="what is measured",
    )
    boost: tuple[str, ...] = flag(
        (),
        "cfm networks: enlarge what --ckpt draws; alone, held-out images against themselves",
        head="enlarging",
    )
    n: int = flag(0, "images; default 10,000 of --ckpt, all of --fake", low=0, high=1e9)
    ref: str = flag("", "DATA[:tag expression], a folder, npz; default what --ckpt was trained on")
    holdout: float = flag(
        -1.0,
        "share of --ref held out, for memorisation; -1 = as --ckpt was trained, else 0",
        low=-1,
        high=1,
    )
    features: Literal["inception", "pca"] = flag(
        "inception", "inception | pca: FD-pca, instant, needs no weights"
    )
    weights: str = flag(
        "",
        "a file, hf:org/name/file, random:SEED; default what is in the cache, which is filled by "
        "python -m metrics.inception --fetch",
        of="--features inception",
    )
    preproc: Literal["torch", "clean", "tf"] = flag(
        "torch", "torch | clean | tf, as pytorch-fid | clean-fid | ADM", of="--features inception"
    )
    pairs: int = flag(
        5_000, "images a side, at most, for KID, precision, memorisation", low=10, high=1e6
    )
    clip: str = flag(
        "",
        "also CLIP score, by this CLIP, of pictures that say their prompts (metrics.clip_score)",
        of="--fake",
    )
    infinity: bool = flag(False, "also FID at infinitely many images, by a fit")
    out: str = flag(
        "", "the card, a JSON file; default cards/<what>.json", writes="file", head="output"
    )
    save_stats: str = flag("", "also write the reference's mu and sigma: FILE.npz", writes=".npz")
    cache: str = flag("", "folder of features; default ~/.cache/twinpath", writes="folder")


# Flags of sampling that mean something without a checkpoint.
USED_BY_FAKE = ("ckpt", "seed", "device", "resolution")


def check(cfg: Config) -> None:
    """What can be said of the flags alone."""
    check_flags(cfg)
    if cfg.ckpt and cfg.fake or not (cfg.ckpt or cfg.fake or cfg.boost):
        raise UserError(
            "wanted either images to sample or images that are there",
            do="Give one of --ckpt (to sample from) and --fake (a folder, or an npz).",
        )
    if cfg.fake and not cfg.ref:
        what = "--fake needs --ref: DATA[:tag expression], a folder, or an npz"
        raise UserError(what, do="Add --ref.")
    if cfg.n == 1:
        raise UserError(
            "--n 1: a distance between sets needs at least 2 images",
            do="Give more: it means something from 2,048 on.",
        )
    if -1 < cfg.holdout < 0:
        wanted = "0 to 1, or -1 for what the checkpoint was trained with"
        raise UserError(f"--holdout {cfg.holdout:g}", wanted=wanted, do="Try --holdout 0.02.")
    if cfg.save_stats and is_statistics(cfg.ref):
        raise UserError(f"--save-stats: {cfg.ref} is moments already", do="Leave it out.")
    moments = bool(cfg.fake) and is_statistics(cfg.fake)
    if cfg.infinity and (moments or 0 < cfg.n < 20):
        got = "moments" if moments else str(cfg.n)
        raise UserError(
            f"--infinity is a fit over subsets of the images: wanted at least 20, got {got}",
            do="Leave it out.",
        )
    if cfg.fake:
        more = [field.name for field in fields(Boosting)]
        more += ["n", "seed"] if moments else []
        check_idle(cfg, f"--fake {cfg.fake}", more)
    elif not cfg.ckpt:
        more = ["infinity", "save_stats", "pairs"]
        check_idle(cfg, "--boost without --ckpt", more, ("batch", "dtype"))


def check_idle(cfg: Config, what: str, more: list[str], used: tuple[str, ...] = ()) -> None:
    """Images that are there are not sampled, and moments cannot be chosen from."""
    sampling = {field.name for field in fields(Sampling)} - {*USED_BY_FAKE, *used}
    for field in fields(cfg):
        idle = field.name in sampling or field.name in more
        if idle and getattr(cfg, field.name) != field.default:
            raise UserError(f"{dashed(field.name)} does nothing with {what}", do="Leave it out.")


def warn(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(f"warning: {text}", file=sys.stderr)


# ---- sampling -----------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A checkpoint as a function from seeds to images, and what makes its images what they are."""

    generator: Generator
    labels: Tensor | None  # the image of seed s has the (s mod len)-th
    sampled: dict[str, Any]  # what an image of a seed depends on, beside the weights …
    means: dict[str, Any]  # … and what those mean: architecture and objective
    subject: dict[str, Any]  # whose weights
    trained: dict[str, Any]  # the run's config, {} if the file has none
    enlarger: Enlarger | None = None

    @property
    def resolution(self) -> int:
        return self.enlarger.sizes[-1][0] if self.enlarger else self.generator.resolution

    def draw(self, seeds: list[int]) -> Drawn:
        labels = self.labels
        if labels is not None:
            labels = labels[[seed % len(labels) for seed in seeds]]
        drawn = self.generator.images(seeds, labels)
        if not self.enlarger:
            return drawn
        images, large = self.enlarger.enlarge(drawn.pixels, seeds, labels)
        more = float(sum(cost.nfe_each for cost in large.costs).double().mean())
        nfe, evaluations = drawn.nfe + more, drawn.evaluations + more
        return drawn._replace(images=images, nfe=nfe, evaluations=evaluations)

    def key(self, seed: int, extractor: Any) -> dict[str, Any]:
        """What the features of its images depend on: the name they have on disk."""
        weights = {"checkpoint": self.subject["fingerprint"], "vae": self.subject["vae"]}
        how = {"resolution": self.resolution, "seed": seed, "extractor": extractor.id}
        return {**weights, **self.sampled, **self.means, **how}


def open_checkpoint(cfg: Sampling, device: torch.device) -> Checkpoint:
    """The checkpoint that flags name; one whose images depend on others is refused."""
    gen = open_generator(cfg, device)
    if gen.objective.coupling == "lowres":
        raise UserError(
            f"{cfg.ckpt} was trained to enlarge pictures (cfm), so what it draws depends on theirs",
            do="Enlarge them with samplers.py, then give the folder as --fake.",
        )
    labels = asked(cfg, gen)
    trained = gen.meta.get("config", {})
    subject = {
        "checkpoint": str(gen.path),
        "fingerprint": gen.meta["fingerprint"],
        "objective": gen.objective.target,
        "vae": gen.vae.fingerprint,
    }
    subject |= {name: gen.meta.get(name) for name in ("run", "images", "ema")}
    subject |= {name: trained[name] for name in trained if name in ("flip", "crop")}
    means = {"objective": asdict(gen.objective), "unet": gen.meta.get("unet")}
    if "network" in gen.meta:  # of another kind than UNet
        means["network"] = gen.meta["network"]
    for name in ("num_heads", "num_head_channels", "attention_order"):
        means[name] = getattr(cfg, name)
    return Checkpoint(gen, labels, dict(gen.sampled), means, subject, trained)


def features_of(extractor: Any, images: Tensor, device: torch.device) -> Tensor:
    """Features (B, d) of uint8 images (B, 3, H, W)."""
    return features_in_batches(
        extractor, lambda part: images[part.start : part.stop], range(len(images)), device
    )


def sample_features(
    cfg: Sampling, checkpoint: Checkpoint, extractor: Any, n: int, cache: Path, ranks: Ranks
) -> Stored:
    """Features of the images of seeds cfg.seed … + n - 1: all ranks, in chunks that a kill leaves
    on disk. Says first what it will cost."""
    check_drawing(checkpoint.generator, cfg.batch, min(n, CHUNK))
    key = checkpoint.key(cfg.seed, extractor)
    folder, nfe = cache / key_of(key), {}

    def produce(chunk: range) -> Tensor:
        seeds = [cfg.seed + i for i in chunk]
        parts = [seeds[i : i + cfg.batch] for i in range(0, len(seeds), cfg.batch)]
        drawn = [checkpoint.draw(part) for part in parts]
        nfe[chunk] = sum(each.nfe * len(part) for each, part in zip(drawn, parts))
        images = torch.cat([each.images for each in drawn])
        return features_of(extractor, images, ranks.device)

    def notes(chunk: range) -> dict[str, Any]:
        return {"nfe": nfe[chunk]}

    todo = sum(map(len, missing(folder, n, range(0, n, CHUNK), key_of(key))))
    ranks.broadcast(lambda: announce(cfg, checkpoint, extractor, todo, n, ranks))
    stored = compute(folder, n, np.arange(n), produce, ranks, key, "sampling", notes)
    checkpoint.sampled["nfe"] = sum(note["nfe"] for note in stored.notes()) / n
    return stored


def announce(
    cfg: Sampling, checkpoint: Checkpoint, extractor: Any, todo: int, n: int, ranks: Ranks
) -> None:
    """Say what sampling will cost, after a try."""
    if checkpoint.sampled.get("classes", "").startswith("unconditional"):
        warn(
            ranks,
            f"{cfg.ckpt} knows classes, and these images are drawn without a class; training "
            "images have theirs.  Give --labels a,b,c to draw of each class alike.",
        )
    if not todo:
        return
    on_cpu = ranks.device.type == "cpu"
    count = min(n, 8 if on_cpu else cfg.batch)
    seeds = list(range(cfg.seed, cfg.seed + count))
    for _ in range(1 if on_cpu else 2):  # a GPU's first call compiles
        start = time.perf_counter()
        drawn = checkpoint.draw(seeds)
        features_of(extractor, drawn.images, ranks.device)
        seconds = (time.perf_counter() - start) / count
    networks = ""
    if drawn.evaluations != drawn.nfe:  # guidance
        networks = f" × {drawn.evaluations / drawn.nfe:g} networks"
    number = "rank" if ranks.world == 1 else "ranks"
    print(
        f"{todo:,} of {n:,} images to draw × {drawn.nfe:g} NFE{networks} = "
        f"{todo * drawn.evaluations:,.0f} network evaluations: about "
        f"{span(seconds * todo / ranks.world)} on {ranks.world} {number}, with their features",
        flush=True,
    )


def span(seconds: float) -> str:
    """A duration as it is read."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---- a distance alone, without a card -----------------------------------------------------------


def generate(
    ckpt: Path | str, n: int, steps: int, device: torch.device, method: str = "heun", seed: int = 0
) -> tuple[Tensor, AnyVAE]:
    """n images of seeds seed, seed + 1, … from a checkpoint that says what it is: uint8
    (n, 3, H, W) on the CPU, and its autoencoder. Classes in turn."""
    gen = open_generator(Sampling(str(ckpt), method=method, steps=steps), device)
    parts = []
    for part in torch.arange(n).split(AT_ONCE):
        labels = part % len(gen.classes) if gen.classes else None
        parts.append(gen.images((seed + part).tolist(), labels).images.cpu())
    return torch.cat(parts), gen.vae


def features_in(kind: str, images: Tensor, vae: AnyVAE, device: torch.device) -> Tensor:
    """uint8 (n, 3, H, W) -> (n, d) fp32 on the CPU: Inception's, or "latents", averaged to 4×4.

    With more dimensions than images a covariance says little.
    """
    if kind == "inception":
        return features_of(load_inception(device=device), images, device)
    parts = [vae.encode(to_float(part).to(device)) for part in images.split(AT_ONCE)]
    return torch.cat([pooled(part, 4).cpu() for part in parts])


def distance(
    ckpt: Path | str,
    ds: Dataset,
    n: int,
    steps: int,
    device: torch.device,
    method: str = "heun",
    kind: str = "latents",
    seed: int = 0,
) -> float:
    """FD of n generated images against as many of ds, in the space of the checkpoint's own latents
    or of Inception."""
    images, vae = generate(ckpt, n, steps, device, method, seed)
    real = ds.images(range(min(n, len(ds))))
    fake = features_in(kind, images, vae, device)
    return frechet_from_features(fake, features_in(kind, real, vae, device))


# ---- in training --------------------------------------------------------------------------------


class FID:
    """FID of a run while it trains, on fixed seeds, to the run's own training images.

    trained: the run's config as a dict; name: what an error calls the run. Every rank calls. The
    reference's features are extracted here, once, before training.
    """

    def __init__(self, trained: dict[str, Any], name: str, ranks: Ranks):
        self.ranks, self.announced = ranks, False
        spec = default_ref(trained, name)
        if is_cache(trained["data"]):  # which says what it was made from
            data_from_file(spec)
        images = open_images(spec, trained["resolution"])
        kind = trained["fid_features"]
        if kind == "inception":
            self.extractor = load_inception(device=ranks.device)
        else:
            self.extractor = fit_extractor(images)
        train, _ = images.split(trained["holdout"])
        stored = extract(train, self.extractor, cache_folder() / "features", ranks)
        self.ref = side(stored, ranks)
        self.names = [metric + short(FID_IMAGES) for metric in NAMES[kind]]
        self.floor = floor(self.ref, FID_IMAGES, FID_IMAGES)

    def __call__(self, draw: Callable[[list[int]], Tensor], seen: int, of: str) -> dict[str, Any]:
        """A row of the log, after `seen` images, of the weights named `of`. Every rank calls.

        draw(seeds) -> uint8 (B, 3, H, W) of all seeds, on every rank; each rank extracts the
        features of its share. A network that draws no numbers has no distance: null in the log.
        """
        start = time.perf_counter()
        try:
            fid, kid, error = self.measured(draw)
        except NonFinite as broken:
            warn(self.ranks, f"no {self.names[0]}: {broken}")
            fid = kid = error = float("nan")
        row = {"event": "fid", "images": seen, "of": of, self.names[0]: fid}
        row |= {self.names[1]: kid, f"{self.names[1]} error": error}
        if self.floor:
            row |= {"floor": self.floor["frechet"], "floor n": self.floor["n"]}
        return {**row, "seconds": time.perf_counter() - start}

    def measured(self, draw: Callable[[list[int]], Tensor]) -> list[float]:
        """distances() of what is drawn."""
        start = time.perf_counter()
        group, parts = 64 * self.ranks.world, []
        for lo in range(0, FID_IMAGES, group):
            seeds = list(range(lo, min(lo + group, FID_IMAGES)))
            parts.append(self.share_of_features(draw(seeds)))
            if not self.announced and self.ranks.rank == 0:
                seconds = (time.perf_counter() - start) * FID_IMAGES / len(seeds)
                what = f"{self.names[0]}: {FID_IMAGES:,} samples each time"
                print(f"{what}, about {span(seconds)}", flush=True)
            self.announced = True
        y = self.ranks.all_reduce(torch.cat(parts)).double().cpu()
        return self.ranks.broadcast(lambda: self.distances(y))

    def share_of_features(self, images: Tensor) -> Tensor:
        """(B, d): this rank's rows are the features of its share of the images, the others are
        zero."""
        share = slice(self.ranks.rank, None, self.ranks.world)
        own = features_of(self.extractor, images[share], self.ranks.device)
        rows = own.new_zeros(len(images), own.shape[1], device=self.ranks.device)
        rows[share] = own.to(rows)
        return rows

    def distances(self, y: Tensor) -> list[float]:
        """[Fréchet distance, kernel distance, its standard error] of features (N, d)."""
        kid = kernel_distance(random_rows(self.ref.stored, FID_IMAGES), y)
        return [frechet(self.ref.best(), compact(y)), *kid]


# ---- the two sides ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is compared with what, opened."""

    cfg: Config
    ranks: Ranks
    checkpoint: Checkpoint | None
    spec: str  # the reference
    holdout: float  # the share of it that training did not see
    images: dict[str, Images]  # by spec; moments have none
    size: tuple[int, int] | None  # (width, height) of both sides; None: moments only
    extractor: Any
    cache: Path


def images_of(data: str) -> str:
    """The images a run saw; for a latent cache, what it was made from."""
    return cached_data(data) if is_cache(data) else data


def default_ref(trained: dict[str, Any], ckpt: str) -> str:
    """What a run was trained on, as DATA:expression."""
    if not trained.get("data"):
        raise UserError(f"{ckpt} does not say what it was trained on", do="Give --ref DATA.")
    data, stage = images_of(trained["data"]), trained.get("stage", "standard")
    tags = [f"({text})" for text in trained.get("exclude_tags", ())]
    text = ""
    if stage == "fine":
        text = " & ".join(f"!{tag}" for tag in tags)
    elif stage == "stage2":
        text = " | ".join(tags)
    return f"{data}:{text}" if text else data


def holdout_of(cfg: Config, spec: str, trained: dict[str, Any]) -> float:
    """The share of the reference that training did not see: the run's own, if it is its data."""
    if cfg.holdout >= 0:
        return cfg.holdout
    if not trained.get("data"):
        return 0.0
    own = Path(images_of(trained["data"])).resolve()
    return trained.get("holdout", 0.0) if Path(split_spec(spec)[0]).resolve() == own else 0.0


def open_task(cfg: Config, ranks: Ranks) -> Task:
    """Load the checkpoint, open both sets, and refuse sets of two sizes."""
    checkpoint = open_checkpoint(cfg, ranks.device) if cfg.ckpt else None
    if cfg.boost:
        checkpoint.enlarger = open_enlarger(cfg, checkpoint.generator)
        checkpoint.sampled |= checkpoint.enlarger.sampled()
    trained = checkpoint.trained if checkpoint else {}
    spec = cfg.ref or data_from_file(default_ref(trained, cfg.ckpt), "--ref")
    holdout = holdout_of(cfg, spec, trained)
    resolution = checkpoint.resolution if checkpoint else cfg.resolution
    specs = [name for name in (spec, cfg.fake) if name and not is_statistics(name)]
    images = {name: open_images(name, resolution) for name in specs}
    sizes = [each.size for each in images.values()]
    if checkpoint:
        sizes.append((resolution, resolution))
    sizes = list(dict.fromkeys(sizes))
    if len(sizes) > 1:
        both = " and ".join(f"{width}×{height}" for width, height in sizes)
        raise UserError(
            f"the two sides have {both} pixels",
            do="Give --resolution N, and folders are resized to it as for training (shorter side "
            "by Lanczos, middle cut out); arr_0 in an npz is taken as it is.",
        )
    size = sizes[0] if sizes else None
    extractor = build_extractor(cfg, images.get(spec), ranks)
    cache = features_folder(cfg)
    return Task(cfg, ranks, checkpoint, spec, holdout, images, size, extractor, cache)


def features_folder(cfg: Config) -> Path:
    return Path(cfg.cache) if cfg.cache else cache_folder() / "features"


def build_extractor(cfg: Any, images: Images | None, ranks: Ranks) -> Any:
    """What makes features of images; images: the reference's."""
    if cfg.features == "inception":
        return load_inception(cfg.weights, cfg.preproc, ranks.device)
    if images is None:
        raise UserError(
            "--features pca is fitted to the reference's images, and --ref gives only moments",
            do="Give DATA or a folder.",
        )
    return fit_extractor(images)


def moments_of(path: str, task: Task) -> tuple[Side, dict[str, Any]]:
    """An npz of mu and sigma as a side, and what it says of itself; refused if that is not how the
    other side is made."""
    asked = task.extractor.id
    dimensions = 2048 if isinstance(task.extractor, FIDInception) else None
    stats, meta = load_statistics(Path(path), dimensions)
    differs = [
        f"{key} {value!r}, and this asks for {asked.get(key)!r}"
        for key, value in meta.get("features", {}).items()
        if value != asked.get(key)
    ]
    if differs:
        raise UserError(
            f"{path} was made with {'; '.join(differs)}",
            do="Repeat with its settings, or make it anew with --save-stats.",
        )
    if task.size and meta.get("size") and tuple(meta["size"]) != task.size:
        own, other = (f"{width}×{height}" for width, height in (meta["size"], task.size))
        raise UserError(
            f"{path} was made of images of {own} pixels, and the others have {other}",
            do="Make it anew with --save-stats, at one --resolution.",
        )
    if "features" not in meta:
        warn(
            task.ranks,
            f"{path} does not say which weights saw its images, nor how they were resized; "
            "this card cannot vouch for it.",
        )
    content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Side(None, [stats], meta["n"]), {"hash": content, **meta}


def reference_side(task: Task) -> tuple[Side, Stored | None, dict[str, Any]]:
    """(what training saw of the reference, what it did not, what the card says of it)."""
    if task.spec not in task.images:
        ref, about = moments_of(task.spec, task)
        return ref, None, about
    images = task.images[task.spec]
    train, rest = images.split(task.holdout)
    if len(images) > 1 and len(train) < 2:
        raise UserError(
            f"{task.spec} has {len(train)} images that are not held out "
            f"(--holdout {task.holdout:g}); a distance needs at least 2",
            do="Lower --holdout.",
        )
    both = extract(images, task.extractor, task.cache, task.ranks)
    ref, held = side(both.select(train.index), task.ranks), both.select(rest.index)
    if task.checkpoint:
        warn_of_copies(task, len(rest))
    about = {"hash": train.hash, "filter": train.filter, "reference": train.spec}
    return ref, held, {**about, "holdout": task.holdout, "size": list(task.size)}


def warn_of_copies(task: Task, held: int) -> None:
    """Say where the memorisation check cannot see."""
    if held < HELD:
        what = f"no memorisation check: {held} images are held out of {task.spec}"
        warn(task.ranks, f"{what}, and it takes {HELD}.")
    views = []
    if task.checkpoint.trained.get("flip"):
        views.append("mirrored images")
    if task.checkpoint.trained.get("crop") == "random":
        views.append("random crops")
    if views:
        warn(
            task.ranks,
            f"{task.cfg.ckpt} was trained on {' and '.join(views)} too, and the reference is the "
            "middle of each image as it is: copies of the others may go unseen.",
        )


def generated_side(task: Task) -> tuple[Side, dict[str, Any]]:
    """What is measured, and what the card says of whose it is."""
    cfg, ranks = task.cfg, task.ranks
    if task.checkpoint:
        n = cfg.n or DRAWN
        stored = sample_features(cfg, task.checkpoint, task.extractor, n, task.cache, ranks)
        return side(stored, ranks, GROUPS), task.checkpoint.subject
    if cfg.fake not in task.images:
        fake, meta = moments_of(cfg.fake, task)
        return fake, {"fake": cfg.fake, **meta}
    images = task.images[cfg.fake]
    stored = extract(images.take(cfg.n, cfg.seed), task.extractor, task.cache, ranks)
    about = {"hash": images.hash, "filter": images.filter, "unreadable": images.unreadable}
    return side(stored, ranks, GROUPS), {"fake": cfg.fake, **about}


# ---- the command --------------------------------------------------------------------------------


def evaluate(cfg: Config, ranks: Ranks) -> Card:
    """Measure, and write down how."""
    check(cfg)
    start = time.perf_counter()
    between = cfg.ckpt or cfg.fake
    parts = between_sets(cfg, ranks) if between else ranks.broadcast(lambda: enlarging(cfg, ranks))
    card = {
        "kind": "metric card",
        **parts,
        "seconds": time.perf_counter() - start,
        "ranks": ranks.world,
        **versions("pillow", "scipy"),
    }
    return json.loads(json.dumps(card), parse_constant=lambda name: None)  # JSON has no NaN


def enlarging(cfg: Config, ranks: Ranks) -> Card:
    """Networks that enlarge, on images that they have not seen."""
    loaded = [load_stage(name) for name in cfg.boost]
    trained = loaded[-1].meta.get("config", {})
    spec = cfg.ref or data_from_file(default_ref(trained, cfg.boost[-1]), "--ref")
    holdout = holdout_of(cfg, spec, trained)
    if is_statistics(spec):
        raise UserError(f"--boost enlarges images, and {spec} is moments", do="Give images.")
    images = open_images(spec, cfg.resolution or loaded[-1].meta.get("resolution", 0))
    seen, held = images.split(holdout)
    truth = held if holdout or not cfg.ref else images
    extractor = build_extractor(cfg, images, ranks)
    others = None
    if truth is held and len(seen) > 1:
        cache, alone = features_folder(cfg), Ranks(0, 1, ranks.device)
        others = Others(seen, side(extract(seen, extractor, cache, alone), alone))
    parts = paired_card(cfg, loaded, truth, extractor, ranks.device, others)
    parts["measured"]["holdout"] = holdout
    return parts | {"weights_sha256": getattr(extractor, "sha256", "")}


def between_sets(cfg: Config, ranks: Ranks) -> Card:
    """Open both sides, get their features, and measure."""
    clip = {"metrics": {}, "measured": {}}
    if cfg.clip:
        clip = ranks.broadcast(lambda: clip_card(cfg.fake, cfg.clip, cfg.seed, ranks.device))
    task = open_task(cfg, ranks)
    ref, held, about = reference_side(task)
    fake, subject = generated_side(task)
    least = min(each.n or LOW for each in (fake, ref))
    if least < LOW:
        warn(
            ranks,
            f"{least:,} images are fewer than {LOW:,}: a Fréchet distance is biased upwards "
            "there, and compares only with others at the same number.  Look at the floor and at "
            "the kernel distance.",
        )
    extractor = task.extractor
    if cfg.save_stats and ranks.rank == 0:
        make_dir(Path(cfg.save_stats).parent)
        save_statistics(Path(cfg.save_stats), ref.total, {"features": extractor.id, **about})
    how = {"pairs": cfg.pairs, "infinity": cfg.infinity}
    metrics = ranks.broadcast(lambda: measure(fake, ref, held, name_of(extractor), **how))
    sampled = {}
    if task.checkpoint:
        seeds = [cfg.seed, cfg.seed + fake.n - 1]
        sampled = {**task.checkpoint.sampled, "seeds": seeds}
    return {
        "metrics": metrics | clip["metrics"],
        "measured": measured_of(task, fake, ref, about) | clip["measured"],
        "sampled": sampled,
        "subject": subject,
        "weights_sha256": getattr(extractor, "sha256", ""),
    }


def measured_of(task: Task, fake: Side, ref: Side, about: dict[str, Any]) -> dict[str, Any]:
    """What two cards must share to stand in one table: extractor, numbers of images, reference."""
    return {
        **task.extractor.id,
        "n": fake.n,
        "reference": about.get("reference", task.spec),
        "reference hash": about.get("hash"),
        "filter": about.get("filter", ""),
        "reference images": ref.n,
        "holdout": about.get("holdout"),
        "size": list(task.size or about.get("size", ())),
        "pairs": task.cfg.pairs,
    }


def compare_words(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """A.json B.json … [--allow field,field] -> (files, fields)."""
    names, allowed, rest = [], [], iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        if key != "--allow":
            names.append(word)
        elif equals:
            allowed.append(value)
        else:
            allowed.append(next(rest, "--"))
    if len(names) < 2 or any(word.startswith("--") for word in (*names, *allowed)):
        usage = "python eval_fid.py compare A.json B.json … [--allow field,field]"
        raise UserError("compare takes two cards or more", do=f"Write {usage}")
    fields = [field.strip() for text in allowed for field in text.split(",")]
    return names, tuple(filter(None, fields))


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        print(compare(*compare_words(sys.argv[2:])))
        return
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(vars(cfg), indent=1))
        return
    # A resumed rank may have nothing to do, and another one all.
    ranks = join_ranks(cfg.device, patience=PATIENCE)
    card = evaluate(cfg, ranks)
    if ranks.rank == 0:
        path = Path(cfg.out or card_name(card))
        make_dir(path.parent)
        write_text(path, card_text(card))
        print(show(card))
        print(path)
    ranks.leave()


if __name__ == "__main__":
    cli(main)
