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
from selector.consensus.chain import GENESIS_EPOCH, RETAINED_ENTRIES, InvalidStatement, members_after

PAGE: Final = 64
"""Statements that are read from the store at a time."""

_logger = structlog.get_logger(__name__)


class RecoveredMessages(NamedTuple):
    """Own messages of the last process. `complete`: there are some, and all of them could be read."""

    messages: list[SignedMessage]
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
        return RecoveredMessages(messages, 0 < len(messages) == len(envelopes))

    async def save_messages(self, messages: Sequence[SignedMessage], oldest_epoch: int) -> None:
        """Save own messages; delete those before an epoch. Raises StorageError."""
        if messages:
            rows = [(message.id, message.epoch, message.envelope) for message in messages]
            await self._store.save_messages(self._genesis, rows, oldest_epoch)

    async def load_branch(self) -> None:
        """Load the end of the canonical branch with its signatures; of earlier statements only the members."""
        try:
            stored = await self._load_end()
            for each in stored:
                self._saved.append(_SavedEntry(each.epoch, each.id, len(each.signatures)))
                for envelope in (*each.signatures, each.envelope):
                    self._apply_evidence(verify_message(envelope))
            saved = await self._store.state(self._genesis)
            if saved is not None and (entry := self._replica.chain.entry(saved.statement)) and entry.statement:
                self._replica.participant.adopt_state(join_state(decode_state(saved.state), entry.statement))
                self._saved_state = saved.statement
        except (InvalidStatement, RemoteProtocolError, ValueError) as error:
            _logger.warning("the saved chain is damaged; fetching it from the swarm again", reason=str(error))
            await self._store.save_branch(self._genesis, -1, (), None)
            self._saved.clear()

    async def save_branch(self, oldest_epoch: int) -> None:
        """Save how the canonical branch has changed. Raises StorageError.

        New signatures under a statement are saved if it is not older than `oldest_epoch`.
        """
        entries = [_SavedEntry(entry.epoch, entry.id, len(entry.signers)) for entry in self._replica.chain.canonical()]
        counts = {each.id: each.signature_count for each in self._saved}
        changed = [
            each
            for each in entries
            if each.id not in counts or (each.epoch >= oldest_epoch and counts[each.id] != each.signature_count)
        ]
        state = self._unsaved_state()
        is_shorter = self._saved and entries and self._saved[-1].epoch > entries[-1].epoch
        if not changed and state is None and not is_shorter:
            return
        after = min((each.epoch for each in changed), default=entries[-1].epoch + 1) - 1
        replaced = [self._stored(each) for each in entries if each.epoch > after]
        await self._store.save_branch(self._genesis, after, replaced, state)
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

    def _unsaved_state(self) -> StoredState | None:
        head, state = self._replica.chain.head, self._replica.participant.state()
        if head.statement is None or state is None or head.id == self._saved_state:
            return None
        return StoredState(head.id, encode_state(state_parts(state)))

    def _stored(self, saved: _SavedEntry) -> StoredStatement:
        log, entry = self._replica.log, self._replica.chain.entry(saved.id)
        signers = entry.signers if entry else set()
        signatures = log.signatures.get(saved.id, {})
        envelopes = tuple(signatures[peer].envelope for peer in sorted(signatures) if peer in signers)
        return StoredStatement(saved.epoch, saved.id, log.statements[saved.id].envelope, envelopes)
