"""The log's lines of jobs: one for each job at its coordinator, and one for each session on a stage. No text."""

from typing import Final

import structlog

from node.coordinator.job_report import JobReport
from node.stages.session_report import SessionReport
from node.util.text import one_line

MAX_REASON: Final = 1000
"""Characters of it: it may name many peers."""

_logger = structlog.get_logger(__name__)


def log_job(report: JobReport) -> None:
    """Log a job that has ended: a user's at level info, a trial at level debug."""
    log = _logger.debug if report.is_trial else _logger.warning if report.outcome == "failed" else _logger.info
    fields: dict[str, object] = {
        "job": report.job_id or "-",
        "request_id": report.request.origin.request_id or report.job_id or "-",
        "endpoint": report.request.origin.endpoint or "-",
        "model": report.model or "-",
        "task": report.request.task_kind.value,
        "outcome": report.outcome,
        "route": ",".join(f"{stage.peer}:{stage.blocks}" for stage in report.stages) or "-",
        "method": report.method or "-",
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.completion_tokens,
        "replays": report.replays,
        "total_s": _seconds(report.ended_s - report.began_s),
    }
    if report.first_token_s:
        fields["ttft_s"] = _seconds(report.first_token_s - report.began_s)
    if report.completion_tokens > 1:
        fields["tpot_s"] = _seconds((report.last_token_s - report.first_token_s) / (report.completion_tokens - 1))
    if (result := report.result) is not None:
        fields["finish_reason"] = result.finish_reason.value
        fields["cached_tokens"] = result.usage.cached_tokens
        if result.is_stated:
            fields["queue_s"] = _seconds(sum(stage.statistics.queue_s for stage in result.route))
            fields["compute_s"] = _seconds(sum(stage.statistics.compute_s for stage in result.route))
    if report.error is not None:
        fields["error"] = report.error.value
    if report.reason:
        fields["reason"] = one_line(report.reason, MAX_REASON)
    log("job ended", **fields)


def log_session(model: str, report: SessionReport) -> None:
    """Log a session of a stage that has ended: a user's at level info, a measurement's at level debug."""
    log = _logger.debug if report.is_background else _logger.info
    prefill, decode = report.phases.prefill, report.phases.decode
    log(
        "session ended",
        job=report.job,
        request_id=report.request_id or "-",
        coordinator=report.coordinator,
        model=model,
        blocks=str(report.blocks),
        method=report.method,
        outcome=report.outcome,
        **({} if report.error is None else {"error": report.error.value}),
        cached_rows=report.cached_rows,
        prefill_rows=prefill.rows,
        decode_rows=decode.rows,
        queue_s=_seconds(prefill.queue_s + decode.queue_s),
        compute_s=_seconds(prefill.compute_s + decode.compute_s),
        total_s=_seconds(report.ended_s - report.opened_s),
    )


def _seconds(value: float) -> float:
    return round(value, 4)
