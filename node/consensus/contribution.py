"""This node's contributions to one chain: measures the assigned cells, commits to the readings, and reveals them."""

from collections.abc import Iterable
from dataclasses import dataclass

import structlog
import trio

from node.consensus.chain_replica import ChainReplica
from node.consensus.environment import ConsensusEnvironment, Meter
from node.storage.chain_store import Uncommitted
from node.storage.database import StorageError
from protocol.consensus import SignedMessage
from protocol.consensus_values import MAX_COMMITTED, MAX_READING, VALUE_SCALE, Cell, Commit, Reading, Reveal
from protocol.forms import Digest

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SignedContribution:
    """A commit and its reveal, signed. `number`: up to which own observations are named; see `ChainStore`."""

    commit: SignedMessage
    reveal: SignedMessage
    number: int


class Contributor:
    """Prepares this node's contribution to each epoch."""

    def __init__(self, environment: ConsensusEnvironment, replica: ChainReplica, meter: Meter) -> None:
        self.measured = 0
        """Cells measured since the start."""
        self._environment = environment
        self._clock = replica.participant.clock
        self._participant = replica.participant
        self._replica = replica
        self._meter = meter
        self._readings: dict[tuple[int, Cell], int | None] = {}
        self._committed: set[tuple[int, Digest]] = set()
        """The epochs, and the heads in them, after which we have committed."""
        self._unrevealed: dict[Digest, SignedMessage] = {}

    def restore(self, message: SignedMessage, now_s: float) -> None:
        """Take up a commit or a reveal of the last process."""
        match message.body:
            case Commit() as commit:
                self._committed.add((commit.epoch, commit.parent))
                self._participant.on_commit(commit, now_s)
                self._participant.confirm(commit)
            case Reveal() as reveal if reveal.inclusion:
                self._participant.on_reveal(reveal, now_s)
                self._unrevealed[reveal.commitment] = message
            case Reveal() as reveal:  # saved with its commit, before there was a list
                self._unrevealed.setdefault(reveal.commitment, message)
            case _:
                pass

    async def measure_next(self, lock: trio.Lock) -> bool:
        """Measure the next assigned cell; return whether there was one, and time left for it in this epoch.

        `lock`: held while the participant is read.
        """
        now_s = self._environment.wall_clock()
        epoch, deadline_s = self._clock.epoch_at(now_s), self._clock.commits_end_s(self._clock.epoch_at(now_s))
        assigned: tuple[Cell, ...] = ()
        if now_s < deadline_s:
            async with lock:
                assigned = self._participant.assigned(now_s)
        cell = next((cell for cell in assigned if (epoch, cell) not in self._readings), None)
        if cell is None:
            return False
        log_ratio: float | None = None
        with trio.move_on_after(max(0.0, deadline_s - self._environment.wall_clock())):  # the lock may have taken long
            log_ratio = await self._meter.measure(cell)
        self._readings[epoch, cell] = None if log_ratio is None else _fixed_point(log_ratio)
        self.measured += log_ratio is not None
        return True

    async def contribution(self, now_s: float) -> SignedContribution | None:
        """Return our commit and reveal, if they are due: once everything is measured, or the time for it is over."""
        participant, epoch = self._participant, self._clock.epoch_at(now_s)
        key = (epoch, participant.chain.head.id)
        hardware = self._environment.hardware()
        if epoch in participant.signed.closed:
            return None
        if key in self._committed or hardware is None or not participant.is_selected(now_s):
            return None
        if now_s >= self._clock.reveals_begin_s(epoch):
            return None
        stated = participant.hardware()
        if stated not in {None, hardware}:
            # Its readings would be compared with those of other hardware. Once removed as absent, we join anew.
            self._committed.add(key)
            _logger.warning("hardware class changed; leaving the consensus to join it again", old=stated, new=hardware)
            return None
        assigned = participant.assigned(now_s)
        if any((epoch, cell) not in self._readings for cell in assigned) and now_s < self._clock.commits_end_s(epoch):
            return None
        values = {cell: self._readings.get((epoch, cell)) for cell in assigned}
        readings = [Reading(cell, value) for cell, value in values.items() if value is not None]
        own = await self._uncommitted()
        commit, reveal = participant.contribute(now_s, hardware, readings, own.ids, self._environment.nonce())
        self._committed.add(key)
        signed_commit, signed_reveal = self._replica.sign(commit), self._replica.sign(reveal)
        if signed_commit is None or signed_reveal is None:
            return None
        return SignedContribution(signed_commit, signed_reveal, own.number)

    def schedule_reveal(self, contribution: SignedContribution) -> None:
        """Reveal the readings of a saved contribution later in its epoch."""
        assert isinstance(contribution.commit.body, Commit)
        self._unrevealed[contribution.commit.body.commitment] = contribution.reveal

    def due_reveals(self, now_s: float) -> list[SignedMessage]:
        """Return the reveals whose phase has begun, with our inclusion list; once. Save them before publishing.

        Those that could not be saved: see `put_back`.
        """
        epoch = self._clock.epoch_at(now_s)
        if now_s < self._clock.reveals_begin_s(epoch) or epoch in self._participant.signed.closed:
            return []
        due = [message for message in self._unrevealed.values() if message.epoch == epoch]
        self._unrevealed = {key: message for key, message in self._unrevealed.items() if message.epoch != epoch}
        return [final for message in due if (final := self._with_list(message, now_s))]

    def put_back(self, reveals: Iterable[SignedMessage]) -> None:
        """Let reveals be due again that could not be saved; as they are, with their lists."""
        for message in reveals:
            assert isinstance(message.body, Reveal)
            self._unrevealed[message.body.commitment] = message

    def prune(self, epoch: int) -> None:
        """Drop past epochs."""
        self._participant.signed.closed.add(*(each for each, _ in self._committed if each < epoch - 1))
        self._committed = {key for key in self._committed if key[0] >= epoch - 1}
        self._readings = {key: value for key, value in self._readings.items() if key[0] >= epoch}
        self._unrevealed = {key: message for key, message in self._unrevealed.items() if message.epoch >= epoch}

    def _with_list(self, message: SignedMessage, now_s: float) -> SignedMessage | None:
        assert isinstance(message.body, Reveal)
        if message.body.inclusion:  # saved by the last process, and perhaps published
            return message
        listed = self._participant.reveal(message.body, now_s)
        return message if listed == message.body else self._replica.sign(listed)

    async def _uncommitted(self) -> Uncommitted:
        environment = self._environment
        try:
            return await environment.store.uncommitted(
                self._replica.chain.genesis, environment.identity.peer_id, MAX_COMMITTED
            )
        except StorageError as error:
            _logger.warning("could not list own observations for the commit", reason=str(error))
            return Uncommitted((), 0)


def _fixed_point(log_ratio: float) -> int:
    return max(-MAX_READING, min(MAX_READING, round(log_ratio * VALUE_SCALE)))
