"""The networks of samplers.py --boost, which enlarge what another has drawn:

    enlarger = open_enlarger(cfg, gen)          # of samplers.py's Config and Generator; None: none
    images = enlarger(pixels, seeds, labels)    # (B, 3, h, w) fp32 -> uint8 (B, 3, H, W)
    print(enlarger.card(seconds))               # where they went

Between two networks pictures stay pixels in fp32: no rounding to 8 bits, and each network may have
an autoencoder of its own. The noise of the k-th network is drawn from a stream that the seed
spawns, and that of the base from the seed itself (diffusion/boosting.py).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ckpt import find_checkpoint, load_unet, open_unet
from ckpt.configs import check_resolution
from data import prompts
from diffusion.boosting import Boosted, Cost, Stage, boost
from diffusion.guidance import EVERYWHERE, guided
from diffusion.sampling import DETERMINISTIC, Sample, check_finite
from harness.cli import UserError, check_flags, field_of, flag
from harness.pictures import to_uint8
from harness.ranks import autocast
from objectives import Objective
from vae import AnyVAE, choose


@dataclass(frozen=True)
class Boosting:
    """The flags."""

    boost: tuple[str, ...] = flag(
        (),
        "cfm networks that enlarge what was drawn, one after the other",
        of="not --mask",
        head="enlarging",
    )
    boost_method: Literal[("dopri5", *DETERMINISTIC)] = flag(
        "dopri5", "solver of each", of="--boost"
    )
    boost_steps: int = flag(10, "of each", low=1, high=1e6, of="not --boost-method dopri5")


class Enlarger:
    """Stages one after the other, with what they have cost so far."""

    def __init__(
        self,
        stages: list[Stage],
        sizes: list[tuple[int, int]],
        how: dict[str, Any],
        about: list[dict[str, Any]],
    ):
        self.stages, self.sizes, self.how, self.about = stages, sizes, how, about
        self.costs: list[list[Cost]] = []

    def __call__(self, pixels: Tensor, seeds: list[int], labels: Tensor | None) -> Tensor:
        """uint8 images of pixels (B, 3, h, w) in [-1, 1]. Raises NonFinite where they are none."""
        return self.enlarge(pixels, seeds, labels)[0]

    def enlarge(
        self, pixels: Tensor, seeds: list[int], labels: Tensor | None = None
    ) -> tuple[Tensor, Boosted]:
        """The same, and what they are made from."""
        labels = None if labels is None else labels.to(pixels.device)
        large = boost(self.stages, pixels, seeds, labels, **self.how)
        self.costs.append(large.costs)
        images = to_uint8(large.pixels)
        nfe = sum(cost.nfe_each for cost in large.costs)
        s = Sample(large.pixels, int(nfe.max()), nfe, large.lost)
        check_finite(s, large.pixels, images, seeds)
        return images, large

    def sampled(self) -> dict[str, Any]:
        """What an enlarged image depends on, for metric cards."""
        return {"boost": self.about, "boost how": self.how}

    def card(self, seconds: float) -> str:
        """A line a network: calls and seconds an image. seconds: of all that was drawn."""
        images = sum(len(costs[0].nfe_each) for costs in self.costs)
        own = sum(sum(cost[1:]) for costs in self.costs for cost in costs)
        lines = [f"base  s/image: network and decode {(seconds - own) / images:.3f}"]
        for size, costs in zip(self.sizes, zip(*self.costs)):
            nfe = torch.cat([cost.nfe_each for cost in costs]).double()
            parts = (sum(cost.enlarge for cost in costs), sum(cost.network for cost in costs))
            parts += (sum(cost.decode for cost in costs),)
            enlarge, network, decode = (seconds / len(nfe) for seconds in parts)
            lines.append(
                f"boost to {size[1]}x{size[0]}  NFE/image {float(nfe.mean()):g}  s/image: resize "
                f"and encode {enlarge:.3f}  network {network:.3f}  decode {decode:.3f}"
            )
        return "\n".join(lines)


class Before(NamedTuple):
    """What a network of --boost is given: by a network, or by the one of --boost before it."""

    size: tuple[int, int]
    vae: AnyVAE | None  # None: they are real pictures
    classes: list[str]
    asked: bool  # for classes
    flags: Any = None  # samplers.Sampling: what is asked for, and how strongly
    strength: float = 1.0  # of guidance


class Loaded(NamedTuple):
    """A network of --boost and its file."""

    path: Path
    net: torch.nn.Module
    meta: dict[str, Any]
    objective: Objective
    vae: AnyVAE

    def about(self) -> dict[str, Any]:
        """What its pictures depend on."""
        meta = {name: self.meta.get(name) for name in ("fingerprint", "unet")}
        return {**meta, "vae": self.vae.fingerprint, "objective": asdict(self.objective)}


def open_enlarger(cfg: Any, gen: Any) -> Enlarger | None:
    """Open --boost. UserError for what does not follow from one another."""
    if not cfg.boost:
        return None
    # What the base is told as a number, or is led away from by another network, is its own.
    own = prompts.net_guided(gen.net.cfg) or cfg.guide_ckpt
    strength = 1.0 if own else cfg.cfg
    before = Before(gen.size, gen.vae, gen.classes, bool(cfg.labels), cfg, strength)
    return enlarger_of(cfg, [load_stage(name) for name in cfg.boost], before, gen.device)


def enlarger_of(cfg: Any, loaded: list[Loaded], before: Before, device: torch.device) -> Enlarger:
    """Networks one after the other, the first of which is given `before`."""
    stages, sizes, about = [], [], []
    for each in loaded:
        stage, before = stage_of(each, before, device, cfg.dtype)
        stages.append(stage)
        guided_by = {} if before.strength == 1.0 or not stage.told else {"cfg": before.strength}
        about.append(each.about() | guided_by)
        sizes.append(before.size)
    how: dict[str, Any] = {"method": cfg.boost_method}
    if cfg.boost_method != "dopri5":
        how["steps"] = cfg.boost_steps
    return Enlarger(stages, sizes, how, about)


def without_base(cfg: Any) -> Any:
    """samplers.py's Config, if it names no --ckpt: the first network of --boost enlarges --init,
    walked as --boost-method says, and those after it enlarge what it has drawn."""
    if cfg.ckpt:
        return cfg
    if not (cfg.boost and cfg.init):
        raise UserError("--ckpt is required", do="See --help; only --init with --boost needs none.")
    first, *rest = cfg.boost
    check_enlarges(first, open_unet(first).meta)
    own: dict[str, Any] = {"ckpt": first, "boost": tuple(rest)}
    if not cfg.method:
        own["method"] = cfg.boost_method
        if cfg.boost_method != "dopri5":
            own["steps"] = cfg.steps or cfg.boost_steps
    if not rest:
        own |= {name: field_of(Boosting, name).default for name in ("boost_method", "boost_steps")}
    cfg = replace(cfg, **own)
    check_flags(cfg)
    return cfg


def open_stage(
    name: str, before: Before, device: torch.device, dtype: str
) -> tuple[Stage, Before]:
    """One network of --boost, and what it hands on."""
    return stage_of(load_stage(name), before, device, dtype)


def load_stage(name: str) -> Loaded:
    """UserError, if it does not enlarge."""
    path = find_checkpoint(name)
    net, meta = load_unet(path, dtype=torch.float32)
    objective = check_enlarges(path, meta)
    return Loaded(path, net, meta, objective, choose(meta=meta, network=str(path)))


def check_enlarges(path: Path | str, meta: dict[str, Any]) -> Objective:
    """What a network was trained to say; UserError, if it does not enlarge."""
    said = meta.get("objective")
    objective = Objective(**said) if isinstance(said, dict) else None
    if objective is None or objective.coupling != "lowres":
        raise UserError(
            f"--boost {path} was not trained to enlarge pictures",
            do="Train one: python train.py --objective cfm.",
        )
    return objective


def stage_of(
    loaded: Loaded, before: Before, device: torch.device, dtype: str
) -> tuple[Stage, Before]:
    """What a network does with what it is given, and what it hands on."""
    path, net, meta, objective, vae = loaded
    check_follows(path, net.cfg, meta, objective, vae, before)
    net, vae = net.to(device).eval(), vae.to(device)

    def call(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        with autocast(device, dtype):
            return net(x, t, **cond)

    def start(low: Tensor, noise: Tensor) -> Tensor:
        return objective.prior(objective.source(low, noise))

    told, guidance = telling(loaded, before, device)
    predict: Callable[..., tuple] = guided(objective, call, **guidance)
    stage = Stage(
        start,
        predict,
        vae.encode,
        vae.decode,
        objective.lowres,
        objective.upsample,
        told,
        objective.t_max,
    )
    size = tuple(side * objective.lowres for side in before.size)
    return stage, before._replace(size=size, vae=vae)


def telling(
    loaded: Loaded, before: Before, device: torch.device
) -> tuple[Callable[[Tensor], dict[str, Tensor]] | None, dict[str, Any]]:
    """What a network is told of labels (Stage.told), and how it is guided (of guided())."""
    net, flags, path = loaded.net.cfg, before.flags, str(loaded.path)
    guidance: dict[str, Any] = {}
    if flags and before.strength != 1.0:
        guidance = {"cfg": before.strength, "rescale": flags.cfg_rescale}
        guidance["interval"] = flags.cfg_interval or EVERYWHERE
    if not prompts.reads_text(net):
        asked = bool(net.num_classes and before.asked)
        return (lambda y: {"y": y}, guidance) if asked else (None, {})
    if flags is None:
        raise ValueError(f"{path} reads texts: wanted flags that say some.")
    asked = flags.prompt is not None or bool(flags.context)
    own = replace(flags, ckpt=path, prompt=flags.prompt if asked else "")
    size = tuple(side * loaded.objective.lowres for side in before.size)
    told = prompts.tell(own, net, loaded.meta, size, path, [], device).to(device)
    if not asked:
        return lambda y: told.rows(torch.full_like(y, -1)), {}
    return told.rows, {**guidance, "null": told.null}


def check_follows(
    path: Any, net: Any, meta: dict[str, Any], objective: Objective, vae: AnyVAE, before: Before
) -> None:
    """UserError, if a network of config `net` cannot enlarge what comes before it."""
    factor, (height, width) = objective.lowres, before.size
    own = meta.get("resolution", 0)
    if own and factor * max(height, width) != own:
        raise UserError(
            f"--boost {path} enlarges {factor} times to {own} px",
            got=f"pictures of {width}x{height}",
            wanted=f"a side of {own // factor}",
            do="Take one of another factor, or put another before it.",
        )
    if net.in_channels != 2 * vae.channels:
        raise UserError(
            f"--boost {path} takes {net.in_channels} channels of latents and pictures, and its "
            f"autoencoder makes {vae.channels}",
            wanted="twice as many",
            do="Take a network that python train.py --objective cfm has trained.",
        )
    unit = vae.factor * net.multiple
    if any(side * factor % unit for side in before.size):
        raise UserError(
            f"--boost {path} enlarges {factor} times",
            got=f"pictures of {width}x{height}",
            wanted=f"{factor} times a side to be a multiple of {unit}",
            do="Name a base of another size, or draw it so with --resolution.",
        )
    for side in before.size:
        check_resolution(net, vae.factor, side * factor)
    if before.asked and net.num_classes and meta.get("classes") != before.classes:
        raise UserError(
            f"--boost {path} was trained with other classes than the network before it",
            do="Leave --labels out, or take one with the same classes.",
        )
    if objective.upsample == "psu":
        return
    if before.vae is not None and vae.fingerprint != before.vae.fingerprint:
        raise UserError(
            f"--boost {path} enlarges latents (--upsample {objective.upsample}), and those of its "
            "autoencoder are not those of the network before it",
            do="Take one with the same autoencoder, or one trained with --upsample psu.",
        )
    if height % vae.factor or width % vae.factor:
        raise UserError(
            f"--boost {path} enlarges latents, and {width}x{height} pixels have none",
            wanted=f"sides that are multiples of {vae.factor}",
            do="Take another --resolution.",
        )
