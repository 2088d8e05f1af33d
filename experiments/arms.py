"""The arms of a comparison, its sizes, and the runs that they come to.

An arm is a few flags of train.py; all else is equal: network, data, order of images, noise, time
quantiles, optimizer. What differs between the arms, and is part of them: the path, the target, the
density of training times, the numbers that the network is fed as time, and where sampling starts
(D at t = 0.9937).
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import train
from harness.cli import UserError, closest, read_flags

ARMS: dict[str, dict[str, Any]] = {
    "D": {"objective": "ddpm"},
    "V": {"objective": "v"},
    "U": {"objective": "fm", "density": "uniform"},
    "F": {"objective": "fm"},
}
SAID = {
    "D": "DDPM: eps, linear table",
    "V": "v, cosine table",
    "U": "flow matching, uniform t",
    "F": "flow matching, logit-normal t",
}
ALIASES = {"ddpm": "D", "v": "V", "fm": "F"}
STAGES = ("standard", "fine", "stage2")
# Flags of train.py that the plan, --seeds and --stages say.
OURS = {
    *("out", "name", "resume", "log", "keep", "keep_every", "save_every", "eval_every", "seed"),
    *("preview_every", "fid_every", "fid_features", "data", "stage", "exclude_tags", "resolution"),
    *("holdout", "images", "lr", "decay", "init", "classes", "device", "model", "vae", "ema"),
}


class Sampler(NamedTuple):
    """How samples are drawn."""

    method: str
    steps: int
    eta: float | None = None

    @property
    def label(self) -> str:
        eta = "" if self.eta is None else f"-eta{self.eta:g}"
        return f"{self.method}{eta}-{self.steps}"


class Part(NamedTuple):
    """One training run. base: the arm whose fine run stage2 starts from, if it is another; rate:
    the learning rate, where that is what is asked about."""

    arm: str
    seed: int
    stage: str
    base: str = ""
    rate: float = 0.0

    @property
    def name(self) -> str:
        base = f"-on-{self.base}" if self.base else ""
        rate = f"-lr{self.rate:g}" if self.rate else ""
        return f"{self.arm}{base}-{self.seed}-{self.stage}{rate}"


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first run. `points` are shares of a stage's images at
    which samples are measured; the last is 1."""

    data: str
    resolution: int
    holdout: float
    images: tuple[int, int, int]
    points: tuple[tuple[float, ...], ...]
    # Measures of L_u over a stage.
    evaluations: int
    n: int
    features: str
    curve: Sampler
    sweep: tuple[int, ...]
    candidates: tuple[Sampler, ...]
    tuning_n: int
    # Learning rates that are tried, over which D's and F's spread is measured too.
    rates: tuple[float, ...]
    # Of the images of standard, for a run that the spread is measured of.
    rate_share: float
    tuning_seed: int
    # First seed of the second of two arms that are one.
    control_seed: int
    seeds: tuple[int, ...]
    # More flags of train.py.
    train: dict[str, Any]
    # Of the images of standard, for a run that a learning rate is chosen by.
    tuning_share: float = 1.0

    def images_of(self, stage: str) -> int:
        return self.images[STAGES.index(stage)]

    def points_of(self, stage: str) -> list[int]:
        """Images seen at which a stage is measured."""
        shares = self.points[STAGES.index(stage)]
        return [max(round(share * self.images_of(stage)), 1) for share in shares]


