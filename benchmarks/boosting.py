"""What boosting costs:  python benchmarks/boosting.py [--rounds 9] [--work DIR]

1. The pipeline (resize, encode, noise, solver, decode) over as many bare calls of its network.
2. 64 px to 128 px by 10 evaluations, against 25 Heun steps of a network of the same size at 128 px.
3. Robohash of 64 px made 128 and 256 px by two networks, drawn by one command. The three networks
   are trained here, briefly: what is drawn shows that it runs, not how good it is.
4. FLOP of pipelines of Stable Diffusion's size, counted without computing.

Sides take turns; quartiles of a turn's ratios. The networks of 1 and 2 are untrained: time does not
depend on weights.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import harness.interrupt  # noqa: F401

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.race import alternate
from diffusion.boosting import Stage, boost
from diffusion.guidance import guided
from diffusion.sampling import sample
from harness import record
from harness.cli import cli, flag, parse
from model import PRESETS, UNet
from objectives import make_objective
from vae import VAE, VAEConfig, fit_pca

BATCH, NFE, HEUN = 4, 10, 25
TRAINED = {"base": 64, "twice": 128, "again": 256}
FACES, IMAGES, DRAWN = 64, 128, 4


@dataclass(frozen=True)
class Config:
    rounds: int = flag(9, "turns of all sides", low=3, high=1000)
    work: str = flag("", "folder of the networks of 3; default a temporary one", writes="folder")


# ---- time ----------------------------------------------------------------------------------------


def network(in_channels: int) -> UNet:
    cfg = replace(PRESETS["tiny"], in_channels=in_channels, out_channels=32)
    return UNet(cfg).eval()


@torch.no_grad()
def times(rounds: int) -> dict[str, Any]:
    """1 and 2: seconds for a batch."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(64, 3, 128, 128, generator=g) * 2 - 1
    vae, small = fit_pca(pixels), torch.rand(BATCH, 3, 64, 64, generator=g) * 2 - 1
    enlarger, single = network(64), network(32)
    cfm, fm = make_objective("cfm"), make_objective("fm")
    stage = Stage(cfm.source, guided(cfm, enlarger), vae.encode, vae.decode, factor=2)
    x = torch.randn(BATCH, 32, 16, 16, generator=g)
    both, t = torch.cat([x, x], 1), torch.full((BATCH,), 500.0)
    seeds = list(range(BATCH))

    def bare() -> None:
        for _ in range(NFE):
            enlarger(both, t)

    def at_once() -> None:
        vae.decode(sample(guided(fm, single), x, method="heun", steps=HEUN).x)

    calls = {
        "boosting": lambda: boost([stage], small, seeds, method="euler", steps=NFE),
        "its network": bare,
        "at full size": at_once,
    }
    turns = [alternate(calls, 1) for _ in range(rounds)]
    seconds = {name: [turn[name] for turn in turns] for name in calls}
    over = [turn["boosting"] / turn["its network"] - 1 for turn in turns]
    faster = [turn["at full size"] / turn["boosting"] for turn in turns]
    return {
        "batch": BATCH,
        "evaluations": {"boosting": NFE, "at full size": 2 * HEUN - 1},
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "overhead": quartiles(over),
        "images/s over full size's": quartiles(faster),
    }


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


# ---- one command ---------------------------------------------------------------------------------


def run(script: str, *words: Any) -> float:
    """Seconds of a command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True)
    return time.perf_counter() - start


def cascade(work: Path) -> dict[str, Any]:
    """3: robohash of 256 px from 64 px."""
    seconds = {}
    for name, side in TRAINED.items():
        words = ["--data", f"robohash:{FACES}", "--resolution", side, "--model", "nano"]
        words += ["--images", IMAGES, "--preview-every", 0, "--eval-every", 0, "--out", work]
        words += [] if name == "base" else ["--objective", "cfm", "--lowres", 2]
        seconds[name] = run("train.py", *words, "--name", name)
    boosts = f"{work / 'twice'},{work / 'again'}"
    flags = ["--n", DRAWN, "--boost", boosts, "--out", work / "drawn", "--device", "cpu"]
    drawing = run("samplers.py", "--ckpt", work / "base", *flags)
    pictures = sorted((work / "drawn").glob("*.png"))
    return {
        "images each was trained on": IMAGES,
        "training seconds": seconds,
        "drawn": len(pictures),
        "sides": sorted({Image.open(path).size[0] for path in pictures}),
        "seconds of the one command": drawing,
    }


# ---- FLOP ----------------------------------------------------------------------------------------


def flops() -> dict[str, float]:
    """4: TFLOP for one image of one call; a multiply-add is two."""
    counts = {}
    sd, text = PRESETS["sd15"], torch.empty(1, 77, 768, device="meta")
    with torch.device("meta"):
        base = UNet(sd)
        enlarger = UNet(replace(PRESETS["toy-281m"], in_channels=8, out_channels=4, num_classes=0))
        vae = VAE(VAEConfig(), "sd")
    for side in (32, 64, 128):
        x, t = torch.empty(1, 4, side, side, device="meta"), torch.empty(1, device="meta")
        image = torch.empty(1, 3, 8 * side, 8 * side, device="meta")
        calls = {
            "sd15": lambda: base(x, t, context=text),
            "toy-281m enlarger": lambda: enlarger(torch.cat([x, x], 1), t),
            "sd encoder": lambda: vae.encoder(image),
            "sd decoder": lambda: vae.decoder(x),
        }
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            counts[f"{name} at {8 * side} px"] = counter.get_total_flops() / 1e12
    return counts


def pipelines(one: dict[str, float]) -> dict[str, float]:
    """TFLOP of an image of 1024 px by 25 Heun steps of sd15, without guidance: at full size, and at
    512 px or 256 px with one or two enlargings of 10 evaluations."""
    calls = 2 * HEUN - 1
    out = {"sd15 at 1024 px": calls * one["sd15 at 1024 px"] + one["sd decoder at 1024 px"]}
    for start in (512, 256):
        total = calls * one[f"sd15 at {start} px"] + one[f"sd decoder at {start} px"]
        side = start
        while side < 1024:
            side *= 2
            total += NFE * one[f"toy-281m enlarger at {side} px"]
            total += one[f"sd encoder at {side} px"] + one[f"sd decoder at {side} px"]
        out[f"sd15 at {start} px, enlarged"] = total
    return out


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    counted = flops()
    result = {"TFLOP": counted, "TFLOP of pipelines": pipelines(counted), "rounds": cfg.rounds}
    result["times"] = times(cfg.rounds)
    with tempfile.TemporaryDirectory() as folder:
        result["robohash"] = cascade(Path(cfg.work or folder))
    for name, value in result["times"]["seconds"].items():
        print(f"{name:<14} {value[1]:.3f} s")
    record.write("boosting", result)


if __name__ == "__main__":
    cli(main)
