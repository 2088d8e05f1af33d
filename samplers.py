"""Draw samples:  python samplers.py --ckpt runs/toyfaces-fm-standard --n 16 --method heun --steps 25

The checkpoint says what it is, so no other flag is needed. From Python:

    generator = open_generator(Sampling("runs/toyfaces-fm-standard"), torch.device("cpu"))
    images = generator.images([0, 1, 2]).images                       # uint8 (3, 3, 64, 64)
    x = sample(guided(objective, net), x, method="heun", steps=25).x  # what that stands on

The methods (diffusion/solvers.py) know the linear path only: x runs from noise at t = 1 to data at
t = 0 along dx/dt = u, and predict(x, t) returns (x0, eps, u) there. Objectives of any kind provide
it (objectives.py), so one Heun serves flow matching, DDPM and v-prediction alike.
"""

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt import find_checkpoint, load_unet
from diffusion.solvers import METHODS, dopri5, native_grid, norm64, time_grid  # noqa: F401
from harness.cli import UserError, check_flags, cli, closest, dashed, field_of, flag, shown
from harness.pictures import to_uint8
from harness.ranks import Ranks, autocast, precision
from objectives import Net, Objective, make_objective
from vae import AnyVAE, load_vae, vae_from_meta

# (x (B, C, H, W), t (B,), **cond) -> (x0, eps, u[, v]); v: a learned variance, or None
Predict = Callable[..., tuple]
# Can be walked backwards.
DETERMINISTIC = ("euler", "heun", "midpoint", "rk4", "ab2", "lms4", "ddim")
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "sde")
# The rows of a network's own table, as a time grid.
GRIDS = ("", "uniform", "karras", "logsnr", "trailing", "leading", "linspace")
EVERYWHERE = (0.0, math.inf)  # the interval of sigma where guidance acts


class Sample(NamedTuple):
    x: Tensor  # like the x given
    nfe: int  # calls of predict
    nfe_each: Tensor  # (B,) of them, how many each sample took part in (dopri5 retires rows early)


# ---- sampling -----------------------------------------------------------------------------------


def generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator a sample, so that image i does not depend on its batch, rank or device."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def draw(gens: list[torch.Generator], like: Tensor) -> Tensor:
    """The next unit noise of each generator: (B, C, H, W) in like's shape (from dim 1), dtype and
    device."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in gens]).to(like)


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
        x, each = dopri5(counted, x, start, callback, **options)
        return Sample(x, nfe, each)
    gens = [] if seeds is None else generators(seeds)
    if gens:
        draw(gens, x)

    def noise(like: Tensor) -> Tensor:
        return draw(gens, like) if gens else torch.randn_like(like)

    if grid is None:
        grid = time_grid(steps, shift, t_start)
    for i, x in enumerate(METHODS[method](counted, x, grid, noise, **options), 1):
        if callback:
            callback(i / (len(grid) - 1), x)
    return Sample(x, nfe, torch.full((len(x),), nfe))


def begin(objective: Objective, noise: Tensor, t: float) -> Tensor:
    """Unit noise as the state at the time t where plain sampling begins, at or a little below
    objective.t_max."""
    return objective.prior(noise) * (norm64(t) / norm64(objective.t_max))


# ---- guidance -----------------------------------------------------------------------------------


def guided(
    objective: Objective,
    net: Net,
    cfg: float = 1.0,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] = EVERYWHERE,
    guide: Predict | None = None,
) -> Predict:
    """predict(x, t, y=None) -> (x0, eps, u, v) with guidance: weak + cfg · (conditional - weak).

    weak is the same network without a label, in the same call (classifier-free guidance, Ho &
    Salimans 2022), or `guide`'s prediction (autoguidance, Karras et al. 2024). cfg = 1 is the
    conditional model itself, 0 the weak one. Only samples with lo < sigma <= hi, sigma = t / (1-t),
    are guided (Kynkäänniemi et al. 2024); for the others nothing weak is evaluated. rescale in
    [0, 1]: see rescaled().
    y (B,) holds labels, -1 = none; what else is given goes to the objective as it is (concat of
    cfm). v is what a network with twice the channels says of the variance, unguided; else None.
    """

    def predict(x: Tensor, t: Tensor, y: Tensor | None = None, **cond: Tensor) -> tuple:
        cond = cond if y is None else {"y": y, **cond}
        rows = within(t, interval)
        if cfg == 1.0 or (guide is None and y is None) or not len(rows):
            return ask(objective, net, x, t, cond)
        if guide is None:
            strong, weak = ask_both(objective, net, x, t, cond, rows)
        else:
            strong = ask(objective, net, x, t, cond)
            weak = guide(x[rows], t[rows], **{k: v[rows] for k, v in cond.items()})
        return combine(strong, weak, rows, x, t, cfg, rescale)

    return predict


def within(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """The rows whose time t (B,) lies where guidance acts."""
    rows = torch.arange(len(t), device=t.device)
    if interval == EVERYWHERE:
        return rows
    sigma = t.double() / (1 - t.double())
    return rows[(interval[0] < sigma) & (sigma <= interval[1])]


def ask(objective: Objective, net: Net, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple:
    """(x0, eps, u, v): the prediction, and what a network with twice the channels says beside it."""
    channels, variances = x.shape[1], []

    def mean(x: Tensor, k: Tensor, **cond: Any) -> Tensor:
        out = net(x, k, **cond)
        if out.shape[1] > channels:
            variances.append(out[:, channels:])
        return out[:, :channels]

    x0, eps, u = objective.predict(mean, x, t, **cond)
    v = variances[0].to(x.dtype) if variances else None
    return x0, eps, u, v


def ask_both(
    objective: Objective,
    net: Net,
    x: Tensor,
    t: Tensor,
    cond: dict[str, Tensor],
    rows: Tensor,
) -> tuple[tuple, tuple]:
    """The predictions with labels, and without for `rows`, from one call."""
    weak = {k: v[rows] for k, v in cond.items()}
    weak["y"] = torch.full_like(weak["y"], -1)
    together = {k: torch.cat([cond[k], weak[k]]) for k in cond}
    x, t = torch.cat([x, x[rows]]), torch.cat([t, t[rows]])
    *out, v = ask(objective, net, x, t, together)
    B = len(x) - len(rows)
    strong = [part[:B] for part in out]
    return (*strong, None if v is None else v[:B]), tuple(part[B:] for part in out)


def combine(
    strong: tuple, weak: tuple, rows: Tensor, x: Tensor, t: Tensor, cfg: float, rescale: float
) -> tuple:
    """weak + cfg · (strong - weak) for `rows`, strong elsewhere; the variance is strong's."""
    *strong, v = strong
    mixed = [w + cfg * (s[rows] - w) for s, w in zip(strong, weak)]
    if rescale:
        mixed = rescaled(mixed[0], strong[0][rows], x[rows], t[rows], rescale)
    return (*(s.index_copy(0, rows, m) for s, m in zip(strong, mixed)), v)


def rescaled(
    x0: Tensor, conditional: Tensor, x: Tensor, t: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's standard deviation of x0 drawn back, by `share`, to the conditional one's (Lin
    et al. 2023, eq. 15-16): (x0, eps, u) on the line from x0 through x."""
    ratio = conditional.flatten(1).std(1) / x0.flatten(1).std(1)
    x0 = share * ratio.view(-1, 1, 1, 1) * x0 + (1 - share) * x0
    u = (x - x0) / t.view(-1, 1, 1, 1).clamp(min=1e-5)
    return x0, x0 + u, u


# ---- editing ------------------------------------------------------------------------------------


def edit(
    objective: Objective,
    predict: Predict,
    z: Tensor,
    noise: Tensor,
    grid: Tensor,
    *,
    strength: float = 1.0,
    mask: Tensor | None = None,
    cond: dict[str, Tensor] | None = None,
    **how: Any,
) -> Sample:
    """Image to image and inpainting. z (B, C, H, W) is the data to start from, noise unit noise of
    its shape, grid a time_grid() with t_start = strength · objective.t_max; `how` goes to sample().

    strength 0 returns z itself; 1 forgets it, and is plain sampling. Where the bool mask
    (B or 1, 1 or C, H, W) is False, z is kept: the network is shown z on its own straight way from
    this noise, at whatever time a method asks, and the result is z.
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength is {strength}: wanted 0 (the input itself) to 1 (nothing of it)."
        )
    if strength == 0:
        return Sample(z.clone(), 0, torch.zeros(len(z), dtype=torch.long))
    t0 = float(grid[0])
    x = begin(objective, noise, t0) if strength == 1 else (1 - t0) * z + t0 * noise
    if mask is None:
        return sample(predict, x, grid=grid, cond=cond, **how)
    mask = mask.expand(len(z), *mask.shape[1:])

    def painted(
        x: Tensor, t: Tensor, *, mask: Tensor, z: Tensor, noise: Tensor, **cond: Tensor
    ) -> tuple:
        w = t.view(-1, 1, 1, 1)
        x0, eps, u, *v = predict(torch.where(mask, x, (1 - w) * z + w * noise), t, **cond)
        kept = torch.where(mask, x0, z), torch.where(mask, eps, noise)
        return (*kept, torch.where(mask, u, noise - z), *v)

    rows = {**(cond or {}), "mask": mask, "z": z, "noise": noise}
    s = sample(painted, x, grid=grid, cond=rows, **how)
    return s._replace(x=torch.where(mask, s.x, z))


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
    return Sample(rest.x, s.nfe + rest.nfe, s.nfe_each + rest.nfe_each)


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


