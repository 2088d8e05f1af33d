"""Where a measurement was made, and writing it down: benchmarks/results/<name>.json, never by hand."""

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from run import versions


def machine() -> dict[str, Any]:
    """CPU model and threads, GPU if any."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def write(name: str, result: dict[str, Any]) -> Path:
    """The result with machine, commit, versions and command beside it."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    command = re.sub(r" --out \S+", "", " ".join(["python", *sys.argv]))            # where it wrote is nobody's business
    path.write_text(json.dumps({"command": command, "machine": machine(), **versions(), **result}, indent=1) + "\n")
    print(path)
    return path
