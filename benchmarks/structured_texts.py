"""Texts that follow a JSON Schema: how many are valid, and what a token costs more than without.

    python -m benchmarks.structured_texts [--texts N] [--pairs N] [--json]

A daemon serves the whole demo model and answers chats drawn at temperature 1. Each text that should follow the schema
is parsed and compared with it, eight at a time; a text that the limit of tokens cuts counts as not valid. Then the same
chats are answered with and without the schema, one at a time and in turn, to compare the time of a token.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine, spread_of, whole_model
from node.models.catalogue import DEMO_MODEL
from node.models.store import Package

SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
    },
    "required": ["name", "age", "colour", "tags"],
    "additionalProperties": False,
}
MAX_TOKENS: Final = 120
AT_A_TIME: Final = 8


@click.command()
@click.option("--texts", type=click.IntRange(1), default=200, show_default=True, help="Texts that are validated.")
@click.option("--pairs", type=click.IntRange(1), default=20, show_default=True, help="Pairs of texts that are timed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(texts: int, pairs: int, as_json: bool) -> None:
    """Measure texts that follow a JSON Schema."""
    result = trio.run(measure, demo_package(), texts, pairs)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(package: Package, texts: int, pairs: int) -> dict[str, Any]:
    """Return how many texts are valid, and the times of tokens in milliseconds."""
    valid: list[bool] = []
    limiter = trio.CapacityLimiter(AT_A_TIME)
    with_ms: list[float] = []
    without_ms: list[float] = []
    async with whole_model(package, 1) as daemon, httpx.AsyncClient(base_url=daemon.api_url, timeout=300) as client:

        async def validate(number: int) -> None:
            async with limiter:
                valid.append(is_valid((await answer(client, number, constrained=True))[0]))

        async with trio.open_nursery() as nursery:
            for number in range(texts):
                nursery.start_soon(validate, number)
        for number in range(pairs):
            with_ms.append((await answer(client, number, constrained=True))[1])
            without_ms.append((await answer(client, number, constrained=False))[1])
    medians = {"with_ms": spread_of(with_ms).median, "without_ms": spread_of(without_ms).median}
    return {**describe_machine(), "texts": texts, "valid": sum(valid), "pairs": pairs, **medians}


async def answer(client: httpx.AsyncClient, number: int, *, constrained: bool) -> tuple[str, float]:
    """Return a chat's text, and the time of one token after the first."""
    body: dict[str, Any] = {
        "model": DEMO_MODEL,
        "messages": [{"role": "user", "content": f"Describe person number {number} as JSON."}],
        "max_tokens": MAX_TOKENS if constrained else 40,
        "temperature": 1.0,
        "seed": number,
        "metaswarm": {"method": "baseline"},
    }
    if constrained:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    document = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
    return document["choices"][0]["message"]["content"], document["metaswarm"]["timing"]["tpot_s"] * 1e3


def is_valid(text: str) -> bool:
    """Return whether a text is JSON that follows the schema."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and value.keys() == set(SCHEMA["required"])
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 20
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and value["colour"] in {"red", "green", "blue"}
        and isinstance(value["tags"], list)
        and len(value["tags"]) <= 3
        and all(isinstance(tag, str) and len(tag) <= 10 for tag in value["tags"])
    )


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    return (
        f"load average {result['load_average']:.1f} on {result['cores']} cores\n"
        f"{result['valid']} of {result['texts']} texts follow the schema\n"
        f"a token takes {result['with_ms']:.1f} ms with the schema and {result['without_ms']:.1f} ms without (medians)"
    )


if __name__ == "__main__":
    main()
