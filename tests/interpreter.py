"""Triton's interpreter, mended for bfloat16.

It keeps bf16 as uint16, so that dots multiply bit patterns and casts truncate. Import this before
any kernel. kernels/test_dispatch.py checks the mending, so that a new Triton that changes the
insides of its interpreter fails there, loudly.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when @triton.jit decorates

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def to_float(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def to_bf16(data: np.ndarray) -> np.ndarray:
    """Round to nearest even, as GPUs do: torch's own cast."""
    rounded = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def mend() -> None:
    cast, dot = Builder.cast_impl, Builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target in (tl.float32, tl.float64):
            return Handle(
                to_float(src.data).astype(np.float64 if target == tl.float64 else np.float32),
                target,
            )
        if source in (tl.float32, tl.float64) and target == tl.bfloat16:
            return Handle(to_bf16(src.data), target)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            Handle(to_float(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
            for t in (a, b)
        )
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    Builder.cast_impl, Builder.create_dot, Builder.create_fp_to_fp = (
        cast_impl,
        create_dot,
        create_fp_to_fp,
    )


mend()
