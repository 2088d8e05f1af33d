"""Which solver, how many steps?  python benchmarks/solvers.py --ckpt runs/toyfaces-fm-standard

Every method at several numbers of network calls on a trained network: FD-pca to the training
images (what one sees), and how far the samples of the first seeds are from a Heun solution of
1,000 steps of the same seeds (what the solver errs; deterministic methods only). Then dopri5 with
a step size for every sample against one for the whole batch, at equal tolerance.
Writes benchmarks/results/solvers.json and the table solvers.md beside it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from eval_fid import default_ref
from diffusion.editing import begin
from harness import record
from harness.cli import cli, flag, parse
from harness.pictures import to_uint8
from harness.ranks import pick_device
from metrics.distances import frechet_from_features
from metrics.features import fit_extractor, open_images
from samplers import Sampling, open_generator, sample, time_grid

CALLS = (6, 12, 24, 48)  # network calls a sample
PER_STEP = {"heun": 2, "midpoint": 2, "rk4": 4}
NOISY = ("ddpm", "ddim eta 1", "euler_ancestral", "dpmpp_2m_sde", "sde")
# name in the table -> how
ROWS: dict[str, dict[str, Any]] = {
    "euler": {"method": "euler"},
    "heun": {"method": "heun"},
    "midpoint": {"method": "midpoint"},
    "rk4": {"method": "rk4"},
    "ab2": {"method": "ab2"},
    "lms4": {"method": "lms4"},
    "dpmpp_2m": {"method": "dpmpp_2m"},
    "unipc": {"method": "unipc"},
    "dpmpp_2m karras": {"method": "dpmpp_2m", "grid": "karras"},
    "unipc logsnr": {"method": "unipc", "grid": "logsnr"},
    "ddim eta 1": {"method": "ddim", "eta": 1.0},
    "ddpm": {"method": "ddpm"},
    "euler_ancestral": {"method": "euler_ancestral"},
    "dpmpp_2m_sde": {"method": "dpmpp_2m_sde"},
    "sde": {"method": "sde"},
}
TOLERANCES = (3e-2, 1e-2, 1e-3, 1e-4)  # of dopri5: rtol, and a tenth of it as atol


@dataclass(frozen=True)
class Config:
    ckpt: str = flag("runs/toyfaces-fm-standard", "a run of train.py")
    n: int = flag(256, "samples for FD-pca", low=2, high=1e6)
    exact: int = flag(64, "of them compared with the 1,000-step solution", low=1, high=1e6)
    reference: int = flag(4_096, "training images for FD-pca", low=2, high=1e6)
    batch: int = flag(
        128, "images at a time; whole_batch's step is one for as many", low=1, high=1e6
    )


class Bench:
    def __init__(self, cfg: Config):
        self.cfg, device = cfg, pick_device("auto")
        self.d = d = open_generator(Sampling(cfg.ckpt), device)
        images = open_images(default_ref(d.meta["config"], cfg.ckpt), d.resolution)
        self.features = fit_extractor(images)
        self.real = torch.cat(
            [
                self.features(images.batch(range(i, min(i + 256, cfg.reference))))
                for i in range(0, min(cfg.reference, images.total), 256)
            ]
        )
        self.noise = d.noise(list(range(cfg.n)))

    def run(
        self, n: int, method: str, grid: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Latents (n, C, h, w), and the calls that each took part in (n,)."""
        parts, d = [], self.d
        for lo in range(0, n, self.cfg.batch):
            seeds = list(range(lo, min(lo + self.cfg.batch, n)))
            x = begin(d.objective, self.noise[seeds], float(d.how["grid"][0]))
            how = {"method": method, "grid": grid, "t_start": d.objective.t_max, **options}
            parts.append(sample(d.predict, x, seeds=seeds, **how))
        return torch.cat([p.x for p in parts]), torch.cat([p.nfe_each for p in parts])

    def measure(self, z: Tensor, calls: Tensor, exact: Tensor | None) -> dict[str, float]:
        images = torch.cat([to_uint8(self.d.vae.decode(part)) for part in z.split(256)])
        row = {
            "NFE": float(calls.double().mean()),
            "FD-pca": frechet_from_features(self.real, self.features(images)),
        }
        if exact is not None:
            error = (z[: len(exact)] - exact).double().square().flatten(1).mean(1).sqrt()
            row["distance"] = float(error.mean())
        return row


