"""GroupNorm + FiLM + SiLU in Triton against fp64 (kernel_cases.py says how)."""

import pytest
import torch
import torch.nn.functional as F

from kernel_cases import DTYPES, GPU, check, error, far, randn

import triton

from kernels import groupnorm as gn
from kernels.groupnorm import group_norm_silu, group_norm_silu_ref


DOUBLE = torch.Tensor.double


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")


def torch_gn(x, w, b, groups, scale, shift, silu):
    """Torch's own ops in x's dtype, fp32 statistics.

    Contiguous: its channels_last kernel is the weaker one.
    """
    n = F.group_norm(x.contiguous().float(), groups, w.float(), b.float())
    if scale is not None:
        n = n * (1 + scale.float()[..., None, None]) + shift.float()[..., None, None]
    return (F.silu(n) if silu else n).to(x.dtype)


def gn_case(
    shape, groups, dtype, film=True, silu=True, offset=0.0, form=torch.channels_last, seed=0
):
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
    for o, t, e, what in zip(
        ours, torchs, exact, ("y", "dx", "dweight", "dbias", "dscale", "dshift")
    ):
        check(o, t, e, dtype, what)
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous(memory_format=form)
    assert ours[1].is_contiguous(memory_format=form)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape, groups",
    [
        pytest.param((2, 32, 5, 7), 32, id="one-channel-a-group"),
        pytest.param((2, 96, 4, 4), 32, id="3-channels-a-group"),
        pytest.param((1, 192, 16, 16), 32, id="6-channels-a-group"),
        pytest.param((1, 320, 3, 3), 32, id="10-channels-a-group"),
        pytest.param((1, 1344, 1, 1), 32, id="42-channels-one-pixel"),
        pytest.param((2, 64, 7, 7), 1, id="one-group"),
        pytest.param((1, 64, 64, 33), 32, id="many-chunks"),
        pytest.param((1, 96, 23, 29), 16, id="unaligned-chunks"),
        pytest.param((1, 80, 16, 16), 1, id="slab-across-groups"),
    ],
)
def test_group_norm_matches_fp64(shape, groups, dtype):
    gn_case(shape, groups, dtype)


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    "form", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"]
)
def test_group_norm_matches_fp64_in_every_form(film, silu, form):
    gn_case((2, 96, 6, 6), 32, torch.float32, film, silu, form=form)
    gn_case((1, 64, 34, 34), 16, torch.float32, film, silu, form=form)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_group_norm_survives_a_mean_far_from_zero(offset):
    gn_case((2, 64, 16, 16), 32, torch.float32, offset=offset)
    gn_case((1, 64, 48, 48), 16, torch.float32, offset=offset)


def test_group_norm_takes_sliced_transposed_and_expanded_inputs():
    big = torch.randn(2, 64, 8, 8)
    w, b = torch.ones(64), torch.zeros(64)
    for x in (
        big[:, :, ::2],
        big.transpose(2, 3),
        big[:1].expand(2, -1, -1, -1),
        big[:, :, 1:, 1:],
        torch.randn(3, 64, 8, 8)[1:],
    ):
        leaf = x.detach().requires_grad_()
        y = group_norm_silu(leaf, w, b, 32)
        exact = group_norm_silu_ref(leaf.double(), w.double(), b.double(), 32)
        assert (y - exact).abs().max() < 1e-5
        # .sum() sends an expanded, stride-0 gradient
        (grad,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        (want,) = torch.autograd.grad(exact.sum(), leaf)
        assert (grad - want).abs().max() < 1e-5


def test_film_reads_the_halves_of_one_projection_without_copies(monkeypatch):
    x = torch.randn(3, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64)
    b = torch.randn(64)
    e = torch.randn(3, 128, requires_grad=True)
    exact = group_norm_silu_ref(x.double(), w.double(), b.double(), 32, *e.double().chunk(2, dim=1))
    copied, real = [], torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor,
        "contiguous",
        lambda t, *args, **kw: copied.append(t.shape) or real(t, *args, **kw),
    )
    y = group_norm_silu(x, w, b, 32, *e.chunk(2, dim=1))
    assert (3, 64) not in copied and (y - exact).abs().max() < 1e-5
    (want,) = torch.autograd.grad(exact.square().sum(), e)
    assert torch.allclose(torch.autograd.grad(y.square().sum(), e)[0], want, atol=1e-4)
    one = torch.randn(1, 64).expand(3, -1)  # a row for all samples: stride 0
    y = group_norm_silu(x, w, b, 32, one, one)
    exact = group_norm_silu_ref(x.double(), w.double(), b.double(), 32, one.double(), one.double())
    assert (y - exact).abs().max() < 1e-5


