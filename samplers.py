"""Draw samples:  python samplers.py --ckpt runs/toyfaces-fm-standard --n 16 --steps 25

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
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ckpt import find_checkpoint, fingerprint, load_unet
from ckpt.configs import Space, check_resolution, space_of
from ckpt.lora import merge_unet, read_loras
from ckpt.meaning import objective_from, said_table
from ckpt.mmdit_configs import usual_shift
from ckpt.usual import as_usual, usual_side
from data import prompts
from data.boosts import Boosting, Enlarger, open_enlarger, without_base
from data.images import EXTENSIONS
from data.inits import Init, read_init
from data.tags import pick_labels
from data.uncertainty import Uncertain, open_estimator
from diffusion.editing import begin, edit
from diffusion.guidance import EVERYWHERE, guided
from diffusion.sampling import (
    DETERMINISTIC,
    METHODS,
    NonFinite,
    Sample,
    check_finite,
    draw,
    generators,
    invert,
    sample,
    slerp,
)
from diffusion.schedules import has_rows
from diffusion.solvers import ROWS, time_grid
from harness import likeness
from harness.cli import UserError, check_flags, cli, field_of, flag, shown
from harness.files import safe_name
from harness.memory import check_drawing
from harness.pictures import check_set, grid_of, progress, save_all, to_uint8
from harness.ranks import Ranks, autocast, pick_device, precision
from objectives import Net, Objective
from text import parse_size
from vae import AnyVAE, choose

GRIDS = ("", "uniform", "karras", "logsnr", *ROWS)
# What a method does if nobody says more.
USUAL = {"steps": 25, "grid": "uniform", "shift": 1.0}
USUAL_OF = {"lcm": {"steps": 4, "grid": ""}}  # "": rows of its table, if it has one


# ---- from seeds to images -----------------------------------------------------------------------


class Drawn(NamedTuple):
    images: Tensor  # uint8 (B, 3, H, W)
    nfe: float  # calls of predict that an image took part in, on average
    evaluations: float  # evaluations of networks, an image: guidance asks two a call
    pixels: Tensor  # (B, 3, H, W) in [-1, 1], as they were decoded


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
    loras: list[str] = []  # what changed its weights, and how strongly
    walk = staticmethod(sample)  # from noise to a sample: data/uncertainty.py puts its own there

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
        told: prompts.Conditions | None = None,
    ):
        self.objective, self.vae, self.latent_shape = objective, vae, latent_shape
        self.device, self.dtype, self.classes = device, dtype, list(classes)
        self.told = told and told.to(device)
        self.size = tuple(side * vae.factor for side in latent_shape[1:])
        self.resolution = self.size[0]
        self.evaluations = 0  # of networks, since it was made
        self.how = self.solver  # what sample() is given, if a call says nothing else
        self.net, net = net, self.counted(net)
        weak = guided(guide[0], self.counted(guide[1])) if guide else None
        self.plain = guided(objective, net)  # without guidance, for inversion
        null = None if told is None else self.told.null
        self.predict = guided(
            objective, net, cfg, rescale=rescale, interval=interval, guide=weak, null=null
        )

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
        """What a network is told beside x: labels (B,), -1 = none, and for cfm low (B, C, h, w).
        Of a network that reads text they are numbers of prompts."""
        cond = {}
        if self.told is not None:
            cond = self.told.rows(torch.as_tensor(labels).to(self.device))
        elif labels is not None:
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
        if low is not None:
            noise = self.objective.source(low, noise)
        x = begin(self.objective, noise, start)
        cond = self.cond(labels, low)
        walked = {"seeds": seeds, "t_start": start, "cond": cond, "callback": callback}
        s = self.walk(self.predict, x, **walked, **how)
        return self.drawn(s, before, seeds)

    def images_on(
        self,
        ranks: Ranks,
        seeds: list[int],
        labels: list[int] | None = None,
        *,
        low: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """uint8 images (B, 3, H, W) of all seeds on every rank; each rank draws its share.

        What images() raises, every rank raises.
        """
        share = slice(ranks.rank, None, ranks.world)
        size = len(seeds), 3, *self.size
        images = torch.zeros(size, dtype=torch.int32, device=self.device)
        # Where a network broke, 1 + t.
        broken = torch.zeros(len(seeds), device=self.device)
        if seeds[share]:
            own = None if labels is None else labels[share]
            start = None if low is None else low[share]
            try:
                drawn = self.images(seeds[share], own, low=start, **how)
            except NonFinite as error:
                drawn, times = error, [1 + error.lost.get(seed, -1) for seed in seeds[share]]
                broken[share] = broken.new_tensor(times)
            images[share] = drawn.images.int()
        # The others' rows are zero.
        images = ranks.all_reduce(images).to(torch.uint8)
        times = ranks.all_reduce(broken).tolist()
        if any(times):
            raise NonFinite({seed: t - 1 for seed, t in zip(seeds, times) if t}, images)
        return images

    def drawn(self, s: Sample, before: int, seeds: list[int]) -> Drawn:
        """Samples as images; `before`: the network evaluations until they were begun. Raises
        NonFinite where they are none."""
        pixels = self.vae.decode(s.x)
        images = to_uint8(pixels)
        check_finite(s, pixels, images, seeds)
        nfe = float(s.nfe_each.double().mean())
        return Drawn(images, nfe, (self.evaluations - before) / len(images), pixels)


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
    # All seeds of a command fit 63 bits, for there are at most 10^9 of them.
    seed: int = flag(0, "image i has seed + i, whatever the batch", low=0, high=2**63 - 10**9)
    labels: tuple[str, ...] = flag(
        (), "class names or numbers, cycled over the images; none = unconditional"
    )
    prompt: str | None = flag(
        None, "what to draw, in words, or @FILE: a line each, cycled over the images"
    )
    context: str = flag(
        "", "FILE[:ROW] of text embeddings instead, cycled over its rows", of="not --prompt"
    )
    batch: int = flag(64, "images at a time", low=1, high=1e6)
    device: str = flag("auto", "auto | cpu | cuda | cuda:1")
    dtype: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "of the network; states and times stay fp32"
    )

    negative: str | None = flag(
        None,
        "what --cfg leads away from; default the text of nothing",
        of=("--prompt", "--cfg"),
        head="prompts",
    )
    text: str = flag(
        "", "text encoders: FILE, FILE,FILE or a folder; default those of --ckpt", of="--prompt"
    )
    chunks: int = flag(1, "pieces of 75 tokens of a prompt", low=1, high=64, of="--prompt")
    prompt_weights: Literal["none", "a1111", "comfy"] = flag(
        "none", "as whose program (word:1.3) is read", of="--prompt"
    )
    clip_skip: int = flag(
        0, "1 = the last state, 2 = the one before; 0 = own", low=0, high=64, of="--prompt"
    )

    method: Literal[("", *METHODS)] = flag("", head="solver")
    steps: int | None = flag(
        None,
        "25 of heun if neither is given; lcm 4; a progressive student brings both",
        low=1,
        high=1e6,
        of="not --method dopri5",
    )
    grid: Literal[GRIDS] = flag(
        "", "times; the last four: rows of a VP table", of="not --method dopri5"
    )
    shift: float | None = flag(
        None,
        "of the time grid; > 1 = more steps near the noise",
        above=0,
        high=1e3,
        of="not --method dopri5",
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
    rtol: float | None = flag(
        None, "dopri5: relative error, 0.001", above=0, high=1, of=takers("rtol")
    )
    atol: float | None = flag(
        None, "dopri5: absolute error, 0.0001", above=0, high=1, of=takers("atol")
    )
    max_nfe: int | None = flag(
        None,
        "dopri5: calls before it gives up with a warning, 1000",
        low=8,
        high=1e9,
        of=takers("max_nfe"),
    )
    whole_batch: bool = flag(
        False,
        "dopri5: one step size for all images of a batch, as torchdiffeq",
        of=takers("whole_batch"),
    )

    cfg: float = flag(
        1.0,
        "null + cfg * (conditional - null); 1 = off, 0 = unconditional",
        low=-1e3,
        high=1e3,
        off=1.0,
        head="guidance",
    )
    cfg_interval: tuple[float, ...] = flag(
        (), "LO,HI: only while LO < sigma <= HI, sigma = t / (1 - t)", low=0, high=1e9, of="--cfg"
    )
    cfg_rescale: float = flag(
        0.0, "draw the standard deviation back to the conditional one's", low=0, high=1, of="--cfg"
    )
    lora: tuple[str, ...] = flag(
        (), "FILE[:STRENGTH] that changes the network and its encoders", of="--prompt"
    )
    guide_ckpt: str = flag(
        "", "autoguidance: a worse network of the same latents instead of null", of="--cfg"
    )

    objective: Literal["", "fm", "eps", "v", "x0"] = flag(
        "",
        "what the network was trained to output",
        head="what files of other programs cannot say; a file that says it must agree",
    )
    table: Literal["", "linear", "cosine", "scaled_linear"] = flag(
        "", "noise schedule of eps, v, x0; LDM's yaml calls scaled_linear linear"
    )
    betas: str = flag("", "… or START,END,SCHEDULE: any betas, as 0.0015,0.0195,scaled_linear")
    zero_snr: bool = flag(False, "the schedule ends in pure noise (zero terminal SNR)")
    vae: str = flag(
        "",
        "autoencoder: pixel | pixel:N | sd | sdxl | flux1 | flux2 | FILE | sdxl:FILE; "
        "3 channels are pixels",
    )
    resolution: int = flag(0, "pixels; default as trained", low=0, high=8192)
    size: str = flag("", "WIDTHxHEIGHT, of pictures that are no squares")
    num_heads: int = flag(0, "attention heads …", low=0, high=1e4)
    num_head_channels: int = flag(0, "… or channels a head", low=0, high=1e4)
    attention_order: Literal["", "legacy", "new"] = flag("", "of the qkv rows")


def check(cfg: Sampling) -> None:
    """What can be said of the flags alone."""
    check_flags(cfg)
    interval = cfg.cfg_interval
    if interval and not (len(interval) == 2 and interval[0] < interval[1]):
        raise UserError(
            f"--cfg-interval {shown(interval)}",
            wanted="LO,HI with 0 <= LO < HI",
            do="Try --cfg-interval 0.3,5.",
        )


def options_of(method: str) -> dict[str, Any]:
    """What can be said of a method's steps, with its defaults; each is a flag of its name."""
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(METHODS[method]).parameters.items()
        if parameter.default not in (parameter.empty, None)
    }
    return own if method == "dopri5" else {**USUAL, **USUAL_OF.get(method, {}), **own}


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
    how = dict(solver)
    steps = how.pop("steps", 1)
    shift = how.pop("shift", 1.0)
    own = "lcm" if has_rows(objective.table) else "uniform"
    kind = how.pop("grid", "uniform") or own
    start = strength * objective.t_max
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
    meta, unsaid = as_usual(meta, cfg.table or cfg.betas)
    if unsaid:
        print(f"note: {what} does not say its {unsaid}: as all of its family", file=sys.stderr)
    objective = objective_of(cfg, meta, what)
    vae = vae_of(cfg, net, meta, objective, what)
    if cfg.size and cfg.resolution:
        raise UserError("--size and --resolution", wanted="one of them", do="Leave one out.")
    sides = parse_size(cfg.size) if cfg.size else ()
    side = cfg.resolution or meta.get("resolution", 0) or usual_side(meta, objective.target)
    sides = sides or (side, side)
    if not all(sides):
        raise UserError(
            f"{what} does not say its own resolution",
            do=f"Add --resolution N, a multiple of {vae.factor * net.multiple}.",
        )
    for side in sides:
        check_resolution(net, vae.factor, side)
    h, w = (vae.latent_shape(side)[1] for side in sides)
    return objective, vae, (vae.channels, h, w)


