"""Draw samples:  python samplers.py --ckpt runs/toyfaces-fm-standard --n 16 --method heun --steps 25

The checkpoint says what it is, so no other flag is needed.
"""

import hashlib
import inspect
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ckpt import find_checkpoint, load_unet
from harness.cli import UserError, closest, parse
from harness.ranks import autocast, pick_device
from diffusion.coupling import enlarged
from harness.files import make_dir
from model import UNetConfig
from objectives import Net, Objective, make_objective
from data.images import read_picture
from harness.pictures import save_grid, save_npz, save_png, to_uint8
from samplers import (
    DETERMINISTIC,
    METHODS,
    Predict,
    begin,
    draw,
    edit,
    generators,
    guided,
    invert,
    sample,
    slerp,
    time_grid,
)
from vae import AnyVAE, choose

STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "sde")


@dataclass(frozen=True)
class Config:
    ckpt: str  # a U-Net's file, a run's folder (newest, first EMA), a diffusers folder, hf:org/name[/file]
    n: int = 16  # images
    seed: int = 0  # image i has seed + i, whatever the batch
    labels: tuple[
        str, ...
    ] = ()  # class names or numbers, cycled over the images; none = unconditional
    batch: int = 64  # images at a time
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the network; states and times stay fp32
    # ---- solver
    method: Literal[("", *METHODS)] = ""
    steps: int | None = (
        None  # 25 of heun if neither is given; dopri5 chooses its own; a progressive student brings both
    )
    grid: Literal["", "uniform", "karras", "logsnr", "trailing", "leading", "linspace"] = (
        ""  # times; the last three: rows of a VP table
    )
    shift: float | None = None  # of the time grid; > 1 = more steps near the noise
    eta: float | None = (
        None  # noise: ddim 0 | euler_ancestral, dpmpp_2m_sde, sde 1; 0 = deterministic
    )
    variance: Literal["", "small", "large", "learned"] = ""  # of ddpm's steps; small if not given
    rtol: float | None = None  # dopri5: relative tolerance, 0.001
    atol: float | None = None  # dopri5: absolute tolerance, 0.0001
    max_nfe: int | None = None  # dopri5: calls before it gives up with a warning, 1000
    whole_batch: bool = False  # dopri5: one step size for all images of a batch, as torchdiffeq
    # ---- guidance
    cfg: float = 1.0  # null + cfg * (conditional - null); 1 = off, 0 = unconditional
    cfg_interval: tuple[float, ...] = ()  # LO,HI: only while LO < sigma <= HI, sigma = t / (1 - t)
    cfg_rescale: float = 0.0  # 0 to 1: draw the standard deviation back to the conditional one's
    guide_ckpt: str = ""  # autoguidance: a worse network of the same latents instead of null
    # ---- editing
    init: tuple[str, ...] = ()  # images to start from, cycled; a cfm network enlarges them
    strength: float | None = (
        None  # 0 = the image itself, 1 = nothing of it; 0.6 if not given, with --mask or --invert 1
    )
    mask: str = ""  # image of --init's size: white is painted anew, black is kept
    invert: bool = False  # the noise is --init's own, found by going backwards
    interpolate: bool = (
        False  # n images between the two of --init: their noise by inversion, along a great circle
    )
    # ---- output
    out: str = ""  # folder; default samples/<run>-<settings>
    npz: str = (
        ""  # also this file: arr_0 uint8 (n, H, W, 3), as guided-diffusion's evaluator reads it
    )
    grid_image: bool = True  # grid.png of all images
    # ---- what files that other programs wrote cannot say; a file that says it must agree
    objective: Literal["", "fm", "eps", "v", "x0"] = ""  # what the network was trained to output
    table: Literal["", "linear", "cosine", "scaled_linear"] = ""  # noise schedule of eps, v, x0
    vae: str = ""  # autoencoder: pixel | pixel:N | sd | sdxl | flux1 | flux2 | FILE | sdxl:FILE; 3 channels are pixels
    resolution: int = 0  # pixels; default as trained
    num_heads: int = 0  # attention heads …
    num_head_channels: int = 0  # … or channels a head
    attention_order: Literal["", "legacy", "new"] = ""  # of the qkv rows


