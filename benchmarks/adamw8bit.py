"""Does AdamW8bit train as fp32 AdamW does?   python benchmarks/adamw8bit.py

300 steps of `tiny` on toy faces with each optimizer and each of three seeds: same images, noise
and times, so that only the optimizer differs. Compares the held-out losses and the bytes of state.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ckpt import load_unet, read_tensors
from harness import record
from harness.run import checkpoints

ROOT = Path(__file__).parent.parent
IMAGES, SEEDS = 4800, (0, 1, 2)


def run(out: str, optim: str, seed: int) -> tuple[float, float]:
    """(held-out loss, bytes of optimizer state a parameter)."""
    name = f"{optim}-{seed}"
    # One dtype: a race for it may end differently in each run.
    data = ("--data", "toyfaces:2048", "--images", IMAGES, "--seed", seed, "--dtype", "fp32")
    place = ("--out", out, "--name", name)
    reports = ("--preview-every", 0, "--save-every", 0, "--eval-every", IMAGES)
    flags = map(str, (*data, "--optim", optim, *place, *reports))
    subprocess.run([sys.executable, "train.py", *flags], check=True, cwd=ROOT)
    lines = (Path(out) / name / "log.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["event"] == "held-out"]
    folder = checkpoints(Path(out) / name)[-1]
    state, _ = read_tensors(folder / "state.safetensors")
    net, _ = load_unet(folder / "model.safetensors")
    params = sum(v.numel() for v in net.state_dict().values())
    size = sum(v.nbytes for name, v in state.items() if name != "meter")
    return losses[-1], size / params


if __name__ == "__main__":
    rows = {}
    with tempfile.TemporaryDirectory() as out:
        for seed in SEEDS:
            for optim in ("adamw", "adamw8bit"):
                loss, size = run(out, optim, seed)
                row = {"held-out loss": loss, "state bytes a parameter": size}
                rows[f"{optim} seed {seed}"] = row
    ratios = [
        rows[f"adamw8bit seed {s}"]["held-out loss"] / rows[f"adamw seed {s}"]["held-out loss"]
        for s in SEEDS
    ]
    mean, spread = statistics.mean(ratios), statistics.stdev(ratios)
    print(f"held-out loss, 8-bit / fp32: {mean:.4f} ± {spread:.4f} over {len(SEEDS)} seeds")
    record.write("adamw8bit", {"steps": IMAGES // 16, "runs": rows, "ratios": ratios})
