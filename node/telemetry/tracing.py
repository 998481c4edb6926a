"""Spans for OpenTelemetry: of requests, of jobs with their phases, and of sessions on stages.

They are made once something has ended, from its report, so nothing is traced on the path of a token. A batch processor
of the library sends them from a thread of its own. The library is the optional extra `otel`, and is imported only where
the environment names an endpoint.
"""

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from node.coordinator.job_report import JobReport
from node.stages.session_report import PhaseTotals, SessionReport
from node.telemetry.requests import RequestReport
from node.telemetry.trace_context import TraceContext
from protocol.identity import PeerId

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanContext

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_LIMIT_S: Final = 5.0
"""How long the end of the node waits for spans that were not sent yet."""

Attributes = Mapping[str, str | int | float | bool]

_logger = structlog.get_logger(__name__)


def make_tracer(peer: PeerId, version: str) -> "Tracer | None":
    """Return what exports spans where the environment names an endpoint for them; None otherwise."""
    named = next((name for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    if named is None:
        return None
    try:
        return Tracer(peer, version)
    except ImportError as error:
        _logger.warning(
            "no traces: install the extra `otel`, as in pip install 'metaswarm[otel]'",
            variable=named,
            reason=str(error),
        )
    return None


class Tracer:
    """Exports spans by OTLP over HTTP, as the variables OTEL_… say."""

    def __init__(self, peer: PeerId, version: str) -> None:
        """Raise ImportError where the library is not installed."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        name = os.environ.get("OTEL_SERVICE_NAME", "metaswarm")
        self._resource = Resource.create(
            {"service.name": name, "service.version": version, "service.instance.id": peer}
        )
        self._scope = InstrumentationScope("metaswarm", version)
        self._span_class = ReadableSpan
        self._processor: SpanProcessor = BatchSpanProcessor(OTLPSpanExporter())

    async def close(self) -> None:
        """Send what is left, within a bounded time, even under cancellation."""
        with trio.CancelScope(deadline=trio.current_time() + FLUSH_LIMIT_S, shield=True):
            await trio.to_thread.run_sync(self._processor.shutdown, abandon_on_cancel=True)

    def request(self, report: RequestReport) -> None:
        """Export the span of an API request."""
        context = TraceContext.parse(report.trace_parent)
        if context is not None:
            attributes: Attributes = {
                "http.request.method": report.method,
                "http.route": report.route,
                "http.response.status_code": report.status,
                "metaswarm.request_id": report.request_id,
            }
            span = f"{report.method} {report.route}"
            parent = TraceContext.parse(report.parent)
            self._export(span, context, parent, report.began_s, report.ended_s, attributes, failed=report.status >= 500)

    def job(self, report: JobReport) -> None:
        """Export the span of a job, and those of its phases: prepare, plan, prefill, decode."""
        context = TraceContext.parse(report.trace_parent)
        if context is None:
            return
        attributes: dict[str, str | int | float | bool] = {
            "metaswarm.request_id": report.request.origin.request_id,
            "metaswarm.job_id": report.job_id or "",
            "metaswarm.outcome": report.outcome,
            "metaswarm.method": report.method,
            "metaswarm.replays": report.replays,
            "gen_ai.request.model": report.model,
            "gen_ai.usage.input_tokens": report.prompt_tokens,
            "gen_ai.usage.output_tokens": report.completion_tokens,
        }
        parent = TraceContext.parse(report.request.origin.trace_parent)
        failed = report.outcome == "failed"
        self._export("job", context, parent, report.began_s, report.ended_s, attributes, failed=failed)
        bounds = (report.began_s, report.prepared_s, report.routed_s, report.first_token_s, report.last_token_s)
        for name, began_s, ended_s in zip(("prepare", "plan", "prefill", "decode"), bounds, bounds[1:], strict=False):
            if not ended_s:
                break
            tokens = report.prompt_tokens if name == "prefill" else report.completion_tokens
            extra = {"metaswarm.tokens": tokens} if name in {"prefill", "decode"} else {}
            self._export(name, TraceContext.below(context), context, began_s, ended_s, extra)

    def session(self, model: str, report: SessionReport) -> None:
        """Export the span of a session on a stage, with its prefill and its decode steps."""
        parent = TraceContext.parse(report.trace_parent)
        if parent is None:
            return
        context = TraceContext.below(parent)
        attributes: dict[str, str | int | float | bool] = {
            "metaswarm.request_id": report.request_id,
            "metaswarm.blocks": str(report.blocks),
            "metaswarm.method": report.method,
            "metaswarm.outcome": report.outcome,
            "metaswarm.cached_rows": report.cached_rows,
            "metaswarm.bytes_in": report.bytes_in,
            "metaswarm.bytes_out": report.bytes_out,
            "gen_ai.request.model": model,
        }
        self._export(f"stage {report.blocks}", context, parent, report.opened_s, report.ended_s, attributes)
        for name, totals in (("stage prefill", report.phases.prefill), ("stage decode", report.phases.decode)):
            if totals.steps:
                below = TraceContext.below(context)
                self._export(name, below, context, totals.first_s, totals.last_s, _attributes_of(totals))

    def _export(
        self,
        name: str,
        context: TraceContext,
        parent: TraceContext | None,
        began_s: float,
        ended_s: float,
        attributes: Attributes,
        *,
        failed: bool = False,
    ) -> None:
        from opentelemetry.trace import Status, StatusCode

        offset_s = time.time() - trio.current_time()
        span = self._span_class(
            name,
            _span_context(context),
            None if parent is None else _span_context(parent, is_remote=True),
            self._resource,
            attributes,
            status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
            start_time=int((began_s + offset_s) * 1e9),
            end_time=int((ended_s + offset_s) * 1e9),
            instrumentation_scope=self._scope,
        )
        self._processor.on_end(span)


def _attributes_of(totals: PhaseTotals) -> Attributes:
    return {
        "metaswarm.steps": totals.steps,
        "metaswarm.rows": totals.rows,
        "metaswarm.queue_s": round(totals.queue_s, 6),
        "metaswarm.compute_s": round(totals.compute_s, 6),
    }


def _span_context(context: TraceContext, *, is_remote: bool = False) -> "SpanContext":
    from opentelemetry.trace import SpanContext, TraceFlags

    flags: Any = TraceFlags(TraceFlags.SAMPLED if context.is_sampled else TraceFlags.DEFAULT)
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote, flags)
