"""Flow matching against DDPM: which learns better, which adapts faster? Paired by seed, by a rule
that was fixed beforehand (RULE, below).   The same command goes on where it stopped.

    python experiments/compare.py --size dry --out DIR     # all of it, in about a minute
    python experiments/compare.py --size cpu               # toy faces, about an hour a seed
    python experiments/compare.py --size gpu --data DIR --vae flux2   # 281M at 256 px
    python experiments/compare.py --objectives F,D,U,'mine=--objective fm --shift 3'
    python experiments/compare.py report DIR               # of a folder of cards
    python experiments/compare.py report RUN_A RUN_B …     # of any runs of one data set

Arms: D (or ddpm) eps with the linear table; V (v) v with the cosine table; U flow matching with
uniform t; F (fm) with logit-normal t. It leaves report.html, report.md, figures/ and cards/ in OUT.
Cards are all that a report needs: a folder of them can be completed anywhere.
"""

import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

from data.sources import embedded_tags
from experiments import hypotheses, runs
from experiments.answers import summary
from experiments.arms import PLANS, STAGES, Part, Plan, facts, read_arms
from experiments.cards import read_cards
from experiments.costs import check_space, cost
from experiments.page import build
from experiments.parts import Bench, Stopped, images_behind, rates_card, references, run_card
from experiments.parts import tune
from experiments.report import write
from harness.cli import UserError, cli, flag, parse, shown
from harness.files import strict_json, write_text
from harness.ranks import join_ranks

RULE = """
Written down before the first run; changed after it, it would be worth nothing.
1.  The unit is the seed. Arms of a seed share first weights, order of images, noise, quantiles of
    time, held-out images and the noise that samples start from. What differs is the arm: path,
    target, density of times, the numbers fed as time, and where sampling starts (D at t = 0.9937).
2.  Learning rate (of three) and sampler (of seven, at most 64 evaluations an image) are chosen for
    each arm on a tuning seed that is used for nothing else, by FD to the training images of whole
    runs. The rate is constant after a warm-up of 5 %, and all that is measured is measured of one
    EMA (width 0.1).
3.  Primary endpoints, as log ratios of F to D by seed, turned so that below 0 is what the source
    says: H1, FD to the training images after `standard`, each at its best; H2, the area under the
    FD to the excluded tags' images over log images of `stage2`, from each arm's own `fine` base,
    as a share of the gap at 0 images (counted from FD of real images to real ones, or from 0 where
    that is above any of the curves); H3, recall after `standard` at equal precision over numbers
    of steps, that of the arm whose highest is lower (the source names no measure for "robust":
    this one is ours).
4.  Each is tested by a one-sided paired t at 5 %, with Holm's correction for three.
5.  Guards, means over seeds that must not be above 0: H1, log FD at 16 evaluations of the same ODE
    method, and kernel distance; H2, the share of samples with an excluded tag at equal forgetting
    (FD to the other images), D less F; H3, the spread of log FD over the three learning rates, D
    less F. A guard that was not measured does not hold.
6.  Words. Fewer than 3 seeds: open. 90 % interval within ± 5 %: equivalent. Significant and all
    guards hold: supported from 5 seeds on, suggested with 3 or 4. Significant the other way:
    contradicted, or the opposite is suggested. All else: open, with the effect that would have been
    visible (80 % power).
7.  Two arms of the same config and different seeds (F and F) must show nothing.
8.  All other numbers and figures are secondary: they are described, not tested.
"""
WHAT = ("main", "cross", "control", "rates")


@dataclass(frozen=True)
class Config:
    size: Literal["dry", "cpu", "gpu"] = flag("cpu", "dry: a minute | cpu: toy faces | gpu: 281M")
    objectives: tuple[str, ...] = flag(
        ("D", "V", "F"), "arms: D, V, U, F, or NAME=FLAGS of train.py"
    )
    seeds: tuple[int, ...] = flag((), "each with every arm; default the size's", low=0, high=999)
    stages: tuple[str, ...] = flag(STAGES, "stage2 needs fine")
    data: str = flag("", "as train.py takes it; default the size's")
    exclude_tags: tuple[str, ...] = flag((), "what fine leaves out; embedded data has its own")
    images: tuple[int, ...] = flag((), "of standard, fine, stage2", low=1, high=1e12)
    vae: str = flag("", "as train.py takes it; a latent cache brings its own")
    n: int = flag(0, "samples of each checkpoint and sampler; 0 = the size's", low=0, high=1e7)
    what: tuple[str, ...] = flag(
        WHAT, "main | cross: stage2 from the other's base | control: F and F | rates: H3's spread"
    )
    out: str = flag("runs/compare", "cards and report", writes="folder")
    runs: str = flag("", "where runs are trained; default OUT/runs", writes="folder")
    device: str = flag("auto", "auto | cpu | cuda")


def plan_of(cfg: Config) -> Plan:
    """The size's plan with what the flags say; what cannot be carried out is refused."""
    plan = PLANS[cfg.size]
    check_words("--seeds", cfg.seeds, ())
    check_words("--stages", cfg.stages, STAGES)
    check_words("--what", cfg.what, WHAT)
    if "stage2" in cfg.stages and "fine" not in cfg.stages:
        raise UserError(
            f"--stages {shown(cfg.stages)}: stage2 starts from fine", do="Add fine."
        )
    if cfg.images and len(cfg.images) != len(STAGES):
        raise UserError(
            f"--images {shown(cfg.images)}",
            wanted="three numbers, of standard, fine and stage2",
            do=f"Try --images {shown(plan.images)}.",
        )
    given = {"data": cfg.data, "images": cfg.images, "n": cfg.n, "seeds": cfg.seeds}
    plan = replace(plan, **{name: value for name, value in given.items() if value})
    if cfg.vae:
        plan = replace(plan, train={**plan.train, "vae": cfg.vae})
    if not plan.data:
        raise UserError("--size gpu needs --data", do="Give a folder of tagged images.")
    return plan


