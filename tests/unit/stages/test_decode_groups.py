"""Tokens a second of a simulated route of real schedulers, as its sessions go around in one group or in several."""

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import NamedTuple

import pytest

from node.stages.decode_groups import DecodeGroups
from node.stages.scheduler import Batching, Scheduler, StagePolicy, Work
from protocol.identity import JobId, PeerId, SessionId
from protocol.limits import MAX_SLICES
from protocol.messages import Slice
from protocol.tensors import tensor_from_tokens

ROWS = [tensor_from_tokens([0])]


class Cost(NamedTuple):
    """Milliseconds of a step: for any, and for each row."""

    fixed: float
    row: float

    def of(self, rows: int) -> float:
        return (self.fixed + self.row * rows) / 1000


def work(number: int, now_s: float, stages: int) -> Work[str]:
    part = Slice(session=SessionId(JobId(f"{number:032x}"), 0), position=0, rows=1, draws=1)
    return Work(part, ROWS[0], PeerId("alice"), "link", 4, arrived_s=now_s, stages=stages)


def tokens_per_s(
    costs: Sequence[Cost], sessions: int, link_s: float, *, seconds: float = 6.0, apart: bool = False, seed: int = 0
) -> float:
    """Simulate a route; return what it draws in the second half of the time, when the stages have measured.

    `apart`: the sessions begin one after another, and not at once.
    """
    random, order, now_s, drawn = Random(seed), count(), 0.0, 0
    stages = [Scheduler[str](StagePolicy(Batching.CONTINUOUS, 128)) for _ in costs]
    steps: list[tuple[list[Work[str]], float] | None] = [None for _ in costs]
    events: list[tuple[float, int, int, list[int] | None]] = []

    def after(delay_s: float, stage: int, arrived: list[int] | None) -> None:
        heapq.heappush(events, (now_s + delay_s, next(order), stage, arrived))

    for begun in [[number] for number in range(sessions)] if apart else [list(range(sessions))]:
        after(random.uniform(0, 0.1), 0, begun)
    while now_s < seconds:
        now_s, _, stage, arrived = heapq.heappop(events)
        scheduler, step = stages[stage], steps[stage]
        for number in arrived or ():
            scheduler.add(work(number, now_s, len(costs)))
        if arrived is None and step is not None and now_s >= step[1]:
            batch, _ = step
            steps[stage] = None
            scheduler.on_computed(batch, costs[stage].of(len(batch)), now_s)
            drawn += len(batch) if stage == len(costs) - 1 and now_s > seconds / 2 else 0
            after(link_s, (stage + 1) % len(costs), [int(each.session.job, 16) for each in batch])
        if steps[stage] is None:
            if batch := scheduler.next_batch(now_s):
                took_s = costs[stage].of(len(batch)) * random.uniform(0.95, 1.05)
                steps[stage] = batch, now_s + took_s
                after(took_s, stage, None)
            elif (chance_s := scheduler.next_chance_s(now_s)) is not None:
                after(chance_s - now_s, stage, None)
    return drawn / (seconds / 2)


GPU, CPU = Cost(10, 0.01), Cost(8, 2)
Gain = Callable[..., float]


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Gain:
    """Return a function that compares with steps of all sessions that wait when the engine is free."""

    def compare(costs: Sequence[Cost], sessions: int, link_s: float = 0.0008, *, apart: bool = False) -> float:
        found = tokens_per_s(costs, sessions, link_s, apart=apart)
        with monkeypatch.context() as patch:
            patch.setattr(DecodeGroups, "size", lambda self: MAX_SLICES)
            patch.setattr(DecodeGroups, "worth_waiting_s", lambda self: 0.0)
            return found / tokens_per_s(costs, sessions, link_s, apart=apart)

    return compare


@pytest.mark.parametrize("sessions", [8, 16])
def test_stages_whose_steps_grow_with_their_rows_work_at_the_same_time(gain: Gain, sessions: int) -> None:
    assert gain([CPU] * 3, sessions) > 1.5
    assert gain([CPU] * 3, sessions, 0.02) > 1.2
    assert gain([Cost(4, 5)] * 3, sessions) > 2.0
    assert gain([Cost(4, 1), Cost(12, 3), Cost(4, 1)], sessions) > 1.2


@pytest.mark.parametrize("sessions", [2, 8, 16])
def test_sessions_that_began_one_after_another_share_their_steps(gain: Gain, sessions: int) -> None:
    assert gain([GPU], sessions, apart=True) > 1.7
    assert gain([CPU], sessions, apart=True) > 1.1
    if sessions > 3:
        assert gain([GPU] * 3, sessions, apart=True) > 1.15


@pytest.mark.parametrize("sessions", [2, 8, 16])
@pytest.mark.parametrize(
    "costs", [[GPU], [GPU] * 3, [Cost(2, 0), Cost(6, 0), Cost(2, 0)], [CPU]], ids=["GPU", "GPUs", "a slow GPU", "CPU"]
)
def test_nothing_is_lost_where_one_group_is_best(gain: Gain, costs: Sequence[Cost], sessions: int) -> None:
    assert gain(costs, sessions) > 0.97
    assert gain(costs, sessions, 0.02) > 0.97
    assert gain(costs, sessions, 0.02, apart=True) > 0.97


def test_sessions_that_ended_count_no_more() -> None:
    groups = DecodeGroups()
    ids = [SessionId(JobId(f"{number:032x}"), 0) for number in range(9)]
    for each in ids:
        groups.decoded(each, 3, 0.0)
    assert groups.size() == MAX_SLICES, "nothing is measured yet"
    for now_s in range(1, 9):
        for each in ids:
            groups.arrived(each, now_s + 0.9)
            groups.decoded(each, 3, now_s + 1)
        groups.observe(9, 0.1)
    assert groups.size() == 3
    for each in ids[:6]:
        groups.remove(each)
    assert groups.size() == 1
    for each in ids:
        groups.remove(each)
    assert groups.size() == MAX_SLICES
    assert not groups.is_expected(0.0, 100.0)


def test_session_that_ends_during_its_step_counts_no_more() -> None:
    scheduler = Scheduler[str](StagePolicy(Batching.CONTINUOUS, 128))
    for number in range(8):
        scheduler.add(work(number, 0.0, 3))
    batch = scheduler.next_batch(0.0)
    scheduler.remove(batch[0].session)
    scheduler.on_computed(batch, 0.1, 0.1)
    assert scheduler._groups._stages.keys() == {each.session for each in batch[1:]}


def test_step_waits_a_moment_and_not_for_ever() -> None:
    """Two sessions take turns, each away for 1 ms while the other has the engine for 10 ms."""
    scheduler = Scheduler[str](StagePolicy(Batching.CONTINUOUS, 128))
    now_s, number, waited_s = 0.0, 1, 0.0
    scheduler.add(work(number, now_s, 1))
    batch = scheduler.next_batch(now_s)
    while not waited_s:
        other = 3 - number
        scheduler.add(work(other, now_s + 0.001, 1))
        now_s += 0.01
        scheduler.on_computed(batch, 0.01, now_s)
        batch = scheduler.next_batch(now_s)
        if not batch:
            until_s = scheduler.next_chance_s(now_s)
            assert until_s is not None
            waited_s = until_s - now_s
            assert [each.session for each in scheduler.next_batch(until_s)] == [work(other, 0.0, 1).session]
        number = other
    assert 0.001 < waited_s < 0.01
