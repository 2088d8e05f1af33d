"""train.py is made to be copied and changed: nothing below it knows the names of its flags."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import model
import samplers
import train
from harness.run import checkpoints

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


# ---- another network ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainConfig:
    in_channels: int = 32
    out_channels: int = 32
    num_classes: int = 0
    width: int = 16
    multiple: int = 1


class Plain(nn.Module):
    """Two convolutions and a scale by time."""

    def __init__(self, cfg: PlainConfig):
        super().__init__()
        self.cfg = cfg
        self.first = nn.Conv2d(cfg.in_channels, cfg.width, 3, padding=1)
        self.last = nn.Conv2d(cfg.width, cfg.out_channels, 3, padding=1)
        self.time = nn.Linear(1, cfg.width)
        self.label = nn.Embedding(cfg.num_classes + 1, cfg.width)

    def forward(self, x, t, y=None, context=None):
        scale = self.time(t[:, None] / 1000)
        if y is not None:
            scale = scale + self.label(y + 1)
        return self.last(torch.relu(self.first(x) + scale[:, :, None, None]))


def test_a_network_of_its_own_trains_resumes_bitwise_and_samples(tmp_path, user, monkeypatch):
    """A class with its config, a line in NETWORKS and one in PRESETS: nothing else is edited."""
    monkeypatch.setitem(model.NETWORKS, "Plain", (Plain, PlainConfig))
    monkeypatch.setitem(model.PRESETS, "plain", PlainConfig())
    words = [*SMALL, "--model", "plain", "--images", "48", "--save-every", "16", "--name", "p"]
    for out in ("whole", "killed"):
        if out == "killed":
            real = train.step

            def killed(tr, loader):
                if tr.seen == 24:
                    raise KeyboardInterrupt
                return real(tr, loader)

            with monkeypatch.context() as m:
                m.setattr(train, "step", killed)
                assert user(train.main, *words, "--out", tmp_path / out)[0] == 130
        code, text, err = user(train.main, *words, "--out", tmp_path / out)
        assert code == 0 and ("resuming" in text) == (out == "killed"), err
    whole, again = (tensors(tmp_path / out / "p") for out in ("whole", "killed"))
    assert whole.keys() == again.keys() and "model.safetensors:first.weight" in whole
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    args = ["--ckpt", tmp_path / "whole" / "p", "--n", 2, "--steps", 2, "--out", tmp_path / "s"]
    code, text, err = user(samplers.main, *args)
    assert code == 0 and (tmp_path / "s" / "000001.png").exists(), err


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoints(run)[-1].iterdir())
    return {f"{file.name}:{key}": x for file in files for key, x in load_file(file).items()}
