"""Draw samples:  python samplers.py --ckpt runs/toyfaces-fm-standard --n 16 --method heun --steps 25

The checkpoint says what it is, so no other flag is needed. Every method below knows one thing only, the linear path:
x runs from noise at t = 1 to data at t = 0 along dx/dt = u, and predict(x, t) returns (x0, eps, u) there. Objectives
of any kind provide it (objectives.py), so one Heun serves flow matching, DDPM and v-prediction alike.
"""

import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ckpt import find_checkpoint, load_unet
from config import UserError, autocast, cli, closest, parse, pick_device
from files import fsync, make_dir
from model import UNetConfig
from objectives import Net, Objective, T, make_objective, shift_time, table_time
from vae import AnyVAE, load_vae, vae_from_meta

Predict = Callable[..., tuple[Tensor, Tensor, Tensor]]     # (x (B, C, H, W), t (B,), **cond) -> (x0, eps, u)


class Sample(NamedTuple):
    x: Tensor               # like the x given
    nfe: int                # calls of predict
    nfe_each: Tensor        # (B,) of them, how many each sample took part in (dopri5 retires rows early)


# ---- noise and grids ------------------------------------------------------------------------------------------------

def generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator a sample, so that image i does not depend on its batch, rank or device."""
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def draw(gens: list[torch.Generator], like: Tensor) -> Tensor:
    """The next unit noise of each generator: (B, C, H, W) in like's shape (from dim 1), dtype and device."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in gens]).to(like)


def time_grid(steps: int, shift: float = 1.0, t_start: float = 1.0) -> Tensor:
    """steps + 1 times from t_start down to exactly 0, float64; shift > 1 spends more steps near the noise."""
    return t_start * shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def native_grid(objective: Objective, steps: int) -> Tensor:
    """Times of `steps` evenly spaced rows of a VP table, last row first ("trailing"), then 0: (steps + 1,) float64."""
    rows = torch.arange(T, 0, -T / steps, dtype=torch.float64).round() - 1
    return torch.cat([table_time(objective.table, rows[:steps]), rows.new_zeros(1)])


# ---- methods: each goes from t to r < t once per step; a forker can read and change one alone -----------------------

def euler(predict, x, grid, noise):
    """First order; on the linear path this is DDIM with eta = 0."""
    for t, r in steps_of(grid):
        x = x + (r - t) * predict(x, t)[2]
        yield x


def heun(predict, x, grid, noise):
    """Second order, two calls a step. The last step is Euler (Karras et al. 2022, alg. 1): t = 0 is never evaluated."""
    for t, r in steps_of(grid):
        u = predict(x, t)[2]
        if r > 0:
            u = (u + predict(x + (r - t) * u, r)[2]) / 2
        x = x + (r - t) * u
        yield x


def ddim(predict, x, grid, noise, eta=0.0):
    """DDIM (Song et al. 2021, eq. 12 and 16) in VP's coordinates; eta = 0 is deterministic, eta = 1 is DDPM (small)."""
    for t, r in steps_of(grid):
        x0, eps, _ = predict(x, t)
        x = (1 - r) * x0 + r * eps
        if eta and r > 0:
            s_t, s_r, a_ratio = t / norm64(t), r / norm64(r), (1 - t) / norm64(t) * norm64(r) / (1 - r)
            sd = eta * (s_r / s_t) * math.sqrt(max(1 - a_ratio ** 2, 0.0))      # of z, in VP units
            x = (1 - r) * x0 + norm64(r) * (math.sqrt(max(s_r ** 2 - sd ** 2, 0.0)) * eps + sd * noise(x))
        yield x


def ddpm(predict, x, grid, noise, variance="small"):
    """Ancestral sampling (Ho et al. 2020, eq. 7): the posterior q(x_r | x_t, x0) with its own variance ("small") or
    beta ("large"), respaced to the grid. The last step adds no noise."""
    if variance not in ("small", "large"):
        raise ValueError(f"variance {variance!r} is not small or large.")
    for t, r in steps_of(grid):
        x0 = predict(x, t)[0]
        s2_t, s2_r = (t / norm64(t)) ** 2, (r / norm64(r)) ** 2
        a_r, a_ratio = (1 - r) / norm64(r), (1 - t) / norm64(t) * norm64(r) / (1 - r)
        beta = 1 - a_ratio ** 2
        mean = a_r * beta / s2_t * x0 + a_ratio * s2_r / s2_t * x / norm64(t)
        sd = math.sqrt(beta * (s2_r / s2_t if variance == "small" else 1.0)) if r > 0 else 0.0
        x = norm64(r) * (mean + sd * noise(x) if sd else mean)
        yield x


