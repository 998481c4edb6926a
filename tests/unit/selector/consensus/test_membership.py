"""Inclusion lists decide who was absent, audits who joins, and a beacon unknown before who comes first."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from protocol.consensus_values import MAX_CANDIDATES, MAX_JOINED, Commit, Member, Reveal
from protocol.identity import PeerId
from selector.consensus import inclusion
from selector.consensus.chain import STALL_EPOCHS, members_after
from selector.consensus.membership import AUDITED, MAX_IDLE, WAITING_EPOCHS, Presence, founders, succeed
from selector.consensus.reputation import weight_of
from selector.consensus.sortition import MeasurementPlan, Sortition, next_beacon
from selector.consensus.state import Contribution, State, beacon_after, conclude, initial_state

HARDWARE = "two cores"
MEMBERS = [Member(PeerId(f"peer-{number}"), HARDWARE) for number in range(6)]
NAMES = tuple(member.peer for member in MEMBERS)
SORTITION = Sortition(NAMES, {}, {})
ABSENT = NAMES[5]


def after(
    lists: dict[PeerId, bytes],
    candidates: list[Member] | None = None,
    epoch: int = 9,
    compared: frozenset[str] = frozenset(),
) -> dict[PeerId, Member]:
    presence = Presence(dict.fromkeys((*lists, *(each.peer for each in candidates or [])), ""), lists, compared)
    members, _ = succeed(MEMBERS, candidates or [], SORTITION, presence, b"beacon", epoch)
    return {member.peer: member for member in members}


def lists_naming(count: int, total: int = 5) -> dict[PeerId, bytes]:
    """Return lists of the first members, of which some name the one that is absent."""
    return {peer: inclusion.pack(NAMES[: 6 if n < count else 5], NAMES) for n, peer in enumerate(NAMES[:total])}


def test_member_that_few_lists_name_is_absent() -> None:
    found = after(lists_naming(2))[ABSENT]
    assert (found.absences, found.deviated) == (1, 0)


def test_member_whose_listed_commit_is_not_revealed_loses_weight() -> None:
    found = after(lists_naming(3))[ABSENT]
    assert found.absences == 1
    assert weight_of(found) < weight_of(MEMBERS[5])


def test_nobody_is_absent_without_a_quorum_of_lists() -> None:
    assert after(lists_naming(0, total=4))[ABSENT] == MEMBERS[5]
    forged = dict.fromkeys(NAMES[:5], b"\x00" * 40)
    assert after(forged)[ABSENT] == MEMBERS[5]


def test_candidate_joins_once_its_measurements_agree() -> None:
    good = Member(PeerId("good"), HARDWARE, AUDITED, 0, since=1)
    unproven = Member(PeerId("unproven"), HARDWARE, AUDITED - 1, 0, since=1)
    doubtful = Member(PeerId("doubtful"), HARDWARE, 2 * AUDITED, 2 * AUDITED, since=1)
    assert {*after(lists_naming(0), [doubtful, good, unproven])} - {*NAMES} == {good.peer}


def test_a_crowd_of_audited_candidates_joins_one_by_one() -> None:
    crowd = [Member(PeerId(f"crowd-{number}"), HARDWARE, AUDITED, 0, since=1) for number in range(6)]
    assert len({*after(lists_naming(0), crowd)} - {*NAMES}) == 1


def test_nonce_that_came_too_late_for_the_lists_does_not_change_the_beacon() -> None:
    state = State(8, tuple(MEMBERS), (), {}, (), b"beacon", b"")

    def beacon(late_nonce: bytes, listed: int) -> bytes:
        lists = lists_naming(listed) | {ABSENT: b""}
        nonces = dict.fromkeys(NAMES, b"n" * 32) | {ABSENT: late_nonce}
        contributions = [
            Contribution(
                Commit(b"chain", 9, b"parent", peer, "", b"commitment", ()),
                Reveal(b"chain", 9, peer, nonces[peer], (), lists[peer]),
            )
            for peer in NAMES
        ]
        first = Sortition((ABSENT, *NAMES[:5]), {}, {})
        return beacon_after(state, first, contributions, 9, restart=False)

    assert beacon(b"one", listed=2) == beacon(b"two", listed=2)
    assert beacon(b"one", listed=3) != beacon(b"two", listed=3)


def test_lists_of_peers_that_came_too_late_do_not_decide_whose_nonce_counts() -> None:
    state = State(8, tuple(MEMBERS), (), {}, (), b"beacon", b"")
    late, disputed, *others = NAMES
    sortition = Sortition((disputed, late, *others), {}, {})

    def beacon(nonce: bytes, present: Sequence[PeerId]) -> bytes:
        # Two honest members and the late one list the disputed peer, whose nonce would count with three lists.
        held = {late: [disputed, *others], others[0]: [disputed, *others], others[1]: [disputed, *others]}
        contributions = []
        for peer in present:
            listed = inclusion.pack(held.get(peer, others), NAMES)
            reveal = Reveal(b"chain", 9, peer, nonce if peer == disputed else b"n" * 32, (), listed)
            contributions.append(Contribution(Commit(b"chain", 9, b"parent", peer, "", b"", ()), reveal))
        return beacon_after(state, sortition, contributions, 9, restart=False)

    assert beacon(b"one", NAMES) == beacon(b"two", NAMES) == beacon(b"one", [disputed, *others])


def test_where_nothing_is_compared_candidates_join_one_by_one_after_waiting() -> None:
    waiting = [Member(PeerId(f"other-{number}"), f"class {number}", since=3) for number in range(4)]
    assert {*after(lists_naming(0), waiting, epoch=3 + WAITING_EPOCHS - 1)} == {*NAMES}
    assert len({*after(lists_naming(0), waiting, epoch=3 + WAITING_EPOCHS)} - {*NAMES}) == 1
    compared = frozenset(each.hardware for each in waiting)
    assert {*after(lists_naming(0), waiting, epoch=3 + WAITING_EPOCHS, compared=compared)} == {*NAMES}


def test_wait_begins_anew_with_everything_that_is_compared_on_the_same_hardware() -> None:
    candidates = [Member(PeerId("waiting"), "rare", since=0)]
    for epoch in range(1, 20):
        compared = frozenset(["rare"] if epoch % (WAITING_EPOCHS - 1) == 0 and epoch < 12 else [])
        presence = Presence(dict.fromkeys((*NAMES, candidates[0].peer), ""), lists_naming(0), compared)
        members, candidates = succeed(MEMBERS, candidates, SORTITION, presence, b"beacon", epoch)
        if not candidates:
            break
    assert epoch == 10 + WAITING_EPOCHS
    assert candidates == []
    assert len(members) == len(NAMES) + 1


def test_candidates_that_measure_nothing_give_their_places_to_newcomers() -> None:
    candidates = [Member(PeerId(f"idle-{number}"), HARDWARE) for number in range(MAX_CANDIDATES)]
    candidates[0] = candidates[0]._replace(agreed=AUDITED // 4)
    names = frozenset(each.peer for each in candidates)
    places: list[int] = []
    for epoch in range(1, MAX_IDLE + 1):
        coming = {PeerId(f"newcomer-{number}"): HARDWARE for number in range(MAX_CANDIDATES - 1)}
        hardware = {**dict.fromkeys((*NAMES, *names), ""), **coming}
        presence = Presence(hardware, lists_naming(0), frozenset([HARDWARE]), names)
        members, candidates = succeed(MEMBERS, candidates, SORTITION, presence, b"beacon", epoch)
        places.append(len({each.peer for each in candidates} & coming.keys()))
    assert places == [0] * (MAX_IDLE - 1) + [MAX_CANDIDATES - 1]
    assert [each.agreed for each in candidates if each.peer in names] == [AUDITED // 4]
    assert len(members) == len(NAMES)


def test_candidate_that_measures_seldom_keeps_what_it_agreed() -> None:
    slow = Member(PeerId("slow"), HARDWARE, agreed=AUDITED // 4)
    candidates = [slow]
    for epoch in range(1, 3 * MAX_IDLE):
        presence = Presence(
            dict.fromkeys((*NAMES, slow.peer), ""), lists_naming(0), frozenset([HARDWARE]), frozenset([slow.peer])
        )
        _, candidates = succeed(MEMBERS, candidates, SORTITION, presence, b"beacon", epoch)
    assert [each.agreed for each in candidates] == [slow.agreed]
    [read] = succeed(MEMBERS, candidates, SORTITION, presence._replace(evading=frozenset()), b"beacon", epoch + 1)[1]
    assert read.idle == 0


def test_newcomers_are_drawn_by_a_beacon_that_nobody_knew_when_they_came() -> None:
    crowd = [PeerId(f"crowd-{number:03}") for number in range(90)]
    presence = Presence({**dict.fromkeys(NAMES, ""), **dict.fromkeys(crowd, HARDWARE)}, {})
    drawn = []
    for nonce in (b"one", b"another"):
        beacon = next_beacon(b"beacon", 9, {NAMES[0]: nonce})
        _, candidates = succeed(MEMBERS, [], SORTITION, presence, beacon, 9)
        assert len(candidates) == MAX_CANDIDATES
        drawn.append({candidate.peer for candidate in candidates})
    assert drawn[0] != drawn[1]


def test_strangers_do_not_found_a_chain_beside_former_members() -> None:
    strangers = [PeerId(f"a-{number:03}") for number in range(200)]
    assert {*founders(NAMES, [*strangers, *NAMES[:2]], b"beacon")} == {*NAMES[:2]}
    assert len(founders(NAMES, strangers, b"beacon")) == MAX_JOINED


@pytest.mark.parametrize("seed", range(12))
def test_restart_gives_hostile_members_no_larger_share(seed: int) -> None:
    rng = Random(seed)
    names = sorted(PeerId(f"peer-{rng.getrandbits(64):016x}") for _ in range(100))
    silent = {*rng.sample(names, 34)}  # for 12 epochs; now they take part again
    state = replace(initial_state(b"genesis"), epoch=5, members=tuple(Member(name, HARDWARE) for name in names))
    plan, epoch = MeasurementPlan(("short",), ("fast",)), 5 + STALL_EPOCHS + 1
    for absent in (set(), {*sorted(silent)[:20]}, silent):
        contributions = [
            Contribution(
                Commit(b"chain", epoch, b"parent", name, "", b"commitment", ()),
                Reveal(b"chain", epoch, name, rng.randbytes(32), ()),
            )
            for name in names
            if name not in absent
        ]
        statement, after = conclude(
            b"chain",
            b"parent",
            state,
            state.draw(epoch, plan),
            epoch=epoch,
            proposer=names[0],
            contributions=contributions,
            equivocators=(),
            restart=True,
        )
        assert {*after.peers()} == {*names} - absent
        assert members_after(names, 5, state.beacon, statement) == (after.peers(), True)


def test_inclusion_list_names_the_held_commits() -> None:
    packed = inclusion.pack({NAMES[0], NAMES[4]}, NAMES)
    assert packed == b"\x11"
    named, valid = inclusion.count([packed, packed, b""], NAMES)
    assert (named[NAMES[0]], named[NAMES[1]], valid) == (2, 0, 2)
    assert inclusion.is_listed(2, 5)
    assert not inclusion.is_listed(2, 6)