def objective_of(cfg: Sampling, meta: dict[str, Any], what: str) -> Objective:
    """What a network was trained to output."""
    if not meta.get("objective"):
        raise UserError(
            f"{what} does not say what its network was trained to output",
            do="Add --objective fm, eps, v or x0 (guided-diffusion: eps).",
        )
    return objective_from(meta, what, said_table(cfg.table, cfg.betas, cfg.zero_snr), cfg.zero_snr)


def vae_of(
    cfg: Sampling, net: Any, meta: dict[str, Any], objective: Objective, what: str
) -> AnyVAE:
    """The autoencoder whose latents a network knows."""
    name = cfg.vae or prompts.own_vae(cfg.ckpt, Path(what), meta)
    if not name and not {"vae", "latent"} & set(meta) and net.in_channels == 3:
        name = "pixel"
    vae = choose(name, meta=meta, network=what)
    channels = vae.channels
    takes = 2 * channels if objective.coupling == "lowres" else channels
    if takes != net.in_channels or net.out_channels not in (channels, 2 * channels):
        raise UserError(
            f"--vae {vae.name} makes {channels} channels, but {what} takes {net.in_channels} and "
            f"gives {net.out_channels}",
            do="Name the autoencoder that it was trained with.",
        )
    return vae


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


def check_network(cfg: Sampling, net: Any, meta: dict[str, Any], vae: AnyVAE, what: str) -> None:
    """Refuse flags that a network of config `net` cannot answer; warn of what it may not know."""
    asks = cfg.labels or cfg.guide_ckpt or cfg.context or cfg.prompt is not None
    if cfg.cfg != 1.0 and not asks:
        none = "" if net.num_classes else ", and this checkpoint was trained without classes"
        raise UserError(
            f"--cfg {cfg.cfg} needs --labels: guidance is away from the unconditional prediction"
            f"{none}",
            do="Add --labels, or leave --cfg out." if net.num_classes else "Leave --cfg out.",
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


def as_authors(
    cfg: Sampling, net: Any, meta: dict[str, Any], latent_shape: tuple[int, int, int], what: str
) -> Sampling:
    """The flags, with the shift of times of an SD3 or Flux as others wrote it, if none is given."""
    solver = solver_of(cfg)
    joint = meta.get("family") and getattr(net, "joint", 0)
    own = cfg.shift is not None or solver["method"] == "dopri5" or cfg.grid not in ("", "uniform")
    if own or not joint:
        return cfg
    shift = usual_shift(net, *latent_shape[1:], solver["steps"])
    print(f"note: {what} is drawn with --shift {shift:.4g}, as by its authors", file=sys.stderr)
    return replace(cfg, shift=shift)


def open_generator(cfg: Sampling, device: torch.device) -> Generator:
    """A checkpoint and the flags, as what draws. Refuses what does not fit, before it draws."""
    check(cfg)
    path = find_checkpoint(cfg.ckpt)
    loras = read_loras(cfg.lora)
    heads = ("num_heads", "num_head_channels", "attention_order", "objective")
    known = {name: getattr(cfg, name) for name in heads if getattr(cfg, name)}
    net, meta = load_unet(path, dtype=torch.float32, **known)
    asks = prompts.check_asked(net.cfg, cfg, str(path))
    for lora, strength in loras:
        merge_unet(net, lora, strength)
    objective, vae, latent_shape = describe(cfg, net.cfg, meta, str(path))
    made = meta.get("config", {})
    if not cfg.method and made.get("mode") == "progressive":
        # It knows the times of its own steps only (distill.py).
        cfg = replace(cfg, method="euler", steps=cfg.steps or made["end_steps"])
    check_network(cfg, net.cfg, meta, vae, str(path))
    cfg = as_authors(cfg, net.cfg, meta, latent_shape, str(path))
    size = latent_shape[1] * vae.factor, latent_shape[2] * vae.factor
    told = prompts.tell(cfg, net.cfg, meta, size, str(path), loras, device) if asks else None
    told, strength = prompts.with_strength(told, net.cfg, cfg, str(path))
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
        cfg=strength,
        rescale=cfg.cfg_rescale,
        interval=cfg.cfg_interval or EVERYWHERE,
        guide=guide,
        told=told,
    )
    gen.path, gen.meta, gen.solver = path, meta, solver_of(cfg)
    gen.how = walk_of(gen.solver, objective)
    gen.loras = [f"{lora.fingerprint} {strength:g}" for lora, strength in loras]
    gen.sampled = sampled_of(cfg, gen, guide_fingerprint)
    return gen


