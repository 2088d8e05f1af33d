"""One AdamW step on memory: the torch path, the kernel that does the same, and its tables.

The formula stands in kernels/adamw8bit.py. A tensor here is a run of memory: p, g and the moments
as (n,) in p's memory order.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.codec8bit import BLOCK, dequantize, quantize
from kernels.dispatch import cdiv, tl, triton
from kernels.rounding import stochastic, stochastic_tile

# Elements that a CPU takes at a time, in memory order: some ten temporaries that stay in its cache.
CHUNK = 2**17


# ---- the torch path ------------------------------------------------------------------------------
# The same fp32 operations in the same order as the kernel's, one rounding each (no lerp_, addcmul_
# or alpha=: those may fuse a product and a sum), so that both write the same bits where the
# kernel's are not fused either.


def update_torch(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor | None,
    v_absmax: Tensor | None,
    emas: Sequence[Tensor],
    scalars: list[float],
    control: list[float],
    keys: list[int] | None = None,
    first: int = 0,
) -> None:
    """One step in place.

    p, g, emas: (n,) in memory order; m, v: codes with absmax, or fp32 without;
    scalars: a row of `_scalars`; control: `_control`; keys: a row of `_keys`, with the index of
    p[0] in its tensor, or None: to nearest.
    """
    decay, rate, rsqrt, eps, b1, c1, b2, c2 = scalars
    m32 = m if m_absmax is None else dequantize(m, m_absmax, False)
    v32 = v if v_absmax is None else dequantize(v, v_absmax, True)
    g = g.float() * control[0]
    m32 = m32.mul_(b1).add_(g * c1)
    v32 = v32.mul_(b2).add_(g.mul_(g).mul_(c2))
    # correctly rounded: fp32 sqrt is an ulp off where a vector library does it
    root = v32.double().sqrt_().float()
    new = (p.float() * decay).sub_((m32 * rate).div_(root.mul_(rsqrt).add_(eps)))
    p.copy_(new if keys is None else stochastic(new, keys, first))
    for e, w in zip(emas, control[2:]):
        e.add_((p.float() - e).mul_(w))
    if m_absmax is not None:  # one after the other: fewer temporaries
        for kept, new in zip((m, m_absmax), quantize(m32, False)):
            kept.copy_(new)
        for kept, new in zip((v, v_absmax), quantize(v32, True)):
            kept.copy_(new)


# ---- the kernel ----------------------------------------------------------------------------------
# One program takes ROWS blocks of one tensor. `table` (T, 10 + E) int64 says per tensor: elements,
# first program, row of scalars, 16-byte alignment, and the addresses of p, g, m, v, absmax of m,
# absmax of v, and the EMAs.


@triton.jit
def address(row, k, DTYPE: tl.constexpr, FAST: tl.constexpr):
    at = tl.load(row + k).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(at, 16) if FAST else at


@triton.jit
def decode(codes, absmax, levels):
    """Codes (ROWS, BLOCK), absmax (ROWS,) -> fp32."""
    return tl.load(levels + codes.to(tl.int32)) * absmax[:, None]


@triton.jit
def encode(x, absmax, levels, buckets):
    """x (ROWS, BLOCK), absmax (ROWS,) -> codes, int32."""
    x = x * tl.where(absmax > 1e-36, 1.0 / tl.maximum(absmax, 1e-36), 0.0)[:, None]
    low = tl.load(buckets + ((x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF)).to(tl.int32)
    return low + (x > tl.load(levels + 256 + low)).to(tl.int32)


@triton.jit
def update_tile(
    row, start, s, key, control, levels, buckets,
    P: tl.constexpr, G: tl.constexpr, QUANT: tl.constexpr, E: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """The step on a program's tile; FAST: it is whole and aligned, and needs no mask."""
    left = tl.load(row) - start  # elements from here to the tensor's end
    r = tl.arange(0, ROWS)
    i = r[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = None if FAST else i < left  # a mask would split the 128-bit loads
    inside_row = None if FAST else r * BLOCK < left
    zero = None if FAST else 0
    MOMENT: tl.constexpr = tl.uint8 if QUANT else tl.float32
    p_at, g_at = address(row, 4, P, FAST) + start + i, address(row, 5, G, FAST) + start + i
    m_at = address(row, 6, MOMENT, FAST) + start + i
    v_at = address(row, 7, MOMENT, FAST) + start + i
    am_at = address(row, 8, tl.float32, False) + start // BLOCK + r
    av_at = address(row, 9, tl.float32, False) + start // BLOCK + r
    p = tl.load(p_at, mask=inside, other=zero).to(tl.float32)
    g = tl.load(g_at, mask=inside, other=zero).to(tl.float32) * tl.load(control)
    m, v = tl.load(m_at, mask=inside, other=zero), tl.load(v_at, mask=inside, other=zero)
    if QUANT:
        m = decode(m, tl.load(am_at, mask=inside_row, other=zero), levels)
        v = decode(v, tl.load(av_at, mask=inside_row, other=zero), levels + 512)
    m = m * tl.load(s + 4) + g * tl.load(s + 5)
    v = v * tl.load(s + 6) + g * g * tl.load(s + 7)
    p = p * tl.load(s) - m * tl.load(s + 1) / (tl.sqrt(v) * tl.load(s + 2) + tl.load(s + 3))
    if STOCHASTIC:
        p = stochastic_tile(p, (start + i).to(tl.int32), key)
    p = p.to(P)
    tl.store(p_at, p, mask=inside)
    for k in tl.static_range(E):
        e_at = address(row, 10 + k, tl.float32, FAST) + start + i
        e = tl.load(e_at, mask=inside, other=zero)
        tl.store(e_at, e + (p.to(tl.float32) - e) * tl.load(control + 2 + k), mask=inside)
    if QUANT:
        if not FAST:  # lanes beyond the end decoded to some level: not into absmax
            m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
        positive = (v > 0).to(tl.int32)
        m_max, v_max = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(am_at, m_max, mask=inside_row)
        tl.store(av_at, v_max, mask=inside_row)
        m = encode(m, m_max, levels, buckets)
        v = tl.maximum(encode(v, v_max, levels + 512, buckets + 65536), positive)
    tl.store(m_at, m.to(MOMENT), mask=inside)
    tl.store(v_at, v.to(MOMENT), mask=inside)


@triton.jit
def update_kernel(
    table, owner, scalars, keys, control, levels, buckets,
    P: tl.constexpr, G: tl.constexpr, QUANT: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """table (T, 10 + E), owner (programs,), scalars (jobs, 8), keys (jobs, 2) int32,
    control (2 + E,), the codec's."""
    if tl.load(control + 1) != 0:  # a non-finite gradient norm: nothing is read, nothing changes
        row = table + tl.load(owner + tl.program_id(0)) * (10 + E)
        start = (tl.program_id(0) - tl.load(row + 1)) * (ROWS * BLOCK)
        s = scalars + tl.load(row + 2) * 8
        key = keys + tl.load(row + 2) * 2
        if (start + ROWS * BLOCK <= tl.load(row)) & (tl.load(row + 3) != 0):
            update_tile(
                row, start, s, key, control, levels, buckets,
                P, G, QUANT, E, True, ROWS, BLOCK, STOCHASTIC,
            )  # fmt: skip
        else:
            update_tile(
                row, start, s, key, control, levels, buckets,
                P, G, QUANT, E, False, ROWS, BLOCK, STOCHASTIC,
            )  # fmt: skip


ROWS, WARPS = 8, 8  # one configuration so far; chosen by ahead-of-time compilation, not on a GPU


def flat(t: Tensor) -> Tensor:
    """Dense t as (n,) in memory order: a view."""
    return t.as_strided((t.numel(),), (1,))


class Job(NamedTuple):
    """A parameter that has a gradient, and what its step needs. p and state are this rank's."""

    whole: Tensor
    p: Tensor
    state: dict[str, Tensor]
    group: int
    emas: list[Tensor]


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """values on the CPU and on the device.

    One asynchronous copy from pinned memory; who keeps both may let a captured graph copy again.
    """
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        host = host.pin_memory()
    return host, host.to(device, non_blocking=True)


def launch_tables(jobs: list[Job], grads: list[Tensor]) -> dict[tuple, tuple]:
    """By kind (8-bit?, dtypes of p and of g): programs, EMAs, and the kernel's table and owner."""
    members = defaultdict(list)
    for i, (job, g) in enumerate(zip(jobs, grads)):
        if job.p.numel():
            kind = "m_absmax" in job.state, triton_dtype(job.p.dtype), triton_dtype(g.dtype)
            members[kind].append((i, job, g))
    made = {}
    for kind, rows in members.items():
        lines, first = [], 0
        for i, job, g in rows:
            state = [job.state.get(name) for name in ("m", "v", "m_absmax", "v_absmax")]
            tensors = [job.p, g, *state, *job.emas]
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            aligned = all(a % 16 == 0 for a in addresses)
            lines.append((job.p.numel(), first, i, int(aligned), *addresses))
            first += cdiv(job.p.numel(), ROWS * BLOCK)
        starts = [line[1] for line in lines] + [first]
        device = rows[0][1].p.device
        table = upload(lines, torch.int64, device)
        owner = upload(owners(starts), torch.int32, device)
        made[kind] = first, len(rows[0][1].emas), table, owner
    return made


def owners(starts: list[int]) -> Tensor:
    """Which tensor each program works on."""
    return torch.repeat_interleave(torch.tensor(starts, device="cpu").diff())


def triton_dtype(dtype: torch.dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))


def pieces(job: Job, g: Tensor) -> Iterator:
    """p, g, m, v, m_absmax, v_absmax and EMAs of a job, as (n,) in memory order.

    On a CPU cut to CHUNK elements at a time.
    """
    state = job.state
    if not job.p.numel():
        return
    size = CHUNK if job.p.device.type == "cpu" else job.p.numel()
    tensors = [flat(job.p), flat(g), state["m"], state["v"], *map(flat, job.emas)]
    maxima = repeat((None, None))
    if "m_absmax" in state:
        rows = -(-size // BLOCK)
        maxima = zip(state["m_absmax"].split(rows), state["v_absmax"].split(rows))
    for (p, g, m, v, *emas), absmax in zip(zip(*(t.split(size) for t in tensors)), maxima):
        yield p, g, m, v, *absmax, emas