def read_mask(path: str, like: tuple[str, ...], resolution: int) -> Tensor:
    """A mask file as bool (1, 1, resolution, resolution), white = True, resized and cropped as the images `like` it, whose size it must have."""
    mask = read_picture(path, resolution).float().mean(0) > 127
    sizes = {}
    for name in (path, *like):
        with Image.open(name) as file:
            sizes[name] = f"{file.width}×{file.height}"
        if sizes[name] != sizes[path]:
            raise UserError(
                f"--mask {path} is {sizes[path]}, but {name} is {sizes[name]}.  Make them the same size."
            )
    return mask[None, None]


def pick_labels(wanted: tuple[str, ...], classes: list[str], n: int) -> Tensor | None:
    """Names or numbers to labels (n,), cycled; None when nothing is wanted."""
    if not wanted:
        return None
    if not classes:
        raise UserError(
            "--labels given, but this checkpoint was trained without classes.  Leave --labels out."
        )
    ids = []
    for word in wanted:
        if word in classes:
            ids.append(classes.index(word))
        elif word.isdigit() and int(word) < len(classes):
            ids.append(int(word))
        else:
            raise UserError(
                f"--labels: no class {word!r} among {len(classes)}.{closest(word, classes)}"
                f"  Known: {', '.join(classes[:20])}{' …' if len(classes) > 20 else ''}."
            )
    return torch.tensor([ids[i % len(ids)] for i in range(n)])


def settings(cfg: Config) -> str:
    """What makes an image of a seed, as far as it is not the default: two different images never share a default folder."""
    silent = ("ckpt", "n", "seed", "out", "batch", "device", "npz", "grid_image")
    values = {
        f.name: v
        for f in fields(Config)
        if f.name not in silent and (v := getattr(cfg, f.name)) != f.default
    }
    text = "".join(
        f"-{name}={'+'.join(map(str, v)) if isinstance(v, tuple) else v}"
        for name, v in values.items()
    )
    text = re.sub(r"[^\w=.+-]+", "_", text)
    return (
        text if len(text) < 150 else "-" + hashlib.sha256(text.encode()).hexdigest()[:12]
    )  # a folder's name has an end


def default_folder(cfg: Config, path: Path, meta: dict[str, Any]) -> str:
    """Where samples of a file go if nobody says: what it is, its weights, the settings."""
    stem = (
        path.resolve().parent.name
        if path.name.startswith("diffusion_pytorch_model.")
        else path.stem
    )  # they all have that name
    return f"samples/{'-'.join([str(meta[k]) for k in ('run', 'images') if k in meta] + [stem, meta['fingerprint'][:6]])}{settings(cfg)}"


def describe(
    cfg: Config, unet: UNetConfig, meta: dict[str, Any], what: str
) -> tuple[Objective, AnyVAE, tuple[int, int, int]]:
    """How to sample from a network: objective, autoencoder, latent shape; from its file, and from flags where that is silent."""
    if unet.context_dim or unet.vector_dim:
        raise UserError(
            f"{what} holds a network that is told what to draw by text, and text encoders are not part of this code yet.  "
            "It can be inspected, converted and verified: python -m ckpt --help"
        )
    if isinstance(meta.get("objective"), dict):
        objective = Objective(**meta["objective"])
        if cfg.table not in ("", objective.table):
            raise UserError(
                f"--table {cfg.table}, but {what} was trained with {objective.table or 'none'}.  Leave it out."
            )
    elif not meta.get("objective"):
        raise UserError(
            f"{what} does not say what its network was trained to output.  Add --objective fm, eps, v or x0 (guided-diffusion: eps)."
        )
    elif meta["objective"] == "fm" and cfg.table:
        raise UserError(f"--table {cfg.table} is a noise schedule of eps, v and x0; fm has none.")
    elif meta["objective"] != "fm" and not cfg.table:
        raise UserError(
            f"{what} was trained to output {meta['objective']}, and {meta['objective']} needs its noise schedule.  Add --table linear, cosine "
            "or scaled_linear (guided-diffusion: cosine for its 64×64 model, linear for the others; Stable Diffusion: scaled_linear)."
        )
    else:
        name = "ddpm" if meta["objective"] == "eps" else meta["objective"]
        objective = make_objective(name, **{} if name == "fm" else {"table": cfg.table})
    pixels = unet.in_channels == 3 and "vae" not in meta
    vae = choose(cfg.vae or ("pixel" if pixels else ""), meta=meta, network=what)
    if vae.channels * (
        1 + (objective.coupling == "lowres")
    ) != unet.in_channels or unet.out_channels not in (vae.channels, 2 * vae.channels):
        raise UserError(
            f"--vae {vae.name} makes {vae.channels} channels, but {what} takes {unet.in_channels} and gives {unet.out_channels}."
        )
    resolution, unit = (
        cfg.resolution or meta.get("resolution", 0),
        vae.factor * 2 ** (len(unet.channel_mult) - 1),
    )
    if not resolution:
        raise UserError(
            f"{what} does not say its own resolution.  Add --resolution N, a multiple of {unit}."
        )
    if resolution < 1 or resolution % unit:
        raise UserError(f"--resolution {resolution}: wanted a multiple of {unit}.")
    return objective, vae, vae.latent_shape(resolution)


