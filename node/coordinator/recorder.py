"""Records served jobs: builds each one's observation, signs it, and adds it to the swarm's history."""

import time
from collections.abc import Callable
from typing import Protocol

import structlog

from node.coordinator.observation import ServedJob, observation_of, without_invalid_countersignatures
from node.identity import Identity
from node.storage.database import StorageError
from protocol.errors import LocalProtocolError
from protocol.measurements import Observation
from protocol.observations import SignedObservation, sign_observation

_logger = structlog.get_logger(__name__)


class Publisher(Protocol):
    """Stores an observation and publishes it to the swarm; `node.replication.observations` is the real one."""

    async def publish(self, observation: SignedObservation) -> None:
        """Return once the observation is stored here."""


class Recorder:
    """Makes an observation of every job that this node coordinated. A failure to record fails no job."""

    def __init__(
        self, identity: Identity, publisher: Publisher, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._identity = identity
        self._publisher = publisher
        self._wall_clock = wall_clock

    async def record(self, served: ServedJob) -> None:
        """Record a job that a user submitted."""
        await self.publish(self.observation(served))

    def observation(self, served: ServedJob) -> Observation:
        """Return the observation of a job, as a served job's."""
        return observation_of(served, self._identity.peer_id, int(self._wall_clock()))

    async def publish(self, observation: Observation) -> bool:
        """Sign an observation, store it, and publish it to the swarm; return whether that succeeded."""
        try:
            await self._publisher.publish(self._sign(observation))
        except (LocalProtocolError, StorageError) as error:
            _logger.warning("observation not recorded", job=observation.job, reason=str(error))
            return False
        return True

    def _sign(self, observation: Observation) -> SignedObservation:
        key = self._identity.private_key
        try:
            return sign_observation(observation, key)
        except LocalProtocolError:
            return sign_observation(without_invalid_countersignatures(observation), key)