def asked(cfg: Sampling, gen: Generator, n: int | None = None) -> Tensor | None:
    """The label or prompt of each of n images (n,), cycled; of one image each, if n is not given;
    None where nothing is asked for."""
    if gen.told is None:
        return pick_labels(cfg.labels, gen.classes, len(cfg.labels) if n is None else n)
    k = len(gen.told)
    return torch.arange(k if n is None else n) % k


def sampled_of(cfg: Sampling, gen: Generator, guide: str) -> dict[str, Any]:
    """Everything an image of a seed depends on, but for the weights and what they mean. Metric
    cards are compared by these keys."""
    sampled = {
        **gen.solver,
        "t_start": float(gen.how["grid"][0]),
        "cfg": cfg.cfg,
        "labels": list(cfg.labels),
        "dtype": precision(gen.device, cfg.dtype),
        "device": gen.device.type,
    }
    labels = pick_labels(cfg.labels, gen.classes, len(cfg.labels))
    if gen.classes:
        used = "unconditional," if labels is None else len(labels.unique())
        sampled["classes"] = f"{used} of {len(gen.classes)}"
    more = {
        "batch": cfg.batch if cfg.whole_batch else 0,
        "cfg interval": list(cfg.cfg_interval),
        "cfg rescale": cfg.cfg_rescale,
        "guide": guide,
        "size": cfg.size,
        "prompts": prompts.read_prompts(cfg.prompt),
        "context": fingerprint(gen.told.cond) if cfg.context else "",
        "negative": [] if cfg.negative is None else [cfg.negative],
        "prompt weights": cfg.prompt_weights.replace("none", ""),
        "clip skip": cfg.clip_skip,
        "lora": gen.loras,
        "chunks": cfg.chunks - 1,
    }
    return sampled | {key: value for key, value in more.items() if value}


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Uncertain, Boosting, Sampling):
    ckpt: str = flag(
        "",
        "a U-Net's file, a run's folder (newest, first EMA), a diffusers folder, "
        "hf:org/name[/file]; none: --boost enlarges --init",
    )
    n: int = flag(16, "images", low=1, high=1e9, head="what to draw")
    like: str = flag("", "a PNG that this drew: its settings, where no flag says others")
    init: tuple[str, ...] = flag((), "images to start from, cycled; a cfm network enlarges them")
    strength: float | None = flag(
        None,
        "0 = the image itself, 1 = nothing of it; 0.6, or with --mask or --invert 1",
        low=0,
        high=1,
        of=("--init", "not --interpolate"),
    )
    mask: str = flag(
        "",
        "image of --init's size: white is painted anew, black is kept",
        of=("--init", "not --interpolate", "not --invert"),
    )
    invert: bool = flag(
        False,
        "the noise is --init's own, found by going backwards",
        of=("--init", "not --interpolate"),
    )
    interpolate: bool = flag(
        False,
        "n images between the two of --init: their noise by inversion, along a great circle",
        of="--init",
    )
    out: str = flag("", "folder; default samples/<run>-<settings>", writes="folder", head="output")
    npz: str = flag(
        "", "also FILE: arr_0 uint8 (n, H, W, 3), for guided-diffusion's evaluator", writes="file"
    )
    grid_image: bool = flag(True, "OUT-grid.png, beside the folder: all images")


