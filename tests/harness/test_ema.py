"""Power-function averages of the weights."""

import pytest
import torch

from harness.cli import UserError
from harness.ema import EMA, check_widths


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
