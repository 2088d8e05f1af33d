"""Scaled dot-product attention: softmax(q kᵀ · scale) v, per head.

    S = scale · q kᵀ,  P = softmax(S),  o = P v,  lse = log2 Σ 2^(S log2 e)
One pass over k and v; only o and lse are kept. Backward, with D = rowsum(do ∘ o):
    dv = Pᵀ do    dP = do vᵀ    dS = P ∘ (dP - D)
    dq = scale · dS k    dk = scale · dSᵀ q
Three kernels (D; dk and dv by blocks of keys; dq by blocks of queries), or, for at most 256
queries, one program per head that reads everything once. No atomics: bitwise deterministic.
They know no mask: a causal one (text encoders') runs on torch's SDPA.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.dispatch import cdiv, power_of_2, tl, triton, use_triton
from kernels.proof import trusted

LOG2E = 1.4426950408889634
HEAD_DIMS = (32, 64, 128)  # others run on torch's SDPA
# Keys up to which a CPU attends in fp32: its 16-bit SDPA takes 2 to 6 times as long there, and
# from 256 on as long or less.
FEW_KEYS = 128


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False
) -> Tensor:
    """The formula, in the dtype it is given (fp64 in the tests).

    q (B, heads, N, D); k, v (B, heads, M, D); returns (B, heads, N, D). causal: query n sees the
    keys up to n.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-1, -2) * scale  # (B, heads, N, M)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -float("inf"))
    return torch.softmax(scores, dim=-1) @ v


# ---- kernels -------------------------------------------------------------------------------------
# Pointers are to (B, heads, N or M, D) tensors with strides (…b, …h, …n) and contiguous D,
# which is a power of two; lse and delta are (B, heads, N), fp32. b and h are a program's sample
# and head, n are its queries, j its keys, d the columns. q, k, v … are read as tiles qt, kt, vt
# …; gt is the one of do.


@triton.jit
def head_of(bh, heads):
    """Sample and head of the bh-th of B * heads."""
    return (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)


@triton.jit
def tile(base, i, stride, d, inside):
    """Rows i (n,) and columns d (D,) as (n, D); zeros where not inside (n, 1)."""
    return tl.load(base + i.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0)


