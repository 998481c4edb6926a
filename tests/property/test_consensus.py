"""Laws of the consensus: the same contributions make the same statement, the same statements the same head."""

import math
from collections.abc import Callable
from fractions import Fraction
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from selector.consensus.chain import Chain, InvalidStatement, quorum_of
from selector.consensus.reputation import COUNT_SCALE, WEIGHT_SCALE, Reputation
from selector.consensus.sortition import REPLICAS, Agenda, beacon_of, draw_assignments, draw_committee
from selector.consensus.state import Contribution, conclude, initial_state
from selector.consensus.table import Replica, agree_on, weighted_median
from selector.consensus.values import (
    MAX_VALUE,
    Commit,
    Plain,
    Reading,
    Reveal,
    Signature,
    Statement,
    digest_of,
)
from tests.support.agreement import AGENDA, GENESIS, HARDWARE, Peer, Swarm, swarm_of

values = st.integers(-MAX_VALUE, MAX_VALUE)
weights = st.integers(0, 10_000)
weighted = st.lists(st.tuples(values, weights), min_size=1, max_size=12)
plain = st.recursive(
    st.integers() | st.text(max_size=4) | st.binary(max_size=4), lambda inner: st.lists(inner, max_size=3), max_leaves=8
)


@given(weighted, st.randoms(use_true_random=False), st.integers(1, 50))
def test_the_median_depends_on_neither_order_nor_scale(
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
def test_less_than_half_of_the_weight_moves_the_agreed_value_no_further_than_honest_readings_lie(
    value: int, spread: int, lies: list[int]
) -> None:
    honest = [Replica(f"honest-{number}", value + number * spread) for number in range(len(lies) + 1)]
    lying = [Replica(f"lying-{number}", lie) for number, lie in enumerate(lies)]
    entry = agree_on([*lying, *honest], {replica.peer: 5 for replica in [*honest, *lying]}, 3)
    assert value <= entry.value <= value + len(lies) * spread


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_the_weight_is_the_log_odds(agreed: int, deviated: int) -> None:
    odds = Fraction(agreed + 2 * COUNT_SCALE, deviated + COUNT_SCALE)
    expected = max(0.0, math.log(odds) * WEIGHT_SCALE)
    assert abs(Reputation(agreed, deviated).weight - expected) <= 2 + expected * 0.002


@given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 50))
def test_to_agree_is_worth_more_and_to_deviate_less(epochs: int, agreed: int, deviated: int) -> None:
    reputation = Reputation()
    for _ in range(epochs % 20):
        reputation = reputation.after(agreed, 0)
    assert reputation.after(agreed, 0).weight >= reputation.weight >= reputation.after(0, deviated).weight


@given(plain, plain)
def test_different_values_have_different_digests(one: Plain, other: Plain) -> None:
    same = repr(one) == repr(other)
    assert (digest_of(one) == digest_of(other)) == same


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 3)), unique_by=lambda pair: pair[0], max_size=60),
    st.binary(min_size=1, max_size=8),
)
@settings(max_examples=30)
def test_draws_are_the_same_for_all_and_spare_everybody(numbers: list[tuple[int, int]], seed: bytes) -> None:
    members = [(f"peer-{number}", f"hardware-{kind}") for number, kind in numbers]
    beacon = beacon_of(seed, 7)
    agenda = Agenda(("a", "b", "c"), ("x", "y"))
    drawn = draw_assignments(beacon, members, agenda, {})
    assert drawn == draw_assignments(beacon, members[::-1], agenda, {})
    hardware = dict(members)
    for cell, peers in drawn.items():
        assert all(hardware[peer] == cell.hardware for peer in peers)
        assert len(set(peers)) == min(REPLICAS, sum(kind == cell.hardware for kind in hardware.values()))
    for peer in hardware:
        assert sum(peer in peers for peers in drawn.values()) <= 2
    names = [peer for peer, _ in members]
    assert draw_committee(beacon, names) == draw_committee(beacon, names[::-1])
    assert set(draw_committee(beacon, names)) <= set(names)


@st.composite
def contributions(draw: st.DrawFn) -> list[Contribution]:
    made = []
    for number in draw(st.sets(st.integers(0, 30), min_size=1, max_size=10)):
        cells = draw(st.sets(st.sampled_from(AGENDA.cells([HARDWARE])), max_size=3))
        readings = tuple(sorted(Reading(cell, draw(values)) for cell in cells))
        reveal = Reveal(GENESIS, 3, f"peer-{number}", b"n", readings)
        commit = Commit(GENESIS, 3, GENESIS, f"peer-{number}", HARDWARE, reveal.commitment)
        made.append(Contribution(commit, reveal))
    return made


@given(contributions(), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=50)
def test_a_statement_depends_on_the_contributions_and_not_on_their_order(
    said: list[Contribution], random: Random, refounds: bool
) -> None:
    shuffled = list(said)
    random.shuffle(shuffled)
    state = initial_state(GENESIS)

    def concluded(those: list[Contribution]) -> tuple[Statement, object]:
        return conclude(
            GENESIS,
            GENESIS,
            state,
            epoch=3,
            proposer="p",
            contributions=those,
            offenders=(),
            agenda=AGENDA,
            refounds=refounds,
        )

    assert concluded(said) == concluded(shuffled)


def _history_with_forks() -> tuple[list[Statement], list[Signature]]:
    """Return what is said in a swarm that was torn in two, twice, and healed."""
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
def test_the_head_depends_on_what_was_heard_and_not_on_the_order(random: Random, share: float) -> None:
    said: list[Statement | Signature] = [
        *STATEMENTS,
        *(signature for signature in SIGNATURES if random.random() < share),
    ]
    assert _head(said, shuffle=lambda _: None) == _head(said, shuffle=random.shuffle)


def _head(said: list[Statement | Signature], shuffle: Callable[[list[Statement | Signature]], object]) -> bytes:
    """Return the head of who hears all that; a statement that comes before its parent is heard again later."""
    waiting = list(said)
    shuffle(waiting)
    chain = Chain(GENESIS)
    while waiting:
        early: list[Statement | Signature] = []
        for each in waiting:
            if isinstance(each, Signature):
                chain.sign(each)
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
    assert 3 * quorum_of(size) > 2 * size
    assert 3 * (2 * quorum_of(size) - size) > size


def test_peers_that_hear_one_another_measure_what_the_draw_says() -> None:
    swarm = Swarm([Peer("a"), Peer("b")])
    swarm.play()
    assert swarm.peers[0].participant.assigned(100.0) == swarm.peers[1].participant.assigned(100.0) != ()
