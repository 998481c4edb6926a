"""Who is a member after an epoch: absence, candidates, admission, and founders.

Identities are free, so that a newcomer is a candidate first: it measures what members measure, and joins once its
readings agree with theirs. Where nothing can be compared, since nobody measures or no member has its hardware, it waits
for an hour. Who comes first is drawn by a beacon that was unknown when it came.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from protocol.consensus_values import MAX_CANDIDATES, MAX_JOINED, MAX_LEFT, Member
from protocol.forms import Digest
from protocol.identity import PeerId
from selector.consensus import inclusion
from selector.consensus.chain import FAULT_TOLERANT, quorum_size
from selector.consensus.reputation import COUNT_SCALE, updated
from selector.consensus.sortition import Sortition, newcomers_in_order

MAX_ABSENCES: Final = 3
"""Absences in a row after which a member or a candidate is removed."""

MAX_IDLE: Final = 6
"""Epochs in a row in which a candidate read nothing, after which it gives its place to newcomers that have none."""

AUDITED: Final = COUNT_SCALE
"""Agreement after which a candidate may join: one cell that was hard to guess, or four that were not."""

MEMBERS_PER_JOINED: Final = 8
"""Of so many members one audited candidate joins per epoch: who has many identities needs time to become a third."""

WAITING_EPOCHS: Final = 6
"""Epochs in a row in which nothing on its hardware was compared, after which a candidate may join; one in an epoch."""


class Presence(NamedTuple):
    """The peers whose contributions count, with the hardware class that newcomers state, and the inclusion lists.

    `compared`: the hardware classes on which readings could be compared. `evading`: candidates that read nothing,
    though something that they were to read was compared.
    """

    hardware: Mapping[PeerId, str]
    lists: Mapping[PeerId, bytes]
    compared: frozenset[str] = frozenset()
    evading: frozenset[PeerId] = frozenset()


def found(former: Sequence[Member], presence: Presence, beacon: Digest, epoch: int) -> tuple[Member, ...]:
    """Return the members of a chain that starts, or restarts after a stall.

    Newcomers found a chain only where no former member is present: otherwise who stops a chain could take it over with
    as many identities as it likes.
    """
    known = {member.peer: member._replace(absences=0) for member in former}
    founding = founders(known, presence.hardware, beacon)
    return tuple(sorted(known.get(peer) or Member(peer, presence.hardware[peer], since=epoch) for peer in founding))


def founders(former: Iterable[PeerId], present: Iterable[PeerId], beacon: Digest) -> list[PeerId]:
    """Return the peers that a chain starts or restarts with: all former members that are present.

    Of them none may be left out: a draw among them could give those that are hostile a larger share. `beacon`: of after
    the epoch, which decides among unknown peers, who knew the last one when they made their ids.
    """
    peers = {*present}
    if back := peers & {*former}:
        return sorted(back)
    return newcomers_in_order(beacon, peers)[:MAX_JOINED]


def succeed(
    members: Sequence[Member],
    candidates: Sequence[Member],
    sortition: Sortition,
    presence: Presence,
    beacon: Digest,
    epoch: int,
) -> tuple[tuple[Member, ...], list[Member]]:
    """Return the members and candidates after an epoch: without those absent for too long, with those that come."""
    known = {each.peer for each in (*members, *candidates)}
    members, candidates = _mark_absent(members, candidates, sortition, presence)
    absent = sorted((-each.absences, each.peer) for each in members if each.absences >= MAX_ABSENCES)[:MAX_LEFT]
    leaving = {peer for _, peer in absent}
    members = [member for member in members if member.peer not in leaving]
    candidates = [each for each in candidates if each.absences < MAX_ABSENCES and not _has_failed(each)]
    # The wait begins anew with everything that is compared: else the audit could be waited out.
    candidates = [each._replace(since=epoch) if each.hardware in presence.compared else each for each in candidates]
    newcomers = [
        Member(peer, hardware, since=epoch) for peer, hardware in presence.hardware.items() if peer not in known
    ]
    of_peer = {each.peer: each for each in (*candidates, *newcomers)}
    joining = _admitted(members, candidates, newcomers, presence, beacon, epoch)
    coming = [peer for peer in newcomers_in_order(beacon, [each.peer for each in newcomers]) if peer not in joining]
    waiting = _with_places([each for each in candidates if each.peer not in joining], len(coming))
    waiting += coming[: MAX_CANDIDATES - len(waiting)]
    return (
        tuple(sorted([*members, *(of_peer[peer]._replace(absences=0, idle=0) for peer in joining)])),
        [of_peer[peer] for peer in sorted(waiting)],
    )


def _with_places(candidates: Sequence[Member], coming: int) -> list[PeerId]:
    """Return who keeps its place: idle candidates give theirs to newcomers, those first that agreed least.

    Without them a node that may measure seldom keeps what it has agreed.
    """
    idle = sorted((each.agreed, each.peer) for each in candidates if each.idle >= MAX_IDLE)
    leaving = {peer for _, peer in idle[: max(0, len(candidates) + coming - MAX_CANDIDATES)]}
    return [each.peer for each in candidates if each.peer not in leaving]


def _mark_absent(
    members: Sequence[Member], candidates: Sequence[Member], sortition: Sortition, presence: Presence
) -> tuple[list[Member], list[Member]]:
    """Count the absences that the inclusion lists prove.

    A peer that is listed and does not contribute has withheld its reveal, which counts against it like a reading that
    deviates. Without a quorum of lists nobody is absent.
    """
    size = len(sortition.committee)
    lists = (presence.lists[peer] for peer in sortition.committee if peer in presence.lists)
    named, valid = inclusion.count(lists, sortition.expected)
    expected = {*sortition.expected}

    def marked(member: Member) -> Member:
        if member.peer in presence.hardware:
            return member._replace(absences=0, idle=member.idle + 1 if member.peer in presence.evading else 0)
        if member.peer not in expected or valid < quorum_size(size):
            return member
        if inclusion.is_listed(named[member.peer], size):
            member = updated(member, 0, COUNT_SCALE)
        return member._replace(absences=member.absences + 1)

    return [marked(member) for member in members], [marked(candidate) for candidate in candidates]


def _has_failed(candidate: Member) -> bool:
    """Return whether a candidate's readings deviate more than they agree."""
    return candidate.deviated > max(AUDITED // 2, candidate.agreed)


def _admitted(
    members: Sequence[Member],
    candidates: Sequence[Member],
    coming: Sequence[Member],
    presence: Presence,
    beacon: Digest,
    epoch: int,
) -> set[PeerId]:
    """Return who joins."""
    present = [each for each in candidates if each.peer in presence.hardware]
    # A swarm that cannot tolerate a failure does not wait.
    room = max(0, FAULT_TOLERANT - len(members))
    joining = {*newcomers_in_order(beacon, [each.peer for each in (*present, *coming)])[:room]}
    audited = [each.peer for each in present if each.agreed >= AUDITED and each.agreed > 2 * each.deviated]
    joining |= {*newcomers_in_order(beacon, audited)[: max(1, len(members) // MEMBERS_PER_JOINED)]}
    waited = [each.peer for each in present if epoch - each.since >= WAITING_EPOCHS]
    return joining | {*newcomers_in_order(beacon, waited)[:1]}
