"""The protocol of the source experiment, on runs of one data set:  --runs runs/a,runs/b

    python experiments/protocol.py --runs runs/a,runs/b --n 2048 --features pca

Each run's samples against the images it was trained on, against those with the excluded tags and
against the rest of the data, with the floor (real against real, as many) beside each; and whether
it copies. A copier of training images, which wins every distance, stands below the runs: the
memorisation check has to flag it.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

import numpy as np

import data.robohash as robohash
import data.toyfaces as toyfaces
import eval_fid
from ckpt.hub import data_from_file
from eval_fid import GROUPS, HELD, Side, default_ref, measure, side
from harness import record
from harness.cli import UserError, cli, flag, flag_like, parse
from harness.ranks import PATIENCE, Ranks, join_ranks
from harness.run import read_config
from harness.typed import Open, check
from metrics.cards import table
from metrics.features import Images, Stored, extract, open_images, split_spec
from metrics.inception import cache_folder
from samplers import METHODS

# Which of the references a stage was trained on.
OWN = {"standard": "all", "fine": "rest", "stage2": "excluded tags"}


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = flag((), "folders of runs of one data set, a,b,c")
    n: int = flag(2_048, "samples of each", low=2, high=1e9)
    features: Literal["inception", "pca"] = flag_like(eval_fid.Config, "features", "inception")
    weights: str = flag_like(eval_fid.Config, "weights", "")
    preproc: Literal["torch", "clean", "tf"] = flag_like(eval_fid.Config, "preproc", "torch")
    pairs: int = flag_like(eval_fid.Config, "pairs", 5_000)
    cache: str = flag_like(eval_fid.Config, "cache", "")
    seed: int = flag_like(eval_fid.Config, "seed", 0)
    labels: tuple[str, ...] = flag_like(eval_fid.Config, "labels", ())
    batch: int = flag_like(eval_fid.Config, "batch", 64)
    device: str = flag_like(eval_fid.Config, "device", "auto")
    dtype: Literal["auto", "fp32", "bf16"] = flag_like(eval_fid.Config, "dtype", "auto")
    method: Literal[("", *METHODS)] = flag_like(eval_fid.Config, "method", "")
    steps: int | None = flag_like(eval_fid.Config, "steps", None)
    cfg: float = flag_like(eval_fid.Config, "cfg", 1.0)

    def sampling(self, run: str) -> eval_fid.Config:
        """The same flags, for one run."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        del own["runs"]
        return eval_fid.Config(ckpt=run, **own)


@dataclass(frozen=True)
class References:
    """The images of one data set, cut by the excluded tags."""

    extractor: Any
    name: str  # of the features, as metrics are named by them
    stored: Stored  # features of all images
    train: np.ndarray  # numbers of the images that training saw
    held_out: np.ndarray
    sides: dict[str, Side]  # all | excluded tags | rest, of those that training saw
    fresh: dict[str, np.ndarray]  # the same, of those held out

    def measure(self, fake: Side, key: str, pairs: int, ranks: Ranks) -> dict[str, Any]:
        held = self.stored.select(self.fresh[key])
        ref = self.sides[key]
        return ranks.broadcast(lambda: measure(fake, ref, held, self.name, pairs=pairs))


@dataclass
class Compared(Open):
    """What the config of a run has to say, to be compared here (see also harness.run.Recorded)."""

    data: str
    stage: Literal["standard", "fine", "stage2"]
    resolution: int
    holdout: float


def excluded(configs: list[dict[str, Any]], data: str) -> list[str]:
    """The tags that make the subset: any run's, else those the embedded data leaves out."""
    given = next((c["exclude_tags"] for c in configs if c.get("exclude_tags")), None)
    embedded = {"toyfaces": toyfaces.EXCLUDED, "robohash": robohash.EXCLUDED}
    tags = given or embedded.get(data.partition(":")[0])
    if not tags:
        raise UserError(
            f"no run of {data} excludes tags, so there is no subset to measure",
            do="Give a run with --exclude-tags among --runs.",
        )
    return list(tags)


def read_configs(runs: tuple[str, ...]) -> tuple[str, list[dict[str, Any]]]:
    """(data, configs) of runs that were trained on one data set."""
    if not runs:
        raise UserError("--runs", wanted="folders of runs, a,b,c", do="Give at least one.")
    configs = [read_config(Path(run)) for run in runs]
    for run, config in zip(runs, configs):
        check(config, Compared, Path(run) / "config.json")
    specs = {split_spec(default_ref(config, run))[0] for config, run in zip(configs, runs)}
    views = {(config["resolution"], config["holdout"]) for config in configs}
    if len(specs) > 1 or len(views) > 1:
        raise UserError(
            f"these runs are not of one data set ({', '.join(sorted(specs))})",
            do="Give runs of equal --data, --resolution and --holdout.",
        )
    return data_from_file(specs.pop()), configs


