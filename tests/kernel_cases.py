"""What the tests of the kernels share: where they run, and how an error is judged.

A kernel's error against fp64 may be 1.5 times that of torch's own op in the same dtype. On a CPU
kernels run in Triton's interpreter; with TWINPATH_GPU=1 the same tests run them compiled, on a GPU.
"""

import os

import pytest
import torch

GPU = os.environ.get("TWINPATH_GPU") == "1"
if GPU:
    torch.set_default_device("cuda")
    torch.backends.cudnn.allow_tf32 = False
    pytest.importorskip("triton", reason="Triton is not installed")
else:
    # before triton: sets TRITON_INTERPRET
    pytest.importorskip("interpreter", reason="Triton is not installed")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# below this, both are rounding
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def error(value, exact):
    """Relative Frobenius error; root mean square where the truth is zero.

    (Such as the gradient of a softmax over one key.)
    """
    size = exact.numel() ** 0.5
    zero = exact.norm() < 1e-6 * size
    return float((value.double() - exact).norm() / (size if zero else exact.norm()))


def randn(*shape, generator):
    """The same numbers on any device."""
    return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device())


def check(ours, torchs, exact, dtype, what):
    allowed = max(1.5 * error(torchs, exact), FLOOR[dtype])
    assert error(ours, exact) <= allowed, f"{what}: {error(ours, exact):.2e} > {allowed:.2e}"


def far(shape, strides):
    """Zeros that span more than 2^31 elements, each stride still below it.

    Untouched pages take no memory.
    """
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    assert span > 2**31 > max(strides)
    try:
        return torch.empty(span, dtype=torch.float16).as_strided(shape, strides).zero_()
    except RuntimeError:
        pytest.skip(f"this machine does not reserve {2 * span / 1e9:.0f} GB of untouched memory")
