"""The distillation's experiments, on a quiet machine:   python benchmarks/distill.py [--gpu] [WORKDIR]

1. a teacher (ddpm on Stable Diffusion's table) on toy faces, and an assessor of it;
2. the ablation: arms A, B, C, D, E and S, three seeds each (ablate.py); its report is copied to benchmarks/results/distill/;
3. progressive distillation of a flow-matching teacher, 8 → 4 → 2 → 1 steps, and FD of teacher and students at each number of steps.

What has been done is not done again: the same command goes on where it stopped. --gpu trains longer and a larger network.
"""

import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ablate import distance
from benchmarks import record
from ckpt import checkpoints, load_unet
from config import pick_device
from data import open_dataset

ROOT = Path(__file__).parent.parent
SIZES = {False: {"model": "tiny", "teacher": 40_000, "student": 20_000, "samples": 12_000, "fd": 1_000, "batch": 16},
         True: {"model": "toy-281m", "teacher": 2_000_000, "student": 400_000, "samples": 100_000, "fd": 10_000, "batch": 128}}
REPORT = ("ablation.json", "ablation.png", "ablation.txt")


def run(script: str, *args: object) -> None:
    subprocess.run([sys.executable, ROOT / script, *map(str, args)], check=True)


def progressive(work: Path, size: dict) -> dict[str, dict[str, float]]:
    """FD by number of Euler steps, of the teacher and of each student at its own."""
    name = "flow-teacher"
    run("train.py", "--model", size["model"], "--objective", "fm", "--images", size["teacher"], "--out", work, "--name", name, "--preview-every", 0)
    run("distill.py", "--mode", "progressive", "--teacher", work / name, "--objective", "fm", "--start-steps", 8, "--end-steps", 1,
        "--images", size["student"], "--batch", size["batch"], "--lr", 3e-4, "--out", work, "--name", "halved", "--preview-every", 0)
    device, rows = pick_device("auto"), {}
    trained = load_unet(checkpoints(work / name)[-1] / "model.safetensors")[1]["config"]
    ds = open_dataset(trained["data"], resolution=trained["resolution"])
    for steps in (8, 4, 2, 1):
        rows[str(steps)] = {"teacher": distance(work / name, ds, size["fd"], steps, device, "euler")}
        if steps < 8:
            rows[str(steps)]["student"] = distance(work / f"halved-{steps}", ds, size["fd"], steps, device, "euler")
        print(f"{steps} steps: " + ", ".join(f"FD of the {k} {v:.4g}" for k, v in rows[str(steps)].items()), flush=True)
    return rows


def main() -> None:
    gpu = "--gpu" in sys.argv
    size, places = SIZES[gpu], [a for a in sys.argv[1:] if not a.startswith("-")]
    work = Path(places[0] if places else "runs/distill-benchmark")
    run("train.py", "--model", size["model"], "--objective", "ddpm", "--table", "scaled_linear", "--images", size["teacher"], "--out", work,
        "--name", "teacher", "--preview-every", 0)
    if not (work / "assessor.safetensors").exists():
        run("distill.py", "pretrain-assessor", "--teacher", work / "teacher", "--out", work / "assessor.safetensors", "--samples", size["samples"])
    run("distill.py", "ablate", "--teacher", work / "teacher", "--assessor-file", work / "assessor.safetensors", "--arms", "A,B,C,D,E,S",
        "--seeds", "0,1,2", "--images", size["student"], "--batch", size["batch"], "--lr", 3e-4, "--fd-images", size["fd"],
        "--out", work / "ablation")
    results = record.RESULTS / "distill"
    results.mkdir(parents=True, exist_ok=True)
    for name in REPORT:
        shutil.copy(work / "ablation" / name, results / name)
    record.write("distill-progressive", {"size": size, "fd_by_steps": progressive(work, size)})


if __name__ == "__main__":
    main()
