"""The parts of a comparison: each is trained, sampled and measured once, and leaves a card.

A card is JSON under OUT/cards that says what was asked (flags of the run, measures), what was found
and where (machine, commit). Cards are all that a report is made of, so a folder of them can be
completed on another day or machine: a part whose card is there is neither trained nor measured
again, and needs no checkpoint, unless stage2 starts from it.
"""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any


import train
from ckpt.hub import data_from_file
from data.cache import is_cache
from data.dataset import Dataset, open_dataset
from experiments.arms import ARMS, Part, Plan, Sampler, train_config
from experiments.cards import VERSION, differences, plain, read_card
from experiments.measures import References, held_out_u, in_u, open_references, sampled
from experiments.measures import sampling, sharpness
from harness.cli import UserError
from harness.files import make_dir, strict_json, write_text
from harness.pictures import save_grid
from harness.ranks import Ranks
from harness.record import machine
from harness.rows import read_log
from harness.run import checkpoints, versions
from metrics.features import cached_data
from objectives import Objective
from samplers import open_generator
from training.precision import without_race

# Sampling seeds of training seed s begin at FIRST + APART · s: no two share any.
FIRST, APART = 1_000_000, 100_000
# Images that are looked at, and of which sharpness is taken.
SHOWN, SHARP = 8, 64
# Flags of a run that do not change what is computed, or say where something lies.
FREE = train.FREE | {"name", "init"}


class Stopped(Exception):
    """A signal asked a training to stop; what it had is saved."""


# ---- the comparison that is being made -----------------------------------------------------------


