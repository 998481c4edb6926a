"""Every behaviour of one faulty member, explored: the daemon's own state machines, all deliveries of one epoch.

Three honest members and one that may do anything with its messages. Messages of the honest arrive in their phase, and
their order within it does not matter, which the first test shows for all orders. What remains is when, if ever, each
honest member receives each message of the faulty one. All combinations are run.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import pytest

from protocol.consensus_values import Reveal, Signature, Statement
from protocol.identity import PeerId
from selector.consensus import inclusion
from selector.consensus.chain import Chain
from selector.consensus.participant import Participant
from selector.consensus.state import Contribution
from tests.support.agreement import CLOCK, GENESIS, swarm_of
from tests.support.concluded_once import conclude_once

EPOCH: Final = 2
TURNS: Final = range(CLOCK.turns())
COMMITS_S: Final = CLOCK.starts_s(EPOCH) + 10
REVEALS_S: Final = CLOCK.reveals_begin_s(EPOCH) + 1
NEVER: Final = float("inf")
COMMIT_TIMES_S: Final = (COMMITS_S, CLOCK.lists_end_s(EPOCH) + 1, NEVER)
REVEAL_TIMES_S: Final = (REVEALS_S, CLOCK.reveals_end_s(EPOCH) + 1, NEVER)
IN_TIME_S: Final = CLOCK.reveals_end_s(EPOCH) - 0.5
LATE_S: Final = CLOCK.reveals_end_s(EPOCH) + 1
LAST_S: Final = CLOCK.proposes_s(EPOCH, 0) - 0.1
TOO_LATE_S: Final = CLOCK.proposes_s(EPOCH, 0) + 0.6
Times = tuple[float, ...]
"""When each of the honest receives a message."""


@pytest.fixture(autouse=True)
def _concluded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conclude_once(monkeypatch)


class Explored:
    """One epoch of four members up to the commits, of which one is faulty; and copies that go on from there."""

    def __init__(self, turn: int) -> None:
        """`turn`: of the faulty member as a proposer."""
        swarm = swarm_of(4)
        swarm.play()
        swarm.play()
        state = swarm.peers[0].participant.state()
        assert state is not None
        self.sortition = state.draw(EPOCH, swarm.peers[0].participant.plan)
        self.faulty = self.sortition.committee[turn]
        made = {peer.name: swarm.contribution(peer, COMMITS_S) for peer in swarm.peers}
        self.own = made.pop(self.faulty)
        self.contributions = made
        self.honest = {peer.name: peer.participant for peer in swarm.peers if peer.name != self.faulty}
        for peer, other in itertools.product(self.honest.values(), made.values()):
            peer.on_commit(other.commit, COMMITS_S)
            peer.confirm(other.commit)

    def copies(self) -> dict[PeerId, Participant]:
        """Return the honest members as they are, to go on independently."""
        return {name: _copied(peer) for name, peer in self.honest.items()}

    def reveal_of_faulty(self, *, lists_others: bool) -> Reveal:
        """Return its reveal, with an honest list or with one that names itself alone."""
        expected = self.sortition.expected
        draft = self.own.reveal
        listed = inclusion.pack(expected if lists_others else [self.faulty], expected)
        return Reveal(GENESIS, EPOCH, self.faulty, draft.nonce, draft.readings, listed)


def _copied(peer: Participant) -> Participant:
    made = copy.copy(peer)
    head = peer.chain.head
    assert head.statement is not None
    made.chain = Chain(GENESIS)
    made.chain.start_from(head.statement, head.members)
    made.signed = copy.deepcopy(peer.signed)
    made._states = peer._states.copy()
    made._commits = {key: {**found} for key, found in peer._commits.items()}
    made._reveals = {key: {of: [*each] for of, each in found.items()} for key, found in peer._reveals.items()}
    made._confirmed = {key: {*found} for key, found in peer._confirmed.items()}
    made.equivocators = {**peer.equivocators}
    return made


class Run:
    """The rest of the epoch under one behaviour of the faulty member."""

    def __init__(self, explored: Explored, *, forwards: bool) -> None:
        """`forwards`: whether what one honest member has received reaches the others before the next step."""
        self._explored = explored
        self._forwards = forwards
        self._peers = explored.copies()
        self._signed: dict[PeerId, set[bytes]] = {name: set() for name in self._peers}
        self._late: list[Reveal] = []
        self._own: set[bytes] = set()
        """The contributions of the honest."""

    def commit(self, times_s: Times) -> None:
        """Deliver the faulty member's commit."""
        commit = self._explored.own.commit
        if self._forwards and min(times_s) == COMMITS_S:  # the others have it before reveals begin
            times_s = tuple(min(time_s, COMMIT_TIMES_S[1]) for time_s in times_s)
        for peer, time_s in zip(self._peers.values(), times_s, strict=True):
            if time_s < NEVER:
                peer.on_commit(commit, time_s)
                peer.confirm(commit)

    def reveal(self, reveal: Reveal, times_s: Times) -> None:
        """Deliver all reveals."""
        drafts = {name: each.reveal for name, each in self._explored.contributions.items()}
        honest = [self._peers[name].reveal(draft, REVEALS_S) for name, draft in drafts.items()]
        commits = (each.commit for each in self._explored.contributions.values())
        self._own = {Contribution(*pair).id for pair in zip(commits, honest, strict=True)}
        for peer, each in itertools.product(self._peers.values(), honest):
            peer.on_reveal(each, REVEALS_S)
        if self._forwards and min(times_s) == REVEALS_S:
            times_s = tuple(min(time_s, REVEAL_TIMES_S[1]) for time_s in times_s)
        elif self._forwards and min(times_s) < NEVER:
            self._late.append(reveal)
        for peer, time_s in zip(self._peers.values(), times_s, strict=True):
            if time_s < NEVER:
                peer.on_reveal(reveal, time_s)

    def agree(self, statement: Statement | None, receivers: int) -> None:
        """Take all turns. `statement`: of the faulty member, which the first `receivers` of the others receive."""
        for turn in TURNS[:4]:
            now_s = CLOCK.proposes_s(EPOCH, turn) + 0.5
            proposer = self._explored.sortition.committee[turn]
            if proposer == self._explored.faulty:
                for peer in [*self._peers.values()][:receivers] if statement else []:
                    assert statement is not None
                    peer.chain.add(statement)
                    peer.chain.add_signature(Signature(GENESIS, EPOCH, self._explored.faulty, statement.id))
            elif proposed := self._peers[proposer].propose(now_s):
                for peer in self._peers.values():
                    peer.chain.add(proposed)
                    # It signs everything that helps it.
                    peer.chain.add_signature(Signature(GENESIS, EPOCH, self._explored.faulty, proposed.id))
            for _ in ("its proposer", "and then the others"):
                votes = [vote for peer in self._peers.values() if (vote := peer.vote(now_s))]
                for vote in votes:
                    self._signed[vote.peer].add(vote.statement)
                    for peer in self._peers.values():
                        peer.chain.add_signature(vote)
            for peer, each in itertools.product(self._peers.values(), self._late):
                peer.on_reveal(each, now_s)
            if statement and self._forwards and proposer == self._explored.faulty:
                for peer in self._peers.values():
                    peer.chain.add(statement)
                    peer.chain.add_signature(Signature(GENESIS, EPOCH, proposer, statement.id))

    def agree_as_messages_come(self, reveals: Sequence[tuple[Reveal, Times]], proofs_s: Times) -> None:
        """Take all turns while reveals of the faulty member, and proofs of its equivocation, still come.

        Who has two reveals, has a proof. What one of the honest has, the others have a twentieth of the epoch later.
        The faulty member signs nothing.
        """
        arrivals = [(reveal, _forwarded(times_s)) for reveal, times_s in reveals]
        if len(arrivals) > 1:
            both_s = (max(times_s) for times_s in zip(*(times_s for _, times_s in arrivals), strict=True))
            proofs_s = tuple(min(pair) for pair in zip(proofs_s, both_s, strict=True))
        proofs_s = _forwarded(proofs_s)
        moments = {time_s for times_s in (proofs_s, *(each for _, each in arrivals)) for time_s in times_s}
        turns_s = {CLOCK.proposes_s(EPOCH, turn) + 0.5 for turn in TURNS}
        ends_s = CLOCK.starts_s(EPOCH + 1)
        for now_s in sorted({time_s for time_s in moments | turns_s if time_s < ends_s}):
            for number, peer in enumerate(self._peers.values()):
                for reveal, at_s in [(reveal, times_s[number]) for reveal, times_s in arrivals]:
                    if at_s == now_s:
                        peer.on_reveal(reveal, now_s)
                if proofs_s[number] == now_s:
                    peer.on_equivocations([self._explored.faulty], now_s)
            proposals = [peer.propose(now_s) for peer in self._peers.values()] if now_s in turns_s else []
            for proposed, peer in itertools.product(filter(None, proposals), self._peers.values()):
                peer.chain.add(proposed)
            for _ in ("its proposer", "and then the others"):
                for vote in [vote for peer in self._peers.values() if (vote := peer.vote(now_s))]:
                    self._signed[vote.peer].add(vote.statement)
                    for peer in self._peers.values():
                        peer.chain.add_signature(vote)

    def assert_safe(self) -> None:
        """No two statements have a quorum, nobody votes twice, and no quorum leaves out or removes the honest."""
        assert all(len(statements) <= 1 for statements in self._signed.values())
        quorate = {
            entry.id: entry for peer in self._peers.values() for entry in peer.chain.head.path() if entry.epoch == EPOCH
        }
        assert len(quorate) <= 1
        for entry in quorate.values():
            assert entry.statement is not None
            assert self._own <= {*entry.statement.commits}
            assert not {*self._peers} - {*entry.members}
            for peer in self._peers.values():
                if (state := peer.state_after(entry.id)) is not None:
                    assert all(member.absences == 0 for member in state.members if member.peer in self._peers)

    def assert_live(self) -> None:
        """The epoch has a statement with a quorum."""
        assert {peer.chain.head.epoch for peer in self._peers.values()} == {EPOCH}


