"""Which path an op takes: KERNELS=auto (Triton on a GPU, torch elsewhere) | triton | torch.

What was chosen is printed once per op.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the torch path is all there is

    class triton:  # enough for the kernel files to be read
        jit = staticmethod(lambda kernel: kernel)

    class tl:
        constexpr = None


MODES = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
inside_reference = False  # see reference()
inside_assumed = False  # see assumed()
interpret_in_auto = False  # for kernels.selfcheck and tests: else auto leaves a CPU to torch


class Unsupported(ValueError):
    """KERNELS asks for what does not exist or cannot run here; its message is for the user."""

    for_user = True


@lru_cache
def say(op: str, path: str) -> None:
    """One line on stderr per op and path, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: {op} runs on {path}", file=sys.stderr, flush=True)


def chosen() -> str:
    """The value of KERNELS; scripts call this before they begin, so that a wrong one ends them."""
    mode = os.environ.get("KERNELS", "auto")
    if mode not in MODES:
        options = ", ".join(MODES)
        raise Unsupported(f"KERNELS={mode!r} is not one of {options}.  Choose one of them.")
    return mode


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """The torch path, whatever KERNELS says, and without printing it.

    For checks that go along with the work, such as a checkpoint's probe.
    """
    global inside_reference
    before, inside_reference = inside_reference, True
    try:
        yield
    finally:
        inside_reference = before


@contextlib.contextmanager
def assumed() -> Iterator[None]:
    """As if the kernels ran here, for tensors without memory (FakeTensorMode): to count what a pass
    on a GPU would keep. Nothing is printed."""
    global inside_assumed
    before, inside_assumed = inside_assumed, True
    try:
        yield
    finally:
        inside_assumed = before


def forward_mode() -> bool:
    """Are tangents carried along (torch.func.jvp, forward_ad.dual_level)?

    The kernels have none, nor have torch's own group_norm in channels_last and SDPA: the formulas
    that each file begins with are taken then.
    """
    return forward_ad._current_level >= 0


def use_triton(op: str, *tensors: Tensor, unsupported: str = "", slower: str = "") -> bool:
    """Does this call run its Triton kernels?

    With KERNELS=triton every reason against it is an error, except `unsupported`: a case that
    the kernels leave to torch by design. `slower` names a case that auto leaves to torch.
    """
    if inside_reference:
        return False
    if inside_assumed:
        return not unsupported and not slower
    mode = chosen()
    problem = obstacle(mode, tensors)
    if problem and mode == "triton":
        raise Unsupported(
            f"KERNELS=triton, but {op} cannot run in Triton here: {problem}; "
            "wanted CUDA tensors of fp32, fp16 or bf16.  Use KERNELS=auto."
        )
    problem = problem or (slower if mode == "auto" else "") or unsupported
    if not torch.compiler.is_compiling():  # a print would break the graph
        say(op, f"torch ({problem})" if problem else "triton")
    return not problem


def obstacle(mode: str, tensors: tuple[Tensor, ...]) -> str:
    """Why Triton does not run here: the first reason that holds; "" if none does.

    The order matters: the later ones ask the GPU, which has to be there.
    """
    first = tensors[0]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if mode == "torch":
        return "it was switched off"
    if not hasattr(triton, "compile"):
        return "Triton is not installed"
    if not interpreted and not all(t.is_cuda for t in tensors):
        return f"tensors are on {listed(t.device.type for t in tensors)}"
    if len({t.device for t in tensors}) > 1:
        return f"tensors are on {listed(t.device for t in tensors)}"
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        return f"tensors are on {first.device}, not the current GPU"
    if first.is_cuda and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than sm_80"
    if any(t.dtype not in DTYPES for t in tensors):
        return f"dtype is {listed(t.dtype for t in tensors if t.dtype not in DTYPES)}"
    if interpreted and mode == "auto" and not interpret_in_auto:
        return "it would be interpreted"
    return ""


library = torch.library.Library("twinpath", "FRAGMENT")


def op(schema: str, function: Callable, fake: Callable) -> Callable:
    """torch.ops.twinpath.NAME of `schema`, for torch.compile a black box that `fake` describes.

    It has no gradient: an autograd.Function calls it. (torch.library.custom_op does the same and
    more, at three times the host time a call.)
    """
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"twinpath::{name}", fake, lib=library)
    return getattr(torch.ops.twinpath, name).default


def cdiv(n: int, size: int) -> int:
    """Pieces of `size` that cover n. (Triton's own function of this name takes microseconds.)"""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest one that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def listed(values: Iterable[Any]) -> str:
    """The different values: "cpu and cuda"."""
    return " and ".join(dict.fromkeys(map(str, values)))
