"""What a node measures for the swarm is bounded by what users do, and by a rate."""

import pytest
import trio
from trio.testing import MockClock

from node.consensus.measuring_allowance import INITIAL_S, RATE, MeasuringAllowance


async def spend_all(allowance: MeasuringAllowance, hours: float, each_s: float = 4.0) -> float:
    """Measure whenever that is allowed, for some hours; return the seconds of computing that it took."""
    spent_s = 0.0
    for _ in range(int(hours * 360)):
        if allowance.is_left:
            allowance.spend(each_s)
            spent_s += each_s
        await trio.sleep(10)
    return spent_s


async def test_node_that_nobody_uses_stops_to_measure(virtual_clock: MockClock) -> None:
    allowance = MeasuringAllowance(0.1, lambda: 0.0)
    assert await spend_all(allowance, hours=10) == pytest.approx(INITIAL_S, abs=4.0)
    assert await spend_all(allowance, hours=10) == 0.0


async def test_measurements_take_a_share_of_what_users_compute_at_a_bounded_rate(virtual_clock: MockClock) -> None:
    assert await spend_all(MeasuringAllowance(0.1, lambda: 1000.0), hours=10) == pytest.approx(100 + INITIAL_S, abs=4.0)
    busy = await spend_all(MeasuringAllowance(0.1, lambda: 1e9), hours=10)
    assert busy == pytest.approx(600 * 2 + RATE.burst, abs=8.0)  # two seconds a minute


async def test_first_measurement_may_take_more_than_there_is_and_users_make_up_for_it(virtual_clock: MockClock) -> None:
    served_s = 0.0
    allowance = MeasuringAllowance(0.1, lambda: served_s)
    allowance.spend(1.0, is_done=False)  # it was cut off, for a user's job
    assert allowance.limit_s > 1e6
    allowance.spend(INITIAL_S + 99.0)
    await trio.sleep(24 * 3600)
    left = []
    for computed_s in (0.0, 990.0, 1050.0):
        served_s = computed_s
        left.append(allowance.is_left)
    assert left == [False, False, True]
    assert allowance.limit_s == pytest.approx(5.0)


async def test_node_without_exploration_measures_nothing(virtual_clock: MockClock) -> None:
    assert not MeasuringAllowance(0.0, lambda: 1e9).is_left
