"""The networks of samplers.py --boost, which enlarge what another has drawn:

    enlarger = open_enlarger(cfg, gen)          # of samplers.py's Config and Generator; None: none
    images = enlarger(pixels, seeds, labels)    # (B, 3, h, w) fp32 -> uint8 (B, 3, H, W)
    print(enlarger.card())                      # where the time went

Between two networks pictures stay pixels in fp32: no rounding to 8 bits, and each network may have
an autoencoder of its own. The noise of the k-th network is drawn from a stream that the seed
spawns, and that of the base from the seed itself (diffusion/boosting.py).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ckpt import find_checkpoint, load_unet
from ckpt.configs import check_resolution
from diffusion.boosting import Boosted, Cost, Stage, boost
from diffusion.guidance import guided
from diffusion.sampling import DETERMINISTIC, Sample, check_finite
from harness.cli import UserError, flag
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

    def card(self) -> str:
        """A line a network: calls and seconds an image."""
        lines = []
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
    before = Before(gen.size, gen.vae, gen.classes, bool(cfg.labels))
    return enlarger_of(cfg, [load_stage(name) for name in cfg.boost], before, gen.device)


def enlarger_of(cfg: Any, loaded: list[Loaded], before: Before, device: torch.device) -> Enlarger:
    """Networks one after the other, the first of which is given `before`."""
    stages, sizes = [], []
    for each in loaded:
        stage, before = stage_of(each, before, device, cfg.dtype)
        stages.append(stage)
        sizes.append(before.size)
    how: dict[str, Any] = {"method": cfg.boost_method}
    if cfg.boost_method != "dopri5":
        how["steps"] = cfg.boost_steps
    return Enlarger(stages, sizes, how, [each.about() for each in loaded])


def open_stage(
    name: str, before: Before, device: torch.device, dtype: str
) -> tuple[Stage, Before]:
    """One network of --boost, and what it hands on."""
    return stage_of(load_stage(name), before, device, dtype)


def load_stage(name: str) -> Loaded:
    """UserError, if it does not enlarge."""
    path = find_checkpoint(name)
    net, meta = load_unet(path, dtype=torch.float32)
    said = meta.get("objective")
    objective = Objective(**said) if isinstance(said, dict) else None
    if objective is None or objective.coupling != "lowres":
        raise UserError(
            f"--boost {path} was not trained to enlarge pictures",
            do="Train one: python train.py --objective cfm.",
        )
    return Loaded(path, net, meta, objective, choose(meta=meta, network=str(path)))


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

    predict: Callable[..., tuple] = guided(objective, call)
    stage = Stage(
        start,
        predict,
        vae.encode,
        vae.decode,
        objective.lowres,
        objective.upsample,
        bool(net.cfg.num_classes) and before.asked,
        objective.t_max,
    )
    size = tuple(side * objective.lowres for side in before.size)
    return stage, before._replace(size=size, vae=vae)


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
    if net.in_channels != 2 * vae.channels or getattr(net, "context_dim", 0):
        raise UserError(
            f"--boost {path} takes {net.in_channels} channels of latents and pictures, and its "
            f"autoencoder makes {vae.channels}",
            wanted="twice as many, and no text",
            do="Take a network that python train.py --objective cfm has trained.",
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
