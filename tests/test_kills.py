"""Five of the kills of tests/kills.py, which as a script does a hundred."""

import subprocess
import sys
from pathlib import Path

KILLS = Path(__file__).parent / "kills.py"


def test_kills_at_seeded_moments_lose_nothing_and_change_nothing():
    done = subprocess.run([sys.executable, KILLS, "5", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = [int(line.split()[2]) for line in done.stdout.splitlines()]
    assert killed == [2, 1, 1, 1], done.stdout
