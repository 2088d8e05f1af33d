"""DDPM and flow matching as two readings of one interpolant.

    objective = make_objective("fm")                       # "ddpm" "v" "x0" "fm"
    objective.loss(net, x0).loss.backward()
    x0, eps, u = objective.predict(net, x, t)              # whatever the network was trained to output

Time, everywhere in this project:  t in [0, 1],  t = 0 is data,  t = 1 is noise.

    linear path (fm)     xt = (1 - t) x0 + t eps           velocity u = dx/dt = eps - x0
    VP path (ddpm, v)    xt = a x0 + s eps,  a² + s² = 1   row k of a table of 1000

Both mix the same x0 and eps; they differ by a factor. With t = s / (a + s) the VP point is the linear point divided by
sqrt((1-t)² + t²), so an objective is three things: the t it trains at, what it feeds the network (a factor on x and a
number for t), and what it asks for (u, eps, v or x0). Losses at equal t are losses at equal signal-to-noise ratio.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Callable, Literal, NamedTuple

import torch
from torch import Tensor

T = 1000                                     # rows of a VP table, and the scale of the time a network is fed
Net = Callable[..., Tensor]                  # net(x (B, C, H, W), t (B,) in [0, 1000], **cond) -> (B, C, H, W)


# ---- time -----------------------------------------------------------------------------------------------------------

@lru_cache
def alphas_bar(table: str) -> Tensor:
    """a² of the VP tables, (1000,) in float64: linear (Ho et al. 2020), cosine (Nichol & Dhariwal 2021),
    scaled_linear (Rombach et al. 2022). fp32 cumulative products are off by 1e-6."""
    if table == "linear":
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    elif table == "scaled_linear":
        betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), T, dtype=torch.float64) ** 2
    elif table == "cosine":
        i = torch.arange(T + 1, dtype=torch.float64) / T
        ab = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - ab[1:] / ab[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"table {table!r} is not one of linear, cosine, scaled_linear.")
    return (1 - betas).cumprod(0)


@lru_cache
def table_logit(table: str, device: torch.device) -> Tensor:
    """log(s/a) = logit(t) of each row of a VP table, (1000,) float64, rising."""
    ab = alphas_bar(table)
    return (0.5 * (torch.log1p(-ab) - ab.log())).to(device)


def table_time(table: str, k: Tensor) -> Tensor:
    """Linear-path time t = s / (a + s) of (fractional) table rows k, in k's shape, float64. Between rows the
    log-SNR is interpolated."""
    logit, k = table_logit(table, k.device), k.double().clamp(0, T - 1)
    low = k.floor().clamp(max=T - 2).long()
    return torch.sigmoid(torch.lerp(logit[low], logit[low + 1], k - low))


def table_row(table: str, t: Tensor) -> Tensor:
    """The inverse of table_time: fractional row k in [0, 999] of linear-path times t; the ends are clamped.

    An fp32 t names its row only to about 1e-3, so a row within 5e-3 of a whole number is that row: a network trained
    on integers is fed integers.
    """
    logit, x = table_logit(table, t.device), torch.logit(t.double())
    high = torch.searchsorted(logit, x.contiguous()).clamp(1, T - 1)
    k = high - 1 + (x - logit[high - 1]) / (logit[high] - logit[high - 1])
    k = k.clamp(0, T - 1)
    return torch.where((k - k.round()).abs() < 5e-3, k.round(), k)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Multiply the odds t / (1 - t) by `shift` (SD3, Esser et al. 2024 eq. 23). > 1 moves towards noise."""
    return shift * t / (1 + (shift - 1) * t)


