"""What it costs to ask how sure a network is:  python benchmarks/uncertainty.py [--rounds 9]

16 images of 64 px by 25 Heun steps of the network `tiny`, decoded, without --uncertainty and with
each of its ways. Weights are random: the time is that of a trained network. Sides take turns; the
median, with its quartiles, of the seconds that the CPU works, as multiples of plain sampling's in
the same round.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

from data.dataset import fit_vae, open_dataset
from data.uncertainty import Estimator, fit
from harness import record
from harness.cli import cli, flag, parse
from model import PRESETS, UNet
from objectives import make_objective
from samplers import Generator

BATCH, NETWORKS = 16, 2
LIMIT = 1.3  # of integrated


@dataclass(frozen=True)
class Config:
    rounds: int = flag(9, "turns of all sides", low=3, high=1000)


def generator() -> Generator:
    """A network of the default's size, none of whose weights is zero."""
    torch.manual_seed(0)
    net = UNet(PRESETS["tiny"])
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    vae = fit_vae(open_dataset("toyfaces:256", resolution=64))
    shape = vae.latent_shape(64)
    return Generator(
        make_objective("fm"), net.eval(), vae, shape, device=torch.device("cpu"), dtype="fp32"
    )


def sides(gen: Generator) -> dict[str, Callable[[], Any]]:
    """{way: what draws a batch}."""
    layer = gen.net.out[2]
    posterior = fit(gen, layer, open_dataset("toyfaces:256", resolution=64), 256)
    asked = {
        "integrated": {"uncertainty": "integrated"},
        f"{NETWORKS} networks": {"uncertainty": NETWORKS},
        f"{NETWORKS} tangents": {"uncertainty": NETWORKS, "tangent": True},
    }
    plain = gen.walk

    def call(walk: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            gen.walk = walk
            return gen.images(list(range(BATCH))).images

        return run

    found = {"plain": call(plain)}
    for name, flags in asked.items():
        cfg = SimpleNamespace(**{"tangent": False, "cfg": 1.0, "cfg_interval": (), **flags})
        found[name] = call(Estimator(cfg, gen, layer, posterior).walk)
    return found


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    gen = generator()
    calls = sides(gen)
    images = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(cfg.rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    rows = {}
    for name in calls:
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["plain"])]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "CPU seconds": statistics.median(seconds[name]),
            "ratio": ratio,
            "quartiles": [low, high],
            "same images": torch.equal(images[name], images["plain"]),
        }
        print(f"{name:<12} {ratio:.2f} ({low:.2f} to {high:.2f}) times plain sampling")
    record.write("uncertainty_cost", {"rounds": cfg.rounds, "batch": BATCH, "results": rows})
    if rows["integrated"]["ratio"] > LIMIT:
        sys.exit(f"integrated takes more than {LIMIT} times as long as plain sampling.")


if __name__ == "__main__":
    cli(main)
