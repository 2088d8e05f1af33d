"""What docs/forking.md says can be done is done: its blocks are pasted, and the result runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
BLOCKS = dict(
    re.findall(
        r"^<!-- fork: ([\w ]+) -->\n```python\n(.*?)^```",
        (ROOT / "docs" / "forking.md").read_text(),
        re.M | re.S,
    )
)
TRAIN = [
    "train.py",
    "--data",
    "toyfaces:24",
    "--resolution",
    "32",
    "--batch",
    "8",
    "--images",
    "160",
    "--log-every",
    "40",
    "--preview-every",
    "0",
    "--eval-every",
    "0",
    "--save-every",
    "40",
]
ENV = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def copy_of_the_house(folder: Path) -> Path:
    """Everything that runs, without tests and measurements."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for path in ROOT.iterdir():
        if (path / "__init__.py").exists() and path.name not in ("tests", "benchmarks"):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def edit(path: Path, old: str, new: str) -> None:
    """Replace what stands exactly once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


def append_to_table(path: Path, table: str, line: str) -> None:
    """Put a line below the definition of a module-level table, which ends with a closing brace."""
    text = path.read_text()
    place = re.search(rf"^{table}\b.*?^\}}\n|^{table}\b[^\n]*\}}\n", text, re.M | re.S)
    assert place, f"no table {table} in {path.name}"
    path.write_text(text[: place.end()] + line + text[place.end() :])


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=ENV, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def newest(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    checkpoint = sorted((folder / "runs" / name / "ckpt").iterdir())[-1]
    assert checkpoint.name == "000000000160"
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{f.name} {key}": value for f in files for key, value in load_file(f).items()}


def kill_at_the_first_checkpoint(folder: Path, *words: str) -> None:
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not list(folder.glob("runs/*/ckpt/000000000040")):
        assert process.poll() is None and time.time() < deadline, "it ended before it was killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_another_network_trains_is_killed_resumes_bitwise_and_samples(tmp_path):
    whole, cut = (copy_of_the_house(tmp_path / name) for name in ("whole", "cut"))
    for folder in (whole, cut):
        model = folder / "model.py"
        edit(model, "\nNETWORKS: ", "\n" + BLOCKS["network"] + "\n\nNETWORKS: ")
        append_to_table(model, "NETWORKS", BLOCKS["networks"])
        append_to_table(model, "PRESETS", BLOCKS["preset"])
    command = [*TRAIN, "--model", "dit", "--name", "fork"]
    run(whole, *command)
    kill_at_the_first_checkpoint(cut, *command)
    before = sorted((cut / "runs/fork/ckpt").glob("0*"))[-1].name
    assert before < "000000000160"
    assert f"resuming runs/fork at {int(before):,}" in run(cut, *command)
    a, b = newest(whole, "fork"), newest(cut, "fork")
    assert a.keys() == b.keys() and len(a) > 50
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    path = run(cut, "samplers.py", "--ckpt", "runs/fork", "--n", "2", "--steps", "2").split()[-1]
    assert (cut / path).is_file()


def test_another_target_trains_and_samples(tmp_path):
    folder = copy_of_the_house(tmp_path / "fork")
    objectives = folder / "objectives.py"
    edit(objectives, 'Literal["u", "eps", "v", "x0"]', BLOCKS["target name"].strip())
    for method in ("goal", "triple"):
        text = objectives.read_text()
        place = re.search(rf"    def {method}\(.*?\"\"\".*?\"\"\"\n", text, re.S)
        start, end = text[: place.end()], text[place.end() :]
        objectives.write_text(start + BLOCKS[f"target {method}"] + end)
    append_to_table(objectives, "PRESETS", BLOCKS["target preset"])
    run(folder, *TRAIN, "--model", "nano", "--objective", "sum", "--name", "fork")
    path = run(folder, "samplers.py", "--ckpt", "runs/fork", "--n", "2", "--steps", "2").split()[-1]
    assert (folder / path).is_file()
    check = """
import torch
from objectives import make_objective
x0, eps, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.9])
w = t.view(-1, 1, 1, 1)
net = lambda x, k, **cond: x0 + 2 * eps
for got, wanted in zip(make_objective("sum").predict(net, (1 - w) * x0 + w * eps, t), (x0, eps)):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
"""
    run(folder, "-c", check)


def test_another_solver_is_known_by_name_and_of_second_order(tmp_path):
    folder = copy_of_the_house(tmp_path / "fork")
    with open(folder / "diffusion" / "solvers.py", "a") as file:
        file.write("\n\n" + BLOCKS["solver"])
    run(folder, *TRAIN, "--model", "nano", "--name", "fork")
    words = ["samplers.py", "--ckpt", "runs/fork", "--n", "2", "--steps", "2"]
    assert (folder / run(folder, *words, "--method", "ralston").split()[-1]).is_file()
    check = """
import torch
from samplers import sample
def predict(x, t):  # dx/dt = x, so x(0) = x(1) / e
    return x, x, x
def error(steps):
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x = sample(predict, x, method="ralston", steps=steps).x
    return abs(float(x) - torch.exp(torch.tensor(-1.0, dtype=torch.float64)).item())
order = torch.log2(torch.tensor(error(20) / error(40)))
assert 1.9 < order < 2.1, order
"""
    run(folder, "-c", check)


# A flag, and the text of its one use with what stands there without it.
DELETED = {
    "label_drop": ("", ""),  # training/trainer.py asks whether there is one
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


def test_a_copied_train_py_without_some_flags_trains_and_resumes(tmp_path):
    """All of them at once: what one alone needs, so do they together."""
    folder = copy_of_the_house(tmp_path / "fork")
    text = (folder / "train.py").read_text()
    for name in DELETED:
        text = without(text, name)
        assert f"cfg.{name}" not in text
    (folder / "train.py").write_text(text)
    command = [*TRAIN, "--model", "nano", "--name", "fork", "--classes", "* hair"]
    assert "finished: runs/fork has seen 160 images" in run(folder, *command)
    assert "finished" in run(folder, *command)
    words = [sys.executable, *command, "--label-drop", "0.2"]
    gone = subprocess.run(words, cwd=folder, env=ENV, capture_output=True, text=True)
    assert gone.returncode == 2 and "unknown flag --label-drop" in gone.stderr


@pytest.mark.parametrize("module", ["harness", "data", "ckpt", "vae", "samplers", "metrics"])
def test_nothing_below_imports_train(module):
    """Nor reads what only its Config has."""
    place = ROOT / module
    files = [place.with_suffix(".py")] if not place.is_dir() else sorted(place.rglob("*.py"))
    for file in files:
        text = file.read_text()
        assert not re.search(r"^\s*(import train\b|from train import)", text, re.M), file
        assert not re.search(r"\bcfg\.(label_drop|warmup|stratified|noise_aug)\b", text), file


def test_model_and_kernels_alone_work_in_another_project(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    check = BLOCKS["alone"] + "\nassert out.shape == (2, 32, 8, 8)\n"
    run(tmp_path, "-c", check)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_the_blocks_of_the_page_are_python(name):
    text = BLOCKS[name]
    wrapped = f"def f(self):\n{text}" if text.startswith("        ") else text
    compile(wrapped, name, "exec")
