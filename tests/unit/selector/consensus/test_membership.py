"""Inclusion lists decide who was absent, audits who joins, and a beacon unknown before who comes first."""

from protocol.consensus_values import MAX_CANDIDATES, MAX_JOINED, Member
from protocol.identity import PeerId
from selector.consensus import inclusion
from selector.consensus.membership import AUDITED, WAITING_EPOCHS, Presence, founders, succeed
from selector.consensus.reputation import weight_of
from selector.consensus.sortition import Sortition, next_beacon

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


def test_where_nothing_is_compared_candidates_join_one_by_one_after_waiting() -> None:
    waiting = [Member(PeerId(f"other-{number}"), f"class {number}", since=3) for number in range(4)]
    assert {*after(lists_naming(0), waiting, epoch=3 + WAITING_EPOCHS - 1)} == {*NAMES}
    assert len({*after(lists_naming(0), waiting, epoch=3 + WAITING_EPOCHS)} - {*NAMES}) == 1
    compared = frozenset(each.hardware for each in waiting)
    assert {*after(lists_naming(0), waiting, epoch=3 + WAITING_EPOCHS, compared=compared)} == {*NAMES}


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


def test_inclusion_list_names_the_held_commits() -> None:
    packed = inclusion.pack({NAMES[0], NAMES[4]}, NAMES)
    assert packed == b"\x11"
    named, valid = inclusion.count([packed, packed, b""], NAMES)
    assert (named[NAMES[0]], named[NAMES[1]], valid) == (2, 0, 2)
    assert inclusion.is_listed(2, 5)
    assert not inclusion.is_listed(2, 6)