def steps_for(method: str, calls: int) -> int:
    """So many steps that no more than `calls` calls are made.

    The last step of heun is Euler's, that of rk4 has three; ab2 begins with two.
    """
    if method == "ab2":
        return max(calls - 1, 1)
    if method in ("heun", "rk4"):
        calls += 1
    return max(calls // PER_STEP.get(method, 1), 1)


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    bench, result = Bench(cfg), {}
    t_max, table = bench.d.objective.t_max, bench.d.objective.table
    print(f"the {cfg.exact} samples of a 1,000-step Heun solution …", flush=True)
    exact, _ = bench.run(cfg.exact, "heun", time_grid(1000, 1.0, t_max))
    for name, how in tqdm(ROWS.items(), disable=None):
        options = {k: v for k, v in how.items() if k not in ("method", "grid")}
        for calls in CALLS:
            steps = steps_for(how["method"], calls)
            grid = time_grid(steps, 1.0, t_max, how.get("grid", "uniform"), table)
            z, calls_each = bench.run(cfg.n, how["method"], grid, **options)
            row = bench.measure(z, calls_each, None if name in NOISY else exact)
            result.setdefault(name, []).append({"calls": calls, **row})
        print(name, *map(brief, result[name]), sep="   ", flush=True)
    adaptive = []
    for rtol in TOLERANCES:
        pair = {}
        for kind, whole in (("per sample", False), ("whole batch", True)):
            tolerances = {"rtol": rtol, "atol": rtol / 10}
            z, calls_each = bench.run(cfg.n, "dopri5", whole_batch=whole, **tolerances)
            pair[kind] = bench.measure(z, calls_each, exact)
        each, batch = pair["per sample"]["NFE"], pair["whole batch"]["NFE"]
        adaptive.append({"rtol": rtol, **pair, "calls saved": 1 - each / batch})
        whole = f"{batch:.1f} whole batch of {cfg.batch}"
        print(f"dopri5 rtol {rtol:g}: NFE {each:.1f} per sample, {whole}", flush=True)
    about = {
        "subject": {k: bench.d.meta.get(k) for k in ("run", "images", "ema", "fingerprint")},
        "n": cfg.n,
        "exact": cfg.exact,
        "batch": cfg.batch,
    }
    path = record.write("solvers", {**about, "results": result, "dopri5": adaptive})
    path.with_suffix(".md").write_text(markdown(about, result, adaptive))


def brief(row: dict[str, float]) -> str:
    distance = f", {row['distance']:.4f}" if "distance" in row else ""
    return f"{row['NFE']:g}: {row['FD-pca']:.1f}{distance}"


def markdown(about: dict[str, Any], result: dict[str, list], adaptive: list[dict[str, Any]]) -> str:
    """The table: FD-pca, and in brackets the distance to the 1,000-step solution."""

    def cell(row: dict[str, float]) -> str:
        distance = f" ({row['distance']:.4f})" if "distance" in row else ""
        return f"{row['FD-pca']:.1f}{distance}"

    lines = [
        f"FD-pca of {about['n']} samples, in brackets the root mean square distance of latents to "
        f"Heun's solution of 1,000 steps (first {about['exact']} seeds).",
        "",
        f"| at most … network calls | {' | '.join(map(str, CALLS))} |",
        f"|---|{'---:|' * len(CALLS)}",
    ]
    lines += [f"| {name} | {' | '.join(cell(r) for r in rows)} |" for name, rows in result.items()]
    lines += [
        "",
        f"dopri5, in batches of {about['batch']}: calls of the network per sample, and in brackets "
        "as above.",
        "",
        "| rtol (atol a tenth) | step per sample | one step for the batch | calls saved |",
        "|---|---:|---:|---:|",
    ]
    for row in adaptive:
        pair = [row["per sample"], row["whole batch"]]
        cells = [f"{side['NFE']:.1f}, FD-pca {cell(side)}" for side in pair]
        lines.append(f"| {row['rtol']:g} | {' | '.join(cells)} | {row['calls saved']:.0%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli(main)
