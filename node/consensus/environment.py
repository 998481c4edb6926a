"""The rules of a consensus, and the node around it: identity, storage, clock, randomness, measuring, offloading."""

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from node.identity import Identity
from node.replication.history import History
from node.storage.chain_store import ChainStore
from node.util.offload import Offload, run_in_thread
from protocol.consensus import SignedMessage, verify_message
from protocol.consensus_values import NONCE_BYTES, Cell, genesis_of
from protocol.forms import Digest
from protocol.identity import ModelId
from selector.consensus.clock import EpochClock
from selector.consensus.sortition import MeasurementPlan


class Meter(Protocol):
    """Measures cells by real jobs of this node; see `node.consensus.measurement_runner`."""

    async def measure(self, cell: Cell) -> float | None:
        """Return the natural logarithm of the cell's cost over the baseline's; None if it cannot be measured now."""

    async def revealed(self) -> None:
        """Publish the observations behind the readings, which are revealed now."""

    def withheld(self) -> Sequence[bytes]:
        """Return the envelopes of the observations that are not published yet."""

    def restore(self, envelopes: Sequence[bytes]) -> None:
        """Withhold the observations of an earlier process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsensusRules:
    """What peers must have in common to agree about a model: those with other rules have chains of their own.

    `plan`: the cells that are measured, of the methods of the model's package format. `checkpoints`: statements that
    pin a branch; the only rule that peers need not share.
    """

    swarm: bytes
    plan: MeasurementPlan
    clock: EpochClock
    checkpoints: Collection[Digest] = ()

    def genesis(self, model: ModelId) -> Digest:
        """Return the genesis of a model's chain, which commits to the rules."""
        workloads, methods = ",".join(self.plan.workloads), ",".join(self.plan.methods)
        rules = f"metaswarm/4 epoch={self.clock.epoch_s:g} workloads={workloads} methods={methods}"
        return genesis_of(self.swarm, model, rules)


def fresh_nonce() -> bytes:
    """Return a random nonce, which hides the readings of a commit until the reveal."""
    return secrets.token_bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsensusEnvironment:
    """The node around the consensus."""

    identity: Identity
    store: ChainStore
    history: History
    models: Callable[[], Mapping[ModelId, bool]]
    """The models that live peers serve, and whether this node serves them, too."""
    hardware: Callable[[], str | None]
    """This node's hardware class, None while it is unknown."""
    meter: Callable[[ModelId], Meter]
    """Measures the methods of a model."""
    wall_clock: Callable[[], float] = time.time
    clock_agrees: Callable[[], bool | None] = lambda: None
    """Whether connected peers agree with our clock; None while that is not known."""
    offload: Offload = run_in_thread
    nonce: Callable[[], bytes] = fresh_nonce
    verify: Callable[[bytes], SignedMessage] = verify_message
