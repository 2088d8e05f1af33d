"""How far apart two sets of features are: Fréchet distance, kernel distance, precision and recall,
memorisation.

    frechet_distance(mu1, sigma1, mu2, sigma2)   # FID, of moments
    frechet_from_features(x, y)                  # … of features (N, d); exact also when N < d
    kernel_distance(x, y)                        # KID and its standard error: unbiased, so it may
                                                 # be compared at any N
    precision_recall(x, y, k=3)                  # x real, y generated
    memorisation(y, train, held_out)             # is y nearer to the training images than fresh
                                                 # real images are?

Everything is float64. Features are tensors or arrays, one row an image; those that are not finite
are refused.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.archives import read_npz
from harness.cli import UserError
from harness.files import atomic
from harness.typed import Length, Open, Range, check, parse_json

Features = Tensor | np.ndarray
BLOCK = 1024  # rows of a distance or kernel matrix at a time
EPS = torch.finfo(torch.float64).eps
OTHER_NETWORKS = "They come from different networks: use the same one for both."


def double(x: Features) -> Tensor:
    """float64, on the CPU."""
    return torch.as_tensor(x).detach().double().cpu()


def rows(features: Features, what: str = "features") -> Tensor:
    """float64 (N, d), finite, at least two of them."""
    x = double(features)
    if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
        raise UserError(
            f"{what}: wanted (N, d) with N at least 2, got {tuple(x.shape)}",
            do="Give at least two images.",
        )
    return finite(x, what)


def finite(x: Tensor, what: str) -> Tensor:
    """x, if none of its rows has a NaN or an infinity."""
    if not x.isfinite().all():
        bad = (~x.isfinite()).reshape(len(x), -1).any(1)
        raise UserError(
            f"{what}: {int(bad.sum())} of {len(x)} rows are not finite "
            f"(first: {int(bad.nonzero()[0])})",
            do="The network or the images that gave them are broken; a distance to them means "
            "nothing.",
        )
    return x


def same_dimensions(a: int, b: int) -> None:
    if a != b:
        raise UserError(
            f"features of {a} and of {b} dimensions cannot be compared", do=OTHER_NETWORKS
        )


# ---- moments ------------------------------------------------------------------------------------


class Statistics:
    """Number, mean and scatter of features, in float64: what FID needs of a set. Sets add up, and
    can be taken away again.

    scatter = Σ (f - mean)(f - mean)ᵀ. Batches are merged by Chan, Golub & LeVeque (1983), so no
    large numbers cancel.
    """

    def __init__(self, n: int, mean: Tensor, scatter: Tensor):
        self.n, self.mean, self.scatter = n, mean, scatter
        self._root: Tensor | None = None

    @classmethod
    def of(cls, features: Features) -> "Statistics":
        """Of one batch (N, d); N = 1 will do."""
        x = finite(double(features), "features")
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Statistics") -> "Statistics":
        """Of the two sets together."""
        if not self.n:
            return other
        if not other.n:
            return self
        n, gap = self.n + other.n, other.mean - self.mean
        mean = self.mean + gap * (other.n / n)
        between = torch.outer(gap, gap) * (self.n * other.n / n)
        return Statistics(n, mean, self.scatter + other.scatter + between)

    def __sub__(self, part: "Statistics") -> "Statistics":
        """Of what is left when a part is taken away."""
        n = self.n - part.n
        if n < 1:
            raise UserError(
                f"cannot take {part.n} images from {self.n}", do="Take fewer, or use a larger set."
            )
        mean = self.mean + (self.mean - part.mean) * (part.n / n)
        gap = part.mean - mean
        between = torch.outer(gap, gap) * (n * part.n / self.n)
        return Statistics(n, mean, self.scatter - part.scatter - between)

    def reduce(self, ranks: Any) -> "Statistics":
        """Of all ranks' sets together, on every rank."""
        if ranks.world == 1:
            return self
        sums = torch.cat([self.mean * self.n, self.mean.new_tensor([self.n])])
        total = ranks.all_reduce(sums.to(ranks.device)).cpu()
        n = round(float(total[-1]))
        mean = total[:-1] / max(n, 1)
        gap = self.mean - mean
        scatter = self.scatter + torch.outer(gap, gap) * self.n
        return Statistics(n, mean, ranks.all_reduce(scatter.to(ranks.device)).cpu())

    @property
    def sigma(self) -> Tensor:
        """(d, d) covariance over N - 1, as numpy.cov."""
        if self.n < 2:
            raise UserError(
                f"a covariance needs at least 2 images, got {self.n}", do="Give more images."
            )
        return self.scatter / (self.n - 1)

    @property
    def root(self) -> Tensor:
        """L (d, rank) with L Lᵀ = sigma; kept, since one reference meets many sets."""
        if self._root is None:
            self._root = matrix_root(self.sigma)
        return self._root


