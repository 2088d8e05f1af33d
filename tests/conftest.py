import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def randomize(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fan-in weights everywhere, zero-initialised layers included: an untrained U-Net would output zeros."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / fan_in ** 0.5 + (p.ndim == 1) * 0.5)
    return net


@pytest.fixture
def script():
    """script("train.py", "--images", 10, …) -> CompletedProcess, run from the repository's root."""
    def run(*args, check: int | None = 0, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, **(env or {})}, **kwargs)
        assert check is None or done.returncode == check, f"{args} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done
    return run
