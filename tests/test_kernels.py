"""Triton kernels against fp64: the error allowed is 1.5 times that of torch's own op in the same dtype.

On a CPU in Triton's interpreter. tests/gpu runs this same file with TWINPATH_GPU=1: the compiled kernels on the GPU.
"""

import os

import pytest
import torch
import torch.nn.functional as F

GPU = os.environ.get("TWINPATH_GPU") == "1"
if GPU:
    torch.set_default_device("cuda")
    torch.backends.cudnn.allow_tf32 = False
    pytest.importorskip("triton", reason="Triton is not installed")
else:
    pytest.importorskip("interpreter", reason="Triton is not installed")        # before triton: sets TRITON_INTERPRET
import triton
import triton.language as tl

from kernels import groupnorm as gn
from kernels.attention import attention, attention_ref
from kernels.groupnorm import group_norm_silu, group_norm_silu_ref

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}        # below this, both are rounding


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")


def error(value, exact):
    """Relative Frobenius error; root mean square where the truth is zero (the gradient of a softmax over one key)."""
    size = exact.numel() ** 0.5
    zero = exact.norm() < 1e-6 * size
    return float((value.double() - exact).norm() / (size if zero else exact.norm()))


def randn(*shape, generator):
    """The same numbers on any device."""
    return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device())


def check(ours, torchs, exact, dtype, what):
    allowed = max(1.5 * error(torchs, exact), FLOOR[dtype])
    assert error(ours, exact) <= allowed, f"{what}: {error(ours, exact):.2e} > {allowed:.2e}"


# ---- the interpreter itself -----------------------------------------------------------------------------------------

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


# ---- GroupNorm + FiLM + SiLU ----------------------------------------------------------------------------------------

def torch_gn(x, w, b, groups, scale, shift, silu):
    """Torch's own ops in x's dtype, fp32 statistics (contiguous: its channels_last kernel is the weaker one)."""
    n = F.group_norm(x.contiguous().float(), groups, w.float(), b.float())
    if scale is not None:
        n = n * (1 + scale.float()[..., None, None]) + shift.float()[..., None, None]
    return (F.silu(n) if silu else n).to(x.dtype)


def gn_case(shape, groups, dtype, film=True, silu=True, offset=0.0, form=torch.channels_last, seed=0):
    g = torch.Generator("cpu").manual_seed(seed)
    B, C = shape[:2]
    x = (randn(*shape, generator=g) + offset).to(dtype).contiguous(memory_format=form)
    w, b = randn(C, generator=g) + 1, randn(C, generator=g)
    extra = [randn(B, C, generator=g).to(dtype) for _ in range(2)] if film else []
    dy = randn(*shape, generator=g).to(dtype)

    def run(fn, convert):
        leaves = [convert(t.detach()).requires_grad_() for t in (x, w, b, *extra)]
        y = fn(*leaves[:3], groups, *(leaves[3:] if film else (None, None)), silu)
        return [y.detach(), *torch.autograd.grad(y, leaves, convert(dy))]

    exact = run(group_norm_silu_ref, torch.Tensor.double)
    ours = run(group_norm_silu, lambda t: t)
    torchs = run(torch_gn, lambda t: t)
    for o, t, e, what in zip(ours, torchs, exact, ("y", "dx", "dweight", "dbias", "dscale", "dshift")):
        check(o, t, e, dtype, what)
    assert ours[0].dtype == dtype and ours[0].is_contiguous(memory_format=form) and ours[1].is_contiguous(memory_format=form)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape, groups", [
    pytest.param((2, 32, 5, 7), 32, id="one-channel-a-group"), pytest.param((2, 96, 4, 4), 32, id="3-channels-a-group"),
    pytest.param((1, 192, 16, 16), 32, id="6-channels-a-group"), pytest.param((1, 320, 3, 3), 32, id="10-channels-a-group"),
    pytest.param((1, 1344, 1, 1), 32, id="42-channels-one-pixel"), pytest.param((2, 64, 7, 7), 1, id="one-group"),
    pytest.param((1, 64, 64, 48), 32, id="many-chunks"), pytest.param((1, 96, 23, 29), 16, id="unaligned-chunks"),
    pytest.param((1, 80, 16, 16), 1, id="slab-across-groups"),
])
def test_group_norm_matches_fp64(shape, groups, dtype):
    gn_case(shape, groups, dtype)


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_group_norm_matches_fp64_in_every_form(film, silu, form):
    gn_case((2, 96, 6, 6), 32, torch.float32, film, silu, form=form)
    gn_case((1, 64, 50, 50), 16, torch.float32, film, silu, form=form)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_group_norm_survives_a_mean_far_from_zero(offset):
    gn_case((2, 64, 16, 16), 32, torch.float32, offset=offset)
    gn_case((1, 64, 48, 48), 16, torch.float32, offset=offset)


