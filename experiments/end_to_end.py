"""Is boosting worth it from end to end?   python experiments/end_to_end.py

Toy faces of 64 px, drawn from noise in two ways that cost the same arithmetic, in all of training
and in all of sampling:

    pair      a base of 32 px, and a network of coupling flow matching that makes them 64 px large
    single    one network of 64 px

Each network of the pair has half of what the single one has. That of autoencoders is not counted:
they are linear. "resized", the base's pictures enlarged without a network, says what the second
network adds.

It writes OUT/cards/*.json, report.md, report.html and a picture, and goes on where it stopped.
--size dry goes through all of it in a minute.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from data.boosts import Before, open_stage
from diffusion.boosting import boost
from diffusion.coupling import resize
from experiments.boost import CPU, Card, Verdict, command, says, shown, trained
from experiments.costs import TRAINING, flops_of
from experiments.page import band, cell, paragraphs
from experiments.paired import Paired, paired
from experiments.report import Chart, Panel, Picture, Report, Section, Table, number
from harness import record
from harness.cli import cli, flag
from harness.files import strict_json
from harness.pictures import save_grid, to_uint8
from metrics.distances import frechet_from_features
from metrics.features import fit_extractor, open_images, pooled
from metrics.paired import crops, roughness
from model import PRESETS
from samplers import Sampling, open_generator

RULE = """
Written down before the first run that counts. Each is asked of the seeds in pairs, by one-sided t
tests of log ratios at 5%, adjusted by Holm within a hypothesis: "suggested" if all tests of it say
so, which is what three seeds can say; "against" if all say the opposite; else "not shown".
1.  B1, quality: FD of pair is below that of single, where sampling may cost 4 and where it may cost
    10 evaluations of single.
2.  B2, details: the distance of patches of pair is below that of single, at the same two.
All else is described, not tested.
"""
SIDE, SMALL = 64, 32
ARMS = ("pair", "single")
# Latent channels of the autoencoder that train.py fits.
CHANNELS = 32
# FD is of latents averaged to so many squares a side, as in compare.py.
POOL = 4
SHOWN = 8
BATCH = 128


class Size(NamedTuple):
    images: int  # that single sees
    faces: int
    holdout: float
    model: str
    budgets: tuple[int, ...]  # of sampling, in evaluations of single
    n: int  # samples


SIZES = {
    "cpu": Size(4_000, 4096, 0.0625, "tiny", (4, 10), 512),
    "dry": Size(64, 400, 0.5, "nano", (4, 10), 32),
}


@dataclass(frozen=True)
class Config:
    size: Literal["cpu", "dry"] = flag("cpu", "how much of everything")
    seeds: tuple[int, ...] = flag((0, 1, 2), "of the runs", low=0, high=1e6)
    out: str = flag("runs/end-to-end", "runs, cards and report", writes="folder")


# ---- equal arithmetic ----------------------------------------------------------------------------


class Flops(NamedTuple):
    """Of one evaluation for one image."""

    base: float
    enlarger: float
    single: float


def flops(model: str) -> Flops:
    """Of the three networks of a preset, as train.py builds them."""
    base = replace(PRESETS[model], in_channels=CHANNELS, out_channels=CHANNELS)
    enlarger = replace(base, in_channels=2 * CHANNELS)
    sides = SMALL // 8, SIDE // 8, SIDE // 8
    return Flops(*map(flops_of, (base, enlarger, base), sides))


class Images(NamedTuple):
    """That each network sees in training."""

    base: int
    enlarger: int
    single: int


def images_of(images: int, cost: Flops, batch: int = 16) -> Images:
    """Whole batches: half of the arithmetic of single's `images` to each network of the pair, never
    more."""
    single = images // batch * batch
    half = single * cost.single / 2
    pair = (max(int(half / each // batch), 1) * batch for each in cost[:2])
    return Images(*pair, single)


class Steps(NamedTuple):
    """Euler steps of each network."""

    base: int
    enlarger: int
    single: int


def steps_of(budget: int, cost: Flops) -> Steps:
    """About half of the arithmetic of `budget` evaluations of single to the network that enlarges,
    what is left to the base, never more."""
    enlarger = max(round(budget * cost.single / 2 / cost.enlarger), 1)
    left = budget * cost.single - enlarger * cost.enlarger
    return Steps(max(int(left // cost.base), 1), enlarger, budget)


# ---- runs ----------------------------------------------------------------------------------------


def train(size: Size, seed: int, out: Path) -> dict[str, Path]:
    """The runs of all three networks of a seed, trained where they are not yet."""
    seen, found = images_of(size.images, flops(size.model)), {}
    more = {
        "base": ["--resolution", SMALL],
        "enlarger": ["--resolution", SIDE, "--objective", "cfm", "--lowres", SIDE // SMALL],
        "single": ["--resolution", SIDE],
    }
    for name, images in seen._asdict().items():
        words = ["--data", f"toyfaces:{size.faces}", "--holdout", size.holdout, "--seed", seed]
        # The same for all: what is faster depends on what else a machine does.
        words += ["--model", size.model, "--images", images, "--dtype", "fp32", *more[name]]
        found[name] = trained(out / f"{name}-{seed}", words)
    return found


def batches(n: int) -> list[list[int]]:
    """The seeds of n samples, from 0."""
    return [list(range(lo, min(lo + BATCH, n))) for lo in range(0, n, BATCH)]


def pixels_of(run: Path, steps: int, n: int) -> Tensor:
    """(n, 3, H, H) in [-1, 1], drawn from noise by a run's network."""
    cfg = Sampling(str(run), method="euler", steps=steps, device="cpu", dtype="fp32")
    gen = open_generator(cfg, CPU)
    return torch.cat([gen.images(seeds).pixels for seeds in batches(n)])


