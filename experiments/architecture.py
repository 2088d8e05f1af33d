"""A U-Net against a transformer (SiT), at equal parameters and at equal arithmetic: paired by seed,
by a rule that was fixed beforehand (RULE, below).   The same command goes on where it stopped.

    python experiments/architecture.py --size dry --out DIR     # all of it, in half a minute
    python experiments/architecture.py                          # toy faces, some hours of one core
    python experiments/architecture.py --sizes small --resolutions 32,64
    python experiments/architecture.py --size gpu --data DIR    # 71M and 281M at 256 and 512 px

It leaves report.html, report.md, figures/ and verdict.json in OUT, and OUT/SIZE-RESOLUTION/cards.
Cards are all that the report needs: a folder of them can be completed anywhere.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

from experiments.arms import PLANS, Part, Plan, facts
from experiments.cards import VERSION, read_cards
from experiments.contest import Cell, build, summary
from experiments.costs import TRAINING, check_space, flops_of, parameters_of
from experiments.hypotheses import Card, Cards, sort_cards
from experiments.matched import ARMS, FAMILIES, UNET, costs_of, matched, network_at
from experiments.parts import Bench, Stopped, rates_card, references, run_card, tune
from experiments.report import write
from harness.cli import UserError, cli, flag, parse, shown
from harness.files import strict_json, write_text
from harness.ranks import join_ranks

RULE = """
Written down before the first run that counts; changed after it, it would be worth nothing.
1.  The unit is the seed. Networks of a seed share the order of images, noise, times, held-out
    images and the noise that samples start from. What differs is the network, and with it its first
    weights, and the learning rate.
2.  At every size and resolution the U-Net meets two transformers of one width: one of the depth
    that comes nearest to its parameters, and one nearest to its FLOP of an evaluation there. Both
    must be within 15 %. All see equally many images.
3.  The learning rate is one of three, chosen for each network, size and resolution on a tuning seed
    that is used for nothing else, by FD to the training images of runs of a fifth of the images. It
    is constant after a warm-up of 5 %, and all that is measured is measured of one EMA (width 0.1).
    A choice at an end of the three is named.
4.  Primary endpoints, as log ratios of the transformer to the U-Net by seed, at the end of
    training: L, held-out loss (a geometric mean over t); D, FD to the training images. Below 0 the
    transformer is better.
5.  Two claims of the literature are primary too, at equal FLOP: "a transformer scales better", L at
    a larger size less L at the next smaller one, same resolution; "a U-Net is local, a transformer
    global", L over the quarter of t that is most noise less L over the quarter that is least. Below
    0 is what the claim says.
6.  Each is tested by a two-sided paired t at 5 %, with Holm's correction for all in the report.
7.  Words, of a match (a size, a resolution, and what is equal): fewer than 3 seeds: open. Both 90 %
    intervals within ± 5 %: equal. L and D both significant and below 0: the transformer; both
    significant and above 0: the U-Net; "supported" from 5 seeds on, "suggested" with 3 or 4. All
    else: open. Of a claim: the same words of its one endpoint, supported or suggested, or the
    opposite of it; equal; open.
8.  All else is described, not tested: FD at equal arithmetic of the whole training and at equal
    seconds, memory, seconds, samples.
