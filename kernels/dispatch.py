"""Which path an op takes: KERNELS=auto (Triton on a GPU, torch elsewhere) | triton | torch. Said once per op."""

import contextlib
import os
import sys
from functools import lru_cache
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor

from harness.cli import UserError, closest

try:
    import triton
    import triton.language as tl
except ImportError:                          # no Triton for this platform: the torch path is all there is
    class triton:                            # enough for the kernel files to be read
        jit = staticmethod(lambda kernel: kernel)

    class tl:
        constexpr = None

MODES = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
on_the_side = False                          # see reference()


@lru_cache
def say(op: str, path: str) -> None:
    """One line on stderr per op and path, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: {op} runs on {path}", file=sys.stderr, flush=True)


def said(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(map(str, values)))


def chosen() -> str:
    """KERNELS, which scripts look at before they begin."""
    mode = os.environ.get("KERNELS", "auto")
    if mode not in MODES:
        raise UserError(f"KERNELS={mode!r} is not one of {', '.join(MODES)}.{closest(mode, MODES)}")
    return mode


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """The torch path, whatever KERNELS says and unsaid: for checks beside the work, such as a checkpoint's probe."""
    global on_the_side
    before, on_the_side = on_the_side, True
    try:
        yield
    finally:
        on_the_side = before


def use_triton(op: str, *tensors: Tensor, unsupported: str = "", slower: str = "") -> bool:
    """Does this call run its Triton kernels? KERNELS=triton makes every reason not to an error, but for a case that the
    kernels leave to torch by design (`unsupported`). `slower` names a case that auto leaves to torch."""
    if on_the_side:
        return False
    mode = chosen()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    problem = ("it was switched off" if mode == "torch" else "Triton is not installed" if not hasattr(triton, "compile") else
               f"tensors are on {said(t.device.type for t in tensors)}" if not interpreted and not all(t.is_cuda for t in tensors) else
               f"tensors are on {said(t.device for t in tensors)}" if len({t.device for t in tensors}) > 1 else
               f"tensors are on {tensors[0].device}, not the current GPU" if tensors[0].is_cuda and tensors[0].device.index != torch.cuda.current_device() else
               "the GPU is older than sm_80" if tensors[0].is_cuda and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0) else
               f"dtype is {said(t.dtype for t in tensors if t.dtype not in DTYPES)}" if any(t.dtype not in DTYPES for t in tensors) else
               "it would be interpreted" if interpreted and mode == "auto" else slower if mode == "auto" else "")
    if unsupported and not problem:
        problem, mode = unsupported, "auto"
    if problem and mode == "triton":
        raise UserError(f"KERNELS=triton, but {op} cannot run in Triton here: {problem}; wanted CUDA tensors of fp32, fp16 or bf16.  "
                        "Use KERNELS=auto.")
    if not torch.compiler.is_compiling():                                       # a print would break the graph
        say(op, f"torch ({problem})" if problem else "triton")
    return not problem
