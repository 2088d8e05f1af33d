"""Do prompts draw what they ask for?   python experiments/prompts.py

Toy faces, `python train.py --text bytes` from nothing, without the images that have both tags of
PAIR. Then samples, whose tags are read by ridge regression that was fitted to real images
(experiments/measures.py).

Rule: training may take 6 minutes. Each of 64 prompts asks for two tags of two groups (hair colour,
mouth, …), drawn at random with seed 0 and none of them PAIR; one sample each. It passes if both
tags are read in at least 80% of the samples. Of PAIR and, beside it, of a pair that training has
seen, 64 samples each are counted; no number is asked of these. The flags' defaults were chosen on
the prompts of --prompts 1, by shorter runs.

Writes benchmarks/results/prompts.json and docs/prompts.png, where each line of SHOWN has a row of
eight samples.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor

from data.toyfaces import GROUPS
from experiments.measures import References, TagReader, open_references
from harness import record
from harness.cli import cli, flag, parse
from harness.pictures import save_grid
from harness.ranks import Ranks
from samplers import Sampling, asked, open_generator

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PAIR = ("green hair", "glasses")
SEEN = ("red hair", "glasses")
N = 64
SHARE = 0.8
MINUTES = 6.0
SHOWN = (
    "green hair, glasses",
    "red hair, beret",
    "blonde hair, twin tails, night background",
    "dark skin, cat ears, smile",
)


@dataclass(frozen=True)
class Config:
    images: int = flag(74_000, "of training", low=1, high=1e9)
    caption_drop: float = flag(0.1, "share of tags left out in training", low=0, high=1)
    shift: float = flag(2.0, "of training times", low=1e-3, high=1e3)
    cfg: float = flag(5.0, "guidance of the samples", low=0, high=100)
    steps: int = flag(16, "of Heun", low=1, high=1e4)
    prompts: int = flag(0, "seed of the tags that are asked", low=0, high=2**63 - 1)
    run: str = flag("", "a run's folder to measure instead of training one")


def train(cfg: Config, out: Path) -> tuple[Path, float]:
    """(the run's folder, seconds of the clock)."""
    words = ["--text", "bytes", "--caption-shuffle", "--caption-drop", cfg.caption_drop]
    words += ["--stage", "fine", "--exclude-tags", " & ".join(PAIR)]
    words += ["--shift", cfg.shift, "--images", cfg.images]
    words += ["--eval-every", 0, "--preview-every", 0, "--out", out, "--name", "prompts"]
    begun = time.perf_counter()
    subprocess.run([sys.executable, "train.py", *map(str, words)], check=True, cwd=ROOT)
    return out / "prompts", time.perf_counter() - begun


def random_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Two tags of two groups, n times."""
    draw = np.random.default_rng(seed)
    groups = [tags for name, tags in GROUPS.items() if name != "character"]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        a, b = sorted(draw.choice(len(groups), 2, replace=False))
        pair = str(draw.choice(list(groups[a]))), str(draw.choice(list(groups[b])))
        if pair != PAIR:
            pairs.append(pair)
    return pairs


def drawn(cfg: Config, run: Path, prompts: Sequence[str]) -> Tensor:
    """uint8 (n, 3, H, W): a sample of each prompt, of the seeds from 0 on."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.txt"
        file.write_text("\n".join(prompts) + "\n")
        flags = Sampling(str(run), prompt=f"@{file}", cfg=cfg.cfg, method="heun", steps=cfg.steps)
        gen = open_generator(flags, CPU)
    return gen.images(list(range(len(prompts))), asked(flags, gen, len(prompts))).images


def shown(reader: TagReader, features: Tensor, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """bool (n, 2): is each tag of a pair read in its sample?"""
    place = {tag: k for k, tag in enumerate(reader.tags)}
    seen = reader.shows(features)
    index = torch.tensor([[place[a], place[b]] for a, b in pairs])
    return seen.gather(1, index)


def shares(found: Tensor) -> dict[str, float]:
    both, each = found.all(1).double().mean(), found.double().mean()
    return {"both": float(both), "each": float(each)}


def accuracy(refs: References) -> float:
    """Of the reader, on images that it was not fitted to."""
    held = refs.held["all"]
    right = refs.reader.shows(refs.features[held]) == refs.truth[held]
    return float(right[:, :-1].double().mean())


def measure(cfg: Config, run: Path, refs: References) -> dict[str, Any]:
    result: dict[str, Any] = {"reader": accuracy(refs)}
    pairs = {"asked": random_pairs(N, cfg.prompts)}
    pairs |= {"never together": [PAIR] * N, "together": [SEEN] * N}
    for name, wanted in pairs.items():
        images = drawn(cfg, run, [", ".join(pair) for pair in wanted])
        found = shown(refs.reader, refs.extractor(images), wanted)
        result[name] = shares(found)
        if name == "asked":
            missed = [pair for pair, row in zip(wanted, found.tolist()) if not all(row)]
            result["missed"] = [", ".join(pair) for pair in missed]
        else:
            result[name] |= dict(zip(wanted[0], found.double().mean(0).tolist()))
    return result


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
        return
    with tempfile.TemporaryDirectory() as out:
        run, seconds = (Path(cfg.run), None) if cfg.run else train(cfg, Path(out))
        refs = open_references("toyfaces", 64, 0.02, (), "pca", Path(out), Ranks(0, 1, CPU))
        result = {"config": asdict(cfg), "minutes": seconds and seconds / 60}
        result |= measure(cfg, run, refs)
        rows = [drawn(cfg, run, [line] * 8) for line in SHOWN]
    print(json.dumps(result, indent=1))
    if cfg.run:
        save_grid(torch.cat(rows), Path("prompts.png"), columns=8)
        return
    result["passes"] = result["asked"]["both"] >= SHARE and result["minutes"] <= MINUTES
    save_grid(torch.cat(rows), ROOT / "docs" / "prompts.png", columns=8)
    record.write("prompts", result)


if __name__ == "__main__":
    cli(main)
