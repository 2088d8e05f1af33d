"""--checkpointing: blocks are computed again in the backward pass; no bit changes, and the plan
knows what is kept."""

from types import SimpleNamespace

import pytest
import torch

import mmdit
import model
from model import PRESETS, Block, build
from sharded import FULL, ONE, ranks, stepped
from training.plan import activations
from training.precision import inputs_of

ON = {"checkpointing": True}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_changes_no_bit_of_a_run(tmp_path, monkeypatch, dtype):
    """In bf16 weights are cast together in the forward pass, and one by one when a block comes
    again."""
    calls, forward = [], Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, *args: calls.append(self) or forward(self, *args)
    )
    plain = stepped(ONE, tmp_path / "plain", {"dtype": dtype}, 2)
    once = len(calls)
    again = stepped(ONE, tmp_path / "again", {"dtype": dtype} | ON, 2)
    assert plain == again and len(plain[0]) > 400
    # It did compute them again, in both steps; what a save asks needs no backward pass.
    assert len(calls) - once == once + 2 * len(build(PRESETS["nano"]).block_names)


def test_it_changes_no_bit_of_shards(tmp_path):
    plain = ranks(2, stepped, tmp_path / "plain", FULL, 2)
    assert plain == ranks(2, stepped, tmp_path / "again", FULL | ON, 2)


@pytest.mark.parametrize("name", ["nano", "sit-nano"])
def test_what_goes_into_blocks_and_the_largest_block_are_counted(monkeypatch, name):
    monkeypatch.setenv("KERNELS", "torch")
    module, net = (mmdit if "sit" in name else model), build(PRESETS[name])
    net.checkpointing = True
    own = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *net.buffers()]}
    always, jobs, real = {}, [], module.checkpoint

    def count(found):
        def keep(x):
            memory = x.untyped_storage()
            if memory.data_ptr() not in own:
                found[memory.data_ptr()] = memory
            return x

        return keep

    def watched(block, *inputs, use_reentrant):
        jobs.append((block, inputs))
        for x in inputs:
            if isinstance(x, torch.Tensor):
                count(always)(x)
        return real(block, *inputs, use_reentrant=use_reentrant)

    monkeypatch.setattr(module, "checkpoint", watched)
    shape = (PRESETS[name].in_channels, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(count(always), lambda x: x):
        out = net(**inputs_of(PRESETS[name], 4, shape))
    largest = 0
    for block, inputs in jobs:
        within = {}
        with torch.autograd.graph.saved_tensors_hooks(count(within), lambda x: x):
            kept = block(*inputs)
        largest = max(largest, sum(m.nbytes() for k, m in within.items() if k not in always))
        del kept
    cfg = SimpleNamespace(batch=8, accum=2, dtype="fp32", weights="fp32", **ON)
    planned = activations(PRESETS[name], shape, cfg, ONE)
    assert out.requires_grad and planned == sum(m.nbytes() for m in always.values()) + largest
    cfg.checkpointing = False
    assert planned < 0.6 * activations(PRESETS[name], shape, cfg, ONE)
