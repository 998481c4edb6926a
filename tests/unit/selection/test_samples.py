"""Whoever floods the history, what this node and the members of the consensus measured is still learned from."""

from dataclasses import replace
from pathlib import Path

import pytest

from node.selection import samples
from node.selection.samples import read_samples, sample_of
from node.storage.database import open_database
from node.storage.history import HistoryStore
from protocol.measurements import Objective, ObservationKind
from protocol.messages import SessionStatistics
from protocol.observations import BUCKET_S, SignedObservation, sign_observation
from tests.support.observations import NOW_S, key, observation, peer, signed

OWN, MEMBER, FLOODER = 0, 1, 2
MEMBERS = {observation(0).model.model: [peer(MEMBER)], "ab" * 32: [peer(number) for number in range(10, 60)]}
"""Of the model that is observed, and of one that the others have a chain of."""

EARLIER_S = NOW_S - BUCKET_S


def assigned(number: int, observer: int) -> SignedObservation:
    """Return an assigned measurement of before the flood."""
    made = observation(number, observer=observer, issued_at_s=EARLIER_S)
    measurements = replace(made.measurements, log_ratio_to_baseline=-0.5)
    return sign_observation(replace(made, kind=ObservationKind.ASSIGNED, measurements=measurements), key(observer))


async def observers_read(tmp_path: Path, *observations: SignedObservation) -> list[tuple[str, ObservationKind]]:
    database = tmp_path / "metaswarm.sqlite3"
    async with open_database(database) as opened:
        await HistoryStore(opened).add_many(observations)
    return [(each.observer, each.kind) for each in read_samples(database, peer(OWN), MEMBERS, limit=20)]


async def test_one_observer_does_not_push_out_the_others(tmp_path: Path) -> None:
    known = [signed(number, observer=OWN, issued_at_s=EARLIER_S) for number in range(3)]
    flood = [signed(number, observer=FLOODER) for number in range(10, 60)]
    found = await observers_read(tmp_path, *known, assigned(4, MEMBER), *flood)
    assert len(found) == 20
    assert found[:4] == [(peer(OWN), ObservationKind.SERVED)] * 3 + [(peer(MEMBER), ObservationKind.ASSIGNED)]


async def test_many_observers_do_not_push_out_assigned_measurements_of_members(tmp_path: Path) -> None:
    served = [signed(number, observer=MEMBER) for number in range(10)]
    flood = [signed(number, observer=number) for number in range(10, 60)]
    found = await observers_read(tmp_path, *served, assigned(4, MEMBER), *flood)
    assert found[0] == (peer(MEMBER), ObservationKind.ASSIGNED)
    assert len({observer for observer, _ in found}) == 10


@pytest.mark.parametrize("observer", [OWN, MEMBER])
async def test_old_assigned_measurements_leave_room_for_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observer: int
) -> None:
    monkeypatch.setattr(samples, "MAX_SAMPLES_OF_PEER", 10)
    old = [assigned(number, observer) for number in range(20)]
    new = [signed(number, observer=observer) for number in range(20, 40)]
    kinds = [kind for _, kind in await observers_read(tmp_path, *old, *new)]
    assert len(kinds) == 10
    assert kinds.count(ObservationKind.ASSIGNED) == 1
    assert kinds[0] is ObservationKind.ASSIGNED


async def test_half_of_what_is_learned_from_may_be_own(tmp_path: Path) -> None:
    known = [signed(number, observer=OWN) for number in range(30)]
    others = [signed(number, observer=number, issued_at_s=EARLIER_S) for number in range(40, 60)]
    found = await observers_read(tmp_path, *known, *others)
    assert [observer for observer, _ in found].count(peer(OWN)) == 10


def test_job_whose_stage_has_not_stated_its_computing_is_no_sample_of_computing() -> None:
    made = observation(1)
    made = replace(made, workload=replace(made.workload, objective=Objective.THROUGHPUT))
    first, *others = made.route
    missing = replace(made, route=(replace(first, statistics=SessionStatistics()), *others))
    assert sample_of(made) is not None
    assert sample_of(missing) is None
    assert sample_of(replace(missing, workload=replace(made.workload, objective=Objective.LATENCY))) is not None
