"""A run that an older commit began goes on here, exactly: its folder is the file format.

tests/fixtures/834bb60/run was interrupted at 80 of 160 images by the code of that commit;
expected.json is what that code made of the rest.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt import open_unet
from harness.cli import field_of
from harness.run import checkpoints
from train import Config

ROOT = Path(__file__).parent.parent
COMMIT = "834bb60"
FIXTURE = ROOT / "tests" / "fixtures" / COMMIT
COMMAND = [
    *("--model", "nano", "--data", "toyfaces:24", "--resolution", "32", "--batch", "8"),
    *("--images", "160", "--log-every", "24", "--preview-every", "0", "--eval-every", "80"),
    *("--save-every", "80", "--classes", "* hair", "--ema", "0.1", "--name", "old"),
]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


# Today's train.py, but GroupNorm on a CPU as it was then: it lost digits in channels_last.
AS_THEN = """
import runpy, sys
import kernels.groupnorm
kernels.groupnorm.near_zero = lambda x, groups: x
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def resume(code: Path, out: Path, script: tuple[str, ...] = ("train.py",)) -> Path:
    """The fixture, continued in `out` by the code in a folder."""
    shutil.copytree(FIXTURE / "run", out / "old")
    command = [sys.executable, *script, *COMMAND, "--out", str(out)]
    done = subprocess.run(command, cwd=code, env=ENV, text=True, capture_output=True)
    if "changed since" in done.stderr:
        pytest.skip("Pillow draws the toy faces otherwise here, so the run's images are not there")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout and "at 80 of 160 images" in done.stdout
    return out / "old"


def rows(run: Path) -> list[dict]:
    """What the log says of the loss after the interruption."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    keys = ("event", "images", "loss", "loss_by_t")
    shown = [line for line in lines if line["images"] > 80 and line["event"] != "start"]
    return [{key: line[key] for key in keys} for line in shown]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    folder = checkpoints(run)[-1]
    assert folder.name == "000000000160"
    files = sorted(folder.iterdir())
    return {f"{file.name}:{key}": x for file in files for key, x in load_file(file).items()}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    return resume(ROOT, tmp_path_factory.mktemp("new"))


def test_a_run_of_an_older_commit_goes_on_to_the_same_end(resumed):
    """Up to fp32 rounding, for processors add in different orders."""
    expected = json.loads((FIXTURE / "expected.json").read_text())
    found = rows(resumed)
    assert [(row["event"], row["images"]) for row in found] == [
        (row["event"], row["images"]) for row in expected["rows"]
    ]
    for ours, theirs in zip(found, expected["rows"]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        for a, b in zip(ours["loss_by_t"], theirs["loss_by_t"], strict=True):
            assert (a is None) == (b is None) and (a is None or a == pytest.approx(b, rel=5e-3))
    norms = {key: float(x.double().norm()) for key, x in tensors(resumed).items()}
    assert norms.keys() == expected["norms"].keys() and len(norms) > 700
    for key, wanted in expected["norms"].items():
        # Adam amplifies rounding where gradients are tiny: by at most lr a step.
        assert math.isclose(norms[key], wanted, rel_tol=2e-2, abs_tol=2e-3), key


def test_the_log_of_an_older_run_is_kept_and_continued(resumed):
    before = (FIXTURE / "run" / "log.jsonl").read_text().splitlines()
    after = (resumed / "log.jsonl").read_text().splitlines()
    kept = [line for line in before if json.loads(line)["images"] <= 80]
    assert after[: len(kept)] == kept and len(after) > len(kept)
    old, new = (json.loads(line) for line in (kept[0], after[len(kept)]))
    assert old["event"] == new["event"] == "start" and old.keys() == new.keys()
    trained = [json.loads(line) for line in after if json.loads(line)["event"] == "train"]
    assert len({tuple(row) for row in trained}) == 1  # the same keys in the same order


def test_an_older_run_ends_bitwise_where_its_own_code_ends_it(tmp_path):
    """The old code beside the new one, on this processor, with the same GroupNorm."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", COMMIT], capture_output=True)
    if archive.returncode:
        pytest.skip(f"git has no commit {COMMIT} here: {archive.stderr.decode().strip()[:80]}")
    code = tmp_path / "code"
    code.mkdir()
    subprocess.run(["tar", "-x", "-C", code], input=archive.stdout, check=True)
    own = resume(code, tmp_path)
    resumed = resume(ROOT, tmp_path / "new", ("-c", AS_THEN))
    a, b = tensors(own), tensors(resumed)
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []
    assert rows(own) == rows(resumed)
    old, new = read_meta(own), read_meta(resumed)
    # A flag that is younger than the old code is at its default.
    younger = {key: new["config"].pop(key) for key in new["config"].keys() - old["config"].keys()}
    assert old == new and younger == {key: field_of(Config, key).default for key in younger}


def read_meta(run: Path) -> dict:
    """The network's metadata, without which code wrote it, and where."""
    meta = dict(open_unet(checkpoints(run)[-1] / "model.safetensors").meta)
    config = {key: x for key, x in meta["config"].items() if key != "out"}
    return {**meta, "config": config, "commit": "", "dirty": ""}
