"""Does a run in bf16 end where one in fp32 does?   python benchmarks/bf16.py [--images 40_000]

The default run of train.py in fp32 and in bf16, from three seeds each: same images, noise and
times, so that only the dtype differs. Compares the held-out losses.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from harness import record
from harness.cli import cli, flag, parse

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Config:
    images: int = flag(train.Config.images, "shown to each run", low=16, high=1e9)
    out: str = flag("", "where the runs are kept; none = nowhere", writes="folder")


def held_out(out: str, dtype: str, seed: int, images: int) -> float:
    """The last held-out loss of a run, which is made if it is not there."""
    name = f"{dtype}-{seed}"
    flags = ("--dtype", dtype, "--seed", seed, "--images", images, "--out", out, "--name", name)
    reports = ("--preview-every", 0, "--save-every", 0, "--eval-every", images)
    command = [sys.executable, "train.py", *map(str, (*flags, *reports))]
    subprocess.run(command, check=True, cwd=ROOT)
    lines = (Path(out) / name / "log.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["event"] == "held-out"][-1]


def compare(out: str, images: int) -> None:
    """Make the runs, print the ratios and write the result."""
    losses = {
        dtype: [held_out(out, dtype, seed, images) for seed in SEEDS] for dtype in DTYPES
    }
    ratios = [b / a for a, b in zip(losses["fp32"], losses["bf16"])]
    mean, spread = statistics.mean(ratios), statistics.stdev(ratios)
    print(f"held-out loss, bf16 / fp32: {mean:.4f} ± {spread:.4f} over {len(SEEDS)} seeds")
    record.write("bf16", {"images": images, "held-out losses": losses, "ratios": ratios})


def main() -> None:
    cfg, _ = parse(Config, __doc__)
    if cfg.out:
        compare(str(Path(cfg.out).absolute()), cfg.images)
        return
    with tempfile.TemporaryDirectory() as out:
        compare(out, cfg.images)


if __name__ == "__main__":
    cli(main)
