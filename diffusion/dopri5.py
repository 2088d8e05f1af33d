"""Dormand–Prince (1980), of order 5 with an error of order 4: a solver that chooses its steps.

It walks the linear path as the methods of diffusion/solvers.py do, but for each sample by itself.
"""

import math
import sys

import torch
from torch import Tensor

# Dormand & Prince 1980. The error weights are Shampine's (as torchdiffeq's), 2/3 of the classical
# difference.
DOPRI_C = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DOPRI_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI_E = (
    35 / 384 - 1951 / 21600,
    0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)


def dopri5(
    predict, x, t_start, callback=None, *, rtol=1e-3, atol=1e-4, max_nfe=1000, whole_batch=False
):
    """Adaptive fifth order; every sample keeps its own t and step, so it does not depend on its
    batch. Returns x and, (B,) each, the calls a row took part in and the time at which its
    prediction was not finite, NaN = never: there it stops.

    Steps are clamped to end at sqrt(machine epsilon), never beyond: one Euler step from there to 0
    errs by less than rounding, and no 1/t is evaluated at 0. Finished rows leave the batch. Past
    max_nfe calls the rest of the way is one Euler step and a warning. whole_batch: one error, so
    one step, for all samples, which is torchdiffeq's controller (its last step overshoots and is
    interpolated, ours is clamped).
    """
    end = min(torch.finfo(x.dtype).eps ** 0.5, t_start / 2)
    rows, rms = Rows(predict, x, t_start, end), rms_of_all if whole_batch else rms_of_each
    rows.begin(rtol, atol, rms)
    while len(rows) and rows.calls + 6 <= max_nfe:
        x, t, h = rows.x, rows.t, rows.h.minimum(rows.t - end)
        new, k_last, error = dopri5_step(rows.u, x, t, h, rows.k1, end)
        ratio = rms(error, atol + rtol * torch.maximum(x.abs(), new.abs()))
        accept, rows.h = control(ratio, h)
        moved = column(accept, x)
        rows.x, rows.k1 = torch.where(moved, new, x), torch.where(moved, k_last, rows.k1)
        rows.t = torch.where(accept, t - h, t)
        # h: its error is too large however small the step.
        rows.retire(rows.arrived() | (rows.h < 1e-12) | rows.broken())
        if callback:
            callback(1 - float(rows.t.max()) if len(rows) else 1.0, rows.x)
    rows.retire(torch.ones_like(rows.index, dtype=torch.bool))
    lost = rows.lost.cpu()
    if rows.unfinished:
        warn_of_unfinished(rows.unfinished, lost, rows.calls)
    return rows.out, rows.calls_each, lost