def check_command(cfg: Config) -> None:
    """What can be said of the flags alone."""
    check(cfg)
    if cfg.interpolate and len(cfg.init) != 2:
        raise UserError(
            f"--init {shown(cfg.init)}",
            wanted="two images, to --interpolate between",
            do="Write --init A.png,B.png.",
        )
    if cfg.interpolate and len(cfg.labels) > 1:
        raise UserError(
            f"--labels {shown(cfg.labels)}",
            wanted="one for all images of --interpolate",
            do="Name one class.",
        )
    method = cfg.method or "heun"
    if (cfg.invert or cfg.interpolate) and (method not in DETERMINISTIC or cfg.eta):
        raise UserError(
            f"--method {method}{' --eta' if cfg.eta else ''} cannot be inverted",
            do=f"Use one of {', '.join(DETERMINISTIC)}, with eta 0.",
        )


def draw_images(
    cfg: Config,
    gen: Generator,
    labels: Tensor | None,
    init: Init | None,
    how: dict[str, Any],
    enlarger: Enlarger | None = None,
) -> tuple[Tensor, int]:
    """All images, uint8 (n, 3, R, R), and the NFE of all together, without --boost's."""
    images, nfe, ends = [], 0, None
    with tqdm(total=cfg.n, unit="img", disable=None) as bar:
        if cfg.interpolate:
            both = None if labels is None else labels[:1].expand(2)
            ends = invert(gen.plain, init.z, how["grid"], method=how["method"], cond=gen.cond(both))
            nfe += int(ends.nfe_each.sum())
        for lo in range(0, cfg.n, cfg.batch):
            index = torch.arange(lo, min(lo + cfg.batch, cfg.n))
            y = None if labels is None else labels[index]
            how = {**how, "callback": progress(bar, len(index))}
            seeds = (cfg.seed + index).tolist()
            if init is None:
                drawn = gen.images(seeds, y, **how)
            elif init.pixels is None:
                drawn = gen.images(seeds, y, low=init.z[index % len(init.z)], **how)
            else:
                drawn = edited(cfg, gen, index, y, init, ends, how)
            large = enlarger(drawn.pixels, seeds, y) if enlarger else drawn.images
            images.append(large.cpu())
            nfe += round(drawn.nfe * len(index))
    return torch.cat(images), nfe


