"""What one peer knows and does in an epoch: commit, reveal, propose, sign. No clock of its own, and no effects.

Everything that comes in was verified to be said by whom it names. The same set of commits, reveals, statements and
signatures leads to the same head, whatever the order.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from selector.consensus.chain import Chain, Link, has_lapsed
from selector.consensus.clock import EpochClock
from selector.consensus.sortition import Agenda, beacon_of, draw_committee
from selector.consensus.state import Contribution, Outcome, State, conclude, founders, initial_state
from selector.consensus.values import (
    Cell,
    Commit,
    Digest,
    Reading,
    Reveal,
    Signature,
    Statement,
    commitment_of,
)

MAX_CONTRIBUTORS: Final = 304
"""Contributions to one statement: those that were drawn, and newcomers."""

MAX_COMMITS: Final = 2048
"""Commits remembered of one epoch."""

MAX_STATES: Final = 8
"""States remembered: those of the latest statements."""


class _Heard(NamedTuple):
    commit: Commit
    heard_s: float


class Participant:
    """One peer's part in one chain."""

    def __init__(self, peer: str, chain: Chain, clock: EpochClock, agenda: Agenda) -> None:
        self.peer = peer
        self.chain = chain
        self.clock = clock
        self.agenda = agenda
        self.offenders: set[str] = set()
        """Who was proven to have said two things where only one may be said."""
        self.voted_epoch = -1
        """The last epoch for which we signed a statement; none before or in it is signed any more."""
        self._states: OrderedDict[Digest, State] = OrderedDict({chain.genesis: initial_state(chain.genesis)})
        self._commits: dict[tuple[int, Digest], dict[str, _Heard]] = {}
        self._reveals: dict[int, dict[Digest, Reveal]] = {}
        self._complete: dict[int, set[Digest]] = {}
        self._assigned: tuple[Digest, int, tuple[Cell, ...]] | None = None
        """The head and the epoch of the last draw, which takes long in large swarms, and what it came to."""

    # What comes in

    def hear_commit(self, commit: Commit, now_s: float) -> None:
        """Take in a commit of this epoch or of the one before or after: clocks differ."""
        if abs(commit.epoch - self.clock.epoch_at(now_s)) <= 1:
            heard = self._commits.setdefault((commit.epoch, commit.parent), {})
            if len(heard) < MAX_COMMITS:
                heard.setdefault(commit.peer, _Heard(commit, now_s))

    def hear_reveal(self, reveal: Reveal, now_s: float) -> None:
        """Take in a reveal; it counts for the commit that it opens."""
        if abs(reveal.epoch - self.clock.epoch_at(now_s)) <= 1:
            reveals = self._reveals.setdefault(reveal.epoch, {})
            if len(reveals) < MAX_COMMITS:
                reveals.setdefault(reveal.commitment, reveal)

    def hear_statement(self, statement: Statement) -> Link:
        """Take in a statement. Raises InvalidStatement."""
        return self.chain.add(statement)

    def hear_signature(self, signature: Signature) -> None:
        """Take in a signature."""
        self.chain.sign(signature)

    def hear_offence(self, peer: str) -> None:
        """Take in that a peer was proven to have equivocated."""
        self.offenders.add(peer)

    def confirm(self, commit: Commit) -> None:
        """Take in that every observation which a commit names is at hand: only then it counts for us."""
        self._complete.setdefault(commit.epoch, set()).add(commit.id)

    def learn_state(self, state: State) -> bool:
        """Take in the head's state, which may come from anybody; return whether it is that."""
        statement = self.chain.head.statement
        if statement is None or state.digest != statement.state_digest or state.table_digest != statement.table_digest:
            return False
        self._remember(statement.id, state)
        return True

    # What is known

    def state(self) -> State | None:
        """Return the state that follows from the head, None where it is not known yet."""
        return self._states.get(self.chain.head.id)

    def state_after(self, statement: Digest) -> State | None:
        """Return the state that follows from a statement, None where it is not known any more, or not yet."""
        return self._states.get(statement)

    def assigned(self, now_s: float) -> tuple[Cell, ...]:
        """Return the cells that we are to measure in this epoch."""
        if (state := self.state()) is None:
            return ()
        head, epoch = self.chain.head.id, self.clock.epoch_at(now_s)
        if self._assigned is None or self._assigned[:2] != (head, epoch):
            assignments = state.assignments(head, epoch, self.agenda)
            drawn = tuple(cell for cell, peers in assignments.items() if self.peer in peers)
            self._assigned = (head, epoch, drawn)
        return self._assigned[2]

    def is_drawn(self, now_s: float) -> bool:
        """Whether the swarm waits for our commit: we are drawn to measure or to sign, or are no member yet."""
        if (state := self.state()) is None or self.peer in state.expelled:
            return False
        epoch = self.clock.epoch_at(now_s)
        members = self.chain.head.members
        committee = draw_committee(beacon_of(self.chain.head.id, epoch), members)
        return self.peer not in members or self.peer in committee or bool(self.assigned(now_s))

    def unconfirmed(self, now_s: float) -> list[Commit]:
        """Return the commits of this epoch of which it is not known that what they name is at hand."""
        epoch = self.clock.epoch_at(now_s)
        complete = self._complete.get(epoch, set())
        heard = self._commits.get((epoch, self.chain.head.id), {})
        return [each.commit for each in heard.values() if each.commit.id not in complete]

    def contributors(self, epoch: int) -> tuple[str, ...]:
        """Return who has committed to something in an epoch, after the head."""
        return tuple(self._commits.get((epoch, self.chain.head.id), {}))

    def deduce(self) -> bool:
        """Find out the head's state from the contributions that it names; return whether it is known.

        Where too many of them were missed, somebody else has to tell it: `learn_state`.
        """
        unknown: list[Link] = []
        for link in self.chain.head.path():
            if link.id in self._states:
                return all(self._deduced(each) for each in reversed(unknown))
            unknown.append(link)
        return False

    # What goes out

    def contribute(
        self, now_s: float, hardware: str, readings: Sequence[Reading], observations: Sequence[bytes], nonce: bytes
    ) -> Contribution:
        """Return our commit for this epoch, which goes out now, and the reveal, which goes out when that is due."""
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
        self.hear_commit(commit, now_s)
        self.hear_reveal(reveal, now_s)
        self.confirm(commit)
        return Contribution(commit, reveal)

    def propose(self, now_s: float) -> Statement | None:
        """Return the statement that it is our turn to propose, if it is, and nothing valid came before it."""
        epoch = self.clock.epoch_at(now_s)
        if epoch <= self.voted_epoch or (state := self.state()) is None:
            return None
        contributions = self._contributions(epoch)
        refounds = has_lapsed(len(self.chain.head.members), epoch - self.chain.head.epoch)
        signers = founders(contributions) if refounds else self.chain.head.members
        committee = draw_committee(beacon_of(self.chain.head.id, epoch), signers)
        if not contributions or self.peer not in committee:
            return None
        turn = committee.index(self.peer)
        if turn >= self.clock.turns() or now_s < self.clock.proposes_s(epoch, turn):
            return None
        if any(link.statement and link.statement.proposer == self.peer for link in self.chain.candidates(epoch)):
            return None
        return self._conclude(self.chain.head, state, epoch, self.peer, contributions, self.offenders).statement

    def vote(self, now_s: float) -> Signature | None:
        """Return our signature for the first statement of this epoch that we find right, if it is due.

        Whoever calls must keep it for good before it gives it out; another one in this epoch would be an offence.
        """
        epoch = self.clock.epoch_at(now_s)
        if epoch <= self.voted_epoch or (state := self.state()) is None:
            return None
        for link in self.chain.candidates(epoch):
            statement = link.statement
            if statement is None or self.peer not in link.committee:
                continue
            # Who proposes signs, so that to propose two statements is an equivocation like any other.
            if statement.proposer not in {*link.signatures, self.peer}:
                continue
            # Before its turn a proposal may leave out what others are about to reveal.
            turn = link.committee.index(statement.proposer)
            if now_s >= self.clock.proposes_s(epoch, turn) and self._is_right(state, statement):
                self.voted_epoch = epoch
                signature = Signature(epoch, self.peer, statement.id)
                self.chain.sign(signature)
                return signature
        return None

    def forget(self, now_s: float) -> None:
        """Forget what was said for epochs that are over."""
        oldest = self.clock.epoch_at(now_s) - 1
        self._commits = {key: heard for key, heard in self._commits.items() if key[0] >= oldest}
        self._reveals = {epoch: heard for epoch, heard in self._reveals.items() if epoch >= oldest}
        self._complete = {epoch: ids for epoch, ids in self._complete.items() if epoch >= oldest}
        self.chain.forget_early()

    def _contributions(self, epoch: int) -> list[Contribution]:
        """Return what we hold against nobody: in time, revealed, complete; of too many, those with the smallest ids."""
        heard = self._commits.get((epoch, self.chain.head.id), {})
        reveals = self._reveals.get(epoch, {})
        complete = self._complete.get(epoch, set())
        in_time = self.clock.reveals_begin_s(epoch)
        found = [
            Contribution(commit, reveals[commit.commitment])
            for commit, heard_s in heard.values()
            if heard_s <= in_time and commit.id in complete and commit.commitment in reveals
        ]
        members = set(self.chain.head.members)
        found.sort(key=lambda each: (each.commit.peer not in members, each.commit.peer))
        return [each for each in found if each.commit.peer not in self.offenders][:MAX_CONTRIBUTORS]

    def _is_right(self, state: State, statement: Statement) -> bool:
        """Whether a statement is what follows from contributions that we hold, and from nothing else."""
        if not {*statement.expelled} <= self.offenders:
            return False
        held = {each.commit.id: each for each in self._contributions(statement.epoch)}
        if not {*statement.commits} <= held.keys():
            return False
        contributions = [held[commit] for commit in statement.commits]
        outcome = self._conclude(
            self.chain.head, state, statement.epoch, statement.proposer, contributions, statement.expelled
        )
        return outcome.statement == statement

    def _deduced(self, link: Link) -> bool:
        """Whether the state after a statement follows from contributions that are held. Its parent's is known."""
        statement, parent = link.statement, link.parent
        if statement is None or parent is None:
            return False
        reveals = self._reveals.get(link.epoch, {})
        held = {heard.commit.id: heard.commit for heard in self._commits.get((link.epoch, parent.id), {}).values()}
        commits = [held[commit] for commit in statement.commits if commit in held]
        contributions = [Contribution(each, reveals[each.commitment]) for each in commits if each.commitment in reveals]
        if len(contributions) < len(statement.commits):
            return False
        outcome = self._conclude(
            parent, self._states[parent.id], link.epoch, statement.proposer, contributions, statement.expelled
        )
        return outcome.statement == statement

    def _conclude(
        self,
        head: Link,
        state: State,
        epoch: int,
        proposer: str,
        contributions: Sequence[Contribution],
        offenders: Sequence[str] | set[str],
    ) -> Outcome:
        outcome = conclude(
            self.chain.genesis,
            head.id,
            state,
            epoch=epoch,
            proposer=proposer,
            contributions=contributions,
            offenders=offenders,
            agenda=self.agenda,
            refounds=has_lapsed(len(head.members), epoch - head.epoch),
        )
        self._remember(outcome.statement.id, outcome.state)
        return outcome

    def _remember(self, statement: Digest, state: State) -> None:
        self._states[statement] = state
        self._states.move_to_end(statement)
        while len(self._states) > MAX_STATES:
            oldest = next(key for key in self._states if key != self.chain.head.id)
            del self._states[oldest]