@triton.jit
def put(base, i, stride, d, inside, value):
    """Store value (n, D), in the dtype of the memory, where tile() would read it."""
    at = base + i.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    q, k, v, o, lse,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    heads, N, M, scale2,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """o and lse of BN queries: k and v pass by, the softmax is rescaled as its maximum grows."""
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = head_of(bh, heads)
    n = block * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    d = tl.arange(0, D)
    rows = (n < N)[:, None]
    qt = tile(q + b * qb + h * qh, n, qn, d, rows)
    top = tl.full([BN], -float("inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, D], tl.float32)
    k, v = k + b * kb + h * kh, v + b * vb + h * vh
    for start in range(0, M, BM):
        j = start + m
        cols = (j < M)[:, None]
        kt = tile(k, j, kn, d, cols)
        vt = tile(v, j, vn, d, cols)
        s = tl.dot(qt, tl.trans(kt), input_precision="ieee") * scale2
        s = tl.where((j < M)[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p, fade = tl.exp2(s - new[:, None]), tl.exp2(top - new)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(vt.dtype), vt, input_precision="ieee")
        top = new
    put(o + b * ob + h * oh, n, on, d, rows, acc / total[:, None])
    tl.store(lse + bh.to(tl.int64) * N + n, top + tl.log2(total), mask=n < N)


@triton.jit
def delta_kernel(o, do, delta, ob, oh, on, gb, gh, gn, heads, N, D: tl.constexpr, BN: tl.constexpr):
    """delta (B, heads, N) = rowsum(do ∘ o) of BN queries."""
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = head_of(bh, heads)
    n, d = block * BN + tl.arange(0, BN), tl.arange(0, D)
    rows = (n < N)[:, None]
    ot = tile(o + b * ob + h * oh, n, on, d, rows).to(tl.float32)
    gt = tile(do + b * gb + h * gh, n, gn, d, rows).to(tl.float32)
    tl.store(delta + bh.to(tl.int64) * N + n, tl.sum(ot * gt, 1), mask=n < N)


@triton.jit
def backward_kv_kernel(
    q, k, v, do, lse, delta, dk, dv,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, ob, oh, on,
    heads, N, M, scale, scale2,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dk and dv of BM keys: q and do pass by. Strides g… are do's, o… are dk's and dv's."""
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = head_of(bh, heads)
    j, d = block * BM + tl.arange(0, BM), tl.arange(0, D)
    cols = (j < M)[:, None]
    kt = tile(k + b * kb + h * kh, j, kn, d, cols)
    vt = tile(v + b * vb + h * vh, j, vn, d, cols)
    dkt, dvt = tl.zeros([BM, D], tl.float32), tl.zeros([BM, D], tl.float32)
    q, do = q + b * qb + h * qh, do + b * gb + h * gh
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        rows = (n < N)[:, None]
        qt = tile(q, n, qn, d, rows)
        gt = tile(do, n, gn, d, rows)
        # exp2(s - inf) = 0 for rows beyond N
        ls = tl.load(lse + bh.to(tl.int64) * N + n, mask=n < N, other=float("inf"))
        dl = tl.load(delta + bh.to(tl.int64) * N + n, mask=n < N, other=0)
        s = tl.dot(kt, tl.trans(qt), input_precision="ieee") * scale2
        pt = tl.exp2(s - ls[None, :])  # (BM, BN)
        dvt += tl.dot(pt.to(gt.dtype), gt, input_precision="ieee")
        dpt = tl.dot(vt, tl.trans(gt), input_precision="ieee")
        dst = pt * (dpt - dl[None, :])
        dkt += tl.dot(dst.to(qt.dtype), qt, input_precision="ieee")
    at = b * ob + h * oh + j.to(tl.int64)[:, None] * on + d[None, :]
    tl.store(dk + at, (dkt * scale).to(dk.dtype.element_ty), mask=cols)
    tl.store(dv + at, dvt.to(dv.dtype.element_ty), mask=cols)


@triton.jit
def weights(qt, kt, ls, j, M, scale2):
    """softmax(q·k) of the keys j, made again from the forward pass's lse; 0 beyond the last."""
    p = tl.exp2(tl.dot(qt, tl.trans(kt), input_precision="ieee") * scale2 - ls[:, None])
    return tl.where((j < M)[None, :], p, 0.0)


@triton.jit
def backward_q_kernel(
    q, k, v, do, lse, delta, dq,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, ob, oh, on,
    heads, N, M, scale, scale2,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dq of BN queries: k and v pass by. Strides g… are do's, o… are dq's."""
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = head_of(bh, heads)
    n, d = block * BN + tl.arange(0, BN), tl.arange(0, D)
    rows = (n < N)[:, None]
    qt = tile(q + b * qb + h * qh, n, qn, d, rows)
    gt = tile(do + b * gb + h * gh, n, gn, d, rows)
    ls = tl.load(lse + bh.to(tl.int64) * N + n, mask=n < N, other=float("inf"))
    dl = tl.load(delta + bh.to(tl.int64) * N + n, mask=n < N, other=0)
    dqt = tl.zeros([BN, D], tl.float32)
    k, v = k + b * kb + h * kh, v + b * vb + h * vh
    for start in range(0, M, BM):
        j = start + tl.arange(0, BM)
        cols = (j < M)[:, None]
        kt = tile(k, j, kn, d, cols)
        vt = tile(v, j, vn, d, cols)
        p = weights(qt, kt, ls, j, M, scale2)
        ds = p * (tl.dot(gt, tl.trans(vt), input_precision="ieee") - dl[:, None])
        dqt += tl.dot(ds.to(kt.dtype), kt, input_precision="ieee")
    put(dq + b * ob + h * oh, n, on, d, rows, dqt * scale)


@triton.jit
def backward_small_kernel(
    q, k, v, o, do, lse, dq, dk, dv,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, ob, oh, on, eb, eh, en,
    heads, N, M, scale, scale2,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One whole head, N <= BN: queries stay, keys pass by once.

    Strides g… are do's, o… are o's and dq's, e… are dk's and dv's.
    """
    bh = tl.program_id(0)
    b, h = head_of(bh, heads)
    n, d = tl.arange(0, BN), tl.arange(0, D)
    rows = (n < N)[:, None]
    qt = tile(q + b * qb + h * qh, n, qn, d, rows)
    gt = tile(do + b * gb + h * gh, n, gn, d, rows)
    ot = tile(o + b * ob + h * oh, n, on, d, rows)
    dl = tl.sum(gt.to(tl.float32) * ot.to(tl.float32), 1)
    ls = tl.load(lse + bh.to(tl.int64) * N + n, mask=n < N, other=float("inf"))
    dqt = tl.zeros([BN, D], tl.float32)
    k, v = k + b * kb + h * kh, v + b * vb + h * vh
    dk, dv = dk + b * eb + h * eh, dv + b * eb + h * eh
    for start in range(0, M, BM):
        j = start + tl.arange(0, BM)
        cols = (j < M)[:, None]
        kt = tile(k, j, kn, d, cols)
        p = weights(qt, kt, ls, j, M, scale2)
        dvt = tl.dot(tl.trans(p.to(gt.dtype)), gt, input_precision="ieee")
        put(dv, j, en, d, cols, dvt)
        vt = tile(v, j, vn, d, cols)  # not before: registers would spill
        ds = p * (tl.dot(gt, tl.trans(vt), input_precision="ieee") - dl[:, None])
        ds = ds.to(qt.dtype)
        dkt = tl.dot(tl.trans(ds), qt, input_precision="ieee") * scale
        put(dk, j, en, d, cols, dkt)
        dqt += tl.dot(ds, kt, input_precision="ieee")
    put(dq + b * ob + h * oh, n, on, d, rows, dqt * scale)


# ---- the op --------------------------------------------------------------------------------------

# (BN, BM, warps, stages) by kernel and head dim, chosen on an H100 (benchmarks/tiles.py) among
# those that spill no register on any GPU that tests/aot.py knows. Two of "small" spill a few and
# are faster for it: tests/aot.py lists them. "small few" was not timed.
CONFIG = {
    "forward": {32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (64, 64, 4, 2)},
    "backward_kv": {32: (64, 64, 4, 2), 64: (32, 64, 4, 3), 128: (32, 64, 4, 1)},
    # wgmma wants 64 rows of accumulator
    "backward_q": {32: (64, 64, 4, 2), 64: (128, 64, 8, 3), 128: (64, 32, 4, 2)},
    # one program does a head's whole backward pass for up to BN queries
    "small": {32: (256, 64, 8, 1), 64: (256, 64, 8, 1), 128: (64, 32, 8, 1)},
    # the same two for up to FEW queries
    "forward few": {32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 4, 2)},
    "small few": {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 32, 8, 1)},
}
FEW = 64
DELTA_ROWS = 64


def config(kind: str, D: int, dtype: torch.dtype, N: int = FEW + 1) -> tuple[int, int, int, int]:
    """The row of CONFIG for N queries. fp32 takes a small tile, or it would spill.

    (fp32 in Triton is for checking: in auto, SDPA serves it.)
    """
    few = f"{kind} few"
    if N <= FEW and few in CONFIG:
        kind = few
    BN, BM, warps, stages = CONFIG[kind][D]
    if dtype.itemsize == 2:
        return BN, BM, warps, stages
    return max(BN // 8, 16), max(BM // 4, 16), 4 if D < 128 else 8, 1


def largest(D: int, dtype: torch.dtype) -> int:
    """Queries up to which one program may do a head's whole backward pass."""
    return config("small", D, dtype)[0]


def roomy(device: torch.device) -> bool:
    """Can a program hold a whole head?

    NVIDIA's for data centres can (164 KB of shared memory and up), consumer ones (100 KB) and AMD's
    (64 KB) cannot.
    """
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= 160 * 1024


def rows(t: Tensor) -> Tensor:
    """t with contiguous D; others are copied: a stride-0 expanded gradient, a transposed head."""
    return t if t.stride(-1) == 1 and 0 not in t.stride() else t.contiguous()


def like(t: Tensor) -> Tensor:
    """Empty (B, heads, N, D) in (B, N, heads, D) memory: the projection after it sees a view."""
    B, heads, N, D = t.shape
    return torch.empty(B, N, heads, D, dtype=t.dtype, device=t.device).transpose(1, 2)


def strides(*tensors: Tensor) -> list[int]:
    """(…b, …h, …n) of each."""
    return [s for t in tensors for s in t.stride()[:3]]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse): o (B, heads, N, D), lse (B, heads, N) fp32 in base 2."""
    q, k, v = rows(q), rows(k), rows(v)
    B, heads, N, D = q.shape
    M = k.shape[2]
    o = like(q)
    lse = torch.empty(B, heads, N, dtype=torch.float32, device=q.device)
    if not o.numel():
        return o, lse
    BN, BM, warps, stages = config("forward", D, q.dtype, N)
    sizes = (*strides(q, k, v, o), heads, N, M, scale * LOG2E, D, BN, BM)
    grid = (cdiv(N, BN), B * heads)
    forward_kernel[grid](q, k, v, o, lse, *sizes, num_warps=warps, num_stages=stages)
    return o, lse


def forward_fake(q, k, v, scale):
    return like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    q, k, v, do = rows(q), rows(k), rows(v), rows(do)
    N, D = q.shape[2:]
    dq, dk, dv = like(q), like(k), like(v)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    if N <= largest(D, q.dtype) and roomy(q.device):
        launch_small(q, k, v, o, do, lse, dq, dk, dv, scale)
    else:
        launch_blocks(q, k, v, o, do, lse, dq, dk, dv, scale)
    return dq, dk, dv


def launch_small(q, k, v, o, do, lse, dq, dk, dv, scale: float) -> None:
    """Fill dq, dk and dv with one program per head."""
    B, heads, N, D = q.shape
    _, BM, warps, stages = config("small", D, q.dtype, N)
    BN = max(16, power_of_2(N))
    sizes = (heads, N, k.shape[2], scale, scale * LOG2E, D, BN, BM)
    backward_small_kernel[B * heads,](
        q, k, v, o, do, lse, dq, dk, dv, *strides(q, k, v, do, o, dk), *sizes,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_blocks(q, k, v, o, do, lse, dq, dk, dv, scale: float) -> None:
    """Fill dq, dk and dv block by block."""
    B, heads, N, D = q.shape
    M = k.shape[2]
    delta = torch.empty_like(lse)  # (B, heads, N)
    grid = (cdiv(N, DELTA_ROWS), B * heads)
    delta_kernel[grid](o, do, delta, *strides(o, do), heads, N, D, DELTA_ROWS, num_warps=4)
    sizes = (heads, N, M, scale, scale * LOG2E, D)
    BN, BM, warps, stages = config("backward_kv", D, q.dtype)
    backward_kv_kernel[cdiv(M, BM), B * heads](
        q, k, v, do, lse, delta, dk, dv, *strides(q, k, v, do, dk), *sizes, BN, BM,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    BN, BM, warps, stages = config("backward_q", D, q.dtype)
    backward_q_kernel[cdiv(N, BN), B * heads](
        q, k, v, do, lse, delta, dq, *strides(q, k, v, do, dq), *sizes, BN, BM,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def backward_fake(do, q, k, v, o, lse, scale):
    return like(q), like(k), like(v)


FORWARD = dispatch.op(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    forward,
    forward_fake,
)
BACKWARD = dispatch.op(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    backward,
    backward_fake,
)


class Attention(torch.autograd.Function):
    """The two ops as one differentiable function, once."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        o, lse = FORWARD(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        if do is None:
            return (None,) * 4
        return *BACKWARD(do, *ctx.saved_tensors, ctx.scale), None


# ---- dispatch ------------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False
) -> Tensor:
    """Attention for q (B, heads, N, D) and k, v (B, heads, M, D), with any strides.

    Returns (B, heads, N, D); zeros if there are no keys. causal, for N = M: query n sees the keys
    up to n.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "wanted (B, heads, N, D) and twice (B, heads, M, D)."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        dtypes = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise ValueError(f"q, k, v are {dtypes}: wanted one dtype, floating point.")
    if dispatch.forward_mode():
        return attention_ref(q, k, v, scale, causal)
    slower = "fp32 has no tensor cores here" if q.dtype == torch.float32 else ""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    plain = partial(by_torch, scale=scale, causal=causal)
    masked = "its mask is causal" if causal else ""
    left = masked or unsupported(q, k)
    if use_triton("attention", q, k, v, unsupported=left, slower=slower):
        kernel = partial(fused, scale=scale)
        if trusted("attention", round(scale, 6), kernel, plain, (q, k, v)):
            return kernel(q, k, v)
    return plain(q, k, v)


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """By the kernels."""
    return Attention.apply(q, k, v, scale)


def by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Tensor:
    """By torch's SDPA; on a CPU in fp32 where that is faster."""
    halves = q.dtype in (torch.bfloat16, torch.float16)
    if halves and q.device.type == "cpu" and k.shape[2] <= FEW_KEYS:
        # autocast would cast them back
        with torch.autocast("cpu", enabled=False):
            wide = [t.float() for t in (q, k, v)]
            return F.scaled_dot_product_attention(*wide, scale=scale, is_causal=causal).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)


def unsupported(q: Tensor, k: Tensor) -> str:
    """What the kernels leave to torch by design; "" is nothing."""
    if q.shape[3] not in HEAD_DIMS:
        return f"head dim is {q.shape[3]}, not one of {HEAD_DIMS}"
    if not k.shape[2]:
        return "there are no keys"
    if q.shape[0] * q.shape[1] > 65535:
        return "batch × heads is above 65535"
    return ""
