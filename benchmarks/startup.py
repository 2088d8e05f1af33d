"""How long does a command take to begin?   python benchmarks/startup.py

Every command with --help, and `import torch` alone, in turn, a few times each: the median of the
seconds that pass, and of those that the CPU works. What counts is what a command needs beyond
torch, which is at most one second.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import record
from harness.cli import cli, flag, parse
from harness.commands import COMMANDS

ROOT = Path(__file__).parent.parent
LIMIT = 1.0  # seconds beyond `import torch`


@dataclass(frozen=True)
class Config:
    rounds: int = flag(5, "times that each command begins", low=1, high=1000)


def measure(words: list[str]) -> tuple[float, float]:
    """(seconds, seconds of CPU time) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    torch, bare = "import torch", ["-c", "import torch"]
    cases = {torch: bare, **{name: [*name.split(), "--help"] for name in COMMANDS}}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(cfg.rounds):
        for name, words in cases.items():
            times[name].append(measure(words))
    rows = {}
    for name, pairs in times.items():
        seconds, cpu = (statistics.median(column) for column in zip(*pairs))
        row = rows[name] = {"seconds": seconds, "CPU seconds": cpu}
        if name != torch:
            row["beyond torch"] = cpu - rows[torch]["CPU seconds"]
        print(f"{name:<30} " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    record.write("startup", {"rounds": cfg.rounds, "limit": LIMIT, "results": rows})
    slow = [name for name, row in rows.items() if row.get("beyond torch", 0) > LIMIT]
    if slow:
        sys.exit(f"more than {LIMIT} s beyond torch: {', '.join(slow)}")


if __name__ == "__main__":
    cli(main)
