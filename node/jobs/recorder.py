"""Records what each served job has shown: builds its observation, signs it, and hands it to the swarm's history."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from node.identity import Identity
from node.jobs.interface import JobRequest, JobResult
from node.jobs.observation import model_facts, observation_of
from node.models.manifest import Manifest
from node.storage.database import StorageError
from protocol.errors import LocalProtocolError
from protocol.identity import JobId
from protocol.measurements import StageObservation
from protocol.observations import SignedObservation, sign_observation

_logger = structlog.get_logger(__name__)


class Publisher(Protocol):
    """Keeps an observation and lets the swarm know; `node.swarm.dissemination` is the real one."""

    async def publish(self, observation: SignedObservation) -> None:
        """Return once the observation is safe here."""
        ...


class Recorder:
    """Makes an observation of every job that this node coordinated. No job fails over it."""

    def __init__(
        self, identity: Identity, publisher: Publisher, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._identity = identity
        self._publisher = publisher
        self._wall_clock = wall_clock

    async def record(
        self,
        result: JobResult,
        request: JobRequest,
        manifest: Manifest,
        *,
        job: JobId,
        route: Sequence[StageObservation],
        concurrency: int,
        shared_prefix_share: float = 0.0,
        repetitiveness: float = 0.0,
        link_s: float = 0.0,
    ) -> None:
        """Record a job.

        `job`: the id that its stages knew it by. `concurrency`: the most sessions on any of them.
        `shared_prefix_share`: of the prompt, what other prompts of the time began with, too.
        """
        observation = observation_of(
            result,
            request,
            model_facts(manifest),
            observer=self._identity.peer_id,
            job=job,
            route=route,
            issued_at_s=int(self._wall_clock()),
            concurrency=concurrency,
            shared_prefix_share=shared_prefix_share,
            repetitiveness=repetitiveness,
            link_s=link_s,
        )
        try:
            await self._publisher.publish(sign_observation(observation, self._identity.private_key))
        except (LocalProtocolError, StorageError) as error:
            _logger.warning("job not recorded", job=result.job_id, reason=str(error))