class Rows:
    """The samples that dopri5 has still on their way, with state, time, step and velocity of each;
    and what became of the others."""

    def __init__(self, predict, x: Tensor, t_start: float, end: float):
        B, device = len(x), x.device
        self.predict, self.end, self.x = predict, end, x
        self.index = torch.arange(B, device=device)
        self.t = torch.full((B,), float(t_start), dtype=torch.float64, device=device)
        self.out, self.lost = x.clone(), torch.full_like(self.t, math.nan)
        self.calls, self.calls_each = 0, torch.zeros(B, dtype=torch.long, device=device)
        self.unfinished: list[float] = []  # t of rows that end early

    def __len__(self) -> int:
        return len(self.index)

    def begin(self, rtol, atol, rms) -> None:
        """The first velocities and steps."""
        self.h, self.k1 = self.t, self.u(self.x, self.t)
        self.retire(self.broken())
        if not len(self):
            return
        h = first_step(self.u, self.x, self.t, self.k1, rtol, atol, rms)
        # Of a whole batch, it is no number where one row broke.
        self.h = torch.where(h.isfinite(), h, torch.full_like(h, 1e-6))
        self.retire(self.broken())

    def u(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.calls_each[self.index] += 1
        out = self.predict(x, t.to(x.dtype), rows=self.index)[2]
        lost = self.lost[self.index]
        self.lost[self.index] = torch.where(lost.isnan() & ~finite_rows(out), t, lost)
        return out

    def arrived(self) -> Tensor:
        return self.t <= self.end * 1.0001

    def broken(self) -> Tensor:
        return ~self.lost[self.index].isnan()

    def retire(self, done: Tensor) -> None:
        """One Euler step to 0 for some rows, which leave the batch."""
        x, t = self.x[done], self.t[done]
        self.out[self.index[done]] = x - per_row(t, x) * self.k1[done]
        self.unfinished += t[~self.arrived()[done]].tolist()
        for name in ("index", "x", "k1", "t", "h"):
            setattr(self, name, getattr(self, name)[~done])


def warn_of_unfinished(times: list[float], lost: Tensor, calls: int) -> None:
    """times: of the rows that end early; lost: see dopri5."""
    of, bad = len(lost), lost[~lost.isnan()].tolist()
    line = f"warning: dopri5 stopped after {calls} calls with {len(times)} of {of} samples "
    line += f"unfinished (t up to {max(times):.3f})"
    if bad:
        line += f"; of {len(bad)} the prediction is not finite, first at t = {max(bad):.4f}"
    if len(times) > len(bad):
        line += "; they end in one Euler step. Raise max_nfe or loosen rtol"
    print(f"{line}.", file=sys.stderr)


def finite_rows(x: Tensor) -> Tensor:
    """(B,) bool: is all of a row finite?"""
    return x.isfinite().reshape(len(x), math.prod(x.shape[1:])).all(1)


def dopri5_step(u, x, t, h, k1, end) -> tuple[Tensor, Tensor, Tensor]:
    """(the state at t - h, its velocity, the estimated error), of rows' own t and h (B,)."""
    k = [k1]
    for c, a in zip(DOPRI_C[1:], DOPRI_A[1:]):
        new = x - per_row(h, x) * sum(w * ki for w, ki in zip(a, k) if w)
        k.append(u(new, (t - c * h).clamp(min=end)))  # the last stage is the solution
    error = per_row(h, x) * sum(w * ki for w, ki in zip(DOPRI_E, k) if w)
    return new, k[-1], error


def control(ratio: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(which steps are good, the next steps), from error / tolerance and the steps, (B,) each."""
    ratio = ratio.nan_to_num(nan=math.inf)
    accept = (ratio <= 1) | ((h < 1e-9) & torch.isfinite(ratio))  # too small to shrink: take it
    factor = (0.9 * power(ratio.clamp(min=1e-10), -0.2)).clamp(max=10.0)
    return accept, h * torch.where(accept, factor.clamp(min=1.0), factor.clamp(min=0.2))


def rms_of_each(v: Tensor, scale: Tensor) -> Tensor:
    """Root mean square of v / scale over all but the first dimension: (B,) float64."""
    return (v / scale).double().flatten(1).square().mean(1).sqrt()


def rms_of_all(v: Tensor, scale: Tensor) -> Tensor:
    """Root mean square of v / scale over everything, for every row: (B,) float64."""
    return (v / scale).double().square().mean().sqrt().expand(len(v))


def power(v: Tensor, p: float) -> Tensor:
    """v (B,) to the power p, number by number: vectorised, its last bit depends on B, and a sample
    must not."""
    return v.new_tensor([number**p for number in v.tolist()])


def column(v: Tensor, x: Tensor) -> Tensor:
    """(B,) to what broadcasts against x (B, …)."""
    return v.view(-1, *[1] * (x.ndim - 1))


def per_row(v: Tensor, x: Tensor) -> Tensor:
    """(B,) to a factor of x (B, …), in x's dtype."""
    return column(v.to(x.dtype), x)


def first_step(u, x, t, k1, rtol, atol, rms) -> Tensor:
    """Hairer, Nørsett & Wanner, II.4: a first step size per row, (B,) float64."""
    scale = atol + rtol * x.abs()
    d0, d1 = rms(x, scale), rms(k1, scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1)
    h0 = h0.minimum(t / 2)
    d2 = rms(u(x - per_row(h0, x) * k1, t - h0) - k1, scale) / h0
    h1 = power(0.01 / torch.maximum(d1, d2).clamp(min=1e-15), 0.2)
    return torch.minimum(100 * h0, h1)
