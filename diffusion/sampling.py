"""Walking a grid with a method, forwards and backwards:

    sample(predict, x, method="heun", steps=25).x
    invert(predict, z, time_grid(25)).x                     # the noise that z came from

Nothing here knows networks: predict(x, t (B,), **cond) -> (x0, eps, u) on the linear path.
"""

from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.dopri5 import dopri5, finite_rows
from diffusion.solvers import METHODS, time_grid

# (x (B, C, H, W), t (B,), **cond) -> (x0, eps, u[, v]); v: a learned variance, or None
Predict = Callable[..., tuple]
# Can be walked backwards.
DETERMINISTIC = ("euler", "heun", "midpoint", "rk4", "ab2", "lms4", "ddim")


class Sample(NamedTuple):
    x: Tensor  # like the x given
    nfe: int  # calls of predict
    nfe_each: Tensor  # (B,) of them, how many each sample took part in (dopri5 retires rows early)
    lost: Tensor | None = None  # (B,) the time at which a sample ceased to be finite; NaN = never


class NonFinite(ArithmeticError):
    """Samples that are no numbers: a network that has diverged, or overflows.

    lost: {seed: time}; images: what was drawn all the same, with the others among them.
    """

    # For harness.cli: one line, and not the exit code of a user's mistake.
    for_user, exit_code = True, 1

    def __init__(self, lost: dict[int, float], images: Tensor):
        self.lost, self.images = lost, images
        shown = [f"{seed} (t = {t:.4f})" for seed, t in list(lost.items())[:8]]
        more = " …" if len(lost) > 8 else ""
        super().__init__(
            f"the network gives no finite numbers for {len(lost)} of {len(images)} images, of "
            f"seeds {', '.join(shown)}{more}.  Its training has diverged, or it overflows: take an "
            "earlier checkpoint, or --dtype fp32 where it ran in bf16."
        )


def check_finite(s: Sample, pixels: Tensor, images: Tensor, seeds: list[int]) -> None:
    """Raise NonFinite if samples, or the pixels that they were decoded to, are not finite."""
    lost = torch.full((len(seeds),), torch.nan).double() if s.lost is None else s.lost
    bad = lost.isnan() & ~finite_rows(pixels).cpu()
    times = torch.where(bad, 0.0, lost).tolist()
    found = {seed: t for seed, t in zip(seeds, times) if t == t}
    if found:
        raise NonFinite(found, images)


# torch's CPU generator looks at the low 32 bits of a seed only; NumPy's takes all of a larger one.
Random = torch.Generator | np.random.Generator


def generators(seeds: list[int]) -> list[Random]:
    """One CPU generator a sample, so that image i does not depend on its batch, rank or device."""
    return [generator(int(seed)) for seed in seeds]


def generator(seed: int) -> Random:
    return np.random.default_rng(seed) if seed >> 32 else torch.Generator().manual_seed(seed)


def draw(gens: list[Random], like: Tensor) -> Tensor:
    """The next unit noise of each generator: (B, C, H, W) in like's shape (from dim 1), dtype and
    device."""
    return torch.stack([unit_noise(like.shape[1:], g) for g in gens]).to(like)


def unit_noise(shape: Sequence[int], g: Random) -> Tensor:
    if isinstance(g, torch.Generator):
        return torch.randn(shape, generator=g)
    return torch.from_numpy(g.standard_normal(tuple(shape), dtype=np.float32))


