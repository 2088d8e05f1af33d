"""Do bf16 weights train as fp32 weights do?   python benchmarks/rounding.py --out DIR

`tiny` on toy faces by AdamW8bit, at a rate that large networks are fine-tuned at, from three seeds:
with fp32 weights; with bf16 weights, rounded stochastically (--weights bf16); and with bf16 weights
rounded to nearest, which no command of ours does. All compute in bf16, on the same images, noise
and times. They are judged by the held-out loss of the first average, which is fp32 in all of them.

The rule, fixed before the runs were made. With r = a loss over that of fp32 weights from its seed:
    stochastic  holds if the mean of r over the seeds is within 1% of 1
    nearest     is shown to fail if the mean of its r is more than 1% above 1, by more than two
                standard errors of that mean
A run that is in DIR is not made again. --seed N makes the runs of one seed only, and no result.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
from harness import record
from harness.cli import cli, flag, parse
from harness.ranks import Ranks
from harness.rows import read_log
from training.trainer import Trainer

IMAGES, LR, SEEDS = 8_000, 2e-4, (0, 1, 2)
WITHIN = 0.01


@dataclass(frozen=True)
class Config:
    out: str = flag(help="where the runs are kept", writes="folder")
    seed: int | None = flag(None, "make only the runs of this one, and no result", low=0, high=1e6)
    images: int = flag(IMAGES, "shown to each run", low=16, high=1e9)


def to_nearest(cfg: train.Config, ranks: Ranks) -> Trainer:
    """train.setup, with the optimizer rounding as a cast does."""
    tr = train.setup(cfg, ranks)
    tr.optimizer.rounding = None
    return tr


# What differs between the arms: the weights, and how a run is set up.
ARMS: dict[str, tuple[str, Callable[[Any, Ranks], Trainer]]] = {
    "fp32": ("fp32", train.setup),
    "stochastic": ("bf16", train.setup),
    "nearest": ("bf16", to_nearest),
}


def held_out(out: str, arm: str, seed: int, images: int) -> float:
    """The last held-out loss of a run, which is made, or gone on with, if it is not done."""
    weights, setup = ARMS[arm]
    cfg = train.resolve(
        train.Config(
            data="toyfaces:2048", images=images, lr=LR, seed=seed, dtype="bf16", weights=weights,
            optim="adamw8bit", out=out, name=f"{arm}-{seed}", device="cpu",
            preview_every=0, save_every=0, eval_every=images,
        )
    )  # fmt: skip
    if train.train(cfg, Ranks(0, 1, torch.device("cpu")), setup):
        raise KeyboardInterrupt
    rows, _ = read_log(Path(out) / cfg.name / "log.jsonl")
    return [row["loss"] for _, row in rows if row["event"] == "held-out"][-1]


def verdict(losses: dict[str, list[float]]) -> dict[str, Any]:
    """The ratios to fp32 of both arms, by name, and what the rule says."""
    found: dict[str, Any] = {"ratios": {}, "mean": {}, "standard error": {}}
    for arm in ("stochastic", "nearest"):
        ratios = [loss / base for loss, base in zip(losses[arm], losses["fp32"], strict=True)]
        found["ratios"][arm] = ratios
        found["mean"][arm] = statistics.mean(ratios)
        found["standard error"][arm] = statistics.stdev(ratios) / len(ratios) ** 0.5
    mean, error = found["mean"], found["standard error"]
    found["stochastic holds"] = abs(mean["stochastic"] - 1) <= WITHIN
    found["nearest fails"] = mean["nearest"] - 2 * error["nearest"] > 1 + WITHIN
    return found


def main() -> None:
    cfg, _ = parse(Config, __doc__)
    out = str(Path(cfg.out).absolute())
    seeds = SEEDS if cfg.seed is None else (cfg.seed,)
    losses = {arm: [held_out(out, arm, seed, cfg.images) for seed in seeds] for arm in ARMS}
    if cfg.seed is not None:
        print(losses)
        return
    found = verdict(losses)
    for arm, mean in found["mean"].items():
        error = found["standard error"][arm]
        print(f"held-out loss, bf16 weights rounded {arm} / fp32: {mean:.4f} ± {error:.4f}")
    how = {"images": cfg.images, "lr": LR, "seeds": seeds}
    record.write("rounding", {**how, "held-out losses": losses, **found})


if __name__ == "__main__":
    cli(main)
