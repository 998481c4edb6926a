"""The recent jobs of this node, without their texts: what observers are shown, while the jobs run and afterwards."""

import enum
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from node.coordinator.submission import JobResult
from protocol.identity import JobId, ModelId, Stage
from protocol.measurements import TaskKind

MAX_RUNNING: Final = 100
"""Running jobs that are listed, the newest ones."""

MAX_ENDED: Final = 50
"""Ended jobs that are remembered, and as many trials."""


class JobState(enum.StrEnum):
    """How far a job has come."""

    OPENING = "opening"
    """Its route is being opened."""
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True, eq=False)
class RecentJob:
    """A job as far as it has come. `submitted_s` is Unix time. `result`: once it is done, without the text."""

    id: JobId
    model: ModelId
    model_name: str
    is_trial: bool
    prompt_tokens: int
    submitted_s: float
    task: TaskKind = TaskKind.GENERATE
    state: JobState = JobState.OPENING
    stages: tuple[Stage, ...] = ()
    method: str | None = None
    tokens: int = 0
    replays: int = 0
    error: str | None = None
    result: JobResult | None = None
    revision: int = 0
    """Grows with every change, over all jobs of the list: who saw one revision asks for what is newer."""


class RecentJobs:
    """The running jobs and the last ones that ended. Trials are apart, as a busy learner would crowd out the rest."""

    def __init__(self) -> None:
        self.revision = 0
        self._running: dict[JobId, RecentJob] = {}
        self._ended: dict[bool, deque[RecentJob]] = {kind: deque(maxlen=MAX_ENDED) for kind in (False, True)}

    def begin(
        self,
        job_id: JobId,
        model: ModelId,
        model_name: str,
        *,
        is_trial: bool,
        prompt_tokens: int,
        task: TaskKind = TaskKind.GENERATE,
    ) -> RecentJob:
        """Enter a job whose route is about to be opened."""
        job = RecentJob(
            id=job_id,
            model=model,
            model_name=model_name,
            is_trial=is_trial,
            prompt_tokens=prompt_tokens,
            submitted_s=time.time(),
            task=task,
        )
        self._running[job_id] = job
        self._touch(job)
        return job

    def progress(
        self, job: RecentJob, *, stages: Iterable[Stage], method: str | None, tokens: int, replays: int
    ) -> None:
        """Record how far a job has come."""
        job.state = JobState.RUNNING
        job.stages, job.method, job.tokens, job.replays = tuple(stages), method, tokens, replays
        self._touch(job)

    def end(self, job: RecentJob, state: JobState, error: str | None = None) -> None:
        """Record how a job ended."""
        job.state, job.error = state, error
        if job.result is not None:  # other users see this list
            job.result = replace(job.result, text="", token_ids=(), trace=None, embedding=None)
        del self._running[job.id]
        self._ended[job.is_trial].append(job)
        self._touch(job)

    def changed_since(self, revision: int) -> list[RecentJob]:
        """Return the jobs that changed after a revision, the oldest first."""
        jobs = [*self._ended[False], *self._ended[True], *list(self._running.values())[-MAX_RUNNING:]]
        return sorted((job for job in jobs if job.revision > revision), key=lambda job: job.submitted_s)

    def running(self) -> list[JobId]:
        """Return the jobs that have not ended: of those that ended too long ago nothing is said any more."""
        return list(self._running)

    def _touch(self, job: RecentJob) -> None:
        self.revision += 1
        job.revision = self.revision
