"""Stochastic rounding to bf16: unbiased, a function of keys and element, one on both paths."""

from tests import interpreter  # noqa: F401, I001  before any kernel

import pytest
import torch
import triton
import triton.language as tl

from kernels.rounding import noise, round_up_by, stochastic, stochastic_tile

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
def rounding_kernel(x, out, key0, key1, N: tl.constexpr):
    i = tl.arange(0, N)
    rounded = stochastic_tile(tl.load(x + i), i, key0.to(tl.uint32), key1.to(tl.uint32))
    tl.store(out + i, rounded)


def test_the_kernel_writes_the_same_bits():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[:5] = torch.tensor([torch.inf, -torch.inf, 1e-40, -0.0, 3.4e38])
    out = torch.empty_like(x)
    rounding_kernel[(1,)](x, out, *KEYS, N=4096)
    wanted = stochastic(x, KEYS)
    assert torch.equal(out.view(torch.int32), wanted.view(torch.int32))
