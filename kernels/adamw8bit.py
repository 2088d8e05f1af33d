"""AdamW whose two moments take one byte each, stored in the dynamic 8-bit format of bitsandbytes.

    g = c·grad,  c = min(1, clip / (‖grad‖ + 1e-6))
    m = β1 m + (1 - β1) g    v = β2 v + (1 - β2) g²
    p = (1 - lr·wd) p - lr/(1 - β1^t) · m / (√v / √(1 - β2^t) + eps)
in torch.optim.AdamW's order: decay first. Between steps m and v are codes: 256 neighbours in memory
share A = max |m|, and code[i] = the level nearest to m[i]/A of a fixed map with 7 decades of range.
The update uses the fresh fp32 m and v; only what is kept is rounded. A positive v never becomes 0:
a surviving m over a vanished v would be divided by eps alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import DTYPES, cdiv, tl, triton, use_triton

BLOCK = 256  # elements that share one absmax
SMALLEST = 4096  # tensors of fewer elements, and vectors (norms, biases), keep fp32 moments
TINY = 1e-36  # a block below this is zero next to any eps; 1 / absmax must not overflow
# Elements that a CPU takes at a time, in memory order: some ten temporaries that stay in its cache.
CHUNK = 2**17


def adamw_ref(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, unquantised, in the dtype it is given: (p, m, v) after step t = 1, 2, …

    All tensors have one shape.
    """
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    update = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return (1 - lr * weight_decay) * p - lr * update, m, v


# ---- the 8-bit format ----------------------------------------------------------------------------


