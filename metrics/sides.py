"""Two sets of features and what is measured between them, by names that say how many they are.

    ref, fake = side(stored, ranks), side(other, ranks, groups=10)
    measure(fake, ref, held, "inception")   # {"FID10k": {"value", "error", "floor"}, …}
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.ranks import Ranks
from metrics.distances import (
    Statistics,
    frechet,
    frechet_infinity,
    jackknife,
    kernel_distance,
    memorisation,
    precision_recall,
)
from metrics.features import Stored, short

# Held-out images; fewer say nothing of memorisation.
HELD = 10
NAMES = {"inception": ("FID", "KID"), "pca": ("FD-pca", "KD-pca")}


class Side(NamedTuple):
    """One of the two sets."""

    stored: Stored | None  # None: only moments are known
    parts: list[Statistics]  # they add up to the whole
    n: int  # images; 0 = an npz that does not say

    @property
    def total(self) -> Statistics:
        return sum(self.parts[1:], self.parts[0])

    def best(self, leave: int | None = None) -> Statistics | Tensor:
        """What frechet() takes: features of a set smaller than d, else statistics.
        leave: without that part."""
        if self.stored and self.n < len(self.parts[0].mean):
            rows = self.stored.rows().double()
            if leave is None:
                return rows
            return rows[torch.arange(len(rows)) % len(self.parts) != leave]
        return self.total if leave is None else self.total - self.parts[leave]


def name_of(extractor: Any) -> str:
    """For NAMES; random weights never pass for FID."""
    if str(extractor.id.get("weights")).startswith("random"):
        return "random"
    return extractor.id["features"]


def side(stored: Stored, ranks: Ranks, groups: int = 1) -> Side:
    """Every rank calls; every rank has it. Parts are for the jackknife."""
    groups = groups if len(stored) >= 2 * groups else 1
    return Side(stored, stored.statistics(ranks, groups), len(stored))


def random_rows(stored: Stored, limit: int, seed: int = 0) -> Tensor:
    """Features of at most `limit` images, chosen at random: float64 (N, d)."""
    keep = stored.index
    if len(stored) > limit:
        keep = np.random.default_rng(seed).permutation(stored.index)[:limit]
    return stored.select(keep).rows().double()


def floor(ref: Side, n: int, limit: int) -> dict[str, Any]:
    """Real against real: n (or half) of the reference, chosen at random, against the rest of it."""
    m = min(n, ref.n // 2)
    if not ref.stored or m < 2:
        return {}
    order = np.random.default_rng(0).permutation(ref.stored.index)
    a, b = ref.stored.select(order[:m]), ref.stored.select(order[m:])
    one = side(a, Ranks(0, 1, torch.device("cpu")))
    rest = Side(b, [ref.total - one.parts[0]], len(b))
    kernel = kernel_distance(random_rows(a, limit), random_rows(b, limit))
    return {"n": m, "frechet": frechet(one.best(), rest.best()), "kernel": kernel}


def measure(
    fake: Side,
    ref: Side,
    held: Stored | None,
    name: str,
    *,
    pairs: int = 5_000,
    infinity: bool = False,
) -> dict[str, dict[str, Any]]:
    """Metrics by their names, which say n: {"FID10k": {"value", "error", "floor"}, …}."""
    fd_name, kd_name = NAMES.get(name, (f"FD-{name}", f"KD-{name}"))
    n = short(fake.n) if fake.n else ""
    lowest, reference = floor(ref, fake.n, pairs), ref.best()
    fd: dict[str, Any] = {"value": frechet(reference, fake.best())}
    if len(fake.parts) > 1:
        groups = range(len(fake.parts))
        fd["error"] = jackknife([frechet(reference, fake.best(leave=g)) for g in groups])
    if lowest:
        fd |= {"floor": lowest["frechet"], "floor n": lowest["n"]}
    out = {fd_name + n: fd}
    if infinity:
        fit = frechet_infinity(reference, fake.stored.rows())
        out[f"{fd_name}-infinity"] = {"value": fit.value, "error": fit.error}
    if not (fake.stored and ref.stored):
        return out

    x, y = random_rows(ref.stored, pairs), random_rows(fake.stored, pairs)
    images = [len(x), len(y)]
    kernel = kernel_distance(x, y)
    kd: dict[str, Any] = {"value": kernel.value, "error": kernel.error}
    if lowest:
        kd |= {"floor": lowest["kernel"].value, "floor n": lowest["n"]}
    out[kd_name + n] = {**kd, "images": images}
    if min(images) > 5:
        for key, value in precision_recall(x, y)._asdict().items():
            out[key + n] = {"value": value, "images": images}
    if held and len(held) >= HELD:
        chunks = (chunk for _, chunk in ref.stored.batches())
        memory = memorisation(y, chunks, random_rows(held, pairs))
        out["memorisation"] = {"value": memory.ratio, **memory._asdict()}
    return out
