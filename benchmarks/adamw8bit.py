"""Does AdamW8bit train as fp32 AdamW does?   python benchmarks/adamw8bit.py

300 steps of `tiny` on toy faces with each optimizer and each of three seeds: same images, noise and times, so that only
the optimizer differs. Compares the held-out losses and the bytes of state.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import record
from harness.run import checkpoints
from ckpt import load_unet, read_tensors

IMAGES, SEEDS = 4800, (0, 1, 2)


def run(out: str, optim: str, seed: int) -> tuple[float, float]:
    """(held-out loss, bytes of optimizer state a parameter)."""
    name = f"{optim}-{seed}"
    subprocess.run([sys.executable, "train.py", "--data", "toyfaces:2048", "--images", str(IMAGES), "--optim", optim, "--seed", str(seed), "--name", name,
                    "--out", out, "--preview-every", "0", "--save-every", "0", "--eval-every", str(IMAGES)], check=True, cwd=Path(__file__).parent.parent)
    log = [json.loads(line) for line in (Path(out) / name / "log.jsonl").read_text().splitlines()]
    folder = checkpoints(Path(out) / name)[-1]
    state, _ = read_tensors(folder / "state.safetensors")
    params = sum(v.numel() for v in load_unet(folder / "model.safetensors")[0].state_dict().values())
    return [r["loss"] for r in log if r["event"] == "held-out"][-1], sum(v.nbytes for k, v in state.items() if k != "meter") / params


if __name__ == "__main__":
    rows = {}
    with tempfile.TemporaryDirectory() as out:
        for seed in SEEDS:
            for optim in ("adamw", "adamw8bit"):
                rows[f"{optim} seed {seed}"] = dict(zip(("held-out loss", "state bytes a parameter"), run(out, optim, seed)))
    ratios = [rows[f"adamw8bit seed {s}"]["held-out loss"] / rows[f"adamw seed {s}"]["held-out loss"] for s in SEEDS]
    print(f"held-out loss, 8-bit / fp32: {statistics.mean(ratios):.4f} ± {statistics.stdev(ratios):.4f} over {len(SEEDS)} seeds")
    record.write("adamw8bit", {"steps": IMAGES // 16, "runs": rows, "ratios": ratios})