def time_quantile(q: Tensor, density: str = "uniform", loc: float = 0.0, scale: float = 1.0) -> Tensor:
    """Inverse CDF of a density over t: uniform q (n,) in [0, 1] -> t (n,), float64.

    uniform | logit_normal: sigmoid(N(loc, scale)) | gaussian: N(0.5, 0.2) truncated to [0, 1].
    """
    q = q.double()
    if density == "uniform":
        return q
    if density == "logit_normal":
        return torch.sigmoid(loc + scale * torch.special.ndtri(q))
    if density == "gaussian":
        tail = 0.5 * math.erfc(2.5 / math.sqrt(2))                              # beyond 0 or 1: 2.5 sd from the centre
        return (0.5 + 0.2 * torch.special.ndtri(tail + q * (1 - 2 * tail))).clamp(0, 1)
    raise ValueError(f"density {density!r} is not one of uniform, logit_normal, gaussian.")


def sample_t(n: int, density: str = "uniform", shift: float = 1.0, generator: torch.Generator | None = None,
             loc: float = 0.0, scale: float = 1.0) -> Tensor:
    """Draw n times from a density, then shift them; (n,) fp32."""
    q = torch.rand(n, dtype=torch.float64, generator=generator)
    return shift_time(time_quantile(q, density, loc, scale), shift).float()


# ---- the objective --------------------------------------------------------------------------------------------------

class Loss(NamedTuple):
    loss: Tensor            # () mean of per_sample
    per_sample: Tensor      # (B,) weighted loss, mean over C, H, W
    t: Tensor               # (B,) linear-path time


