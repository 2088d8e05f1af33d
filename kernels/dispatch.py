"""Which path an op takes: KERNELS=auto (Triton on a GPU, torch elsewhere) | triton | torch. Said once per op."""

import os
import sys
from functools import lru_cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                          # no Triton for this platform: the torch path is all there is
    class triton:                            # enough for the kernel files to be read
        jit = staticmethod(lambda kernel: kernel)

    class tl:
        constexpr = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache
def say(op: str, path: str) -> None:
    """One line on stderr per op and path, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: {op} runs on {path}", file=sys.stderr, flush=True)


def use_triton(op: str, *tensors: Tensor, unsupported: str = "", slower: str = "") -> bool:
    """Does this call run its Triton kernels? KERNELS=triton makes every reason not to an error, but for a case that the
    kernels leave to torch by design (`unsupported`). `slower` names a case that auto leaves to torch."""
    mode = os.environ.get("KERNELS", "auto")
    if mode not in ("auto", "triton", "torch"):
        raise ValueError(f"KERNELS={mode!r} is not one of auto, triton, torch.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    problem = ("it was switched off" if mode == "torch" else "Triton is not installed" if not hasattr(triton, "compile") else
               f"tensors are on {tensors[0].device.type}" if not all(t.is_cuda for t in tensors) and not interpreted else
               f"tensors are on {tensors[0].device}, not the current GPU" if tensors[0].is_cuda and tensors[0].device.index != torch.cuda.current_device() else
               "the GPU is older than sm_80" if tensors[0].is_cuda and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0) else
               f"dtype is {tensors[0].dtype}" if any(t.dtype not in DTYPES for t in tensors) else
               "it would be interpreted" if interpreted and mode == "auto" else slower if mode == "auto" else "")
    if unsupported and not problem:
        problem, mode = unsupported, "auto"
    if problem and mode == "triton":
        raise ValueError(f"KERNELS=triton, but {op} cannot run in Triton here: {problem}; wanted CUDA tensors (or TRITON_INTERPRET=1) of "
                         "fp32, fp16 or bf16.  Use KERNELS=auto.")
    if not torch.compiler.is_compiling():                                       # a print would break the graph
        say(op, f"torch ({problem})" if problem else "triton")
    return not problem
