"""An epoch set forgets nothing, whatever it is given."""

from selector.consensus.epoch_set import MAX_RANGES, EpochSet, SignedEpochs


def test_set_stays_small_and_forgets_no_epoch() -> None:
    epochs = [*range(0, 30 * MAX_RANGES, 15), 100_000]
    found = EpochSet()
    found.add(*epochs)
    assert len(found.ranges) == MAX_RANGES
    assert all(epoch in found for epoch in epochs)
    assert 99_999 not in found, "those far from all others are not joined with them"


def test_neighbouring_epochs_are_one_range() -> None:
    found = EpochSet([(3, 4)])
    found.add(5, 1, 2, 9)
    assert found.ranges == ((1, 5), (9, 9))


def test_vote_forbids_its_epoch_alone_wherever_the_clock_goes() -> None:
    signed = SignedEpochs()
    signed.voted |= {5, 900}
    for oldest in (4, 8, 950, 3):
        signed.prune(oldest)
        assert [epoch for epoch in (4, 5, 6, 899, 900, 901) if not signed.may_vote(epoch)] == [5, 900]