def steps_of(grid: Tensor) -> zip:
    """(t, r) pairs of Python floats, float64 whatever the state is."""
    times = grid.tolist()
    return zip(times[:-1], times[1:])


def norm64(t: float) -> float:
    return math.hypot(1 - t, t)


# Dormand & Prince 1980. The error weights are Shampine's (as torchdiffeq's), 2/3 of the classical difference.
DOPRI_C = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DOPRI_A = ((), (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
           (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
           (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
           (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
DOPRI_E = (35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720,
           -2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60)


def dopri5(predict, x, t_start, callback=None, *, rtol=1e-3, atol=1e-4, max_nfe=1000):
    """Adaptive fifth order; every sample keeps its own t and step, so it does not depend on its batch.

    Steps are clamped to end at sqrt(machine epsilon), never beyond: one Euler step from there to 0 errs by less than
    rounding, and no 1/t is evaluated at 0. Finished rows leave the batch. Past max_nfe calls the rest of the way is
    one Euler step and a warning. Returns x and, (B,), the calls each row took part in.
    """
    B, end = len(x), torch.finfo(x.dtype).eps ** 0.5
    out, calls_each = x.clone(), torch.zeros(B, dtype=torch.long, device=x.device)
    rows = torch.arange(B, device=x.device)                                     # still on their way
    t = torch.full((B,), float(t_start), dtype=torch.float64, device=x.device)
    calls = 0

    def u(x, t):
        nonlocal calls
        calls += 1
        calls_each[rows] += 1
        return predict(x, t.to(x.dtype), rows=rows)[2]

    k1 = u(x, t)
    h = first_step(u, x, t, k1, rtol, atol).minimum(t - end)
    while len(rows) and calls + 6 <= max_nfe:
        k = [k1]
        for c, a in zip(DOPRI_C[1:], DOPRI_A[1:]):
            new = x - per_row(h, x) * sum(w * ki for w, ki in zip(a, k) if w)
            k.append(u(new, (t - c * h).clamp(min=end)))                        # the last stage is the solution
        error = per_row(h, x) * sum(w * ki for w, ki in zip(DOPRI_E, k) if w)
        ratio = rms(error, atol + rtol * torch.maximum(x.abs(), new.abs())).nan_to_num(nan=math.inf)
        accept = (ratio <= 1) | ((h < 1e-9) & torch.isfinite(ratio))            # too small to shrink: take it
        if bool((h < 1e-12).any()):                                             # not finite however small the step
            break
        moved = accept.view(-1, *[1] * (x.ndim - 1))
        x, k1, t = torch.where(moved, new, x), torch.where(moved, k[-1], k1), torch.where(accept, t - h, t)
        factor = (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(max=10.0)
        h = h * torch.where(accept, factor.clamp(min=1.0), factor.clamp(min=0.2))
        done = t <= end * 1.0001
        out[rows[done]] = x[done] - per_row(t[done], x) * k1[done]
        rows, x, k1, t, h = rows[~done], x[~done], k1[~done], t[~done], h[~done].minimum(t[~done] - end)
        if callback:
            callback(1 - float(t.max()) if len(t) else 1.0, x)
    if len(rows):
        print(f"warning: dopri5 stopped after {calls} calls with {len(rows)} of {B} samples unfinished (t up to "
              f"{float(t.max()):.3f}); they end in one Euler step. Raise max_nfe or loosen rtol.", file=sys.stderr)
        out[rows] = x - per_row(t, x) * k1
    return out, calls_each


def rms(v: Tensor, scale: Tensor) -> Tensor:
    """Root mean square of v / scale over all but the first dimension: (B,) float64."""
    return (v / scale).double().flatten(1).square().mean(1).sqrt()


def per_row(v: Tensor, x: Tensor) -> Tensor:
    """(B,) to a factor of x (B, …), in x's dtype."""
    return v.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def first_step(u, x, t, k1, rtol, atol) -> Tensor:
    """Hairer, Nørsett & Wanner, II.4: a first step size per row, (B,) float64."""
    scale = atol + rtol * x.abs()
    d0, d1 = rms(x, scale), rms(k1, scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1)
    h0 = h0.minimum(t / 2)
    d2 = rms(u(x - per_row(h0, x) * k1, t - h0) - k1, scale) / h0
    h1 = (0.01 / torch.maximum(d1, d2).clamp(min=1e-15)) ** 0.2
    return torch.minimum(100 * h0, h1)


METHODS: dict[str, Callable] = {"euler": euler, "heun": heun, "ddim": ddim, "ddpm": ddpm, "dopri5": dopri5}


@torch.no_grad()
def sample(predict: Predict, x: Tensor, *, method: str = "heun", steps: int = 25, shift: float = 1.0,
           seeds: list[int] | None = None, t_start: float = 1.0, grid: Tensor | None = None,
           cond: dict[str, Tensor] | None = None, callback: Callable[[float, Tensor], None] | None = None,
           **options: Any) -> Sample:
    """Integrate x (B, C, H, W) from t_start on the linear path to data at t = 0.

    predict(x, t (B,), **cond) returns (x0, eps, u); `cond` holds tensors with one row a sample. x's fp32/fp64 is kept.
    `grid` (steps + 1 falling times ending in 0) replaces steps, shift and t_start. `seeds`, one a sample, feed the
    stochastic methods: their first draw is taken to be the initial noise, so steps use the later ones.
    options: ddim eta; ddpm variance; dopri5 rtol, atol, max_nfe (it ignores steps). callback(progress, x).
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


# ---- pictures and the command line ----------------------------------------------------------------------------------

def guided(objective: Objective, net: Net, cfg: float = 1.0) -> Predict:
    """predict(x, t, y=None) with classifier-free guidance: null + cfg · (conditional - null), both in one call.

    cfg = 1 is the conditional model itself, 0 the unconditional one. y (B,) holds labels, -1 = none.
    """
    def predict(x: Tensor, t: Tensor, y: Tensor | None = None):
        if y is None or cfg == 1.0:
            return objective.predict(net, x, t, **({} if y is None else {"y": y}))
        both = torch.cat([y, torch.full_like(y, -1)])
        triple = objective.predict(net, torch.cat([x, x]), torch.cat([t, t]), y=both)
        return tuple(null + cfg * (c - null) for c, null in (v.chunk(2) for v in triple))
    return predict


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """uint8 images (B, 3, H, W) -> one PNG, row by row, on a white 2-pixel grid."""
    B, _, H, W = images.shape
    columns = columns or math.ceil(B ** 0.5)
    grid = Image.new("RGB", (columns * (W + 2) + 2, -(-B // columns) * (H + 2) + 2), "white")
    for i, image in enumerate(images.cpu()):
        grid.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (2 + i % columns * (W + 2), 2 + i // columns * (H + 2)))
    save_png(grid, path)


def save_png(image: Image.Image, path: Path) -> None:
    """Write through a temporary file, so that no half picture is ever seen."""
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format="PNG")
    fsync(temporary)
    temporary.replace(path)


@dataclass(frozen=True)
class Config:
    ckpt: str                          # a U-Net's file, a run's folder (newest, first EMA), a diffusers folder, hf:org/name[/file]
    n: int = 16                        # images
    steps: int = 25                    # solver steps; dopri5 chooses its own
    method: Literal["euler", "heun", "ddim", "ddpm", "dopri5"] = "heun"   # solver
    seed: int = 0                      # image i has seed + i, whatever the batch
    cfg: float = 1.0                   # guidance: null + cfg * (conditional - null); 1 = off
    labels: tuple[str, ...] = ()       # class names or numbers, cycled over the images; none = unconditional
    out: str = ""                      # folder; default samples/<run>-<settings>
    batch: int = 64                    # images at a time
    shift: float = 1.0                 # of the time grid; > 1 = more steps near the noise
    eta: float = 0.0                   # ddim: 0 = deterministic, 1 = ancestral
    rtol: float = 1e-3                 # dopri5
    atol: float = 1e-4                 # dopri5
    max_nfe: int = 1000                # dopri5: calls before it gives up with a warning
    device: str = "auto"               # auto | cpu | cuda | cuda:1
    dtype: Literal["auto", "fp32", "bf16"] = "auto"   # of the network; states and times stay fp32
    # What files that other programs wrote cannot say. A file that says it must agree.
    objective: Literal["", "fm", "eps", "v", "x0"] = ""   # what the network was trained to output
    table: Literal["", "linear", "cosine", "scaled_linear"] = ""   # noise schedule of eps, v, x0
    vae: str = ""                      # autoencoder: pixel | pixel:N | sd | sdxl | flux1 | flux2 | FILE | sdxl:FILE; 3 channels are pixels
    resolution: int = 0                # pixels; default as trained
    num_heads: int = 0                 # attention heads …
    num_head_channels: int = 0         # … or channels a head
    attention_order: Literal["", "legacy", "new"] = ""   # of the qkv rows


def pick_labels(wanted: tuple[str, ...], classes: list[str], n: int) -> Tensor | None:
    """Names or numbers to labels (n,), cycled; None when nothing is wanted."""
    if not wanted:
        return None
    if not classes:
        raise UserError("--labels given, but this checkpoint was trained without classes.  Leave --labels out.")
    ids = []
    for word in wanted:
        if word in classes:
            ids.append(classes.index(word))
        elif word.isdigit() and int(word) < len(classes):
            ids.append(int(word))
        else:
            raise UserError(f"--labels: no class {word!r} among {len(classes)}.{closest(word, classes)}"
                            f"  Known: {', '.join(classes[:20])}{' …' if len(classes) > 20 else ''}.")
    return torch.tensor([ids[i % len(ids)] for i in range(n)])


def settings(cfg: Config) -> str:
    """What makes an image of a seed, as far as it is not the default: two different images never share a default folder."""
    chosen = [f.name for f in fields(Config) if f.name not in ("ckpt", "n", "seed", "out", "batch", "device") and getattr(cfg, f.name) != f.default]
    values = {name: "+".join(v) if isinstance(v := getattr(cfg, name), tuple) else v for name in chosen}
    return re.sub(r"[^\w=.+-]+", "_", "".join(f"-{name}={value}" for name, value in values.items()))


def default_folder(cfg: Config, path: Path, meta: dict[str, Any]) -> str:
    """Where samples of a file go if nobody says: what it is, its weights, the settings."""
    stem = path.resolve().parent.name if path.name.startswith("diffusion_pytorch_model.") else path.stem   # they all have that name
    return f"samples/{'-'.join([str(meta[k]) for k in ('run', 'images') if k in meta] + [stem, meta['fingerprint'][:6]])}{settings(cfg)}"


def describe(cfg: Config, unet: UNetConfig, meta: dict[str, Any], what: str) -> tuple[Objective, AnyVAE, tuple[int, int, int]]:
    """How to sample from a network: objective, autoencoder, latent shape; from its file, and from flags where that is silent."""
    if unet.context_dim or unet.vector_dim:
        raise UserError(f"{what} holds a network that is told what to draw by text, and text encoders are not part of this code yet.  "
                        "It can be inspected, converted and verified: python ckpt.py --help")
    if isinstance(meta.get("objective"), dict):
        objective = Objective(**meta["objective"])
        if cfg.table not in ("", objective.table):
            raise UserError(f"--table {cfg.table}, but {what} was trained with {objective.table or 'none'}.  Leave it out.")
    elif not meta.get("objective"):
        raise UserError(f"{what} does not say what its network was trained to output.  Add --objective fm, eps, v or x0 (guided-diffusion: eps).")
    elif meta["objective"] == "fm" and cfg.table:
        raise UserError(f"--table {cfg.table} is a noise schedule of eps, v and x0; fm has none.")
    elif meta["objective"] != "fm" and not cfg.table:
        raise UserError(f"{what} was trained to output {meta['objective']}, and {meta['objective']} needs its noise schedule.  Add --table linear, cosine "
                        "or scaled_linear (guided-diffusion: cosine for its 64×64 model, linear for the others; Stable Diffusion: scaled_linear).")
    else:
        name = "ddpm" if meta["objective"] == "eps" else meta["objective"]
        objective = make_objective(name, **{} if name == "fm" else {"table": cfg.table})
    if "vae" in meta and cfg.vae and "family" not in meta["vae"]:                # of those, only where they lie is in the file
        raise UserError(f"--vae {cfg.vae}, but {what} carries its own autoencoder ({meta['vae']['name']}).  Leave it out.")
    if "vae" not in meta and not cfg.vae and unet.in_channels != 3:
        raise UserError(f"{what} works on latents of {unet.in_channels} channels and names no autoencoder.  Add --vae FILE (or pixel:N).")
    vae = vae_from_meta(meta["vae"], cfg.vae) if "vae" in meta else load_vae(cfg.vae or "pixel")
    if vae.channels != unet.in_channels or unet.out_channels not in (vae.channels, 2 * vae.channels):
        raise UserError(f"--vae {vae.name} makes {vae.channels} channels, but {what} takes {unet.in_channels} and gives {unet.out_channels}.")
    resolution, unit = cfg.resolution or meta.get("resolution", 0), vae.factor * 2 ** (len(unet.channel_mult) - 1)
    if not resolution:
        raise UserError(f"{what} does not say its own resolution.  Add --resolution N, a multiple of {unit}.")
    if resolution < 1 or resolution % unit:
        raise UserError(f"--resolution {resolution}: wanted a multiple of {unit}.")
    return objective, vae, vae.latent_shape(resolution)


def mean_only(net: Net) -> Net:
    """A network that also outputs a learned variance (guided-diffusion's learn_sigma), without it."""
    return lambda x, t, **cond: net(x, t, **cond)[:, :x.shape[1]]


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if not 0 <= cfg.seed < 2 ** 63 - cfg.n:
        raise UserError(f"--seed {cfg.seed}: wanted 0 to 2^63 - 1 - n.")
    for name, least in (("n", 1), ("steps", 1), ("batch", 1), ("max_nfe", 8)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: wanted at least {least}.")
    path = find_checkpoint(cfg.ckpt)
    device = pick_device(cfg.device)
    if dry_run:
        print(json.dumps({**asdict(cfg), "ckpt": str(path), "device": str(device)}, indent=1))
        return
    known = {k: v for k in ("num_heads", "num_head_channels", "attention_order", "objective") if (v := getattr(cfg, k))}
    net, meta = load_unet(path, dtype=torch.float32, **known)
    objective, vae, latent_shape = describe(cfg, net.cfg, meta, str(path))
    net, vae = net.to(device).eval(), vae.to(device)
    labels = pick_labels(cfg.labels, meta.get("classes", [str(i) for i in range(net.cfg.num_classes)]), cfg.n)
    if cfg.cfg != 1.0 and labels is None:
        raise UserError(f"--cfg {cfg.cfg} needs --labels: guidance is away from the unconditional prediction.")
    if net.cfg.num_classes and "classes" not in meta and (labels is None or cfg.cfg != 1.0):
        print(f"warning: {path} does not say that its network ever saw \"no class\" in training (guided-diffusion's did not), and "
              f"{'--cfg' if labels is not None else 'drawing without --labels'} asks it for that.", file=sys.stderr)
    out = Path(cfg.out or default_folder(cfg, path, meta))
    make_dir(out)
    options = {"ddim": {"eta": cfg.eta}, "dopri5": {"rtol": cfg.rtol, "atol": cfg.atol, "max_nfe": cfg.max_nfe}}
    predict, images, nfe, start = guided(objective, mean_only(net), cfg.cfg), [], 0, time.perf_counter()
    with tqdm(total=cfg.n, unit="img", disable=None) as bar:
        for lo in range(0, cfg.n, cfg.batch):
            seeds = list(range(cfg.seed + lo, cfg.seed + min(lo + cfg.batch, cfg.n)))
            x = draw(generators(seeds), torch.empty(1, *latent_shape, device=device))
            done = [0.0]

            def advance(progress: float, _: Tensor) -> None:
                bar.update((progress - done[0]) * len(seeds))
                done[0] = progress

            with autocast(device, cfg.dtype):
                s = sample(predict, objective.prior(x), method=cfg.method, steps=cfg.steps, shift=cfg.shift, seeds=seeds,
                           t_start=objective.t_max, callback=advance,
                           cond=None if labels is None else {"y": labels[lo:lo + len(seeds)].to(device)},
                           **options.get(cfg.method, {}))
            nfe += int(s.nfe_each.sum())
            images.append(to_uint8(vae.decode(s.x)).cpu())
    seconds, images = time.perf_counter() - start, torch.cat(images)
    for i, image in enumerate(images):
        save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), out / f"{cfg.seed + i:06d}.png")
    save_grid(images, out / "grid.png")
    double = " (each two network evaluations: cfg)" if cfg.cfg != 1 else ""
    print(f"{cfg.n} images  {cfg.method}  NFE/image {nfe / cfg.n:g}{double}  {seconds / cfg.n:.3f} s/image")
    print(out / "grid.png")


if __name__ == "__main__":
    cli(main)