def dynamic_map(signed: bool) -> Tensor:
    """(256,) fp32 levels, rising: 0, 1 and evenly spaced ones in each decade 10^-6 … 1.

    A decade has twice as many as the one below it.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        intervals = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, intervals + 1, device="cpu")  # the same on any device
        middles = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += middles
        if signed:
            levels += [-x for x in middles]
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


def boundaries(levels: Tensor) -> Tensor:
    """(256,) fp32 bounds: x lies nearest to level i iff bound[i-1] < x <= bound[i].

    Ties go to the lower level; the last bound is inf.
    """
    exact = (levels[:-1].double() + levels[1:].double()) / 2
    bound = exact.float()
    lower = bound.nextafter(torch.full_like(bound, -torch.inf))
    bound = torch.where(bound.double() > exact, lower, bound)  # rounded down
    return F.pad(bound, (0, 1), value=torch.inf)


def buckets(bound: Tensor) -> Tensor:
    """(65536,) uint8: the lowest code among the floats that share their upper 16 bits.

    No such bucket holds two bounds, so one comparison more gives the code: two lookups where a
    search takes eight.
    """
    upper = torch.arange(2**16, dtype=torch.int32, device=bound.device) << 16
    lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32).nan_to_num()
    return torch.bucketize(lowest, bound[:255]).to(torch.uint8)


@lru_cache
def codec(device: torch.device) -> tuple[Tensor, Tensor]:
    """(4, 256) fp32: levels of m, bounds of m, levels of v, bounds of v;
    and (2, 65536) uint8: buckets of m, of v."""
    m, v = dynamic_map(True), dynamic_map(False)
    m_bound, v_bound = boundaries(m), boundaries(v)
    table = torch.stack([buckets(m_bound), buckets(v_bound)])
    return torch.stack([m, m_bound, v, v_bound]).to(device), table.to(device)


def blocks(x: Tensor) -> Tensor:
    """x (n,) as (ceil(n / 256), 256), zeros at the end."""
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def quantize(x: Tensor, second: bool) -> tuple[Tensor, Tensor]:
    """codes (n,) uint8 and absmax (ceil(n / 256),) of x (n,) fp32.

    second: x is v (unsigned, its code never 0 where x > 0), else it is m.
    """
    levels, table = codec(x.device)
    rows = blocks(x)
    absmax = (rows if second else rows.abs()).amax(1)
    inverse = torch.where(absmax > TINY, 1 / absmax.clamp(min=TINY), 0)
    scaled = (rows * inverse[:, None]).view(-1)[: len(x)]
    low = table[int(second)].index_select(0, scaled.view(torch.int32) >> 16 & 0xFFFF)
    low += scaled > levels[1 + 2 * second].index_select(0, low.int())
    return torch.maximum(low, x > 0) if second else low, absmax


def dequantize(codes: Tensor, absmax: Tensor, second: bool) -> Tensor:
    """(n,) fp32 of codes (n,) uint8 and absmax (ceil(n / 256),)."""
    levels = codec(codes.device)[0][2 * second].index_select(0, codes.int())
    return (blocks(levels) * absmax[:, None]).view(-1)[: len(codes)]


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
) -> None:
    """One step in place.

    p, g, emas: (n,) in memory order; m, v: codes with absmax, or fp32 without;
    scalars: a row of `_scalars`; control: `_control`.
    """
    decay, rate, rsqrt, eps, b1, c1, b2, c2 = scalars
    m32 = m if m_absmax is None else dequantize(m, m_absmax, False)
    v32 = v if v_absmax is None else dequantize(v, v_absmax, True)
    g = g.float() * control[0]
    m32 = m32.mul_(b1).add_(g * c1)
    v32 = v32.mul_(b2).add_(g.mul_(g).mul_(c2))
    # correctly rounded: fp32 sqrt is an ulp off where a vector library does it
    root = v32.double().sqrt_().float()
    p.copy_((p.float() * decay).sub_((m32 * rate).div_(root.mul_(rsqrt).add_(eps))))
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
def encode(x, absmax, levels, buckets):
    """x (ROWS, BLOCK), absmax (ROWS,) -> codes, int32."""
    x = x * tl.where(absmax > 1e-36, 1.0 / tl.maximum(absmax, 1e-36), 0.0)[:, None]
    low = tl.load(buckets + ((x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF)).to(tl.int32)
    return low + (x > tl.load(levels + 256 + low)).to(tl.int32)


@triton.jit
def update_tile(
    row, start, s, control, levels, buckets,
    P: tl.constexpr, G: tl.constexpr, QUANT: tl.constexpr, E: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
    p = tl.load(p_at, mask=inside, other=zero).to(tl.float32)
    g = tl.load(g_at, mask=inside, other=zero).to(tl.float32) * tl.load(control)
    m, v = tl.load(m_at, mask=inside, other=zero), tl.load(v_at, mask=inside, other=zero)
    if QUANT:
        am_at = address(row, 8, tl.float32, False) + start // BLOCK + r
        av_at = address(row, 9, tl.float32, False) + start // BLOCK + r
        m_max = tl.load(am_at, mask=inside_row, other=zero)[:, None]
        v_max = tl.load(av_at, mask=inside_row, other=zero)[:, None]
        m = tl.load(levels + m.to(tl.int32)) * m_max
        v = tl.load(levels + 512 + v.to(tl.int32)) * v_max
    m = m * tl.load(s + 4) + g * tl.load(s + 5)
    v = v * tl.load(s + 6) + g * g * tl.load(s + 7)
    p = p * tl.load(s) - m * tl.load(s + 1) / (tl.sqrt(v) * tl.load(s + 2) + tl.load(s + 3))
    p = p.to(P)
    tl.store(p_at, p, mask=inside)
    for k in tl.static_range(E):
        e_at = address(row, 10 + k, tl.float32, FAST) + start + i
        e = tl.load(e_at, mask=inside, other=zero)
        tl.store(e_at, e + (p.to(tl.float32) - e) * tl.load(control + 2 + k), mask=inside)
    if QUANT:
        if not FAST:  # lanes beyond the end decoded to some level: not into absmax
            m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
        am, av = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(am_at, am, mask=inside_row)
        tl.store(av_at, av, mask=inside_row)
        m = encode(m, am, levels, buckets)
        v = tl.maximum(encode(v, av, levels + 512, buckets + 65536), (v > 0).to(tl.int32))
    tl.store(m_at, m.to(MOMENT), mask=inside)
    tl.store(v_at, v.to(MOMENT), mask=inside)


@triton.jit
def update_kernel(
    table, owner, scalars, control, levels, buckets,
    P: tl.constexpr, G: tl.constexpr, QUANT: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table (T, 10 + E), owner (programs,), scalars (jobs, 8), control (2 + E,), the codec's."""
    if tl.load(control + 1) != 0:  # a non-finite gradient norm: nothing is read, nothing changes
        row = table + tl.load(owner + tl.program_id(0)) * (10 + E)
        start = (tl.program_id(0) - tl.load(row + 1)) * (ROWS * BLOCK)
        s = scalars + tl.load(row + 2) * 8
        if (start + ROWS * BLOCK <= tl.load(row)) & (tl.load(row + 3) != 0):
            update_tile(row, start, s, control, levels, buckets, P, G, QUANT, E, True, ROWS, BLOCK)
        else:
            update_tile(row, start, s, control, levels, buckets, P, G, QUANT, E, False, ROWS, BLOCK)


