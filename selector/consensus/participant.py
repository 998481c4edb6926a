"""One peer's part in the consensus of an epoch: commit-reveal, proposals and votes. No clock of its own, no effects.

Everything received here was verified. The same set of commits, reveals, statements and signatures leads to the same
head, in whatever order it is received.

No proposer decides whose contribution counts. Members of the committee list the commits that they hold, and send the
list with their reveal. We sign no statement that leaves out a contribution which more than a third of the committee
lists, and whose reveal we received in time.
"""

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Generic, NamedTuple, TypeVar

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
from selector.consensus import inclusion
from selector.consensus.chain import FAULT_TOLERANT, Chain, ChainEntry, is_stalled, restart_refused
from selector.consensus.clock import EpochClock
from selector.consensus.epoch_set import SignedEpochs
from selector.consensus.membership import founders
from selector.consensus.sortition import (
    MeasurementPlan,
    Sortition,
    beacon_of,
    newcomer_rank,
    newcomers_in_order,
    select_committee,
)
from selector.consensus.state import Contribution, EpochResult, State, beacon_after, conclude, counts, initial_state

MAX_COMMITS: Final = 2048
"""Commits remembered of one epoch."""

MAX_REVEALS: Final = 2
"""Reveals remembered of one commit."""

MAX_NEWCOMERS: Final = 96
"""Newcomers whose contributions we propose, those of the lowest ranks: half of those whose messages are held, so that
others hold them, too, even if they have seen a few more newcomers."""

MAX_STATES: Final = 8
"""States remembered, of the latest statements."""

_M = TypeVar("_M", Commit, Reveal)


class _Received(NamedTuple, Generic[_M]):
    message: _M
    received_s: float


