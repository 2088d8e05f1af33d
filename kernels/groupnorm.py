"""GroupNorm, then FiLM, then SiLU: the sandwich around every convolution of an ADM U-Net.

    n = (x - mean_g) rstd_g · w + b            statistics per sample and group of C/G channels
    z = (1 + scale) n + shift,  y = z σ(z)     scale, shift (B, C) from the time embedding
Backward, with dz = dy σ(z)(1 + z(1 - σ(z))), x̂ = (x - mean) rstd, γ = w (1 + scale), m = HW·C/G,
P = Σ_hw dz and Q = Σ_hw dz x̂ per (sample, channel), S1 = Σ_group γP, S2 = Σ_group γQ:
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
from kernels.dispatch import cdiv, power_of_2, tl, triton, use_triton


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


# ---- kernels -------------------------------------------------------------------------------------
# x is seen as (B, HW, C) by strides (sb, sp, sc), so that NHWC and NCHW memory are the same code.
# The image is cut into K chunks of rows and slabs of COLS channels; a slab need not align with
# groups, so that NHWC loads are 128 bits wide for any C/G. COLS and the strides of NHWC are
# multiples of 16 wherever C is. The grid is one line of programs, since its second and third
# dimensions end at 65535.
#
# x, dx, y and dy are (B, HW, C); weight and bias (C,); scale and shift (B, C) in rows ss and ts
# apart. All others are fp32: a, d, P and Q (B, C); group_mean, group_rstd, c0 and c1 (B, G);
# mean, m2, ps and qs (B, K, C), per channel and chunk.


@triton.jit
def place(C, K, COLS: tl.constexpr):
    """This program's channels (COLS,), chunk and sample.

    Neighbours take neighbouring slabs of the same pixels.
    """
    slabs = tl.cdiv(C, COLS)
    pid = tl.program_id(0)
    c = pid % slabs * COLS + tl.arange(0, COLS)
    return c, pid // slabs % K, (pid // slabs // K).to(tl.int64)


@triton.jit
def through_silu(dy, z):
    """dz = dy · silu'(z)"""
    s = tl.sigmoid(z)
    return dy * s * (1.0 + z * (1.0 - s))


@triton.jit
def affine(weight, bias, scale, shift, b, c, inside, ss, ts, FILM: tl.constexpr):
    """γ = w (1 + scale) and b (1 + scale) + shift of channels c."""
    w = tl.load(weight + c, mask=inside, other=0).to(tl.float32)
    o = tl.load(bias + c, mask=inside, other=0).to(tl.float32)
    if FILM:
        s = 1.0 + tl.load(scale + b * ss + c, mask=inside, other=0).to(tl.float32)
        w, o = w * s, o * s + tl.load(shift + b * ts + c, mask=inside, other=0).to(tl.float32)
    return w, o


@triton.jit
def moments_kernel(
    x, mean, m2,
    HW, C, K, sb, sp, sc,
    NHWC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """mean, and m2 = Σ (x - mean)², of a chunk for each of COLS channels."""
    c, k, b = place(C, K, COLS)
    inside = c < C
    column = x + b * sb + (c if NHWC else c.to(tl.int64) * sc)
    first = tl.load(column + (k * CHUNK).to(tl.int64) * sp, mask=inside, other=0).to(tl.float32)
    # one sum a lane in the loop, one over lanes after it
    s1, s2 = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for r in range(0, CHUNK, ROWS):
        p = k * CHUNK + r + tl.arange(0, ROWS)
        mask = (p < HW)[:, None] & inside[None, :]
        at = column[None, :] + p.to(tl.int64)[:, None] * sp
        v = tl.load(at, mask=mask, other=0).to(tl.float32)
        # shifted by the first row: squares stay small under a large mean
        d = tl.where(mask, v - first[None, :], 0.0)
        s1 += d
        s2 += d * d
    s1, s2 = tl.sum(s1, 0), tl.sum(s2, 0)
    n = tl.minimum(CHUNK, HW - k * CHUNK).to(tl.float32)
    at = (b * K + k) * C + c
    tl.store(mean + at, first + s1 / n, mask=inside)
    tl.store(m2 + at, s2 - s1 * (s1 / n), mask=inside)


@triton.jit
def forward_coefficients_kernel(
    mean, m2, weight, bias, scale, shift, a, d, group_mean, group_rstd,
    HW, C, G, K, eps, ss, ts,
    FILM: tl.constexpr, CHUNK: tl.constexpr, CG: tl.constexpr, CGP: tl.constexpr,
):  # fmt: skip
    """Statistics of one (sample, group), and a and d of y = silu(a (x - group_mean) + d).

    Chan's formula combines the chunks of its channels.
    """
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, CGP)
    inside, c = j < CG, g * CG + j
    n, avg, sq = 0.0, tl.zeros([CGP], tl.float32), tl.zeros([CGP], tl.float32)
    for k in range(0, K):
        nk = tl.minimum(CHUNK, HW - k * CHUNK).to(tl.float32)
        at = (b * K + k) * C + c
        delta = tl.load(mean + at, mask=inside, other=0) - avg
        avg += delta * (nk / (n + nk))
        sq += tl.load(m2 + at, mask=inside, other=0) + delta * delta * (n * nk / (n + nk))
        n += nk
    total = tl.sum(tl.where(inside, avg, 0.0), 0) / CG
    away = tl.where(inside, avg - total, 0.0)
    var = (tl.sum(sq, 0) + n * tl.sum(away * away, 0)) / (n * CG)
    rstd = 1.0 / tl.sqrt(var + eps)
    w, o = affine(weight, bias, scale, shift, b, c, inside, ss, ts, FILM)
    tl.store(a + b * C + c, rstd * w, mask=inside)
    tl.store(d + b * C + c, o, mask=inside)
    tl.store(group_mean + b * G + g, total)
    tl.store(group_rstd + b * G + g, rstd)


