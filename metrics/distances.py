"""How far apart two sets of features are: Fréchet distance, kernel distance, precision and recall, memorisation.

    frechet_distance(mu1, sigma1, mu2, sigma2)      # FID, of moments
    frechet_from_features(x, y)                     # … of features (N, d); exact also when N < d
    kernel_distance(x, y)                           # KID and its standard error: unbiased, so it may be compared at any N
    precision_recall(x, y, k=3)                     # x real, y generated
    memorisation(y, train, held_out)                # is y nearer to the training images than fresh real images are?

Everything is float64. Features are tensors or arrays, one row an image; those that are not finite are refused.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from harness.cli import UserError

Features = Tensor | np.ndarray
BLOCK = 1024                                 # rows of a distance or kernel matrix at a time


def rows(features: Features, what: str = "features") -> Tensor:
    """float64 (N, d), finite, at least two of them."""
    x = torch.as_tensor(features).detach().double().cpu()
    if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
        raise UserError(f"{what}: wanted (N, d) with N at least 2, got {tuple(x.shape)}.")
    return finite(x, what)


def finite(x: Tensor, what: str) -> Tensor:
    if not x.isfinite().all():
        bad = (~x.isfinite()).reshape(len(x), -1).any(1)
        raise UserError(f"{what}: {int(bad.sum())} of {len(x)} rows are not finite (first: {int(bad.nonzero()[0])}).  The network or the images that "
                        "gave them are broken; a distance to them means nothing.")
    return x


# ---- moments --------------------------------------------------------------------------------------------------------

class Statistics:
    """Number, mean and scatter of features, in float64: what FID needs of a set. Sets add up, and can be taken away again.

    scatter = Σ (f - mean)(f - mean)ᵀ. Batches are merged by Chan, Golub & LeVeque (1983), so no large numbers cancel.
    """

    def __init__(self, n: int, mean: Tensor, scatter: Tensor):
        self.n, self.mean, self.scatter, self._root = n, mean, scatter, None

    @classmethod
    def of(cls, features: Features) -> "Statistics":
        """Of one batch (N, d); N = 1 will do."""
        x = finite(torch.as_tensor(features).detach().double().cpu(), "features")
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Statistics") -> "Statistics":
        """Of the two sets together."""
        if not self.n or not other.n:
            return other if other.n else self
        n, gap = self.n + other.n, other.mean - self.mean
        return Statistics(n, self.mean + gap * (other.n / n), self.scatter + other.scatter + torch.outer(gap, gap) * (self.n * other.n / n))

    def __sub__(self, part: "Statistics") -> "Statistics":
        """Of what is left when a part is taken away."""
        n = self.n - part.n
        if n < 1:
            raise UserError(f"cannot take {part.n} images from {self.n}.")
        mean = self.mean + (self.mean - part.mean) * (part.n / n)
        gap = part.mean - mean
        return Statistics(n, mean, self.scatter - part.scatter - torch.outer(gap, gap) * (n * part.n / self.n))

    def reduce(self, ranks: Any) -> "Statistics":
        """Of all ranks' sets together, on every rank."""
        if ranks.world == 1:
            return self
        total = ranks.all_reduce(torch.cat([self.mean * self.n, self.mean.new_tensor([self.n])]).to(ranks.device)).cpu()
        n = round(float(total[-1]))
        mean = total[:-1] / max(n, 1)
        gap = self.mean - mean
        return Statistics(n, mean, ranks.all_reduce((self.scatter + torch.outer(gap, gap) * self.n).to(ranks.device)).cpu())

    @property
    def sigma(self) -> Tensor:
        """(d, d) covariance over N - 1, as numpy.cov."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.n}.")
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
        total = Statistics.of(batch) if total is None else total + Statistics.of(batch)
    if total is None:
        raise UserError("no features to take statistics of.")
    return total


def matrix_root(sigma: Tensor) -> Tensor:
    """L (d, rank) with L Lᵀ = sigma: Cholesky's, or, without the directions in which sigma is nothing but rounding, from eigenvectors."""
    small = len(sigma) * torch.finfo(torch.float64).eps
    L, failed = torch.linalg.cholesky_ex(sigma)
    pivots = L.diagonal() ** 2
    if not failed and pivots.min() > small * pivots.max():
        return L
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > small * values.max()
    return vectors[:, keep] * values[keep].sqrt()


# ---- Fréchet --------------------------------------------------------------------------------------------------------

