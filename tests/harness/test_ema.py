"""Power-function averages of the weights."""

from types import SimpleNamespace

import pytest
import torch

from harness.cli import UserError
from harness.ema import EMA, check_averages, check_widths


def test_power_ema_has_edm2s_exponents_and_their_closed_form():
    net = torch.nn.Linear(1, 1, bias=False).double()
    ema = EMA(net, (0.05, 0.10))
    assert ema.exponents == pytest.approx({"0.050": 17.97, "0.100": 7.94}, abs=0.01)
    for seen in range(10, 100_001, 10):
        net.weight.data.fill_(seen / 100_000)  # a ramp: its power average is (g+1)/(g+2)
        ema.update(net, seen, 10)
    for key, exponent in ema.exponents.items():
        assert ema.weights[key]["weight"].item() == pytest.approx(
            exponent / (exponent + 1), abs=1e-3
        )


@pytest.mark.parametrize("widths", [(0.05, 0.0501), (0.5,), (0.001,), (float("nan"),)])
def test_widths_are_shares_of_a_run_and_differ_in_their_files_names(widths):
    with pytest.raises(UserError, match="wanted different widths from 0.01 to 0.25"):
        check_widths(widths)
    check_widths((0.05, 0.1))


@pytest.mark.parametrize("every", [1, 3])
def test_an_average_of_every_third_network_has_its_closed_form(every):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    ema, seen, kept = EMA(net, (0.05, 0.1), every, "cpu"), 0, []
    for step in range(1, 20):
        for p in net.parameters():
            p.data += torch.randn_like(p)
        seen += 8
        ema.update(net, seen, 8)
        if step % every == 0:
            kept.append(net.weight.detach().clone())
    m = len(kept)
    for key, e in ema.exponents.items():
        # Of the j-th of m the weight is (j/m)^e - ((j-1)/m)^e: the power average of their steps.
        shares = [((j + 1) / m) ** e - (j / m) ** e for j in range(m)]
        wanted = sum(share * w for share, w in zip(shares, kept))
        assert sum(shares) == pytest.approx(1)
        assert torch.allclose(ema.weights[key]["weight"], wanted, atol=1e-12)


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_an_average_of_bf16_weights_is_in_fp32(device):
    """What bf16 could not tell from 1: the mean of 1 and 1 + 1/128, near the second one."""
    net = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    ema = EMA(net, (0.1,), every=2, device=device)
    for seen, value in ((16, 1.0), (32, 1 + 1 / 128)):
        net.weight.data.fill_(value)
        ema.update(net, seen, 8)
    (average,) = ema.weights["0.100"].values()
    share = 0.5 ** ema.exponents["0.100"]
    assert average.dtype == torch.float32
    assert float(average) == pytest.approx(1 + (1 - share) / 128, abs=1e-7) != 1 + 1 / 128


def test_averages_that_would_never_be_made_are_refused():
    cfg = SimpleNamespace(ema=(0.05,), ema_every=10, batch=8, images=72)
    with pytest.raises(UserError, match="--ema-every 10: a run of --images 72 takes 9 steps of 8,"):
        check_averages(cfg)
    cfg.images = 73  # the last step is a whole one, too
    check_averages(cfg)
