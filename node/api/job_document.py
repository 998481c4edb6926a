"""How the swarm ran a job, as every protocol tells it where the client asks for it."""

from dataclasses import asdict
from typing import Any

from node.coordinator.submission import JobResult


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
        "cost": None if result.cost is None else asdict(result.cost),
        "selection": None if result.selection is None else asdict(result.selection),
        "replays": result.replays,
        "token_ids": list(result.token_ids),
    }
