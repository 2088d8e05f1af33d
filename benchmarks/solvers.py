"""Which solver, how many steps?  python benchmarks/solvers.py --ckpt runs/toyfaces-fm-standard

Every method at several numbers of network calls on a trained network: FD-pca to the training images (what one sees), and how far
the samples of the first seeds are from a Heun solution of 1,000 steps of the same seeds (what the solver errs; deterministic
methods only). Then dopri5 with a step size for every sample against one for the whole batch, at equal tolerance.
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

from harness import record
from harness.cli import cli, parse
from harness.ranks import pick_device
from eval_fid import default_ref
from metrics.features import fit_extractor, open_images
from metrics.distances import frechet_from_features
from harness.pictures import to_uint8
from samplers import Sampling, begin, open_generator, sample, time_grid

CALLS = (6, 12, 24, 48)                      # network calls a sample
PER_STEP = {"heun": 2, "midpoint": 2, "rk4": 4}
NOISY = ("ddpm", "ddim eta 1", "euler_ancestral", "dpmpp_2m_sde", "sde")
ROWS: dict[str, dict[str, Any]] = {          # name in the table -> how
    **{name: {"method": name} for name in ("euler", "heun", "midpoint", "rk4", "ab2", "lms4", "dpmpp_2m", "unipc")},
    "dpmpp_2m karras": {"method": "dpmpp_2m", "grid": "karras"}, "unipc logsnr": {"method": "unipc", "grid": "logsnr"},
    "ddim eta 1": {"method": "ddim", "eta": 1.0}, **{name: {"method": name} for name in ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "sde")}}
TOLERANCES = (3e-2, 1e-2, 1e-3, 1e-4)        # of dopri5: rtol, and a tenth of it as atol


@dataclass(frozen=True)
class Config:
    ckpt: str = "runs/toyfaces-fm-standard"   # a run of train.py
    n: int = 256                       # samples for FD-pca
    exact: int = 64                    # of them compared with the 1,000-step solution
    reference: int = 4_096             # training images for FD-pca
    batch: int = 128                   # images at a time; whole_batch's step is one for as many


class Bench:
    def __init__(self, cfg: Config):
        self.cfg, device = cfg, pick_device("auto")
        self.d = d = open_generator(Sampling(cfg.ckpt), device)
        images = open_images(default_ref(d.meta["config"], cfg.ckpt), d.resolution)
        self.look = fit_extractor(images)
        self.real = torch.cat([self.look(images.batch(range(i, min(i + 256, cfg.reference)))) for i in range(0, min(cfg.reference, images.total), 256)])
        self.noise = d.noise(list(range(cfg.n)))

    def run(self, n: int, method: str, grid: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Latents (n, C, h, w), and the calls that each took part in (n,)."""
        parts, d = [], self.d
        for lo in range(0, n, self.cfg.batch):
            seeds = list(range(lo, min(lo + self.cfg.batch, n)))
            x = begin(d.objective, self.noise[seeds], float(d.how["grid"][0]))
            parts.append(sample(d.predict, x, method=method, grid=grid, t_start=d.objective.t_max, seeds=seeds, **options))
        return torch.cat([p.x for p in parts]), torch.cat([p.nfe_each for p in parts])

    def measure(self, z: Tensor, calls: Tensor, exact: Tensor | None) -> dict[str, float]:
        images = torch.cat([to_uint8(self.d.vae.decode(part)) for part in z.split(256)])
        row = {"NFE": float(calls.double().mean()), "FD-pca": frechet_from_features(self.real, self.look(images))}
        if exact is not None:
            error = (z[:len(exact)] - exact).double().square().flatten(1).mean(1).sqrt()
            row["distance"] = float(error.mean())
        return row


def steps_for(method: str, calls: int) -> int:
    """So many steps that no more than `calls` calls are made. The last step of heun is Euler's, that of rk4 has three; ab2 begins with two."""
    if method == "ab2":
        return max(calls - 1, 1)
    return max((calls + 1) // PER_STEP.get(method, 1) if method in ("heun", "rk4") else calls // PER_STEP.get(method, 1), 1)


def main() -> None:
    cfg, _ = parse(Config, __doc__)
    bench, result = Bench(cfg), {}
    t_max, table = bench.d.objective.t_max, bench.d.objective.table
    print(f"the {cfg.exact} samples of a 1,000-step Heun solution …", flush=True)
    exact, _ = bench.run(cfg.exact, "heun", time_grid(1000, 1.0, t_max))
    for name, how in tqdm(ROWS.items(), disable=None):
        options = {k: v for k, v in how.items() if k not in ("method", "grid")}
        for calls in CALLS:
            grid = time_grid(steps_for(how["method"], calls), 1.0, t_max, how.get("grid", "uniform"), table)
            row = bench.measure(*bench.run(cfg.n, how["method"], grid, **options), None if name in NOISY else exact)
            result.setdefault(name, []).append({"calls": calls, **row})
        print(name, *(f"{r['NFE']:g}: {r['FD-pca']:.1f}{', %.4f' % r['distance'] if 'distance' in r else ''}" for r in result[name]), sep="   ", flush=True)
    adaptive = []
    for rtol in TOLERANCES:
        pair = {}
        for kind, whole in (("per sample", False), ("whole batch", True)):
            pair[kind] = bench.measure(*bench.run(cfg.n, "dopri5", rtol=rtol, atol=rtol / 10, whole_batch=whole), exact)
        adaptive.append({"rtol": rtol, **pair, "calls saved": 1 - pair["per sample"]["NFE"] / pair["whole batch"]["NFE"]})
        print(f"dopri5 rtol {rtol:g}: NFE {pair['per sample']['NFE']:.1f} per sample, {pair['whole batch']['NFE']:.1f} whole batch of {cfg.batch}", flush=True)
    about = {"subject": {k: bench.d.meta.get(k) for k in ("run", "images", "ema", "fingerprint")}, "n": cfg.n, "exact": cfg.exact, "batch": cfg.batch}
    path = record.write("solvers", {**about, "results": result, "dopri5": adaptive})
    path.with_suffix(".md").write_text(markdown(about, result, adaptive))


def markdown(about: dict[str, Any], result: dict[str, list], adaptive: list[dict[str, Any]]) -> str:
    """The table: FD-pca, and in brackets the distance to the 1,000-step solution."""
    def cell(row: dict[str, float]) -> str:
        return f"{row['FD-pca']:.1f}" + (f" ({row['distance']:.4f})" if "distance" in row else "")
    lines = [f"FD-pca of {about['n']} samples, in brackets the root mean square distance of latents to Heun's solution of 1,000 steps "
             f"(first {about['exact']} seeds).", "", f"| at most … network calls | {' | '.join(map(str, CALLS))} |", f"|---|{'---:|' * len(CALLS)}"]
    lines += [f"| {name} | {' | '.join(cell(r) for r in rows)} |" for name, rows in result.items()]
    lines += ["", f"dopri5, in batches of {about['batch']}: calls of the network per sample, and in brackets as above.", "",
              "| rtol (atol a tenth) | step per sample | one step for the batch | calls saved |", "|---|---:|---:|---:|"]
    for row in adaptive:
        a, b = row["per sample"], row["whole batch"]
        lines.append(f"| {row['rtol']:g} | {a['NFE']:.1f}, FD-pca {cell(a)} | {b['NFE']:.1f}, FD-pca {cell(b)} | {row['calls saved']:.0%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli(main)
