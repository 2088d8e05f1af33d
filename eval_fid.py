"""FID and its company, with a card that says what the number means:

    python eval_fid.py --ckpt runs/toyfaces-fm-standard --n 10000         # against what it was trained on; the same command goes on
    python eval_fid.py --ckpt RUN --ref "toyfaces:character:nova"         # … against the images with a tag
    python eval_fid.py --fake DIR --ref DIR                               # folders, arr_0 or mu/sigma npz: no network is sampled
    python eval_fid.py compare a.json b.json                              # a table, unless the cards do not fit together
    torchrun --nproc_per_node=8 -- eval_fid.py --ckpt RUN                 # every rank samples; without the -- torchrun takes --n for its own

Generated images are rounded to uint8 and never touch a lossy format; features are kept on disk. FID against training images
rewards copies, so the floor (real against real) and a memorisation check stand beside it.
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import drawing
import samplers
from harness.cli import UserError, cli, closest, parse
from harness.ranks import precision
from harness.run import versions
from metrics.cards import card_name, compare, show
from metrics.features import (CHUNK, Images, Stored, cached_data, chunk_path, compute, extract, fit_extractor, is_statistics, key_of, features_in_batches, open_images,
                      read_chunk, short, split_spec)
from harness.files import make_dir, write_text
from metrics.inception import FIDInception, cache_folder, load_inception
from data.cache import is_cache
from metrics.distances import (Statistics, frechet, frechet_distance, frechet_from_features, frechet_infinity, jackknife, kernel_distance, load_statistics,
                     memorisation, precision_recall, save_statistics)
from harness.pictures import to_uint8
from harness.ranks import PATIENCE, Ranks, join_ranks

__all__ = ["FIDInception", "frechet_distance", "frechet_from_features", "kernel_distance", "precision_recall"]
LOW = 2048                                   # images; below this Inception's covariance has not full rank
DRAWN = 10_000                               # images of --ckpt, if nobody says
FID_IMAGES = 2_048                           # samples of an FID in training: enough to see it fall, too few for a table
GROUPS = 10                                  # of the jackknife
HELD = 10                                    # held-out images; fewer say nothing of memorisation
NAMES = {"inception": ("FID", "KID"), "pca": ("FD-pca", "KD-pca")}


@dataclass(frozen=True)
class Config(drawing.Config):
    ckpt: str = ""                     # what to sample: a file, a run's folder, hf:org/name[/file] …
    n: int = 0                         # images; default 10,000 of --ckpt, all of --fake
    out: str = ""                      # the card, a JSON file; default cards/<what>.json
    fake: str = ""                     # … or images that are there: a folder, arr_0 in an npz, or mu and sigma in one
    ref: str = ""                      # DATA[:tag expression], a folder or npz; default what --ckpt was trained on
    features: Literal["inception", "pca"] = "inception"   # pca: FD-pca, instant, needs no weights
    weights: str = ""                  # Inception's: a file, hf:org/name/file, random:SEED; default the cache (python -m metrics.inception --fetch)
    preproc: Literal["torch", "clean", "tf"] = "torch"   # as pytorch-fid | clean-fid | torch-fidelity and ADM
    holdout: float = -1.0              # share of --ref held out for the memorisation check; -1 = as --ckpt was trained, else 0
    pairs: int = 5_000                 # images a side, at most, for what compares pairs: KID, precision, memorisation
    infinity: bool = False             # also FID at infinitely many images, by a fit
    cache: str = ""                    # folder of features; default ~/.cache/twinpath
    save_stats: str = ""               # also write the reference's mu and sigma: FILE.npz


# ---- sampling: the only place that knows how ------------------------------------------------------------------------

class Generator(NamedTuple):
    draw: Callable[[list[int]], tuple[Tensor, float, float]]   # seeds -> uint8 (B, 3, H, W), NFE an image, network evaluations an image
    sampled: dict[str, Any]                                 # everything an image of a seed depends on, but for the weights …
    means: dict[str, Any]                                   # … and for what they mean: architecture and objective
    subject: dict[str, Any]                                 # whose weights
    resolution: int
    trained: dict[str, Any]                                 # the run's config, {} if the file has none


def open_generator(cfg: Config, device: torch.device) -> Generator:
    """A checkpoint as a function from seeds to images."""
    cfg = replace(cfg, n=cfg.n or DRAWN)
    d = drawing.load(cfg, device)
    if d.objective.coupling == "lowres":
        raise UserError(f"{cfg.ckpt} was trained to enlarge pictures (cfm), so what it draws depends on theirs.  Enlarge them with samplers.py, then "
                        "give the folder as --fake.")
    ids = drawing.pick_labels(cfg.labels, d.classes, len(cfg.labels))           # image of seed s: the (s mod len)-th

    def draw(seeds: list[int]) -> tuple[Tensor, float, float]:
        before = d.evaluations
        noise = samplers.draw(samplers.generators(seeds), torch.empty(1, *d.latent_shape, device=device))
        y = None if ids is None else {"y": ids[[s % len(ids) for s in seeds]].to(device)}
        s = samplers.sample(d.predict, samplers.begin(d.objective, noise, float(d.grid[0])), method=d.method, grid=d.grid, seeds=seeds, cond=y, **d.options)
        return to_uint8(d.vae.decode(s.x)), float(s.nfe_each.double().mean()), (d.evaluations - before) / len(seeds)

    used = f"{len(set(ids.tolist()))}" if ids is not None else "unconditional,"
    sampled = {**d.said, "t_start": float(d.grid[0]), "cfg": cfg.cfg, "labels": list(cfg.labels),
               "dtype": precision(device, cfg.dtype), "device": device.type, **({"classes": f"{used} of {len(d.classes)}"} if d.classes else {}),
               **({"batch": cfg.batch} if cfg.whole_batch else {}), **({"cfg interval": list(cfg.cfg_interval)} if cfg.cfg_interval else {}),
               **({"cfg rescale": cfg.cfg_rescale} if cfg.cfg_rescale else {}), **({"guide": d.guide} if d.guide else {})}
    subject = {"checkpoint": str(d.path), "fingerprint": d.meta["fingerprint"], "objective": d.objective.target, "vae": d.vae.fingerprint,
               **{k: d.meta.get(k) for k in ("run", "images", "ema")}, **{k: v for k, v in d.meta.get("config", {}).items() if k in ("flip", "crop")}}
    means = {"objective": asdict(d.objective), "unet": d.meta.get("unet"), **{k: getattr(cfg, k) for k in ("num_heads", "num_head_channels", "attention_order")}}
    return Generator(draw, sampled, means, subject, d.resolution, d.meta.get("config", {}))


def sample_features(cfg: Config, gen: Generator, extractor: Any, n: int, cache: Path, ranks: Ranks) -> Stored:
    """Draw and look at images cfg.seed … + n - 1; all ranks, in chunks that a kill leaves on disk. Says first what it will cost."""
    key = {"checkpoint": gen.subject["fingerprint"], "vae": gen.subject["vae"], **gen.sampled, **gen.means, "resolution": gen.resolution,
           "seed": cfg.seed, "extractor": extractor.id}
    folder = cache / key_of(key)
    chunks = [range(lo, min(lo + CHUNK, n)) for lo in range(0, n, CHUNK)]
    todo = sum(len(chunk) for chunk in chunks if read_chunk(chunk_path(folder, chunk.start, n)) is None)

    def nfe_file(chunk: range) -> Path:
        return chunk_path(folder, chunk.start, n).with_suffix(".nfe")

    def announce() -> None:
        if gen.sampled.get("classes", "").startswith("unconditional"):
            print(f"warning: {cfg.ckpt} knows classes, and these images are drawn without a class; training images have theirs.  Give --labels a,b,c to "
                  "draw of each class alike.", file=sys.stderr)
        if not todo:
            return
        seeds = list(range(cfg.seed, cfg.seed + min(n, 8 if ranks.device.type == "cpu" else cfg.batch)))
        for _ in range(1 if ranks.device.type == "cpu" else 2):                 # a GPU's first call compiles
            start = time.perf_counter()
            images, nfe, calls = gen.draw(seeds)
            features_in_batches(extractor, lambda part: images[part.start:part.stop], range(len(images)), ranks.device)
            seconds = (time.perf_counter() - start) / len(seeds)
        networks = f" × {calls / nfe:g} networks" if calls != nfe else ""       # guidance
        print(f"{todo:,} of {n:,} images to draw × {nfe:g} NFE{networks} = {todo * calls:,.0f} network evaluations: about "
              f"{span(seconds * todo / ranks.world)} on {ranks.world} rank{'s' * (ranks.world > 1)}, with their features", flush=True)
    ranks.broadcast(announce)

    def produce(chunk: range) -> Tensor:
        seeds = [cfg.seed + i for i in chunk]
        groups = [seeds[i:i + cfg.batch] for i in range(0, len(seeds), cfg.batch)]
        images, nfe, _ = zip(*(gen.draw(group) for group in groups))
        images = torch.cat(images)
        write_text(nfe_file(chunk), repr(sum(each * len(group) for each, group in zip(nfe, groups))))
        return features_in_batches(extractor, lambda part: images[part.start:part.stop], range(len(images)), ranks.device)
    stored = compute(folder, n, np.arange(n), produce, ranks, key, "sampling")
    gen.sampled["nfe"] = sum(float(nfe_file(chunk).read_text()) for chunk in chunks) / n
    return stored


def span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---- measuring ------------------------------------------------------------------------------------------------------

class Side(NamedTuple):
    """One of the two sets."""
    stored: Stored | None               # None: only moments are known
    parts: list[Statistics]             # they add up to the whole
    n: int                              # images; 0 = an npz that does not say

    def best(self, leave: int | None = None) -> Statistics | Tensor:
        """What frechet() takes: features of a set smaller than d, else statistics; `leave`: without that part."""
        if self.stored and self.n < len(self.parts[0].mean):
            rows = self.stored.rows().double()
            return rows if leave is None else rows[torch.arange(len(rows)) % len(self.parts) != leave]
        total = sum(self.parts[1:], self.parts[0])
        return total if leave is None else total - self.parts[leave]


def side(stored: Stored, ranks: Ranks, groups: int = 1) -> Side:
    """Every rank calls; every rank has it. Parts are for the jackknife."""
    return Side(stored, stored.statistics(ranks, groups if len(stored) >= 2 * groups else 1), len(stored))


def some(stored: Stored, limit: int, seed: int = 0) -> Tensor:
    """Features of at most `limit` of them, chosen at random."""
    keep = stored.index if len(stored) <= limit else np.random.default_rng(seed).permutation(stored.index)[:limit]
    return stored.select(keep).rows().double()


def floor(ref: Side, n: int, limit: int) -> dict[str, Any]:
    """Real against real: n (or half) of the reference, chosen at random, against the rest of it."""
    m = min(n, ref.n // 2)
    if not ref.stored or m < 2:
        return {}
    order = np.random.default_rng(0).permutation(ref.stored.index)
    a, b = ref.stored.select(order[:m]), ref.stored.select(order[m:])
    alone = Ranks(0, 1, torch.device("cpu"))
    one = side(a, alone)
    rest = Side(b, [sum(ref.parts[1:], ref.parts[0]) - one.parts[0]], len(b))
    return {"n": m, "frechet": frechet(one.best(), rest.best()), "kernel": kernel_distance(some(a, limit), some(b, limit))}


def measure(fake: Side, ref: Side, held: Stored | None, name: str, *, pairs: int = 5_000, infinity: bool = False) -> dict[str, dict[str, Any]]:
    """Metrics by their names, which say n: {"FID10k": {"value", "error", "floor"}, …}."""
    FD, KD, n = *NAMES.get(name, (f"FD-{name}", f"KD-{name}")), short(fake.n) if fake.n else ""
    low, reference = floor(ref, fake.n, pairs), ref.best()
    value, row = frechet(reference, fake.best()), {}
    if len(fake.parts) > 1:
        row["error"] = jackknife([frechet(reference, fake.best(leave=g)) for g in range(len(fake.parts))])
    out: dict[str, dict[str, Any]] = {FD + n: {"value": value, **row, **({"floor": low["frechet"], "floor n": low["n"]} if low else {})}}
    if infinity:
        fit = frechet_infinity(reference, fake.stored.rows())
        out[f"{FD}-infinity"] = {"value": fit.value, "error": fit.error}
    if not (fake.stored and ref.stored):
        return out
    x, y = some(ref.stored, pairs), some(fake.stored, pairs)
    kid = kernel_distance(x, y)
    out[KD + n] = {"value": kid.value, "error": kid.error, **({"floor": low["kernel"].value, "floor n": low["n"]} if low else {}), "images": [len(x), len(y)]}
    if min(len(x), len(y)) > 5:
        out |= {f"{key}{n}": {"value": v, "images": [len(x), len(y)]} for key, v in precision_recall(x, y)._asdict().items()}
    if held and len(held) >= HELD:
        memory = memorisation(y, (chunk for _, chunk in ref.stored.batches()), some(held, pairs))
        out["memorisation"] = {"value": memory.ratio, **memory._asdict()}
    return out


# ---- in training ----------------------------------------------------------------------------------------------------

class FID:
    """FID of a run while it trains, on fixed seeds, to the run's own training images.

    trained: the run's config as a dict; name: what an error calls the run. Every rank calls. The reference's features are
    extracted here, once, before training.
    """

    def __init__(self, trained: dict[str, Any], name: str, ranks: Ranks):
        self.ranks, self.announced = ranks, False
        images = open_images(default_ref(trained, name), trained["resolution"])
        kind = trained["fid_features"]
        if kind == "inception":
            self.extractor = load_inception(device=ranks.device)
        else:
            self.extractor = fit_extractor(images)
        train, _ = images.split(trained["holdout"])
        self.ref = side(extract(train, self.extractor, cache_folder() / "features", ranks), ranks)
        self.names = [metric + short(FID_IMAGES) for metric in NAMES[kind]]
        self.floor = floor(self.ref, FID_IMAGES, FID_IMAGES)

    def __call__(self, draw: Callable[[list[int]], Tensor], seen: int, of: str) -> dict[str, Any]:
        """A row of the log, after `seen` images, of the weights named `of`. Every rank calls.

        draw(seeds) -> uint8 (B, 3, H, W) of all seeds, on every rank; each rank extracts the features of its share.
        """
        start = time.perf_counter()
        group = 64 * self.ranks.world
        parts = []
        for lo in range(0, FID_IMAGES, group):
            parts.append(self.features(draw(list(range(lo, min(lo + group, FID_IMAGES))))))
            if not self.announced and self.ranks.rank == 0:
                seconds = (time.perf_counter() - start) * FID_IMAGES / len(parts[0])
                print(f"{self.names[0]}: {FID_IMAGES:,} samples each time, about {span(seconds)}", flush=True)
            self.announced = True
        y = self.ranks.all_reduce(torch.cat(parts)).double().cpu()
        fid, kid, error = self.ranks.broadcast(lambda: self.distances(y))
        row = {"event": "fid", "images": seen, "of": of, self.names[0]: fid, self.names[1]: kid, f"{self.names[1]} error": error}
        if self.floor:
            row |= {"floor": self.floor["frechet"], "floor n": self.floor["n"]}
        return {**row, "seconds": time.perf_counter() - start}

    def features(self, images: Tensor) -> Tensor:
        """(B, d): this rank's rows are the features of its share of the images, the others are zero."""
        share = slice(self.ranks.rank, None, self.ranks.world)
        own = images[share]
        seen = features_in_batches(self.extractor, lambda part: own[part.start:part.stop], range(len(own)), self.ranks.device)
        rows = seen.new_zeros(len(images), seen.shape[1], device=self.ranks.device)
        rows[share] = seen.to(rows)
        return rows

    def distances(self, y: Tensor) -> list[float]:
        """[Fréchet distance, kernel distance, its standard error] of features (N, d)."""
        kid = kernel_distance(some(self.ref.stored, FID_IMAGES), y)
        generated = y if len(y) < y.shape[1] else Statistics.of(y)
        return [frechet(self.ref.best(), generated), *kid]


