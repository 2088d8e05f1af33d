"""Sampling, guidance and editing:  sample(guided(objective, net), x, method="heun", steps=25).x

    python samplers.py --ckpt runs/toyfaces-fm-standard --n 16                  # the command is in drawing.py

The methods (solvers.py) know the linear path only: x runs from
noise at t = 1 to data at t = 0 along dx/dt = u, and predict(x, t) returns (x0, eps, u) there. Objectives of any kind provide
it (objectives.py), so one Heun serves flow matching, DDPM and v-prediction alike.
"""

import math
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.cli import cli
from objectives import Net, Objective
from diffusion.solvers import METHODS, dopri5, native_grid, norm64, time_grid   # noqa: F401 - the grids are imported from here too

Predict = Callable[..., tuple]             # (x (B, C, H, W), t (B,), **cond) -> (x0, eps, u[, v]); v: a learned variance, or None
DETERMINISTIC = ("euler", "heun", "midpoint", "rk4", "ab2", "lms4", "ddim")     # can be walked backwards


class Sample(NamedTuple):
    x: Tensor               # like the x given
    nfe: int                # calls of predict
    nfe_each: Tensor        # (B,) of them, how many each sample took part in (dopri5 retires rows early)


def generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator a sample, so that image i does not depend on its batch, rank or device."""
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def draw(gens: list[torch.Generator], like: Tensor) -> Tensor:
    """The next unit noise of each generator: (B, C, H, W) in like's shape (from dim 1), dtype and device."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in gens]).to(like)


@torch.no_grad()
def sample(predict: Predict, x: Tensor, *, method: str = "heun", steps: int = 25, shift: float = 1.0,
           seeds: list[int] | None = None, t_start: float = 1.0, grid: Tensor | None = None,
           cond: dict[str, Tensor] | None = None, callback: Callable[[float, Tensor], None] | None = None,
           **options: Any) -> Sample:
    """Integrate x (B, C, H, W) from t_start on the linear path to data at t = 0.

    predict(x, t (B,), **cond) returns (x0, eps, u); `cond` holds tensors with one row a sample. x's fp32/fp64 is kept.
    `grid` (steps + 1 falling times, usually ending in 0) replaces steps, shift and t_start. `seeds`, one a sample, feed the
    stochastic methods: their first draw is taken to be the initial noise, so steps use the later ones.
    options: eta of ddim, euler_ancestral, sde and dpmpp_2m_sde; ddpm variance; dopri5 rtol, atol, max_nfe, whole_batch (it
    ignores steps). callback(progress, x). ValueError for what is not known.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}.")
    cond, nfe = cond or {}, 0

    def counted(x: Tensor, t: float | Tensor, rows: Tensor | None = None):
        nonlocal nfe
        nfe += 1
        t = t if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        return predict(x, t, **(cond if rows is None else {k: v[rows] for k, v in cond.items()}))

    if method == "dopri5":
        x, each = dopri5(counted, x, t_start if grid is None else float(grid[0]), callback, **options)
        return Sample(x, nfe, each)
    gens = generators(seeds) if seeds is not None else None
    if gens:
        draw(gens, x)

    def noise(like: Tensor) -> Tensor:
        return draw(gens, like) if gens else torch.randn_like(like)

    grid = time_grid(steps, shift, t_start) if grid is None else grid
    for i, x in enumerate(METHODS[method](counted, x, grid, noise, **options), 1):
        if callback:
            callback(i / (len(grid) - 1), x)
    return Sample(x, nfe, torch.full((len(x),), nfe))


# ---- guidance -------------------------------------------------------------------------------------------------------

def guided(objective: Objective, net: Net, cfg: float = 1.0, *, rescale: float = 0.0, interval: tuple[float, float] = (0.0, math.inf),
           guide: Predict | None = None) -> Predict:
    """predict(x, t, y=None) -> (x0, eps, u, v) with guidance: weak + cfg · (conditional - weak).

    weak is the same network without a label, in the same call (classifier-free guidance, Ho & Salimans 2022), or `guide`'s
    prediction (autoguidance, Karras et al. 2024). cfg = 1 is the conditional model itself, 0 the weak one. Only samples with
    lo < sigma <= hi, sigma = t / (1 - t), are guided (Kynkäänniemi et al. 2024); for the others nothing weak is evaluated.
    rescale in [0, 1] draws each sample's standard deviation of x0 back to the conditional one's (Lin et al. 2023, eq. 15-16).
    y (B,) holds labels, -1 = none; what else is given goes to the objective as it is (concat of cfm). v is what a network with twice the channels says of the variance, without guidance; else None.
    """
    def ask(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple:
        said, C = [], x.shape[1]

        def mean(x_in: Tensor, k: Tensor, **cond: Any) -> Tensor:
            out = net(x_in, k, **cond)
            said.append(out[:, C:].to(x.dtype))
            return out[:, :C]
        triple = objective.predict(mean, x, t, **cond)
        return *triple, said[0] if said and said[0].shape[1] else None

    def predict(x: Tensor, t: Tensor, y: Tensor | None = None, **cond: Tensor) -> tuple:
        cond, B = cond if y is None else {"y": y, **cond}, len(x)
        inside = torch.arange(B, device=x.device)
        if interval != (0.0, math.inf):
            sigma = t.double() / (1 - t.double())
            inside = inside[(interval[0] < sigma) & (sigma <= interval[1])]
        if cfg == 1.0 or (guide is None and y is None) or not len(inside):
            return ask(x, t, cond)
        x_in, t_in, cond_in = x[inside], t[inside], {k: v[inside] for k, v in cond.items()}
        if guide is None:
            weak_in = {**cond_in, "y": torch.full_like(cond_in["y"], -1)}
            *out, v = ask(torch.cat([x, x_in]), torch.cat([t, t_in]), {k: torch.cat([cond[k], weak_in[k]]) for k in cond})
            out, weak, v = [a[:B] for a in out], [a[B:] for a in out], v if v is None else v[:B]
        else:
            (*out, v), weak = ask(x, t, cond), guide(x_in, t_in, **cond_in)
        strong = [w + cfg * (a[inside] - w) for a, w in zip(out, weak)]
        if rescale:
            x0, w = strong[0], t_in.view(-1, 1, 1, 1).clamp(min=1e-5)
            ratio = (out[0][inside].flatten(1).std(1) / x0.flatten(1).std(1)).view(-1, 1, 1, 1)
            x0 = rescale * ratio * x0 + (1 - rescale) * x0
            u = (x_in - x0) / w                                                 # the line from x0 through x
            strong = [x0, x0 + u, u]
        return *(a.index_copy(0, inside, s) for a, s in zip(out, strong)), v
    return predict


# ---- editing --------------------------------------------------------------------------------------------------------

def begin(objective: Objective, noise: Tensor, t: float) -> Tensor:
    """Unit noise as the state at the time t where plain sampling begins, at or a little below objective.t_max."""
    return objective.prior(noise) * (norm64(t) / norm64(objective.t_max))


def edit(objective: Objective, predict: Predict, z: Tensor, noise: Tensor, grid: Tensor, *, strength: float = 1.0, mask: Tensor | None = None,
         cond: dict[str, Tensor] | None = None, **how: Any) -> Sample:
    """Image to image and inpainting. z (B, C, H, W) is the data to start from, noise unit noise of its shape, grid a
    time_grid() with t_start = strength · objective.t_max; `how` goes to sample().

    strength 0 returns z itself; 1 forgets it, and is plain sampling. Where the bool mask (B or 1, 1 or C, H, W) is False, z is
    kept: the network is shown z on its own straight way from this noise, at whatever time a method asks, and the result is z.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}: wanted 0 (the input itself) to 1 (nothing of it).")
    if strength == 0:
        return Sample(z.clone(), 0, torch.zeros(len(z), dtype=torch.long))
    t0 = float(grid[0])
    x = begin(objective, noise, t0) if strength == 1 else (1 - t0) * z + t0 * noise
    if mask is None:
        return sample(predict, x, grid=grid, cond=cond, **how)
    mask = mask.expand(len(z), *mask.shape[1:])

    def shown(x: Tensor, t: Tensor, *, mask: Tensor, z: Tensor, noise: Tensor, **cond: Tensor) -> tuple:
        w = t.view(-1, 1, 1, 1)
        x0, eps, u, *v = predict(torch.where(mask, x, (1 - w) * z + w * noise), t, **cond)
        return torch.where(mask, x0, z), torch.where(mask, eps, noise), torch.where(mask, u, noise - z), *v

    s = sample(shown, x, grid=grid, cond={**(cond or {}), "mask": mask, "z": z, "noise": noise}, **how)
    return s._replace(x=torch.where(mask, s.x, z))