def _forwarded(times_s: Times) -> Times:
    """Return when messages come that the honest forward to each other."""
    return tuple(min(time_s, min(times_s) + CLOCK.epoch_s / 20) for time_s in times_s)


def statements(explored: Explored, reveal: Reveal) -> Iterator[Statement]:
    """Yield what a faulty first proposer may propose: all contributions, or all but one of the honest."""
    peer = next(iter(explored.honest.values()))
    state = peer.state()
    assert state is not None
    own = Contribution(explored.own.commit, reveal)
    others = [
        Contribution(commit, explored.honest[name].reveal(draft, REVEALS_S))
        for name, (commit, draft) in explored.contributions.items()
    ]
    for chosen in ([own, *others], [own, *others[1:]], [*others[1:]]):
        yield peer._conclude(peer.chain.head, state, EPOCH, explored.faulty, chosen, ()).statement


def behaviours(explored: Explored, *, lists_others: bool) -> Iterator[tuple[Times, Reveal, Times]]:
    """Yield all times at which the honest may receive commit and reveal of the faulty member."""
    reveal = explored.reveal_of_faulty(lists_others=lists_others)
    for commits_s in itertools.product(COMMIT_TIMES_S, repeat=3):
        is_committed = min(commits_s) < NEVER
        for reveals_s in itertools.product(REVEAL_TIMES_S, repeat=3) if is_committed else [(NEVER,) * 3]:
            yield commits_s, reveal, reveals_s