# ---- the command ----------------------------------------------------------------------------------------------------

def images_of(data: str) -> str:
    """The images a run saw; for a latent cache, what it was made from."""
    return cached_data(data) if is_cache(data) else data


def default_ref(trained: dict[str, Any], ckpt: str) -> str:
    """What a run was trained on, as DATA:expression."""
    if not trained.get("data"):
        raise UserError(f"{ckpt} does not say what it was trained on.  Give --ref DATA.")
    data, tags = images_of(trained["data"]), [f"({text})" for text in trained.get("exclude_tags", ())]
    text = {"standard": "", "fine": " & ".join(f"!{t}" for t in tags), "stage2": " | ".join(tags)}[trained.get("stage", "standard")]
    return f"{data}:{text}" if text else data


def check(cfg: Config) -> None:
    """What can be said of the flags alone; those of drawing are drawing.check()'s."""
    if bool(cfg.ckpt) == bool(cfg.fake):
        raise UserError("give one of --ckpt (to sample from) and --fake (images or statistics that are there).")
    if cfg.fake and not cfg.ref:
        raise UserError("--fake needs --ref: DATA[:tag expression], a folder, or an npz.")
    for name in ("init", "strength", "mask", "invert", "interpolate", "npz", "grid_image"):
        if getattr(cfg, name) != getattr(drawing.Config, name):
            raise UserError(f"--{'no-' * (name == 'grid_image')}{name.replace('_', '-')} is not for measuring.  Draw with samplers.py, then give its folder "
                            "as --fake.")
    for name, least in (("n", 0), ("batch", 1), ("pairs", 10)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name} {getattr(cfg, name)}: wanted at least {least}.")
    if not 0 <= cfg.seed < 2 ** 63 - max(cfg.n, DRAWN):
        raise UserError(f"--seed {cfg.seed}: wanted 0 to 2^63 - 1 - n.")
    if cfg.n == 1:
        raise UserError("--n 1: a distance between sets needs at least 2 images, and means something from 2,048 on.")
    if cfg.holdout != -1 and not 0 <= cfg.holdout < 1:
        raise UserError(f"--holdout {cfg.holdout:g}: wanted 0 to 1, or -1 for what the checkpoint was trained with.")
    if Path(cfg.out).is_dir() and cfg.out:
        raise UserError(f"--out {cfg.out} is a folder; wanted a file, for the card.")
    if cfg.save_stats and (not cfg.save_stats.endswith(".npz") or not Path(cfg.save_stats).absolute().parent.is_dir()):
        raise UserError(f"--save-stats {cfg.save_stats}: wanted FILE.npz in a folder that exists.")
    if cfg.save_stats and is_statistics(cfg.ref):
        raise UserError(f"--save-stats: {cfg.ref} is moments already.  Leave it out.")
    moments = cfg.fake and is_statistics(cfg.fake)
    if cfg.infinity and (moments or 0 < cfg.n < 20):
        raise UserError(f"--infinity is a fit over subsets of the images: wanted at least 20, got {'moments' if moments else cfg.n}.")
    useful = ("ckpt", "out", "device", "resolution", "weights", "preproc", *(() if moments else ("n", "seed")))
    default = {f.name: f.default for f in fields(drawing.Config)}
    idle = [(k, f"--fake {cfg.fake}") for k, v in default.items() if cfg.fake and k not in useful and getattr(cfg, k) != v and (k != "n" or cfg.n)]
    idle += [(k, "--features pca") for k in ("weights", "preproc") if cfg.features == "pca" and getattr(cfg, k) != getattr(Config, k)]
    if idle:
        raise UserError(f"--{idle[0][0].replace('_', '-')} does nothing with {idle[0][1]}.  Leave it out.")