def invert(predict: Predict, z: Tensor, grid: Tensor, *, method: str = "heun", cond: dict[str, Tensor] | None = None) -> Sample:
    """The state at grid[0] from which a deterministic method comes to z (B, C, H, W): the same falling grid, walked up. The first
    step, from 0, is DDIM's inverse, which asks at the later time: t = 0 is never evaluated."""
    if method not in DETERMINISTIC:
        raise ValueError(f"method {method!r} cannot be inverted: wanted one of {', '.join(DETERMINISTIC)}.")
    up = grid.flip(0)
    s = sample(predict, z, method="ddim", grid=up[:2], cond=cond)
    rest = sample(predict, s.x, method=method, grid=up[1:], cond=cond)
    return Sample(rest.x, s.nfe + rest.nfe, s.nfe_each + rest.nfe_each)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Between a and b (1 or n, C, H, W) along a great circle: share (n,) 0 = a, 1 = b. Noise keeps its length on the way."""
    shape, f = (len(share), *a.shape[1:]), share.to(a).view(-1, 1)
    a, b = (v.expand(shape).flatten(1) for v in (a, b))
    angle = torch.acos(F.cosine_similarity(a, b, dim=1).clamp(-1, 1)).view(-1, 1)
    straight = angle.sin() < 1e-4                                               # parallel or opposite: no circle to follow
    whole = angle.sin().where(~straight, torch.ones_like(angle))
    wa, wb = (torch.where(straight, s, (s * angle).sin() / whole) for s in (1 - f, f))
    return (wa * a + wb * b).view(shape)


if __name__ == "__main__":
    from drawing import main                                                    # the command, which builds on this file
    cli(main)