def open_references(
    cfg: Config, images: Images, holdout: float, tags: list[str], ranks: Ranks
) -> References:
    """Features of the data set, and its parts. Every rank calls."""
    train, held_out = images.split(holdout)
    extractor = eval_fid.build_extractor(cfg, images, ranks)
    stored = extract(images, extractor, feature_cache(cfg), ranks)
    tagged = images.where(" | ".join(f"({tag})" for tag in tags)).index
    subset = np.intersect1d(train.index, tagged)
    remaining = np.setdiff1d(train.index, subset)
    whole = side(stored.select(train.index), ranks)
    part = side(stored.select(subset), ranks)
    # The rest, exactly and without another pass: sets can be taken away from each other.
    rest = Side(stored.select(remaining), [whole.parts[0] - part.parts[0]], len(remaining))
    fresh = {
        "all": held_out.index,
        "excluded tags": np.intersect1d(held_out.index, tagged),
        "rest": np.setdiff1d(held_out.index, tagged),
    }
    sides = {"all": whole, "excluded tags": part, "rest": rest}
    name = eval_fid.name_of(extractor)
    return References(extractor, name, stored, train.index, held_out.index, sides, fresh)


def feature_cache(cfg: Any) -> Path:
    return Path(cfg.cache) if cfg.cache else cache_folder() / "features"


def assess(cfg: Config, ranks: Ranks) -> dict[str, Any]:
    """{run: {"metrics": {reference: metrics}, …}}; also of a copier, and of real images that were
    held out."""
    data, configs = read_configs(cfg.runs)
    images = open_images(data, configs[0]["resolution"])
    tags = excluded(configs, data)
    refs = open_references(cfg, images, configs[0]["holdout"], tags, ranks)
    out = {}
    for run, config in zip(cfg.runs, configs):
        out[Path(run).name] = assess_run(cfg.sampling(run), config["stage"], refs, ranks)
    return out | assess_controls(cfg, refs, ranks)


def assess_run(cfg: eval_fid.Config, stage: str, refs: References, ranks: Ranks) -> dict[str, Any]:
    """One run's samples against every reference."""
    checkpoint = eval_fid.open_checkpoint(cfg, ranks.device)
    cache = feature_cache(cfg)
    stored = eval_fid.sample_features(cfg, checkpoint, refs.extractor, cfg.n, cache, ranks)
    fake = side(stored, ranks, GROUPS)
    return {
        "trained on": OWN[stage],
        "sampled": checkpoint.sampled,
        "fingerprint": checkpoint.subject["fingerprint"],
        "metrics": {key: refs.measure(fake, key, cfg.pairs, ranks) for key in refs.sides},
    }


def assess_controls(cfg: Config, refs: References, ranks: Ranks) -> dict[str, Any]:
    """What the memorisation check must flag (training images) and what it must not (fresh ones)."""
    r = np.random.default_rng(0)
    copied = r.permutation(refs.train)[: min(cfg.n, len(refs.train))]
    copies = side(refs.stored.select(copied), ranks, GROUPS)
    metrics = refs.measure(copies, "all", cfg.pairs, ranks)
    out = {"a copier": {"trained on": "all", "metrics": {"all": metrics}}}
    half = np.isin(refs.held_out, r.permutation(refs.held_out)[::2])
    if half.sum() >= HELD:
        fresh = side(refs.stored.select(refs.held_out[half]), ranks)
        others = replace(refs, fresh={"all": refs.held_out[~half]})
        metrics = others.measure(fresh, "all", cfg.pairs, ranks)
        out["fresh images"] = {"trained on": "", "metrics": {"all": metrics}}
    return out


def lines_of(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table that is printed: the first two metrics of every run and reference."""
    lines = [["run", "against", "", "value", "± s.e.", "floor", "memorisation"]]
    for run, row in result.items():
        for ref, metrics in row.get("metrics", {}).items():
            own = " (its own)" if ref == row["trained on"] else ""
            copies = ""
            if memory := metrics.get("memorisation"):
                flagged = " FLAGGED" if memory["flagged"] else ""
                copies = f"{memory['ratio']:.2f}{flagged}"
            for name, metric in list(metrics.items())[:2]:
                numbers = (metric.get(key) for key in ("value", "error", "floor"))
                cells = ["" if number is None else f"{number:.4f}" for number in numbers]
                lines.append([run, ref + own, name, *cells, copies])
    return lines


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
        return
    ranks = join_ranks(cfg.device, patience=PATIENCE)
    result = assess(cfg, ranks)
    if ranks.rank == 0:
        print(table(lines_of(result)))
        data = re.sub(r"\W+", "-", read_configs(cfg.runs)[0])
        record.write(f"protocol-{data}-{cfg.features}", {"n": cfg.n, "results": result})
    ranks.leave()


if __name__ == "__main__":
    cli(main)