@pytest.mark.parametrize(
    ("turn", "lists_others"),
    [
        pytest.param(0, True, id="proposes first, honest list"),
        pytest.param(1, False, id="proposes second, lists itself alone"),
        pytest.param(0, False, id="proposes first, lists itself alone", marks=pytest.mark.soak),
        pytest.param(1, True, id="proposes second, honest list", marks=pytest.mark.soak),
    ],
)
def test_one_faulty_member_neither_splits_nor_censors_nor_stops_an_epoch(turn: int, *, lists_others: bool) -> None:
    explored = Explored(turn)
    for commits_s, reveal, reveals_s in behaviours(explored, lists_others=lists_others):
        run = Run(explored, forwards=True)
        run.commit(commits_s)
        run.reveal(reveal, reveals_s)
        run.agree(None, receivers=0)
        run.assert_safe()
        run.assert_live()


@pytest.mark.parametrize("receivers", [1, 2, 3])
@pytest.mark.parametrize("lists_others", [True, False], ids=["honest list", "lists itself alone"])
def test_what_one_faulty_member_proposes_neither_splits_nor_censors_nor_stops_an_epoch(
    receivers: int, *, lists_others: bool
) -> None:
    explored = Explored(0)
    reveal = explored.reveal_of_faulty(lists_others=lists_others)
    for statement in statements(Explored(0), reveal):
        for pattern in itertools.product(range(3), repeat=3):
            run = Run(explored, forwards=True)
            run.commit(tuple(COMMIT_TIMES_S[number] for number in pattern))
            run.reveal(reveal, tuple(REVEAL_TIMES_S[number] for number in pattern))
            run.agree(statement, receivers)
            run.assert_safe()
            run.assert_live()


