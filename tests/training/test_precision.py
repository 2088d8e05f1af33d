"""What --dtype auto is: decided once, by a race that leaves no trace, and kept."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train
from experiments import parts
from harness.cli import UserError
from harness.run import checkpoints
from model import PRESETS, UNet
from test_train import ALONE, FAST as QUICK, a_quick_last_picture  # noqa: F401
from train import Config, resolve
from training import precision

ROOT = Path(__file__).parent.parent.parent
CORE = "processor : 0\nflags\t\t: fpu avx512f {} sse2\n"
HAS = CORE.format("avx512_bf16")
FAST = {**QUICK, "data": "toyfaces:24", "images": 32, "log_every": 16}


def on_a_cpu(monkeypatch, tmp_path, cpuinfo: str) -> None:
    """As if /proc/cpuinfo were this text; "" = there is none."""
    path = tmp_path / "cpuinfo"
    if cpuinfo:
        path.write_text(cpuinfo)
    real = precision.has_bf16
    monkeypatch.setattr(precision, "has_bf16", lambda: real(path))


def clocked(monkeypatch, fp32: list[float], bf16: list[float]) -> list[str]:
    """Every pass takes what is said of its dtype, in turn, and the last for ever. Returns the list
    in which the passes will stand."""
    passes, left = [], {"fp32": list(fp32), "bf16": list(bf16)}

    def pass_seconds(net, inputs, dtype):
        passes.append(dtype)
        times = left[dtype]
        return times.pop(0) if len(times) > 1 else times[0]

    monkeypatch.setattr(precision, "pass_seconds", pass_seconds)
    return passes


@pytest.mark.parametrize(
    "cpuinfo, fp32, bf16, passes, dtype, line",
    [
        pytest.param(HAS, [1.0], [0.8], 100, "bf16", "bf16, 1.25 times", id="avx512_bf16"),
        pytest.param(CORE.format("amx_bf16"), [1.0], [0.5], 100, "bf16", "2.00", id="amx"),
        pytest.param(HAS, [1.1], [1.0], 100, "bf16", "1.10", id="just-enough"),
        pytest.param(HAS, [1.09], [1.0], 100, "fp32", "fp32; bf16 would be 1.09", id="too-little"),
        pytest.param(HAS, [1.0], [2.0], 100, "fp32", "0.50", id="slower"),
        # the first passes prepare; of the others the fastest count
        pytest.param(HAS, [9, 1, 1, 1, 1], [9, 5, 0.8, 5], 100, "bf16", "1.25", id="a-busy-core"),
        pytest.param(HAS, [9, 1, 1, 99, 1], [9, 1, 1, 1], 100, "fp32", "1.00", id="a-slow-fp32"),
        pytest.param(HAS, [1.0], [0.1], 59, "fp32", "", id="a-short-run"),
        pytest.param(CORE.format("avx2"), [1.0], [0.1], 100, "fp32", "", id="not-in-hardware"),
        pytest.param(CORE.format("avx512_bf16x"), [1.0], [0.1], 100, "fp32", "", id="like-it"),
        pytest.param(HAS + CORE.format(""), [1.0], [0.1], 100, "fp32", "", id="one-core-has-not"),
        pytest.param("", [1.0], [0.1], 100, "fp32", "", id="nobody-says"),
    ],
)
def test_the_decision(monkeypatch, tmp_path, capsys, cpuinfo, fp32, bf16, passes, dtype, line):
    on_a_cpu(monkeypatch, tmp_path, cpuinfo)
    ran = clocked(monkeypatch, fp32, bf16)
    device, net = torch.device("cpu"), nn.Identity()
    assert precision.decide(device, net, dict, passes) == dtype
    out = capsys.readouterr().out
    assert line in out and out.count("\n") == bool(line)
    if not line:
        assert "bf16" not in ran
        return
    raced = ran[3:]  # after those that prepare
    assert ran[:3] == ["fp32", "fp32", "bf16"] and raced == ["fp32", "bf16"] * (len(raced) // 2)


@pytest.mark.parametrize("seconds, rounds", [(0.02, 25), (2.0, 3)])
def test_a_race_lasts_a_second_or_three_rounds(monkeypatch, seconds, rounds):
    ran = clocked(monkeypatch, [seconds], [seconds])
    assert precision.race(nn.Identity(), {}, 10**6) == 1.0
    assert len(ran) - 3 == pytest.approx(2 * rounds, abs=2)


def test_this_machine_is_read(tmp_path):
    path = Path("/proc/cpuinfo")
    if not path.exists():
        pytest.skip("no /proc/cpuinfo here")
    words = path.read_text().split()
    assert precision.has_bf16() == ("avx512_bf16" in words or "amx_bf16" in words)


def test_a_race_changes_neither_the_network_nor_the_random_numbers(monkeypatch, tmp_path):
    on_a_cpu(monkeypatch, tmp_path, HAS)
    monkeypatch.setattr(precision, "WORTH", 0.0)

    class Net(nn.Module):
        cfg = replace(PRESETS["nano"], in_channels=3, num_classes=5)

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5))
            self.asked = []

        def forward(self, x, t, y):
            assert x.shape == (2, 3, 4, 6) and t.shape == y.shape == (2,)
            return self.layers(x)

    net = Net()
    net.layers[0].weight.grad = torch.ones(3, 3, 3, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    numbers = torch.get_rng_state()
    cfg = Config(**FAST, out=str(tmp_path), name="r", accum=4)
    found = precision.settle_dtype(cfg, ALONE, net, (3, 4, 6))
    assert found == replace(cfg, dtype=found.dtype) and found.dtype in ("fp32", "bf16")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.layers[0].weight.grad.eq(1).all() and net.layers[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), numbers)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: weights, EMAs, optimizer, loss meter."""
    files = sorted(checkpoints(run)[-1].glob("*.safetensors"))
    return {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}


