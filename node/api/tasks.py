"""Bodies of `/swarm/explain`: validation and conversion to a job that is not run."""

from typing import Any, Final

from node.api.requests import (
    Fields,
    count_between,
    number_between,
    parse_count,
    parse_json,
    parse_quality,
    parse_text,
    refuse,
)
from node.coordinator.submission import JobRequest
from protocol.limits import MAX_PARALLEL_JOBS
from protocol.measurements import QualityBound

DEFAULT_TOKENS: Final = 64
"""Default length of prompt and text."""

_TOKEN_IDS: Final = 256
"""Distinct ids in the prompt, which is never computed."""

TASK_FIELDS: Final = frozenset(
    {"model", "prompt_tokens", "max_tokens", "shared_prefix_share", "repetitiveness", "concurrency", "quality"}
)


def parse_task(body: bytes) -> tuple[JobRequest, dict[str, Any]]:
    """Return the job, and the fields of its context that are overridden. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(TASK_FIELDS)
    model = fields.get("model", parse_text)
    if not model:
        refuse("model", "is missing")
    prompt_tokens = fields.get("prompt_tokens", parse_count) or DEFAULT_TOKENS
    request = JobRequest(
        model=model,
        prompt_tokens=tuple(place % _TOKEN_IDS for place in range(prompt_tokens)),
        max_tokens=fields.get("max_tokens", parse_count) or DEFAULT_TOKENS,
        quality=fields.get("quality", parse_quality) or QualityBound.EXACT,
    )
    overrides: dict[str, Any] = {
        name: fields.get(name, number_between(0, 1)) or 0.0 for name in ("shared_prefix_share", "repetitiveness")
    }
    concurrency = fields.get("concurrency", count_between(1, MAX_PARALLEL_JOBS))
    if concurrency is not None:
        overrides["concurrency"] = concurrency
    return request, overrides