class Participant:
    """One peer's part in one chain."""

    def __init__(self, peer: PeerId, chain: Chain, clock: EpochClock, plan: MeasurementPlan) -> None:
        self.peer = peer
        self.chain = chain
        self.clock = clock
        self.plan = plan
        self.equivocators: dict[PeerId, float] = {}
        """Peers with a proof of equivocation, and when we got it."""
        self.signed = SignedEpochs()
        self._states: OrderedDict[Digest, State] = OrderedDict({chain.genesis: initial_state(chain.genesis)})
        self._commits: dict[tuple[int, Digest], dict[PeerId, _Received[Commit]]] = {}
        self._reveals: dict[int, dict[Digest, list[_Received[Reveal]]]] = {}
        """By epoch and commitment. Two that differ are an equivocation; which of them others count, they name."""
        self._confirmed: dict[int, set[Digest]] = {}
        self._drawn: tuple[Digest, int, Sortition] | None = None
        """Statement, epoch and result of the last sortition, which takes long in large swarms."""

    # Receiving

    def on_commit(self, commit: Commit, now_s: float) -> None:
        """Accept a commit of this epoch, or of the one before or after, because clocks differ."""
        if abs(commit.epoch - self.clock.epoch_at(now_s)) <= 1:
            received = self._commits.setdefault((commit.epoch, commit.parent), {})
            if len(received) < MAX_COMMITS:
                received.setdefault(commit.peer, _Received(commit, now_s))

    def on_reveal(self, reveal: Reveal, now_s: float) -> None:
        """Accept a reveal, which counts for the commit that it opens."""
        if abs(reveal.epoch - self.clock.epoch_at(now_s)) <= 1:
            reveals = self._reveals.setdefault(reveal.epoch, {})
            if len(reveals) < MAX_COMMITS or reveal.commitment in reveals:
                held = reveals.setdefault(reveal.commitment, [])
                if len(held) < MAX_REVEALS and all(each.message != reveal for each in held):
                    held.append(_Received(reveal, now_s))

    def forget(self, message: Commit | Reveal) -> None:
        """Drop a message that gave way to others, which others may not have either."""
        if isinstance(message, Reveal):
            reveals = self._reveals.get(message.epoch, {})
            rest = [each for each in reveals.pop(message.commitment, ()) if each.message != message]
            reveals |= {message.commitment: rest} if rest else {}
        else:
            received = self._commits.get((message.epoch, message.parent), {})
            if message.peer in received and received[message.peer].message == message:
                del received[message.peer]

    def on_equivocations(self, peers: Iterable[PeerId], now_s: float) -> None:
        """Accept proofs of equivocation."""
        for peer in peers:
            self.equivocators.setdefault(peer, now_s)

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
        sortition = self._sortition(self.clock.epoch_at(now_s))
        return sortition.cells_of(self.peer) if sortition else ()

    def is_selected(self, now_s: float) -> bool:
        """Return whether our commit is expected: we are selected to measure or to sign, or are not a member yet."""
        epoch = self.clock.epoch_at(now_s)
        state, sortition = self.state(), self._sortition(epoch)
        if state is None or sortition is None or self.peer in state.banned or epoch <= self.chain.head.epoch:
            return False
        return self.peer not in self.chain.head.members or self.peer in sortition.expected

    def hardware(self) -> str | None:
        """Return the hardware class that we stated when we came; None for a newcomer, which has to state it."""
        state = self.state()
        return state.hardware.get(self.peer) if state else None

    def knows(self, peer: PeerId) -> bool:
        """Return whether a peer is a member, or a candidate."""
        state = self.state()
        return peer in self.chain.head.members or peer in {each.peer for each in (state.candidates if state else ())}

    def is_awaited(self, message: Commit | Reveal) -> bool:
        """Return whether an expected peer contributes to this epoch with a message that we hold."""
        if self._drawn is None or self._drawn[:2] != (self.chain.head.id, message.epoch):
            return False
        own = self._commits.get((message.epoch, self.chain.head.id), {}).get(message.peer)
        is_committed = own is not None and message.commitment == own.message.commitment
        return is_committed and message.peer in self._drawn[2].expected

    def unconfirmed(self, now_s: float) -> list[Commit]:
        """Return the commits of this epoch whose observations may not be available here."""
        epoch = self.clock.epoch_at(now_s)
        commits = (each.message for each in self._commits.get((epoch, self.chain.head.id), {}).values())
        return [commit for commit in commits if commit.id not in self._confirmed.get(epoch, set())]

    def unknown_rank(self, peer: PeerId, epoch: int) -> Digest | None:
        """Return the rank of a peer among the newcomers to an epoch; None for a member or candidate."""
        return None if self.knows(peer) else newcomer_rank(beacon_of(self.chain.head.beacon, epoch), peer)

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
        """Return our commit for this epoch, to be sent now, and what `reveal` makes the reveal of in its phase.

        `hardware`: our class, which only a newcomer states.
        """
        epoch = self.clock.epoch_at(now_s)
        ordered = tuple(sorted(readings))
        reveal = Reveal(self.chain.genesis, epoch, self.peer, nonce, ordered)
        commit = Commit(
            chain=self.chain.genesis,
            epoch=epoch,
            parent=self.chain.head.id,
            peer=self.peer,
            hardware=hardware if self.hardware() is None else "",
            commitment=commitment_of(self.peer, nonce, ordered),
            observations=tuple(sorted(observations)),
        )
        self.on_commit(commit, now_s)
        self.confirm(commit)
        return Contribution(commit, reveal)

    def reveal(self, reveal: Reveal, now_s: float) -> Reveal:
        """Return our reveal with our inclusion list, if we are of the committee.

        The caller must persist it before sending it: another list in this epoch would be an equivocation.
        """
        sortition = self._sortition(reveal.epoch)
        own = self._commits.get((reveal.epoch, self.chain.head.id), {}).get(self.peer)
        is_current = own is not None and own.message.commitment == reveal.commitment
        if sortition is not None and is_current and self.peer in sortition.committee:
            held = self._held(reveal.epoch, self.clock.lists_end_s(reveal.epoch))
            listed = held.keys() - self.equivocators.keys()
            reveal = replace(reveal, inclusion=inclusion.pack(listed, sortition.expected))
        self.on_reveal(reveal, now_s)
        return reveal

    def propose(self, now_s: float) -> Statement | None:
        """Return our proposal, if it is our turn and we have not proposed yet."""
        epoch = self.clock.epoch_at(now_s)
        if epoch <= self.chain.head.epoch or not self.signed.may_vote(epoch) or (state := self.state()) is None:
            return None
        contributions, head = self._proposed(epoch), self.chain.head
        voters: Collection[PeerId] = head.members
        drawn = beacon_of(head.beacon, epoch)
        if is_stalled(len(head.members), epoch - head.epoch):
            beacon = self._beacon_after(state, contributions, epoch)
            voters = founders(head.members, (each.commit.peer for each in contributions), beacon)
            if head.members and restart_refused(head.members, voters, drawn, epoch - head.epoch):
                return None
        committee = select_committee(drawn, voters)
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
        if not self.signed.may_vote(epoch) or (state := self.state()) is None:
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
                self.signed.voted.add(epoch)
                signature = Signature(self.chain.genesis, epoch, self.peer, statement.id)
                self.chain.add_signature(signature)
                return signature
        return None

    def prune(self, now_s: float) -> None:
        """Drop the messages of epochs that are not near, now that the epoch changed; follow no later statement."""
        now = self.clock.epoch_at(now_s)
        recent = range(now - 1, now + 2)
        self._commits = {key: received for key, received in self._commits.items() if key[0] in recent}
        self._reveals = {epoch: received for epoch, received in self._reveals.items() if epoch in recent}
        self._confirmed = {epoch: ids for epoch, ids in self._confirmed.items() if epoch in recent}
        self.signed.prune(now - 1)
        self.chain.drop_early_signatures()
        self.chain.follow_until(now + 1)

    def _sortition(self, epoch: int) -> Sortition | None:
        """Return what is drawn for an epoch after the head; None while its state is not known."""
        state = self.state()
        return None if state is None else self._draw(self.chain.head.id, state, epoch)

    def _draw(self, statement: Digest, state: State, epoch: int) -> Sortition:
        if self._drawn is None or self._drawn[:2] != (statement, epoch):
            self._drawn = (statement, epoch, state.draw(epoch, self.plan))
        return self._drawn[2]

    def _held(self, epoch: int, deadline_s: float) -> dict[PeerId, Commit]:
        """Return the commits received by a time whose observations are available here."""
        confirmed = self._confirmed.get(epoch, set())
        received = self._commits.get((epoch, self.chain.head.id), {})
        return {
            peer: commit
            for peer, (commit, received_s) in received.items()
            if received_s <= deadline_s and commit.id in confirmed
        }

    def _contributions(self, epoch: int) -> dict[PeerId, Contribution]:
        """Return the contributions that may count: commits in time, confirmed and revealed.

        Not those of peers whose equivocation we knew when a reveal could no longer be left out, as all others know it
        before the first proposal. Of later proofs we do not know who has them in time: they count in the next epoch.
        """
        state, reveals, deadline_s = self.state(), self._reveals.get(epoch, {}), self.clock.reveals_end_s(epoch)
        if state is None:
            return {}
        found = {
            peer: Contribution(commit, reveals[commit.commitment][0].message)
            for peer, commit in self._held(epoch, self.clock.reveals_begin_s(epoch)).items()
            if commit.commitment in reveals and self.equivocators.get(peer, math.inf) > deadline_s
        }
        return {peer: each for peer, each in found.items() if counts(state, each)}

    def _proposed(self, epoch: int) -> list[Contribution]:
        """Return the contributions that we propose: those that all others hold by now, and are not of equivocators.

        Those that are expected come first; of too many newcomers, those that are drawn.
        """
        state, sortition = self.state(), self._sortition(epoch)
        if state is None or sortition is None:
            return []
        found = {peer: each for peer, each in self._contributions(epoch).items() if peer not in self.equivocators}
        if len(state.members) >= FAULT_TOLERANT:  # else one that is late would stop the epoch
            reveals = [each.message for held in self._reveals.get(epoch, {}).values() for each in held]
            timely = self._held(epoch, self.clock.lists_end_s(epoch)).keys() | self._listed(epoch, reveals)
            found = {peer: each for peer, each in found.items() if peer in timely}
        expected = [found[peer] for peer in sortition.expected if peer in found]
        newcomers = newcomers_in_order(beacon_of(self.chain.head.beacon, epoch), found.keys() - {*sortition.expected})
        drawn = newcomers_in_order(self._beacon_after(state, [*found.values()], epoch), newcomers[:MAX_NEWCOMERS])
        return [*expected, *(found[peer] for peer in drawn)][:MAX_CONTRIBUTIONS]

    def _beacon_after(self, state: State, contributions: Sequence[Contribution], epoch: int) -> Digest:
        head = self.chain.head
        restart = is_stalled(len(head.members), epoch - head.epoch)
        return beacon_after(state, self._draw(head.id, state, epoch), contributions, epoch, restart=restart)

    def _listed(self, epoch: int, reveals: Iterable[Reveal]) -> set[PeerId]:
        """Return the peers that more than a third of the committee list by reveals of its commits, one vote each."""
        sortition = self._sortition(epoch)
        if sortition is None:
            return set()
        received = self._commits.get((epoch, self.chain.head.id), {}).values()
        opened = {each.message.commitment for each in received if each.message.peer in sortition.committee}
        lists = [(each.peer, each.inclusion) for each in reveals if each.commitment in opened]
        united = inclusion.unite(lists, sortition.expected).values()
        return inclusion.listed(united, sortition.expected, len(sortition.committee))

    def _is_timely(self, contribution: Contribution) -> bool:
        """Return whether a contribution was revealed in time not to be left out."""
        epoch = contribution.commit.epoch
        received = self._reveals[epoch][contribution.commit.commitment]
        return received[0].received_s <= self.clock.reveals_end_s(epoch)

    def _required(self, epoch: int, counted: Mapping[PeerId, Contribution]) -> set[PeerId]:
        """Return the peers whose contributions a statement must not leave out.

        Only lists count that were revealed in time: others, the proposer may not have had.
        """
        timely = {
            peer: each.reveal
            for peer, each in counted.items()
            if peer not in self.equivocators and self._is_timely(each)
        }
        return timely.keys() & self._listed(epoch, timely.values())

    def _is_valid(self, state: State, statement: Statement) -> bool:
        """Return whether a statement follows from contributions that count for us, and leaves out no required one."""
        if not statement.commits or not {*statement.expelled} <= self.equivocators.keys():
            return False
        counted = self._contributions(statement.epoch)
        contributions = self._named(statement, [each.commit for each in counted.values()])
        if contributions is None:
            return False
        if not self._required(statement.epoch, counted) <= {each.commit.peer for each in contributions}:
            return False
        return self._follows(self.chain.head, state, statement, contributions)

    def _named(self, statement: Statement, commits: Iterable[Commit]) -> list[Contribution] | None:
        """Return the contributions that a statement names, of those that these commits open; None if some are not here.

        It names one of a peer: of two reveals either may be the one that others count.
        """
        reveals = self._reveals.get(statement.epoch, {})
        opened = (
            Contribution(commit, each.message) for commit in commits for each in reveals.get(commit.commitment, ())
        )
        held = {each.id: each for each in opened}
        found = [held[each] for each in statement.commits if each in held]
        is_complete = len(found) == len(statement.commits) == len({each.commit.peer for each in found})
        return found if is_complete else None

    def _derive(self, entry: ChainEntry) -> bool:
        """Derive the state after a statement whose parent's is known; return whether all contributions are here."""
        statement, parent = entry.statement, entry.parent
        if statement is None or parent is None:
            return False
        received = self._commits.get((entry.epoch, parent.id), {}).values()
        contributions = self._named(statement, [each.message for each in received])
        return contributions is not None and self._follows(parent, self._states[parent.id], statement, contributions)

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
            self._draw(parent.id, state, epoch),
            epoch=epoch,
            proposer=proposer,
            contributions=contributions,
            equivocators=equivocators,
            restart=is_stalled(len(parent.members), epoch - parent.epoch),
        )
        self._remember(result.statement.id, result.state)
        return result

    def _remember(self, statement: Digest, state: State) -> None:
        self._states[statement] = state
        self._states.move_to_end(statement)
        while len(self._states) > MAX_STATES:
            needed = {self.chain.head.id, self.chain.genesis}
            del self._states[next(key for key in self._states if key not in needed)]
