"""Which path an op takes, what it refuses, and the network that is made of these ops.

First of all: does Triton's interpreter compute what a GPU does (interpreter.py mends it)?
"""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import randomize
from kernel_cases import GPU

import triton
import triton.language as tl

from kernels import dispatch
from kernels.attention import attention, attention_ref
from kernels.groupnorm import group_norm_silu
from model import PRESETS, AttentionBlock, ResBlock, UNet


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")


# ---- the interpreter -----------------------------------------------------------------------------


@triton.jit
def probe_kernel(x, y, out, dotted, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, (a.to(tl.float32) * 1.00390625).to(tl.bfloat16))
    tl.store(dotted + i, tl.dot(a, b))


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_the_interpreter_rounds_and_multiplies_bf16_as_torch_does():
    x, y = (torch.randn(32, 32).bfloat16() for _ in range(2))
    x.view(-1)[:4] = torch.tensor([float("inf"), 1e-40, -0.0, 3e38])
    out, dotted = torch.empty_like(x), torch.empty(32, 32)
    probe_kernel[(1,)](x, y, out, dotted, 32)
    assert torch.equal(out, (x.float() * 1.00390625).bfloat16())
    assert torch.allclose(dotted[1:], (x.float() @ y.float())[1:], rtol=1e-5, atol=1e-5)


# ---- dispatch ------------------------------------------------------------------------------------


@pytest.mark.skipif(GPU, reason="about CPUs and the interpreter")
def test_paths_are_chosen_said_once_and_never_silently_changed(monkeypatch, capsys):
    q = torch.randn(1, 1, 4, 40)
    dispatch.say.cache_clear()
    # head dim 40: torch's by design
    assert torch.allclose(attention(q, q, q), attention_ref(q, q, q), atol=1e-5)
    attention(q, q, q)
    assert capsys.readouterr().err.splitlines() == [
        "kernels: attention runs on torch (head dim is 40, not one of (32, 64, 128))"
    ]
    message = "KERNELS=triton, but attention cannot run in Triton here: dtype is torch.float64"
    with pytest.raises(dispatch.Unsupported, match=message):
        attention(*[torch.randn(1, 1, 4, 32, dtype=torch.float64)] * 3)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(dispatch.Unsupported, match="tensors are on cpu; wanted CUDA tensors"):
        group_norm_silu(torch.randn(1, 32, 2, 2), torch.ones(32), torch.ones(32), 32)
    monkeypatch.setenv("KERNELS", "auto")
    group_norm_silu(torch.randn(1, 32, 2, 2), torch.ones(32), torch.ones(32), 32)
    assert "group_norm_silu runs on torch (tensors are on cpu)" in capsys.readouterr().err
    monkeypatch.setenv("KERNELS", "cuda")
    with pytest.raises(dispatch.Unsupported, match="not one of auto, triton, torch"):
        attention(q, q, q)


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


def norm(*shape, weight=ones(32), groups=32, film=(), dtype=torch.float32):
    return lambda: group_norm_silu(ones(*shape, dtype=dtype), weight, ones(shape[1]), groups, *film)


def attend(q, k, v):
    return lambda: attention(q, k, v)


@pytest.mark.parametrize(
    "call, message",
    [
        (norm(1, 30, 2, 2, weight=ones(30)), "30 channels do not split into 32 groups"),
        (norm(1, 32, 2, 2, film=[ones(1, 32)]), "together"),
        (norm(1, 32, 2, 2, weight=ones(16)), "weight and bias"),
        (norm(2, 32, 2, 2, film=[ones(1, 32)] * 2), "scale and shift"),
        (norm(1, 32, 2), "wanted floating point"),
        (norm(1, 32, 2, 2, dtype=torch.int32), "wanted floating point"),
        (norm(1, 32, 2, 2, weight=ones(32).double()), "dtype is torch.float64"),
        (attend(*[ones(1, 2, 4, 32, dtype=torch.int32)] * 3), "floating point"),
        (attend(ones(1, 2, 4, 32), *[ones(1, 2, 5, 32).half()] * 2), "one dtype"),
        (attend(ones(1, 2, 4, 32), ones(1, 2, 5, 32), ones(1, 2, 6, 32)), "wanted"),
        (attend(ones(1, 2, 4, 32), ones(1, 3, 5, 32), ones(1, 3, 5, 32)), "wanted"),
    ],
)
def test_impossible_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_unet_gives_the_same_with_either_path(monkeypatch):
    net = randomize(UNet(PRESETS["nano"])).requires_grad_(False)
    x, t = torch.randn(2, 32, 4, 4), torch.tensor([3.0, 700.0])
    ours = net(x, t)
    monkeypatch.setenv("KERNELS", "torch")
    assert torch.allclose(ours, net(x, t), atol=2e-4 * float(ours.abs().max()))


