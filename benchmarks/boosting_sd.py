"""Boosting and --uncertainty at Stable Diffusion's size, on a GPU.

    python benchmarks/boosting_sd.py [--batches 1,4,8]  # writes benchmarks/results/boosting_sd.json

`sd15` draws 512 px by 25 Heun steps without guidance, and a network of the size of `toy-281m` makes
them 1024 px large in 10 evaluations, each through the autoencoder of Stable Diffusion: as
samplers.py --boost does it. Then the first network alone, with --uncertainty integrated and without
it, in turns. Weights, noise and texts are random, of fixed seeds: time does not depend on them.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch import nn

from data.boosts import Enlarger
from data.prompts import Conditions
from data.uncertainty import Estimator
from diffusion.boosting import Stage, clock
from diffusion.guidance import guided
from diffusion.laplace import Curvature, Posterior
from harness import record
from harness.cli import cli, flag, parse
from harness.ranks import autocast, pick_device
from model import PRESETS, UNet, UNetConfig
from objectives import make_objective
from samplers import Generator
from vae import VAE, VAEConfig

HEUN, NFE, WARM = 25, 10, 1
PARTS = ("base", "encode", "network", "decode")


@dataclass(frozen=True)
class Config:
    batches: tuple[int, ...] = flag((1, 4, 8), "images at once", low=1, high=64)
    rounds: int = flag(5, "turns of all sides, after a first one", low=2, high=1000)
    mini: bool = flag(False, "miniatures and two Heun steps, to show that it runs")
    device: str = flag("auto", "auto | cpu | cuda")
    out: str = flag("", "JSON file; default benchmarks/results/boosting_sd.json", writes=".json")


# ---- random weights ------------------------------------------------------------------------------


def networks(mini: bool) -> tuple[UNetConfig, UNetConfig, VAEConfig, int]:
    """Configs of the base, of what enlarges and of the autoencoder; the side of the base's
    latents."""
    base, enlarger = PRESETS["sd15"], PRESETS["toy-281m"]
    channels = {"in_channels": 8, "out_channels": 4, "num_classes": 0}
    if not mini:
        return base, replace(enlarger, **channels), VAEConfig(), 64
    small = {"model_channels": 32, "context_dim": 48}
    enlarger = replace(enlarger, model_channels=32, **channels)
    return replace(base, **small), enlarger, VAEConfig(4, (32,) * 4, (32,) * 4), 8


def random_network(cfg: UNetConfig, device: torch.device) -> UNet:
    """Without zeros: they would multiply faster than a trained one's."""
    with device:
        net = UNet(cfg)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.02)
    return net.eval().to(memory_format=torch.channels_last)