def gather(batches: Iterator[Features]) -> Statistics:
    """Statistics of a stream; memory is that of one batch and one d × d."""
    total = None
    for batch in batches:
        part = Statistics.of(batch)
        total = part if total is None else total + part
    if total is None:
        raise UserError("no features to take statistics of", do="Give at least two images.")
    return total


def matrix_root(sigma: Tensor) -> Tensor:
    """L (d, rank) with L Lᵀ = sigma: Cholesky's, or, without the directions in which sigma is
    nothing but rounding, from eigenvectors."""
    small = len(sigma) * EPS
    L, failed = torch.linalg.cholesky_ex(sigma)
    pivots = L.diagonal() ** 2
    if not failed and pivots.min() > small * pivots.max():
        return L
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > small * values.max()
    return vectors[:, keep] * values[keep].sqrt()


# ---- Fréchet ------------------------------------------------------------------------------------


def frechet_distance(mu1: Features, sigma1: Features, mu2: Features, sigma2: Features) -> float:
    """|mu1 - mu2|² + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^½  (Dowson & Landau 1982). It
    is FID for Inception's features.

    mu (d,), sigma (d, d). With sigma1 = L Lᵀ the last trace is Σ √eigenvalue(Lᵀ sigma2 L):
    symmetric and real, unlike the square root of a product. Never negative; of equal moments
    exactly 0.
    """
    return frechet(from_moments(mu1, sigma1), from_moments(mu2, sigma2))


def from_moments(mu: Features, sigma: Features) -> Statistics:
    """Statistics of a mean (d,) and a covariance (d, d), as if of two images: the scatter is then
    the covariance."""
    mean, covariance = finite(double(mu), "mu"), finite(double(sigma), "sigma")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"wanted mu (d,) and sigma (d, d), got {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}",
            do="Give the moments of one set of features.",
        )
    return Statistics(2, mean, covariance)


def frechet_from_features(x: Features, y: Features) -> float:
    """frechet_distance of features (N, d) and (M, d)."""
    return frechet(compact(rows(x)), compact(rows(y)))


def compact(x: Tensor) -> Statistics | Tensor:
    """Features (N, d) as frechet() takes them: a set smaller than d is never turned into a d × d
    matrix, which is exact and fast."""
    return x if len(x) < x.shape[1] else Statistics.of(x)


def frechet(a: Statistics | Tensor, b: Statistics | Tensor) -> float:
    """Fréchet distance of two sets, each given by its statistics or, if it is smaller than d, best
    by its features (N, d)."""
    mean_a, mean_b = mean_of(a), mean_of(b)
    same_dimensions(len(mean_a), len(mean_b))
    if isinstance(a, Tensor) and isinstance(b, Statistics):
        a, b = b, a
    if equal_moments(a, b):
        return 0.0
    if isinstance(a, Tensor):
        # sigma = Xᵀ X: the trace is the nuclear norm of X Yᵀ.
        x, y = centred(a), centred(b)
        spread = float(x.square().sum() + y.square().sum())
        common = float(torch.linalg.svdvals(x @ y.T).sum())
    elif isinstance(b, Tensor):
        y = centred(b)
        spread = float(a.sigma.trace() + y.square().sum())
        common, _ = root_trace(y @ a.sigma @ y.T)
    else:
        spread = float(a.sigma.trace() + b.sigma.trace())
        common, singular = root_trace(a.root.T @ b.sigma @ a.root)
        if singular:  # roots of rounding errors are large; singular values have none
            common = float(torch.linalg.svdvals(a.root.T @ b.root).sum())
    return max(float((mean_a - mean_b).square().sum()) + spread - 2 * common, 0.0)


