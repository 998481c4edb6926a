"""This node's part in one chain, in turns: apply what was received, then propose, vote, commit or reveal what is due.

The participant changes only in `turn`, one turn at a time. Our own messages are durable before they are published, so
that a node that is killed at any instant never equivocates.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final

import structlog
import trio

from node.consensus.chain_recovery import ChainRecovery
from node.consensus.chain_replica import ChainReplica, state_parts
from node.consensus.contribution import Contributor
from node.consensus.environment import ConsensusEnvironment, ConsensusRules, Meter
from node.stages.voter import Agreement
from node.storage.chain_store import StoredStatement
from node.storage.database import StorageError
from node.util.signal import Signal
from protocol.chains import StatePart
from protocol.consensus import SignedMessage
from protocol.consensus_values import Commit, Reveal, Signature, Statement
from protocol.forms import Digest
from selector.consensus.chain import ChainEntry

MAX_INBOX: Final = 4096
"""Messages that wait for the next turn; further ones are dropped, and fetched later."""

RECENT_STATEMENTS: Final = 8
"""The last statements of the canonical branch, for display."""

TURN_PAUSE_S: Final = 0.02
"""Between two turns, however much is received: what arrives meanwhile is applied together."""

REPORT_INTERVAL_S: Final = 60.0

_logger = structlog.get_logger(__name__)


class ChainNode:
    """This node's part in one chain."""

    def __init__(
        self,
        environment: ConsensusEnvironment,
        rules: ConsensusRules,
        genesis: Digest,
        meter: Meter,
        *,
        participates: Callable[[], bool],
        publish: Callable[[Sequence[SignedMessage]], None],
    ) -> None:
        """`participates`: whether we serve the chain's model, and so measure and sign, or only follow.

        `publish` gossips our messages, once they are saved.
        """
        self.genesis = genesis
        self.clock = rules.clock
        self.lock = trio.Lock()
        """Held while the replica is read: it does not change meanwhile."""
        self.replica = replica = ChainReplica(environment.identity, rules, genesis)
        self.needs_sync = replica.needs_sync
        self._recovery = ChainRecovery(environment.store, replica)
        self._contributor = Contributor(environment, replica, meter)
        self._environment = environment
        self._meter = meter
        self._participates = participates
        self._publish = publish
        self._inbox: list[SignedMessage] = []
        self._wake = Signal()
        self._turn_over = trio.Event()
        """Set at the end of the turn that begins next."""
        self.recent: tuple[ChainEntry, ...] = ()
        """The last entries of the canonical branch, the newest first."""
        self._agreement: Agreement | None = None
        self._pruned_epoch = -1
        self._report_at_s = -math.inf

    @property
    def agreement(self) -> Agreement | None:
        """The current agreement; None before the first statement, or before the state after it is known."""
        return self._agreement

    @property
    def measured(self) -> int:
        """The number of cells measured since the start."""
        return self._contributor.measured

    def now_s(self) -> float:
        """Return Unix time by this node's clock."""
        return self._environment.wall_clock()

    def receive(self, messages: Iterable[SignedMessage]) -> None:
        """Queue verified messages for the next turn."""
        for message in messages:
            if len(self._inbox) < MAX_INBOX:
                self._inbox.append(message)
        self._wake.set()

    def awaits(self, message: SignedMessage) -> bool:
        """Return whether a message is what an expected peer contributes to this epoch."""
        return isinstance(message.body, Commit | Reveal) and self.replica.participant.is_awaited(message.body)

    # Anti-entropy sessions

    async def position(self) -> tuple[tuple[Digest, ...], Digest]:
        """Return the locator of the canonical branch, and the digest of the recent messages."""
        async with self.lock:
            return self.replica.locator(), self.replica.log.digest()

    async def recent_records(self) -> dict[bytes, SignedMessage]:
        """Return the recent messages by short id."""
        async with self.lock:
            return self.replica.log.recent()

    async def branch_after(self, locator: Iterable[Digest], limit: int) -> Sequence[StoredStatement]:
        """Return the statements of the canonical branch after the first one of a locator that is on it."""
        store = self._environment.store
        epoch = await store.epoch_of(self.genesis, locator)
        found = await store.statements(self.genesis, after_epoch=-1 if epoch is None else epoch, limit=limit)
        return [each for each in found if each.epoch <= self.replica.chain.latest_epoch]

    async def head_without_state(self) -> Digest | None:
        """Return the head if the state after it is unknown and has to be fetched."""
        async with self.lock:
            return self.replica.chain.head.id if self.replica.is_state_missing() else None

    def has_statement(self, statement: Digest) -> bool:
        """Return whether a statement descends from the genesis here."""
        return statement in self.replica.chain

    async def adopt_state(self, parts: Sequence[StatePart]) -> bool:
        """Adopt the state after the head from any peer; return whether it is that."""
        async with self.lock:
            adopted = self.replica.adopt_state(parts)
        self._wake.set()
        return adopted

    async def parts_after(self, statement: Digest) -> list[StatePart]:
        """Return the state after a statement in parts; a single empty part where it is not known."""
        async with self.lock:
            state = self.replica.participant.state_after(statement)
        return [StatePart(last=True)] if state is None else state_parts(state)

    # Turns

    async def run(self) -> None:
        """Take turns until cancelled. `load` first: a chain that has forgotten its votes could equivocate."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measurement_loop)
            while True:
                await self.turn()
                await trio.sleep(TURN_PAUSE_S)
                with trio.move_on_after(self._idle_s()):
                    await self._wake.wait()

    async def load(self) -> None:
        """Continue where the last process stopped."""
        now_s, own_peer = self.now_s(), self._environment.identity.peer_id
        participant, epoch = self.replica.participant, self.clock.epoch_at(now_s)
        participant.chain.follow_until(epoch + 1)
        messages, closed, complete = await self._recovery.load_messages()
        participant.signed.closed.update(closed)
        withheld = await self._environment.store.withheld(self.genesis)
        if withheld and not self._meter.withheld():
            self._meter.restore(withheld)
        await self._recovery.load_branch()
        self._update_agreement()
        if not complete:
            # We may have voted or committed in this epoch already, with a database that was lost.
            participant.signed.closed.add(epoch - 1, epoch)
        for message in messages:
            if not isinstance(message.body, Reveal):  # a secret until its phase
                self.replica.hold(message, now_s)
            match message.body:
                case Signature() as signature if message.peer == own_peer:
                    participant.signed.voted.add(signature.epoch)
                    participant.chain.add_signature(signature)
                case Commit() | Reveal():
                    self._contributor.restore(message, now_s)
                case Statement() as statement:
                    self.replica.apply_statement(message, statement)
                case _:
                    pass

    async def next_turn(self) -> None:
        """Wait until `run` has applied all that is received by now.

        The caller may be cancelled at any time, a turn may not: it has taken messages, and signed ours only once.
        """
        turn_over = self._turn_over
        self._wake.set()
        await turn_over.wait()

    async def turn(self) -> None:
        """Apply the received messages, and publish what is due.

        If the database fails, the next turn tries again, except for our vote, proposal and commit of this epoch.
        """
        turn_over, self._turn_over = self._turn_over, trio.Event()
        try:
            await self._turn()
        except StorageError as error:
            self._report(error)
            self._pruned_epoch = -1  # what it does once an epoch may not be done
        turn_over.set()

    async def _turn(self) -> None:
        inbox, self._inbox = self._inbox, []
        now_s = self.now_s()
        async with self.lock:
            proofs = [proof for message in inbox if (proof := self.replica.apply(message, now_s))]
            if self.clock.epoch_at(now_s) != self._pruned_epoch:
                self.prune(now_s)
                if self.replica.is_state_missing():  # the clock was set back, and so was the head
                    await self._recovery.load_state()
            await self._confirm_commits(now_s)
            participates = self._participates()  # not known in a thread
            voted = await self._environment.offload(lambda: self._propose_and_vote(now_s, participates=participates))
            due = [*voted, *proofs]
            reveals = self._contributor.due_reveals(now_s)
            due += reveals
            try:
                due += await self._save(due, now_s)
            except StorageError as error:
                # Unsaved messages are not published; the other peers go on without us. Reveals are tried again.
                self._contributor.put_back(reveals)
                _logger.warning("could not persist consensus messages; not publishing them", reason=str(error))
                return
            for message in due:
                self.replica.hold(message, now_s)
            self._update_agreement()
        if due:
            self._publish(due)
            self._wake.set()  # our own message may complete a quorum
        if self.replica.is_state_missing():
            self.needs_sync.set()
        if reveals:
            await self._meter.revealed()
            await self._environment.store.replace_withheld(self.genesis, self._meter.withheld())

    def _report(self, error: StorageError) -> None:
        """Log a failure, of which there may be one in every turn, once a minute."""
        if trio.current_time() >= self._report_at_s:
            self._report_at_s = trio.current_time() + REPORT_INTERVAL_S
            _logger.warning("could not read the database for a chain, retrying", reason=str(error))

    def prune(self, now_s: float) -> None:
        """Drop the messages of past epochs, and a chain whose final statements are of the future."""
        self._pruned_epoch = self.clock.epoch_at(now_s)
        chain = self.replica.chain
        if chain.root.epoch > self._pruned_epoch + 1 and self._environment.clock_agrees():
            _logger.warning("chain dropped: a wrong clock signed its final statements", epoch=chain.root.epoch)
            chain.start_anew()
        self.replica.prune(now_s)
        self._contributor.prune(self._pruned_epoch)

    async def _confirm_commits(self, now_s: float) -> None:
        """Confirm the commits whose observations are all available here: others do not count for us."""
        for commit in self.replica.participant.unconfirmed(now_s):
            names = commit.observations
            try:
                found = len(await self._environment.history.get_many(names)) if names else 0
            except StorageError as error:
                self._report(error)
                return
            if found == len(names):
                self.replica.participant.confirm(commit)

    def _propose_and_vote(self, now_s: float, *, participates: bool) -> list[SignedMessage]:
        """Return our proposal and our vote, as far as they are due. May take long."""
        participant = self.replica.participant
        participant.derive_state()
        if not participates:
            return []
        due: list[SignedMessage] = []
        if (statement := participant.propose(now_s)) and (proposal := self.replica.sign(statement)):
            due.append(proposal)
            self.replica.apply_statement(proposal, statement)
        if (signature := participant.vote(now_s)) and (vote := self.replica.sign(signature)):
            due.append(vote)
        return due

    async def _save(self, due: Sequence[SignedMessage], now_s: float) -> list[SignedMessage]:
        """Save our messages and the canonical branch; return our commit, if one is due. Raises StorageError."""
        contribution = await self._contributor.contribution(now_s) if self._participates() else None
        pair = [contribution.commit, contribution.reveal] if contribution else []
        oldest = self.clock.epoch_at(now_s) - 1
        # Without its observations an agreed cell could not be placed: they are saved with the commit to its readings.
        await self._recovery.save_messages([*due, *pair], oldest, self._meter.withheld() if contribution else None)
        if contribution:
            await self._environment.store.mark_committed(self.genesis, contribution.number)
            self._contributor.schedule_reveal(contribution)
        await self._recovery.save_branch(oldest)
        return pair[:1]

    async def _measurement_loop(self) -> None:
        while True:
            if self._participates() and await self._contributor.measure_next(self.lock):
                self._wake.set()
            else:
                await trio.sleep(max(TURN_PAUSE_S, self.clock.epoch_s / 100))

    def _update_agreement(self) -> None:
        head, state = self.replica.chain.head, self.replica.participant.state()
        if not self.recent or self.recent[0] is not head:
            self.recent = tuple(islice(head.path(), RECENT_STATEMENTS))
        if head.statement is None or state is None:
            return
        if self._agreement is None or self._agreement.statement != head.id:
            self._agreement = Agreement(
                epoch=head.epoch,
                statement=head.id,
                table_digest=state.table_digest,
                weights=state.weights,
                table=state.table,
                hardware=state.hardware,
                readings=state.readings,
            )
            _logger.info("statement agreed", epoch=head.epoch, members=len(state.members), cells=len(state.table))

    def _idle_s(self) -> float:
        """Return the time to the next turn, if nothing is received."""
        # Observations arrive without notice, so that commits that name them are checked again and again.
        now_s = self.now_s()
        return min(self.clock.next_phase_s(now_s) - now_s, self.clock.epoch_s / 20)