def test_group_norm_takes_sliced_transposed_and_expanded_inputs():
    big = torch.randn(2, 64, 8, 8)
    w, b = torch.ones(64), torch.zeros(64)
    for x in (big[:, :, ::2], big.transpose(2, 3), big[:1].expand(2, -1, -1, -1), big[:, :, 1:, 1:], torch.randn(3, 64, 8, 8)[1:]):
        leaf = x.detach().requires_grad_()
        y = group_norm_silu(leaf, w, b, 32)
        exact = group_norm_silu_ref(leaf.double(), w.double(), b.double(), 32)
        assert (y - exact).abs().max() < 1e-5
        grad, = torch.autograd.grad(y.sum(), leaf, retain_graph=True)           # .sum() sends an expanded, stride-0 gradient
        want, = torch.autograd.grad(exact.sum(), leaf)
        assert (grad - want).abs().max() < 1e-5


def test_film_reads_the_halves_of_one_projection_without_copies(monkeypatch):
    x, w, b = torch.randn(3, 64, 4, 4).contiguous(memory_format=torch.channels_last), torch.randn(64), torch.randn(64)
    e = torch.randn(3, 128, requires_grad=True)
    exact = group_norm_silu_ref(x.double(), w.double(), b.double(), 32, *e.double().chunk(2, dim=1))
    copied, real = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, *args, **kw: copied.append(t.shape) or real(t, *args, **kw))
    y = group_norm_silu(x, w, b, 32, *e.chunk(2, dim=1))
    assert (3, 64) not in copied and (y - exact).abs().max() < 1e-5
    want, = torch.autograd.grad(exact.square().sum(), e)
    assert torch.allclose(torch.autograd.grad(y.square().sum(), e)[0], want, atol=1e-4)
    one = torch.randn(1, 64).expand(3, -1)                                      # a row for all samples: stride 0
    y, exact = group_norm_silu(x, w, b, 32, one, one), group_norm_silu_ref(x.double(), w.double(), b.double(), 32, one.double(), one.double())
    assert (y - exact).abs().max() < 1e-5


def test_group_norm_takes_strided_weights():
    x, w, b = torch.randn(1, 32, 3, 3), torch.randn(64)[::2], torch.randn(1).expand(32)
    exact = group_norm_silu_ref(x.double(), w.double(), b.double(), 32)
    assert (group_norm_silu(x, w, b, 32) - exact).abs().max() < 1e-5


def test_group_norm_is_deterministic_and_a_nan_stays_in_its_group():
    x, w, b = torch.randn(2, 64, 60, 60).contiguous(memory_format=torch.channels_last), torch.randn(64), torch.randn(64)
    first, second = (group_norm_silu(x, w, b, 32) for _ in range(2))
    assert torch.equal(first, second)
    x[1, 5, 3, 3] = float("nan")                                                # group 2 of sample 1: channels 4 and 5
    y = group_norm_silu(x, w, b, 32)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[1, 4:6] = True
    assert y[bad].isnan().all() and torch.equal(y[~bad], first[~bad])