ROWS, WARPS = 8, 8  # one configuration so far; chosen by ahead-of-time compilation, not on a GPU


# ---- the optimizer -------------------------------------------------------------------------------


def quantized(p: Tensor) -> bool:
    """Does p (any shape) keep 8-bit moments? Others keep fp32."""
    return p.numel() >= SMALLEST and p.ndim >= 2


def order(p: Tensor) -> list[int]:
    """p's dimensions of more than one element, slowest in memory first.

    (0, 2, 3, 1) for channels_last.
    """
    dims = sorted((d for d in range(p.ndim) if p.shape[d] != 1), key=lambda d: -p.stride(d))
    if not p.permute(dims + [d for d in range(p.ndim) if p.shape[d] == 1]).is_contiguous():
        raise ValueError(
            f"a parameter {tuple(p.shape)} has strides {p.stride()}: "
            "wanted one that fills its memory without gaps."
        )
    return dims


def flat(t: Tensor) -> Tensor:
    """Dense t as (n,) in memory order: a view."""
    return t.as_strided((t.numel(),), (1,))


def local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor (FSDP2), any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Equal strides, but for dimensions of one element."""
    strides = zip(a.shape, a.stride(), b.stride())
    return a.stride() == b.stride() or all(n == 1 or x == y for n, x, y in strides)


def new_state(p: Tensor) -> dict[str, Tensor]:
    """The state of p before its first step.

    Moments lie in p's memory order, (n,), and `order` names it.
    """
    n = p.numel()
    dtype = torch.uint8 if quantized(p) else torch.float32
    state = {
        "step": torch.zeros((), device=p.device),
        "m": torch.zeros(n, device=p.device, dtype=dtype),
        "v": torch.zeros(n, device=p.device, dtype=dtype),
        "order": torch.tensor(order(p), dtype=torch.uint8, device="cpu"),
    }
    if quantized(p):
        for name in ("m_absmax", "v_absmax"):
            state[name] = torch.zeros(-(-n // BLOCK), device=p.device)
    return state


def check_state(state: dict[str, Tensor], p: Tensor) -> None:
    """Refuse loaded state that was written for another shape, dtype or memory order than p's."""

    def form(t):
        return None if t is None else (tuple(t.shape), t.dtype)

    if "exp_avg" in state:
        raise ValueError(
            "optimizer state is torch.optim.AdamW's (exp_avg …): wanted AdamW8bit's.  "
            "The two do not continue each other."
        )
    shape = tuple(p.shape)
    for name, wanted in new_state(p.detach().to("meta")).items():
        got = form(state.get(name))
        if got != form(wanted):
            raise ValueError(
                f"optimizer state {name!r} of a parameter {shape} is {got}: wanted {form(wanted)}."
            )
    if state["order"].tolist() != order(p):
        raise ValueError(
            f"optimizer state is in memory order {state['order'].tolist()}: "
            f"wanted {order(p)}, that of its parameter {shape}.  "
            "Put the model into the memory format it was trained in."
        )


def check_ema(e: Tensor, p: Tensor) -> None:
    """Refuse an average that does not lie in memory as its parameter does."""

    def form(t):
        return f"{tuple(t.shape)}, strides {t.stride()}, on {t.device}"

    fits = e.dtype == torch.float32 and e.shape == p.shape and e.device == p.device
    if not fits or not same_layout(e, p):
        raise ValueError(f"an EMA tensor is {form(e)}, {e.dtype}: wanted {form(p)}, fp32.")


class Job(NamedTuple):
    """A parameter that has a gradient, and what its step needs."""

    p: Tensor
    g: Tensor  # in p's layout
    state: dict[str, Tensor]
    group: dict[str, Any]
    emas: list[Tensor]


