"""What is measured of a checkpoint of a comparison, in numbers that mean the same for all arms.

    refs = open_references(data, resolution, holdout, tags, "pca", cache, ranks)
    refs.measure(features)          # of samples, against all | excluded | rest of the images
    held_out_u(gen, held, ranks)    # L_u by t: the squared error of the velocity

A loss on eps, v or x0 is a loss on u with another weight, so raw losses of two objectives never
compare; L_u does. Distances are between features: "pca" are the latents of a linear autoencoder
that is fitted to the data, averaged to 4×4, since a covariance of more dimensions than images says
little; "inception" is FID. Tags of a sample are read by ridge regression from the features, which
is fitted to training images and tested on those held out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import eval_fid
from data import heldout
from data.dataset import Dataset, latents_of
from diffusion.weights import x0_share
from experiments.arms import Sampler
from harness.ranks import Ranks
from metrics.distances import compact, frechet, kernel_distance, memorisation, precision_recall
from metrics.features import SIDE, Images, Pca, extract, fit_extractor, open_images, pooled
from metrics.inception import load_inception
from metrics.paired import roughness
from objectives import Objective
from samplers import Generator, Sampling

Predict = Callable[[Tensor, Tensor], tuple]
GROUPS = ("all", "excluded", "rest")
# Features of "pca" are averaged to so many squares a side.
POOL = 4
# Images a side of kernel distance, precision and recall, at most.
PAIRS = 2_000
# Of the ridge regression that reads tags: the penalty, as a share of the features' variance.
RIDGE = 0.01
# Samples drawn at a time.
AT_ONCE = {"cpu": 256, "cuda": 256}


# ---- reading tags --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TagReader:
    """Does an image show a tag? Linear in its features (N, d)."""

    tags: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    weights: Tensor
    # Of each tag: halfway between the mean score of images that have it and of those that do not.
    lines: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """(N, tags), about 1 where a tag is shown and 0 where not."""
        return ((features.double() - self.mean) / self.scale) @ self.weights

    def shows(self, features: Tensor) -> Tensor:
        """bool (N, tags)."""
        return self.scores(features) > self.lines


def fit_reader(features: Tensor, truth: Tensor, tags: tuple[str, ...]) -> TagReader:
    """features (N, d), truth bool (N, tags): ridge regression in float64. A tag that all or none of
    the images have is read as none."""
    x, y = features.double(), truth.double()
    mean, scale = x.mean(0), x.std().clamp(min=1e-12)
    x = (x - mean) / scale
    penalty = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean(0)))
    scores = x @ weights
    having = (scores * y).sum(0) / y.sum(0)
    lacking = (scores * (1 - y)).sum(0) / (1 - y).sum(0)
    lines = ((having + lacking) / 2).nan_to_num(nan=torch.inf)
    return TagReader(tags, mean, scale, weights, lines)


# ---- the images that samples are held against ----------------------------------------------------


@dataclass
class References:
    """The images of one data set, cut by the tags that fine leaves out."""

    images: Images
    extractor: Any
    # (total, d), of all images of the source.
    features: Tensor
    # Numbers of the images that training saw and that it did not, by GROUPS.
    train: dict[str, np.ndarray]
    held: dict[str, np.ndarray]
    tags: tuple[str, ...]

    def compared(self, features: Tensor) -> Tensor:
        """Features as distances take them."""
        if isinstance(self.extractor, Pca):
            side = min(SIDE, self.images.resolution // 8)
            latents = features.unflatten(1, (-1, side, side))
            features = pooled(latents, POOL)
        return features.double()

    @cached_property
    def sides(self) -> dict[str, Any]:
        """What frechet() takes of each group."""
        return {key: compact(self.compared(self.features[own])) for key, own in self.train.items()}

    @cached_property
    def some(self) -> dict[str, Tensor]:
        """At most PAIRS random images of each group, as distances take them."""
        draw = np.random.default_rng(0)
        return {
            key: self.compared(self.features[np.sort(draw.permutation(own)[:PAIRS])])
            for key, own in self.train.items()
        }

    @property
    def vocabulary(self) -> list[str]:
        return self.images.table.vocabulary if self.images.table else []

    @cached_property
    def truth(self) -> Tensor:
        """bool (total, vocabulary + 1): the tags of every image; last, whether it is excluded."""
        table = self.images.table
        vocabulary = {tag: k for k, tag in enumerate(self.vocabulary)}
        truth = torch.zeros(self.images.total, len(vocabulary) + 1, dtype=torch.bool)
        if vocabulary:
            for i in range(self.images.total):
                truth[i, [vocabulary[tag] for tag in table[i]]] = True
        inside = np.union1d(self.train["excluded"], self.held["excluded"])
        truth[inside, -1] = True
        return truth

    @cached_property
    def reader(self) -> TagReader:
        own = self.train["all"]
        tags = (*self.vocabulary, "excluded")
        return fit_reader(self.features[own], self.truth[own], tags)

    @property
    def groups(self) -> list[str]:
        """Those with training images to be compared with."""
        return [key for key in GROUPS if len(self.train[key]) > 3]

    def measure(self, features: Tensor, only: str = "") -> dict[str, Any]:
        """Of samples (n, d): distances to each group of training images, or to only one; copies,
        tags shown."""
        y = self.compared(features)
        groups = [only] if only else self.groups
        found: dict[str, Any] = {key: self.against(key, y) for key in groups}
        shown = self.reader.shows(features)
        found["acquired"] = float(shown[:, -1].double().mean())
        shares = shown[:, :-1].double().mean(0).tolist()
        found["tags"] = dict(zip(self.reader.tags, shares))
        held = self.compared(self.features[self.held["all"]])
        if len(held) >= eval_fid.HELD:
            train = self.compared(self.features[self.train["all"]])
            found["copies"] = memorisation(y, train, held)._asdict()
        return found

    def against(self, key: str, y: Tensor) -> dict[str, float]:
        """Fréchet and kernel distance, precision and recall of y (n, d) to a group."""
        real = self.some[key]
        found = {"fd": frechet(self.sides[key], compact(y)), "kd": kernel_distance(real, y).value}
        found["fd_held_out"] = self.fd_held_out(key, y)
        if min(len(real), len(y)) > 5:
            alike = real[: len(y)]
            found |= precision_recall(alike, y)._asdict()
        return found

    def fd_held_out(self, key: str, y: Tensor) -> float | None:
        """The Fréchet distance to images that training did not see, which rewards no copies."""
        own = self.held[key]
        if len(own) < 2:
            return None
        return frechet(compact(self.compared(self.features[own])), compact(y))

    def facts(self, n: int) -> dict[str, Any]:
        """What a report says of the images: floors (real against real) of n samples, how well tags
        are read, shares of tags."""
        own, held = self.train["all"], self.held["all"]
        read = self.reader.shows(self.features[held])[:, -1]
        truth = self.truth[held, -1]
        wrong = self.reader.shows(self.features[held]) != self.truth[held]
        shares = self.truth[own, :-1].double().mean(0).tolist()
        return {
            "data": self.images.spec,
            "data_hash": self.images.hash,
            "features": self.extractor.id,
            "excluded": list(self.tags),
            "images": {key: len(numbers) for key, numbers in self.train.items()},
            "held_out": {key: len(numbers) for key, numbers in self.held.items()},
            "floor": {key: self.floor(key, n) for key in self.groups},
            "reader": {
                "found": share(read[truth]),
                "false": share(read[~truth]),
                "wrong tags": share(wrong),
            },
            "tags": dict(zip(self.reader.tags, shares)),
        }

    def floor(self, key: str, n: int) -> dict[str, float]:
        """Of n training images, or half of them, chosen at random, against the rest."""
        order = np.random.default_rng(0).permutation(self.train[key])
        m = min(n, len(order) // 2)
        a = self.compared(self.features[order[:m]])
        b = self.compared(self.features[order[m:]])
        return {"n": m, "fd": frechet(compact(a), compact(b))}


def share(mask: Tensor) -> float | None:
    """Of True in a mask; None of an empty one."""
    return float(mask.double().mean()) if mask.numel() else None


def open_references(
    data: str,
    resolution: int,
    holdout: float,
    tags: tuple[str, ...],
    features: str,
    cache: Path,
    ranks: Ranks,
) -> References:
    """Open the images a run saw, extract their features, cut them by tags."""
    images = open_images(data, resolution)
    extractor: Any = fit_extractor(images)
    if features == "inception":
        extractor = load_inception(device=ranks.device)
    stored = extract(images, extractor, cache, ranks)
    train, held = images.split(holdout)
    inside = np.array([], int)
    if tags:
        inside = images.where(" | ".join(f"({tag})" for tag in tags)).index
    sets = []
    for part in (train.index, held.index):
        cut = np.intersect1d(part, inside), np.setdiff1d(part, inside)
        sets.append({"all": part, "excluded": cut[0], "rest": cut[1]})
    return References(images, extractor, stored.rows(), *sets, tags)


# ---- held-out loss in one unit -------------------------------------------------------------------


def u_loss(predict: Predict, vae: Any) -> Callable[[dict[str, Tensor]], Any]:
    """A loss of a batch for heldout.loss_of(): the squared error of the velocity u = eps - x0 on
    the linear path. predict(x, t) -> (x0, eps, u), as a Generator has it."""

    def loss(batch: dict[str, Tensor]) -> Any:
        x0 = latents_of(vae, batch)
        eps, t = batch["eps"].to(x0), batch["t"].to(x0)
        w = t.view(-1, 1, 1, 1)
        u = predict((1 - w) * x0 + w * eps, t)[2]
        return SimpleNamespace(per_sample=(u - (eps - x0)).square().flatten(1).mean(1))

    return loss


def held_out_u(gen: Generator, held: Dataset, ranks: Ranks) -> dict[str, Any]:
    """{"n", "loss", "loss_by_t"} of L_u on held-out images, at fixed times and noise."""
    loss = torch.no_grad()(u_loss(gen.plain, gen.vae))
    return heldout.loss_of(loss, held, [], gen.latent_shape, 0, ranks)


def in_u(loss_by_t: list[float], objective: Objective) -> list[float]:
    """A held-out loss by t of train.py's log, a plain mean square of what an objective asks for, as
    L_u: at one time the two differ by a factor. Beyond the end of an eps network's table this is
    nearly so; predict() divides by 1 - t_max there."""
    if objective.aligned:
        return list(loss_by_t)
    n = len(loss_by_t)
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if objective.target == "eps":
        factor = (1 + t / (1 - t).clamp(min=1 - objective.t_max)).square()
    else:
        factor = x0_share(t, objective.what) / x0_share(t, "u")
    return (torch.tensor(loss_by_t, dtype=torch.float64) * factor).tolist()


# ---- samples -------------------------------------------------------------------------------------


def sampling(ckpt: Path, sampler: Sampler, seed: int, device: torch.device) -> Sampling:
    """The flags that draw from a checkpoint."""
    batch = AT_ONCE.get(device.type, 64)
    steps = {"method": sampler.method, "steps": sampler.steps, "eta": sampler.eta}
    return Sampling(str(ckpt), seed=seed, batch=batch, device=str(device), **steps)


def sampled(
    ckpt: Path, sampler: Sampler, n: int, seed: int, refs: References, cache: Path, ranks: Ranks
) -> tuple[Tensor, float]:
    """(features (n, d) of the images of n seeds from `seed` on, evaluations an image); what was
    drawn before is read from the cache."""
    cfg = sampling(ckpt, sampler, seed, ranks.device)
    checkpoint = eval_fid.open_checkpoint(cfg, ranks.device)
    stored = eval_fid.sample_features(cfg, checkpoint, refs.extractor, n, cache, ranks)
    return stored.rows(), checkpoint.sampled["nfe"]


def sharpness(images: Tensor) -> float:
    """Mean squared difference of neighbouring pixels of images uint8 (n, 3, H, W): divided by that
    of real images, 1 is right, less is blurred, more is grain."""
    return roughness(images.double() / 255)