def test_a_group_of_one_value_is_zero_on_either_path(monkeypatch):
    x, w, b = torch.randn(1, 32, 1, 1), torch.ones(32), torch.full((32,), 0.5)
    for path in ("triton", "torch"):
        monkeypatch.setenv("KERNELS", path)
        assert torch.allclose(group_norm_silu(x, w, b, 32, silu=False), b.view(1, 32, 1, 1), atol=1e-4)


def test_backward_makes_no_zeros_for_outputs_that_nobody_used():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))
    called, x, q = [], torch.randn(1, 32, 2, 2, requires_grad=True), torch.randn(1, 1, 4, 32, requires_grad=True)
    y, o = group_norm_silu(x, torch.ones(32, requires_grad=True), torch.ones(32), 32), attention(q, q, q)
    with Record():
        torch.autograd.grad(y, x, torch.ones_like(y)), torch.autograd.grad(o, q, torch.ones_like(o))
    assert [name for name in called if "backward" in name] and not [name for name in called if "zeros" in name]


def test_group_norm_of_constant_groups_and_of_nothing():
    x, w, b = torch.full((1, 32, 4, 4), 3.0), torch.ones(32), torch.full((32,), 0.5)
    assert torch.allclose(group_norm_silu(x, w, b, 32, silu=False), torch.full_like(x, 0.5))
    empty = torch.randn(0, 32, 4, 4, requires_grad=True)
    leaf = w.clone().requires_grad_()
    group_norm_silu(empty, leaf, b, 32).sum().backward()
    assert empty.grad.shape == empty.shape and torch.equal(leaf.grad, torch.zeros(32))