# "each at its best": what the tuning seed chooses from, at most 64 evaluations an image.
CANDIDATES = (
    Sampler("euler", 64),
    Sampler("heun", 16),
    Sampler("heun", 32),
    Sampler("dpmpp_2m", 16),
    Sampler("dpmpp_2m", 32),
    Sampler("dpmpp_2m", 64),
    Sampler("ddim", 64, 1.0),
)
CPU = Plan(
    data="toyfaces:8000",
    resolution=64,
    holdout=0.1,
    images=(40_000, 40_000, 10_000),
    points=((0.1, 1.0), (1.0,), (0.05, 0.1, 0.2, 0.5, 1.0)),
    evaluations=10,
    n=512,
    features="pca",
    curve=Sampler("dpmpp_2m", 16),
    sweep=(4, 8, 16, 32, 64),
    candidates=CANDIDATES,
    tuning_n=256,
    rates=(1e-3, 2e-3, 4e-3),
    rate_share=0.2,
    tuning_seed=1_000,
    control_seed=2_000,
    seeds=(0, 1, 2, 3, 4),
    train={"model": "tiny", "batch": 16, "ema": (0.1,), "workers": 0},
)
PLANS = {
    "dry": replace(
        CPU,
        data="toyfaces:320",
        resolution=32,
        holdout=0.25,
        images=(64, 64, 32),
        points=((0.5, 1.0), (1.0,), (0.5, 1.0)),
        evaluations=1,
        n=24,
        curve=Sampler("dpmpp_2m", 2),
        sweep=(1, 2),
        candidates=(Sampler("euler", 2), Sampler("heun", 1)),
        tuning_n=16,
        rates=(1e-3, 2e-3),
        rate_share=0.5,
        seeds=(0, 1),
        train={**CPU.train, "model": "nano"},
    ),
    "cpu": CPU,
    "gpu": replace(
        CPU,
        data="",
        resolution=256,
        holdout=0.02,
        images=(8_000_000, 8_000_000, 200_000),
        evaluations=20,
        n=10_000,
        features="inception",
        tuning_n=2_048,
        rates=(1e-4, 2e-4, 4e-4),
        rate_share=0.05,
        seeds=(0, 1, 2),
        train={
            "model": "toy-281m",
            "batch": 256,
            "optim": "adamw8bit",
            "ema": (0.1,),
        },
    ),
}


def read_arms(words: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """--objectives: names of ARMS, or NAME=FLAGS of train.py -> {name: its flags}."""
    arms: dict[str, dict[str, Any]] = {}
    for word in words:
        name, own, text = word.partition("=")
        name = ALIASES.get(name.strip(), name.strip())
        if name in arms:
            raise UserError(f"--objectives names {name} twice", do="Name each once.")
        arms[name] = flags_of(name, text) if own else preset(name)
    if len(arms) < 2:
        raise UserError(
            f"--objectives {','.join(words)}",
            wanted="two arms or more",
            do="Try --objectives D,F.",
        )
    return arms


def preset(name: str) -> dict[str, Any]:
    if name not in ARMS:
        known = [*ARMS, *ALIASES]
        raise UserError(
            f"--objectives: no arm {name!r}",
            do=f"{closest(name, known)}  Known: {', '.join(known)}, or NAME=FLAGS of train.py.",
        )
    return ARMS[name]


def flags_of(name: str, text: str) -> dict[str, Any]:
    """The flags of a user's own arm."""
    if not name.isalnum() or name in ARMS:
        raise UserError(
            f"--objectives {name}={text}",
            wanted="a name of letters and digits that no arm has",
            do="Try --objectives 'F,mine=--objective fm --shift 3'.",
        )
    given, _ = read_flags([train.Config], "", text.split())
    if taken := sorted(OURS & given.keys()):
        raise UserError(
            f"--objectives {name}={text}: {', '.join(taken)} is the same in all arms",
            do="Leave it out.",
        )
    return given


def train_config(
    plan: Plan, flags: dict[str, Any], part: Part, lr: float, runs: Path, tags: tuple[str, ...],
    device: str = "auto",
) -> train.Config:
    """The run that a part is, resolved. tags: what fine leaves out."""
    images, points = plan.images_of(part.stage), plan.points_of(part.stage)
    if part.rate:
        share = plan.tuning_share if part.seed == plan.tuning_seed else plan.rate_share
        images = max(round(share * images), 1)
        points = [images]
    every = math.gcd(*points)
    init = ""
    if part.stage == "stage2":
        init = str(runs / Part(part.base or part.arm, part.seed, "fine").name)
    return train.resolve(
        train.Config(
            **{"device": device, **plan.train, **flags},
            data=plan.data,
            resolution=plan.resolution,
            holdout=plan.holdout,
            stage=part.stage,
            exclude_tags=() if part.stage == "standard" else tags,
            images=images,
            lr=lr,
            # Under another one every curve falls at its end, and all crossings lie there.
            decay="constant",
            seed=part.seed,
            init=init,
            out=str(runs),
            name=part.name,
            eval_every=max(images // plan.evaluations, 1),
            preview_every=0,
            save_every=every,
            keep_every=every,
            keep=1,
        )
    )


def facts(plan: Plan) -> dict[str, Any]:
    """The plan as JSON."""
    return {field.name: getattr(plan, field.name) for field in fields(plan)}
