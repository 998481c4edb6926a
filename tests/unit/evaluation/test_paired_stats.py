import math

import pytest

from node.evaluation.paired_stats import speedup_of


def test_a_speedup_is_told_with_its_interval() -> None:
    speedup = speedup_of([-math.log(2.0), -math.log(2.2), -math.log(1.8)])
    assert speedup.mean == pytest.approx(1.994, abs=0.001)
    # Student's t of two degrees of freedom: 4.303.
    assert [speedup.low, speedup.high] == pytest.approx([1.553, 2.559], abs=0.005)
    assert speedup.excludes_tie


def test_one_pair_proves_nothing() -> None:
    assert not speedup_of([-3.0]).excludes_tie
    assert not speedup_of([-3.0]).is_bounded
    assert not speedup_of([0.1, -0.2, 0.05]).excludes_tie
