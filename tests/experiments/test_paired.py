"""Statistics of pairs, against scipy's own tests, tables of the noncentral t and curves that are
known."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments import boost, end_to_end, finetune
from experiments.paired import at_level, crossing, detectable, equivalent, holm, mean_over_log
from experiments.paired import paired

ONE = {0: 8.1, 1: 7.7, 2: 8.9, 3: 8.0, 4: 8.3}
OTHER = {0: 9.0, 1: 8.8, 2: 9.1, 3: 8.9, 4: 8.2}


def logs(by_seed: dict[int, float]) -> list[float]:
    return [math.log(value) for value in by_seed.values()]


def test_a_pair_test_is_scipys():
    pairs = paired(ONE, OTHER)
    peer = stats.ttest_rel(logs(ONE), logs(OTHER), alternative="less")
    assert pairs.p_below == pytest.approx(peer.pvalue, rel=1e-12)
    both = stats.ttest_rel(logs(ONE), logs(OTHER)).confidence_interval(0.9)
    assert pairs.interval == pytest.approx((both.low, both.high), rel=1e-12)
    assert pairs.p_above == pytest.approx(1 - pairs.p_below)


def test_an_arm_against_itself_is_exactly_nothing():
    pairs = paired(ONE, ONE)
    assert (pairs.mean, pairs.error, pairs.interval) == (0.0, 0.0, (0.0, 0.0))
    assert pairs.p_below == pairs.p_above == 0.5


def test_swapped_arms_flip_every_sign():
    pairs, back = paired(ONE, OTHER), paired(OTHER, ONE)
    assert back.by_seed == {seed: -value for seed, value in pairs.by_seed.items()}
    assert back.mean == -pairs.mean and back.p_below == pairs.p_above
    assert back.interval == (-pairs.interval[1], -pairs.interval[0])


def test_a_missing_seed_is_dropped_and_said():
    pairs = paired({0: 2.0, 1: 3.0, 2: 0.0}, {0: 1.0, 2: 1.0, 3: 4.0})
    assert pairs.by_seed == {0: math.log(2)}
    assert set(pairs.dropped) == {1, 2, 3} and "above 0" in pairs.dropped[2]


def test_too_few_pairs_say_nothing():
    assert math.isnan(paired({}, {}).mean)
    lonely = paired({0: 1.0}, {0: 9.0})
    assert lonely.p_below == 1.0 and lonely.interval == (-math.inf, math.inf)


def test_holm_is_holms():
    # 3 · 0.01, 2 · 0.03, and never less than the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_equivalence_is_within_five_percent_on_both_sides():
    assert equivalent((-0.048, 0.048), 0.05)
    assert not equivalent((-0.048, 0.05), 0.05)


@pytest.mark.parametrize("n, effect", [(3, 2.30), (4, 1.65), (5, 1.36), (6, 1.19), (8, 0.98)])
def test_the_visible_effect_is_that_of_the_tables(n, effect):
    assert detectable(n) == pytest.approx(effect, abs=0.006)


def test_the_visible_effect_is_found_four_times_in_five():
    draw = np.random.default_rng(0).normal(-detectable(5), 1, (20_000, 5))
    found = stats.ttest_1samp(draw, 0, axis=1, alternative="less").pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_crossing_finds_the_known_ratio():
    x = [500 * 2**k for k in range(7)]
    # c / √n is at c'’s last value after (c / c')² of its images.
    slow, fast = [3 * n**-0.5 for n in x], [2.1 * n**-0.5 for n in x]
    assert crossing(x, fast, slow[-1]) / x[-1] == pytest.approx(0.49)
    assert crossing(x, slow, fast[-1]) is None
    assert crossing(x, fast, 99.0) == x[0]


def test_a_mean_over_log_counts_every_doubling_alike():
    assert mean_over_log([1, 10, 100], [4.0, 4.0, 4.0]) == pytest.approx(4.0)
    # Linear in log x: the middle.
    assert mean_over_log([1, 10, 1_000], [0.0, 1.0, 3.0]) == pytest.approx(1.5)
    assert mean_over_log([7], [3.0]) == 3.0


def test_at_level_is_on_the_last_line_that_passes():
    assert at_level([0.1, 0.5, 0.3, 0.9], [1.0, 2.0, 3.0, 4.0], 0.4) == pytest.approx(3 + 1 / 6)
    assert at_level([0.1, 0.5], [1.0, 2.0], 0.9) == 2.0
    assert at_level([0.1, 0.5], [1.0, 2.0], 0.0) == 1.0


@pytest.mark.parametrize("main", [boost.main, end_to_end.main, finetune.main])
@pytest.mark.parametrize("seeds", [",", "1,2,1"])
def test_a_seed_counts_once_and_one_at_least(user, tmp_path, main, seeds):
    code, _, err = user(main, "--size", "dry", "--seeds", seeds, "--out", tmp_path / "out")
    assert code == 2 and len(err) == 1 and "--seeds" in err[0] and "none twice" in err[0], err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rates", [",", "0", "1e-3,1e-3"])
def test_a_rate_is_above_0_and_counts_once(user, tmp_path, rates):
    code, _, err = user(finetune.main, "--size", "dry", "--rates", rates, "--out", tmp_path / "out")
    assert code == 2 and len(err) == 1 and "--rates" in err[0], err