def load_guide(
    cfg: Config, net: Any, meta: dict[str, Any], objective: Objective, known: dict[str, Any]
) -> tuple[Objective, Any, str]:
    """--guide-ckpt's objective, network and fingerprint, which must speak of the same latents and classes, as far as their files say."""
    path = find_checkpoint(cfg.guide_ckpt)
    guide, theirs = load_unet(path, dtype=torch.float32, **known)
    (c, vae, classes), other = (
        (
            n.cfg.in_channels,
            {k: v for k, v in m.get("vae", {}).items() if k not in ("source", "sha256", "name")},
            (n.cfg.num_classes, m.get("classes")),
        )
        for n, m in ((net, meta), (guide, theirs))
    )
    if (c, vae) != other[:2]:
        raise UserError(
            f"--guide-ckpt {path} is of another latent space than --ckpt.  Name a network that was trained on the same latents."
        )
    if classes != other[2]:
        raise UserError(
            f"--guide-ckpt {path} was trained with other classes than --ckpt.  Name a network that knows the same labels."
        )
    return (
        Objective(**theirs["objective"])
        if isinstance(theirs.get("objective"), dict)
        else objective,
        guide,
        theirs["fingerprint"],
    )


def check(cfg: Config) -> dict[str, Any]:
    """What can be said of the flags alone. Returns the method's own options, as given or by default."""

    def need(ok: bool, flag: str, wanted: str) -> None:
        value = getattr(cfg, flag)
        if not ok:
            raise UserError(
                f"--{flag.replace('_', '-')} {','.join(map(str, value)) if isinstance(value, tuple) else value}: wanted {wanted}."
            )

    need(0 <= cfg.seed < 2**63 - cfg.n, "seed", "0 to 2^63 - 1 - n")
    for name, least in (("n", 1), ("steps", 1), ("batch", 1), ("max_nfe", 8)):
        need(getattr(cfg, name) is None or getattr(cfg, name) >= least, name, f"at least {least}")
    for name in ("rtol", "atol", "shift"):
        need(getattr(cfg, name) is None or 0 < getattr(cfg, name) < math.inf, name, "more than 0")
    for name in ("eta", "strength", "cfg_rescale"):
        need(getattr(cfg, name) is None or 0 <= getattr(cfg, name) <= 1, name, "0 to 1")
    need(math.isfinite(cfg.cfg), "cfg", "a number")
    need(
        not cfg.cfg_interval
        or len(cfg.cfg_interval) == 2
        and 0 <= cfg.cfg_interval[0] < cfg.cfg_interval[1],
        "cfg_interval",
        "LO,HI with 0 <= LO < HI",
    )
    need(
        not cfg.interpolate or len(cfg.init) in (0, 2),
        "init",
        "two images, to --interpolate between",
    )
    need(
        not cfg.interpolate or len(cfg.labels) < 2, "labels", "one for all images of --interpolate"
    )
    need(
        not cfg.npz or Path(cfg.npz).absolute().parent.is_dir(),
        "npz",
        "a file in a folder that exists",
    )
    default = {f.name: f.default for f in fields(Config)}
    for flags, useful, reason in (
        (
            ("cfg_interval", "cfg_rescale", "guide_ckpt"),
            cfg.cfg != 1,
            "without --cfg: 1 is no guidance",
        ),
        (("strength", "mask", "invert", "interpolate"), cfg.init, "without --init"),
        (("mask", "strength", "invert"), not cfg.interpolate, "with --interpolate"),
        (("mask",), not cfg.invert, "with --invert"),
    ):
        for name in flags:
            if getattr(cfg, name) != default[name] and not useful:
                raise UserError(f"--{name.replace('_', '-')} does nothing {reason}.")
    method = cfg.method or "heun"
    takes, options = {name: options_of(name) for name in METHODS}, options_of(method)
    for name in dict.fromkeys(name for o in takes.values() for name in o):
        if (value := getattr(cfg, name)) == default[name]:
            continue
        if name not in options:
            users = ", ".join(user for user in METHODS if name in takes[user])
            raise UserError(
                f"--{name.replace('_', '-')} does nothing with --method {method}.  It is for {users}."
            )
        options[name] = value
    if (cfg.invert or cfg.interpolate) and (method not in DETERMINISTIC or options.get("eta")):
        eta = " --eta" * bool(options.get("eta"))
        raise UserError(
            f"--method {method}{eta} cannot be inverted.  Use one of {', '.join(DETERMINISTIC)}, with eta 0."
        )
    return options


