"""Attention in Triton against fp64 (kernel_cases.py says how)."""

import pytest
import torch
import torch.nn.functional as F

from kernel_cases import DTYPES, GPU, check, error, far, randn

from kernels import attention as file
from kernels.attention import attention, attention_ref


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")


def attention_case(B, heads, N, M, D, dtype, make=None, seed=0):
    g = torch.Generator("cpu").manual_seed(seed)
    make = make or (lambda *shape: randn(*shape, generator=g).to(dtype))
    q, k, v = make(B, heads, N, D), make(B, heads, M, D), make(B, heads, M, D)
    do = randn(B, heads, N, D, generator=g).to(dtype)

    def run(fn, convert):
        leaves = [convert(t.detach()).requires_grad_() for t in (q, k, v)]
        o = fn(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, convert(do))]

    exact = run(attention_ref, torch.Tensor.double)
    ours = run(attention, lambda t: t)
    torchs = run(F.scaled_dot_product_attention, lambda t: t)
    for o, t, e, what in zip(ours, torchs, exact, ("o", "dq", "dk", "dv")):
        check(o, t, e, dtype, what)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "N, M, D",
    [
        pytest.param(1, 1, 64, id="one-token"),
        pytest.param(16, 16, 64, id="4x4-level"),
        pytest.param(17, 100, 32, id="unaligned"),
        pytest.param(64, 64, 64, id="8x8-level"),
        pytest.param(256, 256, 64, id="16x16-level"),
        pytest.param(100, 77, 64, id="text"),
        pytest.param(300, 77, 64, id="text-two-kernels"),
        pytest.param(70, 130, 128, id="d128"),
        pytest.param(200, 40, 128, id="d128-two-kernels"),
        pytest.param(260, 300, 32, id="d32-two-kernels"),
    ],
)
def test_attention_matches_fp64(N, M, D, dtype):
    if dtype == torch.float32 and N >= 200:
        # tiles of fp32 are smaller: a third of the tokens makes as many blocks
        N, M = N // 3, M // 3 if M >= 200 else M
    attention_case(1, 2, N, M, D, dtype)


def test_attention_matches_fp64_on_a_thousand_tokens():
    attention_case(1, 1, 1024, 1024, 64, torch.bfloat16)


def test_attention_takes_packed_qkv_by_strides_and_copies_nothing(monkeypatch):
    # (B, N, 3, heads, D): a 1×1 convolution's output
    qkv = torch.randn(2, 20, 3, 4, 32, dtype=torch.float32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    pointers, real = [], torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor,
        "contiguous",
        lambda t, *a, **kw: pointers.append(t.shape) or real(t, *a, **kw),
    )
    o = attention(q, k, v)
    assert pointers == []
    assert (o - attention_ref(q.double(), k.double(), v.double())).abs().max() < 1e-5
    assert o.transpose(1, 2).is_contiguous()  # the projection after it sees a view


def test_attention_takes_transposed_and_expanded_tensors_and_gradients():
    q = torch.randn(1, 2, 32, 20).transpose(2, 3).requires_grad_()
    k = torch.randn(1, 2, 1, 32).expand(1, 2, 9, 32)
    v = torch.randn(1, 2, 9, 32)
    o, exact = attention(q, k, v), attention_ref(q.double(), k.double(), v.double())
    assert (o - exact).abs().max() < 1e-5
    grad, want = torch.autograd.grad(o.sum(), q)[0], torch.autograd.grad(exact.sum(), q)[0]
    assert (grad - want).abs().max() < 1e-5


def test_attention_is_deterministic_stable_and_contains_a_nan():
    q, k, v = (torch.randn(1, 2, 40, 64) for _ in range(3))
    assert torch.equal(attention(q, k, v), attention(q, k, v))
    big = attention(q * 1e3, k * 1e3, v)
    assert torch.isfinite(big).all()
    assert (big - attention_ref(q.double() * 1e3, k.double() * 1e3, v.double())).abs().max() < 1e-3
    q[0, 1, 7] = float("nan")
    o = attention(q, k, v)
    assert o[0, 1, 7].isnan().all()
    assert torch.isfinite(o[0, 0]).all()
    assert torch.isfinite(o[0, 1, 8:]).all()


def test_attention_passes_opcheck():
    q, k, v = (torch.randn(1, 2, n, 32) for n in (20, 9, 9))
    torch.library.opcheck(torch.ops.twinpath.attention.default, (q, k, v, 0.2))


@pytest.mark.skipif(GPU, reason="tests/gpu has a whole tensor beyond 2^31 elements")
@pytest.mark.parametrize("N", [20, 140], ids=["one-program", "two-kernels"])
@pytest.mark.parametrize("spread", ["samples", "heads", "tokens"])
def test_attention_kernels_reach_beyond_31_bits(monkeypatch, N, spread):
    """q, k, v, do and every output are small tensors spread over more than 2^31 elements."""
    shape, g = (3, 3, N, 128), torch.Generator().manual_seed(0)
    strides = {
        "samples": (2**30 + 4096, 2**20, 128, 1),
        "heads": (2**20, 2**30 + 4096, 128, 1),
        "tokens": (384, 128, -(-(2**31) // (N - 1)) + 4096, 1),
    }[spread]
    monkeypatch.setattr(file, "like", lambda t: far(shape, strides))
    leaves = [
        far(shape, strides).copy_(torch.randn(shape, generator=g)).requires_grad_()
        for _ in range(3)
    ]
    do = far(shape, strides).copy_(torch.randn(shape, generator=g))
    o = attention(*leaves)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = attention_ref(*exact_leaves)
    pairs = zip(
        (o, *torch.autograd.grad(o, leaves, do)),
        (exact, *torch.autograd.grad(exact, exact_leaves, do.double())),
    )
    assert all(error(ours.detach(), truth.detach()) < 2e-3 for ours, truth in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_cpu_attends_to_few_keys_in_fp32_also_under_autocast(monkeypatch, dtype):
    """Then only the result is rounded; torch's own rounds the probabilities too."""
    if GPU:
        pytest.skip("about CPUs")
    monkeypatch.setenv("KERNELS", "torch")
    g = torch.Generator().manual_seed(0)
    q, do = (torch.randn(2, 2, 40, 64, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 2, 128, 64, generator=g).to(dtype) for _ in range(2))

    def run(fn, convert):
        leaves = [convert(t).requires_grad_() for t in (q, k, v)]
        o = fn(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, convert(do))]

    with torch.autocast("cpu", dtype=dtype):
        ours = run(attention, torch.Tensor.clone)
    for value, exact in zip(ours, run(attention_ref, torch.Tensor.double)):
        assert value.dtype == dtype
        assert (value == exact.to(dtype)).float().mean() > 0.99
