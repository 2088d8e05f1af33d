"""How long does `python train.py` take?   python benchmarks/default_run.py

The default run from its first line to its last picture, in a process of its own, with the dtype
that it chooses here.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import record

ROOT = Path(__file__).parent.parent


def measure() -> dict[str, float | str]:
    """The run's images, dtype, seconds of the clock, and images/s of its log."""
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "train.py", "--out", out], check=True, cwd=ROOT)
        seconds = time.perf_counter() - begun
        log = next(Path(out).glob("*/log.jsonl"))
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    config = next(row["config"] for row in rows if row["event"] == "start")
    rates = sorted(row["images_per_s"] for row in rows if row["event"] == "train")
    return {
        "images": config["images"],
        "dtype": config["dtype"],
        "seconds": seconds,
        "median images/s": rates[len(rates) // 2],
    }


if __name__ == "__main__":
    result = measure()
    print(f"{result['images']:,} images in {result['dtype']}: {result['seconds'] / 60:.1f} minutes")
    record.write("default_run", result)