def go(out: Path, **flags) -> Path:
    cfg = resolve(Config(**{**FAST, "out": str(out), "name": "r", **flags}))
    train.train(cfg, ALONE)
    return out / "r"


class TwoSteps:
    """In place of StopSignal: a signal after two steps."""

    def __init__(self):
        self.asks = 0

    def asked(self, ranks) -> bool:
        self.asks += 1
        return self.asks > 2


def same(a: Path, b: Path) -> bool:
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("winner, gain", [("bf16", 0.0), ("fp32", 1e9)])
def test_a_run_that_was_raced_is_bitwise_the_one_that_was_told(
    monkeypatch, tmp_path, capsys, winner, gain
):
    """Also when it goes on, where there is no bf16 and a race would end otherwise."""
    on_a_cpu(monkeypatch, tmp_path, HAS)
    monkeypatch.setattr(precision, "WORTH", 0.0)
    told = go(tmp_path / "told", dtype=winner)
    assert "dtype:" not in capsys.readouterr().out

    with monkeypatch.context() as m:
        m.setattr(train, "StopSignal", TwoSteps)
        m.setattr(precision, "GAIN", gain)
        raced = go(tmp_path / "raced")
    assert int(checkpoints(raced)[-1].name) == 16
    assert f"dtype: {winner}" in capsys.readouterr().out
    on_a_cpu(monkeypatch, tmp_path, CORE.format(""))
    monkeypatch.setattr(precision, "race", None)
    for other in {"fp32", "bf16"} - {winner}:
        with pytest.raises(UserError, match=f"dtype '{winner}' -> '{other}'"):
            go(tmp_path / "raced", dtype=other)
    go(tmp_path / "raced")
    assert same(told, raced)
    rows = [json.loads(line) for line in (raced / "log.jsonl").read_text().splitlines()]
    assert json.loads((raced / "config.json").read_text())["dtype"] == winner
    assert [r["config"]["dtype"] for r in rows if r["event"] == "start"] == [winner] * 2


def test_bf16_is_another_computation(tmp_path):
    """Or the twins above would say nothing."""
    assert not same(go(tmp_path / "a", dtype="fp32"), go(tmp_path / "b", dtype="bf16"))


