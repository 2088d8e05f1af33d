"""KERNELS=auto proves itself: wrong kernels and slow ones are not used, and decisions are kept."""

import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernel_cases import GPU

from triton.runtime.errors import OutOfResources

from kernels import dispatch, proof
from kernels.adamw8bit import AdamW8bit
from kernels.attention import attention
from kernels.groupnorm import GroupNormSilu, by_torch, group_norm_silu


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """auto, which takes interpreted kernels here; nothing decided, and an own cache."""
    monkeypatch.setenv("KERNELS", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "interpret_in_auto", not GPU)
    for table in (proof.choices, proof.known, proof.verdicts):
        table.clear()
    yield
    for table in (proof.choices, proof.known, proof.verdicts):
        table.clear()


def norm(batch=2, channels=32):
    x = torch.randn(batch, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels)
    return (
        x,
        group_norm_silu(x, weight, weight, 32),
        by_torch(x, weight, weight, how=(32, True, 1e-5)),
    )


def counted(monkeypatch, name):
    """Calls of a function of proof, as a list that grows."""
    calls, old = [], getattr(proof, name)

    def wrapper(*args, **options):
        calls.append(args)
        return old(*args, **options)

    monkeypatch.setattr(proof, name, wrapper)
    return calls


def test_a_right_kernel_is_taken_after_one_check_a_kind(monkeypatch):
    checks = counted(monkeypatch, "examine")
    monkeypatch.setattr(proof, "timed", lambda fn, *_: 0.0)
    norm(batch=3)
    norm(batch=4)  # counts as the same: the next power of two
    q = torch.randn(1, 2, 9, 32).bfloat16()
    attention(q, q, q)
    attention(q, q, q)
    assert len(checks) == 2 and set(proof.choices.values()) == {"triton"}
    norm(channels=64)
    assert len(checks) == 3


def test_a_kernel_is_examined_and_used_within_a_checkpointed_block(monkeypatch):
    """Its first call there decides; both ways give the gradients of a block that keeps all."""
    monkeypatch.setattr(proof, "timed", lambda fn, *_: 0.0)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 4, 4), torch.randn(32)
    q = torch.randn(1, 2, 9, 32).bfloat16()

    def block(x, weight, q):
        x = x * 2
        return group_norm_silu(x, weight, weight, 32).square().sum() + attention(q, q * 2, q).sum()

    found = []
    for again in (True, False):
        own = [part.clone().requires_grad_() for part in (x, weight, q)]
        loss = checkpoint(block, *own, use_reentrant=False) if again else block(*own)
        found.append(torch.autograd.grad(loss, own))
    assert set(proof.choices.values()) == {"triton"} and len(proof.choices) == 2
    for one, other in zip(*found):
        assert torch.equal(one, other)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_wrong_kernel_is_replaced_and_named(monkeypatch, capsys, part):
    """Its output, or one gradient of its five, is two percent off."""
    right = getattr(GroupNormSilu, part)

    def wrong(ctx, *args):
        out = right(ctx, *args)
        return out * 1.02 if part == "forward" else (out[0], out[1] * 1.02, *out[2:])

    monkeypatch.setattr(GroupNormSilu, part, staticmethod(wrong))
    _, ours, torchs = norm()
    assert torch.equal(ours, torchs)
    err = [line for line in capsys.readouterr().err.splitlines() if "wrong" in line]
    assert len(err) == 1 and "Please report" in err[0] and "group_norm_silu" in err[0]
    assert list(proof.choices.values()) == ["torch"]


@pytest.mark.parametrize("fault", ["nan", "does not fit"])
def test_a_kernel_that_gives_nothing_is_wrong(monkeypatch, fault):
    right = GroupNormSilu.forward

    def wrong(ctx, *args):
        if fault == "nan":
            return right(ctx, *args) * float("nan")
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(GroupNormSilu, "forward", staticmethod(wrong))
    _, ours, torchs = norm()
    assert torch.equal(ours, torchs)


@pytest.mark.parametrize("kernel, plain, path", [(2.0, 1.0, "torch"), (1.0, 2.0, "triton")])
def test_the_faster_path_is_taken(kernel, plain, path):
    verdict = proof.Verdict(1e-7, 1e-7, kernel, plain, 2e-6)
    assert verdict.path == path and verdict.right


def test_a_resumed_run_keeps_what_it_began_with(monkeypatch):
    """Bitwise: torch's path, although the kernel would be taken today."""
    norm()
    (kind,) = proof.choices
    assert proof.choices[kind] == "triton"
    assert proof.summary() == {"kernels": {"triton": 1, "torch": 0}}
    proof.pin({kind: "torch"})
    _, ours, torchs = norm()
    assert torch.equal(ours, torchs)
    proof.pin({kind: "triton"})
    _, ours, torchs = norm()
    assert not torch.equal(ours, torchs) and torch.allclose(ours, torchs, atol=1e-5)