def given_moments(path: str, extractor: Any, size: tuple[int, int] | None, loud: bool) -> tuple[Side, dict[str, Any]]:
    """An npz of mu and sigma as a side, and what it says of itself; refused if that is not how the other side is made."""
    stats, meta = load_statistics(Path(path), 2048 if isinstance(extractor, FIDInception) else None)
    differs = [f"{k} {v!r}, and this asks for {extractor.id.get(k)!r}" for k, v in meta.get("features", {}).items() if v != extractor.id.get(k)]
    if differs:
        raise UserError(f"{path} was made with {'; '.join(differs)}.  Repeat with its settings, or make it anew with --save-stats.")
    if size and meta.get("size") and tuple(meta["size"]) != size:
        raise UserError(f"{path} was made of images of {meta['size'][0]}×{meta['size'][1]} pixels, and the others have {size[0]}×{size[1]}.  Make it anew "
                        "with --save-stats, at one --resolution.")
    if "features" not in meta and loud:
        print(f"warning: {path} does not say which weights saw its images, nor how they were resized; this card cannot vouch for it.",
              file=sys.stderr)
    return Side(None, [stats], meta["n"]), {"hash": hashlib.sha256(Path(path).read_bytes()).hexdigest(), **meta}


def what_against(cfg: Config, gen: Generator | None) -> tuple[str, float]:
    """The reference's spec, and the share of it that training did not see."""
    spec, own = cfg.ref or default_ref(gen.trained, cfg.ckpt), images_of(gen.trained["data"]) if gen and gen.trained.get("data") else ""
    same = bool(own) and Path(split_spec(spec)[0]).resolve() == Path(own).resolve()
    return spec, cfg.holdout if cfg.holdout >= 0 else gen.trained.get("holdout", 0.0) if same else 0.0


