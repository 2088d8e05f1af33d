"""Exact resume: whatever kills a run, it ends bitwise where it would have ended; and ranks only
split the work."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.run import checkpoints

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONUNBUFFERED": "1"}
BASE = [
    "--model",
    "nano",
    "--data",
    "toyfaces:24",
    "--resolution",
    "32",
    "--batch",
    "8",
    "--images",
    "160",
    "--log-every",
    "24",
    "--preview-every",
    "0",
    "--eval-every",
    "0",
    "--save-every",
    "80",
]


def start(out, *args, ranks=1, base=BASE) -> subprocess.Popen:
    launcher = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
    )
    return subprocess.Popen(
        [*launcher, "train.py", *base, *args, "--out", str(out)],
        cwd=ROOT,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(out, *args, ranks=1, base=BASE) -> str:
    process = start(out, *args, ranks=ranks, base=base)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL for a process and everything it started, children last so that none is missed."""
    listing = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout.split()
    parents = dict(zip(map(int, listing[::2]), map(int, listing[1::2])))
    family = [process.pid]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


def run_of(out) -> Path:
    return next(Path(out).glob("*/config.json")).parent


def final(out) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: weights, EMAs, optimizer, loss meter."""
    folder = checkpoints(run_of(out))[-1]
    return {f"{f.name}:{k}": v for f in sorted(folder.iterdir()) for k, v in load_file(f).items()}


def losses(out) -> list:
    lines = [json.loads(line) for line in (run_of(out) / "log.jsonl").read_text().splitlines()]
    return [
        (r["images"], r["loss"], r["loss_by_t"], r["grad_norm"], r["lr"])
        for r in lines
        if r["event"] == "train"
    ]


def same(a, b):
    assert a.keys() == b.keys() and len(a) > 300
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, (
            "the run ended before it could be killed"
        )
        time.sleep(0.001)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def whole(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"whole{request.param}")
    finish(out, ranks=request.param)
    return request.param, out


def test_20_steps_equal_10_steps_kill_10_steps_bitwise(whole, tmp_path):
    ranks, out = whole
    process = start(tmp_path, ranks=ranks)
    wait_for(lambda: list(tmp_path.glob("*/ckpt/000000000080")), process)
    kill_tree(process)
    assert int(checkpoints(run_of(tmp_path))[-1].name) < 160
    assert "resuming" in finish(tmp_path, ranks=ranks)
    same(final(out), final(tmp_path))
    assert losses(out) == losses(tmp_path) and len(losses(out)) == 7  # half-filled meters too


def test_a_cold_optimizer_would_not_be_bitwise(whole, tmp_path):
    """The comparison above can fail: drop one ingredient of the state and it does. Only an older
    run, without a list of digests, lets anybody do so."""
    ranks, out = whole
    if ranks == 2:
        pytest.skip("one rank shows it")
    process = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("*/ckpt/000000000080")), process)
    kill_tree(process)
    from ckpt import read_tensors
    from harness.files import DIGESTS, write_tensors

    state = checkpoints(run_of(tmp_path))[-1] / "state.safetensors"
    tensors, meta = read_tensors(state)
    write_tensors(
        state, {k: v * 0 if k.startswith("exp_avg/") else v for k, v in tensors.items()}, meta
    )
    (state.parent / DIGESTS).unlink()
    finish(tmp_path)
    a, b = final(out), final(tmp_path)
    assert not torch.equal(a["model.safetensors:out.2.weight"], b["model.safetensors:out.2.weight"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_adamw8bit_resumes_bitwise_and_keeps_its_codes(tmp_path, ranks):
    finish(tmp_path / "whole", "--optim", "adamw8bit", ranks=ranks)
    process = start(tmp_path / "cut", "--optim", "adamw8bit", ranks=ranks)
    wait_for(lambda: list((tmp_path / "cut").glob("*/ckpt/000000000080")), process)
    kill_tree(process)
    finish(tmp_path / "cut", "--optim", "adamw8bit", ranks=ranks)
    whole = final(tmp_path / "whole")
    same(whole, final(tmp_path / "cut"))
    assert whole["state.safetensors:m/input_blocks.1.0.in_layers.2.weight"].dtype == torch.uint8


def test_a_transformer_resumes_bitwise_and_two_ranks_share_its_work(tmp_path):
    flags = ("--model", "sit-nano", "--classes", "* hair", "--lr", "2e-4")
    finish(tmp_path / "whole", *flags)
    process = start(tmp_path / "cut", *flags)
    wait_for(lambda: list((tmp_path / "cut").glob("*/ckpt/000000000080")), process)
    kill_tree(process)
    assert "resuming" in finish(tmp_path / "cut", *flags)
    a, b = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert a.keys() == b.keys() and len(a) > 150
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    finish(tmp_path / "ranks", *flags, ranks=2)
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "ranks")
    assert [row[1] for row in two] == pytest.approx([row[1] for row in one], rel=1e-5)


def log_of(out) -> str:
    logs = list(Path(out).glob("*/log.jsonl"))
    return logs[0].read_text() if logs else ""


def test_six_kills_at_random_moments_also_during_saves_change_nothing(tmp_path):
    """A checkpoint every step, so that most of the time is spent saving. tests/kills.py has more
    kills, in forks of one process; here the command itself is killed and started again."""
    base = [w if w != "80" else "8" for w in BASE]
    killed, moments, caught_saving = tmp_path / "killed", random.Random(0), 0
    finish(tmp_path / "whole", base=base)
    saving = lambda: list(killed.glob("*/ckpt/*.tmp"))
    for kill in range(6):
        before = log_of(killed)
        process = start(killed, base=base)
        wait_for(lambda: log_of(killed) != before, process)
        if kill % 2:
            wait_for(saving, process)
        else:
            time.sleep(moments.random() * 0.25)
        process.kill()
        process.communicate()
        caught_saving += bool(saving())
        done = checkpoints(run_of(killed))
        if done and int(done[-1].name) >= 120:  # near its end: back to the start
            for late in done:
                late.rename(late.with_name(late.name + ".old"))
    finish(killed, base=base)
    assert caught_saving > 0
    same(final(tmp_path / "whole"), final(killed))
    assert losses(tmp_path / "whole") == losses(killed)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(whole, tmp_path, kind):
    ranks, out = whole
    process = start(tmp_path, ranks=ranks)
    wait_for(
        lambda: (
            list(tmp_path.glob("*/log.jsonl"))
            and '"train"' in (run_of(tmp_path) / "log.jsonl").read_text()
        ),
        process,
    )
    process.send_signal(kind)
    text, _ = process.communicate(timeout=120)
    if ranks == 1:  # torchrun itself reports the signal as a failure
        assert process.returncode == 0, text
    assert "stopped and saved at" in text and "The same command continues." in text
    stopped = int(checkpoints(run_of(tmp_path))[-1].name)
    assert 0 < stopped < 160
    finish(tmp_path, ranks=ranks)
    same(final(out), final(tmp_path))
    assert "finished" in finish(tmp_path, ranks=ranks)  # and once more: nothing to do, exit 0


def test_a_signal_to_the_whole_process_group_leaves_the_workers_to_the_trainer(tmp_path):
    """Ctrl-C, timeout and Slurm signal the loader's worker processes too."""
    command = [
        sys.executable,
        "train.py",
        *BASE,
        "--images",
        "100000",
        "--workers",
        "2",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for(
        lambda: (
            list(tmp_path.glob("*/log.jsonl"))
            and '"train"' in (run_of(tmp_path) / "log.jsonl").read_text()
        ),
        process,
    )
    os.killpg(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped and saved at" in text, text


def test_two_ranks_and_accumulation_split_the_work_and_nothing_else(tmp_path):
    """Same loss curve to fp32 rounding over 20 steps, whatever the split."""
    base = [w if w != "24" else "8" for w in BASE] + [
        "--lr",
        "2e-4",
    ]  # Adam amplifies rounding by lr where gradients are tiny
    finish(tmp_path / "1", base=base)
    finish(tmp_path / "4", "--accum", "4", base=base)
    finish(tmp_path / "2", ranks=2, base=base)
    finish(tmp_path / "2x2", "--accum", "2", ranks=2, base=base)
    one, *others = (losses(tmp_path / name) for name in ("1", "4", "2", "2x2"))
    assert len(one) == 20
    for other in others:
        for (_, a, _, norm_a, lr_a), (_, b, _, norm_b, lr_b) in zip(one, other):
            assert (
                b == pytest.approx(a, rel=1e-5)
                and norm_b == pytest.approx(norm_a, rel=1e-3)
                and lr_a == lr_b
            )
    # and a different order of samples is not within rounding
    finish(tmp_path / "s", "--seed", "1", base=base)
    assert abs(losses(tmp_path / "s")[5][1] / one[5][1] - 1) > 1e-4
