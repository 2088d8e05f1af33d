"""Cards of a comparison that was never made: numbers by formulas, for tests of the statistics and
of the report."""

import random
from typing import Any

CURVE, BEST = "dpmpp_2m-16", "heun-32"
TAGS = {"smile": 0.34, "red hair": 0.2, "glasses": 0.15, "character:nova": 0.04}
POINTS = {"standard": (4_000, 40_000), "fine": (40_000,), "stage2": (500, 1_000, 2_000, 10_000)}
MADE = {"commit": "0" * 40, "machine": {"cpu": "a CPU", "threads": 1, "gpu": None}}
# How much better an arm is at everything: its distances are divided by that.
SKILL = {"D": 1.0, "V": 1.1, "F": 1.25}


def jitter(*of: Any) -> float:
    """A factor near 1 that hangs on nothing but what it is of."""
    return 1 + 0.02 * random.Random(repr(of)).gauss(0, 1)


def group(fd: float, skill: float) -> dict[str, float]:
    precision = min(0.6 + 0.2 * skill / (1 + fd), 1.0)
    return {
        "fd": fd,
        "kd": fd / 100,
        "fd_held_out": fd + 1,
        "precision": precision,
        "recall": 0.9 - 0.3 * precision * skill,
        "density": 0.9,
        "coverage": 0.8,
    }


def set_of(images: int, sampler: str, nfe: float, fd: float, skill: float, acquired: float) -> dict:
    return {
        "images": images,
        "sampler": sampler,
        "nfe": nfe,
        "all": group(fd, skill),
        "excluded": group(4 * fd * (1 - 0.9 * acquired), skill),
        "rest": group(fd * (1 + acquired), skill),
        "acquired": acquired,
        "tags": {tag: share * skill for tag, share in TAGS.items()},
        "copies": {"copies": 0.06, "ratio": 0.9},
    }


def run_card(
    arm: str, seed: int, stage: str, base: str = "", skill: float | None = None, **asked: Any
) -> dict[str, Any]:
    """The card of a run; skill: of its arm, if nothing is said."""
    skill = SKILL[arm] if skill is None else skill
    sets = []
    for images in POINTS[stage]:
        fd = 100 * images**-0.2 / skill * jitter(arm, seed, stage)
        acquired = 0.02
        if stage == "stage2":
            acquired = images / (images + 1_500 / skill)
        sets.append(set_of(images, CURVE, 16.0, fd, skill, acquired))
    if stage == "standard":
        for nfe in (4, 8, 32, 64):
            many = fd * (1 + 3 / nfe)
            sets.append(set_of(images, f"dpmpp_2m-{nfe}", float(nfe), many, skill, 0.04))
        sets.append(set_of(images, BEST, 63.0, fd * 0.9, skill, 0.04))
    by_t = [(0.2 + 0.1 * k) / skill * jitter(arm, seed) for k in range(8)]
    curve = [
        {"images": n, "loss_by_t": [value * (POINTS[stage][-1] / n) ** 0.5 for value in by_t]}
        for n in (POINTS[stage][-1] // 4, POINTS[stage][-1] // 2, POINTS[stage][-1])
    ]
    return {
        "kind": "run",
        "asked": {"version": 1, "n": 512, "features": "pca", "points": POINTS[stage], **asked},
        "made": MADE,
        "arm": arm,
        "seed": seed,
        "stage": stage,
        "base": base,
        "data_hash": "data",
        "vae": f"vae of {stage}",
        "best": BEST,
        "sets": sets,
        "held_out": {"all": {"n": 64, "loss": sum(by_t) / 8, "loss_by_t": by_t}},
        "curve": curve,
        "sharpness": 0.02 * skill,
    }


def rates_card(arm: str, seed: int, spread: float) -> dict[str, Any]:
    rates = [{"name": "0.001", "fd": 10.0}, {"name": "0.002", "fd": 10.0 * spread}]
    return {"kind": "rates", "asked": {}, "made": MADE, "arm": arm, "seed": seed, "rates": rates}


def references_card() -> dict[str, Any]:
    floor = {"n": 512, "fd": 2.0}
    return {
        "kind": "references",
        "asked": {},
        "made": MADE,
        "data": "toyfaces",
        "data_hash": "data",
        "features": {"features": "pca"},
        "floor": {"all": floor, "excluded": floor, "rest": floor},
        "reader": {"found": 0.99, "false": 0.003, "wrong tags": 0.01},
        "tags": TAGS,
        "excluded": ["character:nova"],
        "sharpness": 0.02,
    }


def tuning_card(arm: str) -> dict[str, Any]:
    rates = [{"name": "0.001", "fd": 12.0}, {"name": "0.002", "fd": 11.0}]
    samplers = [{"name": BEST, "fd": 9.0, "nfe": 63.0}, {"name": CURVE, "fd": 10.0, "nfe": 16.0}]
    chosen = {"lr": 0.002, "sampler": ["heun", 32, None]}
    asked: dict[str, Any] = {}
    return {
        "kind": "tuning", "asked": asked, "made": MADE, "arm": arm, "rates": rates,
        "samplers": samplers, **chosen,
    }


def all_cards(
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4), arms: tuple[str, ...] = ("D", "V", "F")
) -> list[dict[str, Any]]:
    """A whole comparison, in which F is better by a quarter."""
    cards = [references_card(), *(tuning_card(arm) for arm in arms)]
    for seed in seeds:
        for arm in arms:
            cards += [run_card(arm, seed, stage) for stage in POINTS]
        cards += [run_card("F", seed, "stage2", "D"), run_card("D", seed, "stage2", "F")]
        cards += [rates_card("D", seed, 1.1), rates_card("F", seed, 1.3)]
        cards.append(run_card("F", 2_000 + seed, "standard"))
    return cards
