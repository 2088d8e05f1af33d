"""train.py is made to be copied and changed: nothing below it knows the names of its flags."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--model", "nano", "--data", "toyfaces:24", "--resolution", "32", "--batch", "8"),
    *("--images", "16", "--preview-every", "0", "--eval-every", "16", "--classes", "glasses"),
]
# A flag, and the text of its one use with what stands there without it.
DELETED = {
    "label_drop": (", cfg.label_drop)", ")"),
    "stratified": ('"stratified", ', ""),
    "loss": (", loss_type=cfg.loss", ""),
    "warmup": ("cfg.warmup * cfg.images", "0"),
    "noise_aug": (', "noise_aug"', ""),
}


def without(text: str, name: str) -> str:
    """train.py without a flag: its declaration and its use."""
    lines = text.split("\n")
    first = next(i for i, line in enumerate(lines) if re.match(rf"    {name}: .*= flag\(", line))
    last = first
    while not lines[last].endswith(")"):
        last += 1
    text = "\n".join(lines[:first] + lines[last + 1 :])
    used, instead = DELETED[name]
    assert used in text, f"train.py no longer says {used!r}"
    return text.replace(used, instead)


def run(folder: Path, *args: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *SMALL, "--out", "runs", *args]
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)


def test_a_copy_without_some_flags_trains_and_resumes(tmp_path):
    """All of them at once: what one alone needs, so do they together."""
    text = (ROOT / "train.py").read_text()
    for name in DELETED:
        text = without(text, name)
        assert f"cfg.{name}" not in text
    (tmp_path / "train.py").write_text(text)
    done = run(tmp_path)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr
    assert "finished" in run(tmp_path).stdout
    gone = run(tmp_path, "--label-drop", "0.2")
    assert gone.returncode == 2 and "unknown flag --label-drop" in gone.stderr


@pytest.mark.parametrize("module", ["harness", "data", "ckpt", "vae", "samplers", "metrics"])
def test_nothing_below_imports_train(module):
    """Nor reads what only its Config has."""
    place = ROOT / module
    files = [place.with_suffix(".py")] if not place.is_dir() else sorted(place.rglob("*.py"))
    for file in files:
        text = file.read_text()
        assert not re.search(r"^\s*(import train\b|from train import)", text, re.M), file
        assert not re.search(r"\bcfg\.(label_drop|save_every|warmup|preview_every)\b", text), file