class Block(nn.Module):
    """Every kind of op that a network has, once: inductor takes minutes for a whole one."""

    def __init__(self) -> None:
        super().__init__()
        self.res = ResBlock(PRESETS["nano"], 32, 64)
        self.attention = AttentionBlock(PRESETS["nano"], 64)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.attention(self.res(x, emb))


@pytest.mark.parametrize(
    "path, backend, make, second",
    [
        # of one image: the interpreter takes its time for each sample and group
        pytest.param(
            "triton",
            "aot_eager",
            lambda: UNet(PRESETS["nano"]),
            torch.tensor([3.0]),
            id="triton-aot_eager-nano",
        ),
        pytest.param(
            "torch", "inductor", Block, torch.linspace(-1, 1, 256).view(2, 128), id="torch-inductor"
        ),
    ],
)
def test_the_network_compiles_whole_and_equals_eager(monkeypatch, path, backend, make, second):
    """fullgraph: no break in forward or backward, with the kernels as opaque ops and without."""
    monkeypatch.setenv("KERNELS", path)
    torch._dynamo.reset()
    net = randomize(make())
    x = torch.randn(len(second), 32, 4, 4)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    results = []
    for model in (net, compiled):
        net.zero_grad()
        y = model(x, second)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    # A gradient that is zero in exact arithmetic (of a bias that a norm takes away) is rounding.
    rounding = 1e-6 * max(eager.abs().max() for eager in results[0])
    for eager, fast in zip(*results):
        assert (eager - fast).abs().max() < 2e-4 * eager.abs().max() + rounding


def test_backward_makes_no_zeros_for_outputs_that_nobody_used():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called = []
    x = torch.randn(1, 32, 2, 2, requires_grad=True)
    q = torch.randn(1, 1, 4, 32, requires_grad=True)
    y = group_norm_silu(x, torch.ones(32, requires_grad=True), torch.ones(32), 32)
    o = attention(q, q, q)
    with Record():
        torch.autograd.grad(y, x, torch.ones_like(y))
        torch.autograd.grad(o, q, torch.ones_like(o))
    assert [name for name in called if "backward" in name]
    assert not [name for name in called if "zeros" in name]


# ---- derivatives of other kinds ------------------------------------------------------------------


def slope(f, x, v, h=1e-3):
    """The directional derivative of f at x by central differences."""
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize(
    "form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_tangents_go_through_the_network_on_either_path(monkeypatch, path, form):
    """Forward-mode AD, where the kernels have no rule: never a silent zero."""
    net = randomize(UNet(PRESETS["nano"])).to(memory_format=form).requires_grad_(False)
    x = torch.randn(2, 32, 4, 4).contiguous(memory_format=form)
    v, t = torch.randn_like(x), torch.tensor([3.0, 700.0])
    monkeypatch.setenv("KERNELS", "torch")
    exact = slope(lambda x: net.double()(x, t), x.double(), v.double())
    net.float()
    monkeypatch.setenv("KERNELS", path)
    _, tangent = torch.func.jvp(lambda x: net(x, t), (x,), (v,))
    assert (tangent - exact).norm() < 1e-3 * exact.norm()
    with forward_ad.dual_level():
        y = net(forward_ad.make_dual(x, v), t)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, tangent)


def calls() -> list:
    """Each op as a function of its first tensor alone."""
    ones = torch.ones(32)
    return [
        pytest.param(lambda x: group_norm_silu(x, ones, ones, 8), (1, 32, 2, 2), id="groupnorm"),
        pytest.param(lambda q: attention(q, q, q), (1, 1, 4, 32), id="attention"),
    ]


@pytest.mark.parametrize("call, shape", calls())
def test_what_the_kernels_cannot_differentiate_is_an_error(call, shape):
    x = torch.randn(shape, requires_grad=True)
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vjp(call, x.detach())
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(call)(x.detach()[None])