@triton.jit
def apply_kernel(
    x, a, d, group_mean, y,
    HW, C, G, sb, sp, sc,
    CG: tl.constexpr, NHWC: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y of a tile of ROWS pixels and COLS channels."""
    c, r, b = place(C, tl.cdiv(HW, ROWS), COLS)
    p = r * ROWS + tl.arange(0, ROWS)
    inside = c < C
    mask = (p < HW)[:, None] & inside[None, :]
    at = b * sb + p.to(tl.int64)[:, None] * sp + (c if NHWC else c.to(tl.int64) * sc)[None, :]
    v = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    ac = tl.load(a + b * C + c, mask=inside, other=0)[None, :]
    dc = tl.load(d + b * C + c, mask=inside, other=0)[None, :]
    mc = tl.load(group_mean + b * G + c // CG, mask=inside, other=0)[None, :]
    z = ac * (v - mc) + dc
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def sums_kernel(
    x, dy, a, d, group_mean, group_rstd, ps, qs,
    HW, C, G, K, sb, sp, sc,
    CG: tl.constexpr, NHWC: tl.constexpr, SILU: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ps and qs: one chunk's part of P and Q for COLS channels."""
    c, k, b = place(C, K, COLS)
    inside = c < C
    ac = tl.load(a + b * C + c, mask=inside, other=0)[None, :]
    dc = tl.load(d + b * C + c, mask=inside, other=0)[None, :]
    mc = tl.load(group_mean + b * G + c // CG, mask=inside, other=0)[None, :]
    column = b * sb + (c if NHWC else c.to(tl.int64) * sc)
    P, Q = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for r in range(0, CHUNK, ROWS):
        p = k * CHUNK + r + tl.arange(0, ROWS)
        mask = (p < HW)[:, None] & inside[None, :]
        at = column[None, :] + p.to(tl.int64)[:, None] * sp
        v = tl.load(x + at, mask=mask, other=0).to(tl.float32) - mc
        dz = tl.load(dy + at, mask=mask, other=0).to(tl.float32)
        if SILU:
            dz = through_silu(dz, ac * v + dc)
        dz = tl.where(mask, dz, 0.0)
        P += dz
        Q += dz * v
    rc = tl.load(group_rstd + b * G + c // CG, mask=inside, other=0)
    tl.store(ps + (b * K + k) * C + c, tl.sum(P, 0), mask=inside)
    tl.store(qs + (b * K + k) * C + c, tl.sum(Q, 0) * rc, mask=inside)


@triton.jit
def backward_coefficients_kernel(
    ps, qs, a, P, Q, c0, c1,
    HW, C, G, K,
    CG: tl.constexpr, CGP: tl.constexpr,
):  # fmt: skip
    """P and Q of one (sample, group), and c0 and c1 of dx = a dz - c0 - x̂ c1.

    a = rstd γ, so c0 = Σ a P / m and c1 = Σ a Q / m.
    """
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, CGP)
    inside, c = j < CG, g * CG + j
    p, q = tl.zeros([CGP], tl.float32), tl.zeros([CGP], tl.float32)
    for k in range(0, K):
        p += tl.load(ps + (b * K + k) * C + c, mask=inside, other=0)
        q += tl.load(qs + (b * K + k) * C + c, mask=inside, other=0)
    ac = tl.load(a + b * C + c, mask=inside, other=0)
    m = (HW * CG) * 1.0  # HW = 1 reaches the compiler as a plain int
    tl.store(P + b * C + c, p, mask=inside)
    tl.store(Q + b * C + c, q, mask=inside)
    tl.store(c0 + b * G + g, tl.sum(ac * p, 0) / m)
    tl.store(c1 + b * G + g, tl.sum(ac * q, 0) / m)


@triton.jit
def dx_kernel(
    x, dy, a, d, group_mean, group_rstd, c0, c1, dx,
    HW, C, G, sb, sp, sc,
    CG: tl.constexpr, NHWC: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx of a tile of ROWS pixels and COLS channels."""
    c, r, b = place(C, tl.cdiv(HW, ROWS), COLS)
    p = r * ROWS + tl.arange(0, ROWS)
    inside, bg = c < C, b * G + c // CG
    mask = (p < HW)[:, None] & inside[None, :]
    at = b * sb + p.to(tl.int64)[:, None] * sp + (c if NHWC else c.to(tl.int64) * sc)[None, :]
    ac = tl.load(a + b * C + c, mask=inside, other=0)[None, :]
    dc = tl.load(d + b * C + c, mask=inside, other=0)[None, :]
    mc = tl.load(group_mean + bg, mask=inside, other=0)[None, :]
    rc = tl.load(group_rstd + bg, mask=inside, other=0)[None, :]
    c0c = tl.load(c0 + bg, mask=inside, other=0)[None, :]
    c1c = tl.load(c1 + bg, mask=inside, other=0)[None, :]
    v = tl.load(x + at, mask=mask, other=0).to(tl.float32) - mc
    dz = tl.load(dy + at, mask=mask, other=0).to(tl.float32)
    if SILU:
        dz = through_silu(dz, ac * v + dc)
    tl.store(dx + at, (ac * dz - c0c - v * rc * c1c).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def small_forward_kernel(
    x, weight, bias, scale, shift, y, a, d, group_mean, group_rstd,
    HW, C, G, eps, sb, sp, sc, ss, ts,
    CG: tl.constexpr, FILM: tl.constexpr, SILU: tl.constexpr,
    HWP: tl.constexpr, CGP: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of a (sample, group) that fits in registers: one launch, not three."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j, p = tl.arange(0, CGP), tl.arange(0, HWP)
    inside, c = j < CG, g * CG + j
    mask = (p < HW)[:, None] & inside[None, :]
    at = b * sb + p[:, None] * sp + c[None, :] * sc
    v = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    m = (HW * CG) * 1.0  # HW = 1 reaches the compiler as a plain int
    first = tl.load(x + b * sb + (g * CG) * sc).to(tl.float32)
    # shifted: a large mean costs no digits
    mean = first + tl.sum(tl.sum(tl.where(mask, v - first, 0.0), 0), 0) / m
    v = tl.where(mask, v - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(v * v, 0), 0) / m + eps)
    w, o = affine(weight, bias, scale, shift, b, c, inside, ss, ts, FILM)
    z = (rstd * w)[None, :] * v + o[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)
    tl.store(a + b * C + c, rstd * w, mask=inside)
    tl.store(d + b * C + c, o, mask=inside)
    tl.store(group_mean + b * G + g, mean)
    tl.store(group_rstd + b * G + g, rstd)


@triton.jit
def small_backward_kernel(
    x, dy, a, d, group_mean, group_rstd, dx, P, Q,
    HW, C, G, sb, sp, sc,
    CG: tl.constexpr, SILU: tl.constexpr, HWP: tl.constexpr, CGP: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of a (sample, group) that fits in registers."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j, p = tl.arange(0, CGP), tl.arange(0, HWP)
    inside, c = j < CG, g * CG + j
    mask = (p < HW)[:, None] & inside[None, :]
    at = b * sb + p[:, None] * sp + c[None, :] * sc
    mean, rstd = tl.load(group_mean + b * G + g), tl.load(group_rstd + b * G + g)
    ac = tl.load(a + b * C + c, mask=inside, other=0)
    dc = tl.load(d + b * C + c, mask=inside, other=0)
    v = tl.where(mask, tl.load(x + at, mask=mask, other=0).to(tl.float32) - mean, 0.0)
    dz = tl.load(dy + at, mask=mask, other=0).to(tl.float32)
    if SILU:
        dz = through_silu(dz, ac[None, :] * v + dc[None, :])
    dz = tl.where(mask, dz, 0.0)
    ps, qs = tl.sum(dz, 0), tl.sum(dz * v * rstd, 0)
    m = (HW * CG) * 1.0  # HW = 1 reaches the compiler as a plain int
    c0, c1 = tl.sum(ac * ps, 0) / m, tl.sum(ac * qs, 0) / m
    tl.store(dx + at, (ac[None, :] * dz - c0 - v * rstd * c1).to(dx.dtype.element_ty), mask=mask)
    tl.store(P + b * C + c, ps, mask=inside)
    tl.store(Q + b * C + c, qs, mask=inside)


@triton.jit
def finish_kernel(
    P, Q, weight, bias, scale, dw, db, dscale, dshift,
    B, C, ss,
    FILM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dw, db (C,) and with FiLM dscale, dshift (B, C) of COLS channels; all samples pass by."""
    c, r = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.arange(0, ROWS)
    inside = c < C
    w = tl.load(weight + c, mask=inside, other=0).to(tl.float32)[None, :]
    o = tl.load(bias + c, mask=inside, other=0).to(tl.float32)[None, :]
    sum_w, sum_b = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, B, ROWS):
        b = (start + r).to(tl.int64)
        mask = (b < B)[:, None] & inside[None, :]
        at = b[:, None] * C + c[None, :]
        p, q = tl.load(P + at, mask=mask, other=0), tl.load(Q + at, mask=mask, other=0)
        if FILM:
            s = tl.load(scale + b[:, None] * ss + c[None, :], mask=mask, other=0).to(tl.float32)
            tl.store(dscale + at, (w * q + o * p).to(dscale.dtype.element_ty), mask=mask)
            tl.store(dshift + at, p.to(dshift.dtype.element_ty), mask=mask)
            p, q = (1.0 + s) * p, (1.0 + s) * q
        sum_w += q
        sum_b += p
    tl.store(dw + c, tl.sum(sum_w, 0).to(dw.dtype.element_ty), mask=inside)
    tl.store(db + c, tl.sum(sum_b, 0).to(db.dtype.element_ty), mask=inside)


# ---- the op --------------------------------------------------------------------------------------

# One configuration so far; chosen by ahead-of-time compilation, not on a GPU.
CHUNK, ROWS, COLS, WARPS = 128, 32, 64, 4
FINISH_ROWS, FINISH_COLS = 16, 64
SMALL = 4096  # elements of a padded (sample, group) tile up to which one program does it whole


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
            CG, film, silu, HWP, CGP, num_warps=WARPS,
        )  # fmt: skip
        return out
    slabs = cdiv(C, COLS)
    means, m2 = a.new_empty(B, K, C), a.new_empty(B, K, C)
    moments_kernel[slabs * K * B,](
        x, means, m2, HW, C, K, sb, sp, sc, nhwc, CHUNK, ROWS, COLS, num_warps=WARPS
    )
    forward_coefficients_kernel[B, groups](
        means, m2, *affine_of, a, d, mean, rstd, HW, C, groups, K, eps, *rows_of,
        film, CHUNK, CG, CGP, num_warps=1,
    )  # fmt: skip
    apply_kernel[slabs * cdiv(HW, ROWS) * B,](
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
            CG, silu, HWP, CGP, num_warps=WARPS,
        )  # fmt: skip
        return
    slabs, CGP = cdiv(C, COLS), power_of_2(CG)
    ps, qs = a.new_empty(B, K, C), a.new_empty(B, K, C)
    c0, c1 = torch.empty_like(mean), torch.empty_like(mean)
    sums_kernel[slabs * K * B,](
        x, dy, a, d, mean, rstd, ps, qs, HW, C, G, K, sb, sp, sc,
        CG, nhwc, silu, CHUNK, ROWS, COLS, num_warps=WARPS,
    )  # fmt: skip
    backward_coefficients_kernel[B, G](
        ps, qs, a, P, Q, c0, c1, HW, C, G, K, CG, CGP, num_warps=1
    )  # fmt: skip
    dx_kernel[slabs * cdiv(HW, ROWS) * B,](
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
        dx, dw, db, *film = BACKWARD(dy, *ctx.saved_tensors, ctx.silu)
        if ctx.saved_tensors[3] is None:
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
    wide = torch.promote_types(x.dtype, torch.float32)
    if dispatch.forward_mode():
        tensors = [t.to(wide) for t in (x, weight, bias)]
        film = [t.to(wide) for t in film]
        return group_norm_silu_ref(*tensors, groups, *film, silu=silu, eps=eps).to(x.dtype)
    if use_triton("group_norm_silu", x, weight, bias, *film):
        return GroupNormSilu.apply(x, weight, bias, scale, shift, groups, silu, eps)
    # not F.group_norm, which refuses a group of one value
    n = torch.group_norm(near_zero(x.to(wide), groups), groups, weight.to(wide), bias.to(wide), eps)
    if scale is not None:
        n = n * (1 + scale.to(wide)[..., None, None]) + shift.to(wide)[..., None, None]
    return (F.silu(n) if silu else n).to(x.dtype)


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