def frechet_distance(mu1: Features, sigma1: Features, mu2: Features, sigma2: Features) -> float:
    """|mu1 - mu2|² + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^½  (Dowson & Landau 1982); FID of Inception's features.

    mu (d,), sigma (d, d). With sigma1 = L Lᵀ the last trace is Σ √eigenvalue(Lᵀ sigma2 L): symmetric and real, unlike
    the square root of a product. Never negative; of equal moments exactly 0.
    """
    a, b = (Statistics(2, *(finite(torch.as_tensor(v).detach().double().cpu(), name) for v, name in ((mu, "mu"), (sigma, "sigma"))))
            for mu, sigma in ((mu1, sigma1), (mu2, sigma2)))                    # with n = 2 the scatter is the covariance
    for mu, sigma in ((a.mean, a.scatter), (b.mean, b.scatter)):
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(f"wanted mu (d,) and sigma (d, d), got {tuple(mu.shape)} and {tuple(sigma.shape)}.")
    return frechet(a, b)


def frechet_from_features(x: Features, y: Features) -> float:
    """The same, of features (N, d) and (M, d). A set smaller than d is never turned into a d × d matrix, which is exact and fast."""
    x, y = rows(x), rows(y)
    return frechet(*(v if len(v) < v.shape[1] else Statistics.of(v) for v in (x, y)))


def frechet(a: Statistics | Tensor, b: Statistics | Tensor) -> float:
    """Fréchet distance of two sets, each given by its statistics or, if it is smaller than d, best by its features (N, d)."""
    mean_a, mean_b = (v.mean if isinstance(v, Statistics) else v.mean(0) for v in (a, b))
    if mean_a.shape != mean_b.shape:
        raise UserError(f"features of {len(mean_a)} and of {len(mean_b)} dimensions cannot be compared.  They come from different networks.")
    if isinstance(a, Tensor) and isinstance(b, Statistics):
        a, b = b, a
    if isinstance(a, Tensor) and torch.equal(a, b):
        return 0.0
    if isinstance(a, Tensor):                                                   # sigma = Xᵀ X: the trace is the nuclear norm of X Yᵀ
        x, y = centred(a), centred(b)
        spread, common = float(x.square().sum() + y.square().sum()), float(torch.linalg.svdvals(x @ y.T).sum())
    elif isinstance(b, Tensor):
        y = centred(b)
        spread, common = float(a.sigma.trace() + y.square().sum()), root_trace(y @ a.sigma @ y.T)[0]
    else:
        if torch.equal(a.mean, b.mean) and torch.equal(a.sigma, b.sigma):
            return 0.0
        spread = float(a.sigma.trace() + b.sigma.trace())
        common, singular = root_trace(a.root.T @ b.sigma @ a.root)
        if singular:                                                            # roots of rounding errors are large; singular values have none
            common = float(torch.linalg.svdvals(a.root.T @ b.root).sum())
    return max(float((mean_a - mean_b).square().sum()) + spread - 2 * common, 0.0)


def centred(x: Tensor) -> Tensor:
    """X with Xᵀ X = sigma."""
    return (x - x.mean(0)) / (len(x) - 1) ** 0.5


def root_trace(product: Tensor) -> tuple[float, bool]:
    """(Σ √eigenvalue of a symmetric matrix ≥ 0, whether some of them are lost in rounding)."""
    product = (product + product.T) / 2
    values = torch.linalg.eigvalsh(product)
    lost = values <= len(product) * torch.finfo(torch.float64).eps * values.max()
    return float(values[~lost].sqrt().sum()), bool(lost.any())


class Estimate(NamedTuple):
    value: float
    error: float            # one standard error


def jackknife(values: Sequence[float]) -> float:
    """Standard error of an estimate from its values without each of g equal parts of the data (Tukey 1958)."""
    v = np.asarray(values, dtype=np.float64)
    return float(np.sqrt((len(v) - 1) / len(v) * ((v - v.mean()) ** 2).sum()))


