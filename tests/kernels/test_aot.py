"""Shipped kernel configurations compile for GPUs that are not here.

tests/aot.py does it, in a process without the interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_every_configuration_compiles_fits_and_does_not_spill(capsys):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent.parent / "aot.py", "--quick"],
        capture_output=True,
        text=True,
        env=env,
    )
    with capsys.disabled():
        print("\n" + done.stdout)
    assert done.returncode == 0 and "all well" in done.stdout, (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