def enlarge(run: Path, small: Tensor, steps: int) -> Tensor:
    """(n, 3, 64, 64) in [-1, 1] of a base's pictures, the noise of image i being that of seed i."""
    stage, _ = open_stage(str(run), Before((SMALL, SMALL), None, [], False), CPU, "fp32")
    how = {"method": "euler", "steps": steps}
    groups = batches(len(small))
    return torch.cat([boost([stage], small[seeds], seeds, **how).pixels for seeds in groups])


class Real(NamedTuple):
    """The images that training saw, and those that it did not."""

    features: Callable[[Tensor], Tensor]  # of pixels (n, 3, 64, 64) in [-1, 1]
    seen: Tensor  # features of all that training saw
    held: Tensor  # pixels in [0, 1]


def open_real(size: Size) -> Real:
    images = open_images(f"toyfaces:{size.faces}", SIDE)
    vae = fit_extractor(images).vae
    seen, held = (part.batch(part.index).float() / 255 for part in images.split(size.holdout))

    def features(pixels: Tensor) -> Tensor:
        return pooled(vae.encode(pixels), POOL).double()

    return Real(features, features(seen * 2 - 1), held)


def measured(real: Real, pixels: Tensor) -> dict[str, float]:
    """The numbers of pictures (n, 3, 64, 64) in [-1, 1], rounded to 8 bits as files are."""
    found = to_uint8(pixels).float() / 255
    return {
        "fd": frechet_from_features(real.features(found * 2 - 1), real.seen),
        "patches": frechet_from_features(crops(found), crops(real.held)),
        "sharpness": roughness(found) / roughness(real.held),
    }


def cards_of(size: Size, real: Real, seed: int, out: Path) -> list[Card]:
    """The cards of both arms of a seed, made if there are none of this size."""
    files = [out / "cards" / f"{arm}-{seed}.json" for arm in ARMS]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    asked = json.loads(json.dumps(size))
    if len(found) == len(ARMS) and all(card["asked"] == asked for card in found):
        return found
    runs, cost = train(size, seed, out), flops(size.model)
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for budget in size.budgets:
        steps = steps_of(budget, cost)
        small = pixels_of(runs["base"], steps.base, size.n)
        large = enlarge(runs["enlarger"], small, steps.enlarger)
        resized = measured(real, resize(small, (SIDE, SIDE)))
        whole = pixels_of(runs["single"], steps.single, size.n)
        spent = steps.base * cost.base + steps.enlarger * cost.enlarger
        row = {"budget": budget, "steps": steps[:2], "flops": spent, **measured(real, large)}
        rows["pair"].append(row | {"resized": resized})
        row = {"budget": budget, "steps": [steps.single], "flops": steps.single * cost.single}
        rows["single"].append(row | measured(real, whole))
    seen = images_of(size.images, cost)
    images = {"pair": seen[:2], "single": [seen.single]}
    spent = [TRAINING * n * each for n, each in zip(seen, cost)]
    training = {"pair": spent[0] + spent[1], "single": spent[2]}
    for arm, file in zip(ARMS, files):
        card = {"arm": arm, "seed": seed, "asked": asked, "images": images[arm]}
        card |= {"training flops": training[arm], "rows": rows[arm], **record.context()}
        record.save(file, card)
    return [json.loads(file.read_text()) for file in files]


def floors(size: Size, real: Real) -> dict[str, dict[str, float]]:
    """The same numbers of real images: what no network can be asked to beat."""
    some = torch.from_numpy(np.random.default_rng(0).permutation(len(real.seen)))
    one, rest = real.seen[some[: size.n]], real.seen[some[size.n :]]
    half = len(real.held) // 2
    patches = frechet_from_features(crops(real.held[:half]), crops(real.held[half:]))
    return {"floor": {"fd": frechet_from_features(one, rest), "patches": patches}}


# ---- the rule ------------------------------------------------------------------------------------


def compared(cards: list[Card], key: str, budget: int) -> Paired:
    """Log ratios by seed of pair's number to single's."""

    def by_seed(arm: str) -> dict[int, float]:
        own = [card for card in cards if card["arm"] == arm]
        rows = [(card["seed"], row) for card in own for row in card["rows"]]
        return {seed: row[key] for seed, row in rows if row["budget"] == budget}

    return paired(by_seed("pair"), by_seed("single"))