def test_group_norm_takes_strided_weights():
    x, w, b = torch.randn(1, 32, 3, 3), torch.randn(64)[::2], torch.randn(1).expand(32)
    exact = group_norm_silu_ref(x.double(), w.double(), b.double(), 32)
    assert (group_norm_silu(x, w, b, 32) - exact).abs().max() < 1e-5


def test_group_norm_is_deterministic_and_a_nan_stays_in_its_group():
    x = torch.randn(2, 64, 46, 46).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64)
    b = torch.randn(64)
    first, second = (group_norm_silu(x, w, b, 32) for _ in range(2))
    assert torch.equal(first, second)
    x[1, 5, 3, 3] = float("nan")  # group 2 of sample 1: channels 4 and 5
    y = group_norm_silu(x, w, b, 32)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[1, 4:6] = True
    assert y[bad].isnan().all() and torch.equal(y[~bad], first[~bad])


def test_a_group_of_one_value_is_zero_on_either_path(monkeypatch):
    x, w, b = torch.randn(1, 32, 1, 1), torch.ones(32), torch.full((32,), 0.5)
    for path in ("triton", "torch"):
        monkeypatch.setenv("KERNELS", path)
        assert torch.allclose(
            group_norm_silu(x, w, b, 32, silu=False), b.view(1, 32, 1, 1), atol=1e-4
        )


def test_group_norm_of_constant_groups_and_of_nothing():
    x, w, b = torch.full((1, 32, 4, 4), 3.0), torch.ones(32), torch.full((32,), 0.5)
    assert torch.allclose(group_norm_silu(x, w, b, 32, silu=False), torch.full_like(x, 0.5))
    empty = torch.randn(0, 32, 4, 4, requires_grad=True)
    leaf = w.clone().requires_grad_()
    group_norm_silu(empty, leaf, b, 32).sum().backward()
    assert empty.grad.shape == empty.shape and torch.equal(leaf.grad, torch.zeros(32))


@pytest.mark.skipif(GPU, reason="tests/gpu has a whole tensor beyond 2^31 elements")
@pytest.mark.parametrize(
    "HW, strides",
    [
        pytest.param(9, (2**30 + 4096, 32, 1), id="samples-one-launch"),
        pytest.param(4100, (2**30 + 4096, 32, 1), id="samples-three-launches"),
        pytest.param(4100, (0, 2**20, 1), id="pixels"),
        pytest.param(4100, (0, 1, 2**27), id="channels-nchw"),
    ],
)
def test_group_norm_kernels_reach_beyond_31_bits(HW, strides):
    """The kernels as the op launches them, but with a small map spread over 2^31 elements."""
    B, C, G = 3 if strides[0] else 1, 32, 4
    CG, new, nhwc = C // G, torch.zeros, strides[2] == 1
    g = torch.Generator().manual_seed(0)
    x, dy, y, dx = (far((B, HW, C), strides) for _ in range(4))
    x.copy_(torch.randn(x.shape, generator=g))
    dy.copy_(torch.randn(dy.shape, generator=g))
    w, b = (torch.randn(C, generator=g) for _ in range(2))
    a, d, P, Q = (new(B, C) for _ in range(4))
    mean, rstd = new(B, G), new(B, G)
    kept = (a, d, mean, rstd)
    if HW == 9:
        sizes = (HW, C, G, 1e-5, *strides, 1, 1, CG, False, True, 16, 8)
        gn.small_forward_kernel[B, G](x, w, b, w, b, y, *kept, *sizes)
        sizes = (HW, C, G, *strides, CG, True, 16, 8)
        gn.small_backward_kernel[B, G](x, dy, *kept, dx, P, Q, *sizes)
    else:
        K, size = triton.cdiv(HW, 2048), (2048, 64)  # few, fat programs
        chunk, m2, ps, qs = (new(B, K, C) for _ in range(4))
        c0, c1 = new(B, G), new(B, G)
        gn.moments_kernel[K * B,](x, chunk, m2, HW, C, K, *strides, nhwc, 2048, *size)
        gn.forward_coefficients_kernel[B, G](
            chunk, m2, w, b, w, b, a, d, mean, rstd, HW, C, G, K, 1e-5, 1, 1, False, 2048, CG, 8
        )
        gn.apply_kernel[K * B,](x, a, d, mean, y, HW, C, G, *strides, CG, nhwc, True, *size)
        gn.sums_kernel[K * B,](
            x, dy, a, d, mean, rstd, ps, qs, HW, C, G, K, *strides, CG, nhwc, True, 2048, *size
        )
        gn.backward_coefficients_kernel[B, G](ps, qs, a, P, Q, c0, c1, HW, C, G, K, CG, 8)
        gn.dx_kernel[K * B,](
            x, dy, a, d, mean, rstd, c0, c1, dx, HW, C, G, *strides, CG, nhwc, True, *size
        )
    leaf = x.double().transpose(1, 2)[..., None].requires_grad_()
    exact = group_norm_silu_ref(leaf, w.double(), b.double(), G)
    (grad,) = torch.autograd.grad(exact, leaf, dy.double().transpose(1, 2)[..., None])
    assert error(y, exact.detach()[..., 0].transpose(1, 2)) < 1e-3
    assert error(dx, grad[..., 0].transpose(1, 2)) < 1e-3


