"""The phases of an epoch as they are told to users."""

from itertools import pairwise

from selector.consensus.clock import COMMIT_UNTIL, LIST_UNTIL, EpochClock


def test_phases_end_where_the_clock_changes_them() -> None:
    clock = EpochClock(epoch_s=50.0)
    ends = clock.phase_ends_s()
    begins_s = clock.starts_s(7)
    for phase, following in zip(ends, [*list(ends)[1:], "measure"], strict=True):
        assert clock.phase_at(begins_s + ends[phase] - 0.01) == phase
        assert clock.phase_at(begins_s + ends[phase] + 0.01) == following


def test_each_turn_is_as_long_as_a_message_may_take_and_ends_in_the_epoch() -> None:
    clock = EpochClock(epoch_s=100.0)
    delivery_s = (LIST_UNTIL - COMMIT_UNTIL) * 100.0
    turns_s = [clock.proposes_s(0, turn) for turn in range(clock.turns() + 1)]
    assert all(later - sooner > delivery_s - 1e-9 for sooner, later in pairwise(turns_s))
    assert abs(turns_s[-1] - clock.starts_s(1)) < 1e-9
