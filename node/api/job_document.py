"""How the swarm ran a job, as every protocol tells it where the client asks for it."""

from dataclasses import asdict
from typing import Any

from node.coordinator.submission import JobResult, JobTrace


def describe_job(result: JobResult) -> dict[str, Any]:
    """Return the field `metaswarm` of an answer. Times in seconds."""
    method = result.method
    return {
        "job_id": result.job_id,
        "route": [
            {"peer": stage.peer, "start": stage.blocks.start, "end": stage.blocks.end}
            | {"compute_s": stage.statistics.compute_s, "queue_s": stage.statistics.queue_s}
            for stage in result.route
        ],
        "method": {"name": method.name, "switches": dict(method.switches), "stage_policy": dict(method.stage_policy)},
        "consensus": asdict(result.consensus),
        "timing": asdict(result.timing),
        "selection": None if result.selection is None else asdict(result.selection),
        "replays": result.replays,
        "token_ids": list(result.token_ids),
        "trace": None if result.trace is None else _describe_trace(result.trace),
    }


def _describe_trace(trace: JobTrace) -> dict[str, Any]:
    stages = [
        {"peer": stage.peer, "start": stage.blocks.start, "end": stage.blocks.end, "clock_error_s": stage.clock_error_s}
        for stage in trace.stages
    ]
    return {"stages": stages, "rounds": [asdict(each) for each in trace.rounds], "dropped_steps": trace.dropped_steps}
