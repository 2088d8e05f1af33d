"""The distillation's experiments:
    python benchmarks/distill.py [--size cpu|gpu|dry] [--work DIR] [--parts teacher,cost,…]

teacher      a teacher (ddpm on Stable Diffusion's table) on toy faces, and an assessor of it
cost         a step's time by arm, the arms in turns: what the assessor costs
ablation     arms A, B, C, D, E and S, three seeds each, students that start as the teacher
             (experiments/ablate.py)
scratch      arms A to D again, students that start from nothing
progressive  a flow-matching teacher of 8 steps halved to 4, 2 and 1; FD of teacher and students
             at each number of steps

Reports and numbers go to benchmarks/results/distill/SIZE. What has been done is not done again:
the same command goes on where it stopped. Size gpu trains a larger network for longer and measures
FID; dry shows in miniature that everything runs, and leaves its numbers in --work.
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data.dataset as data
import distill
import train
from benchmarks.race import alternate
from ckpt import open_unet
from eval_fid import distance, generate
from harness import record
from harness.pictures import save_grid
from harness.ranks import Ranks, pick_device
from harness.run import checkpoints

ROOT = Path(__file__).parent.parent
CPU = {
    "model": "tiny",
    "teacher": 100_000,
    "student": 20_000,
    "halved": 40_000,
    "batch": 16,
    "lr": 3e-4,
    "scratch_lr": 2e-3,
    "samples": 12_000,
    "assessor": ["--bins", 20, "--patterns", 4, "--dim", 64],
    "fd": 1_000,
    "features": "latents",
    "data": "toyfaces",
}
GPU = {
    **CPU,
    "model": "toy-281m",
    "teacher": 1_000_000,
    "student": 200_000,
    "halved": 200_000,
    "batch": 128,
    "lr": 1e-4,
    "scratch_lr": 2e-4,
    "samples": 100_000,
    "assessor": [],
    "fd": 10_000,
    "features": "inception",
    "data": "toyfaces:100000",
}
DRY = {
    **CPU,
    "model": "nano",
    "teacher": 1_280,
    "student": 32,
    "halved": 32,
    "samples": 2_048,
    "fd": 32,
    "data": "toyfaces:200",
    "assessor": ["--bins", 20, "--patterns", 2, "--dim", 64, "--steps", 500],
}
SIZES = {"cpu": CPU, "gpu": GPU, "dry": DRY}
ARMS = {"ablation": "A,B,C,D,E,S", "scratch": "A,B,C,D"}
ROUNDS = 15  # of the race of arms, four steps of each in a round
QUIET = ("--preview-every", 0)


def run(script: str, *args: object) -> None:
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, args)])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # let it save
        process.send_signal(signal.SIGTERM)
        process.wait()
        sys.exit("stopped.  The same command goes on.")
    if code:
        sys.exit(code)


def place_of(work: Path, size: dict[str, Any]) -> Path:
    """Where results of this size belong."""
    name = next(name for name, other in SIZES.items() if other is size)
    return work / "results" if name == "dry" else record.RESULTS / "distill" / name


def keep(part: str, work: Path, size: dict[str, Any], result: dict[str, Any]) -> None:
    path = place_of(work, size) / f"{part}.json"
    record.save(path, {**record.context(), **result})
    print(path)


def teacher(work: Path, size: dict[str, Any]) -> None:
    how = ("--model", size["model"], "--objective", "ddpm", "--table", "scaled_linear")
    seen = ("--images", size["teacher"], "--data", size["data"])
    run("train.py", *how, *seen, "--out", work, "--name", "teacher", *QUIET)
    out = work / "assessor.safetensors"
    if not out.exists():
        how = ("--teacher", work / "teacher", "--out", out, "--samples", size["samples"])
        run("distill.py", "pretrain-assessor", *how, *size["assessor"])


def cost(work: Path, size: dict[str, Any]) -> None:
    """Steps of vanilla (A), block losses (B) and assessed block losses (D) in turns, at
    distill.py's default batch; and the assessing alone."""
    ranks = Ranks(0, 1, pick_device("auto"))
    batch = distill.Config.batch
    with tempfile.TemporaryDirectory() as out:
        judge = str(work / "assessor.safetensors")
        arms = {
            "A": {"block_weight": 0.0},
            "B": {},
            "D": {"assessor": "david", "assessor_file": judge},
        }
        calls = {}
        for arm, flags in arms.items():
            cfg = distill.Config(teacher=str(work / "teacher"), out=out, name=arm, **flags)
            tr = distill.setup(distill.resolve(cfg), ranks)
            stream = data.Stream(tr.ds, tr.labels, tr.latent_shape, 0)
            loader = data.batches(stream, train.positions(tr.cfg, ranks, 0))
            calls[arm] = partial(one_step, tr, loader)
        loss = tr.loss
        t = loss.teacher.time(torch.arange(batch) * 1000 // batch).to(ranks.device)
        x = torch.randn(batch, *tr.latent_shape, device=ranks.device)
        features = loss.teacher.ask(x, t)[2]
        calls["assessing"] = lambda: loss.lambdas(features, features, t)[0].sum().item()
        seconds = alternate(calls, ROUNDS, 4)
    shares = {
        "assessing, of D": seconds["assessing"] / seconds["D"],
        "D over B": seconds["D"] / seconds["B"] - 1,
        "B over A": seconds["B"] / seconds["A"] - 1,
    }
    times = ", ".join(f"{name} {value:.4f} s" for name, value in seconds.items())
    print(f"batch {batch}: {times}; {', '.join(f'{k} {v:.1%}' for k, v in shares.items())}")
    result = {"model": size["model"], "batch": batch, "rounds": ROUNDS}
    keep("cost", work, size, {**result, "seconds": seconds, "shares": shares})


def one_step(tr: train.Trainer, loader: Any) -> float:
    """A step; as a float, for then a GPU has finished it."""
    return float(train.step(tr, loader))


def ablation(work: Path, size: dict[str, Any], part: str) -> None:
    start = ("--lr", size["lr"])
    if part == "scratch":
        start = ("--init", "scratch", "--lr", size["scratch_lr"])
    run(
        "experiments/ablate.py",
        *("--teacher", work / "teacher", "--assessor-file", work / "assessor.safetensors"),
        *("--arms", ARMS[part], "--seeds", "0,1,2"),
        *("--images", size["student"], "--batch", size["batch"], *start),
        *("--fd-images", size["fd"], "--fd-features", size["features"], "--out", work / part),
    )
    keep(part, work, size, json.loads((work / part / "ablation.json").read_text()))
    for kind in ("png", "txt"):
        shutil.copy(work / part / f"ablation.{kind}", place_of(work, size) / f"{part}.{kind}")


def progressive(work: Path, size: dict[str, Any]) -> None:
    """FD by number of Euler steps, of the teacher and of each student at its own, over three sets
    of seeds."""
    how = ("--model", size["model"], "--objective", "fm", "--data", size["data"])
    place = ("--out", work, *QUIET)
    run("train.py", *how, "--images", size["teacher"], *place, "--name", "flow-teacher")
    run(
        "distill.py",
        *("--mode", "progressive", "--teacher", work / "flow-teacher", "--objective", "fm"),
        *("--start-steps", 8, "--end-steps", 1, "--images", size["halved"]),
        *("--batch", size["batch"], "--lr", size["lr"], *place, "--name", "halved"),
    )
    device = pick_device("auto")
    last = checkpoints(work / "flow-teacher")[-1]
    trained = open_unet(last / "model.safetensors").meta["config"]
    ds = data.open_dataset(trained["data"], resolution=trained["resolution"])

    def fd(ckpt: Path, steps: int) -> dict[str, Any]:
        values = []
        for seed in (0, size["fd"], 2 * size["fd"]):
            how = {"method": "euler", "kind": size["features"], "seed": seed}
            values.append(distance(ckpt, ds, size["fd"], steps, device, **how))
        return {"FD": statistics.mean(values), "error": statistics.stdev(values) / 3**0.5}

    rows = {}
    for steps in (8, 4, 2, 1):
        row = {"teacher": fd(work / "flow-teacher", steps)}
        if steps < 8:
            row["student"] = fd(work / f"halved-{steps}", steps)
        rows[str(steps)] = row
        found = [f"FD of the {who} {v['FD']:.4g} ± {v['error']:.2g}" for who, v in row.items()]
        print(f"{steps} steps: {', '.join(found)}", flush=True)
    draw_one_step(work, size, device)
    keep("progressive", work, size, {"size": size, "results": rows})


def draw_one_step(work: Path, size: dict[str, Any], device: torch.device) -> None:
    """One step of teacher and student from the same noise, side by side."""
    before, _ = generate(work / "flow-teacher", 16, 1, device, "euler")
    after, _ = generate(work / "halved-1", 16, 1, device, "euler")
    gap = torch.full_like(before[:1], 255)
    rows = [torch.cat([before[i : i + 4], gap, after[i : i + 4]]) for i in range(0, 16, 4)]
    place_of(work, size).mkdir(parents=True, exist_ok=True)
    save_grid(torch.cat(rows), place_of(work, size) / "one-step.png", columns=9)


PARTS = {
    "teacher": teacher,
    "cost": cost,
    "ablation": partial(ablation, part="ablation"),
    "scratch": partial(ablation, part="scratch"),
    "progressive": progressive,
}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/distill-benchmark"))
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts {unknown[0]}: wanted some of {', '.join(PARTS)}")
    for part in parts:
        PARTS[part](args.work, SIZES[args.size])


if __name__ == "__main__":
    main()
