"""Cards of runs that train.py has made, so that any of them can be reported side by side."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ckpt import find_checkpoint, open_unet
from data.sources import embedded_tags
from experiments.arms import PLANS, Sampler
from experiments.cards import VERSION
from experiments.parts import FIRST, Bench, described, references
from experiments.protocol import read_configs
from harness.cli import UserError, flag
from harness.files import safe_name
from harness.ranks import join_ranks
from harness.run import checkpoints, read_config

SWEEP = (4, 16, 64)


@dataclass(frozen=True)
class Config:
    n: int = flag(512, "samples of each run and sampler", low=8, high=1e7)
    features: Literal["pca", "inception"] = flag("pca", "what distances are of")
    out: str = flag("runs/report", "cards and report", writes="folder")
    device: str = flag("auto", "auto | cpu | cuda")


def measure(cfg: Config, folders: list[str]) -> Path:
    """Make the cards of runs of one data set; returns the folder that has them."""
    names = [safe_name(Path(folder).name) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"two of {', '.join(folders)} have one name", do="Rename one.")
    for folder in folders:
        if not checkpoints(Path(folder)):
            raise UserError(
                f"{folder} is no run with a checkpoint, nor a folder with cards/",
                do="Name folders that train.py made.",
            )
    data, configs = read_configs(tuple(folders))
    given = next((c["exclude_tags"] for c in configs if c.get("exclude_tags")), ())
    tags = tuple(given) or embedded_tags(data, "fine")
    first = configs[0]
    plan = replace(
        PLANS["cpu"], data=data, resolution=first["resolution"], holdout=first["holdout"],
        n=cfg.n, features=cfg.features, sweep=SWEEP,
    )
    out = Path(cfg.out)
    bench = Bench(plan, {}, tags, out / "cards", out, join_ranks(cfg.device))
    references(bench)
    for folder, name in zip(folders, names):
        run_card(bench, Path(folder), name)
    return out


def run_card(bench: Bench, run: Path, name: str) -> dict[str, Any]:
    """The card of a run's newest checkpoint, made if there is none."""
    plan, config = bench.plan, read_config(run)
    method = plan.curve.method
    samplers = list(dict.fromkeys([plan.curve, *(Sampler(method, k) for k in plan.sweep)]))
    asked = {
        "version": VERSION,
        "n": plan.n,
        "features": plan.features,
        "samplers": [sampler.label for sampler in samplers],
        "weights": open_unet(find_checkpoint(run)).meta["fingerprint"],
    }
    if card := bench.kept(name, asked):
        return card
    folder, sets = checkpoints(run)[-1], []
    for sampler in samplers:
        features, nfe = bench.drawn(folder, sampler, plan.n, FIRST)
        found = {"images": int(folder.name), "sampler": sampler.label, "nfe": nfe}
        sets.append({**found, **bench.refs.measure(features)})
    found = {
        "arm": name,
        "seed": config["seed"],
        "stage": config["stage"],
        "base": "",
        "best": plan.curve.label,
        "sets": sets,
        **described(bench, run, f"{name}-{config['seed']}-{config['stage']}", FIRST),
    }
    return bench.keep(name, "run", asked, found)
