"""Laws of the consensus: equal contributions give equal statements, equal sets of messages the same head."""

import math
from collections.abc import Callable
from fractions import Fraction
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.consensus_values import (
    MAX_READING,
    Commit,
    Member,
    PeerReading,
    Plain,
    Reading,
    Reveal,
    Signature,
    Statement,
    digest_of,
)
from protocol.identity import PeerId
from selector.consensus.chain import Chain, InvalidStatement, quorum_size
from selector.consensus.reputation import COUNT_SCALE, WEIGHT_SCALE, updated, weight_of
from selector.consensus.sortition import READINGS_PER_CELL, MeasurementPlan, assign_cells, beacon_of, select_committee
from selector.consensus.state import Contribution, conclude, initial_state
from selector.consensus.table import agree_on, weighted_median
from tests.support.agreement import GENESIS, HARDWARE, PLAN, Peer, Swarm, swarm_of

values = st.integers(-MAX_READING, MAX_READING)
weights = st.integers(0, 10_000)
weighted = st.lists(st.tuples(values, weights), min_size=1, max_size=12)
plain = st.recursive(
    st.integers() | st.text(max_size=4) | st.binary(max_size=4), lambda inner: st.lists(inner, max_size=3), max_leaves=8
)


@given(weighted, st.randoms(use_true_random=False), st.integers(1, 50))
def test_weighted_median_depends_on_neither_order_nor_scale(
    pairs: list[tuple[int, int]], random: Random, factor: int
) -> None:
    median = weighted_median(pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert weighted_median(shuffled) == median
    assert weighted_median([(value, weight * factor) for value, weight in pairs]) == median
    counted = [(value, weight) for value, weight in pairs if weight] or [(value, 1) for value, _ in pairs]
    total = sum(weight for _, weight in counted)
    assert median in {value for value, _ in counted}
    assert 2 * sum(weight for value, weight in counted if value < median) < total
    assert 2 * sum(weight for value, weight in counted if value > median) <= total


@given(values, st.integers(1, 3), st.lists(values, min_size=1, max_size=3))
def test_minority_weight_cannot_move_the_median_beyond_honest_readings(
    value: int, spread: int, lies: list[int]
) -> None:
    honest = [PeerReading(PeerId(f"honest-{number}"), value + number * spread) for number in range(len(lies) + 1)]
    lying = [PeerReading(PeerId(f"lying-{number}"), lie) for number, lie in enumerate(lies)]
    entry = agree_on([*lying, *honest], {reading.peer: 5 for reading in [*honest, *lying]}, 3)
    assert value <= entry.value <= value + len(lies) * spread


def member(agreed: int = 0, deviated: int = 0) -> Member:
    return Member(PeerId("member"), HARDWARE, agreed, deviated)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_reputation_weight_is_the_log_odds(agreed: int, deviated: int) -> None:
    odds = Fraction(agreed + 2 * COUNT_SCALE, deviated + COUNT_SCALE)
    expected = max(0.0, math.log(odds) * WEIGHT_SCALE)
    assert abs(weight_of(member(agreed, deviated)) - expected) <= 2 + expected * 0.002


@given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 50))
def test_agreeing_raises_the_weight_and_deviating_lowers_it(epochs: int, agreed: int, deviated: int) -> None:
    reputation = member()
    for _ in range(epochs % 20):
        reputation = updated(reputation, agreed * COUNT_SCALE, 0)
    weight = weight_of(reputation)
    assert weight_of(updated(reputation, agreed * COUNT_SCALE, 0)) >= weight
    assert weight >= weight_of(updated(reputation, 0, deviated * COUNT_SCALE))


