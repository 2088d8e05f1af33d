"""GroupNorm, then FiLM, then SiLU: the sandwich around every convolution of an ADM U-Net.

    n = (x - mean_g) rstd_g · w + b            statistics per sample and group of C/G channels
    z = (1 + scale) n + shift,  y = z σ(z)     scale, shift (B, C) from the time embedding
Backward, with dz = dy σ(z)(1 + z(1 - σ(z))), x̂ = (x - mean) rstd, γ = w (1 + scale),
m = HW·C/G, P = Σ_hw dz and Q = Σ_hw dz x̂ per (sample, channel), S1 = Σ_group γP and
S2 = Σ_group γQ:
    dshift = P    dscale = w Q + b P    dw = Σ_n (1 + scale) Q    db = Σ_n (1 + scale) P
    dx = rstd (γ dz - (S1 + x̂ S2) / m)
Only x, mean and rstd are kept; z is computed again. Every sum has one fixed order: no atomics,
bitwise deterministic.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.dispatch import cdiv, power_of_2, use_triton
from kernels.groupnorm_kernels import (
    apply_kernel,
    backward_coefficients_kernel,
    dx_kernel,
    finish_kernel,
    forward_coefficients_kernel,
    moments_kernel,
    small_backward_kernel,
    small_forward_kernel,
    sums_kernel,
)
from kernels.proof import trusted


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """The formula, written out in the dtype it is given (fp64 in the tests). x (B, C, H, W)."""
    B, C = x.shape[:2]
    g = x.reshape(B, groups, -1)
    mean = g.mean(-1, keepdim=True)
    var = (g - mean).square().mean(-1, keepdim=True)  # two passes: no E[x²]-E[x]² cancellation
    n = ((g - mean) / (var + eps).sqrt()).reshape(x.shape)
    per_channel = (1, C) + (1,) * (x.ndim - 2)
    n = n * weight.view(per_channel) + bias.view(per_channel)
    if scale is not None:
        n = n * (1 + scale[..., None, None])
    if shift is not None:
        n = n + shift[..., None, None]
    return n * torch.sigmoid(n) if silu else n


# ---- the op --------------------------------------------------------------------------------------

# Chosen on an H100, among tiles that ahead-of-time compilation had found to be lean.
CHUNK, ROWS, COLS, WARPS = 128, 32, 64, 4
# Rows and channels of a tile of the kernels that sum, by NHWC or not. They keep one sum a lane
# until their loop ends: with 32 rows a quarter of sm_90's warps would have registers for that; with
# 16 it is 0.44 (sums) and 0.62 (moments) of them, at the same instructions an element and fewer
# than with lanes added up in the loop. apply and dx have no loop: 16 rows would cost them a third
# more.
SUM_TILE = {True: (16, 64), False: (64, 16)}
FINISH_ROWS, FINISH_COLS = 16, 64
SMALL = 4096  # elements of a padded (sample, group) tile up to which one program does it whole
FEW = 1024  # elements of such a tile up to which two warps are faster than four


def dense(x: Tensor, nhwc: bool | None = None) -> tuple[Tensor, bool]:
    """x as dense memory, and whether that is NHWC: x itself if it is as asked, else a copy.

    nhwc=None asks for either; a copy is NHWC then.
    """
    for layout, form in ((True, torch.channels_last), (False, torch.contiguous_format)):
        if nhwc in (None, layout) and x.is_contiguous(memory_format=form):
            return x, layout
    if nhwc is False:
        return x.contiguous(), False
    return x.contiguous(memory_format=torch.channels_last), True


def rows(t: Tensor) -> Tensor:
    """t (B, C) with neighbouring channels next to each other.

    The halves of a chunked (B, 2C) are so, and stay uncopied.
    """
    return t if t.stride(1) == 1 else t.contiguous()


def geometry(x: Tensor, nhwc: bool) -> tuple[int, ...]:
    """B, HW, C and the strides (sb, sp, sc) of x seen as (B, HW, C)."""
    B, C, H, W = x.shape
    inner = (C, 1) if nhwc else (1, H * W)
    return B, H * W, C, H * W * C, *inner


def is_small(HW: int, CG: int) -> bool:
    return power_of_2(HW) * power_of_2(CG) <= SMALL


def small_warps(elements: int) -> int:
    """Warps for a (sample, group) of so many padded elements: more only wait for each other."""
    return 2 if elements <= FEW else WARPS


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, a, d, mean, rstd): y like x; a, d (B, C) and mean, rstd (B, G) in fp32.

    All but y are kept for the backward pass.
    """
    x, nhwc = dense(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    B, HW, C, sb, sp, sc = geometry(x, nhwc)
    K, CG = cdiv(HW, CHUNK), C // groups
    HWP, CGP = power_of_2(HW), power_of_2(CG)
    film = scale is not None
    scale, shift = (rows(scale), rows(shift)) if film else (weight, bias)  # not read without FiLM
    out = new_outputs(x, groups)
    y, a, d, mean, rstd = out
    affine_of = (weight, bias, scale, shift)
    rows_of = (scale.stride(0), shift.stride(0))
    if not x.numel():
        return out
    if is_small(HW, CG):
        small_forward_kernel[B, groups](
            x, *affine_of, *out, HW, C, groups, eps, sb, sp, sc, *rows_of,
            CG, film, silu, HWP, CGP, num_warps=small_warps(HWP * CGP),
        )  # fmt: skip
        return out
    means, m2 = a.new_empty(B, K, C), a.new_empty(B, K, C)
    summed = SUM_TILE[nhwc]
    moments_kernel[cdiv(C, summed[1]) * K * B,](
        x, means, m2, HW, C, K, sb, sp, sc, nhwc, CHUNK, *summed, num_warps=WARPS
    )
    forward_coefficients_kernel[B, groups](
        means, m2, *affine_of, a, d, mean, rstd, HW, C, groups, K, eps, *rows_of,
        film, CHUNK, CG, CGP, num_warps=1,
    )  # fmt: skip
    apply_kernel[cdiv(C, COLS) * cdiv(HW, ROWS) * B,](
        x, a, d, mean, y, HW, C, groups, sb, sp, sc, CG, nhwc, silu, ROWS, COLS, num_warps=WARPS
    )
    return out


def new_outputs(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised (y, a, d, mean, rstd) of dense x."""
    B, C = x.shape[:2]
    new = partial(torch.empty, dtype=torch.float32, device=x.device)
    return torch.empty_like(x), new(B, C), new(B, C), new(B, groups), new(B, groups)


def forward_fake(x, weight, bias, scale, shift, groups, silu, eps):
    return new_outputs(dense(x)[0], groups)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    a: Tensor,
    d: Tensor,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dscale, dshift), each in the dtype of its input; dx in x's layout.

    Without FiLM the last two are empty.
    """
    x, nhwc = dense(x)
    dy, _ = dense(dy, nhwc)  # an expanded gradient has stride 0: never trust strides
    out = backward_fake(dy, x, weight, bias, scale, a, d, mean, rstd, silu)
    if not x.numel():
        return tuple(t.zero_() for t in out)
    P, Q = torch.empty_like(a), torch.empty_like(a)
    launch_backward(dy, x, a, d, mean, rstd, out[0], P, Q, nhwc, silu)
    film = scale is not None
    weight, bias = weight.contiguous(), bias.contiguous()
    scale = rows(scale) if film else weight  # not read without FiLM
    B, C = a.shape
    finish_kernel[cdiv(C, FINISH_COLS),](
        P, Q, weight, bias, scale, *out[1:], B, C, scale.stride(0),
        film, FINISH_ROWS, FINISH_COLS, num_warps=WARPS,
    )  # fmt: skip
    return out


def backward_fake(dy, x, weight, bias, scale, a, d, mean, rstd, silu):
    film = a.new_empty(0) if scale is None else torch.empty_like(a, dtype=scale.dtype)
    dw, db = torch.empty_like(weight), torch.empty_like(bias)
    return torch.empty_like(dense(x)[0]), dw, db, film, torch.empty_like(film)


def launch_backward(dy, x, a, d, mean, rstd, dx, P, Q, nhwc: bool, silu: bool) -> None:
    """Fill dx like x, and P = Σ dz and Q = Σ dz x̂ per (sample, channel), (B, C) fp32."""
    B, HW, C, sb, sp, sc = geometry(x, nhwc)
    G = mean.shape[1]
    K, CG = cdiv(HW, CHUNK), C // G
    if is_small(HW, CG):
        HWP, CGP = power_of_2(HW), power_of_2(CG)
        small_backward_kernel[B, G](
            x, dy, a, d, mean, rstd, dx, P, Q, HW, C, G, sb, sp, sc,
            CG, silu, HWP, CGP, num_warps=small_warps(HWP * CGP),
        )  # fmt: skip
        return
    CGP, summed = power_of_2(CG), SUM_TILE[nhwc]
    ps, qs = a.new_empty(B, K, C), a.new_empty(B, K, C)
    c0, c1 = torch.empty_like(mean), torch.empty_like(mean)
    sums_kernel[cdiv(C, summed[1]) * K * B,](
        x, dy, a, d, mean, rstd, ps, qs, HW, C, G, K, sb, sp, sc,
        CG, nhwc, silu, CHUNK, *summed, num_warps=WARPS,
    )  # fmt: skip
    backward_coefficients_kernel[B, G](
        ps, qs, a, P, Q, c0, c1, HW, C, G, K, CG, CGP, num_warps=1
    )  # fmt: skip
    dx_kernel[cdiv(C, COLS) * cdiv(HW, ROWS) * B,](
        x, dy, a, d, mean, rstd, c0, c1, dx, HW, C, G, sb, sp, sc,
        CG, nhwc, silu, ROWS, COLS, num_warps=WARPS,
    )  # fmt: skip


FORWARD = dispatch.op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "int groups, bool silu, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward,
    forward_fake,
)
BACKWARD = dispatch.op(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? scale, "
    "Tensor a, Tensor d, Tensor mean, Tensor rstd, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    backward_fake,
)


class GroupNormSilu(torch.autograd.Function):
    """The two ops as one differentiable function, once."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, groups, silu, eps):
        y, *kept = FORWARD(x, weight, bias, scale, shift, groups, silu, eps)
        ctx.save_for_backward(x, weight, bias, scale, *kept)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 8
        saved = ctx.saved_tensors  # once: under checkpointing each may be unpacked only once
        dx, dw, db, *film = BACKWARD(dy, *saved, ctx.silu)
        if saved[3] is None:
            film = (None, None)
        return dx, dw, db, *film, None, None, None


# ---- dispatch ------------------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """GroupNorm + optional FiLM + optional SiLU for x (B, C, H, W); scale, shift (B, C).

    Keeps x's layout. Statistics are at least fp32 whatever x is; the result has x's dtype (Ho et
    al.'s GroupNorm32). With KERNELS=triton, or auto on a GPU, the kernels above run; else torch's
    own group_norm.
    """
    check(x, weight, bias, groups, scale, shift)
    film = () if scale is None else (scale, shift)
    tensors, how = (x, weight, bias, *film), (groups, silu, eps)
    if dispatch.forward_mode():
        return formula(*tensors, how=how)
    if use_triton("group_norm_silu", *tensors):
        kernel, plain = partial(fused, how=how), partial(by_torch, how=how)
        if trusted("group_norm_silu", how, kernel, plain, tensors):
            return kernel(*tensors)
    return by_torch(*tensors, how=how)


def fused(x: Tensor, weight: Tensor, bias: Tensor, *film: Tensor, how: tuple) -> Tensor:
    """By the kernels. how: groups, silu, eps."""
    return GroupNormSilu.apply(x, weight, bias, *(film or (None, None)), *how)


def formula(x: Tensor, *rest: Tensor, how: tuple) -> Tensor:
    """By group_norm_silu_ref, in fp32 or wider."""
    groups, silu, eps = how
    wide = torch.promote_types(x.dtype, torch.float32)
    x32, weight, bias, *film = [t.to(wide) for t in (x, *rest)]
    return group_norm_silu_ref(x32, weight, bias, groups, *film, silu=silu, eps=eps).to(x.dtype)


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, *film: Tensor, how: tuple) -> Tensor:
    """By torch's own group_norm, in fp32 or wider."""
    groups, silu, eps = how
    wide = torch.promote_types(x.dtype, torch.float32)
    x32 = x.to(wide)
    # A mean of 256 deviations leaves none of them in bf16's 8 bits, and fp32 has 24.
    if x.dtype != torch.bfloat16:
        x32 = near_zero(x32, groups)
    # not F.group_norm, which refuses a group of one value
    n = torch.group_norm(x32, groups, weight.to(wide), bias.to(wide), eps)
    if film:
        scale, shift = (t.to(wide)[..., None, None] for t in film)
        n = n * (1 + scale) + shift
    # CUDA's group_norm answers in NCHW.
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if nhwc else torch.preserve_format
    return (F.silu(n) if silu else n).to(x.dtype, memory_format=form)


def near_zero(x: Tensor, groups: int) -> Tensor:
    """x less the first value of each (sample, group), where torch needs that: on CPUs in NHWC.

    There torch sums x² and x, and loses all digits that the mean has in common with x. What is
    subtracted changes neither the result nor, as a constant, its gradient.
    """
    in_nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if x.device.type != "cpu" or not in_nhwc:
        return x
    size = x.shape[1] // groups
    first = x.detach()[:, ::size, :1, :1].repeat_interleave(size, 1)
    return x - first


def check(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None
) -> None:
    """Refuse shapes and dtypes that do not fit together."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: wanted floating point (B, C, H, W).")
    B, C = x.shape[:2]
    if groups < 1 or C % groups:
        raise ValueError(f"{C} channels do not split into {groups} groups.")
    if weight.shape != (C,) or bias.shape != (C,):
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"weight and bias are {shapes}: wanted ({C},).")
    if (scale is None) != (shift is None):
        raise ValueError("FiLM takes scale and shift together, got one of them.")
    if scale is not None and not scale.shape == shift.shape == (B, C):
        shapes = f"{tuple(scale.shape)} and {tuple(shift.shape)}"
        raise ValueError(f"scale and shift are {shapes}: wanted ({B}, {C}).")
