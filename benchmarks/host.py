"""What a training step costs the CPU that feeds a GPU, counted without one.

    python benchmarks/host.py            # prints a table, writes benchmarks/results/host.json

Time is in units: one tiny autograd op (a * a of one element) in the same process. Launches of
Triton are replaced by nothing, so that what is measured is this code and torch's; Triton's own
launcher, some ten microseconds a kernel, comes on top, as CUDA's does for torch's ops.

Launches of a step are counted on fake tensors: every op that is not a view, and for our ops the
kernels they launch. Autocast is the CPU's, which casts as CUDA's does but for normalisation, which
is fp32 here by itself.
"""

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)
os.environ["TRITON_INTERPRET"] = "1"  # kernels are objects here, and never launched

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness import record
from kernels import adamw8bit, attention, dispatch, groupnorm
from model import PRESETS, build
from training.casts import cast_together

NHWC = torch.channels_last
# Ops that launch nothing: views, allocations and questions.
QUIET = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach"),
    *("unsqueeze", "squeeze", "alias", "as_strided", "split", "split_with_sizes", "unbind"),
    *("reshape", "chunk", "empty", "empty_like", "new_empty", "empty_strided", "device"),
    *("promote_types", "is_same_size", "lift_fresh"),
}


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


def units_of_optimizer(model: str) -> dict[str, Any]:
    """Units of an AdamW8bit step with clipping and two EMAs on as many tensors as the model has."""
    os.environ["KERNELS"] = "triton"
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in build(PRESETS[model]).parameters()]
    # as many tensors of as many dimensions, but small ones: their size costs the host nothing
    params = []
    for shape in shapes:
        size = (64, 64, 1, 1)[: len(shape)]
        params.append(nn.Parameter(torch.randn(size)))
    for p in params:
        p.grad = torch.randn_like(p)
    emas = [([p.detach().clone() for p in params], beta) for beta in (0.9, 0.99)]
    optimizer, norm = adamw8bit.AdamW8bit(params), torch.tensor(1.0)
    step = seconds(lambda: optimizer.step(clip=1.0, norm=norm, ema=emas), 20)
    return {"units": step / unit(), "tensors": len(params)}


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
    if name.startswith("_foreach_"):
        return launches_of_a_list(args[0])
    if name == "attention_backward":
        q = args[1]
        whole = q.shape[2] <= attention.config("small", q.shape[3], q.dtype)[0]
        return 1 if whole else 3
    return 1


def launches_of_a_list(tensors: list[torch.Tensor]) -> int:
    """Launches of one op on many tensors: torch gives one at most 64 of them, and at most 320
    pieces of 2^16 elements (ATen's MultiTensorApply.cuh, for lists of two)."""
    launches, members, pieces = 1, 0, 0
    for tensor in tensors:
        if members == 64:
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
    """Launches of a forward and backward pass in bf16 as train.py has them, by op."""
    os.environ["KERNELS"] = path
    cfg = PRESETS[model]
    with torch.device("meta"):
        net = build(cfg)
    with FakeTensorMode():
        fake(net)
        x = torch.empty(batch, cfg.in_channels, side, side).contiguous(memory_format=NHWC)
        t = torch.empty(batch)
        with Launches() as ahead, torch.autocast("cpu", dtype=torch.bfloat16):
            y = cast_together(net)(x, t)
        with Launches() as back:
            y.float().square().mean().backward()
    total = {"forward": ahead.ops.total(), "backward": back.ops.total()}
    return {**total, "ops": dict((ahead.ops + back.ops).most_common(12))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy-281m-attn", choices=sorted(PRESETS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    silence()
    # fake tensors have no GPU to ask
    dispatch.obstacle = lambda mode, tensors: "" if mode != "torch" else "it was switched off"
    result = {
        "model": args.model,
        "unit_us": unit() * 1e6,
        "ops": units_of_ops(),
        "optimizer": units_of_optimizer(args.model),
        "launches": {path: launches(args.model, path) for path in ("triton", "torch")},
    }
    for name, row in result["ops"].items():
        print(f"{name:<26} forward {row['forward']:6.1f}  backward {row['backward']:6.1f} units")
    optimizer = result["optimizer"]
    print(f"AdamW8bit, {optimizer['tensors']} tensors: {optimizer['units']:.0f} units")
    for path, row in result["launches"].items():
        print(
            f"launches, {path}: forward {row['forward']}, backward {row['backward']}; {row['ops']}"
        )
    record.write("host", result)


if __name__ == "__main__":
    main()