def check_words(flag_name: str, words: tuple[Any, ...], known: tuple[Any, ...]) -> None:
    if len(set(words)) < len(words):
        raise UserError(f"{flag_name} {shown(words)} names one twice", do="Name each once.")
    if known and (strange := [word for word in words if word not in known]):
        raise UserError(
            f"{flag_name} {shown(tuple(strange))}",
            wanted=f"some of {', '.join(known)}",
            do="Choose from these.",
        )


def bench_of(cfg: Config) -> Bench:
    """The plan, with its arms and places."""
    plan, arms = plan_of(cfg), read_arms(cfg.objectives)
    tags = cfg.exclude_tags or embedded_tags(images_behind(plan.data), "fine")
    if not tags:
        raise UserError(f"--data {plan.data} needs --exclude-tags", do="Name what fine leaves out.")
    out = Path(cfg.out)
    runs = Path(cfg.runs) if cfg.runs else out / "runs"
    return Bench(plan, arms, tuple(tags), out / "cards", runs, join_ranks(cfg.device))


def parts_of(cfg: Config, bench: Bench) -> list[Part]:
    """Every run, in order: first what the hypotheses need, seed by seed."""
    pair = [arm for arm in (hypotheses.FLOW, hypotheses.DDPM) if arm in bench.arms]
    seeds, plan, found = bench.plan.seeds, bench.plan, []
    if "main" in cfg.what:
        stages = [stage for stage in STAGES if stage in cfg.stages]
        found += [Part(arm, s, stage) for s in seeds for stage in stages for arm in bench.arms]
    if "rates" in cfg.what:
        tried = [(arm, s, rate) for s in seeds for arm in pair for rate in plan.rates]
        found += [Part(arm, s, "standard", rate=rate) for arm, s, rate in tried]
    if "cross" in cfg.what and "stage2" in cfg.stages and len(pair) == 2:
        for s in seeds:
            found.append(Part(pair[0], s, "stage2", base=pair[1]))
            found.append(Part(pair[1], s, "stage2", base=pair[0]))
    if "control" in cfg.what and hypotheses.FLOW in bench.arms:
        found += [Part(hypotheses.FLOW, plan.control_seed + s, "standard") for s in seeds]
    return found


def card_name(part: Part) -> str:
    """The file that says what a run came to: learning rates of one arm and seed share one."""
    return f"rates-{part.arm}-{part.seed}" if part.rate else part.name


def carry_out(cfg: Config, bench: Bench) -> None:
    """Make every part that has no card yet, after saying what it costs."""
    parts = parts_of(cfg, bench)
    todo = [part for part in parts if not (bench.cards / f"{card_name(part)}.json").exists()]
    tuned = [arm for arm in bench.arms if not (bench.cards / f"tuning-{arm}.json").exists()]
    price = cost(bench.plan, todo, len(tuned))
    if price.runs:
        print(price.lines(), flush=True)
        check_space(bench.runs, price.disk)
    references(bench)
    for arm in bench.arms:
        tune(bench, arm)
    for part in parts:
        if part.rate:
            rates_card(bench, part.arm, part.seed)
        else:
            run_card(bench, part)


def report(out: Path, control_seed: int) -> None:
    """Write the report of a folder of cards, and print what came out."""
    cards = hypotheses.sort_cards(read_cards(out / "cards"), control_seed)
    if not cards.runs:
        raise UserError(f"{out}/cards has no card of a run", do="Make them: see --help.")
    if not cards.references:
        raise UserError(f"{out}/cards/references.json is missing", do="Copy it too.")
    page = build(cards, RULE, out / "pictures")
    path = write(page, out)
    write_text(out / "verdict.json", strict_json(summary(cards), indent=1) + "\n")
    print("\n".join(page.lead))
    print(path)


def report_command(words: list[str]) -> None:
    """report DIR, or report RUN_A RUN_B … with the flags of experiments/runs.py."""
    folders = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    cfg, dry_run = parse(runs.Config, "", words[len(folders) :])
    if not folders:
        raise UserError("report of what?", do="Name a folder of cards, or folders of runs.")
    if dry_run:
        print(json.dumps({"report": folders, **vars(cfg)}, indent=1))
    elif len(folders) == 1 and (Path(folders[0]) / "cards").is_dir():
        report(Path(folders[0]), PLANS["cpu"].control_seed)
    else:
        # No seed of these is of a control.
        report(runs.measure(cfg, folders), sys.maxsize)


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        report_command(sys.argv[2:])
        return
    cfg, dry_run = parse(Config, __doc__)
    bench = bench_of(cfg)
    if dry_run:
        price = cost(bench.plan, parts_of(cfg, bench), len(bench.arms))
        whole = {**facts(bench.plan), "arms": bench.arms, "cost": price.lines()}
        print(json.dumps(whole, indent=1))
        return
    try:
        carry_out(cfg, bench)
    except Stopped:
        return
    report(Path(cfg.out), bench.plan.control_seed)


if __name__ == "__main__":
    cli(main)