def test_what_is_replayed_is_decided_apart():
    """What the host spends counts in one case, and not in the other."""
    norm()
    with proof.for_replay():
        norm()
    with proof.for_replay(False):
        norm()
    (by_clock, replayed) = proof.choices
    assert replayed == f"{by_clock} replayed" and not proof.replayed


def test_what_cannot_be_recorded_is_not_for_a_graph(monkeypatch):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(proof, "recorded", refuse)
    x = torch.ones(1)
    with proof.for_replay():
        assert proof.timed(torch.square, [x], x) == float("inf")


def test_decisions_are_remembered_for_these_conditions_only(monkeypatch):
    norm()
    checks = counted(monkeypatch, "examine")
    proof.choices.clear(), proof.known.clear()
    norm()
    assert not checks
    monkeypatch.setattr(proof, "here", lambda: "another GPU")
    proof.choices.clear(), proof.known.clear()
    norm()
    assert len(checks) == 1


@pytest.mark.parametrize("name", ["NVRM version: 580.1\nGCC\n", "", None])
def test_what_a_decision_depends_on_is_found_on_a_gpu(monkeypatch, tmp_path, name):
    """Its name, and its driver where Linux says one; of torch only what is public is asked."""
    path = tmp_path / "version"
    if name is not None:
        path.write_text(name)
    monkeypatch.setattr(proof, "DRIVERS", (path,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    driver = "NVRM version: 580.1" if name else ""
    assert proof.here.__wrapped__().startswith(f"a GPU | {driver} | {torch.__version__} | ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": 1}', "[" * 100_000, "HERE []", 'HERE {"x": "cuda"}']
)
def test_a_damaged_memory_is_not_used(monkeypatch, text):
    if text.startswith("HERE"):
        text = json.dumps({proof.here(): json.loads(text[5:])})
    proof.cache_file().parent.mkdir()
    proof.cache_file().write_text(text)
    checks = counted(monkeypatch, "examine")
    norm()
    assert len(checks) == 1
    assert list(json.loads(proof.cache_file().read_text())) == [proof.here()]


def test_the_check_touches_no_random_numbers_and_no_gradients():
    torch.manual_seed(0)
    wanted = torch.randn(3)
    x, weight = torch.randn(2, 32, 4, 4), torch.randn(32)
    torch.manual_seed(0)
    with torch.no_grad():
        group_norm_silu(x, weight, weight, 32)
    assert proof.verdicts and torch.equal(torch.randn(3), wanted)


def test_a_kernel_that_is_asked_for_is_not_checked(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")
    norm()
    assert not proof.verdicts


@pytest.mark.parametrize("wrong", [False, True])
def test_the_optimizer_is_checked_too(monkeypatch, wrong):
    """A learning rate that is a tenth too large, say."""
    right = AdamW8bit._scalars

    def scalars(self, plan):
        rows = right(self, plan)
        rows[:, 1] *= 1.1 if wrong and not dispatch.inside_reference else 1.0
        return rows

    monkeypatch.setattr(AdamW8bit, "_scalars", scalars)
    p = torch.nn.Parameter(torch.randn(64, 64))
    p.grad = torch.randn(64, 64)
    optimizer = AdamW8bit([p])
    optimizer.step(ema=[([p.detach().clone()], 0.9)])
    assert list(proof.choices.values()) == ["torch" if wrong else "triton"]
    assert "adamw8bit" in next(iter(proof.choices))


@pytest.mark.parametrize("wrong", [False, True])
def test_stochastic_rounding_is_checked_by_itself(monkeypatch, wrong):
    """An element that is rounded by its neighbour's noise, say."""
    right = AdamW8bit._keys

    def keys(self, plan):
        table = right(self, plan)
        if table is not None and wrong and not dispatch.inside_reference:
            table = table + 1
        return table

    monkeypatch.setattr(AdamW8bit, "_keys", keys)
    for rounding in (None, 7):
        p = torch.nn.Parameter(torch.randn(64, 64).bfloat16())
        p.grad = torch.randn(64, 64).bfloat16()
        AdamW8bit([p], rounding=rounding).step()
    kinds = list(proof.choices)
    assert len(kinds) == 2 and "rounded" in kinds[1] and "rounded" not in kinds[0]
    assert proof.choices[kinds[1]] == ("torch" if wrong else "triton")


def test_a_compiled_network_takes_what_was_decided(monkeypatch):
    """fullgraph: the question breaks no graph."""
    x, weight = torch.randn(1, 32, 2, 2), torch.randn(32)

    def norm(x):
        return group_norm_silu(x, weight, weight, 32)

    norm(x)
    (kind,) = proof.choices
    for path in ("torch", "triton"):
        proof.pin({kind: path})
        torch._dynamo.reset()
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), norm(x))
