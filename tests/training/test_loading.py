"""No rank holds two copies of its network, not even while it loads one."""

import sys

import pytest

from benchmarks import loading


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_no_rank_of_two_ever_holds_two_copies():
    found = loading.copies("small")
    assert found["parameters"] > 35e6
    for part, most in found["copies"].items():
        # Whole once, while it is built; then its half, and in a step blocks that are gathered.
        assert 0.9 < most["load"] < 1.4, (part, most)
        assert most["step"] < 1.8, (part, most)
