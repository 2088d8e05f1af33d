"""AdamW whose two moments take one byte each, stored in the dynamic 8-bit format of bitsandbytes.

    g = c·grad,  c = min(1, clip / (‖grad‖ + 1e-6))
    m = β1 m + (1 - β1) g    v = β2 v + (1 - β2) g²
    p = (1 - lr·wd) p - lr/(1 - β1^t) · m / (√v / √(1 - β2^t) + eps)
in torch.optim.AdamW's order: decay first. Between steps m and v are codes: 256 neighbours in memory
share A = max |m|, and code[i] = the level nearest to m[i]/A of a fixed map with 7 decades of range.
The update uses the fresh fp32 m and v; only what is kept is rounded. A positive v never becomes 0:
a surviving m over a vanished v would be divided by eps alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import proof
from kernels.adamw_update import (
    ROWS,
    WARPS,
    Job,
    launch_tables,
    pieces,
    update_kernel,
    update_torch,
    upload,
)
from kernels.codec8bit import BLOCK, codec
from kernels.dispatch import DTYPES, cdiv, use_triton
from kernels.rounding import base_key

SMALLEST = 4096  # tensors of fewer elements, and vectors (norms, biases), keep fp32 moments
PLAIN = (Tensor, torch.nn.Parameter)  # no DTensor: asking costs host time


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


# ---- the optimizer -------------------------------------------------------------------------------


def quantized(p: Tensor, bits: int = 8) -> bool:
    """Does p (any shape) keep 8-bit moments? Others keep fp32."""
    return bits == 8 and share(p) >= SMALLEST and p.ndim >= 2


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


def local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor (FSDP2), any other tensor as it is."""
    if type(t) in PLAIN or not hasattr(t, "to_local"):
        return t
    return t.to_local()


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Equal strides, but for dimensions of one element."""
    strides = zip(a.shape, a.stride(), b.stride())
    return a.stride() == b.stride() or all(n == 1 or x == y for n, x, y in strides)


def share(p: Tensor) -> int:
    """The elements for which a rank keeps moments: all of p, or as many as its largest shard."""
    if not hasattr(p, "to_local"):
        return p.numel()
    shape = list(p.shape)
    for placement, ranks in zip(p.placements, p.device_mesh.shape):
        if placement.is_shard():
            shape[placement.dim] = -(-shape[placement.dim] // ranks)
    return math.prod(shape)


def distributed(x: Tensor, p: Tensor) -> Tensor:
    """x (k,) of this rank as its piece of a DTensor (ranks · k,), if p is one.

    Every rank's piece has one size. torch.distributed.checkpoint then saves each of them, where it
    would take plain tensors for copies of each other.
    """
    if not hasattr(p, "to_local"):
        return x
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(0) if place.is_shard() else place for place in p.placements]
    return DTensor.from_local(x, p.device_mesh, placements, run_check=False)


def memory_order(p: Tensor) -> list[int]:
    """order() of all of p, also where its shard has a dimension of one row."""
    return order(torch.empty_strided(p.shape, p.stride(), device="meta"))


def kept(p: Tensor, bits: int = 8) -> dict[str, tuple[int, torch.dtype]]:
    """Elements on each rank, and dtype, of p's moments and of their absmax."""
    n = share(p)
    if not quantized(p, bits):
        return {"m": (n, torch.float32), "v": (n, torch.float32)}
    maxima = (cdiv(n, BLOCK), torch.float32)
    codes = (n, torch.uint8)
    return {"m": codes, "v": codes, "m_absmax": maxima, "v_absmax": maxima}


def new_state(p: Tensor, bits: int = 8) -> dict[str, Tensor]:
    """The state of p before its first step.

    Moments lie in p's memory order, (n,), and `order` names it.
    """
    state = {
        "step": torch.zeros((), device=p.device),
        "order": torch.tensor(memory_order(p), dtype=torch.uint8, device="cpu"),
    }
    for name, (n, dtype) in kept(p, bits).items():
        state[name] = distributed(torch.zeros(n, dtype=dtype, device=p.device), p)
    return state


