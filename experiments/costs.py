"""What a comparison will cost, said before it starts: images, evaluations, arithmetic, disk."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.arms import STAGES, Part, Plan
from harness.cli import UserError
from model import PRESETS, build

# Arithmetic of an update of all weights, in evaluations of the network.
TRAINING = 3
# Of a GPU, to turn arithmetic into hours; assumed, not measured.
TFLOPS = 200


@dataclass(frozen=True)
class Cost:
    """Of the parts that have no card yet."""

    runs: int
    images: int  # trained on
    evaluations: int  # of the network, for samples
    flops: float  # of all
    disk: int  # bytes at the fullest

    def lines(self) -> str:
        hours = self.flops / TFLOPS / 1e12 / 3600
        return (
            f"{self.runs} runs to make: {self.images:,} images to train on, {self.evaluations:,} "
            f"evaluations to draw samples, {self.flops / 1e15:,.3g} PFLOP ({hours:,.3g} h at "
            f"{TFLOPS} TFLOP/s, which is assumed), {self.disk / 1e9:,.3g} GB of disk"
        )


def forward_flops(model: str, resolution: int) -> float:
    """Of one evaluation of a preset at latents of 1/8 of the pixels."""
    return flops_of(PRESETS[model], max(resolution // 8, 1))


def flops_of(cfg: Any, side: int) -> float:
    """Of one evaluation of a network at side × side latents; a multiply-add is two."""
    with torch.device("meta"):
        net, x, t = build(cfg), torch.empty(1, cfg.in_channels, side, side), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            net(x, t)
    return float(counter.get_total_flops())


def parameters_of(cfg: Any) -> int:
    """Numbers that a network learns."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(cfg).parameters())


def checkpoint_bytes(plan: Plan) -> int:
    """Weights, averages, and the optimizer's two moments."""
    n = parameters_of(PRESETS[plan.train["model"]])
    moments = 2 if plan.train.get("optim") == "adamw8bit" else 8
    return n * (4 + 4 * len(plan.train["ema"]) + moments)


def run_cost(plan: Plan, part: Part) -> tuple[int, int]:
    """(images, evaluations) of one run."""
    if part.rate:
        return round(plan.rate_share * plan.images_of(part.stage)), plan.n * plan.curve.steps
    points = len(plan.points_of(part.stage))
    evaluations = points * plan.curve.steps
    if part.stage == "standard":
        evaluations += sum(plan.sweep) + max(plan.sweep)
    return plan.images_of(part.stage), plan.n * evaluations


def cost(plan: Plan, parts: list[Part], tuned: int) -> Cost:
    """Of parts that are still to be made, and of arms that are still to be tuned."""
    images = evaluations = 0
    for part in parts:
        own = run_cost(plan, part)
        images, evaluations = images + own[0], evaluations + own[1]
    whole = plan.images_of("standard")
    images += tuned * len(plan.rates) * whole
    tries = len(plan.rates) * plan.curve.steps + sum(steps.steps for steps in plan.candidates)
    evaluations += tuned * plan.tuning_n * tries
    forward = forward_flops(plan.train["model"], plan.resolution)
    # What a run keeps until it is measured, and the last checkpoint of every run.
    kept = [plan.images_of(s) // math.gcd(*plan.points_of(s)) + 1 for s in STAGES]
    runs = len(parts) + tuned * len(plan.rates)
    disk = (max(kept) + runs) * checkpoint_bytes(plan) if runs else 0
    return Cost(runs, images, evaluations, forward * (TRAINING * images + evaluations), disk)


def check_space(out: Path, needed: int) -> None:
    """Refuse a plan whose checkpoints do not fit where they go."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the plan needs {needed / 1e9:,.1f} GB at {out}, and {free / 1e9:,.1f} GB are free",
            do="Give --out or --runs on a larger disk, or fewer --seeds.",
        )