@given(plain, plain)
def test_different_values_have_different_digests(one: Plain, other: Plain) -> None:
    same = repr(one) == repr(other)
    assert (digest_of(one) == digest_of(other)) == same


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 3)), unique_by=lambda pair: pair[0], max_size=60),
    st.binary(min_size=1, max_size=8),
)
@settings(max_examples=30)
def test_sortition_is_deterministic_and_bounds_the_load(numbers: list[tuple[int, int]], seed: bytes) -> None:
    members = [(PeerId(f"peer-{number}"), f"hardware-{kind}") for number, kind in numbers]
    beacon = beacon_of(seed, 7)
    plan = MeasurementPlan(("a", "b", "c"), ("x", "y"))
    assigned = assign_cells(beacon, members, plan, {})
    assert assigned == assign_cells(beacon, members[::-1], plan, {})
    hardware = dict(members)
    for cell, peers in assigned.items():
        assert all(hardware[peer] == cell.hardware for peer in peers)
        assert len(set(peers)) == min(READINGS_PER_CELL, sum(kind == cell.hardware for kind in hardware.values()))
    for peer in hardware:
        assert sum(peer in peers for peers in assigned.values()) <= 2
    names = [peer for peer, _ in members]
    assert select_committee(beacon, names) == select_committee(beacon, names[::-1])
    assert set(select_committee(beacon, names)) <= set(names)


@st.composite
def contributions(draw: st.DrawFn) -> list[Contribution]:
    made = []
    for number in draw(st.sets(st.integers(0, 30), min_size=1, max_size=10)):
        cells = draw(st.sets(st.sampled_from(PLAN.cells([HARDWARE])), max_size=3))
        readings = tuple(sorted(Reading(cell, draw(values)) for cell in cells))
        reveal = Reveal(GENESIS, 3, PeerId(f"peer-{number}"), b"n", readings)
        commit = Commit(GENESIS, 3, GENESIS, reveal.peer, HARDWARE, reveal.commitment)
        made.append(Contribution(commit, reveal))
    return made


@given(contributions(), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=50)
def test_statement_does_not_depend_on_the_order_of_contributions(
    messages: list[Contribution], random: Random, restart: bool
) -> None:
    shuffled = list(messages)
    random.shuffle(shuffled)
    state = initial_state(GENESIS)

    def concluded(those: list[Contribution]) -> tuple[Statement, object]:
        return conclude(
            GENESIS,
            GENESIS,
            state,
            state.draw(3, PLAN),
            epoch=3,
            proposer=PeerId("p"),
            contributions=those,
            equivocators=(),
            restart=restart,
        )

    assert concluded(messages) == concluded(shuffled)


def _history_with_forks() -> tuple[list[Statement], list[Signature]]:
    """Return the messages of a swarm that was partitioned twice, and healed."""
    swarm = swarm_of(7)
    swarm.play([swarm.peers[:4], swarm.peers[4:]])
    swarm.play([swarm.peers[:4], swarm.peers[4:]])
    for _ in range(3):
        swarm.play()
    for _ in range(15):
        swarm.play([swarm.peers[:4], swarm.peers[4:]])
    swarm.play()
    return swarm.statements, swarm.signatures


STATEMENTS, SIGNATURES = _history_with_forks()


@given(st.randoms(use_true_random=False), st.floats(0.3, 1))
@settings(max_examples=30, deadline=None)
def test_fork_choice_does_not_depend_on_the_order_of_messages(random: Random, share: float) -> None:
    messages: list[Statement | Signature] = [
        *STATEMENTS,
        *(signature for signature in SIGNATURES if random.random() < share),
    ]
    assert _head(messages, shuffle=lambda _: None) == _head(messages, shuffle=random.shuffle)


def _head(messages: list[Statement | Signature], shuffle: Callable[[list[Statement | Signature]], object]) -> bytes:
    """Return the head after all messages; a statement before its parent is added again later."""
    waiting = list(messages)
    shuffle(waiting)
    chain = Chain(GENESIS)
    while waiting:
        early: list[Statement | Signature] = []
        for each in waiting:
            if isinstance(each, Signature):
                chain.add_signature(each)
                continue
            try:
                chain.add(each)
            except InvalidStatement:
                early.append(each)
        if len(early) == len(waiting):
            break
        waiting = early
    return chain.head.id


@given(st.integers(1, 1000))
def test_two_quorums_have_more_than_a_third_in_common(size: int) -> None:
    assert 3 * quorum_size(size) > 2 * size
    assert 3 * (2 * quorum_size(size) - size) > size


def test_sortition_assigns_the_same_cells_to_two_members() -> None:
    swarm = Swarm([Peer("a"), Peer("b")])
    swarm.play()
    assert swarm.peers[0].participant.assigned(100.0) == swarm.peers[1].participant.assigned(100.0) != ()
