"""Stochastic rounding to bf16: unbiased, a function of keys and element, one on both paths."""

import copy

import pytest
import torch
from kernel_cases import GPU

import triton
import triton.language as tl

from kernels.adamw8bit import AdamW8bit
from kernels.rounding import noise, round_up_by, signed, stochastic, stochastic_tile

# These tensors are on the CPU: the kernel is compared in the interpreter.
pytestmark = pytest.mark.skipif(GPU, reason="on CPU tensors, in the interpreter")
KEYS = (0xDEADBEEF, 0x12345678)
VALUES = (1.001, -1.001, 0.3, -3e-5, 1e-39, 255.7)


@pytest.mark.parametrize("value", VALUES)
def test_all_noises_together_are_unbiased(value):
    x = torch.full((65536,), value)
    mean = round_up_by(x, torch.arange(65536, dtype=torch.int32)).double().mean()
    assert mean == x[0].double()


@pytest.mark.parametrize("value", VALUES)
def test_the_mean_of_10000_is_within_3_standard_errors(value):
    x = torch.full((10_000,), value)
    got = stochastic(x, KEYS).double()
    low, high = got.min(), got.max()
    share = (x[0].double() - low) / (high - low)
    error = (high - low) * (share * (1 - share) / 10_000).sqrt()
    assert low < x[0] < high
    assert (got.mean() - x[0].double()).abs() <= 3 * error


def test_what_bf16_has_stays():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    x[:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    assert torch.equal(stochastic(x, KEYS).view(torch.int32), x.view(torch.int32))


def test_nan_stays_nan_whatever_its_bits():
    x = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_up_by(x, torch.full((3,), 65535, dtype=torch.int32)).isnan().all()


def test_a_part_draws_what_the_whole_draws():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stochastic(x, KEYS)[300:], stochastic(x[300:].clone(), KEYS, 300))


def test_each_key_changes_the_noise():
    element = torch.arange(10_000, dtype=torch.int32)
    own = noise(KEYS, element)
    for other in ((KEYS[0] + 1, KEYS[1]), (KEYS[0], KEYS[1] + 1)):
        draws = noise(other, element)
        both = torch.stack([own, draws]).double()
        assert (own == draws).double().mean() < 0.01
        assert torch.corrcoef(both)[0, 1].abs() < 4 / 100  # 4 standard errors


@triton.jit
def rounding_kernel(x, out, keys, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, stochastic_tile(tl.load(x + i), i, keys))


def test_the_kernel_writes_the_same_bits():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[:5] = torch.tensor([torch.inf, -torch.inf, 1e-40, -0.0, 3.4e38])
    out = torch.empty_like(x)
    keys = torch.tensor([signed(key) for key in KEYS], dtype=torch.int32)
    rounding_kernel[(1,)](x, out, keys, N=4096)
    wanted = stochastic(x, KEYS)
    assert torch.equal(out.view(torch.int32), wanted.view(torch.int32))


# ---- in AdamW8bit --------------------------------------------------------------------------------


def steps(ps, optimizer, numbers):
    """bf16 gradients that are a function of the step's number and the parameter's place."""
    for t in numbers:
        for place, p in enumerate(ps):
            g = torch.Generator().manual_seed(100 * t + place)
            p.grad = torch.randn(p.shape, generator=g).bfloat16()
        optimizer.step(clip=1.0)
    return ps


def weights():
    g = torch.Generator().manual_seed(0)
    shapes = ((70, 2000), (5000,), (64, 65))  # one is cut into chunks on a CPU
    return [torch.nn.Parameter(torch.randn(s, generator=g).bfloat16()) for s in shapes]


def test_adamw8bit_writes_the_same_bits_on_both_paths(monkeypatch):
    made = []
    for path in ("torch", "triton"):
        monkeypatch.setenv("KERNELS", path)
        ps = weights()
        made.append(steps(ps, AdamW8bit(ps, lr=1e-3, rounding=2**40 + 7), range(2)))
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_adamw8bit_resumes_exactly_and_a_copy_goes_on_alike(monkeypatch):
    monkeypatch.setenv("KERNELS", "torch")
    whole = weights()
    steps(whole, AdamW8bit(whole, rounding=3), range(4))
    ps = weights()
    optimizer = AdamW8bit(ps, rounding=3)
    steps(ps, optimizer, range(2))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    later = AdamW8bit(resumed, rounding=3)
    later.load_state_dict(optimizer.state_dict())
    steps(resumed, later, range(2, 4))
    copied, its_optimizer = copy.deepcopy((ps, optimizer))
    steps(copied, its_optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(whole, copied))


def test_updates_below_half_a_spacing_are_kept_on_average(monkeypatch):
    monkeypatch.setenv("KERNELS", "torch")
    moved = {}
    for rounding in (None, 0):
        p = torch.nn.Parameter(torch.ones(200, 1000, dtype=torch.bfloat16))
        optimizer = AdamW8bit([p], lr=1e-4, weight_decay=0, rounding=rounding)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[rounding] = 1 - p.detach().double().mean().item()
    assert moved[None] == 0
    # Each of 10 steps is 1e-4 of a spacing of 2^-8: sd of the mean 1.9e-3 · sqrt(0.0256·10 / 2e5)
    assert moved[0] == pytest.approx(1e-3, abs=2e-5)


def test_rounding_is_of_bf16_only():
    with pytest.raises(ValueError, match="float32: wanted bf16"):
        AdamW8bit([torch.nn.Parameter(torch.ones(3))], rounding=0)
    # One that comes later would be rounded to bf16's values, and keep its dtype.
    late = torch.nn.Parameter(torch.ones(3))
    late.grad = torch.ones(3)
    optimizer = AdamW8bit([torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], rounding=0)
    optimizer.add_param_group({"params": [late]})
    with pytest.raises(ValueError, match="float32: wanted bf16"):
        optimizer.step()