def frechet_infinity(x: Statistics | Features, y: Features, points: int = 15, seed: int = 0) -> Estimate:
    """FID at infinitely many y: the intercept of a line through FID against 1/N (Chong & Forsyth 2020), N from len(y) / 10 up.

    Only y's size is extrapolated; x is the reference as it is. The error is the line fit's.
    """
    y = rows(y)
    x = x if isinstance(x, Statistics) or len(x) < len(x[0]) else Statistics.of(x)
    x = x if isinstance(x, Statistics) else rows(x)
    if len(y) < 20:
        raise UserError(f"FID∞ is a fit over subsets: wanted at least 20 images, got {len(y)}.")
    r, sizes = np.random.default_rng(seed), np.unique(np.linspace(max(len(y) // 10, 2), len(y), points).round().astype(int))
    subsets = [y[torch.from_numpy(r.permutation(len(y))[:n])] for n in sizes]
    values = [frechet(x, s if len(s) < s.shape[1] else Statistics.of(s)) for s in subsets]
    (_, value), covariance = np.polyfit(1 / sizes, values, 1, cov=True)
    return Estimate(float(value), float(covariance[1, 1] ** 0.5))


# ---- kernel ---------------------------------------------------------------------------------------------------------

class KID(NamedTuple):
    value: float            # 0 on average for two sets of one distribution, so it can be negative
    error: float            # one standard error


def kernel_distance(x: Features, y: Features) -> KID:
    """Squared MMD under the kernel (x·y / d + 1)³ (Bińkowski et al. 2018), unbiased, over all pairs, not over subsets.

    The standard error is a jackknife over single images of both sets, which the kernel's row sums give for free.
    """
    x, y = rows(x), rows(y)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and of {y.shape[1]} dimensions cannot be compared.  They come from different networks.")
    m, n = len(x), len(y)

    def sums(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([((part @ b.T / a.shape[1] + 1) ** 3).sum(1) for part in a.split(BLOCK)])

    own = [sums(a, a) - (a.square().sum(1) / a.shape[1] + 1) ** 3 for a in (x, y)]      # without the diagonal
    xx, yy, xy, yx = own[0], own[1], sums(x, y), sums(y, x)
    S, T, C = xx.sum(), yy.sum(), xy.sum()
    value = float(S / (m * (m - 1)) + T / (n * (n - 1)) - 2 * C / (m * n))
    if m < 3 or n < 3:
        return KID(value, float("nan"))
    without_x = (S - 2 * xx) / ((m - 1) * (m - 2)) + T / (n * (n - 1)) - 2 * (C - xy) / ((m - 1) * n)
    without_y = S / (m * (m - 1)) + (T - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (C - yx) / (m * (n - 1))
    return KID(value, float(np.hypot(jackknife(without_x.numpy()), jackknife(without_y.numpy()))))


# ---- neighbours -----------------------------------------------------------------------------------------------------

def squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """|a_i - b_j|², block by block of rows."""
    squares = b.square().sum(1)
    for start in range(0, len(a), BLOCK):
        part = a[start:start + BLOCK]
        yield slice(start, start + len(part)), (part.square().sum(1, keepdim=True) + squares - 2 * part @ b.T).clamp_(min=0)


def radii(x: Tensor, k: int) -> Tensor:
    """(N,) squared distance of each row to its k-th nearest other."""
    if not 1 <= k < len(x):
        raise UserError(f"the {k}-th nearest of {len(x) - 1} others does not exist.  Use more images, or a smaller k.")
    out = torch.empty(len(x), dtype=x.dtype)
    for part, d in squared_distances(x, x):
        d[torch.arange(len(d)), torch.arange(part.start, part.stop)] = float("inf")
        out[part] = d.kthvalue(k, 1).values
    return out


class Manifold(NamedTuple):
    precision: float        # share of generated images that lie where real ones are
    recall: float           # share of real images that lie where generated ones are
    density: float          # how many real neighbourhoods a generated image lies in, over k; 1 for real against real
    coverage: float         # share of real images with a generated one in their neighbourhood


def precision_recall(x: Features, y: Features, k: int = 3, k_density: int = 5) -> Manifold:
    """x real (N, d), y generated (M, d). Precision and recall: Kynkäänniemi et al. 2019; density and coverage: Naeem et al. 2020.

    A neighbourhood is the ball to the k-th nearest other of the same set.
    """
    x, y = rows(x, "real features"), rows(y, "generated features")
    x, y = x - x.mean(0), y - x.mean(0)                                         # smaller numbers cancel less
    real, fake, wide = radii(x, k), radii(y, k), radii(x, k_density)
    inside, inside_fake, dense, nearest = (torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool), 0.0,
                                           torch.zeros(len(x), dtype=torch.bool))
    for part, d in squared_distances(x, y):                                     # (block of real, generated)
        inside |= (d <= real[part, None]).any(0)
        inside_fake[part] = (d <= fake).any(1)
        near = d <= wide[part, None]
        dense += float(near.sum())
        nearest[part] = near.any(1)
    return Manifold(float(inside.double().mean()), float(inside_fake.double().mean()), dense / (k_density * len(y)), float(nearest.double().mean()))


class Memorisation(NamedTuple):
    ratio: float            # median distance to the nearest training image: generated over held-out; a copier's is near 0
    closer: float           # chance that a generated image is nearer to the training set than a held-out one; fresh images: 0.5
    copies: float           # share of generated images nearer than all but 5% of the held-out ones are; fresh images: 0.05
    flagged: bool           # copies are more than chance explains
    held_out: int


def memorisation(y: Features, train: Features | Iterable[Features], held_out: Features) -> Memorisation:
    """Does y repeat training images? Nearest training neighbours of generated and of held-out real images, in feature space.

    train may come in batches: all of it has to be looked through, since a copy of what is left out is not seen.
    """
    y, held = rows(y, "generated features"), rows(held_out, "held-out features")
    center = held.mean(0)                                                       # smaller numbers cancel less
    both, nearest = torch.cat([y, held]) - center, torch.full((len(y) + len(held),), float("inf"), dtype=torch.float64)
    for batch in [train] if isinstance(train, (Tensor, np.ndarray)) else train:
        batch = finite(torch.as_tensor(batch).double().cpu(), "training features") - center
        for part, d in squared_distances(both, batch):
            nearest[part] = torch.minimum(nearest[part], d.min(1).values)
    ours, order = nearest[:len(y)].sqrt(), nearest[len(y):].sqrt().sort().values
    line, middle = order[max(int(0.05 * len(order)) - 1, 0)], float(order.median())
    below, upto = torch.searchsorted(order, ours), torch.searchsorted(order, ours, right=True)
    closer = float((1 - (below + upto).double() / 2 / len(order)).mean())
    copies, expected = float((ours <= line).double().mean()), max(float((order <= line).double().mean()), 0.05)
    chance = (expected * (1 - expected) * (1 / len(y) + 1 / len(order))) ** 0.5
    flagged = copies > max(expected + 4 * chance, 2 * expected)
    return Memorisation(float(ours.median()) / middle if middle else float("nan"), closer, copies, flagged, len(order))


# ---- on disk --------------------------------------------------------------------------------------------------------

def save_statistics(path: Path, stats: Statistics, meta: dict[str, Any]) -> None:
    """mu and sigma as pytorch-fid and EDM read them, with n and what they are of beside them."""
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez(temporary, mu=stats.mean.numpy(), sigma=stats.sigma.numpy(), n=stats.n, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))
    temporary.replace(path)


def read_npz(path: Path, wanted: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """(names of all arrays, those that are wanted) of an npz. What cannot be read is a UserError."""
    try:
        with open(path, "rb") as data:
            file = np.load(data, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path} holds one array, as npy does; wanted an npz.")
            return file.files, {name: file[name] for name in wanted if name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as npz ({error}).") from None


def load_statistics(path: Path, d: int | None = None) -> tuple[Statistics, dict[str, Any]]:
    """mu and sigma of ours, pytorch-fid's, EDM's or ADM's npz; n is 0 and the description empty where the file does not say."""
    names, arrays = read_npz(path, ("mu", "sigma", "n", "meta"))
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"{path} holds {', '.join(names[:6]) or 'nothing'}; wanted mu and sigma (statistics) or arr_0 (images).")
    try:
        mu, sigma = (torch.from_numpy(np.asarray(arrays[k], np.float64)) for k in ("mu", "sigma"))
        n, meta = int(arrays.get("n", 0)), json.loads(arrays["meta"].tobytes()) if "meta" in arrays else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as npz of mu and sigma, or of its n and meta ({error}).") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or d is not None and len(mu) != d:
        raise UserError(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; wanted {f'({d},) and ({d}, {d})' if d else '(d,) and (d, d)'}.  "
                        "They are of another network.")
    finite(mu[None], f"{path}, mu"), finite(sigma, f"{path}, sigma")
    if sigma.diagonal().min() < 0 or not torch.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6 * float(sigma.diagonal().max())):
        raise UserError(f"{path}: sigma is not a covariance (symmetric, no variance below 0), so distances to it mean nothing.  Make it anew.")
    return Statistics(n or 2, mu, sigma * ((n or 2) - 1)), {"n": n, **meta}
