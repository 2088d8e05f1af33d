"""What a training step costs the CPU that feeds a GPU, counted without one.

    python benchmarks/host.py [--model NAME] [--out FILE]    # writes benchmarks/results/host.json

Time is in units: one tiny autograd op (a * a of one element) in the same process. Launches of
Triton are replaced by nothing, so that what is measured is this code and torch's; Triton's own
launcher, some ten microseconds a kernel, comes on top, as CUDA's does for torch's ops.

A whole step (loss, backward, norm of the gradients, AdamW8bit with clipping and two EMAs) is that
of a miniature: the same modules with an eighth of the channels, one image of 8×8. What would be
large there (convolutions, products of matrices, casts and norms of all weights) allocates its
result and computes nothing; what is left is computed, on tensors so small that it hardly counts.
Loading images and writing the log are left out.

Launches are counted on fake tensors of the true sizes: every op that is not a view, and for our ops
the kernels they launch. Autocast is the CPU's, which casts as CUDA's does but for normalisation,
which is fp32 here by itself. Those of the optimizer are counted on as many small tensors.
"""

import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path[0] = str(Path(__file__).parent.parent)
os.environ["TRITON_INTERPRET"] = "1"  # kernels are objects here, and never launched

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness import record
from harness.cli import cli, flag, parse
from kernels import adamw8bit, attention, dispatch, groupnorm
from model import PRESETS, UNetConfig, build
from objectives import make_objective
from training.casts import cast_together

NHWC = torch.channels_last
# Ops that launch nothing: views, allocations and questions.
QUIET = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach"),
    *("unsqueeze", "squeeze", "alias", "as_strided", "split", "split_with_sizes", "unbind"),
    *("reshape", "chunk", "empty", "empty_like", "new_empty", "empty_strided", "device"),
    *("promote_types", "is_same_size", "lift_fresh"),
}


@dataclass(frozen=True)
class Config:
    model: Literal[*(name for name, cfg in PRESETS.items() if isinstance(cfg, UNetConfig))] = flag(
        "toy-281m-attn", "network"
    )
    out: str = flag(
        "", "JSON file to write; default benchmarks/results/host.json", writes=".json"
    )


class Silent:
    """A kernel that counts its launches and does nothing."""

    launches = 0

    def __getitem__(self, grid: Any) -> Callable:
        def launch(*args: Any, **options: Any) -> None:
            Silent.launches += 1

        return launch


def silence() -> None:
    """Replace the kernels of all ops."""
    for module in (groupnorm, attention, adamw8bit):
        for name in vars(module):
            if name.endswith("_kernel"):
                setattr(module, name, Silent())


# ---- time ----------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], calls: int, repeats: int = 15) -> float:
    """The median of `repeats` means over `calls` calls."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def unit() -> float:
    """Seconds of one tiny autograd op."""
    one = torch.ones(1, requires_grad=True)
    return seconds(lambda: one * one, 3000)


def timed(path: str, forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> dict:
    """Units of a forward pass, and of the backward pass after it."""
    os.environ["KERNELS"] = path
    gradient = torch.ones_like(forward())
    tiny = unit()
    ahead = seconds(forward, 200)
    both = seconds(lambda: torch.autograd.grad(forward(), leaves, gradient), 100)
    return {"forward": ahead / tiny, "backward": (both - ahead) / tiny}


def units_of_ops() -> dict[str, dict]:
    """Units of GroupNorm + FiLM + SiLU and of attention on the smallest tensors, by path."""
    x = torch.randn(2, 64, 2, 2).contiguous(memory_format=NHWC).requires_grad_()
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    film = torch.randn(2, 128, requires_grad=True).chunk(2, 1)
    q = torch.randn(1, 1, 4, 32).bfloat16().requires_grad_()

    def norm() -> torch.Tensor:
        return groupnorm.group_norm_silu(x, weight, bias, 32, *film)

    def attend() -> torch.Tensor:
        return attention.attention(q, q, q)

    table = {}
    for path in ("triton", "torch"):
        table[f"group_norm_silu {path}"] = timed(path, norm, [x, weight, bias, *film])
        table[f"attention {path}"] = timed(path, attend, [q])
    return table


def optimizer_step(model: str) -> tuple[Callable[[], Any], int]:
    """An AdamW8bit step with clipping and two EMAs, and on how many tensors.

    As many as the model has and of as many dimensions, but small ones: their size costs the host
    nothing.
    """
    os.environ["KERNELS"] = "triton"
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in build(PRESETS[model]).parameters()]
    params = []
    for shape in shapes:
        size = (64, 64, 1, 1)[: len(shape)]
        params.append(nn.Parameter(torch.randn(size)))
    for p in params:
        p.grad = torch.randn_like(p)
    emas = [([p.detach().clone() for p in params], beta) for beta in (0.9, 0.99)]
    optimizer, norm = adamw8bit.AdamW8bit(params), torch.tensor(1.0)
    return partial(optimizer.step, clip=1.0, norm=norm, ema=emas), len(params)


def units_of_optimizer(model: str) -> dict[str, Any]:
    step, tensors = optimizer_step(model)
    return {"units": seconds(step, 20) / unit(), "tensors": tensors}


def miniature(model: str) -> nn.Module:
    """The model's modules with the fewest channels that 32 groups allow, in channels_last."""
    cfg = replace(PRESETS[model], model_channels=32, num_head_channels=32)
    return build(cfg).to(memory_format=NHWC)


