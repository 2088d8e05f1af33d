"""Would another 8-bit format of Adam's moments train better?   python benchmarks/formats8bit.py

300 steps of `tiny` on toy faces with each format and each of three seeds: same images, noise and
times. The moments are fp32 tensors that are rounded to a format after each step, as AdamW8bit's
are: `today's`; `m in 64`, an absmax for 64 neighbours of m and not for 256; `m/√v`, which is kept
in m's place and multiplied back.

The rule, fixed before the first run: a format is better if its held-out loss is below today's by
more than two standard errors of their ratio over the seeds. No other format is taken.

Two standard errors of three seeds are little, and two formats are asked. So one that is found
better is asked once more, with three seeds that chose nothing:

    python benchmarks/formats8bit.py --again

and taken only if it is better there too, by the same rule.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from harness import record
from harness.ranks import Ranks
from kernels.adamw8bit import quantized
from kernels.adamw_update import flat
from kernels.codec8bit import BLOCK, dequantize, quantize
from training.trainer import Trainer

IMAGES, SEEDS, AGAIN = 4800, (0, 1, 2), (3, 4, 5)
TODAY = "today's"


def rounded(x: Tensor, second: bool) -> Tensor:
    """x (n,) as its 8-bit codes give it back."""
    return dequantize(*quantize(x, second), second)


def todays(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return rounded(m, False), rounded(v, True)


def m_in_64(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # Each 64 alone in a block of 256, beside zeros.
    rows = F.pad(m, (0, -len(m) % 64)).view(-1, 64)
    alone = F.pad(rows, (0, BLOCK - 64))
    back = rounded(alone.flatten(), False).view(-1, BLOCK)
    return back[:, :64].flatten()[: len(m)], rounded(v, True)


def m_over_root_v(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    ratio = torch.where(v > 0, m / v.sqrt(), 0)
    v = rounded(v, True)
    return rounded(ratio, False) * v.sqrt(), v


FORMATS = {TODAY: todays, "m in 64": m_in_64, "m/√v": m_over_root_v}


def round_moments(form: Callable, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step: the moments of weights for which AdamW8bit keeps codes, in their order in
    memory."""
    for p, state in optimizer.state.items():
        if quantized(p):
            m, v = flat(state["exp_avg"]), flat(state["exp_avg_sq"])
            for kept, new in zip((m, v), form(m, v)):
                kept.copy_(new)


def setup(form: Callable, cfg: train.Config, ranks: Ranks) -> Trainer:
    tr = train.setup(cfg, ranks)
    tr.optimizer.register_step_post_hook(partial(round_moments, form))
    return tr


def run(out: Path, name: str, seed: int) -> float:
    """The held-out loss at the end."""
    cfg = train.Config(data="toyfaces:2048", images=IMAGES, seed=seed, out=str(out), dtype="fp32")
    cfg = replace(cfg, name=f"{list(FORMATS).index(name)}-{seed}", eval_every=IMAGES)
    cfg = train.resolve(replace(cfg, preview_every=0, save_every=0))
    train.train(cfg, Ranks(0, 1, torch.device("cpu")), partial(setup, FORMATS[name]))
    lines = (out / cfg.name / "log.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["event"] == "held-out"][-1]


def verdict(losses: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Of each other format: its loss over today's, mean and standard error, and whether it is
    better."""
    found = {}
    for name, of in losses.items():
        if name == TODAY:
            continue
        ratios = [ours / today for ours, today in zip(of, losses[TODAY], strict=True)]
        mean = statistics.mean(ratios)
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        found[name] = {"ratio": mean, "error": error, "better": mean + 2 * error < 1}
    return found


def found_better() -> list[str]:
    """The formats that the first seeds found better."""
    result = json.loads((record.RESULTS / "formats8bit.json").read_text())
    return [name for name, row in result["verdict"].items() if row["better"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="what was better, with other seeds")
    again = parser.parse_args().again
    names, seeds, file = list(FORMATS), SEEDS, "formats8bit"
    if again:
        names, seeds, file = [TODAY, *found_better()], AGAIN, "formats8bit_again"
    losses: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as out:
        for seed in seeds:
            for name in names:
                losses[name].append(run(Path(out), name, seed))
                print(f"seed {seed}, {name}: {losses[name][-1]:.5f}", flush=True)
    found = verdict(losses)
    for name, row in found.items():
        word = "better" if row["better"] else "not better"
        print(f"{name}: {row['ratio']:.5f} ± {row['error']:.5f} times the loss of {TODAY}: {word}")
    content = {"steps": IMAGES // 16, "seeds": seeds, "losses": losses, "verdict": found}
    record.write(file, content)


if __name__ == "__main__":
    main()