def edited(
    cfg: Config,
    gen: Generator,
    index: Tensor,
    labels: Tensor | None,
    init: Init,
    ends: Sample | None,
    how: dict[str, Any],
) -> Drawn:
    """The images of `index` (B,) that --init becomes; ends: of --interpolate."""
    rows, before, seeds = index % len(init.z), gen.evaluations, (cfg.seed + index).tolist()
    z, cond = init.z[rows], gen.cond(labels)
    how = {**how, "seeds": seeds, "cond": cond}
    if ends is not None:
        share = torch.linspace(0, 1, cfg.n)[index]
        s = sample(gen.predict, slerp(ends.x[:1], ends.x[1:], share), **how)
    elif cfg.invert and init.strength:
        back = invert(gen.plain, z, how["grid"], method=how["method"], cond=cond)
        s = sample(gen.predict, back.x, **how)
        s = s._replace(nfe_each=s.nfe_each + back.nfe_each)
    else:
        edits = {"strength": init.strength, "mask": init.cells}
        s = edit(gen.objective, gen.predict, z, gen.noise(seeds), **edits, **how)
    drawn = gen.drawn(s, before, seeds)
    if init.mask is None:
        return drawn
    return drawn._replace(images=torch.where(init.mask, drawn.images.cpu(), init.pixels[rows]))


