"""Records what each served job has shown: builds its observation, signs it, and hands it to the swarm's history."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from node.coordinator.observation import model_facts, observation_of
from node.coordinator.submission import JobRequest, JobResult
from node.identity import Identity
from node.models.manifest import Manifest
from node.storage.database import StorageError
from protocol.errors import LocalProtocolError
from protocol.identity import JobId
from protocol.measurements import Observation
from protocol.observations import SignedObservation, sign_observation

_logger = structlog.get_logger(__name__)


class Publisher(Protocol):
    """Keeps an observation and lets the swarm know; `node.replication.observations` is the real one."""

    async def publish(self, observation: SignedObservation) -> None:
        """Return once the observation is safe here."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedJob:
    """A job that was done, and what of it an observation tells.

    `job`: the id that its stages knew it by. `concurrency`: the most sessions on any of them. `shared_prefix_share`: of
    the prompt, what other prompts of the time began with, too. `repetitiveness`, `link_s`: see TaskContext.
    """

    result: JobResult
    request: JobRequest
    manifest: Manifest
    job: JobId
    concurrency: int
    shared_prefix_share: float = 0.0
    repetitiveness: float = 0.0
    link_s: float = 0.0


class Recorder:
    """Makes an observation of every job that this node coordinated. No job fails over it."""

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
        """Return what a job has shown, as a served job's."""
        return observation_of(
            served.result,
            served.request,
            model_facts(served.manifest),
            observer=self._identity.peer_id,
            job=served.job,
            issued_at_s=int(self._wall_clock()),
            concurrency=served.concurrency,
            shared_prefix_share=served.shared_prefix_share,
            repetitiveness=served.repetitiveness,
            link_s=served.link_s,
        )

    async def publish(self, observation: Observation) -> bool:
        """Sign an observation, keep it, and let the swarm know; return whether that could be done."""
        try:
            await self._publisher.publish(sign_observation(observation, self._identity.private_key))
        except (LocalProtocolError, StorageError) as error:
            _logger.warning("observation not recorded", job=observation.job, reason=str(error))
            return False
        return True