def verdicts(cards: list[Card], budgets: tuple[int, ...]) -> list[Verdict]:
    found = []
    asked = (("B1, quality", "fd", "FD"), ("B2, details", "patches", "distance of patches"))
    for name, key, what in asked:
        pairs = [compared(cards, key, budget) for budget in budgets]
        at = ", ".join(map(str, budgets))
        why = f"{what} of pair over single's at {at}: {', '.join(map(shown, pairs))}"
        found.append(Verdict(name, says(pairs), why))
    return found


# ---- the report ----------------------------------------------------------------------------------

MEASURES = {"fd": "FD", "patches": "distance of patches", "sharpness": "sharpness"}


def report(size: Size, cards: list[Card], floor: dict[str, float], grid: bytes) -> Report:
    lead = [f"{v.name}: {v.word}. {v.why}." for v in verdicts(cards, size.budgets)]
    cost = flops(size.model)
    seen = images_of(size.images, cost)
    text = [
        f"Of training: {seen.base:,} images to the base, {seen.enlarger:,} to the network that "
        f"enlarges, {seen.single:,} to the single one. An evaluation costs {cost.base / 1e6:.0f}, "
        f"{cost.enlarger / 1e6:.0f} and {cost.single / 1e6:.0f} MFLOP an image.",
        "FD is of latents averaged to 4×4 against the images that training saw; patches are crops "
        "of 8 px less their mean, against images that it did not see. ± is a standard error over "
        "seeds.",
    ]
    tests = Section("Numbers", text, [numbers(size, cards, floor)], [chart(size, cards, floor)])
    steps = steps_of(size.budgets[-1], cost)
    caption = f"From the top: the base's {steps.base} steps, resized; the pair, with "
    caption += f"{steps.enlarger} more; single, {steps.single} steps; held-out images."
    picture = Picture("samples", caption, grid)
    return Report(
        f"From noise to {SIDE} px: two networks or one",
        lead,
        [tests, Section("Samples", [], [], [picture]), Section("The rule", paragraphs(RULE))],
    )


def numbers(size: Size, cards: list[Card], floor: dict[str, float]) -> Table:
    rows, cost = [], flops(size.model)
    for budget in size.budgets:
        steps, at = steps_of(budget, cost), size.budgets.index(budget)
        found = {arm: [c["rows"][at] for c in cards if c["arm"] == arm] for arm in ARMS}
        told = {
            "pair": (f"{steps.base} + {steps.enlarger}", found["pair"]),
            "single": (f"{steps.single}", found["single"]),
            "base, resized": (f"{steps.base}", [row["resized"] for row in found["pair"]]),
        }
        for name, (taken, same) in told.items():
            columns = [cell(row[key] for row in same) for key in MEASURES]
            rows.append([name, f"{budget}", taken, *columns])
    note = f"Of real images: FD {number(floor['fd'])}, patches {number(floor['patches'])}."
    return Table(["", "budget, evaluations of single", "steps", *MEASURES.values()], rows, note)


def chart(size: Size, cards: list[Card], floor: dict[str, float]) -> Chart:
    panels = []
    for key in ("fd", "patches"):
        series = []
        for color, arm in enumerate(ARMS):
            runs = [card["rows"] for card in cards if card["arm"] == arm]
            columns = [[row[key] for row in same] for same in zip(*runs)]
            series.append(band(arm, list(size.budgets), columns, color))
        levels = {"real images": floor[key]}
        axis = "cost of sampling, evaluations of single"
        panels.append(Panel(MEASURES[key], axis, MEASURES[key], series, "xy", levels))
    return Chart("budgets", "At equal arithmetic; ± one standard error over seeds.", panels)


def draw_grid(size: Size, real: Real, seed: int, out: Path) -> bytes:
    """Samples of the first seeds by a seed's networks, at the largest budget."""
    runs, steps = train(size, seed, out), steps_of(size.budgets[-1], flops(size.model))
    small = pixels_of(runs["base"], steps.base, SHOWN)
    rows = [resize(small, (SIDE, SIDE)), enlarge(runs["enlarger"], small, steps.enlarger)]
    rows += [pixels_of(runs["single"], steps.single, SHOWN), real.held[:SHOWN] * 2 - 1]
    path = out / "samples.png"
    save_grid(to_uint8(torch.cat(rows)), path, columns=SHOWN)
    return path.read_bytes()


def answered(cfg: Config, out: Path) -> tuple[list[Verdict], Report]:
    """What became of each hypothesis, and the report."""
    size = SIZES[cfg.size]
    real, cards = open_real(size), []
    for seed in cfg.seeds:
        cards += cards_of(size, real, seed, out)
        for card in cards[-2:]:
            print(f"{card['arm']}, seed {seed}: {strict_json(card['rows'])}", flush=True)
    floor = floors(size, real)
    record.save(out / "cards" / "floor.json", floor)
    grid = draw_grid(size, real, cfg.seeds[0], out)
    return verdicts(cards, size.budgets), report(size, cards, floor["floor"], grid)


def main() -> None:
    command(Config, __doc__, answered)


if __name__ == "__main__":
    cli(main)
