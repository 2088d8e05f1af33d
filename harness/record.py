"""Where a measurement was made, and writing it to benchmarks/results/NAME.json, never by hand."""

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from harness.files import write_text
from harness.run import versions

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """CPU model and threads, GPU if there is one."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if lines:
            cpu = lines[0].split(":", 1)[1].strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def context(*packages: str) -> dict[str, Any]:
    """What every result says of itself: command, machine, commit, versions (of `packages` too)."""
    command = " ".join(["python", *sys.orig_argv[1:]])
    # A folder of one machine means nothing elsewhere.
    command = re.sub(r" --out[ =]\S+", "", command)
    return {"command": command, "machine": machine(), **versions(*packages, dirty=True)}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically: a run that is killed leaves what it had saved last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result with its context, and print where."""
    path = RESULTS / f"{name}.json"
    save(path, {**context(), **result})
    print(path)
    return path