def mean_of(x: Statistics | Tensor) -> Tensor:
    return x.mean if isinstance(x, Statistics) else x.mean(0)


def equal_moments(a: Statistics | Tensor, b: Statistics | Tensor) -> bool:
    if isinstance(a, Statistics) and isinstance(b, Statistics):
        return torch.equal(a.mean, b.mean) and torch.equal(a.sigma, b.sigma)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def centred(x: Tensor) -> Tensor:
    """X with Xᵀ X = sigma."""
    return (x - x.mean(0)) / (len(x) - 1) ** 0.5


def root_trace(product: Tensor) -> tuple[float, bool]:
    """(Σ √eigenvalue of a symmetric matrix ≥ 0, whether some of them are lost in rounding)."""
    product = (product + product.T) / 2
    if not len(product):  # of a constant set
        return 0.0, False
    values = torch.linalg.eigvalsh(product)
    lost = values <= len(product) * EPS * values.max()
    return float(values[~lost].sqrt().sum()), bool(lost.any())


class Estimate(NamedTuple):
    value: float
    error: float  # one standard error


def jackknife(values: Sequence[float]) -> float:
    """Standard error of an estimate from its values without each of g equal parts of the data
    (Tukey 1958)."""
    v = np.asarray(values, dtype=np.float64)
    return float(np.sqrt((len(v) - 1) / len(v) * ((v - v.mean()) ** 2).sum()))


