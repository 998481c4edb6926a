"""Tasks as `/swarm/explain` describes them: the query of a URL, checked, as a job that is not run."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from node.api.errors import ApiError
from node.jobs.interface import JobRequest, Objective, Quality
from protocol.limits import MAX_PARALLEL_JOBS, MAX_POSITIONS

DEFAULT_TOKENS: Final = 64
"""Of prompt and text, where nothing is said."""

_TOKEN_IDS: Final = 256
"""A prompt that is never computed is made of the first so many."""


def parse_task(query: Mapping[str, str]) -> tuple[JobRequest, dict[str, Any]]:
    """Return the job, and what of its task is as told. Raises ApiError with one line for what is wrong."""
    parsers: dict[str, Callable[[str, str], Any]] = {
        "model": lambda _, value: value,
        "prompt_tokens": _count(MAX_POSITIONS),
        "max_tokens": _count(MAX_POSITIONS),
        "shared_prefix_share": _share,
        "repetitiveness": _share,
        "concurrency": _count(MAX_PARALLEL_JOBS),
        "objective": _one_of(Objective),
        "quality": _one_of(Quality),
    }
    for name in query:
        if name not in parsers:
            raise ApiError(400, f"{name} is unknown; there are {', '.join(parsers)}", param=name)
    given = {name: parsers[name](name, value) for name, value in query.items()}
    if not given.get("model"):
        raise ApiError(400, "model is missing", param="model")
    request = JobRequest(
        model=given["model"],
        prompt_tokens=tuple(place % _TOKEN_IDS for place in range(given.get("prompt_tokens", DEFAULT_TOKENS))),
        max_tokens=given.get("max_tokens", DEFAULT_TOKENS),
        objective=given.get("objective", Objective.LATENCY),
        quality=given.get("quality", Quality.EXACT),
    )
    told = {"shared_prefix_share": 0.0, "repetitiveness": 0.0}
    told |= {name: given[name] for name in ("shared_prefix_share", "repetitiveness", "concurrency") if name in given}
    return request, told


def _count(most: int) -> Callable[[str, str], int]:
    def parse(name: str, value: str) -> int:
        if not (value.isascii() and value.isdigit() and len(value) <= 9 and 1 <= int(value) <= most):
            raise ApiError(400, f"{name} must be an integer from 1 to {most}", param=name)
        return int(value)

    return parse


def _share(name: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ApiError(400, f"{name} must be a number from 0 to 1", param=name)
    return share


def _one_of(kind: type[Objective] | type[Quality]) -> Callable[[str, str], Objective | Quality]:
    def parse(name: str, value: str) -> Objective | Quality:
        try:
            return kind(value)
        except ValueError:
            raise ApiError(400, f"{name} must be one of {', '.join(kind)}", param=name) from None

    return parse
