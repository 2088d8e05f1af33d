"""Where a measurement was made, and writing it down: benchmarks/results/<name>.json, never by hand."""

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from harness.run import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU model and threads, GPU if any."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def context(*packages: str) -> dict[str, Any]:
    """What every result says of itself: command, machine, commit, versions (of `packages` too)."""
    command = re.sub(r" --out[ =]\S+", "", " ".join(["python", *sys.orig_argv[1:]]))           # where it wrote is nobody's business
    return {"command": command, "machine": machine(), **versions(*packages)}


def save(path: Path, content: dict[str, Any]) -> None:
    """Atomically: a run that is killed leaves what it had saved last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def write(name: str, result: dict[str, Any]) -> Path:
    """The result with its context beside it."""
    path = RESULTS / f"{name}.json"
    save(path, {**context(), **result})
    print(path)
    return path