def far(shape, strides):
    """Zeros that span more than 2^31 elements, each stride still below it: untouched pages take no memory."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    assert span > 2 ** 31 > max(strides)
    try:
        return torch.empty(span, dtype=torch.float16).as_strided(shape, strides).zero_()
    except RuntimeError:
        pytest.skip(f"this machine does not reserve {2 * span / 1e9:.0f} GB of untouched memory")


@pytest.mark.skipif(GPU, reason="tests/gpu has a whole tensor beyond 2^31 elements")
@pytest.mark.parametrize("HW, strides", [
    pytest.param(9, (2 ** 30 + 4096, 32, 1), id="samples-one-launch"), pytest.param(4100, (2 ** 30 + 4096, 32, 1), id="samples-three-launches"),
    pytest.param(4100, (0, 2 ** 20, 1), id="pixels"), pytest.param(4100, (0, 1, 2 ** 27), id="channels-nchw")])
def test_group_norm_kernels_reach_beyond_31_bits(HW, strides):
    """The kernels as the op launches them, but for strides that spread a small map over more than 2^31 elements."""
    B, C, G = 3 if strides[0] else 1, 32, 4
    g, CG, new, nhwc = torch.Generator().manual_seed(0), C // G, torch.zeros, strides[2] == 1
    x, dy, y, dx = (far((B, HW, C), strides) for _ in range(4))
    x.copy_(torch.randn(x.shape, generator=g)), dy.copy_(torch.randn(dy.shape, generator=g))
    w, b, a, d, P, Q = torch.randn(C, generator=g), torch.randn(C, generator=g), new(B, C), new(B, C), new(B, C), new(B, C)
    mean, rstd = new(B, G), new(B, G)
    if HW == 9:
        gn.small_forward_kernel[B, G](x, w, b, w, b, y, a, d, mean, rstd, HW, C, G, 1e-5, *strides, 1, 1, CG, False, True, 16, 8)
        gn.small_backward_kernel[B, G](x, dy, a, d, mean, rstd, dx, P, Q, HW, C, G, *strides, CG, True, 16, 8)
    else:
        K, size = triton.cdiv(HW, 2048), (2048, 64)                                          # few, fat programs
        chunk, m2, ps, qs, c0, c1 = new(B, K, C), new(B, K, C), new(B, K, C), new(B, K, C), new(B, G), new(B, G)
        gn.moments_kernel[K * B,](x, chunk, m2, HW, C, K, *strides, nhwc, 2048, *size)
        gn.forward_coefficients_kernel[B, G](chunk, m2, w, b, w, b, a, d, mean, rstd, HW, C, G, K, 1e-5, 1, 1, False, 2048, CG, 8)
        gn.apply_kernel[K * B,](x, a, d, mean, y, HW, C, G, *strides, CG, nhwc, True, *size)
        gn.sums_kernel[K * B,](x, dy, a, d, mean, rstd, ps, qs, HW, C, G, K, *strides, CG, nhwc, True, 2048, *size)
        gn.backward_coefficients_kernel[B, G](ps, qs, a, P, Q, c0, c1, HW, C, G, K, CG, 8)
        gn.dx_kernel[K * B,](x, dy, a, d, mean, rstd, c0, c1, dx, HW, C, G, *strides, CG, nhwc, True, *size)
    leaf = x.double().transpose(1, 2)[..., None].requires_grad_()
    exact = group_norm_silu_ref(leaf, w.double(), b.double(), G)
    grad, = torch.autograd.grad(exact, leaf, dy.double().transpose(1, 2)[..., None])
    assert error(y, exact.detach()[..., 0].transpose(1, 2)) < 1e-3 and error(dx, grad[..., 0].transpose(1, 2)) < 1e-3


@pytest.mark.skipif(GPU, reason="tests/gpu has a whole tensor beyond 2^31 elements")
@pytest.mark.parametrize("N", [20, 140], ids=["one-program", "two-kernels"])
@pytest.mark.parametrize("spread", ["samples", "heads", "tokens"])
def test_attention_kernels_reach_beyond_31_bits(monkeypatch, N, spread):
    """q, k, v, do and every output are small tensors spread over more than 2^31 elements."""
    from kernels import attention as file                                       # the module, not the function of that name
    shape, g = (3, 3, N, 128), torch.Generator().manual_seed(0)
    strides = {"samples": (2 ** 30 + 4096, 2 ** 20, 128, 1), "heads": (2 ** 20, 2 ** 30 + 4096, 128, 1),
               "tokens": (384, 128, -(-2 ** 31 // (N - 1)) + 4096, 1)}[spread]
    monkeypatch.setattr(file, "like", lambda t: far(shape, strides))
    leaves = [far(shape, strides).copy_(torch.randn(shape, generator=g)).requires_grad_() for _ in range(3)]
    do = far(shape, strides).copy_(torch.randn(shape, generator=g))
    o = attention(*leaves)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = attention_ref(*exact_leaves)
    pairs = zip((o, *torch.autograd.grad(o, leaves, do)), (exact, *torch.autograd.grad(exact, exact_leaves, do.double())))
    assert all(error(ours.detach(), truth.detach()) < 2e-3 for ours, truth in pairs)


def test_group_norm_passes_opcheck():
    x, w, b = torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)
    s, t = torch.randn(2, 32, requires_grad=True), torch.randn(2, 32, requires_grad=True)
    torch.library.opcheck(torch.ops.twinpath.group_norm_silu.default, (x, w, b, s, t, 32, True, 1e-5))
    torch.library.opcheck(torch.ops.twinpath.group_norm_silu.default,
                          (x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), w, b, None, None, 32, False, 1e-5))


# ---- attention ------------------------------------------------------------------------------------------------------

def attention_case(B, heads, N, M, D, dtype, make=None, seed=0):
    g = torch.Generator("cpu").manual_seed(seed)
    make = make or (lambda *shape: randn(*shape, generator=g).to(dtype))
    q, k, v = make(B, heads, N, D), make(B, heads, M, D), make(B, heads, M, D)
    do = randn(B, heads, N, D, generator=g).to(dtype)

    def run(fn, convert):
        leaves = [convert(t.detach()).requires_grad_() for t in (q, k, v)]
        o = fn(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, convert(do))]

    exact, ours, torchs = run(attention_ref, torch.Tensor.double), run(attention, lambda t: t), run(F.scaled_dot_product_attention, lambda t: t)
    for o, t, e, what in zip(ours, torchs, exact, ("o", "dq", "dk", "dv")):
        check(o, t, e, dtype, what)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("N, M, D", [
    pytest.param(1, 1, 64, id="one-token"), pytest.param(16, 16, 64, id="4x4-level"), pytest.param(17, 100, 32, id="unaligned"),
    pytest.param(64, 64, 64, id="8x8-level"), pytest.param(256, 256, 64, id="16x16-level"), pytest.param(100, 77, 64, id="text"),
    pytest.param(300, 77, 64, id="text-two-kernels"), pytest.param(70, 130, 128, id="d128"), pytest.param(200, 40, 128, id="d128-two-kernels"),
    pytest.param(260, 300, 32, id="d32-two-kernels"),
])
def test_attention_matches_fp64(N, M, D, dtype):
    attention_case(1, 2, N, M, D, dtype)


def test_attention_matches_fp64_on_a_thousand_tokens():
    attention_case(1, 1, 1024, 1024, 64, torch.bfloat16)


def test_attention_takes_packed_qkv_by_strides_and_copies_nothing(monkeypatch):
    qkv = torch.randn(2, 20, 3, 4, 32, dtype=torch.float32)                     # (B, N, 3, heads, D): a 1×1 convolution's output
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    pointers, real = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, *a, **kw: pointers.append(t.shape) or real(t, *a, **kw))
    o = attention(q, k, v)
    assert pointers == [] and (o - attention_ref(q.double(), k.double(), v.double())).abs().max() < 1e-5
    assert o.transpose(1, 2).is_contiguous()                                    # the projection after it sees a view


def test_attention_takes_transposed_and_expanded_tensors_and_gradients():
    q, k = torch.randn(1, 2, 32, 20).transpose(2, 3).requires_grad_(), torch.randn(1, 2, 1, 32).expand(1, 2, 9, 32)
    v = torch.randn(1, 2, 9, 32)
    o, exact = attention(q, k, v), attention_ref(q.double(), k.double(), v.double())
    assert (o - exact).abs().max() < 1e-5
    grad, want = torch.autograd.grad(o.sum(), q)[0], torch.autograd.grad(exact.sum(), q)[0]
    assert (grad - want).abs().max() < 1e-5


def test_attention_is_deterministic_stable_and_contains_a_nan():
    q, k, v = (torch.randn(1, 2, 40, 64) for _ in range(3))
    assert torch.equal(attention(q, k, v), attention(q, k, v))
    big = attention(q * 1e3, k * 1e3, v)
    assert torch.isfinite(big).all() and (big - attention_ref(q.double() * 1e3, k.double() * 1e3, v.double())).abs().max() < 1e-3
    q[0, 1, 7] = float("nan")
    o = attention(q, k, v)
    assert o[0, 1, 7].isnan().all() and torch.isfinite(o[0, 0]).all() and torch.isfinite(o[0, 1, 8:]).all()


def test_attention_passes_opcheck():
    q, k, v = (torch.randn(1, 2, n, 32, requires_grad=True) for n in (20, 9, 9))
    torch.library.opcheck(torch.ops.twinpath.attention.default, (q, k, v, 0.2))


# ---- dispatch -------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(GPU, reason="about CPUs and the interpreter")
def test_paths_are_chosen_said_once_and_never_silently_changed(monkeypatch, capsys):
    from kernels import dispatch
    q = torch.randn(1, 1, 4, 40)
    dispatch.say.cache_clear()
    assert torch.allclose(attention(q, q, q), attention_ref(q, q, q), atol=1e-5)       # head dim 40: torch's by design
    attention(q, q, q)
    assert capsys.readouterr().err.splitlines() == ["kernels: attention runs on torch (head dim is 40, not one of (32, 64, 128))"]
    with pytest.raises(ValueError, match="KERNELS=triton, but attention cannot run in Triton here: dtype is torch.float64"):
        attention(*[torch.randn(1, 1, 4, 32, dtype=torch.float64)] * 3)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="tensors are on cpu; wanted CUDA tensors"):
        group_norm_silu(torch.randn(1, 32, 2, 2), torch.ones(32), torch.ones(32), 32)
    monkeypatch.setenv("KERNELS", "auto")
    group_norm_silu(torch.randn(1, 32, 2, 2), torch.ones(32), torch.ones(32), 32)
    assert "group_norm_silu runs on torch (tensors are on cpu)" in capsys.readouterr().err
    monkeypatch.setenv("KERNELS", "cuda")
    with pytest.raises(ValueError, match="not one of auto, triton, torch"):
        attention(q, q, q)


@pytest.mark.parametrize("call, message", [
    (lambda: group_norm_silu(torch.randn(1, 30, 2, 2), torch.ones(30), torch.ones(30), 32), "30 channels do not split into 32 groups"),
    (lambda: group_norm_silu(torch.randn(1, 32, 2, 2), torch.ones(32), torch.ones(32), 32, torch.ones(1, 32)), "together"),
    (lambda: group_norm_silu(torch.randn(1, 32, 2, 2), torch.ones(16), torch.ones(32), 32), "weight and bias"),
    (lambda: group_norm_silu(torch.randn(2, 32, 2, 2), torch.ones(32), torch.ones(32), 32, torch.ones(1, 32), torch.ones(1, 32)), "scale and shift"),
    (lambda: group_norm_silu(torch.randn(1, 32, 2), torch.ones(32), torch.ones(32), 32), "wanted floating point"),
    (lambda: group_norm_silu(torch.ones(1, 32, 2, 2, dtype=torch.int32), torch.ones(32), torch.ones(32), 32), "wanted floating point"),
    (lambda: group_norm_silu(torch.randn(1, 32, 2, 2), torch.ones(32).double(), torch.ones(32), 32), "dtype is torch.float64"),
    (lambda: attention(*[torch.ones(1, 2, 4, 32, dtype=torch.int32)] * 3), "floating point"),
    (lambda: attention(torch.randn(1, 2, 4, 32), torch.randn(1, 2, 5, 32).half(), torch.randn(1, 2, 5, 32).half()), "one dtype"),
    (lambda: attention(torch.randn(1, 2, 4, 32), torch.randn(1, 2, 5, 32), torch.randn(1, 2, 6, 32)), "wanted"),
    (lambda: attention(torch.randn(1, 2, 4, 32), torch.randn(1, 3, 5, 32), torch.randn(1, 3, 5, 32)), "wanted"),
])
def test_impossible_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_unet_gives_the_same_with_either_path(monkeypatch):
    from conftest import randomize
    from model import PRESETS, UNet
    net = randomize(UNet(PRESETS["nano"]))
    x, t = torch.randn(2, 32, 4, 4), torch.tensor([3.0, 700.0])
    ours = net(x, t)
    monkeypatch.setenv("KERNELS", "torch")
    assert torch.allclose(ours, net(x, t), atol=2e-4 * float(ours.detach().abs().max()))


@pytest.mark.parametrize("path, backend, preset", [("triton", "aot_eager", "nano"), ("torch", "inductor", "tiny")])
def test_the_unet_compiles_whole_and_equals_eager(monkeypatch, path, backend, preset):
    """fullgraph: no break in forward or backward, with the kernels as opaque ops and without them."""
    from conftest import randomize
    from model import PRESETS, UNet
    monkeypatch.setenv("KERNELS", path)
    torch._dynamo.reset()
    net = randomize(UNet(PRESETS[preset]))
    x, t = torch.randn(2, 32, 4, 4), torch.tensor([3.0, 700.0])
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    results = []
    for model in (net, compiled):
        net.zero_grad()
        y = model(x, t)
        y.square().mean().backward()
        results.append((y.detach(), net.input_blocks[1][0].in_layers[0].weight.grad.clone(), net.out[2].weight.grad.clone()))
    for eager, fast in zip(*results):
        assert (eager - fast).abs().max() < 2e-4 * eager.abs().max()
