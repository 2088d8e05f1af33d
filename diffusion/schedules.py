"""Time: the noise schedules, as maps to one clock, and how training times are drawn.

    t = table_time("scaled_linear", k)        # row 0 … 999 of a VP table -> t in [0, 1]
    k = table_row("scaled_linear", t)         # the inverse
    t = sample_t(64, "logit_normal", shift=3.0)

A schedule mixes a x0 + s eps. On the linear path a = 1 - t and s = t; every other schedule's point
is the linear path's point at t = s / (a + s), divided by a factor that is norm(t) wherever
a² + s² = 1. So a schedule is a map from the number a network is fed, k in [0, 1000], to t:

    linear, cosine, scaled_linear   tables of 1000 rows, made continuous between them by
                                    interpolating log(s/a)
    gvp                             a = cos(pi k / 2000), s = sin(pi k / 2000): the cosine path,
                                    continuous from data to noise
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

T = 1000  # rows of a VP table, and the scale of the time a network is fed
TABLES = ("linear", "cosine", "scaled_linear")
# (loc, scale) of each density, if nobody says.
DENSITIES = {
    "uniform": (0.0, 1.0),
    "logit_normal": (0.0, 1.0),
    "gaussian": (0.5, 0.2),
    "mode": (0.0, 1.29),
    "lognormal": (-1.2, 1.2),
}


# ---- schedules ----------------------------------------------------------------------------------


@lru_cache
def alphas_bar(table: str, zero_snr: bool = False) -> Tensor:
    """a² of the VP tables, (1000,) in float64: linear (Ho et al. 2020), cosine (Nichol & Dhariwal
    2021), scaled_linear (Rombach et al. 2022). fp32 cumulative products are off by 1e-6.

    zero_snr moves and scales a so that the last row is pure noise and the first stays (Lin et al.
    2024, alg. 1).
    """
    if table == "linear":
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    elif table == "scaled_linear":
        betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), T, dtype=torch.float64) ** 2
    elif table == "cosine":
        i = torch.arange(T + 1, dtype=torch.float64) / T
        ab = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - ab[1:] / ab[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"table {table!r} is not one of {', '.join(TABLES)}.")
    ab = (1 - betas).cumprod(0)
    if zero_snr:
        a = ab.sqrt()
        ab = ((a - a[-1]) * (a[0] / (a[0] - a[-1]))).square()
    return ab


@lru_cache
def table_logit(table: str, device: torch.device, zero_snr: bool = False) -> Tensor:
    """log(s/a) = logit(t) of each row of a VP table, (1000,) float64, rising; a zero-SNR table ends
    in inf."""
    ab = alphas_bar(table, zero_snr)
    return (0.5 * (torch.log1p(-ab) - ab.log())).to(device)


def table_time(table: str, k: Tensor, zero_snr: bool = False) -> Tensor:
    """Linear-path time t = s / (a + s) of the schedule at (fractional) k, in k's shape, float64.

    Between rows the log-SNR is interpolated; before the last row of a zero-SNR table, where that is
    infinite, t itself.
    """
    k = k.double()
    if table == "gvp":
        angle = k.clamp(0, T) * (math.pi / 2 / T)
        return angle.sin() / (angle.sin() + angle.cos())
    logit, k = table_logit(table, k.device, zero_snr), k.clamp(0, T - 1)
    last = T - 1 - zero_snr  # the last row that is not infinite
    low = k.floor().clamp(max=last - 1).long()
    t = torch.sigmoid(torch.lerp(logit[low], logit[low + 1], (k - low).clamp(max=1)))
    if zero_snr:
        before = torch.sigmoid(logit[last])
        t = torch.where(k > last, before + (1 - before) * (k - last), t)
    return t


def table_row(table: str, t: Tensor, zero_snr: bool = False) -> Tensor:
    """The inverse of table_time: (fractional) k of linear-path times t, float64; beyond the ends of
    a table, its end.

    An fp32 t names its row only to about 1e-3, so a row within 5e-3 of a whole number is that row:
    a network trained on integers is fed integers.
    """
    t = t.double()
    if table == "gvp":
        return torch.atan2(t, 1 - t) * (T * 2 / math.pi)
    logit, x = table_logit(table, t.device, zero_snr), torch.logit(t)
    last = T - 1 - zero_snr
    high = torch.searchsorted(logit, x.contiguous()).clamp(1, last)
    k = high - 1 + (x - logit[high - 1]) / (logit[high] - logit[high - 1])
    if zero_snr:
        before = torch.sigmoid(logit[last])
        k = torch.where(t > before, last + (t - before) / (1 - before), k)
    k = k.clamp(0, T - 1)
    return torch.where((k - k.round()).abs() < 5e-3, k.round(), k)


def norm(t: Tensor) -> Tensor:
    """sqrt((1-t)² + t²): the linear path's length unit. Dividing by it gives VP's a and s."""
    return ((1 - t).square() + t.square()).sqrt()


# ---- training times -----------------------------------------------------------------------------


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Multiply the odds t / (1 - t) by `shift` (SD3, Esser et al. 2024 eq. 23). > 1 moves towards
    noise."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(height: int, width: int, base: int = 32) -> float:
    """The shift that keeps a larger picture as uncertain as a base × base one: sqrt(m / n) with
    m = height · width latent pixels and n = base² (SD3, eq. 23). 1 for 32×32 latents, 2 for 64×64.
    (Flux's other convention, exp(mu) with mu affine in the number of tokens, is not used here.)"""
    return math.sqrt(height * width) / base


def time_quantile(
    q: Tensor, density: str = "uniform", loc: float | None = None, scale: float | None = None
) -> Tensor:
    """Inverse CDF of a density over t: uniform q (n,) in [0, 1] -> t (n,), float64.

    loc, scale: None = the density's own.

    uniform
    logit_normal   logit t ~ N(loc 0, scale 1): SD3
    lognormal      log sigma ~ N(loc -1.2, scale 1.2), sigma = t / (1 - t): EDM, Karras et al. 2022
    gaussian       N(loc 0.5, scale 0.2) truncated to [0, 1]
    mode           1 - p - scale (cos²(pi p / 2) - 1 + p), p = 1 - q, scale 1.29: SD3 eq. 20;
                   invertible for scale in [-1, 1.75]
    """
    if density not in DENSITIES:
        raise ValueError(f"density {density!r} is not one of {', '.join(DENSITIES)}.")
    own_loc, own_scale = DENSITIES[density]
    loc = own_loc if loc is None else loc
    scale = own_scale if scale is None else scale
    q = q.double()
    if density == "uniform":
        return q
    if density == "mode":
        # cos²(pi (1-q) / 2) = sin²(pi q / 2)
        return q - scale * (torch.sin(math.pi / 2 * q).square() - q)
    if density == "gaussian":
        low = 0.5 * math.erfc(loc / scale / math.sqrt(2))
        high = 0.5 * math.erfc((loc - 1) / scale / math.sqrt(2))
        return (loc + scale * torch.special.ndtri(low + q * (high - low))).clamp(0, 1)
    return torch.sigmoid(loc + scale * torch.special.ndtri(q))


def stratify(q: Tensor, position: Tensor, batch: int) -> Tensor:
    """Uniform q (n,) of the samples at positions (n,) of a run -> one in each of `batch` equal
    strata per batch of `batch` consecutive positions. Each is still uniform given a random
    position, and a function of (seed, position) alone."""
    return (position % batch + q.double()) / batch


def sample_t(
    n: int,
    density: str = "uniform",
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    loc: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Draw n times from a density, then shift them; (n,) fp32."""
    q = torch.rand(n, dtype=torch.float64, generator=generator)
    return shift_time(time_quantile(q, density, loc, scale), shift).float()