def evaluate(cfg: Config, ranks: Ranks) -> dict[str, Any]:
    """The card."""
    check(cfg)
    cache, start = Path(cfg.cache) if cfg.cache else cache_folder() / "features", time.perf_counter()
    gen = open_generator(cfg, ranks.device) if cfg.ckpt else None
    spec, holdout = what_against(cfg, gen)
    opened = {s: open_images(s, gen.resolution if gen else cfg.resolution) for s in (spec, cfg.fake) if s and not is_statistics(s)}
    sizes = list(dict.fromkeys([*(images.size for images in opened.values()), *([(gen.resolution, gen.resolution)] if gen else [])]))
    if len(sizes) > 1:
        raise UserError(f"the two sides have {' and '.join(f'{w}×{h}' for w, h in sizes)} pixels.  Give --resolution N, and folders are resized to it "
                        "as for training (shorter side by Lanczos, middle cut out); arr_0 in an npz is taken as it is.")
    size, extractor, held = next(iter(sizes), None), build_extractor(cfg, opened.get(spec), ranks), None
    if spec in opened:
        train, rest = opened[spec].split(holdout)
        if len(opened[spec]) > 1 and len(train) < 2:
            raise UserError(f"{spec} has {len(train)} images that are not held out (--holdout {holdout:g}); a distance needs at least 2.")
        both = extract(opened[spec], extractor, cache, ranks)
        ref, held = side(both.select(train.index), ranks), both.select(rest.index)
        about = {"hash": train.hash, "filter": train.filter, "reference": train.spec, "holdout": holdout, "size": list(size)}
        if cfg.ckpt and len(rest) < HELD and ranks.rank == 0:
            print(f"warning: no memorisation check: {len(rest)} images are held out of {spec}, and it takes {HELD}.", file=sys.stderr)
        seen = [what for key, value, what in (("flip", True, "mirrored images"), ("crop", "random", "random crops")) if gen and gen.trained.get(key) == value]
        if seen and ranks.rank == 0:
            print(f"warning: {cfg.ckpt} was trained on {' and '.join(seen)} too, and the reference is the middle of each image as it is: copies of the others "
                  "may go unseen.", file=sys.stderr)
    else:
        ref, about = given_moments(spec, extractor, size, ranks.rank == 0)
    shown: dict[str, Any] = {}
    if cfg.ckpt:
        fake = side(sample_features(cfg, gen, extractor, cfg.n or DRAWN, cache, ranks), ranks, GROUPS)
    elif cfg.fake in opened:
        given = opened[cfg.fake]
        fake = side(extract(given.take(cfg.n, cfg.seed), extractor, cache, ranks), ranks, GROUPS)
        shown = {"hash": given.hash, "filter": given.filter, "unreadable": given.unreadable}
    else:
        fake, shown = given_moments(cfg.fake, extractor, size, ranks.rank == 0)
    least = min(side.n or LOW for side in (fake, ref))
    if least < LOW and ranks.rank == 0:
        print(f"warning: {least:,} images are fewer than {LOW:,}: a Fréchet distance is biased upwards there, and compares only with others at "
              "the same number.  Look at the floor and at the kernel distance.", file=sys.stderr)
    if cfg.save_stats and ranks.rank == 0:
        save_statistics(Path(cfg.save_stats), sum(ref.parts[1:], ref.parts[0]), {"features": extractor.id, **about})
    metrics = ranks.broadcast(lambda: measure(fake, ref, held, name_of(extractor), pairs=cfg.pairs, infinity=cfg.infinity))
    measured = {**extractor.id, "n": fake.n, "reference": about.get("reference", spec), "reference hash": about.get("hash"),
                "filter": about.get("filter", ""), "reference images": ref.n, "holdout": about.get("holdout"),
                "size": list(size or about.get("size", ())), "pairs": cfg.pairs}
    card = {"kind": "metric card", "metrics": metrics, "measured": measured,
            "sampled": {**gen.sampled, "seeds": [cfg.seed, cfg.seed + fake.n - 1]} if gen else {}, "subject": gen.subject if gen else {"fake": cfg.fake, **shown},
            "weights_sha256": getattr(extractor, "sha256", ""), "seconds": time.perf_counter() - start, "ranks": ranks.world,
            **versions("pillow", "scipy")}
    return json.loads(json.dumps(card), parse_constant=lambda name: None)       # JSON has no NaN