def options_of(method: str) -> dict[str, Any]:
    """The flags that a method knows, with its defaults."""
    own = {
        k: p.default
        for k, p in inspect.signature(METHODS[method]).parameters.items()
        if p.default not in (p.empty, None)
    }
    return own if method == "dopri5" else {"steps": 25, "grid": "uniform", "shift": 1.0, **own}


def walk_of(cfg: Config, objective: Objective, options: dict[str, Any]) -> tuple[float, Tensor]:
    """(strength, the grid from there); `options` loses what made it."""
    whole = (
        cfg.mask or cfg.invert or not cfg.init or cfg.interpolate or objective.coupling == "lowres"
    )
    strength = cfg.strength if cfg.strength is not None else 1.0 if whole else 0.6
    steps, shift, kind = (
        options.pop(k, v) for k, v in (("steps", 1), ("shift", 1.0), ("grid", "uniform"))
    )
    try:
        return strength, time_grid(
            steps, shift, strength * objective.t_max, kind, objective.table, objective.zero_snr
        ) if strength else torch.zeros(2)
    except ValueError as error:
        raise UserError(f"--grid, --steps: {error}") from None


def enlarge(cfg: Config, objective: Objective, vae: AnyVAE, R: int, device: torch.device) -> Tensor:
    """What the small pictures of --init say of large ones to a cfm network, (k, C, h, w)."""
    if not cfg.init:
        raise UserError(
            f"{cfg.ckpt} was trained to enlarge pictures {objective.lowres} times.  Add --init A.png,B.png: they become {R // objective.lowres} px."
        )
    useless = [
        f"--{name}"
        for name in ("strength", "mask", "invert", "interpolate")
        if getattr(cfg, name) != getattr(Config, name)
    ]
    if useless:
        raise UserError(
            f"{useless[0]}: {cfg.ckpt} was trained to enlarge pictures (cfm), which is all it can do with --init.  Leave it out."
        )
    if cfg.eta or (cfg.method in STOCHASTIC and cfg.eta is None):
        raise UserError(
            f"--method {cfg.method}{' --eta' * bool(cfg.eta)} adds noise as if the path began in noise, and that of {cfg.ckpt} (cfm) begins "
            "in a picture.  Use an ODE solver, such as heun."
        )
    side = R // objective.lowres
    if R % objective.lowres or (objective.upsample != "psu" and side % vae.factor):
        raise UserError(
            f"--resolution {R} cannot be enlarged from {objective.lowres} times smaller pictures.  Leave it out."
        )
    small = torch.stack([read_picture(path, side) for path in cfg.init]).to(device) / 127.5 - 1
    return enlarged(small, (R, R), vae.encode, objective.upsample)