"""
CPU = replace(
    PLANS["cpu"],
    data="toyfaces:4000",
    images=(16_000,) * 3,
    points=((0.2, 0.5, 1.0),) * 3,
    evaluations=5,
    n=512,
    sweep=(),
    candidates=(PLANS["cpu"].curve,),
    rate_share=1.0,
    tuning_share=0.2,
    seeds=(0, 1, 2),
    train={"batch": 16, "ema": (0.1,), "workers": 0},
)


class Size(NamedTuple):
    """A plan, and where it is carried out by default."""

    plan: Plan
    sizes: tuple[str, ...]
    resolutions: tuple[int, ...]


SIZES = {
    "dry": Size(
        replace(
            CPU,
            data="toyfaces:160",
            holdout=0.25,
            images=(64,) * 3,
            points=((0.5, 1.0),) * 3,
            evaluations=2,
            n=16,
            curve=PLANS["dry"].curve,
            candidates=(PLANS["dry"].curve,),
            tuning_n=16,
            rates=(1e-3, 2e-3),
            tuning_share=0.25,
            seeds=(0,),
        ),
        ("nano",),
        (32,),
    ),
    "cpu": Size(CPU, ("small", "tiny"), (32, 64)),
    "gpu": Size(
        replace(
            CPU,
            data="",
            holdout=0.02,
            images=(4_000_000,) * 3,
            points=((0.05, 0.1, 0.2, 0.5, 1.0),) * 3,
            evaluations=20,
            n=10_000,
            features="inception",
            tuning_n=2_048,
            rates=(1e-4, 2e-4, 4e-4),
            train={"batch": 256, "ema": (0.1,), "vae": "flux2"},
        ),
        ("71m", "281m"),
        (256, 512),
    ),
}


@dataclass(frozen=True)
class Config:
    size: Literal["dry", "cpu", "gpu"] = flag("cpu", "dry: half a minute | cpu: toy faces | gpu")
    sizes: tuple[str, ...] = flag((), f"of networks: {', '.join(FAMILIES)}; default the size's")
    resolutions: tuple[int, ...] = flag((), "pixels; default the size's", low=8, high=4_096)
    seeds: tuple[int, ...] = flag((), "each with every network; default 0,1,2", low=0, high=999)
    data: str = flag("", "as train.py takes it; default the size's")
    images: int = flag(0, "of each run; 0 = the size's", low=0, high=1e12)
    n: int = flag(0, "samples of each checkpoint; 0 = the size's", low=0, high=1e7)
    rates: bool = flag(False, "also whole runs at every learning rate, of the first seed")
    out: str = flag("runs/architecture", "cards and report", writes="folder")
    runs: str = flag("", "where runs are trained; default OUT/runs", writes="folder")
    device: str = flag("auto", "auto | cpu | cuda")


# ---- the plan ------------------------------------------------------------------------------------


def plan_of(cfg: Config) -> Plan:
    """The size's plan with what the flags say; what cannot be carried out is refused."""
    plan = SIZES[cfg.size].plan
    given = {"data": cfg.data, "n": cfg.n, "seeds": cfg.seeds, "images": (cfg.images,) * 3}
    if not cfg.images:
        del given["images"]
    plan = replace(plan, **{name: value for name, value in given.items() if value})
    if not plan.data:
        raise UserError("--size gpu needs --data", do="Give a folder of images.")
    return plan


def cells_of(cfg: Config) -> list[tuple[str, int]]:
    """(size, resolution) of all that is compared, in the order in which it is made."""
    sizes = cfg.sizes or SIZES[cfg.size].sizes
    resolutions = cfg.resolutions or SIZES[cfg.size].resolutions
    for name, given in (("sizes", sizes), ("resolutions", resolutions), ("seeds", cfg.seeds)):
        if len(set(given)) < len(given):
            raise UserError(f"--{name} {shown(given)} names one twice", do="Name each once.")
    if strange := [size for size in sizes if size not in FAMILIES]:
        raise UserError(
            f"--sizes {shown(tuple(strange))}",
            wanted=f"some of {', '.join(FAMILIES)}",
            do="Choose from these.",
        )
    for resolution in resolutions:
        if resolution % 16:
            raise UserError(
                f"--resolutions {resolution}",
                wanted="multiples of 16: the U-Nets halve the latents, which are 8 times smaller",
                do=f"Try {max(resolution // 16, 1) * 16}.",
            )
    return [(size, resolution) for size in sizes for resolution in resolutions]


def bench_of(cfg: Config, size: str, resolution: int) -> Bench:
    """One size at one resolution, with its networks and places."""
    plan = replace(plan_of(cfg), resolution=resolution)
    arms = {arm: {"model": model} for arm, model in matched(size, resolution).items()}
    out, name = Path(cfg.out), f"{size}-{resolution}"
    runs = (Path(cfg.runs) if cfg.runs else out / "runs") / name
    return Bench(plan, arms, (), out / name / "cards", runs, join_ranks(cfg.device))