@dataclass
class Bench:
    """A plan, its arms, and where it is carried out."""

    plan: Plan
    arms: dict[str, dict[str, Any]]
    tags: tuple[str, ...]
    cards: Path
    runs: Path
    ranks: Ranks
    # {arm: (learning rate, sampler)}, once tuned.
    chosen: dict[str, tuple[float, Sampler]] = field(default_factory=dict)

    @cached_property
    def refs(self) -> References:
        plan = self.plan
        return open_references(
            images_behind(plan.data), plan.resolution, plan.holdout, self.tags, plan.features,
            self.cache, self.ranks,
        )

    @property
    def cache(self) -> Path:
        return self.runs / "features"

    @cached_property
    def held(self) -> dict[str, Dataset]:
        """Held-out images by group."""
        stages = {"all": "standard"}
        if self.tags:
            stages |= {"excluded": "stage2", "rest": "fine"}
        found = {}
        for key, stage in stages.items():
            tags = () if stage == "standard" else self.tags
            plan = self.plan
            ds = open_dataset(
                plan.data, stage=stage, exclude_tags=tags, resolution=plan.resolution,
                holdout=plan.holdout,
            )
            found[key] = ds.heldout
        return found

    def config(self, part: Part) -> train.Config:
        lr = part.rate or self.chosen[part.arm][0]
        device = self.ranks.device.type
        flags = self.arms.get(part.arm) or ARMS[part.arm]
        return train_config(self.plan, flags, part, lr, self.runs, self.tags, device)

    def seeds_from(self, part: Part) -> int:
        return FIRST + APART * part.seed

    def features(self, part: Part, folder: Path, sampler: Sampler, n: int) -> tuple[Any, float]:
        return self.drawn(folder, sampler, n, self.seeds_from(part))

    def drawn(self, folder: Path, sampler: Sampler, n: int, seed: int) -> tuple[Any, float]:
        """(features, evaluations an image) of a checkpoint's samples of n seeds from `seed` on."""
        return sampled(folder, sampler, n, seed, self.refs, self.cache, self.ranks)

    def kept(self, name: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The card of that name, if there is one; refused if it answers another question."""
        path = self.cards / f"{name}.json"
        if not path.exists():
            return None
        card = read_card(path)
        if found := list(differences(card["asked"], plain(asked))):
            raise UserError(
                f"{path} was made for another question: {'; '.join(found[:4])}",
                do="Repeat its flags, or give this comparison its own --out.",
            )
        return card

    def keep(self, name: str, kind: str, asked: dict[str, Any], found: dict[str, Any]) -> Any:
        """Write a card."""
        make_dir(self.cards)
        made = {"machine": machine(), **versions(dirty=True)}
        card = plain({"kind": kind, "asked": asked, "made": made, **found})
        write_text(self.cards / f"{name}.json", strict_json(card, indent=1) + "\n")
        return read_card(self.cards / f"{name}.json")


def images_behind(data: str) -> str:
    """Where the images are: of a latent cache, what it was made from."""
    return data_from_file(cached_data(data)) if is_cache(data) else data


def asked_of(bench: Bench, part: Part) -> dict[str, Any]:
    """What the card of a run depends on."""
    plan, cfg = bench.plan, asdict(bench.config(part))
    return {
        "version": VERSION,
        "train": {key: value for key, value in cfg.items() if key not in FREE},
        "base": part.base,
        "points": plan.points_of(part.stage),
        "evaluations": plan.evaluations,
        "n": plan.n,
        "features": plan.features,
        "samplers": [sampler.label for sampler in samplers_of(bench, part)],
    }


# ---- training ------------------------------------------------------------------------------------


def trained(bench: Bench, part: Part) -> Path:
    """The folder of a run, trained if it was not."""
    if part.stage == "stage2":
        trained(bench, Part(part.base or part.arm, part.seed, "fine"))
    cfg = without_race(bench.config(part), bench.ranks.device)
    print(f"---- {part.name}", flush=True)
    if train.train(cfg, bench.ranks):
        raise Stopped()
    # A training waits with a stop for the end of its step, and here is none.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return bench.runs / part.name


def checkpoint_at(run: Path, images: int) -> Path:
    """The first checkpoint that had seen so many images."""
    for folder in checkpoints(run):
        if int(folder.name) >= images:
            return folder
    raise UserError(
        f"{run} has no checkpoint of {images:,} images",
        do="Remove the folder: it is trained again.",
    )


def prune(run: Path) -> None:
    """Remove all but the last checkpoint of a run that was measured."""
    for folder in checkpoints(run)[:-1]:
        shutil.rmtree(folder)


# ---- measuring -----------------------------------------------------------------------------------


def references(bench: Bench) -> dict[str, Any]:
    """The card of the images: floors, how well tags are read."""
    plan = bench.plan
    asked = {
        "version": VERSION, "data": plan.data, "resolution": plan.resolution,
        "holdout": plan.holdout, "features": plan.features, "n": plan.n,
        "excluded": list(bench.tags),
    }
    if card := bench.kept("references", asked):
        return card
    real = bench.refs.images.batch(bench.refs.train["all"][:256])
    found = {**bench.refs.facts(plan.n), "sharpness": sharpness(real)}
    return bench.keep("references", "references", asked, found)


def samplers_of(bench: Bench, part: Part) -> list[Sampler]:
    """How the last checkpoint of a run is sampled."""
    plan, best = bench.plan, bench.chosen[part.arm][1]
    if part.seed >= plan.control_seed:
        return [best]
    found = [plan.curve]
    if part.stage == "standard":
        found += [Sampler(plan.curve.method, steps) for steps in plan.sweep]
        found.append(best)
    return list(dict.fromkeys(found))


def run_card(bench: Bench, part: Part) -> dict[str, Any]:
    """The card of a run, made if there is none."""
    asked = asked_of(bench, part)
    if card := bench.kept(part.name, asked):
        return card
    run = trained(bench, part)
    found = {
        "arm": part.arm,
        "seed": part.seed,
        "stage": part.stage,
        "base": part.base,
        "best": bench.chosen[part.arm][1].label,
        "sets": list(sets_of(bench, part, run)),
        **described(bench, run, part.name, bench.seeds_from(part)),
    }
    card = bench.keep(part.name, "run", asked, found)
    prune(run)
    return card


def described(bench: Bench, run: Path, name: str, seed: int) -> dict[str, Any]:
    """What a card says of a run beside distances; a row of its samples goes to pictures/NAME.png.

    seed: of the first of these samples.
    """
    last, device = checkpoints(run)[-1], bench.ranks.device
    gen = open_generator(sampling(last, bench.plan.curve, 0, device), device)
    images = gen.images([seed + i for i in range(SHARP)]).images.cpu()
    save_grid(images[:SHOWN], bench.cards.parent / "pictures" / f"{name}.png", columns=SHOWN)
    held = {
        key: held_out_u(gen, images_held, bench.ranks)
        for key, images_held in bench.held.items()
        if len(images_held)
    }
    return {
        "data_hash": bench.refs.images.hash,
        "vae": gen.vae.fingerprint,
        "held_out": held,
        "curve": curve_of(gen.objective, run),
        "sharpness": sharpness(images),
    }


def sets_of(bench: Bench, part: Part, run: Path) -> Iterator[dict[str, Any]]:
    """Samples of a run, measured: at every point by the same sampler, at its end by others too."""
    points = bench.plan.points_of(part.stage)
    if part.seed >= bench.plan.control_seed:
        points = points[-1:]
    for images in points:
        folder = checkpoint_at(run, images)
        samplers = [bench.plan.curve]
        if images == points[-1]:
            samplers = samplers_of(bench, part)
        for sampler in samplers:
            features, nfe = bench.features(part, folder, sampler, bench.plan.n)
            found = {"images": int(folder.name), "sampler": sampler.label, "nfe": nfe}
            yield {**found, **bench.refs.measure(features)}


def curve_of(objective: Objective, run: Path) -> list[dict[str, Any]]:
    """L_u by t on held-out images while a run was trained; [] where its loss is no mean square."""
    plain_loss = objective.loss_type == "mse" and objective.weight == "uniform"
    if not plain_loss or objective.learn_sigma:
        return []
    rows, _ = read_log(run / "log.jsonl")
    return [
        {"images": row["images"], "loss_by_t": in_u(row["loss_by_t"], objective)}
        for _, row in rows
        if row.get("event") == "held-out"
    ]


# ---- choosing what each arm is at its best with --------------------------------------------------


def but_for_rate(flags: dict[str, Any]) -> dict[str, Any]:
    """Of a run's flags those that decide what it comes to, without the learning rate, which is
    what a card of several rates is about."""
    return {key: value for key, value in flags.items() if key not in FREE | {"lr"}}


def tune(bench: Bench, arm: str) -> dict[str, Any]:
    """Choose an arm's learning rate and sampler on the tuning seed, and remember them."""
    plan = bench.plan
    # Of the questions that follow, the rate is left out.
    bench.chosen[arm] = (plan.rates[0], plan.curve)
    flags = asdict(bench.config(Part(arm, plan.tuning_seed, "standard", rate=plan.rates[0])))
    asked = {
        "version": VERSION,
        "train": but_for_rate(flags),
        "rates": plan.rates,
        "n": plan.tuning_n,
        "features": plan.features,
        "samplers": [sampler.label for sampler in plan.candidates],
    }
    card = bench.kept(f"tuning-{arm}", asked)
    if not card:
        rates = tries(bench, arm, plan.tuning_seed, plan.tuning_n)
        lr = best_of(rates, plan.rates)
        best = Part(arm, plan.tuning_seed, "standard", rate=lr)
        folder = checkpoints(trained(bench, best))[-1]
        samplers = []
        for sampler in plan.candidates:
            features, nfe = bench.features(best, folder, sampler, plan.tuning_n)
            found = bench.refs.measure(features, "all")["all"]["fd"]
            samplers.append({"name": sampler.label, "nfe": nfe, "fd": found})
        sampler = best_of(samplers, plan.candidates)
        found = {"arm": arm, "rates": rates, "lr": lr, "samplers": samplers, "sampler": sampler}
        card = bench.keep(f"tuning-{arm}", "tuning", asked, found)
    bench.chosen[arm] = (card["lr"], Sampler(*card["sampler"]))
    return card


def tries(bench: Bench, arm: str, seed: int, n: int) -> list[dict[str, Any]]:
    """Runs of every learning rate, and the distance of their samples."""
    found = []
    for rate in bench.plan.rates:
        part = Part(arm, seed, "standard", rate=rate)
        run = trained(bench, part)
        features, _ = bench.features(part, checkpoints(run)[-1], bench.plan.curve, n)
        distance = bench.refs.measure(features, "all")["all"]["fd"]
        found.append({"name": f"{rate:g}", "fd": distance})
    return found


def best_of(tried: list[dict[str, Any]], choices: tuple[Any, ...]) -> Any:
    """The choice with the lowest distance."""
    lowest = min(range(len(tried)), key=lambda i: tried[i]["fd"])
    return choices[lowest]


def rates_card(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """The card of how much an arm's distance hangs on the learning rate, at one seed."""
    plan = bench.plan
    flags = asdict(bench.config(Part(arm, seed, "standard", rate=plan.rates[0])))
    asked = {
        "version": VERSION,
        "train": but_for_rate(flags),
        "rates": plan.rates,
        "n": plan.n,
        "features": plan.features,
        "sampler": plan.curve.label,
    }
    name = f"rates-{arm}-{seed}"
    if card := bench.kept(name, asked):
        return card
    rates = tries(bench, arm, seed, plan.n)
    return bench.keep(name, "rates", asked, {"arm": arm, "seed": seed, "rates": rates})