# ---- from seeds to images -----------------------------------------------------------------------


class Drawn(NamedTuple):
    images: Tensor  # uint8 (B, 3, H, W)
    nfe: float  # calls of predict that an image took part in, on average
    evaluations: float  # evaluations of networks, an image: guidance asks two a call


class Generator:
    """The one way from seeds to images: noise, a solver with guidance, the autoencoder.

    net: any Net, a module in eval() or a function of one (an EMA's functional_call). guide:
    (objective, net) of autoguidance. The image of a seed is the same in any batch.
    """

    # What open_generator() knows beside: the file, its metadata, the solver's flags as they came
    # out, and all that an image of a seed depends on, but for weights and what they mean.
    path = Path()
    meta: dict[str, Any] = {}
    solver: dict[str, Any] = {"method": "heun", "steps": 25}
    sampled: dict[str, Any] = {}

    def __init__(
        self,
        objective: Objective,
        net: Net,
        vae: AnyVAE,
        latent_shape: tuple[int, int, int],
        *,
        device: torch.device,
        dtype: str = "auto",
        classes: Sequence[str] = (),
        cfg: float = 1.0,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
        guide: tuple[Objective, Net] | None = None,
    ):
        self.objective, self.vae, self.latent_shape = objective, vae, latent_shape
        self.device, self.dtype, self.classes = device, dtype, list(classes)
        self.resolution = latent_shape[1] * vae.factor
        self.evaluations = 0  # of networks, since it was made
        self.how = self.solver  # what sample() is given, if a call says nothing else
        net = self.counted(net)
        weak = guided(guide[0], self.counted(guide[1])) if guide else None
        self.plain = guided(objective, net)  # without guidance, for inversion
        self.predict = guided(objective, net, cfg, rescale=rescale, interval=interval, guide=weak)

    def counted(self, net: Net) -> Net:
        """The network in its precision (what surrounds it stays fp32), with its calls counted."""

        def call(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            self.evaluations += len(x)
            with autocast(self.device, self.dtype):
                return net(x, t, **cond)

        return call

    def noise(self, seeds: list[int]) -> Tensor:
        """Unit noise of each seed (B, C, h, w)."""
        return draw(generators(seeds), torch.empty(1, *self.latent_shape, device=self.device))

    def cond(
        self, labels: Tensor | list[int] | None, low: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What a network is told beside x: labels (B,), -1 = none, and for cfm low (B, C, h, w)."""
        cond = {}
        if labels is not None:
            cond["y"] = torch.as_tensor(labels).to(self.device)
        if low is not None:
            cond["concat"] = low
        return cond

    @torch.no_grad()
    def images(
        self,
        seeds: list[int],
        labels: Tensor | list[int] | None = None,
        *,
        low: Tensor | None = None,
        callback: Callable[[float, Tensor], None] | None = None,
        **how: Any,
    ) -> Drawn:
        """The images of seeds (B,), with labels (B,), -1 = none.

        how: method, steps, grid, eta, … as sample() takes them, instead of what the checkpoint's
        flags say (25 Heun steps, if there are none). low (B, C, h, w): what a network that was
        trained to enlarge (cfm) starts from, the latents of small pictures at full size.
        """
        if (low is None) == (self.objective.coupling == "lowres"):
            raise ValueError("low= is what a cfm network enlarges, and for no other.")
        how = how or self.how
        grid = how.get("grid")
        start = self.objective.t_max if grid is None else float(grid[0])
        noise, before = self.noise(seeds), self.evaluations
        if low is None:
            x = begin(self.objective, noise, start)
        else:
            x = self.objective.source(low, noise)
        cond = self.cond(labels, low)
        s = sample(
            self.predict, x, seeds=seeds, t_start=start, cond=cond, callback=callback, **how
        )
        return self.drawn(s, before)

    def images_on(
        self,
        ranks: Ranks,
        seeds: list[int],
        labels: list[int] | None = None,
        *,
        low: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """uint8 images (B, 3, H, W) of all seeds on every rank; each rank draws its share."""
        share = slice(ranks.rank, None, ranks.world)
        size = len(seeds), 3, self.resolution, self.resolution
        images = torch.zeros(size, dtype=torch.int32, device=self.device)
        if seeds[share]:
            own = None if labels is None else labels[share]
            start = None if low is None else low[share]
            images[share] = self.images(seeds[share], own, low=start, **how).images.int()
        # The others' rows are zero.
        return ranks.all_reduce(images).to(torch.uint8)

    def drawn(self, s: Sample, before: int) -> Drawn:
        """Samples as images; `before`: the network evaluations until they were begun."""
        images = to_uint8(self.vae.decode(s.x))
        nfe = float(s.nfe_each.double().mean())
        return Drawn(images, nfe, (self.evaluations - before) / len(images))


def takers(option: str) -> str:
    """The condition of a flag that only some methods know: those with an option of its name."""
    names = [name for name in METHODS if option in inspect.signature(METHODS[name]).parameters]
    return f"--method {' | '.join(names)}"


@dataclass(frozen=True)
class Sampling:
    """What an image of a seed depends on: the flags of everything that samples."""

    ckpt: str = flag(
        help="a U-Net's file, a run's folder (newest, first EMA), a diffusers folder, "
        "hf:org/name[/file]"
    )
    seed: int = flag(0, "image i has seed + i, whatever the batch", low=0)
    labels: tuple[str, ...] = flag(
        (), "class names or numbers, cycled over the images; none = unconditional"
    )
    batch: int = flag(64, "images at a time", low=1)
    device: str = flag("auto", "auto | cpu | cuda | cuda:1")
    dtype: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "of the network; states and times stay fp32"
    )

    method: Literal[("", *METHODS)] = flag("", head="solver")
    steps: int | None = flag(
        None,
        "25 of heun if neither is given; a progressive student brings both",
        low=1,
        of="not --method dopri5",
    )
    grid: Literal[GRIDS] = flag(
        "", "times; the last three: rows of a VP table", of="not --method dopri5"
    )
    shift: float | None = flag(
        None, "of the time grid; > 1 = more steps near the noise", above=0, of="not --method dopri5"
    )
    eta: float | None = flag(
        None,
        "noise: ddim 0 | euler_ancestral, dpmpp_2m_sde, sde 1; 0 = deterministic",
        low=0,
        high=1,
        of=takers("eta"),
    )
    variance: Literal["", "small", "large", "learned"] = flag(
        "", "of ddpm's steps; small if not given", of=takers("variance")
    )
    rtol: float | None = flag(None, "relative tolerance, 0.001", above=0, of=takers("rtol"))
    atol: float | None = flag(None, "absolute tolerance, 0.0001", above=0, of=takers("atol"))
    max_nfe: int | None = flag(
        None, "calls before it gives up with a warning, 1000", low=8, of=takers("max_nfe")
    )
    whole_batch: bool = flag(
        False,
        "one step size for all images of a batch, as torchdiffeq",
        of=takers("whole_batch"),
    )

    cfg: float = flag(
        1.0, "null + cfg * (conditional - null); 1 = off, 0 = unconditional", head="guidance"
    )
    cfg_interval: tuple[float, ...] = flag(
        (), "LO,HI: only while LO < sigma <= HI, sigma = t / (1 - t)"
    )
    cfg_rescale: float = flag(
        0.0, "draw the standard deviation back to the conditional one's", low=0, high=1
    )
    guide_ckpt: str = flag(
        "", "autoguidance: a worse network of the same latents instead of null"
    )

    objective: Literal["", "fm", "eps", "v", "x0"] = flag(
        "",
        "what the network was trained to output",
        head="what files of other programs cannot say; a file that says it must agree",
    )
    table: Literal["", "linear", "cosine", "scaled_linear"] = flag(
        "", "noise schedule of eps, v, x0"
    )
    vae: str = flag(
        "",
        "autoencoder: pixel | pixel:N | sd | sdxl | flux1 | flux2 | FILE | sdxl:FILE; "
        "3 channels are pixels",
    )
    resolution: int = flag(0, "pixels; default as trained")
    num_heads: int = flag(0, "attention heads …")
    num_head_channels: int = flag(0, "… or channels a head")
    attention_order: Literal["", "legacy", "new"] = flag("", "of the qkv rows")


def check(cfg: Sampling) -> None:
    """What can be said of the flags alone."""
    check_flags(cfg)
    if not math.isfinite(cfg.cfg):
        raise UserError(f"--cfg {cfg.cfg}", wanted="a number", do="Try --cfg 2.")
    if cfg.cfg_interval:
        low, high = (*cfg.cfg_interval, -1, -1)[:2]
        if len(cfg.cfg_interval) != 2 or not 0 <= low < high:
            raise UserError(
                f"--cfg-interval {shown(cfg.cfg_interval)}",
                wanted="LO,HI with 0 <= LO < HI",
                do="Try --cfg-interval 0.3,5.",
            )
    for name in ("cfg_interval", "cfg_rescale", "guide_ckpt"):
        if cfg.cfg == 1 and getattr(cfg, name) != field_of(Sampling, name).default:
            raise UserError(
                f"{dashed(name)} does nothing without --cfg: 1 is no guidance",
                do="Add --cfg 2, or leave it out.",
            )


def options_of(method: str) -> dict[str, Any]:
    """What can be said of a method's steps, with its defaults; each is a flag of its name."""
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(METHODS[method]).parameters.items()
        if parameter.default not in (parameter.empty, None)
    }
    return own if method == "dopri5" else {"steps": 25, "grid": "uniform", "shift": 1.0, **own}


def solver_of(cfg: Sampling) -> dict[str, Any]:
    """The method, and all that its flags come to."""
    method = cfg.method or "heun"
    solver = {"method": method, **options_of(method)}
    for name in options_of(method):
        value = getattr(cfg, name)
        if value != field_of(Sampling, name).default:
            solver[name] = value
    return solver


def walk_of(solver: dict[str, Any], objective: Objective, strength: float = 1.0) -> dict[str, Any]:
    """What sample() is given for a solver: its grid of times from strength · t_max to 0, and its
    own options."""
    how = {k: v for k, v in solver.items() if k not in ("steps", "shift", "grid")}
    steps, shift = solver.get("steps", 1), solver.get("shift", 1.0)
    kind, start = solver.get("grid", "uniform"), strength * objective.t_max
    if not strength:
        return {**how, "grid": torch.zeros(2)}
    try:
        grid = time_grid(steps, shift, start, kind, objective.table, objective.zero_snr)
    except ValueError as error:
        raise UserError(f"--grid, --steps: {error}", do="Change them, or leave them out.") from None
    return {**how, "grid": grid}


# ---- what a checkpoint is -----------------------------------------------------------------------


def describe(
    cfg: Sampling, net: Any, meta: dict[str, Any], what: str
) -> tuple[Objective, AnyVAE, tuple[int, int, int]]:
    """How to sample from a network of config `net`: objective, autoencoder, latent shape; from its
    file's metadata, and from flags where that is silent."""
    if getattr(net, "context_dim", 0) or getattr(net, "vector_dim", 0):
        raise UserError(
            f"{what} holds a network that is told what to draw by text, and text encoders are not "
            "part of this code yet",
            do="It can be inspected, converted and verified: python -m ckpt --help",
        )
    objective = objective_of(cfg, meta, what)
    vae = vae_of(cfg, net, meta, objective, what)
    unit = vae.factor * 2 ** (len(net.channel_mult) - 1)
    resolution = cfg.resolution or meta.get("resolution", 0)
    if not resolution:
        raise UserError(
            f"{what} does not say its own resolution",
            do=f"Add --resolution N, a multiple of {unit}.",
        )
    if resolution < 1 or resolution % unit:
        raise UserError(
            f"--resolution {resolution}",
            wanted=f"a multiple of {unit}",
            do=f"Try --resolution {max(resolution // unit, 1) * unit}.",
        )
    return objective, vae, vae.latent_shape(resolution)


def objective_of(cfg: Sampling, meta: dict[str, Any], what: str) -> Objective:
    """What a network was trained to output."""
    known = meta.get("objective")
    if isinstance(known, dict):
        objective = Objective(**known)
        if cfg.table not in ("", objective.table):
            raise UserError(
                f"--table {cfg.table}, but {what} was trained with {objective.table or 'none'}",
                do="Leave it out.",
            )
        return objective
    if not known:
        raise UserError(
            f"{what} does not say what its network was trained to output",
            do="Add --objective fm, eps, v or x0 (guided-diffusion: eps).",
        )
    if known == "fm" and cfg.table:
        raise UserError(
            f"--table {cfg.table} is a noise schedule of eps, v and x0; fm has none",
            do="Leave it out.",
        )
    if known == "fm":
        return make_objective("fm")
    if not cfg.table:
        raise UserError(
            f"{what} was trained to output {known}, and {known} needs its noise schedule",
            do="Add --table linear, cosine or scaled_linear (guided-diffusion: cosine for its "
            "64×64 model, linear for the others; Stable Diffusion: scaled_linear).",
        )
    return make_objective("ddpm" if known == "eps" else known, table=cfg.table)


def vae_of(
    cfg: Sampling, net: Any, meta: dict[str, Any], objective: Objective, what: str
) -> AnyVAE:
    """The autoencoder whose latents a network knows."""
    kept = meta.get("vae")
    # Of those with a family only the place is in the file, and --vae may name another.
    if kept and cfg.vae and "family" not in kept:
        raise UserError(
            f"--vae {cfg.vae}, but {what} carries its own autoencoder ({kept['name']})",
            do="Leave it out.",
        )
    if not kept and not cfg.vae and net.in_channels != 3:
        raise UserError(
            f"{what} works on latents of {net.in_channels} channels and names no autoencoder",
            do="Add --vae FILE (or pixel:N).",
        )
    vae = vae_from_meta(kept, cfg.vae) if kept else load_vae(cfg.vae or "pixel")
    channels = vae.channels
    takes = 2 * channels if objective.coupling == "lowres" else channels
    if takes != net.in_channels or net.out_channels not in (channels, 2 * channels):
        raise UserError(
            f"--vae {vae.name} makes {channels} channels, but {what} takes {net.in_channels} and "
            f"gives {net.out_channels}",
            do="Name the autoencoder that it was trained with.",
        )
    return vae


class Space(NamedTuple):
    """What two networks share if one can guide the other, as far as their files say."""

    channels: int
    vae: dict[str, Any]
    classes: tuple[int, Any]


def space_of(net: Any, meta: dict[str, Any]) -> Space:
    places = ("source", "sha256", "name")
    vae = {k: v for k, v in meta.get("vae", {}).items() if k not in places}
    return Space(net.cfg.in_channels, vae, (net.cfg.num_classes, meta.get("classes")))


def load_guide(
    cfg: Sampling, space: Space, objective: Objective, known: dict[str, Any]
) -> tuple[Objective, Any, str]:
    """--guide-ckpt's objective (the other's, if its file does not say), network, fingerprint."""
    path = find_checkpoint(cfg.guide_ckpt)
    net, meta = load_unet(path, dtype=torch.float32, **known)
    other = space_of(net, meta)
    if (other.channels, other.vae) != (space.channels, space.vae):
        raise UserError(
            f"--guide-ckpt {path} is of another latent space than --ckpt",
            do="Name a network that was trained on the same latents.",
        )
    if other.classes != space.classes:
        raise UserError(
            f"--guide-ckpt {path} was trained with other classes than --ckpt",
            do="Name a network that knows the same labels.",
        )
    if isinstance(meta.get("objective"), dict):
        objective = Objective(**meta["objective"])
    return objective, net, meta["fingerprint"]


def pick_labels(wanted: tuple[str, ...], classes: list[str], n: int) -> Tensor | None:
    """Names or numbers to labels (n,), cycled; None when nothing is wanted."""
    if not wanted:
        return None
    if not classes:
        raise UserError(
            "--labels given, but this checkpoint was trained without classes",
            do="Leave --labels out.",
        )
    ids = []
    for word in wanted:
        if word in classes:
            ids.append(classes.index(word))
        elif word.isdigit() and int(word) < len(classes):
            ids.append(int(word))
        else:
            known = ", ".join(classes[:20]) + (" …" if len(classes) > 20 else "")
            raise UserError(
                f"--labels: no class {word!r} among {len(classes)}",
                do=f"{closest(word, classes)}  Known: {known}.",
            )
    return torch.tensor([ids[i % len(ids)] for i in range(n)])


def check_network(cfg: Sampling, net: Any, meta: dict[str, Any], vae: AnyVAE, what: str) -> None:
    """Refuse flags that a network of config `net` cannot answer; warn of a class it may not know."""
    if cfg.cfg != 1.0 and not cfg.labels and not cfg.guide_ckpt:
        if net.num_classes:
            raise UserError(
                f"--cfg {cfg.cfg} needs --labels: guidance is away from the unconditional "
                "prediction",
                do="Add --labels, or leave --cfg out.",
            )
        raise UserError(
            f"--cfg {cfg.cfg} needs --labels: guidance is away from the unconditional prediction, "
            "and this checkpoint was trained without classes",
            do="Leave --cfg out.",
        )
    if cfg.variance == "learned" and net.out_channels != 2 * vae.channels:
        raise UserError(
            f"--variance learned: {what} gives no variance (it has {net.out_channels} output "
            "channels)",
            do="Use small or large.",
        )
    asks_none = not cfg.labels or (cfg.cfg != 1.0 and not cfg.guide_ckpt)
    if net.num_classes and "classes" not in meta and asks_none:
        asker = "--cfg" if cfg.labels else "drawing without --labels"
        print(
            f'warning: {what} does not say that its network ever saw "no class" in training '
            f"(guided-diffusion's did not), and {asker} asks it for that.",
            file=sys.stderr,
        )


def open_generator(cfg: Sampling, device: torch.device) -> Generator:
    """A checkpoint and the flags, as what draws. Refuses what does not fit, before it draws."""
    check(cfg)
    path = find_checkpoint(cfg.ckpt)
    heads = ("num_heads", "num_head_channels", "attention_order", "objective")
    known = {name: getattr(cfg, name) for name in heads if getattr(cfg, name)}
    net, meta = load_unet(path, dtype=torch.float32, **known)
    objective, vae, latent_shape = describe(cfg, net.cfg, meta, str(path))
    made = meta.get("config", {})
    if not cfg.method and made.get("mode") == "progressive":
        # It knows the times of its own steps only (distill.py).
        cfg = replace(cfg, method="euler", steps=cfg.steps or made["end_steps"])
    check_network(cfg, net.cfg, meta, vae, str(path))
    guide, guide_fingerprint = None, ""
    if cfg.guide_ckpt:
        other = load_guide(cfg, space_of(net, meta), objective, known)
        guide, guide_fingerprint = (other[0], other[1].to(device).eval()), other[2]
    gen = Generator(
        objective,
        net.to(device).eval(),
        vae.to(device),
        latent_shape,
        device=device,
        dtype=cfg.dtype,
        classes=meta.get("classes", [str(i) for i in range(net.cfg.num_classes)]),
        cfg=cfg.cfg,
        rescale=cfg.cfg_rescale,
        interval=cfg.cfg_interval or EVERYWHERE,
        guide=guide,
    )
    gen.path, gen.meta, gen.solver = path, meta, solver_of(cfg)
    gen.how = walk_of(gen.solver, objective)
    gen.sampled = sampled_of(cfg, gen, guide_fingerprint)
    return gen


def sampled_of(cfg: Sampling, gen: Generator, guide: str) -> dict[str, Any]:
    """Everything an image of a seed depends on, but for the weights and what they mean. Metric
    cards are compared by these keys."""
    sampled = {**gen.solver, "t_start": float(gen.how["grid"][0]), "cfg": cfg.cfg}
    sampled["labels"] = list(cfg.labels)
    sampled["dtype"], sampled["device"] = precision(gen.device, cfg.dtype), gen.device.type
    labels = pick_labels(cfg.labels, gen.classes, len(cfg.labels))
    if gen.classes:
        used = "unconditional," if labels is None else len(labels.unique())
        sampled["classes"] = f"{used} of {len(gen.classes)}"
    if cfg.whole_batch:
        sampled["batch"] = cfg.batch
    if cfg.cfg_interval:
        sampled["cfg interval"] = list(cfg.cfg_interval)
    if cfg.cfg_rescale:
        sampled["cfg rescale"] = cfg.cfg_rescale
    if guide:
        sampled["guide"] = guide
    return sampled


if __name__ == "__main__":
    from drawing import main

    cli(main)
