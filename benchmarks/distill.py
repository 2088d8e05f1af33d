"""The distillation's experiments:   python benchmarks/distill.py [--size cpu|gpu|dry] [--work DIR] [--parts teacher,cost,ablation,scratch,progressive]

teacher      a teacher (ddpm on Stable Diffusion's table) on toy faces, and an assessor of it
cost         a step's time by arm, the arms in turns: what the assessor costs
ablation     arms A, B, C, D, E and S, three seeds each, students that start as the teacher (ablate.py)
scratch      arms A to D again, students that start from nothing
progressive  a flow-matching teacher halved, 8 → 4 → 2 → 1 steps; FD of teacher and students at each number of steps

Reports and numbers go to benchmarks/results/distill/SIZE. What has been done is not done again: the same command goes on where it
stopped. Size gpu trains a larger network for longer and measures FID; dry shows in miniature that everything runs, and leaves its
numbers in --work.
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import experiments.ablate as ablate
import data.dataset as data
import distill
import train
from harness import record
from benchmarks.race import alternate
from harness.run import checkpoints
from ckpt import open_unet
from harness.ranks import pick_device
from harness.pictures import save_grid
from harness.ranks import Ranks

ROOT = Path(__file__).parent.parent
CPU = {"model": "tiny", "teacher": 100_000, "student": 20_000, "halved": 40_000, "batch": 16, "lr": 3e-4, "scratch_lr": 2e-3, "samples": 12_000,
       "assessor": ["--bins", 20, "--patterns", 4, "--dim", 64], "fd": 1_000, "features": "latents", "data": "toyfaces"}
SIZES = {
    "cpu": CPU,
    "gpu": {**CPU, "model": "toy-281m", "teacher": 1_000_000, "student": 200_000, "halved": 200_000, "batch": 128, "lr": 1e-4, "scratch_lr": 2e-4,
            "samples": 100_000, "assessor": [], "fd": 10_000, "features": "inception", "data": "toyfaces:100000"},
    "dry": {**CPU, "model": "nano", "teacher": 1_280, "student": 32, "halved": 32, "samples": 2_048, "fd": 32, "data": "toyfaces:200",
            "assessor": ["--bins", 20, "--patterns", 2, "--dim", 64, "--steps", 500]},
}
ARMS = {"ablation": "A,B,C,D,E,S", "scratch": "A,B,C,D"}
ROUNDS = 15                                  # of the race of arms, four steps of each in a round
QUIET = ("--preview-every", 0)


def run(script: str, *args: object) -> None:
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, args)])
    try:
        code = process.wait()
    except KeyboardInterrupt:                                                   # let it save
        process.send_signal(signal.SIGTERM)
        process.wait()
        sys.exit("stopped.  The same command goes on.")
    if code:
        sys.exit(code)


def place_of(work: Path, size: dict[str, Any]) -> Path:
    """Where results of this size belong."""
    name = next(k for k, v in SIZES.items() if v is size)
    return work / "results" if name == "dry" else record.RESULTS / "distill" / name


def keep(part: str, work: Path, size: dict[str, Any], result: dict[str, Any]) -> None:
    record.save(place_of(work, size) / f"{part}.json", {**record.context(), **result})
    print(place_of(work, size) / f"{part}.json")


def teacher(work: Path, size: dict[str, Any]) -> None:
    run("train.py", "--model", size["model"], "--objective", "ddpm", "--table", "scaled_linear", "--images", size["teacher"], "--data", size["data"],
        "--out", work, "--name", "teacher", *QUIET)
    if not (work / "assessor.safetensors").exists():
        run("distill.py", "pretrain-assessor", "--teacher", work / "teacher", "--out", work / "assessor.safetensors", "--samples", size["samples"],
            *size["assessor"])


def cost(work: Path, size: dict[str, Any]) -> None:
    """Steps of vanilla (A), block losses (B) and assessed block losses (D) in turns, at distill.py's default batch; and the assessing alone."""
    ranks = Ranks(0, 1, pick_device("auto"))
    with tempfile.TemporaryDirectory() as out:
        cfg = ablate.Config(teacher=str(work / "teacher"), assessor_file=str(work / "assessor.safetensors"), out=out)
        calls = {}
        for arm in "ABD":
            tr = distill.setup(ablate.arm_config(cfg, arm, 0), ranks)
            loader = data.batches(data.Stream(tr.ds, tr.labels, tr.latent_shape, 0), train.positions(tr.cfg, ranks, 0))
            calls[arm] = lambda tr=tr, loader=loader: float(train.step(tr, loader))                         # float: a GPU has finished then
        t = tr.teacher.time(torch.arange(cfg.batch) * 1000 // cfg.batch).to(ranks.device)
        x = torch.randn(cfg.batch, *tr.latent_shape, device=ranks.device)
        features = tr.teacher.ask(x, t)[2]
        calls["assessing"] = lambda: tr.lambdas(features, features, t)[0].sum().item()
        seconds = alternate(calls, ROUNDS, 4)
    shares = {"assessing, of D": seconds["assessing"] / seconds["D"], "D over B": seconds["D"] / seconds["B"] - 1, "B over A": seconds["B"] / seconds["A"] - 1}
    print(f"batch {cfg.batch}: " + ", ".join(f"{k} {v:.4f} s" for k, v in seconds.items()) + "; " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    keep("cost", work, size, {"model": size["model"], "batch": cfg.batch, "rounds": ROUNDS, "seconds": seconds, "shares": shares})


def ablation(work: Path, size: dict[str, Any], part: str) -> None:
    start = ("--init", "scratch", "--lr", size["scratch_lr"]) if part == "scratch" else ("--lr", size["lr"])
    run("distill.py", "ablate", "--teacher", work / "teacher", "--assessor-file", work / "assessor.safetensors", "--arms", ARMS[part],
        "--seeds", "0,1,2", "--images", size["student"], "--batch", size["batch"], *start, "--fd-images", size["fd"],
        "--fd-features", size["features"], "--out", work / part)
    keep(part, work, size, json.loads((work / part / "ablation.json").read_text()))
    for kind in ("png", "txt"):
        shutil.copy(work / part / f"ablation.{kind}", place_of(work, size) / f"{part}.{kind}")


def progressive(work: Path, size: dict[str, Any]) -> None:
    """FD by number of Euler steps, of the teacher and of each student at its own, over three sets of seeds."""
    run("train.py", "--model", size["model"], "--objective", "fm", "--images", size["teacher"], "--data", size["data"], "--out", work, "--name", "flow-teacher", *QUIET)
    run("distill.py", "--mode", "progressive", "--teacher", work / "flow-teacher", "--objective", "fm", "--start-steps", 8, "--end-steps", 1,
        "--images", size["halved"], "--batch", size["batch"], "--lr", size["lr"], "--out", work, "--name", "halved", *QUIET)
    device, rows = pick_device("auto"), {}
    trained = open_unet(checkpoints(work / "flow-teacher")[-1] / "model.safetensors").meta["config"]
    ds = data.open_dataset(trained["data"], resolution=trained["resolution"])

    def fd(ckpt: Path, steps: int) -> dict[str, Any]:
        values = [ablate.distance(ckpt, ds, size["fd"], steps, device, "euler", size["features"], seed=i * size["fd"]) for i in range(3)]
        return {"FD": statistics.mean(values), "error": statistics.stdev(values) / 3 ** 0.5}
    for steps in (8, 4, 2, 1):
        rows[str(steps)] = {"teacher": fd(work / "flow-teacher", steps)} | ({"student": fd(work / f"halved-{steps}", steps)} if steps < 8 else {})
        print(f"{steps} steps: " + ", ".join(f"FD of the {k} {v['FD']:.4g} ± {v['error']:.2g}" for k, v in rows[str(steps)].items()), flush=True)
    drawn = [ablate.generate(ckpt, 16, 1, device, "euler")[0] for ckpt in (work / "flow-teacher", work / "halved-1")]   # one step, the same noise
    gap = torch.full_like(drawn[0][:1], 255)
    place_of(work, size).mkdir(parents=True, exist_ok=True)
    rows_of_nine = [torch.cat([drawn[0][i:i + 4], gap, drawn[1][i:i + 4]]) for i in range(0, 16, 4)]
    save_grid(torch.cat(rows_of_nine), place_of(work, size) / "one-step.png", columns=9)
    keep("progressive", work, size, {"size": size, "results": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/distill-benchmark"))
    parser.add_argument("--parts", default="teacher,cost,ablation,scratch,progressive")
    args = parser.parse_args()
    size, parts = SIZES[args.size], args.parts.split(",")
    steps = {"teacher": teacher, "cost": cost, "ablation": lambda w, s: ablation(w, s, "ablation"), "scratch": lambda w, s: ablation(w, s, "scratch"),
             "progressive": progressive}
    if unknown := [p for p in parts if p not in steps]:
        parser.error(f"--parts {unknown[0]}: wanted some of {', '.join(steps)}")
    for part in parts:
        steps[part](args.work, size)


if __name__ == "__main__":
    main()