def frechet_infinity(
    x: Statistics | Features, y: Features, points: int = 15, seed: int = 0
) -> Estimate:
    """FID at infinitely many y: the intercept of a line through FID against 1/N (Chong & Forsyth
    2020), N from len(y) / 10 up.

    Only y's size is extrapolated; x is the reference as it is. The error is the line fit's.
    """
    y = rows(y)
    if not isinstance(x, Statistics):
        x = rows(x) if len(x) < len(x[0]) else Statistics.of(x)
    if len(y) < 20:
        raise UserError(
            f"FID∞ is a fit over subsets: wanted at least 20 images, got {len(y)}",
            do="Give more images.",
        )
    r = np.random.default_rng(seed)
    sizes = np.linspace(max(len(y) // 10, 2), len(y), points).round().astype(int)
    sizes = np.unique(sizes)
    subsets = [y[torch.from_numpy(r.permutation(len(y))[:n])] for n in sizes]
    values = [frechet(x, compact(subset)) for subset in subsets]
    (_, value), covariance = np.polyfit(1 / sizes, values, 1, cov=True)
    return Estimate(float(value), float(covariance[1, 1] ** 0.5))


# ---- kernel -------------------------------------------------------------------------------------


class KID(NamedTuple):
    value: float  # 0 on average for two sets of one distribution, so it can be negative
    error: float  # one standard error


def kernel_distance(x: Features, y: Features) -> KID:
    """Squared MMD under the kernel (x·y / d + 1)³ (Bińkowski et al. 2018), unbiased, over all
    pairs, not over subsets.

    The standard error is a jackknife over single images of both sets, which the kernel's row sums
    give for free.
    """
    x, y = rows(x), rows(y)
    same_dimensions(x.shape[1], y.shape[1])
    m, n = len(x), len(y)
    xx, yy = own_kernel_sums(x), own_kernel_sums(y)
    xy, yx = kernel_sums(x, y), kernel_sums(y, x)
    S, T, C = xx.sum(), yy.sum(), xy.sum()
    value = float(S / (m * (m - 1)) + T / (n * (n - 1)) - 2 * C / (m * n))
    if m < 3 or n < 3:
        return KID(value, float("nan"))
    # The value without each of the images of x, and without each of y.
    xx_left, xy_left = (S - 2 * xx) / ((m - 1) * (m - 2)), (C - xy) / ((m - 1) * n)
    yy_left, yx_left = (T - 2 * yy) / ((n - 1) * (n - 2)), (C - yx) / (m * (n - 1))
    without_x = xx_left + T / (n * (n - 1)) - 2 * xy_left
    without_y = S / (m * (m - 1)) + yy_left - 2 * yx_left
    error = np.hypot(jackknife(without_x.numpy()), jackknife(without_y.numpy()))
    return KID(value, float(error))


def kernel_sums(a: Tensor, b: Tensor) -> Tensor:
    """(N,): for each row of a (N, d), the sum of the kernel with all rows of b."""
    parts = a.split(BLOCK)
    return torch.cat([((part @ b.T / a.shape[1] + 1) ** 3).sum(1) for part in parts])


def own_kernel_sums(a: Tensor) -> Tensor:
    """(N,): for each row, the sum of the kernel with all other rows."""
    return kernel_sums(a, a) - (a.square().sum(1) / a.shape[1] + 1) ** 3


# ---- neighbours ---------------------------------------------------------------------------------


def squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """|a_i - b_j|², block by block of rows."""
    squares = b.square().sum(1)
    for start in range(0, len(a), BLOCK):
        part = a[start : start + BLOCK]
        sums = part.square().sum(1, keepdim=True) + squares
        distances = sums - 2 * part @ b.T
        # What rounding leaves between equal rows is no distance: it would put a copy outside of a
        # neighbourhood of radius 0.
        distances.masked_fill_(distances <= b.shape[1] * EPS * sums, 0)
        yield slice(start, start + len(part)), distances


def radii(x: Tensor, k: int) -> Tensor:
    """(N,) squared distance of each row to its k-th nearest other."""
    if not 1 <= k < len(x):
        raise UserError(
            f"the {k}-th nearest of {len(x) - 1} others does not exist",
            do="Use more images, or a smaller k.",
        )
    out = torch.empty(len(x), dtype=x.dtype)
    for part, d in squared_distances(x, x):
        d[torch.arange(len(d)), torch.arange(part.start, part.stop)] = float("inf")
        out[part] = d.kthvalue(k, 1).values
    return out


class Manifold(NamedTuple):
    precision: float  # share of generated images that lie where real ones are
    recall: float  # share of real images that lie where generated ones are
    density: float  # in how many real neighbourhoods one lies, over k; 1 for real against real
    coverage: float  # share of real images with a generated one in their neighbourhood


def precision_recall(x: Features, y: Features, k: int = 3, k_density: int = 5) -> Manifold:
    """x real (N, d), y generated (M, d). Precision and recall: Kynkäänniemi et al. 2019; density
    and coverage: Naeem et al. 2020.

    A neighbourhood is the ball to the k-th nearest other of the same set.
    """
    x, y = rows(x, "real features"), rows(y, "generated features")
    x, y = x - x.mean(0), y - x.mean(0)  # smaller numbers cancel less
    real, fake, wide = radii(x, k), radii(y, k), radii(x, k_density)
    near_real = torch.zeros(len(y), dtype=torch.bool)  # is a generated image near a real one
    near_fake = torch.zeros(len(x), dtype=torch.bool)
    covered = torch.zeros(len(x), dtype=torch.bool)
    pairs = 0.0
    for part, d in squared_distances(x, y):  # (block of real, generated)
        near_real |= (d <= real[part, None]).any(0)
        near_fake[part] = (d <= fake).any(1)
        near = d <= wide[part, None]
        pairs += float(near.sum())
        covered[part] = near.any(1)
    return Manifold(
        share(near_real), share(near_fake), pairs / (k_density * len(y)), share(covered)
    )


def share(mask: Tensor) -> float:
    """Of True in a mask."""
    return float(mask.double().mean())


class Memorisation(NamedTuple):
    # Median distance to the nearest training image: generated over held-out; a copier's is near 0.
    ratio: float
    # Chance that a generated image is nearer to the training set than a held-out one; fresh
    # images: 0.5.
    closer: float
    # Share of generated images nearer than all but 5% of the held-out ones are; fresh images: 0.05.
    copies: float
    flagged: bool  # copies are more than chance explains
    held_out: int


def memorisation(
    y: Features, train: Features | Iterable[Features], held_out: Features
) -> Memorisation:
    """Does y repeat training images? Nearest training neighbours of generated and of held-out real
    images, in feature space.

    train may come in batches: all of it has to be looked through, since a copy of what is left out
    is not seen.
    """
    y, held = rows(y, "generated features"), rows(held_out, "held-out features")
    batches = [train] if isinstance(train, (Tensor, np.ndarray)) else train
    center = held.mean(0)  # smaller numbers cancel less
    nearest = nearest_squared(torch.cat([y, held]) - center, batches, center)
    generated, order = nearest[: len(y)].sqrt(), nearest[len(y) :].sqrt().sort().values
    line, middle = order[max(int(0.05 * len(order)) - 1, 0)], float(order.median())
    below = torch.searchsorted(order, generated)
    upto = torch.searchsorted(order, generated, right=True)
    closer = float((1 - (below + upto).double() / 2 / len(order)).mean())
    copies, expected = share(generated <= line), max(share(order <= line), 0.05)
    chance = (expected * (1 - expected) * (1 / len(y) + 1 / len(order))) ** 0.5
    flagged = copies > max(expected + 4 * chance, 2 * expected)
    ratio = float(generated.median()) / middle if middle else float("nan")
    return Memorisation(ratio, closer, copies, flagged, len(order))


def nearest_squared(x: Tensor, batches: Iterable[Features], center: Tensor) -> Tensor:
    """(N,): squared distance of each row of x to the nearest row of all batches less `center`."""
    nearest = torch.full((len(x),), float("inf"), dtype=torch.float64)
    for batch in batches:
        batch = finite(double(batch), "training features") - center
        for part, d in squared_distances(x, batch):
            nearest[part] = torch.minimum(nearest[part], d.min(1).values)
    return nearest


# ---- on disk ------------------------------------------------------------------------------------


def save_statistics(path: Path, stats: Statistics, meta: dict[str, Any]) -> None:
    """mu and sigma as pytorch-fid and EDM read them, with n and what they are of beside them."""
    text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=stats.mean.numpy(), sigma=stats.sigma.numpy(), n=stats.n, meta=text)


@dataclass
class About(Open):
    """What our npz says beside mu and sigma."""

    features: dict[str, Any] = ()
    size: Annotated[list[Annotated[int, Range(1, 10**6)]], Length(0, 2)] = ()
    hash: str = ""
    filter: str = ""
    reference: str = ""
    holdout: Annotated[float, Range(0, 1)] = 0.0


def load_statistics(path: Path, d: int | None = None) -> tuple[Statistics, dict[str, Any]]:
    """mu and sigma of ours, pytorch-fid's, EDM's or ADM's npz; n is 0 and the description empty
    where the file does not say."""
    names, arrays = read_npz(path, ("mu", "sigma", "n", "meta"))
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(
            f"{path} holds {', '.join(names[:6]) or 'nothing'}; wanted mu and sigma (statistics) "
            "or arr_0 (images)",
            do="Give another npz.",
        )
    mu = torch.from_numpy(np.asarray(arrays["mu"], np.float64))
    sigma = torch.from_numpy(np.asarray(arrays["sigma"], np.float64))
    number = arrays.get("n", np.zeros((), np.int64))
    if number.size != 1 or number.dtype.kind not in "iu" or not 0 <= int(number.item()) <= 10**12:
        raise UserError(f"{path}: n is {number!r:.40}", wanted="one number", do="Make it anew.")
    n = int(number.item())
    meta = arrays["meta"].tobytes() if "meta" in arrays else b"{}"
    meta = check(parse_json(meta, f"{path}: meta", nan=True), About, f"{path}: meta")
    check_moments(path, mu, sigma, d)
    samples = n or 2
    return Statistics(samples, mu, sigma * (samples - 1)), {"n": n, **meta}


def check_moments(path: Path, mu: Tensor, sigma: Tensor, d: int | None) -> None:
    """Are these a mean and a covariance, of d dimensions if d is given?"""
    fits = mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and d in (None, len(mu))
    if not fits:
        wanted = f"({d},) and ({d}, {d})" if d else "(d,) and (d, d)"
        raise UserError(
            f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; wanted {wanted}",
            do="They are of another network.",
        )
    finite(mu[None], f"{path}, mu")
    finite(sigma, f"{path}, sigma")
    variances = sigma.diagonal()
    closeness = 1e-6 * float(variances.max())
    if variances.min() < 0 or not torch.allclose(sigma, sigma.T, rtol=1e-3, atol=closeness):
        raise UserError(
            f"{path}: sigma is not a covariance (symmetric, no variance below 0), so distances to "
            "it mean nothing",
            do="Make it anew.",
        )
