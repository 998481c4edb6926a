"""Recovery of a chain after a restart, and the saving that makes it possible.

Own messages are saved before they are published: a node that is killed at any instant never equivocates.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import structlog
import trio

from node.consensus.chain_replica import ChainReplica, join_state, state_parts
from node.storage.chain_store import ChainStore, StoredState, StoredStatement
from protocol.chains import decode_state, encode_state
from protocol.consensus import SignedMessage, verify_message
from protocol.consensus_values import Signature, Statement
from protocol.errors import RemoteProtocolError
from protocol.forms import Digest
from protocol.identity import PeerId
from selector.consensus.chain import (
    GENESIS_EPOCH,
    RETAINED_ENTRIES,
    SMALL_STALL_EPOCHS,
    ChainEntry,
    InvalidStatement,
    members_after,
)
from selector.consensus.epoch_set import EpochRange

PAGE: Final = 64
"""Statements that are read from the store at a time."""

_logger = structlog.get_logger(__name__)


class RecoveredMessages(NamedTuple):
    """Own messages of the last process, and the epochs of which they were deleted.

    `complete`: there are some, and all of them could be read.
    """

    messages: list[SignedMessage]
    closed: tuple[EpochRange, ...]
    complete: bool


class _SavedEntry(NamedTuple):
    epoch: int
    id: Digest
    signature_count: int


class ChainRecovery:
    """Saves one chain and loads it again."""

    def __init__(self, store: ChainStore, replica: ChainReplica) -> None:
        self._store = store
        self._replica = replica
        self._genesis = replica.chain.genesis
        self._saved: list[_SavedEntry] = []
        """The end of the canonical branch in the store."""
        self._saved_state = b""

    async def load_messages(self) -> RecoveredMessages:
        """Return own messages of the last process."""
        envelopes = await self._store.messages(self._genesis)
        messages: list[SignedMessage] = []
        for envelope in envelopes:
            try:
                messages.append(verify_message(envelope))
            except RemoteProtocolError as error:
                _logger.warning("a saved consensus message is damaged; abstaining this epoch", reason=str(error))
        closed = await self._store.closed_epochs(self._genesis)
        return RecoveredMessages(messages, closed, 0 < len(messages) == len(envelopes))

    async def save_messages(
        self, messages: Sequence[SignedMessage], oldest_epoch: int, withheld: Sequence[bytes] | None = None
    ) -> None:
        """Save own messages, and the observations withheld with a commit; delete those before an epoch.

        Raises StorageError.
        """
        if messages:
            rows = [(message.id, message.epoch, message.envelope) for message in messages]
            await self._store.save_messages(self._genesis, rows, oldest_epoch, withheld)

    async def load_branch(self) -> None:
        """Load the end of the canonical branch with its signatures; of earlier statements only the members."""
        self._saved.clear()
        try:
            stored = await self._load_end()
            for each in stored:
                self._saved.append(_SavedEntry(each.epoch, each.id, len(each.signatures)))
                for envelope in (*each.signatures, each.envelope):
                    self._apply_evidence(verify_message(envelope))
            await self.load_state()
        except (InvalidStatement, RemoteProtocolError, ValueError) as error:
            _logger.warning("the saved chain is damaged; fetching it from the swarm again", reason=str(error))
            await self._store.save_branch(self._genesis, -1, (), None)
            self._saved.clear()

    async def load_state(self) -> None:
        """Adopt the saved state after the head, if there is one. Raises StorageError."""
        head, states = self._replica.chain.head, await self._store.states(self._genesis)
        for saved in states:
            if head.statement is None or saved.statement != head.id:
                continue
            try:
                self._replica.participant.adopt_state(join_state(decode_state(saved.state), head.statement))
            except (RemoteProtocolError, ValueError) as error:
                _logger.warning("a saved state is damaged; fetching it from the swarm again", reason=str(error))
            if saved is states[0]:  # else it is saved again, in place of the one in the future
                self._saved_state = saved.statement

    async def save_branch(self, oldest_epoch: int) -> None:
        """Save how the canonical branch has changed. Raises StorageError.

        New signatures under a statement are saved if it is not older than `oldest_epoch`.
        """
        chain = self._replica.chain
        # Our own vote counts before it is held, and is saved once it is.
        entries = [_SavedEntry(each.epoch, each.id, len(self._signatures(each))) for each in chain.canonical()]
        counts = {each.id: each.signature_count for each in self._saved}
        changed = [
            each
            for each in entries
            if each.id not in counts or (each.epoch >= oldest_epoch and counts[each.id] != each.signature_count)
        ]
        state = self._unsaved_state()
        # What is of the future by our clock stays until something replaces it, in case the clock is behind.
        is_shorter = self._saved and chain.head.epoch < self._saved[-1].epoch <= chain.latest_epoch
        if not changed and state is None and not is_shorter:
            return
        unchanged = entries.index(changed[0]) if changed else len(entries)
        after = entries[unchanged - 1].epoch if unchanged else chain.root.epoch
        replaced = [self._stored(each) for each in entries[unchanged:]]
        await self._store.save_branch(self._genesis, after, replaced, state, keeps_former=self._is_after_gap())
        self._saved = entries
        if state is not None:
            self._saved_state = state.statement

    async def _load_end(self) -> list[StoredStatement]:
        """Start the chain from its last final statement; return the stored statements after it."""
        stored: list[StoredStatement] = []
        members: tuple[PeerId, ...] = ()
        root: Statement | None = None
        after = -1
        while page := await self._store.statements(self._genesis, after_epoch=after, limit=PAGE):
            after = page[-1].epoch
            stored += page
            final = stored[: max(0, len(stored) - RETAINED_ENTRIES)]
            for each in final:
                statement = verify_message(each.envelope).body
                if not isinstance(statement, Statement):
                    raise RemoteProtocolError("a saved message is not a statement")
                epoch, beacon = (root.epoch, root.beacon) if root else (GENESIS_EPOCH, self._genesis)
                members, _ = members_after(members, epoch, beacon, statement)
                root = statement
            del stored[: len(final)]
            await trio.lowlevel.checkpoint()
        if root is not None:
            self._replica.chain.start_from(root, members)
        return stored

    def _apply_evidence(self, message: SignedMessage) -> None:
        match message.body:
            case Statement() as statement:
                self._replica.apply_statement(message, statement)
            case Signature() as signature:
                self._replica.log.signatures.setdefault(signature.statement, {}).setdefault(message.peer, message)
            case _:
                raise RemoteProtocolError("a saved message is neither a statement nor a signature")

    def _is_after_gap(self) -> bool:
        head = self._replica.chain.head
        return head.parent is not None and head.epoch - head.parent.epoch > SMALL_STALL_EPOCHS

    def _unsaved_state(self) -> StoredState | None:
        head, state = self._replica.chain.head, self._replica.participant.state()
        if head.statement is None or state is None or head.id == self._saved_state:
            return None
        return StoredState(head.id, encode_state(state_parts(state)))

    def _stored(self, saved: _SavedEntry) -> StoredStatement:
        entry, statement = self._replica.chain.entry(saved.id), self._replica.log.statements[saved.id]
        signatures = tuple(each.envelope for each in self._signatures(entry)) if entry else ()
        return StoredStatement(saved.epoch, saved.id, statement.envelope, signatures)

    def _signatures(self, entry: ChainEntry) -> list[SignedMessage]:
        signatures = self._replica.log.signatures.get(entry.id, {})
        return [signatures[peer] for peer in sorted(entry.signers & signatures.keys())]