def name_of(extractor: Any) -> str:
    """For NAMES; random weights never pass for FID."""
    return "random" if str(extractor.id.get("weights")).startswith("random") else extractor.id["features"]


def build_extractor(cfg: Config, images: Images | None, ranks: Ranks) -> Any:
    if cfg.features == "inception":
        return load_inception(cfg.weights, cfg.preproc, ranks.device)
    if images is None:
        raise UserError("--features pca is fitted to the reference's images, and --ref gives only moments.  Give DATA or a folder.")
    return fit_extractor(images)


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        names, allow, words = [], [], iter(sys.argv[2:])
        for word in words:
            flag, given, value = word.partition("=")
            if flag == "--allow":
                allow += (value if given else next(words, "--")).split(",")
            else:
                names.append(word)
        if len(names) < 2 or any(word.startswith("--") for word in (*names, *allow)):
            raise UserError("wanted: python eval_fid.py compare A.json B.json … [--allow field,field]")
        print(compare(names, tuple(k.strip() for k in allow if k.strip())))
        return
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(vars(cfg), indent=1))
        return
    ranks = join_ranks(cfg.device, patience=PATIENCE)                                  # a resumed rank may have nothing to do, and another all
    card = evaluate(cfg, ranks)
    if ranks.rank == 0:
        path = Path(cfg.out or card_name(card))
        make_dir(path.parent)
        write_text(path, json.dumps(card, indent=1) + "\n")
        print(show(card))
        print(path)
    ranks.leave()


if __name__ == "__main__":
    cli(main)