def compute_nothing() -> torch.library.Library:
    """From here on, ops that are large in a miniature's step only allocate their results."""

    def convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
        sides = [
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(x.shape[2:], padding, w.shape[2:], stride)
        ]
        return x.new_empty(len(x), len(w), *sides).contiguous(memory_format=NHWC)

    def convolution_backward(dy, x, w, bias_sizes, *how):
        return torch.empty_like(x), torch.empty_like(w), w.new_empty(bias_sizes or 0)

    def mm(a, b):
        return a.new_empty(len(a), b.shape[1])

    def addmm(bias, a, b, *, beta=1, alpha=1):
        return a.new_empty(len(a), b.shape[1])

    def _foreach_copy_(to, source, non_blocking=False):
        pass

    def _foreach_norm(tensors, ord=2, dtype=None):
        return list(tensors[0].new_zeros(len(tensors)).unbind())

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overriding torch's own, which is what is wanted
        for function in (convolution, convolution_backward, mm, addmm):
            library.impl(function.__name__, function, "CPU")
        library.impl("_foreach_copy_", _foreach_copy_, "CPU")
        library.impl("_foreach_norm.Scalar", _foreach_norm, "CPU")
    return library


def units_of_step(model: str, path: str) -> dict[str, float]:
    """Units of a whole step of the miniature, and of its parts.

    AdamW8bit keeps its tables where every gradient lies where it lay a step ago, as CUDA's
    allocator places them once a run has settled; where they have moved, it makes them anew.
    """
    os.environ["KERNELS"] = path
    net, objective = miniature(model), make_objective("fm")
    called, params = cast_together(net), list(net.parameters())
    x0, eps = torch.randn(2, 1, net.cfg.in_channels, 8, 8)
    t = torch.tensor([0.5])
    optimizer = adamw8bit.AdamW8bit(params)
    emas = [([p.detach().clone() for p in params], beta) for beta in (0.9, 0.99)]
    places: list[list[torch.Tensor]] = []

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return objective.loss(called, x0, eps=eps, t=t).loss

    def both_passes() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()

    def norm() -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in params], foreach=True)

    def update() -> None:
        optimizer.step(clip=1.0, norm=torch.ones(()), ema=emas)

    def move() -> None:
        places.reverse()
        for p, gradient in zip(params, places[0]):
            p.grad = gradient

    # The same norms are small enough for one program as in the model: there are 16 times fewer
    # pixels here, and eight times fewer channels a group.
    before, groupnorm.SMALL = groupnorm.SMALL, groupnorm.SMALL // 128
    tiny = unit()
    both = seconds(both_passes, 3) / tiny
    ahead = seconds(loss, 3) / tiny
    units = {"forward": ahead, "backward": both - ahead, "norm": seconds(norm, 3) / tiny}
    groupnorm.SMALL = before
    os.environ["KERNELS"] = "triton"  # torch's path of the optimizer is none for a GPU
    gradients = [p.grad for p in params]
    places += [gradients, [g.clone() for g in gradients]]
    units["optimizer"] = seconds(update, 10) / tiny
    moves = seconds(move, 10)
    moved = seconds(lambda: (move(), update()), 3) - moves
    return {**units, "step": sum(units.values()), "optimizer, moved": moved / tiny}


# ---- launches ------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts what a GPU would be asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in QUIET:
            self.ops[name] += kernels_of(name, args)
        return func(*args, **(kwargs or {}))


