"""How the swarm ran a job, as every protocol tells it where the client asks for it."""

from dataclasses import asdict
from typing import Any

from node.api.interface import JobDocument
from node.coordinator.recent_jobs import RecentJob
from node.coordinator.submission import JobResult, JobTrace


def describe_job(result: JobResult) -> dict[str, Any]:
    """Return the field `metaswarm` of an answer. Times in seconds."""
    method = result.method
    return {
        "job_id": result.job_id,
        "route": [
            {
                "peer": stage.peer,
                "start": stage.blocks.start,
                "end": stage.blocks.end,
                "compute_s": stage.statistics.compute_s if stage.is_stated else None,
                "queue_s": stage.statistics.queue_s if stage.is_stated else None,
            }
            for stage in result.route
        ],
        "method": {"name": method.name, "switches": dict(method.switches), "stage_policy": dict(method.stage_policy)},
        "consensus": asdict(result.consensus),
        "timing": asdict(result.timing),
        "cost": None if result.cost is None else asdict(result.cost),
        "selection": None if result.selection is None else asdict(result.selection),
        "replays": result.replays,
        "token_ids": list(result.token_ids),
        "trace": None if result.trace is None else _describe_trace(result.trace),
    }


def describe_recent_job(job: RecentJob) -> JobDocument:
    """Return a job as `/swarm/jobs` lists it."""
    return {
        "job_id": job.id,
        "model": job.model,
        "name": job.model_name,
        "state": job.state.value,
        "trial": job.is_trial,
        "task": job.task.value,
        "submitted_at": round(job.submitted_s, 3),
        "prompt_tokens": job.prompt_tokens,
        "tokens": job.tokens,
        "route": [{"peer": stage.peer, "start": stage.blocks.start, "end": stage.blocks.end} for stage in job.stages],
        "method": job.method,
        "replays": job.replays,
        "error": job.error,
        "details": None if job.result is None else describe_job(job.result),
    }


def _describe_trace(trace: JobTrace) -> dict[str, Any]:
    stages = [
        {"peer": stage.peer, "start": stage.blocks.start, "end": stage.blocks.end, "clock_error_s": stage.clock_error_s}
        for stage in trace.stages
    ]
    rounds = [
        {
            "position": each.position,
            "tokens": each.tokens,
            "arrived_s": each.arrived_s,
            "has_prompt": each.has_prompt,
            "stages": [
                {
                    "stage": timing.stage,
                    "link_s": timing.link_s,
                    "queue_s": timing.queue_s,
                    "compute_s": timing.compute_s,
                    "serialise_s": timing.serialise_s,
                }
                for timing in each.stages
            ],
        }
        for each in trace.rounds  # `asdict` takes ten times as long, on the event loop
    ]
    return {"stages": stages, "rounds": rounds, "dropped_steps": trace.dropped_steps}
