"""Weights that are cast together: a twin under autocast alone gives the same bits."""

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import randomize
from harness.run import checkpoints
from model import PRESETS, UNet, UNetConfig
from train import Config, Ranks, resolve
from training import sharding
from training.casts import cast_together

ALONE = Ranks(0, 1, torch.device("cpu"))
NETS = {
    "convolutions, attention, classes": replace(PRESETS["nano"], num_classes=3),
    "transformers, text": UNetConfig(
        in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), attention=(0, 1),
        num_head_channels=32, context_dim=24, vector_dim=16, use_scale_shift_norm=False,
    ),
}  # fmt: skip


def network(kind):
    """(net, the arguments of a forward pass)."""
    cfg = NETS[kind]
    net = randomize(UNet(cfg))
    given = {"x": torch.randn(2, cfg.in_channels, 8, 8), "t": torch.rand(2) * 1000}
    if cfg.num_classes:
        given["y"] = torch.tensor([2, -1])
    if cfg.context_dim:
        given |= {"y": torch.randn(2, cfg.vector_dim), "context": torch.randn(2, 7, 24)}
    return net, given


def backward(net, call, given):
    """The loss of a bf16 pass through call, which is or wraps net; every gradient."""
    net.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (call(**given).float() - 1).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters()}


class Casts(TorchDispatchMode):
    """Counts the ops that change a tensor's type or copy."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", NETS)
def test_loss_and_gradients_are_autocasts_own_to_the_bit(kind):
    net, given = network(kind)
    before = dict(net.named_parameters())
    loss, gradients = backward(net, net, given)
    ours, found = backward(net, cast_together(net), given)
    assert torch.equal(loss, ours) and loss > 0
    for name, gradient in gradients.items():
        assert torch.equal(gradient, found[name]), name
        assert found[name].dtype == torch.float32
        assert found[name].stride() == before[name].stride() == gradient.stride()
    assert all(p is before[name] for name, p in net.named_parameters())


@pytest.mark.parametrize("kind", NETS)
def test_no_weight_is_cast_alone(kind):
    """Of one forward and backward pass, the casts that are left are those of activations."""
    net, given = network(kind)
    seen = []
    for call in (net, cast_together(net)):
        with Casts() as counter:
            backward(net, call, given)
        seen.append(counter.seen)
    theirs, ours = seen
    layers = [m for m in net.modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d)]
    weights = sum(len(list(m.parameters())) for m in layers)
    assert ours["_foreach_copy_"] == 2 and not theirs["_foreach_copy_"]
    assert theirs["_to_copy"] - ours["_to_copy"] == 2 * weights > 40


def test_without_bf16_or_gradients_the_network_itself_runs():
    net, given = network("convolutions, attention, classes")
    call = cast_together(net)
    with Casts() as counter, torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        call(**given)
    assert not counter.seen["_foreach_copy_"]
    for enabled, dtype in ((False, torch.bfloat16), (True, torch.float16)):
        with Casts() as counter, torch.autocast("cpu", dtype=dtype, enabled=enabled):
            call(**given)
        assert not counter.seen["_foreach_copy_"]


def test_weights_are_back_after_an_error():
    net, given = network("convolutions, attention, classes")
    before = list(net.parameters())

    def fail(*_):
        raise ArithmeticError("in the middle")

    net.middle_block[0].register_forward_hook(fail)
    with pytest.raises(ArithmeticError), torch.autocast("cpu", dtype=torch.bfloat16):
        cast_together(net)(**given)
    assert all(p is q for p, q in zip(net.parameters(), before, strict=True))


def test_layers_that_share_a_weight_and_frozen_ones():
    """A shared weight is one copy, so that its gradients add in bf16 as under autocast; what is
    frozen stays so."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    net[2].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    twin = copy.deepcopy(net)
    assert twin[1].weight is twin[0].weight
    given = {"input": torch.randn(64, 8)}
    with Casts() as theirs:
        loss, gradients = backward(twin, twin, given)
    with Casts() as counter:
        ours, found = backward(net, cast_together(net), given)
    assert counter.seen["mm"] == theirs.seen["mm"] > 0
    assert torch.equal(loss, ours)
    for name in gradients:
        same = found[name] is gradients[name] is None or torch.equal(found[name], gradients[name])
        assert same, name
    assert found["2.weight"] is None and found["1.bias"] is None


def test_derivatives_of_gradients_and_along_tangents_are_autocasts():
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x, v = torch.randn(4, 8), torch.randn(4, 8)

    def twice(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(x).float().square().sum()
        first = torch.autograd.grad(y, net[0].weight, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), net[2].weight)[0]

    def along(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.func.jvp(call, (x,), (v,))[1]

    call = cast_together(net)
    assert torch.equal(twice(net), twice(call)) and twice(net).abs().sum() > 0
    assert torch.equal(along(net), along(call)) and along(net).abs().sum() > 0


def trained(out: Path, **fields) -> dict[str, torch.Tensor]:
    """A short run in bf16, or its rest: the tensors it ends with, and its losses."""
    small = dict(model="nano", data="toyfaces:24", resolution=32, batch=8, images=48, dtype="bf16")
    quiet = dict(preview_every=0, eval_every=24, save_every=24, log_every=8)
    cfg = resolve(Config(**{**small, **quiet, "out": str(out), **fields}))
    train.train(cfg, ALONE)
    run = out / cfg.name
    tensors = {}
    for file in checkpoints(run)[-1].glob("*.safetensors"):
        tensors |= {f"{file.stem}:{key}": x for key, x in load_file(file).items()}
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    tensors["losses"] = torch.tensor([r["loss"] for r in lines if "loss" in r])
    return tensors


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_a_run_and_its_resumption_end_as_under_autocast_alone(tmp_path, monkeypatch, optim):
    monkeypatch.setattr(train, "draw_samples", lambda *a, **k: torch.zeros(32, 3, 8, 8).byte())
    whole = trained(tmp_path / "whole", optim=optim, accum=2)
    last = checkpoints(next((tmp_path / "whole").iterdir()))[-1]
    # As if it had been killed before its end.
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    again = trained(tmp_path / "whole", optim=optim, accum=2)
    monkeypatch.setattr(sharding, "cast_together", lambda net: net)
    alone = trained(tmp_path / "alone", optim=optim, accum=2)
    assert whole.keys() == again.keys() == alone.keys() and len(whole) > 300
    for key, value in alone.items():
        assert torch.equal(value, whole[key]) and torch.equal(value, again[key]), key
