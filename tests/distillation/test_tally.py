"""The log's sums, and the alarm."""

import pytest
import torch
from distilling import ALONE, stub

from distillation.tally import Tally
from distillation.teacher import taps
from distillation.timesteps import bins_of
from model import PRESETS


def test_the_alarm_rings_when_times_are_shifted_and_not_otherwise():
    teacher, blocks = stub(lambda: None), list(taps(PRESETS["nano"]))
    tally = lambda **how: Tally(blocks, ALONE, assessed=True, bins=10, **how)
    for counts, gradient, error, wanted in (
        ((30, 30, 30), (1, 1, 1), (1, 1, 1), ""),
        ((6, 6, 60), (1, 1, 1), (1, 1, 1), "weighting"),
        ((30, 30, 30), (9, 1, 1), (1, 1, 1), "weighting"),
        ((30, 30, 30), (1, 1, 9), (1, 1, 9), "target"),
    ):
        own = tally()
        for third, n in enumerate(counts):
            t = teacher.time(torch.full((n,), 166 + 333 * third))
            sizes = (
                torch.full((n,), float(gradient[third])),
                torch.full((n,), float(error[third])),
            )
            own.add_times(t, bins_of(teacher.row(t), 3), *sizes)
        row = own.report()
        share = torch.tensor([n * g for n, g in zip(counts, gradient)], dtype=torch.float64)
        assert row["alarm"] == wanted and sum(row["t_drawn"]) == sum(counts)
        assert row["gradient_by_third"] == pytest.approx((share / share.sum()).tolist())
        assert own.sums["thirds"].sum() == 0
    progressive = tally(alarms=False)  # its times are its steps
    t = teacher.time(torch.full((8,), 999))
    progressive.add_times(t, torch.full((8,), 2), torch.ones(8), torch.ones(8))
    assert progressive.report()["alarm"] == ""
    progressive.load_state_dict({"alarmed/": torch.tensor(True)})
    assert progressive.alarmed  # a warning is not repeated on resume
