"""Telemetry: takes the reports of requests, jobs and sessions, and counts, logs and traces each."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from node.coordinator.job_report import JobReport
from node.stages.session_report import SessionReport
from node.telemetry.job_log import log_job, log_session
from node.telemetry.metrics import NodeMetrics
from node.telemetry.requests import RequestReport
from node.telemetry.trace_context import TraceContext
from node.telemetry.tracing import Tracer
from protocol.identity import ModelId


class Telemetry:
    """Watches one node. Implements `JobObserver` and `StageObserver`."""

    def __init__(self, model_name: Callable[[ModelId], str], tracer: Tracer | None = None) -> None:
        """`model_name`: returns what to call a model; `tracer`: exports spans, where that is configured."""
        self.metrics = NodeMetrics()
        self._tracer = tracer
        self._model_name = model_name
        self._names: dict[ModelId, str] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send the last spans at the end of the block."""
        try:
            yield
        finally:
            if self._tracer is not None:
                await self._tracer.close()

    def start_trace(self, trace_parent: str) -> str:
        """Return a new span below the client's, if traces are exported here; else the client's own."""
        if self._tracer is None:
            return trace_parent
        return str(TraceContext.below(TraceContext.parse(trace_parent)))

    def on_request_ended(self, report: RequestReport) -> None:
        """Count and trace a request to the API."""
        self.metrics.on_request(report)
        if self._tracer is not None:
            self._tracer.request(report)

    def on_job_ended(self, report: JobReport) -> None:
        """Count, log and trace a job."""
        self.metrics.on_job(report)
        log_job(report)
        if self._tracer is not None:
            self._tracer.job(report)

    def on_step(self, model: ModelId, compute_s: float) -> None:
        """Count a step of an engine."""
        self.metrics.on_step(self._name(model), compute_s)

    def on_slice(self, model: ModelId, phase: str, queue_s: float, step_s: float) -> None:
        """Count a slice that a stage has computed."""
        self.metrics.on_slice(self._name(model), phase, queue_s, step_s)

    def on_session_ended(self, report: SessionReport) -> None:
        """Count, log and trace a session on a stage."""
        model = self._name(report.model)
        self.metrics.on_session(model, report)
        log_session(model, report)
        if self._tracer is not None:
            self._tracer.session(model, report)

    def _name(self, model: ModelId) -> str:
        """Return what to call a model that is served here, read from the disk once."""
        if model not in self._names:
            self._names[model] = self._model_name(model)
        return self._names[model]
