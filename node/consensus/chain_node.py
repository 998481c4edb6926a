"""One chain in the life of this node: takes in what was said, says what is due, and keeps what must not be forgotten.

Everything that touches the participant happens in `turn`, one at a time. What we say is kept before anybody hears it:
a node that is killed at any instant never says a second thing where it may say one.
"""

import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
import trio

from node.consensus.message_log import MessageLog
from node.consensus.translation import parts_of, record_of, state_of, value_of
from node.identity import Identity
from node.replication.history import History
from node.storage.chain_store import Named, StoredState, StoredStatement
from node.storage.database import StorageError
from node.util.offload import Offload, run_in_thread
from node.util.signal import Signal
from protocol.chains import StatePart, decode_state, encode_state
from protocol.consensus import (
    MAX_COMMITTED,
    NONCE_BYTES,
    EquivocationRecord,
    RevealRecord,
    Said,
    SignatureRecord,
    open_said,
    say,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import PeerId
from selector.consensus.chain import KEPT, Chain, InvalidStatement, members_after
from selector.consensus.clock import EpochClock
from selector.consensus.participant import Participant
from selector.consensus.sortition import Agenda
from selector.consensus.state import MAX_JOINED, State
from selector.consensus.table import Entry
from selector.consensus.values import MAX_VALUE, Cell, Commit, Digest, Reading, Reveal, Signature, Statement

MAX_INBOX: Final = 4096
"""Records that wait to be taken in; what comes beyond them is lost, and fetched later."""

MAX_ORPHANS: Final = 256
"""Statements that wait for the one before them."""

LOADED_AT_A_TIME: Final = 64

TURN_PAUSE_S: Final = 0.02
"""Between two turns, however much is heard: what comes meanwhile is taken in together."""

_logger = structlog.get_logger(__name__)


def fresh_nonce() -> bytes:
    """Return what hides readings until they are revealed."""
    return secrets.token_bytes(NONCE_BYTES)


class Store(Protocol):
    """Where a chain is kept; `node.storage.chain_store` is the real one. Every method may raise StorageError."""

    async def keep_records(self, chain: bytes, records: Sequence[tuple[bytes, int, bytes]], oldest_epoch: int) -> None:
        """Keep records (id, epoch, envelope); on return they are safe."""
        ...

    async def records(self, chain: bytes) -> Sequence[bytes]:
        """Return the records kept."""
        ...

    async def keep_standing(
        self, chain: bytes, after_epoch: int, statements: Sequence[StoredStatement], state: StoredState | None
    ) -> None:
        """Let the branch after an epoch consist of these statements."""
        ...

    async def statements(self, chain: bytes, *, after_epoch: int = -1, limit: int = 64) -> Sequence[StoredStatement]:
        """Return statements of the branch after an epoch."""
        ...

    async def epoch_of(self, chain: bytes, statements: Iterable[bytes]) -> int | None:
        """Return the epoch of the first of these statements that is on the branch."""
        ...

    async def state(self, chain: bytes) -> StoredState | None:
        """Return the state kept last."""
        ...

    async def unnamed(self, chain: bytes, observer: PeerId, limit: int) -> Named:
        """Return observations of ours that no commit has named."""
        ...

    async def name(self, chain: bytes, number: int) -> None:
        """Count observations up to a number as named."""
        ...


class Meter(Protocol):
    """Measures cells by real jobs of this node; see `node.consensus.measurement_runner`."""

    async def measure(self, cell: Cell) -> float | None:
        """Return the natural logarithm of the cell's cost over the baseline's; None where it cannot be had now."""
        ...

    async def revealed(self) -> None:
        """Make public what else was seen: the readings are revealed."""
        ...


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a chain has come to. `weights`: of the members' word; `table`: what is agreed of each cell."""

    epoch: int
    statement: Digest
    table_digest: Digest
    weights: dict[str, int]
    table: dict[Cell, Entry]


@dataclass(slots=True, kw_only=True)
class ChainStatistics:
    """What happened in one chain since the start."""

    adopted: int = 0
    """Statements that came to stand."""
    proposed: int = 0
    signed: int = 0
    measured: int = 0
    """Cells that we were drawn for and measured."""
    offences: int = 0
    """Equivocations that we proved."""


class ChainNode:
    """This node's part in one chain."""

    def __init__(
        self,
        *,
        identity: Identity,
        genesis: Digest,
        clock: EpochClock,
        agenda: Agenda,
        store: Store,
        history: History,
        meter: Meter,
        hardware: Callable[[], str | None],
        participates: Callable[[], bool],
        publish: Callable[[Sequence[Said]], None],
        wall_clock: Callable[[], float],
        checkpoints: Collection[Digest] = (),
        offload: Offload = run_in_thread,
        nonce: Callable[[], bytes] = fresh_nonce,
    ) -> None:
        """Know nothing yet.

        `hardware`: our class of hardware, once it is known. `participates`: whether we serve what the chain is about,
        and so measure and sign, or only follow. `publish` gossips what we say, once it is kept.
        """
        self.genesis = genesis
        self.clock = clock
        self.minutes = MessageLog()
        self.participant = Participant(identity.peer_id, Chain(genesis, checkpoints), clock, agenda)
        self.lock = trio.Lock()
        """Held by whoever looks at the participant: it is not changed meanwhile."""
        self.statistics = ChainStatistics()
        self.store = store
        self.wants_more = Signal()
        """Set when something is missing that only others can tell."""
        self._identity = identity
        self._history = history
        self._meter = meter
        self._hardware = hardware
        self._participates = participates
        self._publish = publish
        self._wall_clock = wall_clock
        self._offload = offload
        self._nonce = nonce
        self._inbox: list[Said] = []
        self._orphans: dict[Digest, Statement] = {}
        self._wake = trio.Event()
        self._contributed: set[tuple[int, Digest]] = set()
        self._unrevealed: dict[Digest, Said] = {}
        self._readings: dict[tuple[int, Cell], int | None] = {}
        self._kept: list[tuple[int, Digest, int]] = []
        """The end of the branch as it lies in the store: epoch, statement, how many signatures."""
        self._agreement: Agreement | None = None
        self._kept_state = b""
        self._pruned_epoch = -1

    # What others see

    @property
    def agreement(self) -> Agreement | None:
        """What is agreed, None before the first statement or while the state that follows is not known."""
        return self._agreement

    def now_s(self) -> float:
        """Return Unix time as this node sees it."""
        return self._wall_clock()

    def hear(self, said: Iterable[Said]) -> None:
        """Take note of records whose signatures are right; they are taken in at the next turn."""
        for each in said:
            if len(self._inbox) < MAX_INBOX:
                self._inbox.append(each)
        self._wake.set()

    def locator(self) -> tuple[Digest, ...]:
        """Return statements that we stand by, the newest first, ever fewer further back, at last the genesis."""
        path = [link.id for link in self.participant.chain.head.path()]
        steps, position = [], 0
        while position < len(path):
            steps.append(path[position])
            position += 1 if len(steps) < 8 else 1 << (len(steps) - 7)
        return (*dict.fromkeys((*steps, path[-1], self.genesis)),)

    async def learn_state(self, parts: Sequence[StatePart]) -> bool:
        """Take in the state after the head from anybody; return whether it was that."""
        async with self.lock:
            statement = self.participant.chain.head.statement
            if statement is None:
                return False
            learned = self.participant.learn_state(state_of(parts, statement))
        self._wake.set()
        return learned

    async def parts_after(self, statement: Digest) -> list[StatePart]:
        """Return the state after a statement in parts; one empty part where we do not know it."""
        async with self.lock:
            state = self.participant.state_after(statement)
        return [StatePart(last=True)] if state is None else list(parts_of(state))

    # What sessions with neighbours need

    async def position(self) -> tuple[tuple[Digest, ...], Digest]:
        """Return the locator of our branch, and the digest of the recent records."""
        async with self.lock:
            return self.locator(), self.minutes.digest()

    async def recent_records(self) -> dict[bytes, Said]:
        """Return the recent records by short id."""
        async with self.lock:
            return self.minutes.recent()

    async def branch_after(self, locator: Iterable[Digest], limit: int) -> Sequence[StoredStatement]:
        """Return the statements of our branch after the first one of a locator that is on it."""
        epoch = await self.store.epoch_of(self.genesis, locator)
        return await self.store.statements(self.genesis, after_epoch=-1 if epoch is None else epoch, limit=limit)

    async def head_without_state(self) -> Digest | None:
        """Return the head if the state after it is unknown and has to be fetched."""
        async with self.lock:
            head = self.participant.chain.head
            known = head.statement is None or self.participant.state_after(head.id) is not None
        return None if known else head.id

    def has_statement(self, statement: Digest) -> bool:
        """Return whether a statement follows from the genesis here."""
        return statement in self.participant.chain

    # The life of a keeper

    async def run(self) -> None:
        """Load what was kept, then take turns until cancelled."""
        await self.load()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure_for_ever)
            while True:
                await self.turn()
                await trio.sleep(TURN_PAUSE_S)
                with trio.move_on_after(self._until_due_s()):
                    await self._wake.wait()

    async def load(self) -> None:
        """Go on where the last process stopped."""
        now_s = self._wall_clock()
        envelopes = await self.store.records(self.genesis)
        records: list[Said] = []
        for envelope in envelopes:
            try:
                records.append(open_said(envelope))
            except RemoteProtocolError as error:
                _logger.warning("a record of our own that was kept is not sound", reason=str(error))
        await self._load_branch()
        participant = self.participant
        if not records or len(records) < len(envelopes):
            # Whether we have spoken in this epoch is not known: the database may be new because the old one is lost.
            participant.voted_epoch = self.clock.epoch_at(now_s)
        for said in records:
            if not isinstance(said.body, RevealRecord):  # those are nobody's business before their time
                self.minutes.add(said, self.clock.epoch_at(now_s))
            match value_of(said):
                case Signature() as signature if said.peer == self._identity.peer_id:
                    participant.voted_epoch = max(participant.voted_epoch, signature.epoch)
                    participant.hear_signature(signature)
                case Commit() as commit:
                    self._contributed.add((commit.epoch, commit.parent))
                    participant.hear_commit(commit, now_s)
                    participant.confirm(commit)
                case Reveal() as reveal:
                    self._unrevealed[reveal.commitment] = said
                    participant.hear_reveal(reveal, now_s)
                case Statement() as statement:
                    self._take_statement(said, statement)
                case _:
                    self._take_offence(said)

    async def turn(self) -> None:
        """Take in what was heard, and say what is due."""
        self._wake = trio.Event()
        inbox, self._inbox = self._inbox, []
        now_s = self._wall_clock()
        async with self.lock:
            found = [each for said in inbox if (each := self._take_in(said, now_s))]
            if self.clock.epoch_at(now_s) > self._pruned_epoch:
                self._forget(now_s)
            await self._confirm(now_s)
            said = await self._offload(lambda: self._due(now_s))
            said += found
            commit = await self._contribution(now_s)
            try:
                kept = [*said, *([commit.commit, commit.reveal] if commit else [])]
                if kept:
                    rows = [(each.id, _epoch(each), each.envelope) for each in kept]
                    await self.store.keep_records(self.genesis, rows, self.clock.epoch_at(now_s) - 1)
                if commit:
                    await self.store.name(self.genesis, commit.named)
                    said.append(commit.commit)
                    self._unrevealed[commit.commitment] = commit.reveal
                await self._keep_standing()
            except StorageError as error:
                # What is not kept is not said; we abstain from this epoch, and others go on.
                _logger.warning("consensus not kept, and so not spoken", reason=str(error))
                return
            said += self._revealed(now_s)
            for each in said:
                self.minutes.add(each, self.clock.epoch_at(now_s))
            self._note_agreement()
        if any(isinstance(each.body, RevealRecord) for each in said):
            await self._meter.revealed()
        if said:
            self._publish(said)
            self._wake.set()  # what we said may be all that was missing
        head = self.participant.chain.head
        if head.statement is not None and self.participant.state_after(head.id) is None:
            self.wants_more.set()

    # Taking in

    def _take_in(self, said: Said, now_s: float) -> Said | None:
        """Take in a record; return the proof of an equivocation where it completes one."""
        epoch = self.clock.epoch_at(now_s)
        chain = self.participant.chain
        link = chain.link(said.body.statement) if isinstance(said.body, SignatureRecord) else None
        if link is not None and said.peer not in link.committee:
            return None  # it counts for nothing, and is not to take the room of those that do
        is_member = said.peer in chain.head.members
        if self.minutes.is_full(said, is_member=is_member) and _epoch(said) >= epoch - 1:
            return None
        proof: Said | None = None
        if contradiction := self.minutes.add(said, epoch, is_member=is_member):
            proof = self._prove(contradiction.first, contradiction.second)
        match value_of(said):
            case Commit() as commit:
                self.participant.hear_commit(commit, now_s)
            case Reveal() as reveal:
                self.participant.hear_reveal(reveal, now_s)
            case Signature() as signature:
                self.participant.hear_signature(signature)
            case Statement() as statement if statement.epoch <= epoch + 1:
                self._take_statement(said, statement)
            case None:
                self._take_offence(said)
            case _:
                pass
        if self.minutes.is_overfull:
            self.minutes.prune(epoch, chain.statements() | self._orphans.keys())
        return proof

    def _take_statement(self, said: Said, statement: Statement) -> None:
        self.minutes.add_statement(statement.id, said)
        waiting = [statement]
        while waiting:
            each = waiting.pop()
            if each.parent not in self.participant.chain:
                if len(self._orphans) < MAX_ORPHANS:
                    self._orphans[each.id] = each
                self.wants_more.set()
                continue
            self._orphans.pop(each.id, None)
            try:
                self.participant.hear_statement(each)
            except InvalidStatement as error:
                _logger.info("statement refused", epoch=each.epoch, proposer=each.proposer, reason=str(error))
                continue
            # Signatures may have come before their statement.
            for signature in self.minutes.signatures.get(each.id, {}).values():
                if isinstance(value := value_of(signature), Signature):
                    self.participant.hear_signature(value)
            waiting += [orphan for orphan in self._orphans.values() if orphan.parent == each.id]

    def _take_offence(self, said: Said) -> None:
        if isinstance(said.body, EquivocationRecord):
            for offender in self.minutes.offences:
                self.participant.hear_offence(offender)

    def _prove(self, first: Said, second: Said) -> Said | None:
        proof = EquivocationRecord(chain=self.genesis, first=first.envelope, second=second.envelope)
        if first.peer in self.minutes.offences:
            return None
        try:
            said = say(proof, self._identity.private_key)
        except LocalProtocolError as error:
            _logger.warning("equivocation not proven", peer=first.peer, reason=str(error))
            return None
        _logger.warning("equivocation proven", peer=first.peer, epoch=_epoch(first))
        self.statistics.offences += 1
        self.minutes.offences[first.peer] = said
        self.participant.hear_offence(first.peer)
        return said

    async def _confirm(self, now_s: float) -> None:
        """Find out whose observations are all at hand: contributions that name others do not count for us."""
        for commit in self.participant.unconfirmed(now_s):
            held = await self._history.get_many(commit.observations) if commit.observations else ()
            if len(held) == len(commit.observations):
                self.participant.confirm(commit)

    def _forget(self, now_s: float) -> None:
        epoch = self._pruned_epoch = self.clock.epoch_at(now_s)
        chain = self.participant.chain
        self.participant.forget(now_s)
        for orphan in self._orphans.values():
            _logger.debug("statement without the one before it forgotten", epoch=orphan.epoch)
        self._orphans.clear()
        self.minutes.prune(epoch, chain.statements())
        self._contributed = {key for key in self._contributed if key[0] >= epoch - 1}
        self._readings = {key: value for key, value in self._readings.items() if key[0] >= epoch}
        self._unrevealed = {key: said for key, said in self._unrevealed.items() if _epoch(said) >= epoch}

    # Saying what is due

    def _due(self, now_s: float) -> list[Said]:
        """Return what to say now, our own statement before our signature under it. May take long."""
        self.participant.deduce()
        if not self._participates():
            return []
        said: list[Said] = []
        if (statement := self.participant.propose(now_s)) is not None:
            proposal = self._say(statement)
            if proposal is not None:
                said.append(proposal)
                self._take_statement(proposal, statement)
                self.statistics.proposed += 1
        if (signature := self.participant.vote(now_s)) is not None and (vote := self._say(signature)):
            said.append(vote)
            self.statistics.signed += 1
        return said

    async def _contribution(self, now_s: float) -> "_Contribution | None":
        """Return our commit and reveal, if they are due: once all is measured, or the time for it is over."""
        participant, epoch = self.participant, self.clock.epoch_at(now_s)
        key = (epoch, participant.chain.head.id)
        hardware = self._hardware()
        if key in self._contributed or hardware is None or not self._participates() or not participant.is_drawn(now_s):
            return None
        if now_s >= self.clock.reveals_begin_s(epoch):
            return None
        assigned = participant.assigned(now_s)
        if any((epoch, cell) not in self._readings for cell in assigned) and now_s < self.clock.commits_end_s(epoch):
            return None
        if self._is_crowded_out(epoch):
            return None
        readings = [
            Reading(cell, value) for cell in assigned if (value := self._readings.get((epoch, cell))) is not None
        ]
        try:
            named = await self.store.unnamed(self.genesis, self._identity.peer_id, MAX_COMMITTED)
        except StorageError as error:
            _logger.warning("own observations not named", reason=str(error))
            named = Named((), 0)
        commit, reveal = participant.contribute(now_s, hardware, readings, named.ids, self._nonce())
        self._contributed.add(key)
        said, opened = self._say(commit), self._say(reveal)
        return None if said is None or opened is None else _Contribution(said, opened, reveal.commitment, named.number)

    def _is_crowded_out(self, epoch: int) -> bool:
        """Whether we are new and so many others are before us that this epoch will not take us: why say so, then."""
        members = {*self.participant.chain.head.members}
        own = self._identity.peer_id
        if own in members:
            return False
        before = sum(peer < own and peer not in members for peer in self.participant.contributors(epoch))
        return before >= MAX_JOINED

    def _revealed(self, now_s: float) -> list[Said]:
        """Return the reveals whose time has come."""
        if now_s < self.clock.reveals_begin_s(self.clock.epoch_at(now_s)):
            return []
        opened, self._unrevealed = list(self._unrevealed.values()), {}
        return opened

    def _say(self, value: Commit | Reveal | Statement | Signature) -> Said | None:
        try:
            return say(record_of(value, self.genesis), self._identity.private_key)
        except LocalProtocolError as error:
            _logger.warning("not said", reason=str(error))
            return None

    # Measuring

    async def _measure_for_ever(self) -> None:
        """Measure what we are drawn for, a cell at a time, while there is time for it."""
        while True:
            if (cell := await self._next_cell()) is None:
                await trio.sleep(max(TURN_PAUSE_S, self.clock.epoch_s / 100))
                continue
            now_s = self._wall_clock()
            epoch = self.clock.epoch_at(now_s)
            log_ratio: float | None = None
            with trio.move_on_after(self.clock.commits_end_s(epoch) - now_s):
                log_ratio = await self._meter.measure(cell)
            self._readings[epoch, cell] = None if log_ratio is None else _millionths(log_ratio)
            self.statistics.measured += log_ratio is not None
            self._wake.set()

    async def _next_cell(self) -> Cell | None:
        now_s = self._wall_clock()
        epoch = self.clock.epoch_at(now_s)
        if not self._participates() or now_s >= self.clock.commits_end_s(epoch):
            return None
        async with self.lock:
            assigned = self.participant.assigned(now_s)
        return next((cell for cell in assigned if (epoch, cell) not in self._readings), None)

    # Keeping

    async def _load_branch(self) -> None:
        """Load the end of the branch with its signatures; of what came before only who is a member."""
        stored: list[StoredStatement] = []
        members: tuple[str, ...] = ()
        root: Statement | None = None
        after = -1
        try:
            while page := await self.store.statements(self.genesis, after_epoch=after, limit=LOADED_AT_A_TIME):
                after = page[-1].epoch
                stored += page
                for each in stored[: max(0, len(stored) - KEPT)]:
                    statement = _statement_in(each)
                    members, _ = members_after(members, root.epoch if root else -1, statement)
                    root = statement
                del stored[: max(0, len(stored) - KEPT)]
                await trio.lowlevel.checkpoint()
            if root is not None:
                self.participant.chain.start_from(root, members)
            for each in stored:
                self._kept.append((each.epoch, each.id, len(each.signatures)))
                for said in map(open_said, (*each.signatures, each.envelope)):
                    self._take_evidence(said)
            kept = await self.store.state(self.genesis)
            if kept is not None and (link := self.participant.chain.link(kept.statement)) and link.statement:
                self.participant.learn_state(state_of(decode_state(kept.state), link.statement))
                self._kept_state = kept.statement
        except (InvalidStatement, RemoteProtocolError, ValueError) as error:
            _logger.warning("the chain that was kept is not sound; the swarm tells it again", reason=str(error))
            await self.store.keep_standing(self.genesis, -1, (), None)
            self._kept.clear()
        self._note_agreement()

    def _take_evidence(self, said: Said) -> None:
        match value_of(said):
            case Statement() as statement:
                self._take_statement(said, statement)
            case Signature() as signature:
                self.minutes.signatures.setdefault(signature.statement, {}).setdefault(said.peer, said)
            case _:
                raise RemoteProtocolError("neither a statement nor a signature")

    async def _keep_standing(self) -> None:
        """Bring the branch in the store up to what stands now; also where only signatures have come."""
        rows = [(link.epoch, link.id, len(link.signatures)) for link in self.participant.chain.standing()]
        known = {(epoch, key) for epoch, key, _ in self._kept}
        oldest = self.clock.epoch_at(self._wall_clock()) - 1
        count = {key: signatures for _, key, signatures in self._kept}
        changed = [
            row for row in rows if (row[0], row[1]) not in known or (row[0] >= oldest and count[row[1]] != row[2])
        ]
        head = self.participant.chain.head
        state = self.participant.state_after(head.id)
        fresh_state = head.statement is not None and state is not None and head.id != self._kept_state
        gone = self._kept and rows and self._kept[-1][0] > rows[-1][0]
        if not changed and not fresh_state and not gone:
            return
        after = min((row[0] for row in changed), default=rows[-1][0] + 1) - 1
        new = [self._stored(key) for epoch, key, _ in rows if epoch > after]
        packed = None
        if fresh_state and state is not None:
            packed = StoredState(head.id, encode_state(parts_of(state)))
        await self.store.keep_standing(self.genesis, after, new, packed)
        self.statistics.adopted += sum((row[0], row[1]) not in known for row in rows)
        self._kept = rows
        if packed:
            self._kept_state = head.id

    def _stored(self, statement: Digest) -> StoredStatement:
        said = self.minutes.statements[statement]
        link = self.participant.chain.link(statement)
        signers = link.signatures if link else set()
        signatures = self.minutes.signatures.get(statement, {})
        envelopes = tuple(signatures[peer].envelope for peer in sorted(signatures) if peer in signers)
        return StoredStatement(_epoch(said), statement, said.envelope, envelopes)

    def _note_agreement(self) -> None:
        head = self.participant.chain.head
        if self._agreement is not None and self._agreement.statement == head.id:
            return
        state: State | None = self.participant.state_after(head.id)
        if head.statement is None or state is None:
            return
        self._agreement = Agreement(head.epoch, head.id, state.table_digest, state.weights, state.table)
        _logger.info("agreed", epoch=head.epoch, members=len(state.members), cells=len(state.table))

    def _until_due_s(self) -> float:
        """Return how long nothing is due, if nothing is heard."""
        now_s = self._wall_clock()
        epoch = self.clock.epoch_at(now_s)
        turns = (self.clock.proposes_s(epoch, turn) for turn in range(self.clock.turns()))
        phases = (
            self.clock.commits_end_s(epoch),
            self.clock.reveals_begin_s(epoch),
            *turns,
            self.clock.starts_s(epoch + 1),
        )
        # Observations arrive without telling us, so commits that name them are looked at again and again.
        return min(min(phase - now_s for phase in phases if phase > now_s), self.clock.epoch_s / 20)


@dataclass(frozen=True, slots=True)
class _Contribution:
    commit: Said
    reveal: Said
    commitment: Digest
    named: int


def _epoch(said: Said) -> int:
    return -1 if isinstance(said.body, EquivocationRecord) else said.body.epoch


def _statement_in(stored: StoredStatement) -> Statement:
    statement = value_of(open_said(stored.envelope))
    if not isinstance(statement, Statement):
        raise RemoteProtocolError("no statement")
    return statement


def _millionths(log_ratio: float) -> int:
    return max(-MAX_VALUE, min(MAX_VALUE, round(log_ratio * 1_000_000)))