def random_posterior(layer: nn.Conv2d) -> Posterior:
    """Of a last layer, of features that nobody saw."""
    curvature = Curvature(layer, torch.ones(10))
    phi = torch.randn(4, layer.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    curvature.add(phi, torch.full((len(phi),), 0.5))
    return curvature.posterior(1.0)


def pipeline(mini: bool, device: torch.device) -> tuple[Generator, Enlarger]:
    """What draws, and what enlarges."""
    torch.manual_seed(0)
    base, enlarger, kind, side = networks(mini)
    vae, cfm = VAE(kind, "sd").to(device), make_objective("cfm")
    text = {"context": torch.randn(1, 77, base.context_dim)}
    gen = Generator(
        make_objective("fm"), random_network(base, device), vae, (4, side, side), device=device,
        told=Conditions(text, text),
    )  # fmt: skip
    gen.solver = gen.how = {"method": "heun", "steps": 2 if mini else HEUN}
    net = random_network(enlarger, device)

    def call(x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
        with autocast(device, "auto"):
            return net(x, t, **cond)

    stage = Stage(cfm.source, guided(cfm, call), vae.encode, vae.decode, factor=2)
    size = 2 * gen.size[0], 2 * gen.size[1]
    return gen, Enlarger([stage], [size], {"method": "euler", "steps": NFE}, [])


# ---- time ----------------------------------------------------------------------------------------


def boosted(gen: Generator, enlarger: Enlarger, seeds: list[int]) -> dict[str, float]:
    """Seconds of each part of one batch; "all" is measured around them."""
    enlarger.costs.clear()
    begun = clock(gen.noise(seeds[:1]))
    small = gen.images(seeds, [0] * len(seeds)).pixels
    drawn = clock(small)
    images, _ = enlarger.enlarge(small, seeds)
    ended, cost = clock(images), enlarger.costs[0][0]
    own = dict(zip(PARTS, (drawn - begun, cost.enlarge, cost.network, cost.decode)))
    return {**own, "all": ended - begun}


def overhead(gen: Generator, seeds: list[int], rounds: int) -> dict[str, Any]:
    """Of --uncertainty integrated over the same images without it."""
    layer, plain = gen.net.out[2], gen.walk
    cfg = SimpleNamespace(uncertainty="integrated", tangent=False, cfg=1.0, cfg_interval=())
    walks = {"plain": plain, "integrated": Estimator(cfg, gen, layer, random_posterior(layer)).walk}
    seconds: dict[str, list[float]] = {name: [] for name in walks}
    images = {}
    for _ in range(WARM + rounds):
        for name, walk in walks.items():
            gen.walk, begun = walk, clock(gen.noise(seeds[:1]))
            images[name] = gen.images(seeds, [0] * len(seeds)).images
            seconds[name].append(clock(images[name]) - begun)
    gen.walk = plain
    turns = zip(seconds["integrated"][WARM:], seconds["plain"][WARM:])
    low, ratio, high = statistics.quantiles([own / bare for own, bare in turns], n=4)
    same = torch.equal(images["plain"], images["integrated"])
    return {"ratio": ratio, "quartiles": [low, high], "same images": same}


def measure(gen: Generator, enlarger: Enlarger, batch: int, rounds: int) -> dict[str, Any]:
    """One row: of images of a batch."""
    seeds, cuda = list(range(batch)), gen.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(gen.device)
    turns = [boosted(gen, enlarger, seeds) for _ in range(WARM + rounds)][WARM:]
    peak = torch.cuda.max_memory_allocated(gen.device) if cuda else None
    whole = statistics.median(turn["all"] for turn in turns)
    return {
        "batch": batch,
        "images/s": batch / whole,
        "all seconds": [turn["all"] for turn in turns],
        "seconds an image": {
            part: statistics.median(turn[part] for turn in turns) / batch for part in PARTS
        },
        "peak bytes": peak,
        "uncertainty": overhead(gen, seeds, rounds),
    }


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    device, rows = pick_device(cfg.device), []
    gen, enlarger = pipeline(cfg.mini, device)
    for batch in cfg.batches:
        try:
            row = measure(gen, enlarger, batch, cfg.rounds)
        except torch.OutOfMemoryError as error:
            rows.append({"batch": batch, "left out": str(error).partition(". ")[0]})
            print(f"batch {batch}: out of memory", flush=True)
            break
        rows.append(row)
        parts = ", ".join(f"{part} {row['seconds an image'][part]:.3f}" for part in PARTS)
        peak = f", {row['peak bytes'] / 1e9:.1f} GB" if row["peak bytes"] else ""
        more = row["uncertainty"]["ratio"]
        print(
            f"batch {batch}: {row['images/s']:.2f} images/s{peak}; s/image: {parts}; "
            f"uncertainty {more:.2f} times plain sampling",
            flush=True,
        )
    result = {
        **record.context(),
        "mini": cfg.mini,
        "evaluations": {"base": 2 * gen.how["steps"] - 1, "boost": NFE},
        "sides": [gen.size[0], enlarger.sizes[0][0]],
        "rounds": cfg.rounds,
        "rows": rows,
    }
    path = Path(cfg.out) if cfg.out else record.RESULTS / "boosting_sd.json"
    record.save(path, result)
    print(path)


if __name__ == "__main__":
    cli(main)
