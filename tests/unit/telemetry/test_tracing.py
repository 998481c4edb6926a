"""Traces, received by a small collector that speaks OTLP over HTTP."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import trio

from node.coordinator.submission import RequestOrigin
from node.stages.session_report import PhaseTotals, SessionPhases, SessionReport
from node.telemetry import tracing
from node.telemetry.observer import Telemetry
from node.telemetry.requests import RequestReport
from node.telemetry.trace_context import TraceContext
from node.telemetry.tracing import make_tracer
from protocol.identity import BlockRange
from tests.support.collector import Collector
from tests.unit.api.fakes import JOB, MODEL, PEERS
from tests.unit.telemetry.test_metrics import REPORT

CLIENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector


def session(trace_parent: str) -> SessionReport:
    now_s = trio.current_time()
    totals = PhaseTotals(steps=2, rows=9, queue_s=0.1, compute_s=0.2, first_s=now_s - 1, last_s=now_s)
    return SessionReport(
        job=JOB,
        request_id="req_1",
        trace_parent=trace_parent,
        coordinator=PEERS[0],
        model=MODEL,
        blocks=BlockRange(0, 4),
        method="engine=fused",
        outcome="closed",
        error=None,
        is_background=False,
        opened_s=now_s - 2,
        ended_s=now_s,
        cached_rows=0,
        phases=SessionPhases(prefill=totals, decode=totals),
        bytes_in=1,
        bytes_out=2,
    )


async def test_spans_of_client_request_job_and_stage_form_one_tree(collector: Collector) -> None:
    telemetry = Telemetry(lambda model: "tiny", make_tracer(PEERS[0], "1"))
    async with telemetry.running():
        request_span = telemetry.start_trace(CLIENT)
        job_span = telemetry.start_trace(request_span)
        from dataclasses import replace

        origin = RequestOrigin(request_id="req_1", endpoint="/v1/completions", trace_parent=request_span)
        request = replace(REPORT.request, origin=origin)
        telemetry.on_session_ended(session(job_span))
        telemetry.on_job_ended(replace(REPORT, request=request, trace_parent=job_span))
        now_s = trio.current_time()
        telemetry.on_request_ended(
            RequestReport(
                route="/v1/completions",
                method="POST",
                status=200,
                request_id="req_1",
                began_s=now_s - 3,
                ended_s=now_s,
                parent=CLIENT,
                trace_parent=request_span,
            )
        )
    spans = {span.name: span for span in collector.spans()}
    assert {span.trace_id.hex() for span in spans.values()} == {"ab" * 16}
    parents = {name: span.parent_span_id.hex() for name, span in spans.items()}
    ids = {name: span.span_id.hex() for name, span in spans.items()}
    assert parents == {
        "POST /v1/completions": "cd" * 8,
        "job": ids["POST /v1/completions"],
        **dict.fromkeys(["prepare", "plan", "prefill", "decode", "stage 0-4"], ids["job"]),
        **dict.fromkeys(["stage prefill", "stage decode"], ids["stage 0-4"]),
    }
    attributes = {each.key: each.value for each in spans["stage decode"].attributes}
    assert attributes["metaswarm.steps"].int_value == 2
    assert spans["prefill"].end_time_unix_nano - spans["prefill"].start_time_unix_nano == pytest.approx(3e8, rel=1e-3)


async def test_unsampled_trace_is_not_exported(collector: Collector) -> None:
    telemetry = Telemetry(lambda model: "tiny", make_tracer(PEERS[0], "1"))
    async with telemetry.running():
        telemetry.on_session_ended(session(f"00-{'ab' * 16}-{'cd' * 8}-00"))
    assert collector.spans() == []


async def test_dead_collector_blocks_neither_loop_nor_end(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = await trio.open_tcp_listeners(0, host="127.0.0.1")  # accepts and never answers
    port = listener[0].socket.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setattr(tracing, "FLUSH_LIMIT_S", 0.3)
    telemetry = Telemetry(lambda model: "tiny", make_tracer(PEERS[0], "1"))
    began_s = time.monotonic()
    async with telemetry.running():
        for _ in range(1000):
            telemetry.on_session_ended(session(telemetry.start_trace("")))
            await trio.lowlevel.checkpoint()
    assert time.monotonic() - began_s < 5
    await listener[0].aclose()
    for thread in threading.enumerate():
        if "Otel" in thread.name:
            thread.join(30)  # it draws from `random` between attempts, which Hypothesis notices in later tests
            assert not thread.is_alive()


def test_is_not_imported_without_an_endpoint() -> None:
    program = (
        "import sys, node.app; from node.telemetry.tracing import make_tracer; "
        "assert make_tracer('p', '1') is None; print([n for n in sys.modules if n.startswith('opentelemetry')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PATH": ""}
    )
    assert result.stdout.strip() == "[]"


def test_missing_extra_is_one_line_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert make_tracer(PEERS[0], "1") is None
    assert "metaswarm[otel]" in capsys.readouterr().out


def test_context_without_parent_begins_a_trace() -> None:
    assert TraceContext.below(None).trace_id != TraceContext.below(None).trace_id