def check_state(state: dict[str, Tensor], p: Tensor, bits: int = 8) -> None:
    """Refuse state that was made for another shape, dtype, device or memory order than p's."""
    shape = tuple(p.shape)
    if "exp_avg" in state:
        raise ValueError(
            f"optimizer state is torch.optim.AdamW's (exp_avg …): wanted AdamW{bits}bit's.  "
            "The two do not continue each other."
        )
    wanted = {name: ((n,), dtype, p.device) for name, (n, dtype) in kept(p, bits).items()}
    wanted["step"] = ((), torch.float32, p.device)
    dims = memory_order(p)
    wanted["order"] = ((len(dims),), torch.uint8, torch.device("cpu"))
    for name, form in wanted.items():
        got = None
        if name in state:
            x = local(state[name])
            got = (tuple(x.shape), x.dtype, x.device)
        if got != form:
            raise ValueError(
                f"optimizer state {name!r} of a parameter {shape} is {got}: wanted {form}."
            )
    if state["order"].tolist() != dims:
        raise ValueError(
            f"optimizer state is in memory order {state['order'].tolist()}: "
            f"wanted {dims}, that of its parameter {shape}.  "
            "Put the model into the memory format it was trained in."
        )


def own_part(state: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    """The tensors of a state that belong to this rank's shard p: views, without the padding."""
    n = p.numel()
    part = {}
    for name in ("m", "v", "m_absmax", "v_absmax"):
        if name in state:
            part[name] = local(state[name])[: cdiv(n, BLOCK) if "absmax" in name else n]
    return part


def check_ema(e: Tensor, p: Tensor) -> None:
    """Refuse an average that does not lie in memory as its parameter does."""

    def form(t):
        return f"{tuple(t.shape)}, strides {t.stride()}, on {t.device}"

    fits = e.dtype == torch.float32 and e.shape == p.shape and e.device == p.device
    if not fits or not same_layout(e, p):
        raise ValueError(f"an EMA tensor is {form(e)}, {e.dtype}: wanted {form(p)}, fp32.")


class Plan(NamedTuple):
    """What a step does to which memory; the next step repeats it if nothing has moved."""

    signature: list
    jobs: list[Job]
    idle: list[tuple[Tensor, list[Tensor]]]  # parameters without a gradient, and their EMAs
    steps: Tensor | None  # (jobs,) as each state counts them
    launches: dict[tuple, tuple]  # by kind: the kernel's tables


class AdamW8bit(torch.optim.Optimizer):
    """torch.optim.AdamW with 2.03 bytes of state a parameter, bitwise deterministic.

    It resumes exactly. On a GPU one launch updates all 8-bit tensors and one the small fp32 ones
    (per pair of parameter and gradient dtypes); lr, step counts and the clip factor are read from
    device memory and nothing waits for the GPU. Weights keep their memory format. Parameters and
    gradients may be fp32, fp16 or bf16. A group's lr may be a float or a 0-dim tensor.
    Into a CUDA graph: first one step outside it on the very .grad tensors of the graph (their
    addresses are part of the table that step uploads), with lr as a tensor on the GPU; a float
    would be frozen.
    rounding: a seed; bf16 weights are then rounded stochastically (kernels/rounding.py), by a hash
    of the seed, the parameter's place, its step count and the element. Not part of the state.
    state[p]: `step` (), `m` and `v` (n,) in memory order, `order`, and for uint8 moments
    `m_absmax`, `v_absmax` (ceil(n/256),).
    """

    bits = 8  # of a moment, where a tensor is large enough

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rounding: int | None = None,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}: wanted a finite number, at least 0.")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas are {betas}: wanted two numbers in [0, 1).")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.__setstate__({"rounding": rounding})
        if rounding is not None:
            check_rounded(self._params())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rounding": self.rounding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "rounding" in state:  # load_state_dict gives none: it is the new optimizer's
            self.rounding = state["rounding"]
        self._plan, self._cache = Plan([], [], [], None, {}), {}

    def _params(self) -> list[tuple[Tensor, int]]:
        """(parameter, number of its group), in order."""
        return [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"]]

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
        plan, grads = self._planned(ema)
        jobs, idle = plan.jobs, plan.idle
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
        control = self._control(plan, grads, clip, norm, ema)
        for p, emas in idle:  # no gradient: only the averages move
            for e, w in zip(emas, control[2:]):
                e.copy_(torch.where(control[1] != 0, e + (p.float() - e) * w, e))
        if jobs:
            plan.steps.add_(control[1])
            self._run(plan, grads, self._scalars(plan), self._keys(plan), control)
        return loss

    def _planned(self, ema: Sequence[tuple[Sequence[Tensor], float]]) -> tuple[Plan, list[Tensor]]:
        """The last step's plan, or a new one if any tensor has moved since; and each job's gradient
        in its parameter's layout."""
        if self._plan.signature and self._signature(ema) == self._plan.signature:
            return self._plan, [local(job.whole.grad) for job in self._plan.jobs]
        jobs, idle = self._jobs(ema)
        theirs = [local(job.whole.grad) for job in jobs]
        grads = [in_layout(g, job.p) for g, job in zip(theirs, jobs)]
        copied = any(g is not given for g, given in zip(grads, theirs))
        # a copy is made anew each time, and lies elsewhere
        steps = self._stacked_steps(jobs)
        self._plan = Plan([] if copied else self._signature(ema), jobs, idle, steps, {})
        return self._plan, grads

    def _stacked_steps(self, jobs: list[Job]) -> Tensor | None:
        """All step counts as one tensor (jobs,), of which each state's is a view from here on."""
        if not jobs:
            return None
        steps = torch.stack([self.state[job.whole]["step"] for job in jobs])
        for i, job in enumerate(jobs):
            self.state[job.whole]["step"] = steps[i]
        return steps

    def _signature(self, ema: Sequence[tuple[Sequence[Tensor], float]]) -> list:
        """Where everything lies. Gradients are not held on to, only their addresses."""
        params = [p for group in self.param_groups for p in group["params"]]
        given = [p.grad for p in params]
        grads = [g for g in given if g is not None]
        entries = [state for state in self.state.values() if state]
        found = [len(group["params"]) for group in self.param_groups]
        found += [g is None for g in given] + [g.dtype for g in grads]
        laid_out = [local(t) for t in params + grads]
        found += [t.stride() for t in laid_out]
        kept = [local(state[name]) for name in ("m", "step") for state in entries]
        averages = [local(t) for tensors, _ in ema for t in tensors]
        return found + [t.data_ptr() for t in laid_out + kept + averages]

    def _jobs(self, ema: Sequence[tuple[Sequence[Tensor], float]]) -> tuple[list[Job], list[tuple]]:
        """Parameters with gradients, and (parameter, EMAs) of those without."""
        jobs, idle = [], []
        params = self._params()
        if self.rounding is not None:
            check_rounded(params)  # some may have come, or been cast, since
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
            if whole.grad is not None:
                jobs.append(Job(whole, p, self._state(whole, p), group, emas))
            elif emas:
                idle.append((p, emas))
        devices = sorted({str(job.p.device) for job in jobs})
        if len(devices) > 1:  # the kernel would take their addresses for its own GPU's
            raise ValueError(
                f"parameters are on {' and '.join(devices)}: wanted one device an optimizer."
            )
        return jobs, idle

    def _state(self, whole: Tensor, p: Tensor) -> dict[str, Tensor]:
        """What a parameter, whose shard here is p, has of its state here: new, or checked."""
        order(p)  # it has to fill its memory
        state = self.state[whole]
        if not state:
            state.update(new_state(whole, self.bits))
        check_state(state, whole, self.bits)
        return own_part(state, p)

    def _cached(
        self,
        name: Any,
        key: Any,
        values: Callable[[], Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """values() on the device, uploaded only when `key` changed."""
        if name not in self._cache or self._cache[name][0] != key:
            self._cache[name] = key, *upload(values(), dtype, device)
        return self._cache[name][2]

    def _control(
        self,
        plan: Plan,
        grads: list[Tensor],
        clip: float | None,
        norm: Tensor | None,
        ema: Sequence,
    ) -> Tensor:
        """(2 + E,) fp32: clip factor, 1 if the step happens else 0, weight of the new parameter
        in each EMA."""
        device = (plan.jobs[0].p if plan.jobs else plan.idle[0][0]).device
        fixed = (1.0, 1.0, *(1 - beta for _, beta in ema))
        control = self._cached("control", fixed, lambda: fixed, torch.float32, device)
        if clip is None and norm is None:
            return control
        if norm is None:
            norms = [control[0]]
            if grads:
                norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
            norm = torch.linalg.vector_norm(torch.stack(norms))
        norm = torch.as_tensor(norm, dtype=torch.float32, device=device)
        factor = control[0] if clip is None else (clip / (norm + 1e-6)).clamp(max=1)
        return torch.cat([torch.stack([factor, norm.isfinite().float()]), control[2:]])

    def _scalars(self, plan: Plan) -> Tensor:
        """What each job's update multiplies by, (jobs, 8) fp32; in fp64 inside, on the device.

        1 - lr·wd, lr / (1 - β1^t), (1 - β2^t)^-½, eps, β1, 1 - β1, β2 and 1 - β2.
        """
        device = plan.steps.device
        rates = [group["lr"] for group in self.param_groups]
        fixed = [0.0 if isinstance(rate, Tensor) else rate for rate in rates]
        key = [
            (rate, *group["betas"], group["eps"], group["weight_decay"])
            for rate, group in zip(fixed, self.param_groups)
        ]
        hyper = self._cached("hyper", key, lambda: key, torch.float64, device)
        if any(isinstance(rate, Tensor) for rate in rates):
            lr = [torch.as_tensor(rate, dtype=torch.float64, device=device) for rate in rates]
            hyper = torch.cat([torch.stack(lr)[:, None], hyper[:, 1:]], 1)
        groups = [job.group for job in plan.jobs]
        which = self._cached("groups", groups, lambda: groups, torch.int64, device)
        lr, b1, b2, eps, wd = hyper.index_select(0, which).unbind(1)
        t = plan.steps.double()
        rate, rsqrt = lr / (1 - b1**t), (1 - b2**t).rsqrt()
        return torch.stack([1 - lr * wd, rate, rsqrt, eps, b1, 1 - b1, b2, 1 - b2], 1).float()

    def _keys(self, plan: Plan) -> Tensor | None:
        """(jobs, 2) int32 for stochastic rounding: seed with the parameter's place; step."""
        if self.rounding is None:
            return None
        places = {id(p): i for i, (p, _) in enumerate(self._params())}
        base = [base_key(self.rounding, places[id(job.whole)]) for job in plan.jobs]
        fixed = self._cached("keys", base, lambda: base, torch.int32, plan.steps.device)
        return torch.stack([fixed, plan.steps.int()], 1)

    def _is_right(self, job: Job) -> bool:
        """With KERNELS=auto: does the kernel do here what torch does?"""
        name = f"adamw{self.bits}bit"
        if self.rounding is not None:
            name += " rounded"
        make = partial(type(self), lr=0.1, rounding=self.rounding)
        return proof.trusted_steps(name, make, job.p, len(job.emas))

    def _run(
        self,
        plan: Plan,
        grads: list[Tensor],
        scalars: Tensor,
        keys: Tensor | None,
        control: Tensor,
    ) -> None:
        """One launch for all jobs of a kind, or in torch one job after the other."""
        jobs = plan.jobs
        if use_triton("adamw8bit", jobs[0].p, grads[0]) and self._is_right(jobs[0]):
            if not plan.launches:
                plan.launches.update(launch_tables(jobs, grads))
            # not read without rounding: any int32
            key_table = plan.steps.int() if keys is None else keys
            for (quant, P, G), (programs, emas, table, owner) in plan.launches.items():
                update_kernel[programs,](
                    table[1], owner[1], scalars, key_table, control, *codec(scalars.device),
                    P, G, quant, emas, ROWS, BLOCK, keys is not None, num_warps=WARPS,
                )  # fmt: skip
            return
        factors = control.tolist()
        if not factors[1]:
            return
        own_keys = repeat(None) if keys is None else keys.tolist()
        for job, g, row, key in zip(jobs, grads, scalars.tolist(), own_keys):
            first = 0
            for part in pieces(job, g):
                update_torch(*part, row, factors, key, first)
                first += part[0].numel()


class AdamW32bit(AdamW8bit):
    """torch.optim.AdamW, with clipping and EMAs in the one pass over memory that it makes."""

    bits = 32


def check_rounded(params: list[tuple[Tensor, int]]) -> None:
    """Stochastic rounding is of whole bf16 parameters."""
    for p, _ in params:
        if hasattr(p, "to_local"):
            raise ValueError("rounding with a sharded parameter: wanted whole ones.")
        if p.dtype != torch.bfloat16:
            raise ValueError(f"rounding with a parameter of {p.dtype}: wanted bf16.")


def in_layout(g: Tensor, p: Tensor) -> Tensor:
    """A gradient in p's layout: itself or a copy."""
    if g.is_sparse or p.dtype not in DTYPES or g.dtype not in DTYPES:
        raise ValueError(
            f"a parameter is {p.dtype}, its gradient {g.dtype}, {g.layout}: "
            "wanted dense fp32, fp16 or bf16."
        )
    if same_layout(g, p):
        return g
    return torch.empty_like(p, dtype=g.dtype).copy_(g)


