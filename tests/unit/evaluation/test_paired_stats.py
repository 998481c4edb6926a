import math

import pytest

from node.evaluation.paired_stats import speedup_of


def test_speedup_has_students_interval() -> None:
    speedup = speedup_of([-math.log(2.0), -math.log(2.2), -math.log(1.8)])
    assert speedup.mean == pytest.approx(1.994, abs=0.001)
    # Student's t of two degrees of freedom: 4.303.
    assert [speedup.low, speedup.high] == pytest.approx([1.553, 2.559], abs=0.005)
    assert speedup.is_bounded


def test_interval_of_noise_includes_a_tie() -> None:
    speedup = speedup_of([0.1, -0.2, 0.05])
    assert speedup.low < 1 < speedup.high


def test_single_pair_has_no_interval() -> None:
    assert not speedup_of([-3.0]).is_bounded
