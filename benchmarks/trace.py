"""Replays a real workload trace, scaled down: arrival times, lengths and shared prefixes of real users.

    python -m benchmarks.trace FILE [--jobs N] [--scale S] [--speed X] [--peers P] [--method NAME] [--json]

FILE is one of the Azure LLM inference traces (CSV) or the Mooncake conversation trace (JSON lines), gzipped or not.
Lengths are divided by `--scale` and truncated to the model's context; time runs `--speed` times as fast. Where the
trace shows which prompts share a prefix, the replayed prompts share one, too.
"""

import csv
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, TextIO

import click
import httpx
import numpy as np
import trio

from benchmarks.common import demo_package, describe_machine, spread_of, whole_model
from node.models.catalogue import DEMO_MODEL
from node.models.tokenizer_worker import read_tokenizer

MOONCAKE_BLOCK: Final = 512
"""Tokens of a prompt that one hash stands for."""

MAX_PROMPT: Final = 1024
MAX_NEW: Final = 128


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace. `pieces`: equal numbers stand for equal pieces of prompts; empty if unknown."""

    at_s: float
    prompt_tokens: int
    new_tokens: int
    pieces: tuple[int, ...] = ()


def read_trace(file: TextIO, *, is_csv: bool) -> Iterator[Arrival]:
    """Yield the requests of a trace, the first at 0 s."""
    if is_csv:
        began: datetime | None = None
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            began = began or at
            yield Arrival((at - began).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        return
    for line in file:
        told = json.loads(line)
        yield Arrival(told["timestamp"] / 1000, told["input_length"], told["output_length"], tuple(told["hash_ids"]))


def prompt_of(arrival: Arrival, number: int, text: Sequence[int], scale: float) -> list[int]:
    """Return a prompt of the scaled length, with the pieces that the trace names."""
    count = max(1, min(MAX_PROMPT, round(arrival.prompt_tokens / scale)))
    length = max(1, round(MOONCAKE_BLOCK / scale)) if arrival.pieces else count
    pieces = arrival.pieces or (-1 - number,)
    tokens: list[int] = []
    for piece in pieces:
        rng = np.random.default_rng(abs(piece) * 2 + (piece < 0))
        start = int(rng.integers(len(text)))
        tokens += [int(rng.choice(text)), *(text[(start + offset) % len(text)] for offset in range(length - 1))]
        if len(tokens) >= count:
            break
    while len(tokens) < count:
        tokens.append(text[len(tokens) % len(text)])
    return tokens[:count]


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--jobs", type=click.IntRange(1), default=60, show_default=True)
@click.option("--scale", type=click.FloatRange(1), default=16.0, show_default=True, help="Lengths are divided by it.")
@click.option("--speed", type=click.FloatRange(0.01), default=1.0, show_default=True, help="Times as fast.")
@click.option("--peers", type=click.IntRange(1, 8), default=1, show_default=True)
@click.option("--method", default="auto", show_default=True)
@click.option("--quality", type=click.Choice(["exact", "near", "any"]), default="exact", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    file: Path, jobs: int, scale: float, speed: float, peers: int, method: str, quality: str, as_json: bool
) -> None:
    """Replay a trace."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as opened:
        arrivals = list(islice(read_trace(opened, is_csv=".csv" in file.suffixes), jobs))
    extras = {"method": method, "quality": quality, "ignore_eos": True}
    result = trio.run(replay, arrivals, scale, speed, peers, extras)
    result = {"trace": file.name, "scale": scale, "speed": speed, "peers": peers, "method": method, **result}
    click.echo(json.dumps(result) if as_json else report(result))


async def replay(
    arrivals: Sequence[Arrival], scale: float, speed: float, peers: int, extras: dict[str, Any]
) -> dict[str, Any]:
    """Submit every request at its time; return times and counts."""
    from node.models.sample import sample_text

    package = demo_package()
    names = [file.name for file in package.manifest.tokenizer_files]
    text = read_tokenizer(package.path, names, package.manifest.eos_token_ids).encode(sample_text())
    machine = describe_machine()
    answers: list[dict[str, Any]] = []
    refused: list[str] = []

    async def submit(client: httpx.AsyncClient, number: int, arrival: Arrival) -> None:
        body = {
            "model": DEMO_MODEL,
            "prompt": prompt_of(arrival, number, text, scale),
            "max_tokens": max(1, min(MAX_NEW, round(arrival.new_tokens / scale))),
            "temperature": 0,
            "metaswarm": extras,
        }
        answer = await client.post("/v1/completions", json=body)
        if answer.is_error:
            refused.append(answer.json()["error"]["message"])
        else:
            answers.append(answer.json())

    async with whole_model(package, peers) as first:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=first.api_url, timeout=None, limits=limits) as client:
            began_s = trio.current_time()
            async with trio.open_nursery() as nursery:
                for number, arrival in enumerate(arrivals):
                    await trio.sleep_until(began_s + arrival.at_s / speed)
                    nursery.start_soon(submit, client, number, arrival)
            seconds = trio.current_time() - began_s
    if not answers:
        raise click.ClickException(f"no job was done: {refused[0] if refused else 'the trace is empty'}")
    usage = [answer["usage"] for answer in answers]
    methods: dict[str, int] = {}
    for answer in answers:
        name = answer["metaswarm"]["method"]["name"]
        methods[name] = methods.get(name, 0) + 1
    return {
        **machine,
        "done": len(answers),
        "refused": len(refused),
        "seconds": seconds,
        "prompt_tokens": sum(each["prompt_tokens"] for each in usage),
        "cached_tokens": sum(each["prompt_tokens_details"]["cached_tokens"] for each in usage),
        "new_tokens": sum(each["completion_tokens"] for each in usage),
        "ttft_s": asdict(spread_of([answer["metaswarm"]["timing"]["ttft_s"] for answer in answers])),
        "tpot_s": asdict(spread_of([answer["metaswarm"]["timing"]["tpot_s"] for answer in answers])),
        "methods": methods,
    }


def report(result: dict[str, Any]) -> str:
    """Return the figures as lines."""
    ttft, tpot = result["ttft_s"], result["tpot_s"]
    lines = (
        f"load average {result['load_average']:.1f} on {result['cores']} cores; {result['trace']}, "
        f"lengths / {result['scale']:g}, {result['speed']:g} times as fast, {result['peers']} peers\n"
        f"{result['done']} jobs done, {result['refused']} refused in {result['seconds']:.1f} s; "
        f"{result['new_tokens'] / result['seconds']:.1f} tokens/s; "
        f"{result['cached_tokens'] / result['prompt_tokens']:.0%} of the prompts cached\n"
        f"TTFT {ttft['median']:.2f} s (p99 {ttft['p99']:.2f}), TPOT {1e3 * tpot['median']:.0f} ms "
        f"(p99 {1e3 * tpot['p99']:.0f})"
    )
    ranked = sorted(result["methods"].items(), key=lambda pair: -pair[1])
    return "\n".join([lines, *(f"{count:5} {name}" for name, count in ranked)])


if __name__ == "__main__":
    main()
