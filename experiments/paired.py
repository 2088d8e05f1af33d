"""Statistics of a few paired numbers. The unit is the seed: what it shares (first weights, order of
images, noise, times, held-out images, sampling seeds) cancels in the difference of two arms.

    d = paired({0: 8.1, 1: 7.9}, {0: 9.0, 1: 8.8})    # log ratios of the seeds that both have
    d.mean, d.error, d.p_below, d.interval            # one-sided t, 90% interval
    holm([0.01, 0.04, 0.03])                          # adjusted for being three
    crossing([10, 20, 40], [3.0, 2.0, 1.0], 1.5)      # where a falling curve is down to 1.5

What comes out of n seeds is Student's t with n - 1 degrees of freedom: "two standard errors" would
be wrong in 9% of the cases at n = 3.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from scipy.special import nctdtrinc, stdtr, stdtrit

from harness.cli import UserError, shown

ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Differences of two arms by seed: of logarithms, so that a mean of -0.05 is 5% less."""

    by_seed: dict[int, float]
    # Seeds of which one arm has no number, and why.
    dropped: dict[int, str]

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """nan of no pair."""
        return statistics.fmean(self.by_seed.values()) if self.n else math.nan

    @property
    def sd(self) -> float:
        """Of the differences; nan of fewer than two."""
        return statistics.stdev(self.by_seed.values()) if self.n > 1 else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.sd / math.sqrt(self.n) if self.n else math.nan

    @property
    def p_below(self) -> float:
        """Chance of a mean this low if there is no difference: one-sided paired t. 1 of fewer than
        two pairs."""
        return p_value(self.mean, self.error, self.n)

    @property
    def p_above(self) -> float:
        """The same of a mean this high."""
        return p_value(-self.mean, self.error, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """90%: what two one-sided tests at 5% leave."""
        if self.n < 2:
            return -math.inf, math.inf
        half = stdtrit(self.n - 1, 1 - ALPHA) * self.error
        return self.mean - half, self.mean + half

    @property
    def visible(self) -> float:
        """The smallest difference that these seeds would have shown, see detectable()."""
        return detectable(self.n) * self.sd if self.n > 1 else math.inf


def check_each(flag: str, values: Sequence[int | float]) -> None:
    """Refuse a flag that names none, or one twice, which would count as two."""
    if not values or len(set(values)) < len(values):
        got = f"{flag} {shown(tuple(values))}".strip()
        raise UserError(got, wanted="one at least, and none twice", do="Name each once.")


def p_value(mean: float, error: float, n: int) -> float:
    """P(T <= mean / error), T of n - 1 degrees of freedom."""
    if n < 2:
        return 1.0
    if error == 0:
        return 0.5 if mean == 0 else float(mean > 0)
    return float(stdtr(n - 1, mean / error))


def paired(one: Mapping[int, float | None], other: Mapping[int, float | None]) -> Paired:
    """log(one / other) of every seed that both have as a number above 0; the others are named."""
    by_seed, dropped = {}, {}
    for seed in sorted({*one, *other}):
        pair = (one.get(seed), other.get(seed))
        if None in pair:
            dropped[seed] = "one arm has no number"
        elif not all(math.isfinite(value) and value > 0 for value in pair):
            dropped[seed] = "a ratio needs numbers above 0, got {:.3g} and {:.3g}".format(*pair)
        else:
            # Not the logarithm of the ratio: this one is exactly its own opposite.
            by_seed[seed] = math.log(pair[0]) - math.log(pair[1])
    return Paired(by_seed, dropped)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of each (Holm 1979): all tests together err at the rate at which one does."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def equivalent(interval: tuple[float, float], margin: float) -> bool:
    """Does a 90% interval of log ratios lie within ± margin (a share, 0.05)?"""
    low, high = interval
    return -math.log1p(margin) <= low and high <= math.log1p(margin)


@lru_cache
def detectable(n: int) -> float:
    """The true difference, in standard deviations of the pairs, that a one-sided t test at ALPHA
    finds with the chance POWER: n = 3 2.30, 5 1.36, 8 0.98. From the noncentral t."""
    if n < 2:
        return math.inf
    line = float(stdtrit(n - 1, 1 - ALPHA))
    return float(nctdtrinc(n - 1, 1 - POWER, line)) / math.sqrt(n)


# ---- curves --------------------------------------------------------------------------------------


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """The first x > 0 at which y > 0 is down to a level, interpolated in both logarithms; None =
    never."""
    before = None
    for here in zip(x, y):
        if here[1] <= level:
            return here[0] if before is None else between(before, here, level)
        before = here
    return None


def between(left: tuple[float, float], right: tuple[float, float], level: float) -> float:
    """The x between two points at which the line through their logarithms meets a level."""
    share = math.log(left[1] / level) / math.log(left[1] / right[1])
    return math.exp(math.log(left[0]) + share * math.log(right[0] / left[0]))


def mean_over_log(x: Sequence[float], y: Sequence[float]) -> float:
    """The area under y over log x by trapezoids, divided by the length of log x: a mean of y in
    which every doubling of x counts alike."""
    if len(x) == 1:
        return y[0]
    area = 0.0
    for i in range(1, len(x)):
        area += math.log(x[i] / x[i - 1]) * (y[i] + y[i - 1]) / 2
    return area / math.log(x[-1] / x[0])


def at_level(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """y where the line through the points in their order last passes x = level; if it never does,
    y of the point whose x is nearest."""
    for i in reversed(range(1, len(x))):
        low, high = sorted((x[i - 1], x[i]))
        if low <= level <= high and low < high:
            return y[i - 1] + (level - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])
    nearest = min(range(len(x)), key=lambda i: abs(x[i] - level))
    return y[nearest]