def kernels_of(name: str, args: tuple) -> int:
    """Launches of one op."""
    if name == "group_norm_silu":
        x, groups = args[0], args[5]
        small = groupnorm.is_small(x.shape[2] * x.shape[3], x.shape[1] // groups)
        return 1 if small else 3
    if name == "group_norm_silu_backward":
        x, mean = args[1], args[7]
        small = groupnorm.is_small(x.shape[2] * x.shape[3], x.shape[1] // mean.shape[1])
        return 2 if small else 4
    if name == "_foreach_norm":  # one of one value a tensor sums the pieces up
        return launches_of_a_list(args[0], 110) + 1
    if name.startswith("_foreach_"):
        return launches_of_a_list(args[0])
    if name == "attention_backward":
        q = args[1]
        whole = q.shape[2] <= attention.largest(q.shape[3], q.dtype)
        return 1 if whole else 3
    return 1


def launches_of_a_list(tensors: list[torch.Tensor], most: int = 64) -> int:
    """Launches of one op on many tensors: torch gives one at most 64 of them, and at most 320
    pieces of 2^16 elements (ATen's MultiTensorApply.cuh, for lists of two; of one list, 110)."""
    launches, members, pieces = 1, 0, 0
    for tensor in tensors:
        if members == most:
            launches, members, pieces = launches + 1, 0, 0
        members += 1
        pieces += -(-tensor.numel() // 2**16)
        while pieces > 320:
            launches, members, pieces = launches + 1, 1, pieces - 320
    return launches


def fake(net: nn.Module) -> None:
    """Give a network of meta tensors fake ones, 4-D ones in channels_last."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                form = NHWC if p.ndim == 4 else torch.contiguous_format
                q = torch.empty(p.shape).contiguous(memory_format=form)
                module._parameters[name] = nn.Parameter(q)
        for name, b in module._buffers.items():
            module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def launches(model: str, path: str, batch: int = 64, side: int = 32) -> dict[str, Any]:
    """Launches of a step in bf16 as train.py has them, by part and by op."""
    os.environ["KERNELS"] = path
    cfg = PRESETS[model]
    with torch.device("meta"):
        net = build(cfg)
    with FakeTensorMode():
        fake(net)
        x0, eps = torch.empty(2, batch, cfg.in_channels, side, side)
        x0 = x0.contiguous(memory_format=NHWC)
        with Launches() as ahead, torch.autocast("cpu", dtype=torch.bfloat16):
            loss = make_objective("fm").loss(
                cast_together(net), x0, eps=eps.contiguous(memory_format=NHWC), t=torch.empty(batch)
            )
        with Launches() as back:
            loss.loss.backward()
        gradients = [p.grad for p in net.parameters()]
        with Launches() as norm:
            torch.nn.utils.get_total_norm(gradients, foreach=True)
    parts = {"forward": ahead, "backward": back, "norm": norm}
    total = {part: counted.ops.total() for part, counted in parts.items()}
    total["optimizer"] = launches_of_optimizer(model)
    ops = sum((counted.ops for counted in parts.values()), Counter())
    return {**total, "step": sum(total.values()), "ops": dict(ops.most_common(12))}


def launches_of_optimizer(model: str) -> int:
    step, _ = optimizer_step(model)
    step()  # the first one makes tables
    Silent.launches = 0
    with Launches() as counted:
        step()
    return counted.ops.total() + Silent.launches


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    torch.set_num_threads(1)
    silence()
    # The torch path as on a GPU, which needs neither of a CPU's helps.
    groupnorm.near_zero = lambda x, groups: x
    attention.FEW_KEYS = 0
    # fake tensors have no GPU to ask
    dispatch.obstacle = lambda mode, tensors: "" if mode != "torch" else "it was switched off"
    paths = ("triton", "torch")
    result = {
        "model": cfg.model,
        "unit_us": unit() * 1e6,
        "ops": units_of_ops(),
        "optimizer": units_of_optimizer(cfg.model),
        "launches": {path: launches(cfg.model, path) for path in paths},
    }
    library = compute_nothing()  # for as long as it is kept
    result["step of a miniature"] = {path: units_of_step(cfg.model, path) for path in paths}
    del library
    say(result)
    if cfg.out:
        record.save(Path(cfg.out), {**record.context(), **result})
    else:
        record.write("host", result)


def say(result: dict[str, Any]) -> None:
    for name, row in result["ops"].items():
        print(f"{name:<26} forward {row['forward']:6.1f}  backward {row['backward']:6.1f} units")
    optimizer = result["optimizer"]
    print(f"AdamW8bit, {optimizer['tensors']} tensors: {optimizer['units']:.0f} units")
    for path, row in result["step of a miniature"].items():
        parts = ", ".join(f"{part} {units:.0f}" for part, units in row.items())
        print(f"units of a miniature, {path}: {parts}")
    for path, row in result["launches"].items():
        parts = ", ".join(f"{part} {n}" for part, n in row.items() if part != "ops")
        print(f"launches, {path}: {parts}; {row['ops']}")


if __name__ == "__main__":
    cli(main)
