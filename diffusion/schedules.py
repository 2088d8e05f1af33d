"""Time: the noise schedules, as maps to one clock, and how training times are drawn.

    t = table_time("scaled_linear", k)        # row 0 … 999 of a VP table -> t in [0, 1]
    k = table_row("scaled_linear", t)         # the inverse
    t = sample_t(64, "logit_normal", shift=3.0)

A schedule mixes a x0 + s eps. On the linear path a = 1 - t and s = t; every other schedule's point
is the linear path's point at t = s / (a + s), divided by a factor that is norm(t) wherever
a² + s² = 1. So a schedule is a map from the number a network is fed, k in [0, 1000], to t:

    linear, cosine, scaled_linear   tables of 1000 rows, made continuous between them by
                                    interpolating log(s/a)
    0.0015,0.0195,scaled_linear     a table of any betas: the first, the last, how they rise …
    0.0001,0.00012,…                … or all 1000 themselves
    gvp                             a = cos(pi k / 2000), s = sin(pi k / 2000): the cosine path,
                                    continuous from data to noise

A table is a string, so that flags, metadata and caches hold it as it is.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

T = 1000  # rows of a VP table, and the scale of the time a network is fed
# The tables that have a name: the first beta, the last, how they rise.
TABLES = {
    "linear": (1e-4, 0.02, "linear"),
    "cosine": (0.0, 0.0, "cosine"),
    "scaled_linear": (0.00085, 0.012, "scaled_linear"),
}
# How betas may rise, and what else that is called.
SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")
ALIASES = {"sqrt": "scaled_linear", "squaredcos_cap_v2": "cosine"}
BETAS = "START,END,SCHEDULE with 0 < START, END < 1 and SCHEDULE one of linear, scaled_linear (LDM "
BETAS += 'calls it "linear"), cosine (whatever START and END) and sigmoid; or 1000 numbers'
# (loc, scale) of each density, if nobody says.
DENSITIES = {
    "uniform": (0.0, 1.0),
    "logit_normal": (0.0, 1.0),
    "gaussian": (0.5, 0.2),
    "mode": (0.0, 1.29),
    "lognormal": (-1.2, 1.2),
}


# ---- schedules ----------------------------------------------------------------------------------


def has_rows(table: str) -> bool:
    """Is it a VP table of 1000 rows? "", the linear path, and gvp are none."""
    return table not in ("", "gvp")


def table_from(betas: str) -> str:
    """The table of START,END,SCHEDULE or of 1000 numbers, in one spelling: its name, if it has one.
    ValueError says what cannot be."""
    words = [word.strip() for word in betas.split(",")]
    if len(words) == 3:
        kind = ALIASES.get(words[2], words[2])
        start, end, kind = (*numbers_in(words[:2], betas), kind)
        known = {form: name for name, form in TABLES.items()}
        table = "cosine" if kind == "cosine" else f"{start!r},{end!r},{kind}"
        table = known.get((start, end, kind), table)
    elif len(words) == T:
        table = ",".join(map(repr, numbers_in(words, betas)))
    else:
        raise ValueError(f"betas {shorter(betas)!r}: wanted {BETAS}.")
    alphas_bar(table, zero_snr=True)  # refuses what cannot be
    return table


def numbers_in(words: list[str], betas: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"betas {shorter(betas)!r}: wanted {BETAS}.") from None


def betas_of(table: str) -> Tensor:
    """The betas of a VP table, (1000,) float64: linear (Ho et al. 2020), cosine (Nichol & Dhariwal
    2021), scaled_linear (Rombach et al. 2022), or what the string says; as diffusers computes them.
    """
    words = table.split(",")
    if table not in TABLES and len(words) not in (3, T):
        raise ValueError(
            f"table {shorter(table)!r} is not one of {', '.join(TABLES)}, and no betas."
        )
    if len(words) == T:
        betas = torch.tensor(numbers_in(words, table), dtype=torch.float64)
        # The last may be 1: nothing is left of the image there.
        if not ((betas > 0) & (betas <= 1)).all() or (betas[:-1] == 1).any():
            raise ValueError(f"betas {shorter(table)!r}: wanted 1000 numbers above 0 and below 1.")
        return betas
    if table in TABLES:
        start, end, kind = TABLES[table]
    else:
        start, end, kind = (*numbers_in(words[:2], table), words[2])
    if kind == "cosine":
        i = torch.arange(T + 1, dtype=torch.float64) / T
        ab = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - ab[1:] / ab[:-1]).clamp(max=0.999)
    if kind not in SCHEDULES or not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"betas {table!r}: wanted {BETAS}.")
    if kind == "linear":
        return torch.linspace(start, end, T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), T, dtype=torch.float64) ** 2
    rise = torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64))
    return rise * (end - start) + start


def shorter(table: str) -> str:
    """A table or betas for a message: 1000 numbers are not listed."""
    words = table.split(",")
    if len(words) == T:
        return f"{T} betas from {words[0]} to {words[-1]}"
    return table if len(table) < 80 else f"{table[:80]}…"


@lru_cache
def alphas_bar(table: str, zero_snr: bool = False) -> Tensor:
    """a² of the VP tables, (1000,) in float64. fp32 cumulative products are off by 1e-6.

    zero_snr moves and scales a so that the last row is pure noise and the first stays (Lin et al.
    2024, alg. 1). ValueError: a table that cannot be.
    """
    ab = (1 - betas_of(table)).cumprod(0)
    if not (ab[0] < 1 and ab[-2] > 1e-200 and (ab.diff() < 0).all()):
        raise ValueError(f"table {shorter(table)}: its betas leave nothing of the image, or all.")
    if zero_snr and ab[-1] > 0:
        a = ab.sqrt()
        ab = ((a - a[-1]) * (a[0] / (a[0] - a[-1]))).square()
    if not zero_snr and ab[-1] == 0:
        raise ValueError(f"table {shorter(table)} ends in pure noise: it needs zero_snr.")
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
    m = height · width latent pixels and n = base² (SD3, eq. 23): 1 for latents of side 32, 2 for
    side 64. Flux has other rules: flux_shift(), flux2_shift()."""
    return math.sqrt(height * width) / base


def flux_shift(tokens: int) -> float:
    """The shift that Flux 1 dev is sampled with, for an image of so many tokens: e^mu, with mu on
    the line from 0.5 at 256 tokens to 1.15 at 4096 (Black Forest Labs' code)."""
    return math.exp(0.5 + 0.65 * (tokens - 256) / 3840)


def flux2_shift(tokens: int, steps: int) -> float:
    """The same of Flux 2: mu is on the line between its values for 10 and for 200 steps, which were
    fitted; for more than 4300 tokens the latter (Black Forest Labs' code)."""
    at_10 = 8.73809524e-5 * tokens + 1.89833333
    at_200 = 1.6927e-4 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(at_200)
    return math.exp(at_200 + (steps - 200) * (at_200 - at_10) / 190)


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
