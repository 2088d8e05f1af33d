"""The Triton kernels of GroupNorm + FiLM + SiLU; kernels/groupnorm.py has the formulas.

A (sample, group) that fits in registers is one program, forward and backward. Of larger ones,
three kernels go forward (moments, coefficients, apply) and three back (sums, coefficients, dx). One
more finishes the gradients of weight, bias, scale and shift.
"""

from kernels.dispatch import tl, triton

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
def tile(HW, C, sb, sp, sc, NHWC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's sample, channels (COLS,) and whether they are there, and of its tile
    (ROWS, COLS) the offsets and whether they are inside."""
    c, r, b = place(C, tl.cdiv(HW, ROWS), COLS)
    p = r * ROWS + tl.arange(0, ROWS)
    mask = (p < HW)[:, None] & (c < C)[None, :]
    at = b * sb + p.to(tl.int64)[:, None] * sp + (c if NHWC else c.to(tl.int64) * sc)[None, :]
    return b, c, c < C, at, mask


@triton.jit
def whole(HW, sb, sp, sc, CG: tl.constexpr, HWP: tl.constexpr, CGP: tl.constexpr):
    """The same of a whole (sample, group): b, g, c (CGP,), offsets and mask (HWP, CGP)."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j, p = tl.arange(0, CGP), tl.arange(0, HWP)
    c = g * CG + j
    mask = (p < HW)[:, None] & (j < CG)[None, :]
    at = b * sb + p[:, None] * sp + c[None, :] * sc
    return b, g, c, j < CG, at, mask


@triton.jit
def row(base, at, inside):
    """Values (n,) at offsets, as (1, n) in fp32."""
    return tl.load(base + at, mask=inside, other=0).to(tl.float32)[None, :]


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
    b, c, inside, at, mask = tile(HW, C, sb, sp, sc, NHWC, ROWS, COLS)
    v = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    ac = row(a, b * C + c, inside)
    dc = row(d, b * C + c, inside)
    mc = row(group_mean, b * G + c // CG, inside)
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
    ac = row(a, b * C + c, inside)
    dc = row(d, b * C + c, inside)
    mc = row(group_mean, b * G + c // CG, inside)
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
    b, c, inside, at, mask = tile(HW, C, sb, sp, sc, NHWC, ROWS, COLS)
    bg = b * G + c // CG
    ac = row(a, b * C + c, inside)
    dc = row(d, b * C + c, inside)
    mc = row(group_mean, bg, inside)
    rc = row(group_rstd, bg, inside)
    c0c = row(c0, bg, inside)
    c1c = row(c1, bg, inside)
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
    b, g, c, inside, at, mask = whole(HW, sb, sp, sc, CG, HWP, CGP)
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
    b, g, c, inside, at, mask = whole(HW, sb, sp, sc, CG, HWP, CGP)
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
    w = row(weight, c, inside)
    o = row(bias, c, inside)
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