class AdamW8bit(torch.optim.Optimizer):
    """torch.optim.AdamW with 2.03 bytes of state a parameter, bitwise deterministic.

    It resumes exactly. On a GPU one launch updates all 8-bit tensors and one the small fp32 ones
    (per pair of parameter and gradient dtypes); lr, step counts and the clip factor are read from
    device memory and nothing waits for the GPU. Weights keep their memory format. Parameters and
    gradients may be fp32, fp16 or bf16. A group's lr may be a float or a 0-dim tensor.
    Into a CUDA graph: first one step outside it on the very .grad tensors of the graph (their
    addresses are part of the table that step uploads), with lr as a tensor on the GPU; a float
    would be frozen.
    state[p]: `step` (), `m` and `v` (n,) in memory order, `order`, and for uint8 moments
    `m_absmax`, `v_absmax` (ceil(n/256),).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}: wanted a finite number, at least 0.")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas are {betas}: wanted two numbers in [0, 1).")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._checked, self._cache = {}, {}

    def _params(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """(parameter, its group), in order."""
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Exactly what state_dict() gave: the base class would cast codes to p's dtype."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (p, _) in zip(ids, self._params()):
            if i in state_dict["state"]:
                self.state[p] = {
                    k: v.clone() if k == "order" else v.to(p.device, copy=True)
                    for k, v in state_dict["state"][i].items()
                }

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip: float | None = None,
        norm: Tensor | None = None,
        ema: Sequence[tuple[Sequence[Tensor], float]] = (),
    ) -> Any:
        """One step on every parameter that has a gradient.

        clip: scale all gradients by min(1, clip / (norm + 1e-6)), as clip_grad_norm_ of torch
        would; the .grad tensors stay as they are. norm: their total 2-norm () if the caller has it
        (it must be global where parameters are sharded).
        ema: pairs (tensors, beta), one fp32 tensor for each parameter in the order of
        param_groups, with its shape and strides: tensor.lerp_(new parameter, 1 - beta) in the
        same pass.
        With clip or norm, a norm that is NaN or infinite makes the whole step a no-op: parameters,
        moments, step counts and EMAs stay. With neither, nothing is checked, and NaN reaches the
        weights as in torch.optim.AdamW.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        jobs, idle = self._jobs(ema)
        if not jobs and not idle:
            return loss
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}: wanted a positive number or None.")
        if clip is not None and norm is None:
            if any(hasattr(p, "to_local") for p, _ in self._params()):
                raise ValueError(
                    "clip with sharded parameters and no norm: "
                    "wanted norm, since a rank sees only its shards' gradients."
                )
        control = self._control(jobs, idle, clip, norm, ema)
        for p, emas in idle:  # no gradient: only the averages move
            for e, w in zip(emas, control[2:]):
                e.copy_(torch.where(control[1] != 0, e + (p.float() - e) * w, e))
        if jobs:
            torch._foreach_add_([job.state["step"] for job in jobs], control[1])
            self._run(jobs, self._scalars(jobs), control)
        return loss

    def _jobs(self, ema: Sequence[tuple[Sequence[Tensor], float]]) -> tuple[list[Job], list[tuple]]:
        """Parameters with gradients, and (parameter, EMAs) of those without."""
        jobs, idle = [], []
        params = self._params()
        for tensors, _ in ema:
            if len(tensors) != len(params):
                raise ValueError(
                    f"ema has {len(tensors)} tensors: "
                    f"wanted one for each of {len(params)} parameters."
                )
        for i, (whole, group) in enumerate(params):
            p = local(whole)
            emas = [local(tensors[i]) for tensors, _ in ema]
            for e in emas:
                check_ema(e, p)
            if whole.grad is not None and p.numel():
                g = self._gradient(p, local(whole.grad))
                jobs.append(Job(p, g, self._state(whole, p), group, emas))
            elif emas:
                idle.append((p, emas))
        devices = sorted({str(job.p.device) for job in jobs})
        if len(devices) > 1:  # the kernel would take their addresses for its own GPU's
            raise ValueError(
                f"parameters are on {' and '.join(devices)}: wanted one device an optimizer."
            )
        return jobs, idle

    def _gradient(self, p: Tensor, grad: Tensor) -> Tensor:
        """grad in p's layout."""
        if grad.is_sparse or p.dtype not in DTYPES or grad.dtype not in DTYPES:
            raise ValueError(
                f"a parameter is {p.dtype}, its gradient {grad.dtype}, {grad.layout}: "
                "wanted dense fp32, fp16 or bf16."
            )
        if same_layout(grad, p):
            return grad
        return torch.empty_like(p, dtype=grad.dtype).copy_(grad)

    def _state(self, whole: Tensor, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, whose shard here is p: new, or checked once it was loaded."""
        state = self.state[whole]
        if not state:
            state.update(new_state(p))
        elif whole not in self._checked or self._checked[whole] is not state.get("m"):
            check_state(state, p)
        self._checked[whole] = state["m"]
        return state

    def _cached(
        self,
        name: Any,
        key: Any,
        values: Callable[[], Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """values() on the device, uploaded only when `key` changed.

        One asynchronous copy from pinned memory, which is kept: a captured graph reads it again.
        """
        if name not in self._cache or self._cache[name][0] != key:
            host = torch.as_tensor(values(), dtype=dtype, device="cpu")
            host = host.pin_memory() if device.type == "cuda" else host
            self._cache[name] = key, host, host.to(device, non_blocking=True)
        return self._cache[name][2]

    def _control(
        self, jobs: list[Job], idle: list, clip: float | None, norm: Tensor | None, ema: Sequence
    ) -> Tensor:
        """(2 + E,) fp32: clip factor, 1 if the step happens else 0, weight of the new parameter
        in each EMA."""
        device = (jobs[0].p if jobs else idle[0][0]).device
        fixed = (1.0, 1.0, *(1 - beta for _, beta in ema))
        control = self._cached("control", fixed, lambda: fixed, torch.float32, device)
        if clip is None and norm is None:
            return control
        if norm is None:
            norms = [control[0]]
            if jobs:
                norms = torch._foreach_norm([job.g for job in jobs], 2, dtype=torch.float32)
            norm = torch.linalg.vector_norm(torch.stack(norms))
        norm = torch.as_tensor(norm, dtype=torch.float32, device=device)
        factor = control[0] if clip is None else (clip / (norm + 1e-6)).clamp(max=1)
        return torch.cat([torch.stack([factor, norm.isfinite().float()]), control[2:]])

    def _scalars(self, jobs: list[Job]) -> Tensor:
        """(jobs, 8) fp32: 1 - lr·wd, lr / (1 - β1^t), (1 - β2^t)^-½, eps, β1, 1 - β1, β2, 1 - β2.

        fp64 inside, on the device.
        """
        device = jobs[0].p.device
        groups = [job.group for job in jobs]
        key = tuple(
            (
                0.0 if isinstance(group["lr"], Tensor) else group["lr"],
                *group["betas"],
                group["eps"],
                group["weight_decay"],
            )
            for group in groups
        )
        hyper = self._cached("hyper", key, lambda: key, torch.float64, device)
        lr, b1, b2, eps, wd = hyper.unbind(1)
        if any(isinstance(group["lr"], Tensor) for group in groups):
            rates = {
                id(group): torch.as_tensor(group["lr"], dtype=torch.float64, device=device)
                for group in self.param_groups
            }
            lr = torch.stack([rates[id(group)] for group in groups])
        t = torch.stack([job.state["step"] for job in jobs]).double()
        rate, rsqrt = lr / (1 - b1**t), (1 - b2**t).rsqrt()
        return torch.stack([1 - lr * wd, rate, rsqrt, eps, b1, 1 - b1, b2, 1 - b2], 1).float()

    def _run(self, jobs: list[Job], scalars: Tensor, control: Tensor) -> None:
        """Sort the jobs into launches by dtypes and state, or take them one by one in torch."""
        if use_triton("adamw8bit", jobs[0].p, jobs[0].g):
            launches = defaultdict(list)
            for i, job in enumerate(jobs):
                launches["m_absmax" in job.state, job.p.dtype, job.g.dtype].append((i, job))
            for kind, members in launches.items():
                self._launch(kind, members, scalars, control)
            return
        factors = control.tolist()
        if not factors[1]:
            return
        for job, row in zip(jobs, scalars.tolist()):
            for part in pieces(job):
                update_torch(*part, row, factors)

    def _launch(
        self, kind: tuple, members: list[tuple[int, Job]], scalars: Tensor, control: Tensor
    ) -> None:
        """One launch for all jobs of a kind (8-bit?, dtypes of p and g), each with its row of
        scalars."""
        rows, first, device = [], 0, scalars.device
        for i, job in members:
            state = [job.state.get(name) for name in ("m", "v", "m_absmax", "v_absmax")]
            tensors = [job.p, job.g, *state, *job.emas]
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            aligned = all(a % 16 == 0 for a in addresses)
            rows.append((job.p.numel(), first, i, int(aligned), *addresses))
            first += cdiv(job.p.numel(), ROWS * BLOCK)
        starts = tuple(row[1] for row in rows) + (first,)
        table = self._cached(("table", kind), rows, lambda: rows, torch.int64, device)
        owner = self._cached(("owner", kind), starts, lambda: owners(starts), torch.int32, device)
        quant, P, G = kind[0], triton_dtype(kind[1]), triton_dtype(kind[2])
        E = len(members[0][1].emas)
        update_kernel[first,](
            table, owner, scalars, control, *codec(device), P, G, quant, E, ROWS, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip


def owners(starts: tuple[int, ...]) -> Tensor:
    """Which tensor each program works on."""
    return torch.repeat_interleave(torch.tensor(starts, device="cpu").diff())


def triton_dtype(dtype: torch.dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))


def pieces(job: Job) -> Iterator:
    """p, g, m, v, m_absmax, v_absmax and EMAs of a job, as (n,) in memory order.

    On a CPU cut to CHUNK elements at a time.
    """
    state = job.state
    size = CHUNK if job.p.device.type == "cpu" else job.p.numel()
    tensors = [flat(job.p), flat(job.g), state["m"], state["v"], *map(flat, job.emas)]
    maxima = repeat((None, None))
    if "m_absmax" in state:
        rows = -(-size // BLOCK)
        maxima = zip(state["m_absmax"].split(rows), state["v_absmax"].split(rows))
    for (p, g, m, v, *emas), absmax in zip(zip(*(t.split(size) for t in tensors)), maxima):
        yield p, g, m, v, *absmax, emas


# ---- bitsandbytes --------------------------------------------------------------------------------


def moments(state: dict[str, Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
    """m and v of p as fp32 in p's shape and strides, from its entry in AdamW8bit.state."""

    def moment(name):
        x = state[name].clone()
        if f"{name}_absmax" in state:
            x = dequantize(x, state[f"{name}_absmax"], name == "v")
        return x.as_strided(p.shape, p.stride())

    return moment("m"), moment("v")


def to_bitsandbytes(state: dict[str, Tensor], p: Tensor) -> dict[str, Any]:
    """p's entry in AdamW8bit.state as bitsandbytes' AdamW8bit keeps it.

    Codes in p's shape, blocks in contiguous order. The codes are the same if p is contiguous; else
    they are rounded again, with other neighbours.
    """
    entry: dict[str, Any] = {"step": int(state["step"])}
    for i, (k, x) in enumerate(zip(("m", "v"), moments(state, p)), 1):
        if f"{k}_absmax" not in state:
            entry[f"state{i}"] = x.contiguous()
            continue
        codes, absmax = state[k], state[f"{k}_absmax"]
        if not p.is_contiguous():
            codes, absmax = quantize(x.contiguous().view(-1), k == "v")
        entry[f"state{i}"] = codes.clone().view(p.shape)
        entry[f"absmax{i}"] = absmax.clone()
        entry[f"qmap{i}"] = dynamic_map(k == "m").to(p.device)
    return entry


def from_bitsandbytes(entry: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """The reverse: an entry for AdamW8bit.state[p].

    Maps, blocks and dtypes other than ours are converted.
    """
    # recent bitsandbytes wraps its quantised tensors
    entry = {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}
    state = new_state(p)
    state["step"].fill_(float(entry["step"]))
    for i, k in enumerate(("m", "v"), 1):
        x = entry[f"state{i}"].to(p.device).contiguous()
        if x.shape != p.shape:
            raise ValueError(
                f"state{i} of a parameter {tuple(p.shape)} is {tuple(x.shape)}: "
                "wanted the parameter's shape."
            )
        if x.dtype == torch.uint8:
            levels, absmax = entry[f"qmap{i}"].to(p.device), entry[f"absmax{i}"].to(p.device)
            our_map = torch.equal(levels, dynamic_map(k == "m").to(p.device))
            if quantized(p) and p.is_contiguous() and our_map:
                state[k], state[f"{k}_absmax"] = x.view(-1).clone(), absmax.clone()
                continue
            values = blocks(levels.index_select(0, x.view(-1).int())) * absmax[:, None]
            x = values.view(-1)[: p.numel()].view(p.shape)
        # into p's memory order
        state[k] = flat(torch.empty_like(p, dtype=torch.float32).copy_(x))
        if quantized(p):
            state[k], state[f"{k}_absmax"] = quantize(state[k], k == "v")
    return state
