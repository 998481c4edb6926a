"""The report of a job that has ended, however it ended: for the log, metrics and traces. It has nothing of its text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from node.coordinator.failover import ResilientRoute
from node.coordinator.job import Job
from node.coordinator.submission import JobErrorCode, JobRequest, JobResult
from protocol.identity import JobId, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """One job that has ended. Times are trio's clock; 0 for what it did not reach.

    `outcome`: `done`, `failed`, `cancelled` or `rejected`, the last by the client's mistake. `is_trial`: it measured a
    method, or ran in the background. `model`: its name; empty where the job was not prepared. `stages`: of its last
    route. `reason`: why it failed, unless that may quote its text. `result`: of a job that is done. `trace_parent`: its
    span in a trace.
    """

    request: JobRequest
    outcome: str
    is_trial: bool
    began_s: float
    ended_s: float
    prepared_s: float = 0.0
    routed_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    job_id: JobId | None = None
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stages: Sequence[Stage] = ()
    method: str = ""
    replays: int = 0
    error: JobErrorCode | None = None
    reason: str = ""
    result: JobResult | None = None
    trace_parent: str = ""


class JobObserver(Protocol):
    """Watches the jobs of a node. `node.telemetry` has the real one."""

    def start_trace(self, trace_parent: str) -> str:
        """Return the span of a job that begins, as `traceparent`, given that of its request; empty without either."""

    def on_job_ended(self, report: JobReport) -> None:
        """Take the report of a job that has ended."""


class NoJobObserver:
    """Watches nothing. Implements `JobObserver`."""

    def start_trace(self, trace_parent: str) -> str:
        """Pass the client's trace on."""
        return trace_parent

    def on_job_ended(self, report: JobReport) -> None:
        """Do nothing."""


@dataclass(slots=True, kw_only=True)
class RunningJob:
    """What becomes of a job, from its request on; `job` and `route` once there are any."""

    request: JobRequest
    is_trial: bool
    trace_parent: str
    began_s: float
    prepared_s: float = 0.0
    job: Job | None = None
    route: ResilientRoute | None = None

    def report(self, outcome: str, ended_s: float, error: JobErrorCode | None, reason: str) -> JobReport:
        """Return the report of the job."""
        job, route = self.job, self.route
        output = job.output if job else None
        return JobReport(
            request=self.request,
            outcome=outcome,
            is_trial=self.is_trial,
            began_s=self.began_s,
            ended_s=ended_s,
            prepared_s=self.prepared_s,
            routed_s=output.routed_s if output else 0.0,
            first_token_s=output.first_token_s if output else 0.0,
            last_token_s=output.last_token_s if output else 0.0,
            job_id=job.id if job else None,
            model=job.model.name if job else "",
            prompt_tokens=len(job.prompt) if job else 0,
            completion_tokens=len(output.tokens) if output else 0,
            stages=tuple(route.stages) if route else (),
            method=route.method.name if route and route.method else "",
            replays=route.replays if route else 0,
            error=error,
            reason=reason,
            result=output.result if output else None,
            trace_parent=self.trace_parent,
        )