@dataclass
class Drawer:
    """A checkpoint and the flags, as what draws."""

    path: Path
    meta: dict[str, Any]
    objective: Objective
    vae: AnyVAE
    latent_shape: tuple[int, int, int]
    classes: list[str]
    predict: Predict
    plain: Predict  # without guidance, for inversion
    method: str
    said: dict[str, Any]  # method, steps, grid, … : all that its own flags came to
    options: dict[str, Any]  # … but for those that made the grid
    strength: float
    grid: Tensor
    guide: str = ""  # fingerprint of --guide-ckpt
    evaluations: int = 0  # of networks, by sample

    @property
    def resolution(self) -> int:
        return self.latent_shape[1] * self.vae.factor


def load(cfg: Config, device: torch.device) -> Drawer:
    """Load the networks that flags name, and refuse what does not fit them."""
    check(cfg)  # before anything is read
    path = find_checkpoint(cfg.ckpt)
    known = {
        k: v
        for k in ("num_heads", "num_head_channels", "attention_order", "objective")
        if (v := getattr(cfg, k))
    }
    net, meta = load_unet(path, dtype=torch.float32, **known)
    objective, vae, latent_shape = describe(cfg, net.cfg, meta, str(path))
    made = meta.get("config", {})
    if (
        not cfg.method and made.get("mode") == "progressive"
    ):  # it knows these times only (distill.py)
        cfg = replace(cfg, method="euler", steps=cfg.steps or made["end_steps"])
    options, method = check(cfg), cfg.method or "heun"
    said = {"method": method, **options}
    if cfg.cfg != 1.0 and not cfg.labels and not cfg.guide_ckpt:
        raise UserError(
            f"--cfg {cfg.cfg} needs --labels: guidance is away from the unconditional prediction"
            f"{'.' if net.cfg.num_classes else ', and this checkpoint was trained without classes.  Leave --cfg out.'}"
        )
    if cfg.variance == "learned" and net.cfg.out_channels != 2 * vae.channels:
        raise UserError(
            f"--variance learned: {path} gives no variance (it has {net.cfg.out_channels} output channels).  Use small or large."
        )
    if (
        net.cfg.num_classes
        and "classes" not in meta
        and (not cfg.labels or (cfg.cfg != 1.0 and not cfg.guide_ckpt))
    ):
        print(
            f'warning: {path} does not say that its network ever saw "no class" in training (guided-diffusion\'s did not), and '
            f"{'--cfg' if cfg.labels else 'drawing without --labels'} asks it for that.",
            file=sys.stderr,
        )

    def counted(net: Net) -> Net:
        def call(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            drawer.evaluations += len(x)
            with autocast(device, cfg.dtype):  # only the network: what surrounds it stays fp32
                return net(x, t, **cond)

        return call

    guide, guide_mark, net = None, "", net.to(device).eval()
    if cfg.guide_ckpt:
        guide_objective, other, guide_mark = load_guide(cfg, net, meta, objective, known)
        guide = guided(guide_objective, counted(other.to(device).eval()))
    predict = guided(
        objective,
        counted(net),
        cfg.cfg,
        rescale=cfg.cfg_rescale,
        interval=cfg.cfg_interval or (0.0, math.inf),
        guide=guide,
    )
    classes = meta.get("classes", [str(i) for i in range(net.cfg.num_classes)])
    drawer = Drawer(
        path,
        meta,
        objective,
        vae.to(device),
        latent_shape,
        classes,
        predict,
        guided(objective, counted(net)),
        method,
        said,
        options,
        *walk_of(cfg, objective, options),
        guide_mark,
    )
    return drawer


def draw_images(
    cfg: Config,
    d: Drawer,
    labels: Tensor | None,
    z: Tensor | None,
    pixels: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, int]:
    """All images, uint8 (n, 3, R, R), and the NFE of all together. z (k, C, h, w) and pixels (k, 3, R, R) uint8 are --init's,
    mask (1, 1, R, R) bool --mask's."""
    images, nfe = [], 0
    cells = (
        None if mask is None else F.max_pool2d(mask.float(), d.vae.factor).bool().to(device)
    )  # a latent cell with any white is painted
    with tqdm(total=cfg.n, unit="img", disable=None) as bar:
        if cfg.interpolate:
            ends = invert(
                d.plain,
                z,
                d.grid,
                method=d.method,
                cond=None if labels is None else {"y": labels[:1].expand(2).to(device)},
            )
            nfe += int(ends.nfe_each.sum())
        for lo in range(0, cfg.n, cfg.batch):
            index = torch.arange(lo, min(lo + cfg.batch, cfg.n))
            seeds, done = (cfg.seed + index).tolist(), [0.0]

            def advance(progress: float, _: Tensor) -> None:
                bar.update((progress - done[0]) * len(index))
                done[0] = progress

            cond = None if labels is None else {"y": labels[index].to(device)}
            how = {
                "method": d.method,
                "seeds": seeds,
                "callback": advance,
                "cond": cond,
                "grid": d.grid,
                **d.options,
            }
            noise, own = (
                draw(generators(seeds), torch.empty(1, *d.latent_shape, device=device)),
                None if z is None else z[index % len(z)],
            )
            if cfg.interpolate:
                s = sample(
                    d.predict,
                    slerp(ends.x[:1], ends.x[1:], torch.linspace(0, 1, cfg.n)[index]),
                    **how,
                )
            elif cfg.invert and d.strength:
                back = invert(d.plain, own, d.grid, method=d.method, cond=cond)
                s, nfe = sample(d.predict, back.x, **how), nfe + int(back.nfe_each.sum())
            elif d.objective.coupling == "lowres":
                s = sample(
                    d.predict,
                    d.objective.source(own, noise),
                    **{**how, "cond": {**(cond or {}), "concat": own}},
                )
            elif cfg.init:
                s = edit(d.objective, d.predict, own, noise, strength=d.strength, mask=cells, **how)
            else:
                s = sample(d.predict, begin(d.objective, noise, float(d.grid[0])), **how)
            nfe += int(s.nfe_each.sum())
            image = to_uint8(d.vae.decode(s.x)).cpu()
            images.append(
                image if mask is None else torch.where(mask, image, pixels[index % len(pixels)])
            )
    return torch.cat(images), nfe


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        device = pick_device(cfg.device)
        print(
            json.dumps(
                {
                    **asdict(cfg),
                    **check(cfg),
                    "ckpt": str(find_checkpoint(cfg.ckpt)),
                    "device": str(device),
                },
                indent=1,
            )
        )
        return
    device = pick_device(cfg.device)
    d = load(cfg, device)
    labels, R = pick_labels(cfg.labels, d.classes, cfg.n), d.resolution
    if d.objective.coupling == "lowres":
        z, pixels = enlarge(cfg, d.objective, d.vae, R, device), None
    else:
        pixels = torch.stack([read_picture(path, R) for path in cfg.init]) if cfg.init else None
        z = None if pixels is None else d.vae.encode(pixels.to(device) / 127.5 - 1)
    mask = read_mask(cfg.mask, cfg.init, R) if cfg.mask else None
    out = Path(cfg.out or default_folder(cfg, d.path, d.meta))
    make_dir(out)  # after all that can be refused, before hours of work
    start = time.perf_counter()
    images, nfe = draw_images(cfg, d, labels, z, pixels, mask, device)
    seconds = time.perf_counter() - start
    for i, image in enumerate(images):
        save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), out / f"{cfg.seed + i:06d}.png")
    if cfg.npz:
        save_npz(images, Path(cfg.npz))
    if cfg.grid_image:
        save_grid(images, out / "grid.png")
    double = (
        f" ({d.evaluations / cfg.n:g} network evaluations: guidance)"
        if d.evaluations != nfe
        else ""
    )
    print(
        f"{cfg.n} images  {d.method}  NFE/image {nfe / cfg.n:g}{double}  {seconds / cfg.n:.3f} s/image  {cfg.n / seconds:.2f} images/s"
    )
    print(out / "grid.png" if cfg.grid_image else cfg.npz or out)