def test_group_norm_passes_opcheck():
    x, w, b = torch.randn(2, 32, 4, 4), torch.randn(32), torch.randn(32)
    s, t = torch.randn(2, 32), torch.randn(2, 32)
    op = torch.ops.twinpath.group_norm_silu.default
    torch.library.opcheck(op, (x, w, b, s, t, 4, True, 1e-5))
    x = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(op, (x, w, b, None, None, 4, False, 1e-5))


def test_the_torch_path_keeps_the_layout(monkeypatch):
    """CUDA's own group_norm answers in NCHW, whatever it is given: here a CPU's does so too."""
    monkeypatch.setenv("KERNELS", "torch")
    own = torch.group_norm
    monkeypatch.setattr(torch, "group_norm", lambda *args: own(*args).contiguous())
    for form in (torch.channels_last, torch.contiguous_format):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 64, 8, 8, dtype=dtype).contiguous(memory_format=form)
            y = group_norm_silu(x, torch.ones(64), torch.ones(64), 32)
            assert y.dtype == dtype and y.is_contiguous(memory_format=form)


@pytest.mark.skipif(GPU, reason="about CPUs")
@pytest.mark.parametrize("offset", [0, 10, 1000, 10_000])
def test_the_torch_path_keeps_its_digits_under_a_large_mean_in_nhwc(monkeypatch, offset):
    """torch's own kernel loses them all: 0.18 of the result at a mean of 1000 deviations."""
    monkeypatch.setenv("KERNELS", "torch")
    x = (torch.randn(2, 64, 8, 8) + offset).contiguous(memory_format=torch.channels_last)
    w, dy = torch.randn(64) + 1, torch.randn(2, 64, 8, 8)
    results = []
    for fn, convert in ((group_norm_silu, torch.Tensor.clone), (group_norm_silu_ref, DOUBLE)):
        leaves = [convert(x).requires_grad_(), convert(w).requires_grad_()]
        y = fn(*leaves, convert(w), 32)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, convert(dy))])
    for ours, exact in zip(*results):
        assert error(ours, exact) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_torch_path_keeps_the_digits_that_16_bits_have(monkeypatch, dtype):
    """At a mean of 100 deviations bf16 has half a deviation left, fp16 a sixteenth."""
    monkeypatch.setenv("KERNELS", "torch")
    x = (torch.randn(2, 64, 8, 8) + 100).contiguous(memory_format=torch.channels_last).to(dtype)
    w, b = torch.randn(2, 64).unbind()
    y = group_norm_silu(x, w, b, 32)
    exact = group_norm_silu_ref(x.double(), w.double(), b.double(), 32)
    assert error(y, exact) < 1.5 * error(exact.to(dtype), exact)
