"""The phases of an epoch as they are told to users."""

from selector.consensus.clock import EpochClock


def test_phases_end_where_the_clock_changes_them() -> None:
    clock = EpochClock(epoch_s=50.0)
    ends = clock.phase_ends_s()
    begins_s = clock.starts_s(7)
    for phase, following in zip(ends, [*list(ends)[1:], "measure"], strict=True):
        assert clock.phase_at(begins_s + ends[phase] - 0.01) == phase
        assert clock.phase_at(begins_s + ends[phase] + 0.01) == following
