"""One network's error along a trajectory: first order against Monte Carlo, and the sum of steps."""

import math

import pytest

from benchmarks.one_network import drawn, first_order, summed

N = 20_000  # of a standard deviation of n draws the standard error is 1 / sqrt(2n) of it: 0.5 %


def test_the_tangent_is_the_spread_of_networks_whatever_the_steps():
    for steps in (10, 50):
        along, cheap = first_order(steps)
        assert along == pytest.approx(drawn(steps, anew=False, n=N), rel=0.02)
        assert 1.3 * along < cheap < 2 * along


def test_the_published_sum_is_of_weights_drawn_anew_and_vanishes_with_the_steps():
    for steps in (10, 50):
        assert summed(steps) == pytest.approx(drawn(steps, anew=True, n=N), rel=0.02)
        assert summed(steps) < 0.4 * first_order(steps)[0]
    assert summed(400) / summed(100) == pytest.approx(math.sqrt(100 / 400), rel=0.02)
