"""--weights bf16: rounded stochastically, averaged in fp32, resumed to the bit, alike on ranks."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from ckpt import load_unet
from harness.cli import UserError
from harness.ranks import Ranks
from harness.run import checkpoints
from test_train import a_quick_last_picture  # noqa: F401
from training.nonfinite import gradient_norms

ROOT = Path(__file__).parent.parent.parent
ALONE = Ranks(0, 1, torch.device("cpu"))
FAST = dict(
    model="nano",
    data="toyfaces:24",
    resolution=32,
    batch=8,
    images=160,
    log_every=24,
    preview_every=0,
    eval_every=0,
    save_every=0,
    optim="adamw8bit",
    weights="bf16",
)


def config(out, **fields):
    return train.resolve(train.Config(**{**FAST, "out": str(out), **fields}))


def go(out, **fields) -> Path:
    cfg = config(out, **fields)
    train.train(cfg, ALONE)
    return Path(cfg.out) / cfg.name


def tensors(run) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint: weights, EMAs, optimizer, meter."""
    folder = checkpoints(run)[-1]
    return {f"{f.name}:{k}": v for f in sorted(folder.iterdir()) for k, v in load_file(f).items()}


@pytest.mark.parametrize("optim", ["adamw8bit", "adamw32bit"])
def test_a_run_that_was_interrupted_is_bitwise_the_straight_one(tmp_path, monkeypatch, optim):
    straight = go(tmp_path / "straight", optim=optim)

    class Once:
        asks = 0

        def asked(self, ranks):
            Once.asks += 1
            return Once.asks > 7  # after seven steps of twenty, mid-meter

    with monkeypatch.context() as m:
        m.setattr(train, "StopSignal", Once)
        cut = go(tmp_path / "cut", optim=optim)
    assert int(checkpoints(cut)[-1].name) == 56
    go(tmp_path / "cut", optim=optim)
    one, two = tensors(straight), tensors(cut)
    assert one.keys() == two.keys() and len(one) > 300
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_its_files_are_in_bf16_and_the_averages_in_fp32(tmp_path, user):
    run = go(tmp_path, images=16)
    for file, dtype in (("model", torch.bfloat16), ("ema-0.050", torch.float32)):
        net, meta = load_unet(checkpoints(run)[-1] / f"{file}.safetensors")
        assert {p.dtype for p in net.parameters()} == {dtype}
        assert meta["config"]["weights"] == "bf16" and meta["config"]["dtype"] == "bf16"
    words = [w for k, v in FAST.items() for w in (f"--{k.replace('_', '-')}", v)]
    words += ["--out", tmp_path, "--weights", "fp32"]
    code, _, errors = user(train.main, *words)
    assert code == 2 and "weights 'bf16' -> 'fp32'" in errors[-1]


def test_a_step_is_adamw_rounded_to_either_neighbour_without_bias(tmp_path, monkeypatch):
    """Against AdamW's first step in fp64: lr times the gradient's sign, since eps is small."""
    tr = train.setup(config(tmp_path, lr=1e-3, warmup=0.0, decay="constant"), ALONE)
    for p in tr.params.values():  # some are 0, and would all round alike
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        p.data.add_(noise.to(p.dtype) * 0.1)
    before, gradients = {}, {}
    real = train.update

    def watched(tr, norm):
        for name, p in tr.params.items():
            before[name], gradients[name] = p.detach().double(), p.grad.double()
        real(tr, norm)

    monkeypatch.setattr(train, "update", watched)
    with contextlib.closing(train.load(tr)) as loader:
        norm = train.step(tr, loader)
    total = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert float(norm) == pytest.approx(float(total), rel=1e-6)  # in fp32, of bf16 gradients
    clip = min(1.0, 1.0 / (float(total) + 1e-6))
    apart = []
    for name, p in tr.params.items():
        g = clip * gradients[name]
        exact = before[name] * (1 - 1e-3 * 0.01) - 1e-3 * g / (g.abs() + 1e-8)
        spacing = 2.0 ** (exact.abs().clamp(min=1e-30).log2().floor() - 7)
        apart.append(((p.detach().double() - exact) / spacing)[exact.abs() > 1e-4].flatten())
    apart = torch.cat(apart)
    assert apart.abs().max() < 1.01 and (apart.abs() > 0.5).double().mean() > 0.1
    # Of f · (1 - f), whatever the fractions f are, at most 1/4.
    assert apart.mean().abs() < 4 * 0.5 / len(apart) ** 0.5
    # An average of width w after the first step is the new weights, to the bit, in fp32.
    for average in tr.ema.weights.values():
        assert {e.dtype for e in average.values()} == {torch.float32}


def test_norms_of_bf16_gradients_are_in_fp32(tmp_path):
    tr = train.setup(config(tmp_path), ALONE)
    for i, p in enumerate(tr.params.values()):
        g = torch.Generator().manual_seed(i)
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
    norms, names = gradient_norms(tr)
    exact = [tr.params[name].grad.double().norm() for name in names]
    assert norms.dtype == torch.float32
    assert torch.allclose(norms[1:].double(), torch.stack(exact), rtol=1e-5)
    assert float(norms[0]) == pytest.approx(float(torch.stack(exact).norm()), rel=1e-5)


TWO_RANKS = """
import contextlib, json, sys
from pathlib import Path
import train
from ckpt import fingerprint
from harness.ranks import join_ranks

cfg = train.resolve(train.Config(**json.loads(sys.argv[1])))
ranks = join_ranks("cpu")
tr = train.setup(cfg, ranks)
with contextlib.closing(train.load(tr)) as loader:
    for _ in range(3):
        train.step(tr, loader)
own = [fingerprint(tr.net.state_dict())] + [fingerprint(e) for e in tr.ema.weights.values()]
Path(cfg.out, f"rank{ranks.rank}").write_text(json.dumps(own))
ranks.leave()
"""


def test_ranks_agree_to_the_bit(tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = json.dumps({**FAST, "out": str(tmp_path)})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*launch, str(tmp_path / "two.py"), words], env=environment, check=True, cwd=ROOT
    )
    one, two = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert one == two and len(set(one)) == 3


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"model": "sit-nano"}, id="transformer"),
        pytest.param({"text": "bytes"}, id="text"),
        pytest.param({"classes": ("glasses",), "objective": "ddpm"}, id="classes"),
    ],
)
def test_every_network_trains_in_it(tmp_path, fields):
    run = go(tmp_path, images=16, eval_every=16, preview_every=16, **fields)
    net, _ = load_unet(checkpoints(run)[-1] / "model.safetensors")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    # A transformer's places are no weights.
    assert {b.dtype for b in net.buffers()} <= {torch.float32}


@pytest.mark.parametrize(
    "words, message",
    [
        pytest.param(
            ["--optim", "adamw"], "which rounds to nearest and loses small updates", id="optimizer"
        ),
        pytest.param(["--dtype", "fp32"], "a network computes in what its weights are", id="dtype"),
    ],
)
def test_what_cannot_train_it_is_refused_in_one_line(tmp_path, user, words, message):
    flags = ["--weights", "bf16", "--optim", "adamw8bit", "--out", tmp_path / "r", *words]
    code, _, errors = user(train.main, *flags)
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "r").exists()


def test_weights_that_never_moved_are_not_saved(tmp_path):
    """They are compared with what was read, rounded."""
    start = go(tmp_path, images=16, name="start", weights="fp32")
    with pytest.raises(UserError, match="bit for bit those training started from"):
        go(tmp_path, images=16, name="next", init=str(start), lr=0.0)