@dataclass(frozen=True)
class Objective:
    """What a network is trained to say. Use make_objective() for the presets."""
    name: str
    target: Literal["u", "eps", "v", "x0"]
    table: Literal["", "linear", "cosine", "scaled_linear"] = ""     # "" = the linear path; else the VP path
    density: Literal["uniform", "logit_normal", "gaussian"] = "uniform"   # of t (linear path) or of k / 1000 (VP)
    t_loc: float = 0.0                       # logit_normal only
    t_scale: float = 1.0                     # logit_normal only
    shift: float = 1.0                       # of the training times; > 1 = more noise
    loss_type: Literal["mse", "l1", "huber"] = "mse"
    huber_c: float = 0.03                    # pseudo-Huber: c² (sqrt(d²/c² + 1) - 1) · 2 -> d² for small d
    weight: Literal["uniform", "min_snr"] = "uniform"
    gamma: float = 5.0                       # min_snr

    def __post_init__(self):
        for field, options in (("target", ("u", "eps", "v", "x0")), ("table", ("", "linear", "cosine", "scaled_linear")),
                               ("density", ("uniform", "logit_normal", "gaussian")),
                               ("loss_type", ("mse", "l1", "huber")), ("weight", ("uniform", "min_snr"))):
            if getattr(self, field) not in options:
                raise ValueError(f"{field} {getattr(self, field)!r} is not one of {', '.join(map(repr, options))}.")

    @property
    def t_max(self) -> float:
        """Where sampling starts: 1 on the linear path, the last row's t on a VP table (0.9937 for Ho's)."""
        return float(table_time(self.table, torch.tensor(T - 1))) if self.table else 1.0

    def time(self, q: Tensor) -> Tensor:
        """Uniform q (B,) -> training times t (B,) fp32 on the linear path. VP tables draw whole rows."""
        q = shift_time(time_quantile(q, self.density, self.t_loc, self.t_scale), self.shift)
        return (table_time(self.table, (q * T).floor()) if self.table else q).float()

    def prior(self, noise: Tensor) -> Tensor:
        """Unit noise -> the point of the linear path where sampling starts, at t_max."""
        return noise * norm(torch.tensor(self.t_max)) if self.table else noise

    def loss(self, net: Net, x0: Tensor, *, eps: Tensor | None = None, t: Tensor | None = None,
             generator: torch.Generator | None = None, source: Tensor | None = None, **cond: Any) -> Loss:
        """One training step's loss for data x0 (B, C, H, W), with noise and times drawn or given.

        `source` replaces the noise by another starting distribution (coupling); only velocities know it.
        """
        drawn_on = generator.device if generator is not None else x0.device
        if t is None:
            t = self.time(torch.rand(len(x0), dtype=torch.float64, generator=generator, device=drawn_on).to(x0.device))
        if source is not None and (self.target != "u" or eps is not None):
            raise ValueError("source= replaces eps= and needs the linear path with target 'u'.")
        if source is None and eps is None:
            eps = torch.randn(x0.shape, generator=generator, device=drawn_on).to(x0.device)
        x0, eps, t = x0.float(), (eps if source is None else source).float(), t.float()
        w = t.view(-1, 1, 1, 1)
        out = self.call(net, (1 - w) * x0 + w * eps, t, **cond)
        error = out - self.goal(x0, eps, w)
        if self.loss_type == "mse":
            error = error.square()
        elif self.loss_type == "l1":
            error = error.abs()
        else:
            error = 2 * self.huber_c ** 2 * ((error / self.huber_c).square().add(1).sqrt() - 1)
        per_sample = error.flatten(1).mean(1)
        if self.weight == "min_snr":
            per_sample = per_sample * min_snr(t, self.target, self.gamma)
        return Loss(per_sample.mean(), per_sample, t)

    def call(self, net: Net, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Run the network on the linear-path point x at t, in its own coordinates; returns fp32."""
        if self.table:
            return net(x / norm(t).view(-1, 1, 1, 1), table_row(self.table, t).float(), **cond).float()
        return net(x, t * T, **cond).float()

    def goal(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output; t broadcasts against x0."""
        if self.target == "u":
            return eps - x0
        if self.target == "v":                                                  # Salimans & Ho 2022: v = a eps - s x0
            return ((1 - t) * eps - t * x0) / norm(t)
        return eps if self.target == "eps" else x0

    def predict(self, net: Net, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The network's opinion at x (B, C, H, W) on the linear path at t (B,): (x0, eps, u), at least fp32.

        u and v convert without a division; eps is singular at t = 1 (beyond every table) and x0 at t = 0.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        x, w = x.to(wide), t.to(wide).view(-1, 1, 1, 1)
        out = self.call(net, x.float(), t.float(), **cond).to(wide)
        if self.target == "u":
            return x - w * out, x + (1 - w) * out, out
        if self.target == "v":
            n = norm(w)
            x0, eps = ((1 - w) * x / n - w * out) / n, (w * x / n + (1 - w) * out) / n
        elif self.target == "eps":
            x0, eps = (x - w * out) / (1 - w).clamp(min=1e-5), out
        else:
            x0, eps = out, (x - (1 - w) * out) / w.clamp(min=1e-5)
        return x0, eps, eps - x0


def norm(t: Tensor) -> Tensor:
    """sqrt((1-t)² + t²): the linear path's length unit. Dividing by it gives VP's a and s."""
    return ((1 - t).square() + t.square()).sqrt()


def min_snr(t: Tensor, target: str, gamma: float = 5.0) -> Tensor:
    """Min-SNR weight (Hang et al. 2023) at t: min(SNR, gamma) on the x0 error, translated to the target's error.

    Written so that neither end divides zero by zero: SNR = ((1-t)/t)² is infinite at t = 0 and zero at t = 1.
    """
    snr = ((1 - t) / t).square()
    if target == "eps":
        return (gamma / snr).clamp(max=1.0)
    if target == "v":
        return torch.minimum(1 / (1 + 1 / snr), gamma / (1 + snr))
    capped = snr.clamp(max=gamma)
    return capped * t.square() if target == "u" else capped


PRESETS: dict[str, Objective] = {
    "fm": Objective("fm", "u", density="logit_normal"),
    "ddpm": Objective("ddpm", "eps", "linear"),
    # v and x0 stay regular where eps does not, so they can use the table that reaches (almost) pure noise.
    "v": Objective("v", "v", "cosine"),
    "x0": Objective("x0", "x0", "cosine"),
}


def make_objective(name: str, **overrides: Any) -> Objective:
    """A preset by name with fields replaced: make_objective("ddpm", table="cosine", weight="min_snr")."""
    if name not in PRESETS:
        raise ValueError(f"objective {name!r} is not one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **overrides)
