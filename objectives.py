"""DDPM and flow matching as two readings of one interpolant.

    objective = make_objective("fm")                       # "ddpm" "v" "x0" "fm" "cfm"
    objective.loss(net, x0).loss.backward()
    x0, eps, u = objective.predict(net, x, t)              # whatever the network was trained to say

Time, everywhere in this project:  t in [0, 1],  t = 0 is data,  t = 1 is noise.

    linear path (fm)     xt = (1 - t) x0 + t eps           velocity u = dx/dt = eps - x0
    VP path (ddpm, v)    xt = a x0 + s eps,  a² + s² = 1   row k of a table of 1000, or gvp

Both mix the same x0 and eps; they differ by a factor. With t = s / (a + s) the VP point is the
linear point divided by sqrt((1-t)² + t²), so an objective is three things: the t it trains at,
what it feeds the network (a factor on x, a number for t), and what it asks for (u, eps, v or x0).
Losses at equal t are losses at equal signal-to-noise ratio.

An eps or v network becomes a flow in one of two ways. Native: train "fm" on its weights; it is fed
1000 t and asked for u, so the loss starts high. Aligned: keep its objective with aligned=True; it
goes on saying eps or v of its own rows, only the loss is on the u that this implies, so training
starts at its full quality. Times end at its table's end, t_max.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor

from diffusion.coupling import add_noise, ot_permutation
from diffusion.schedules import (
    T, alphas_bar, has_rows, norm, sample_t, shift_time, stratify, table_row, table_time,
    time_quantile,
)
from diffusion.variance import variational_bound
from diffusion.weights import loss_weight, x0_share

__all__ = ["Loss", "Net", "Objective", "PRESETS", "loss_weight", "make_objective", "sample_t"]

# net(x (B, C, H, W), t (B,) in [0, 1000], **cond) -> (B, C, H, W)
Net = Callable[..., Tensor]
Target = Literal["u", "eps", "v", "x0"]  # u: the velocity along the objective's own path
Table = Literal["linear", "cosine", "scaled_linear", "gvp"]  # VP, those that have a name
Density = Literal["uniform", "logit_normal", "gaussian", "mode", "lognormal"]
LossType = Literal["mse", "l1", "huber"]
Weight = Literal["uniform", "min_snr", "soft_min_snr", "debiased", "cosmap"]
Upsample = Literal["psu", "bilinear", "nearest"]
Triple = tuple[Tensor, Tensor, Tensor]  # (x0, eps, u)
EDGE = 1e-3  # how near eps may come to t = 1, and x0 to t = 0, where no table ends before


class Loss(NamedTuple):
    loss: Tensor  # () mean of per_sample
    per_sample: Tensor  # (B,) weighted loss, mean over C, H, W
    t: Tensor  # (B,) linear-path time


@dataclass(frozen=True)
class Objective:
    """What a network is trained to say. Use make_objective() for the presets."""

    name: str
    target: Target
    table: str = ""  # "" = the linear path; else VP, diffusion/schedules.py
    # Of t (linear path, aligned) or of k / 1000 (VP); None = the density's own loc and scale.
    density: Density = "uniform"
    t_loc: float | None = None
    t_scale: float | None = None
    shift: float = 1.0  # of the training times; > 1 = more noise
    loss_type: LossType = "mse"
    huber_c: float = 0.03  # pseudo-Huber: c² (sqrt(d²/c² + 1) - 1) · 2 -> d² for small d
    weight: Weight = "uniform"
    gamma: float = 5.0  # min_snr, soft_min_snr
    zero_snr: bool = False  # of a table: its last row is pure noise
    stratified: bool = False  # one training time in each of n equal strata of a batch of n
    # The network also says how the variance lies between its bounds, in C more channels.
    learn_sigma: bool = False
    aligned: bool = False  # the loss is on the linear path's velocity that the prediction implies
    coupling: Literal["none", "ot", "lowres"] = "none"  # diffusion/coupling.py
    noise_aug: float = 0.5883  # lowres: noise's standard deviation in the source
    upsample: Upsample = "psu"  # lowres
    lowres: int = 2  # lowres: how many times smaller

    def __post_init__(self):
        for problem in problems(self):
            raise ValueError(problem)

    # ---- time -----------------------------------------------------------------------------------

    @property
    def t_max(self) -> float:
        """Where sampling starts: the last row's t on a VP table (0.9937 for Ho's), else 1; eps,
        which says nothing of x0 there, stops short of it."""
        if has_rows(self.table):
            return float(table_time(self.table, torch.tensor(T - 1), self.zero_snr))
        return 1 - EDGE if self.target == "eps" else 1.0

    @property
    def t_min(self) -> float:
        """The smallest t a network is asked about: 0, but where x0 is predicted, which says nothing
        of eps at 0."""
        if self.target != "x0":
            return 0.0
        if has_rows(self.table):
            return float(table_time(self.table, torch.tensor(0), self.zero_snr))
        return EDGE

    def time(self, q: Tensor) -> Tensor:
        """Uniform q (B,) -> training times t (B,) fp32 on the linear path; of tables, whole rows.

        Aligned, the density is of the linear path's own t, scaled to end where the table does: an
        eps network has seen nothing noisier, and u = (eps - x) / (1 - t) would blow up its errors.
        """
        t = shift_time(time_quantile(q, self.density, self.t_loc, self.t_scale), self.shift)
        if self.aligned:
            t = t * self.t_max
        elif has_rows(self.table):
            t = table_time(self.table, (t * T).floor(), self.zero_snr)
        elif self.table:
            t = table_time(self.table, t * T)
        return t.float().clamp(self.t_min, self.t_max)

    def row(self, t: Tensor) -> Tensor:
        """The number in [0, 1000] a network is fed for linear-path times t: t's shape, float64."""
        return table_row(self.table, t, self.zero_snr) if self.table else t.double() * T

    def prior(self, noise: Tensor) -> Tensor:
        """Unit noise -> the point of the linear path where sampling starts, at t_max."""
        return noise * norm(torch.tensor(self.t_max))

    def source(self, z_up: Tensor, noise: Tensor) -> Tensor:
        """coupling lowres: the end of the path at t = 1, from enlarged low-resolution latents."""
        return add_noise(z_up, noise, self.noise_aug)

    # ---- training -------------------------------------------------------------------------------

    def loss(
        self, net: Net, x0: Tensor, *, eps: Tensor | None = None, t: Tensor | None = None,
        q: Tensor | None = None, position: Tensor | None = None, strata: int = 0,
        low: Tensor | None = None, source: Tensor | None = None,
        generator: torch.Generator | None = None, **cond: Any,
    ) -> Loss:
        """One training step's loss for data x0 (B, C, H, W), with noise and times drawn or given.

        Times: t (B,), or q (B,), uniform, which the objective turns into its own; stratified, over
        `strata` consecutive positions of a run, those of q being `position` (B,).
        low (B, C, H, W), coupling lowres: the enlarged low-resolution latents. The path starts from
        them and eps (noise_aug 1: from eps alone), and the network sees them beside x.
        source (B, C, H, W) replaces eps by another starting distribution; only velocities know it.
        cond["concat"] (B, C', H, W) is put beside x on the network's input channels, the rest goes
        to it as it is."""
        if t is None:
            if q is None:
                q = fresh(torch.rand, (len(x0),), x0.device, generator, torch.float64)
            if self.stratified:
                position = torch.arange(len(q), device=q.device) if position is None else position
                q = stratify(q, position, strata or len(q))
            t = self.time(q)
        if low is not None and (source is not None or self.coupling != "lowres"):
            raise ValueError("low= is for coupling lowres, and makes its own source=.")
        if source is None and eps is None:
            eps = fresh(torch.randn, x0.shape, x0.device, generator)
        if source is not None and (self.target != "u" or eps is not None):
            raise ValueError("source= replaces eps= and needs the linear path with target 'u'.")
        if low is not None:
            eps, cond = self.source(low, eps), {**cond, "concat": low}
        elif source is None and self.coupling == "lowres":
            raise ValueError("coupling lowres needs low= (or source= and concat=).")
        if self.coupling == "ot" and source is None:
            eps = eps[ot_permutation(x0.float(), eps.float(), cond.get("y"))]
        eps = eps if source is None else source
        return self.loss_between(net, x0.float(), eps.float(), t.float(), cond)

    def loss_between(self, net: Net, x0: Tensor, eps: Tensor, t: Tensor, cond: dict) -> Loss:
        """The loss at times t (B,) on the lines from x0 to eps (B, C, H, W), all fp32."""
        w = t.view(-1, 1, 1, 1)
        x = (1 - w) * x0 + w * eps
        out, sigma = self.call(net, x, t, **cond), None
        if self.learn_sigma:
            out, sigma = out.split(x.shape[1], 1)
        if self.aligned:
            error = self.triple(out, x, w)[2] - (eps - x0)
        else:
            error = out - self.goal(x0, eps, w)
        if self.loss_type == "mse":
            element = error.square()
        elif self.loss_type == "l1":
            element = error.abs()
        else:
            element = 2 * self.huber_c**2 * ((error / self.huber_c).square().add(1).sqrt() - 1)
        per_sample = element.flatten(1).mean(1)
        if self.weight != "uniform":
            what = "u" if self.aligned else self.what
            per_sample = per_sample * loss_weight(t, what, self.weight, self.gamma)
        if sigma is not None:
            # Nichol & Dhariwal 2021, eq. 16: 0.001 times the sum over T rows
            per_sample = per_sample + 0.001 * T * self.variational_bound(error.detach(), sigma, t)
        return Loss(per_sample.mean(), per_sample, t)

    def variational_bound(self, error: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
        """Bits per dimension (B,), of the target's error, detached, and the variance output."""
        x0_error = error.double().square() * x0_share(t, self.target).view(-1, 1, 1, 1)
        bits = variational_bound(x0_error, sigma, self.row(t), self.table, self.zero_snr)
        return bits.to(t.dtype)

    @property
    def what(self) -> str:
        """The target; "pi/2 v" for the velocity of gvp, which is that:
        d(a x0 + s eps)/dk · 1000 = pi/2 (a eps - s x0)."""
        return "pi/2 v" if self.target == "u" and self.table else self.target

    def call(
        self, net: Net, x: Tensor, t: Tensor, concat: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """Run the network on the linear-path point x at t, in its own coordinates; fp32."""
        if self.table:
            x = x / norm(t).view(-1, 1, 1, 1)
        if concat is not None:
            x = torch.cat([x, concat.to(x.dtype)], 1)
        return net(x, self.row(t).float(), **cond).float()

    def goal(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output; t broadcasts against x0."""
        if self.what in ("v", "pi/2 v"):  # Salimans & Ho 2022: v = a eps - s x0
            v = ((1 - t) * eps - t * x0) / norm(t)
            return v if self.what == "v" else math.pi / 2 * v
        return {"u": eps - x0, "eps": eps, "x0": x0}[self.what]

    # ---- reading a network ----------------------------------------------------------------------

    def predict(self, net: Net, x: Tensor, t: Tensor, **cond: Any) -> Triple:
        """The network's opinion at x (B, C, H, W) on the linear path at t (B,): (x0, eps, u), at
        least fp32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, w = x.to(wide), t.to(wide).view(-1, 1, 1, 1)
        out = self.call(net, x.float(), t.float(), **cond).to(wide)
        return self.triple(out[:, : x.shape[1]] if self.learn_sigma else out, x, w)

    def triple(self, out: Tensor, x: Tensor, t: Tensor) -> Triple:
        """A prediction at the linear path's point x -> (x0, eps, u). t broadcasts against x.

        u and v convert without a division. eps divides by 1 - t and x0 by t; beyond t_max and
        t_min, where a network is asked about the last point it knows, by what they are there.
        """
        if self.what in ("v", "pi/2 v"):
            n = norm(t)
            v = out if self.what == "v" else out / (math.pi / 2)
            x0, eps = ((1 - t) * x / n - t * v) / n, (t * x / n + (1 - t) * v) / n
        elif self.target == "u":
            return x - t * out, x + (1 - t) * out, out
        elif self.target == "eps":
            x0, eps = (x - t * out) / (1 - t).clamp(min=1 - self.t_max), out
        else:
            x0, eps = out, (x - (1 - t) * out) / t.clamp(min=self.t_min)
        return x0, eps, eps - x0


def problems(o: Objective) -> Iterator[str]:
    """What of an objective contradicts itself."""
    for field in fields(o):
        value, choices = getattr(o, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            yield f"{field.name} {value!r} is not one of {', '.join(map(repr, choices))}."
    if has_rows(o.table):
        # Raises what a table cannot be.
        alphas_bar(o.table, o.zero_snr)
    scale = 1 if o.t_scale is None else o.t_scale
    if o.density == "mode" and not -1 <= scale <= 2 / (math.pi - 2):
        yield f"t_scale {scale:g} of density mode: wanted -1 to 1.75, where it is invertible."
    if o.density not in ("uniform", "mode") and scale <= 0:
        yield f"t_scale {scale:g} of density {o.density}: wanted more than 0."
    if o.density == "gaussian" and o.t_loc is not None and not 0 <= o.t_loc <= 1:
        yield f"t_loc {o.t_loc:g} of density gaussian: wanted 0 to 1, a time."
    for name in {"uniform": ("t_loc", "t_scale"), "mode": ("t_loc",)}.get(o.density, ()):
        if getattr(o, name) is not None:
            yield f"{name} changes nothing here: density {o.density} has none."
    if o.zero_snr and not has_rows(o.table):
        where = o.table or "the linear path"
        yield f"zero_snr changes the last row of a table; {where} ends in pure noise as it is."
    if o.target == "eps" and o.t_max > 1 - 1e-5:
        yield (
            "zero_snr with target eps (or betas as large): the last row holds nothing but eps, so "
            "predicting it says nothing of x0.  Use v or x0."
        )
    if o.target == "u" and has_rows(o.table):
        yield (
            f"target u with table {o.table}: a table's rows are not spaced in any unit of time, so "
            "it has no velocity of its own.  Use target v (the velocity per angle), or table gvp."
        )
    if o.learn_sigma and (not has_rows(o.table) or o.aligned):
        yield (
            "learn_sigma learns the variance of steps between a table's rows: it needs a table "
            "(linear, cosine, scaled_linear), not aligned."
        )
    if o.aligned and o.target == "u":
        yield "aligned reads a velocity out of eps, v or x0; target u is one already."
    if o.coupling == "lowres" and o.noise_aug < 1 and (o.target != "u" or o.table):
        yield (
            "coupling lowres needs target u on the linear path: its starting point is not the unit "
            "noise that the others take for granted.  noise_aug 1 starts in that."
        )
    if not 0 <= o.noise_aug <= 1:
        yield f"noise_aug {o.noise_aug:g}: wanted 0 to 1, the noise's standard deviation."


def fresh(
    draw: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device,
    generator: torch.Generator | None, dtype: torch.dtype = torch.float32,
) -> Tensor:
    """draw(shape), drawn where the generator is."""
    where = device if generator is None else generator.device
    return draw(shape, generator=generator, device=where, dtype=dtype).to(device)


PRESETS: dict[str, Objective] = {
    "fm": Objective("fm", "u", density="logit_normal"),
    "ddpm": Objective("ddpm", "eps", "linear"),
    # v and x0 stay regular where eps does not: theirs is the table that reaches (almost) pure noise
    "v": Objective("v", "v", "cosine"),
    "x0": Objective("x0", "x0", "cosine"),
    "cfm": Objective("cfm", "u", coupling="lowres"),
}


def make_objective(name: str, **overrides: Any) -> Objective:
    """A preset by name with fields replaced: make_objective("ddpm", weight="min_snr")."""
    if name not in PRESETS:
        raise ValueError(f"objective {name!r} is not one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **overrides)
