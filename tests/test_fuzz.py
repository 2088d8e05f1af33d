"""A minute of tests/fuzz.py and tests/flips.py, and proof that they see what they look for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

SAMPLE = """
import shutil, tempfile
from functools import partial
from pathlib import Path
from flips import flip
from fuzz import make_case, make_world, show, try_case

folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
failed = 0
try:
    world = make_world(folder)
    for make, n in ((partial(make_case, ""), 90), (flip, 30)):
        for number in range(n):
            outcome = try_case(world, make, 1, number)
            failed += bool(outcome.faults)
            if outcome.faults:
                show(outcome, "failed: seed 1")
            print("tried", outcome.case.kind)
finally:
    shutil.rmtree(folder)
raise SystemExit(failed)
"""

# Commands with a fault each, and one without, run and judged as the real ones are.
PLANTED = """
import json, os, sys, tempfile, time
from pathlib import Path
import fuzz
from harness.cli import UserError

def well():
    Path("out").mkdir()
    Path("out/card.json").write_text(json.dumps({"metrics": Path("given").read_text()}))

def refuses():
    raise UserError("wrong", do="Do it well.")

def crashes():
    raise ValueError("no one caught this")

def leaves():
    sys.exit(3)

def says_two():
    print("error: one", file=sys.stderr)
    refuses()

def hangs():
    time.sleep(60)

def grows():
    kept = b"x" * 2_100_000_000

def loses():
    os.unlink("given")

def changes():
    Path("given").write_text("other")

world = Path(tempfile.mkdtemp()) / "world"
world.mkdir()
(world / "given").write_text("whole")
found = {}
for command in (well, refuses, crashes, leaves, says_two, hangs, grows, loses, changes):
    name = command.__name__
    fuzz.MAINS[name] = command
    fuzz.PATIENCE = 1 if command is hangs else 20
    case = fuzz.Case("planted", [name], "planted", {}, False)
    found[name] = fuzz.try_case(world, lambda number, r: case, 0, 0).faults

def damage(number, r):
    Path("given").unlink()
    Path("given").write_text("harmed")
    return fuzz.Case("planted", ["well"], "another letter", {}, True)

found["takes damage"] = fuzz.try_case(world, damage, 0, 0).faults
sealed = fuzz.Case("planted", ["well"], "nothing", {}, True)
found["takes what is whole"] = fuzz.try_case(world, lambda number, r: sealed, 0, 0).faults
print(json.dumps(found))
"""


def run_script(text: str) -> subprocess.CompletedProcess:
    """A script of its own: the harness forks, which a process with threads must not."""
    command = [sys.executable, "-c", text]
    return subprocess.run(command, cwd=TESTS, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits memory")
def test_a_seeded_sample_of_bad_inputs_and_of_flipped_bits_finds_nothing():
    done = run_script(SAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tried") == 120


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits memory")
def test_the_harness_sees_each_fault_that_is_planted():
    done = run_script(PLANTED)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "well": [],
        "refuses": [],
        "crashes": ["traceback"],
        "leaves": ["exit code 3"],
        "says_two": ["2 errors"],
        "hangs": ["hang"],
        "grows": ["memory"],
        "loses": ["lost"],
        "changes": ["lost"],
        "takes damage": ["damage accepted"],
        "takes what is whole": [],
    }