def test_a_run_that_began_before_there_was_a_race_goes_on_without(monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        m.setattr(train, "StopSignal", TwoSteps)
        m.setattr(train, "settle_dtype", lambda cfg, *_: cfg)
        old = go(tmp_path / "old")
    assert json.loads((old / "config.json").read_text())["dtype"] == "auto"
    on_a_cpu(monkeypatch, tmp_path, HAS)
    monkeypatch.setattr(precision, "race", None)
    go(tmp_path / "old")
    assert same(old, go(tmp_path / "new", dtype="fp32"))


def test_a_gpu_is_not_raced(monkeypatch, tmp_path):
    on_a_cpu(monkeypatch, tmp_path, HAS)
    monkeypatch.setattr(precision, "race", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert precision.decide(torch.device("cuda"), None, None, 10**6) == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert precision.decide(torch.device("cuda"), None, None, 10**6) == "fp32"


RANKS = """
import sys, torch
from torch import nn
from harness.ranks import join_ranks
from model import PRESETS
from train import Config
from training import precision
ranks = join_ranks("cpu")
precision.has_bf16 = lambda: True
# Each would find something else, and the last never races.
precision.race = lambda net, inputs, passes: 2.0 if ranks.rank == 0 else sys.exit("raced")
net = nn.Identity()
net.cfg = PRESETS["nano"]
cfg = precision.settle_dtype(Config(out=sys.argv[1], name="r"), ranks, net, (32, 4, 4))
print(f"rank {ranks.rank} of {ranks.world}: {cfg.dtype}", flush=True)
ranks.leave()
"""


def test_ranks_agree(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "--no-python", sys.executable, "-c", RANKS, tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2: bf16" in done.stdout
    assert done.stdout.count("dtype:") == 1


def test_networks_get_all_that_they_are_told():
    tiny = replace(PRESETS["nano"], in_channels=3, num_classes=7)
    found = precision.inputs_of(tiny, 4, (3, 8, 6))
    assert found["x"].shape == (4, 3, 8, 6) and found["y"].shape == (4,)
    assert 0 <= found["t"].min() and found["t"].max() <= 1000 and found["y"].max() < 7
    sdxl = replace(PRESETS["sdxl"], model_channels=32, num_head_channels=32)
    found = precision.inputs_of(sdxl, 2, (4, 8, 8))
    assert found["y"].shape == (2, 2816) and found["context"].shape == (2, 77, 2048)
    enlarging = replace(PRESETS["nano"], in_channels=64)
    inputs = precision.inputs_of(enlarging, 2, (32, 8, 8))
    assert UNet(enlarging)(**inputs).shape == (2, 32, 8, 8)


def test_a_race_is_of_a_micro_batch_and_of_all_passes_of_a_rank(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(precision, "decide", lambda *args: said.append(args) or "bf16")
    ranks = SimpleNamespace(world=2, device=torch.device("cpu"), broadcast=lambda make: make())
    cfg = Config(out=str(tmp_path), name="r", images=100, batch=24, accum=3)
    net = UNet(PRESETS["nano"])
    assert precision.settle_dtype(cfg, ranks, net, (32, 8, 8)).dtype == "bf16"
    device, raced, inputs, passes = said[0]
    assert (device, raced, passes) == (ranks.device, net, 5 * 3)  # 100 images are 5 batches of 24
    assert inputs()["x"].shape == (4, 32, 8, 8)


def test_runs_that_are_compared_are_not_raced(tmp_path):
    cfg = Config(out=str(tmp_path), name="r")
    assert precision.without_race(cfg, torch.device("cpu")).dtype == "fp32"
    told = replace(cfg, dtype="bf16")
    assert precision.without_race(told, torch.device("cpu")) == told
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text("{}")
    assert precision.without_race(cfg, torch.device("cpu")).dtype == "auto"


def test_the_arms_of_a_comparison_are_not_raced(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train, "train", lambda cfg, ranks: seen.append(cfg.dtype))
    cfg = Config(out=str(tmp_path), name="F")
    bench = SimpleNamespace(config=lambda part: cfg, ranks=ALONE, runs=tmp_path)
    parts.trained(bench, parts.Part("F", 0, "standard"))
    assert seen == ["fp32"]