@pytest.mark.parametrize(
    "turn", [pytest.param(0, id="proposes first"), pytest.param(1, id="proposes second", marks=pytest.mark.soak)]
)
def test_an_epoch_is_safe_even_if_nothing_is_forwarded(turn: int) -> None:
    explored = Explored(turn)
    for commits_s, reveal, reveals_s in behaviours(explored, lists_others=True):
        run = Run(explored, forwards=False)
        run.commit(commits_s)
        run.reveal(reveal, reveals_s)
        run.agree(None, receivers=0)
        run.assert_safe()


@pytest.mark.parametrize("turn", [pytest.param(turn, id=f"proposes in turn {turn}") for turn in (0, 1, 3)])
def test_two_reveals_of_one_faulty_member_neither_split_nor_stop_an_epoch(turn: int) -> None:
    explored = Explored(turn)
    first, second = (explored.reveal_of_faulty(lists_others=lists) for lists in (True, False))
    for times_s in itertools.product((IN_TIME_S, NEVER), repeat=3):
        for later_s in itertools.product((IN_TIME_S, LATE_S, LAST_S, NEVER), repeat=3):
            run = Run(explored, forwards=True)
            run.commit((COMMITS_S,) * 3)
            run.reveal(first, (NEVER,) * 3)
            run.agree_as_messages_come([(first, times_s), (second, later_s)], (NEVER,) * 3)
            run.assert_safe()
            run.assert_live()


@pytest.mark.parametrize("turn", [pytest.param(turn, id=f"proposes in turn {turn}") for turn in (0, 1, 3)])
def test_proof_of_equivocation_that_comes_at_any_time_does_not_stop_an_epoch(turn: int) -> None:
    explored = Explored(turn)
    reveal = explored.reveal_of_faulty(lists_others=True)
    for proofs_s in itertools.product((COMMITS_S, REVEALS_S, LATE_S, LAST_S, TOO_LATE_S, NEVER), repeat=3):
        run = Run(explored, forwards=True)
        run.commit((COMMITS_S,) * 3)
        run.reveal(reveal, (NEVER,) * 3)
        run.agree_as_messages_come([(reveal, (REVEALS_S,) * 3)], proofs_s)
        run.assert_safe()
        run.assert_live()


def test_order_within_a_phase_does_not_matter() -> None:
    swarm = swarm_of(3)
    swarm.play()
    now_s, reveals_s = CLOCK.starts_s(1) + 10, CLOCK.reveals_begin_s(1) + 1
    contributions = [swarm.contribution(peer, now_s) for peer in swarm.peers]
    statements_of: set[bytes] = set()
    for commits in itertools.permutations(contributions):
        for reveals in itertools.permutations(contributions):
            peers = [_copied(peer.participant) for peer in swarm.peers]
            for peer, (commit, _) in itertools.product(peers, commits):
                peer.on_commit(commit, now_s)
                peer.confirm(commit)
            final = {peer.peer: peer.reveal(c.reveal, reveals_s) for peer, c in zip(peers, contributions, strict=True)}
            for peer, (commit, _) in itertools.product(peers, reveals):
                peer.on_reveal(final[commit.peer], reveals_s)
            found = [s for peer in peers if (s := peer.propose(CLOCK.proposes_s(1, 0) + 1))]
            statements_of |= {statement.id for statement in found}
    assert len(statements_of) == 1