def default_folder(cfg: Config, path: Path, meta: dict[str, Any]) -> str:
    """Where samples of a file go if nobody says: what it is, its weights, the settings."""
    same = path.name.startswith("diffusion_pytorch_model.")  # all of diffusers' have that name
    stem = path.resolve().parent.name if same else path.stem
    parts = [safe_name(meta[key]) for key in ("run", "images") if key in meta]
    return f"samples/{'-'.join([*parts, stem, meta['fingerprint'][:6]])}{likeness.settings(cfg)}"


def said(cfg: Config, gen: Generator, size: tuple[int, int], seed: int) -> dict[str, str]:
    """The texts in a seed's PNG of size (height, width)."""
    i, own = seed - cfg.seed, {}
    if cfg.labels:
        own["labels"] = (cfg.labels[i % len(cfg.labels)],)
    if cfg.prompt is not None:
        lines = prompts.read_prompts(cfg.prompt)
        own["prompt"] = lines[i % len(lines)]
    one = replace(cfg, n=1, seed=seed, **own)
    return likeness.chunks(one, gen.solver, size, gen.path.stem, gen.meta["fingerprint"])


def main() -> None:
    cfg, dry_run = likeness.parse_like(Config, __doc__)
    cfg = without_base(cfg)
    check_command(cfg)
    device = pick_device(cfg.device)
    if dry_run:
        resolved = {**asdict(cfg), **solver_of(cfg), "method": cfg.method}
        resolved |= {"ckpt": str(find_checkpoint(cfg.ckpt)), "device": str(device)}
        print(json.dumps(resolved, indent=1))
        return
    gen = open_generator(cfg, device)
    likeness.check_same(cfg.like, gen.meta["fingerprint"])
    check_drawing(gen, cfg.batch, cfg.n)
    labels = asked(cfg, gen, cfg.n)
    init = read_init(cfg, gen)
    enlarger, estimator = open_enlarger(cfg, gen), open_estimator(cfg, gen)
    how = walk_of(gen.solver, gen.objective, init.strength if init else 1.0)
    out = Path(cfg.out or default_folder(cfg, gen.path, gen.meta))
    check_set(out, EXTENSIONS, cfg.grid_image)  # all that can be refused, before hours of work
    start = time.perf_counter()
    images, nfe = draw_images(cfg, gen, labels, init, how, enlarger)
    seconds = time.perf_counter() - start
    texts = partial(said, cfg, gen, images.shape[2:])
    save_all(images, out, cfg.seed, cfg.npz, cfg.grid_image, texts)
    line = f"{cfg.n} images  {gen.solver['method']}  NFE/image {nfe / cfg.n:g}"
    if gen.evaluations != nfe:
        line += f" ({gen.evaluations / cfg.n:g} network evaluations: guidance)"
    print(f"{line}  {seconds / cfg.n:.3f} s/image  {cfg.n / seconds:.2f} images/s")
    if enlarger:
        print(enlarger.card(seconds))
    if estimator:
        print(estimator.save(images, out, cfg.seed, cfg.grid_image))
    print(grid_of(out) if cfg.grid_image else cfg.npz or out)


if __name__ == "__main__":
    cli(main)
