"""One peer's part in the consensus of an epoch: commit-reveal, proposals and votes. No clock of its own, no effects.

Everything received here was verified. The same set of commits, reveals, statements and signatures leads to the same
head, in whatever order it is received.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from protocol.consensus_values import (
    MAX_CONTRIBUTIONS,
    Cell,
    Commit,
    Reading,
    Reveal,
    Signature,
    Statement,
    commitment_of,
)
from protocol.forms import Digest
from protocol.identity import PeerId
from selector.consensus.chain import Chain, ChainEntry, is_stalled
from selector.consensus.clock import EpochClock
from selector.consensus.sortition import MeasurementPlan, beacon_of, select_committee
from selector.consensus.state import Contribution, EpochResult, State, conclude, founders, initial_state

MAX_COMMITS: Final = 2048
"""Commits remembered of one epoch."""

MAX_STATES: Final = 8
"""States remembered, of the latest statements."""


class _ReceivedCommit(NamedTuple):
    commit: Commit
    received_s: float


class Participant:
    """One peer's part in one chain."""

    def __init__(self, peer: PeerId, chain: Chain, clock: EpochClock, plan: MeasurementPlan) -> None:
        self.peer = peer
        self.chain = chain
        self.clock = clock
        self.plan = plan
        self.equivocators: set[PeerId] = set()
        """Peers with a proof of equivocation."""
        self.voted_epoch = -1
        """The last epoch in which we voted; we do not vote again in it or in earlier ones."""
        self._states: OrderedDict[Digest, State] = OrderedDict({chain.genesis: initial_state(chain.genesis)})
        self._commits: dict[tuple[int, Digest], dict[PeerId, _ReceivedCommit]] = {}
        self._reveals: dict[int, dict[Digest, Reveal]] = {}
        self._confirmed: dict[int, set[Digest]] = {}
        self._assigned: tuple[Digest, int, tuple[Cell, ...]] | None = None
        """Head, epoch and result of the last sortition, which takes long in large swarms."""

    # Receiving

    def on_commit(self, commit: Commit, now_s: float) -> None:
        """Accept a commit of this epoch, or of the one before or after, because clocks differ."""
        if abs(commit.epoch - self.clock.epoch_at(now_s)) <= 1:
            received = self._commits.setdefault((commit.epoch, commit.parent), {})
            if len(received) < MAX_COMMITS:
                received.setdefault(commit.peer, _ReceivedCommit(commit, now_s))

    def on_reveal(self, reveal: Reveal, now_s: float) -> None:
        """Accept a reveal, which counts for the commit that it opens."""
        if abs(reveal.epoch - self.clock.epoch_at(now_s)) <= 1:
            reveals = self._reveals.setdefault(reveal.epoch, {})
            if len(reveals) < MAX_COMMITS:
                reveals.setdefault(reveal.commitment, reveal)

    def confirm(self, commit: Commit) -> None:
        """Count a commit from now on: all observations that it names are available here."""
        self._confirmed.setdefault(commit.epoch, set()).add(commit.id)

    def adopt_state(self, state: State) -> bool:
        """Adopt the head's state from any source; return whether the head's statement names its digests."""
        statement = self.chain.head.statement
        if statement is None or state.digest != statement.state_digest or state.table_digest != statement.table_digest:
            return False
        self._remember(statement.id, state)
        return True

    # Known state

    def state(self) -> State | None:
        """Return the state after the head, None where it is not known yet."""
        return self._states.get(self.chain.head.id)

    def state_after(self, statement: Digest) -> State | None:
        """Return the state after a statement, None where it is not known, or not any more."""
        return self._states.get(statement)

    def assigned(self, now_s: float) -> tuple[Cell, ...]:
        """Return the cells that we are to measure in this epoch."""
        if (state := self.state()) is None:
            return ()
        head, epoch = self.chain.head.id, self.clock.epoch_at(now_s)
        if self._assigned is None or self._assigned[:2] != (head, epoch):
            assignments = state.assignments(head, epoch, self.plan)
            selected = tuple(cell for cell, peers in assignments.items() if self.peer in peers)
            self._assigned = (head, epoch, selected)
        return self._assigned[2]

    def is_selected(self, now_s: float) -> bool:
        """Return whether our commit is expected: we are selected to measure or to sign, or are not a member yet."""
        if (state := self.state()) is None or self.peer in state.banned:
            return False
        members = self.chain.head.members
        committee = select_committee(beacon_of(self.chain.head.id, self.clock.epoch_at(now_s)), members)
        return self.peer not in members or self.peer in committee or bool(self.assigned(now_s))

    def unconfirmed(self, now_s: float) -> list[Commit]:
        """Return the commits of this epoch whose observations may not be available here."""
        epoch = self.clock.epoch_at(now_s)
        confirmed = self._confirmed.get(epoch, set())
        received = self._commits.get((epoch, self.chain.head.id), {})
        return [each.commit for each in received.values() if each.commit.id not in confirmed]

    def contributors(self, epoch: int) -> tuple[PeerId, ...]:
        """Return the peers that have committed in an epoch, after the head."""
        return tuple(self._commits.get((epoch, self.chain.head.id), {}))

    def derive_state(self) -> bool:
        """Derive the head's state from the contributions that it names; return whether it is known.

        Where too many of them were missed, `adopt_state` has to get it from another peer.
        """
        unknown: list[ChainEntry] = []
        for entry in self.chain.head.path():
            if entry.id in self._states:
                return all(self._derive(each) for each in reversed(unknown))
            unknown.append(entry)
        return False

    # Sending

    def contribute(
        self, now_s: float, hardware: str, readings: Sequence[Reading], observations: Sequence[bytes], nonce: bytes
    ) -> Contribution:
        """Return our commit for this epoch, to be sent now, and the reveal, to be sent in its phase."""
        epoch = self.clock.epoch_at(now_s)
        ordered = tuple(sorted(readings))
        reveal = Reveal(self.chain.genesis, epoch, self.peer, nonce, ordered)
        commit = Commit(
            chain=self.chain.genesis,
            epoch=epoch,
            parent=self.chain.head.id,
            peer=self.peer,
            hardware=hardware,
            commitment=commitment_of(self.peer, nonce, ordered),
            observations=tuple(sorted(observations)),
        )
        self.on_commit(commit, now_s)
        self.on_reveal(reveal, now_s)
        self.confirm(commit)
        return Contribution(commit, reveal)

    def propose(self, now_s: float) -> Statement | None:
        """Return our proposal, if it is our turn and we have not proposed yet."""
        epoch = self.clock.epoch_at(now_s)
        if epoch <= self.voted_epoch or (state := self.state()) is None:
            return None
        contributions = self._contributions(epoch)
        restart = is_stalled(len(self.chain.head.members), epoch - self.chain.head.epoch)
        voters = founders(contributions) if restart else self.chain.head.members
        committee = select_committee(beacon_of(self.chain.head.id, epoch), voters)
        if not contributions or self.peer not in committee:
            return None
        turn = committee.index(self.peer)
        if turn >= self.clock.turns() or now_s < self.clock.proposes_s(epoch, turn):
            return None
        if any(entry.statement and entry.statement.proposer == self.peer for entry in self.chain.candidates(epoch)):
            return None
        return self._conclude(self.chain.head, state, epoch, self.peer, contributions, self.equivocators).statement

    def vote(self, now_s: float) -> Signature | None:
        """Return our signature for the first valid statement of this epoch, if it is due.

        The caller must persist it before sending it: a second one in this epoch would be an equivocation.
        """
        epoch = self.clock.epoch_at(now_s)
        if epoch <= self.voted_epoch or (state := self.state()) is None:
            return None
        for entry in self.chain.candidates(epoch):
            statement = entry.statement
            if statement is None or self.peer not in entry.committee:
                continue
            # The proposer must have signed, so that proposing two statements is an equivocation as well.
            if statement.proposer not in {*entry.signers, self.peer}:
                continue
            # A proposal before its turn may leave out contributions that are about to be revealed.
            turn = entry.committee.index(statement.proposer)
            if now_s >= self.clock.proposes_s(epoch, turn) and self._is_valid(state, statement):
                self.voted_epoch = epoch
                signature = Signature(self.chain.genesis, epoch, self.peer, statement.id)
                self.chain.add_signature(signature)
                return signature
        return None

    def prune(self, now_s: float) -> None:
        """Drop the messages of past epochs."""
        oldest = self.clock.epoch_at(now_s) - 1
        self._commits = {key: received for key, received in self._commits.items() if key[0] >= oldest}
        self._reveals = {epoch: received for epoch, received in self._reveals.items() if epoch >= oldest}
        self._confirmed = {epoch: ids for epoch, ids in self._confirmed.items() if epoch >= oldest}
        self.chain.drop_early_signatures()

    def _contributions(self, epoch: int) -> list[Contribution]:
        """Return the contributions that count for us: in time, revealed, confirmed, and not of equivocators.

        Members come first; of too many, those with the smallest ids.
        """
        received = self._commits.get((epoch, self.chain.head.id), {})
        reveals = self._reveals.get(epoch, {})
        confirmed = self._confirmed.get(epoch, set())
        deadline_s = self.clock.reveals_begin_s(epoch)
        found = [
            Contribution(commit, reveals[commit.commitment])
            for commit, received_s in received.values()
            if received_s <= deadline_s and commit.id in confirmed and commit.commitment in reveals
        ]
        members = set(self.chain.head.members)
        found.sort(key=lambda each: (each.commit.peer not in members, each.commit.peer))
        return [each for each in found if each.commit.peer not in self.equivocators][:MAX_CONTRIBUTIONS]

    def _is_valid(self, state: State, statement: Statement) -> bool:
        """Return whether a statement follows from contributions that count for us, and from nothing else."""
        if not {*statement.expelled} <= self.equivocators:
            return False
        counted = {each.commit.id: each for each in self._contributions(statement.epoch)}
        if not {*statement.commits} <= counted.keys():
            return False
        contributions = [counted[commit] for commit in statement.commits]
        return self._follows(self.chain.head, state, statement, contributions)

    def _derive(self, entry: ChainEntry) -> bool:
        """Derive the state after a statement whose parent's is known; return whether all contributions are here."""
        statement, parent = entry.statement, entry.parent
        if statement is None or parent is None:
            return False
        reveals = self._reveals.get(entry.epoch, {})
        held = {each.commit.id: each.commit for each in self._commits.get((entry.epoch, parent.id), {}).values()}
        commits = [held[commit] for commit in statement.commits if commit in held]
        contributions = [Contribution(each, reveals[each.commitment]) for each in commits if each.commitment in reveals]
        if len(contributions) < len(statement.commits):
            return False
        return self._follows(parent, self._states[parent.id], statement, contributions)

    def _follows(
        self, parent: ChainEntry, state: State, statement: Statement, contributions: Sequence[Contribution]
    ) -> bool:
        """Return whether a statement is the result of contributions to the epoch after a parent."""
        result = self._conclude(parent, state, statement.epoch, statement.proposer, contributions, statement.expelled)
        return result.statement == statement

    def _conclude(
        self,
        parent: ChainEntry,
        state: State,
        epoch: int,
        proposer: PeerId,
        contributions: Sequence[Contribution],
        equivocators: Collection[PeerId],
    ) -> EpochResult:
        result = conclude(
            self.chain.genesis,
            parent.id,
            state,
            epoch=epoch,
            proposer=proposer,
            contributions=contributions,
            equivocators=equivocators,
            plan=self.plan,
            restart=is_stalled(len(parent.members), epoch - parent.epoch),
        )
        self._remember(result.statement.id, result.state)
        return result

    def _remember(self, statement: Digest, state: State) -> None:
        self._states[statement] = state
        self._states.move_to_end(statement)
        while len(self._states) > MAX_STATES:
            oldest = next(key for key in self._states if key != self.chain.head.id)
            del self._states[oldest]