def price(bench: Bench) -> str:
    """What a size at a resolution costs from nothing, in words; refuses what no disk holds."""
    plan, seeds = bench.plan, len(bench.plan.seeds)
    images = plan.images_of("standard")
    tuned = round(plan.tuning_share * images) * len(plan.rates)
    drawn = plan.n * plan.curve.steps * len(plan.points_of("standard")) * seeds
    drawn += plan.tuning_n * plan.curve.steps * len(plan.rates)
    total = disk = 0.0
    for flags in bench.arms.values():
        network = network_at(flags["model"], plan.resolution // 8)
        forward = flops_of(network, plan.resolution // 8)
        total += forward * (TRAINING * (tuned + seeds * images) + drawn)
        disk += (seeds + len(plan.rates)) * 16 * parameters_of(network)
    check_space(bench.runs, int(disk))
    return f"{bench.runs.name}: {total / 1e15:,.3g} PFLOP, {disk / 1e9:,.3g} GB of disk"


# ---- what is made --------------------------------------------------------------------------------


def networks_card(bench: Bench) -> dict[str, Any]:
    """The card of what the networks cost."""
    models = {arm: flags["model"] for arm, flags in bench.arms.items()}
    resolution, batch = bench.plan.resolution, bench.plan.train["batch"]
    asked = {
        "version": VERSION,
        "models": models,
        "resolution": resolution,
        "batch": batch,
        "device": bench.ranks.device.type,
    }
    if card := bench.kept("networks", asked):
        return card
    micro = min(batch, 16)
    found = costs_of(models, resolution, micro, bench.ranks.device)
    return bench.keep("networks", "networks", asked, {"networks": found})


def carry_out(bench: Bench, rates: bool = False) -> None:
    """Make every card of a size at a resolution that is not there yet. rates: also those that say
    whether a fifth of the images chose the right one."""
    references(bench)
    networks_card(bench)
    for arm in bench.arms:
        tune(bench, arm)
    for seed in bench.plan.seeds:
        for arm in bench.arms:
            run_card(bench, Part(arm, seed, "standard"))
    for arm in bench.arms if rates else ():
        rates_card(bench, arm, bench.plan.seeds[0])


def cell_from(folder: Path, cards: list[Card]) -> Cell:
    """The cards of OUT/SIZE-RESOLUTION."""
    size, _, resolution = folder.name.rpartition("-")
    networks = [card["networks"] for card in cards if card["kind"] == "networks"]
    # The U-Net is the first of every table.
    cards = sorted(cards, key=lambda card: card.get("arm") != UNET)
    found = sort_cards(cards, PLANS["cpu"].control_seed, differ=("model",))
    for name, own in (("networks", networks), ("references", found.references)):
        if not own:
            raise UserError(f"{folder}/cards/{name}.json is missing", do="Copy it too.")
    check_known(folder, found, networks[0])
    return Cell(size, int(resolution), found, networks[0], folder / "pictures")


def check_known(folder: Path, cards: Cards, networks: dict[str, Any]) -> None:
    """Refuse runs of networks that are not compared here, or whose costs are not known."""
    arms = {arm for arm, *_ in cards.runs}
    stages = {stage for _, _, stage, _ in cards.runs} - {"standard"}
    strange = (arms - set(ARMS)) | ({UNET, *arms} - networks.keys()) | stages
    if strange:
        raise UserError(
            f"{folder}/cards: {shown(tuple(sorted(strange)))}",
            wanted=f"standard runs of {', '.join(ARMS)}, all of them in networks.json",
            do="Keep cards that were made together.",
        )


def report(out: Path, planned: list[tuple[str, int]]) -> None:
    """Write the report of all cards in a folder, and print what came out."""
    cells = []
    for size in FAMILIES:
        found = [path for path in out.glob(f"{size}-*") if (path / "cards").is_dir()]
        whole = [path for path in found if path.name.rpartition("-")[2].isdecimal()]
        own = [cell_from(path, read_cards(path / "cards")) for path in whole]
        cells += sorted(own, key=lambda cell: cell.resolution)
    cells = [cell for cell in cells if cell.cards.runs]
    if not cells:
        raise UserError(f"{out} has no card of a run", do="Make them: see --help.")
    page = build(cells, RULE, planned)
    path = write(page, out)
    write_text(out / "verdict.json", strict_json(summary(cells), indent=1) + "\n")
    print("\n".join(page.lead))
    print(path)


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    benches = [bench_of(cfg, size, resolution) for size, resolution in cells_of(cfg)]
    if dry_run:
        plans = {each.runs.name: {**facts(each.plan), "arms": each.arms} for each in benches}
        print(json.dumps({"plans": plans, "cost": [price(each) for each in benches]}, indent=1))
        return
    for bench in benches:
        print(price(bench), flush=True)
        try:
            carry_out(bench, cfg.rates)
        except Stopped:
            return
    report(Path(cfg.out), cells_of(Config(size=cfg.size)))


if __name__ == "__main__":
    cli(main)
