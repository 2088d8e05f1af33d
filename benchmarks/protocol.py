"""The protocol of the source experiment, on runs:  python benchmarks/protocol.py --runs runs/a,runs/b --n 2048 --features pca

Each run's samples against the images it was trained on, against those with the excluded tags and against the rest of the data,
with the floor (real against real, as many) beside each; and whether it copies. A copier of training images, which wins every
distance, stands below the runs: the memorisation check has to flag it.
"""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval_fid
import data.robohash as robo
import data.toyfaces as toyfaces
from benchmarks import record
from harness.cli import UserError, cli, parse
from eval_fid import GROUPS, Side, default_ref, measure, side, table
from metrics.features import extract, open_images, split_spec
from metrics.inception import cache_folder
from harness.ranks import PATIENCE, Ranks, join_ranks
from harness.run import read_config


@dataclass(frozen=True)
class Config(eval_fid.Config):
    runs: tuple[str, ...] = ()         # folders of runs of one data set, a,b,c
    n: int = 2_048                     # samples of each
    holdout: float = -1.0              # as the runs were trained


def excluded(configs: list[dict[str, Any]], data: str) -> list[str]:
    """The tags that make the subset: any run's, else those the embedded data leaves out."""
    given = next((c["exclude_tags"] for c in configs if c.get("exclude_tags")), None)
    embedded = {"toyfaces": toyfaces.EXCLUDED, "robohash": robo.EXCLUDED}.get(data.partition(":")[0])
    if not (given or embedded):
        raise UserError(f"no run of {data} excludes tags, so there is no subset to measure.  Give a run with --exclude-tags among --runs.")
    return list(given or embedded)


def assess(cfg: Config, ranks: Ranks) -> dict[str, Any]:
    """{run: {"metrics": {reference: metrics}, …}}, the copier's, and those of real images that were held out."""
    configs = [read_config(Path(run)) for run in cfg.runs]
    if not configs:
        raise UserError("--runs: wanted folders of runs, a,b,c.")
    specs = {split_spec(default_ref(c, run))[0] for c, run in zip(configs, cfg.runs)}
    if len(specs) > 1 or len({(c["resolution"], c["holdout"]) for c in configs}) > 1:
        raise UserError(f"these runs are not of one data set ({', '.join(sorted(specs))}).")
    data, cache = specs.pop(), Path(cfg.cache) if cfg.cache else cache_folder() / "features"
    images = open_images(data, configs[0]["resolution"])
    train, held_out = images.split(configs[0]["holdout"])
    extractor = eval_fid.build_extractor(cfg, images, ranks)
    stored, name = extract(images, extractor, cache, ranks), eval_fid.name_of(extractor)
    tagged = images.where(" | ".join(f"({tag})" for tag in excluded(configs, data))).index
    subset = replace(train, index=np.intersect1d(train.index, tagged))
    whole, part = side(stored.select(train.index), ranks), side(stored.select(subset.index), ranks)
    remaining = np.setdiff1d(train.index, subset.index)
    rest = Side(stored.select(remaining), [whole.parts[0] - part.parts[0]], len(remaining))      # exactly, without another pass
    references = {"all": whole, "excluded tags": part, "rest": rest}
    fresh = {"all": held_out.index, "excluded tags": np.intersect1d(held_out.index, tagged), "rest": np.setdiff1d(held_out.index, tagged)}
    own, out = {"standard": "all", "fine": "rest", "stage2": "excluded tags"}, {}
    for run, config in zip(cfg.runs, configs):
        one = replace(cfg, ckpt=run)
        gen = eval_fid.open_generator(one, ranks.device)
        fake = side(eval_fid.sample_features(one, gen, extractor, cfg.n, cache, ranks), ranks, GROUPS)
        rows = {key: ranks.broadcast(lambda: measure(fake, ref, stored.select(fresh[key]), name, pairs=cfg.pairs))
                for key, ref in references.items()}
        out[Path(run).name] = {"trained on": own[config["stage"]], "sampled": gen.sampled, "fingerprint": gen.subject["fingerprint"], "metrics": rows}
    r = np.random.default_rng(0)
    copies = side(stored.select(r.permutation(train.index)[:min(cfg.n, len(train))]), ranks, GROUPS)
    out["a copier"] = {"trained on": "all", "metrics": {
        "all": ranks.broadcast(lambda: measure(copies, whole, stored.select(held_out.index), name, pairs=cfg.pairs))}}
    half = np.isin(held_out.index, r.permutation(held_out.index)[::2])          # real images that nobody trained on must not be flagged
    if half.sum() > 9:
        fresh_side, others = side(stored.select(held_out.index[half]), ranks), stored.select(held_out.index[~half])
        rows = {"all": ranks.broadcast(lambda: measure(fresh_side, whole, others, name, pairs=cfg.pairs))}
        out["fresh images"] = {"trained on": "", "metrics": rows}
    return out


def main() -> None:
    cfg, _ = parse(Config, __doc__)
    ranks = join_ranks(cfg, patience=PATIENCE)
    result = assess(cfg, ranks)
    if ranks.rank == 0:
        lines = [["run", "against", "", "value", "± s.e.", "floor", "memorisation"]]
        for run, row in result.items():
            for ref, metrics in row.get("metrics", {}).items():
                memory = metrics.get("memorisation", {})
                for name, m in list(metrics.items())[:2]:
                    cells = [f"{m[k]:.4f}" if k in m else "" for k in ("value", "error", "floor")]
                    lines.append([run, ref + " (its own)" * (ref == row["trained on"]), name, *cells,
                                  f"{memory['ratio']:.2f}{' FLAGGED' * memory['flagged']}" if memory else ""])
        print(table(lines))
        data = re.sub(r"\W+", "-", split_spec(default_ref(read_config(Path(cfg.runs[0])), cfg.runs[0]))[0])
        record.write(f"protocol-{data}-{cfg.features}", {"n": cfg.n, "results": result})
    ranks.leave()


if __name__ == "__main__":
    cli(main)
