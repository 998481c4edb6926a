"""A store in memory, for simulations: what a disk would hold, it holds as long as the object lives."""

from collections.abc import Iterable, Sequence

import trio

from node.storage.chain_store import Named, StoredState, StoredStatement
from protocol.identity import PeerId


class MemoryStore:
    """Keeps chains in memory. Implements `node.consensus.chain_node.Store`."""

    def __init__(self) -> None:
        self._records: dict[bytes, dict[bytes, tuple[int, bytes]]] = {}
        self._branches: dict[bytes, dict[int, StoredStatement]] = {}
        self._states: dict[bytes, StoredState] = {}

    async def keep_records(self, chain: bytes, records: Sequence[tuple[bytes, int, bytes]], oldest_epoch: int) -> None:
        """Keep records; forget those before an epoch."""
        await trio.lowlevel.checkpoint()
        held = self._records.setdefault(chain, {})
        held.update({key: (epoch, envelope) for key, epoch, envelope in records})
        self._records[chain] = {key: row for key, row in held.items() if row[0] < 0 or row[0] >= oldest_epoch}

    async def records(self, chain: bytes) -> Sequence[bytes]:
        """Return the records kept."""
        await trio.lowlevel.checkpoint()
        return [envelope for _, envelope in sorted(self._records.get(chain, {}).values())]

    async def keep_standing(
        self, chain: bytes, after_epoch: int, statements: Sequence[StoredStatement], state: StoredState | None
    ) -> None:
        """Let the branch after an epoch consist of these statements."""
        await trio.lowlevel.checkpoint()
        branch = {epoch: each for epoch, each in self._branches.get(chain, {}).items() if epoch <= after_epoch}
        self._branches[chain] = branch | {each.epoch: each for each in statements}
        if state is not None:
            self._states[chain] = state

    async def statements(self, chain: bytes, *, after_epoch: int = -1, limit: int = 64) -> Sequence[StoredStatement]:
        """Return statements of the branch after an epoch."""
        await trio.lowlevel.checkpoint()
        branch = self._branches.get(chain, {})
        return [branch[epoch] for epoch in sorted(branch) if epoch > after_epoch][:limit]

    async def epoch_of(self, chain: bytes, statements: Iterable[bytes]) -> int | None:
        """Return the epoch of the first of these statements that is on the branch."""
        await trio.lowlevel.checkpoint()
        epochs = {each.id: epoch for epoch, each in self._branches.get(chain, {}).items()}
        return next((epochs[statement] for statement in statements if statement in epochs), None)

    async def state(self, chain: bytes) -> StoredState | None:
        """Return the state kept last."""
        await trio.lowlevel.checkpoint()
        return self._states.get(chain)

    async def unnamed(self, chain: bytes, observer: PeerId, limit: int) -> Named:
        """Return no observations: a simulation of the consensus has none."""
        del chain, observer, limit
        await trio.lowlevel.checkpoint()
        return Named((), 0)

    async def name(self, chain: bytes, number: int) -> None:
        """Do nothing; see `unnamed`."""
        del chain, number
        await trio.lowlevel.checkpoint()
