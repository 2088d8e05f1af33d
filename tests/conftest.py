import os
import sys
from pathlib import Path

# The nets here are too small to share, and one thread sums in one order. Before torch is imported,
# for children too.
os.environ["OMP_NUM_THREADS"] = "1"
# Triton decides between interpreter and compiler when it is imported.
if os.environ.get("TWINPATH_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def randomize(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fan-in weights everywhere, zero-initialised layers included.

    An untrained U-Net would output zeros.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64, device="cpu")
            p.copy_(noise / fan_in**0.5 + (p.ndim == 1) * 0.5)
    return net


# Files that take long, the longest first. Begun first, they leave no process idle at the end.
SLOW = (
    "test_resume.py", "test_forks.py", "test_aot.py", "test_samplers.py", "test_cache.py",
    "test_convert.py", "test_encode.py", "test_kills.py", "test_inception.py", "test_interrupt.py",
    "test_attention.py", "test_groupnorm.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def rank(item):
        return SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW)

    items.sort(key=rank)


@pytest.fixture
def user(monkeypatch, capsys):
    """user(train.main, "--lr", "x") -> (exit code, stdout, stderr lines), in this process."""
    from ckpt import hub
    from harness.cli import cli

    def run(main, *args):
        hub.ASKED.clear()  # it begins as a process does
        hub.ONLY_CACHED.clear()
        capsys.readouterr()  # what the test itself made before
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, args)])
        code = 0
        try:
            cli(main)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run
