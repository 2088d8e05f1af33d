"""What diffusers' schedulers draw with a network of this code, beside what our solvers draw.

    python benchmarks/peer_schedulers.py --ckpt runs/toyfaces-ddpm-standard --out FILE.json

For networks that predict eps on a VP path. Ours and theirs start from the same noise. The numbers
are the standard deviation of the latents that come out, beside that of the training images: a
solver that lost its way ends far from it. Where ours is the same method as theirs on the same times
(DDIM on trailing rows), the largest difference stands beside it. The picture has a row for each.
Needs diffusers (requirements-dev.txt).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from ckpt import load_unet
from data import open_dataset
from diffusion.editing import begin
from diffusion.sampling import sample
from harness import record
from harness.cli import UserError, cli, flag, parse
from harness.pictures import to_uint8
from samplers import Generator, Sampling, open_generator, walk_of

TABLES = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}
SHOWN = 8  # images of a row of the picture


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(help="a run of --objective ddpm, or its file")
    n: int = flag(32, "images of each", low=1, high=1e5)
    out: str = flag("", "JSON to write, with a PNG of its name", writes=".json")


def by_peer(gen: Generator, net: torch.nn.Module, noise: Tensor, scheduler: Any, steps: int):
    """Latents of diffusers' own loop, without guidance or labels."""
    scheduler.set_timesteps(steps)
    x, generator = noise * scheduler.init_noise_sigma, torch.Generator().manual_seed(0)
    none = {"y": torch.full((len(x),), -1)} if net.cfg.num_classes else {}
    for t in scheduler.timesteps:
        eps = net(scheduler.scale_model_input(x, t), torch.full((len(x),), float(t)), **none)
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    return x


def by_us(ckpt: str, noise: Tensor, seeds: list[int], flags: dict[str, Any]) -> Tensor:
    """Latents of our solver, from the same noise."""
    gen = open_generator(Sampling(ckpt, **flags), torch.device("cpu"))
    how = walk_of(gen.solver, gen.objective)
    start = float(how["grid"][0])
    x = begin(gen.objective, noise, start)
    return sample(gen.predict, x, seeds=seeds, t_start=start, **how).x


def ways(ckpt: str, gen: Generator, net: torch.nn.Module, noise: Tensor) -> dict[str, Callable]:
    """What draws, by name."""
    betas, peer = TABLES[gen.objective.table], partial(by_peer, gen, net, noise)
    seeds = list(range(len(noise)))
    ours = partial(by_us, ckpt, noise, seeds)
    free = {**betas, "clip_sample": False}
    return {
        "diffusers DPM++ 2M, 16 steps": lambda: peer(
            DPMSolverMultistepScheduler(**betas, timestep_spacing="trailing"), 16
        ),
        "ours dpmpp_2m, 16 steps": lambda: ours({"method": "dpmpp_2m", "steps": 16}),
        "diffusers DDIM, 50 steps": lambda: peer(
            DDIMScheduler(**free, timestep_spacing="trailing"), 50
        ),
        "ours ddim, 50 steps": lambda: ours({"method": "ddim", "steps": 50, "grid": "trailing"}),
        "ours ddim, eta 1, 64 steps": lambda: ours({"method": "ddim", "steps": 64, "eta": 1.0}),
        "diffusers DDPM, 1000 steps": lambda: peer(DDPMScheduler(**free), 1000),
    }


@torch.no_grad()
def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    gen = open_generator(Sampling(cfg.ckpt), torch.device("cpu"))
    if gen.objective.target != "eps" or gen.objective.table not in TABLES:
        raise UserError(
            f"--ckpt {cfg.ckpt} predicts {gen.objective.target}",
            wanted=f"eps, with the table {' or '.join(TABLES)}",
            do="Choose a run of --objective ddpm.",
        )
    net, meta = load_unet(gen.path)
    net.eval()
    noise = gen.noise(list(range(cfg.n)))
    real = gen.vae.encode(training_images(meta, gen.resolution))
    rows = [{"way": "training images", "std": float(real.std())}]
    strips, last = [], None
    for name, draw in ways(cfg.ckpt, gen, net, noise).items():
        x = draw()
        row = {"way": name, "std": float(x.std())}
        if name == "ours ddim, 50 steps":
            row["largest difference"] = float((x - last).abs().max())
        rows.append(row)
        strips.append(to_uint8(gen.vae.decode(x[:SHOWN])))
        last = x
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if cfg.out:
        record.save(Path(cfg.out), {**record.context(), "n": cfg.n, "rows": rows})
        picture(strips).save(Path(cfg.out).with_suffix(".png"))


def training_images(meta: dict[str, Any], side: int) -> Tensor:
    """64 of them, (64, 3, side, side) in [-1, 1]."""
    data = open_dataset(meta["config"]["data"], resolution=side)
    return torch.stack([data[i][0] for i in range(64)]).float() / 127.5 - 1


def picture(strips: list[Tensor]) -> Image.Image:
    rows = [torch.cat(list(strip), 2) for strip in strips]
    return Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy())


if __name__ == "__main__":
    cli(main)
