"""The environment of this node's chains: identity, storage, clock, randomness, and how work is offloaded."""

import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from node.identity import Identity
from node.replication.history import History
from node.storage.chain_store import ChainStore
from node.util.offload import Offload, run_in_thread
from protocol.consensus_values import NONCE_BYTES, Cell, Digest
from selector.consensus.clock import EpochClock
from selector.consensus.sortition import MeasurementPlan


def fresh_nonce() -> bytes:
    """Return a random nonce, which hides the readings of a commit until the reveal."""
    return secrets.token_bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsensusEnvironment:
    """Everything that the chains of one node share.

    `hardware`: returns this node's hardware class, None while it is unknown. `checkpoints`: statements that pin a
    branch.
    """

    identity: Identity
    store: ChainStore
    history: History
    clock: EpochClock
    plan: MeasurementPlan
    hardware: Callable[[], str | None]
    checkpoints: Collection[Digest] = ()
    wall_clock: Callable[[], float] = time.time
    offload: Offload = run_in_thread
    nonce: Callable[[], bytes] = fresh_nonce


class Meter(Protocol):
    """Measures cells by real jobs of this node; see `node.consensus.measurement_runner`."""

    async def measure(self, cell: Cell) -> float | None:
        """Return the natural logarithm of the cell's cost over the baseline's; None if it cannot be measured now."""
        ...

    async def revealed(self) -> None:
        """Publish the observations behind the readings, which are revealed now."""
        ...