@torch.no_grad()
def sample(
    predict: Predict,
    x: Tensor,
    *,
    method: str = "heun",
    steps: int = 25,
    shift: float = 1.0,
    seeds: list[int] | None = None,
    t_start: float = 1.0,
    grid: Tensor | None = None,
    cond: dict[str, Tensor] | None = None,
    callback: Callable[[float, Tensor], None] | None = None,
    **options: Any,
) -> Sample:
    """Integrate x (B, C, H, W) from t_start on the linear path to data at t = 0.

    predict(x, t (B,), **cond) returns (x0, eps, u); `cond` holds tensors with one row a sample.
    x's fp32/fp64 is kept. `grid` (steps + 1 falling times, usually ending in 0) replaces steps,
    shift and t_start. `seeds`, one a sample, feed the stochastic methods: their first draw is taken
    to be the initial noise, so steps use the later ones.
    options: eta of ddim, euler_ancestral, sde and dpmpp_2m_sde; ddpm's variance; dopri5's rtol,
    atol, max_nfe, whole_batch (it ignores steps). callback(progress, x).
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}.")
    cond, nfe = cond or {}, 0

    def counted(x: Tensor, t: float | Tensor, rows: Tensor | None = None) -> tuple:
        nonlocal nfe
        nfe += 1
        if not isinstance(t, Tensor):
            t = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        own = cond if rows is None else {k: v[rows] for k, v in cond.items()}
        return predict(x, t, **own)

    if method == "dopri5":
        start = t_start if grid is None else float(grid[0])
        x, each, lost = dopri5(counted, x, start, callback, **options)
        return Sample(x, nfe, each, lost)
    gens = [] if seeds is None else generators(seeds)
    if gens:
        draw(gens, x)

    def noise(like: Tensor) -> Tensor:
        return draw(gens, like) if gens else torch.randn_like(like)

    if grid is None:
        grid = time_grid(steps, shift, t_start)
    finite = [finite_rows(x)]
    for i, x in enumerate(METHODS[method](counted, x, grid, noise, **options), 1):
        finite.append(finite_rows(x))
        if callback:
            callback(i / (len(grid) - 1), x)
    return Sample(x, nfe, torch.full((len(x),), nfe), first_lost(finite, grid))


def first_lost(finite: list[Tensor], grid: Tensor) -> Tensor:
    """(B,) float64: the time of the first step after which a sample is not finite, NaN = none.

    finite: (B,) bool at the start, then after each step of the grid.
    """
    bad = ~torch.stack(finite).cpu()
    times = torch.cat([grid[:1], grid])[bad.int().argmax(0).to(grid.device)].double().cpu()
    return torch.where(bad.any(0), times, torch.nan)


def invert(
    predict: Predict,
    z: Tensor,
    grid: Tensor,
    *,
    method: str = "heun",
    cond: dict[str, Tensor] | None = None,
) -> Sample:
    """The state at grid[0] from which a deterministic method comes to z (B, C, H, W): the same
    falling grid, walked up. The first step, from 0, is DDIM's inverse, which asks at the later
    time: t = 0 is never evaluated."""
    if method not in DETERMINISTIC:
        raise ValueError(
            f"method {method!r} cannot be inverted: wanted one of {', '.join(DETERMINISTIC)}."
        )
    up = grid.flip(0)
    s = sample(predict, z, method="ddim", grid=up[:2], cond=cond)
    rest = sample(predict, s.x, method=method, grid=up[1:], cond=cond)
    lost = torch.where(s.lost.isnan(), rest.lost, s.lost)
    return Sample(rest.x, s.nfe + rest.nfe, s.nfe_each + rest.nfe_each, lost)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Between a and b (1 or n, C, H, W) along a great circle: share (n,) 0 = a, 1 = b. Noise keeps
    its length on the way."""
    shape, f = (len(share), *a.shape[1:]), share.to(a).view(-1, 1)
    a, b = a.expand(shape).flatten(1), b.expand(shape).flatten(1)
    angle = torch.acos(F.cosine_similarity(a, b, dim=1).clamp(-1, 1)).view(-1, 1)
    straight = angle.sin() < 1e-4  # parallel or opposite: no circle to follow
    whole = angle.sin().where(~straight, torch.ones_like(angle))
    wa = torch.where(straight, 1 - f, ((1 - f) * angle).sin() / whole)
    wb = torch.where(straight, f, (f * angle).sin() / whole)
    return (wa * a + wb * b).view(shape)
