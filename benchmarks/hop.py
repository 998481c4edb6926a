"""Overhead of one more stage in a decode step, beyond the engine's own time, and its parts.

    python -m benchmarks.hop [--rounds N] [--tokens N] [--json]

Three swarms of real daemons on loopback hold the whole model in one, two and three stages. Jobs alternate between
them, so that load from elsewhere affects all alike. The overhead of a token is its time minus the stages' forward
passes; the cost of a hop is the slope of the overhead over the number of stages. The second stage adds two network
crossings (rows there, token back), the third one more, so both steps are shown separately, too.
"""

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

import click
import httpx
import trio

from benchmarks.common import Spread, demo_package, describe_machine, spread_of, verdict, whole_model
from benchmarks.parts import measure_parts
from node.models.catalogue import DEMO_MODEL
from node.models.store import Package
from protocol.identity import BlockRange

TARGET_MS = 3.0
STAGES = (1, 2, 3)
MIDDLE = BlockRange(10, 20)
PART_COUNT = 300
"""How often each part of a hop is measured."""

PARTS = {
    "serialisation": "serialisation: the job stream's step, both ends",
    "crypto": "crypto: ChaCha20-Poly1305, both ends",
    "transport": "transport: half a libp2p round trip, less crypto",
    "worker_codec": "to the worker and back: codec and socket alone",
    "worker": "to the worker and back: all but the forward pass",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One job: milliseconds a token took, and those of them inside the stages' forward passes."""

    token_ms: float
    engine_ms: float

    @property
    def overhead_ms(self) -> float:
        """Time of a token outside the forward passes."""
        return self.token_ms - self.engine_ms


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Jobs for each number of stages.")
@click.option("--tokens", type=click.IntRange(2), default=24, show_default=True, help="New tokens of a job.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(rounds: int, tokens: int, as_json: bool) -> None:
    """Measure the cost of a hop."""
    result = trio.run(measure, demo_package(), rounds, tokens)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(package: Package, rounds: int, tokens: int) -> dict[str, Any]:
    """Return all figures, in milliseconds."""
    samples = await sample_jobs(package, rounds, tokens)
    machine = describe_machine()
    overheads = {stages: [sample.overhead_ms for sample in of_stages] for stages, of_stages in samples.items()}
    # The slope of a line through three points is half the way from the first to the last, whatever the middle one is.
    hops = [(last - first) / 2 for first, last in zip(overheads[1], overheads[3], strict=True)]
    hop = spread_of(hops)
    parts = await measure_parts(package, MIDDLE, PART_COUNT)
    in_a_hop = [spread for name, spread in parts.items() if name != "worker_codec"]  # the worker's detour has it
    return {
        **machine,
        "stages": [describe_stages(stages, of_stages) for stages, of_stages in samples.items()],
        "second_stage_ms": spread_of([b - a for a, b in zip(overheads[1], overheads[2], strict=True)]).median,
        "third_stage_ms": spread_of([b - a for a, b in zip(overheads[2], overheads[3], strict=True)]).median,
        "hop_ms": asdict(hop),
        "parts_ms": {name: asdict(spread) for name, spread in parts.items()},
        "undisturbed_ms": sum(spread.p5 for spread in in_a_hop),
        "target_ms": TARGET_MS,
        "verdict": verdict(hop.median, TARGET_MS),
    }


async def sample_jobs(package: Package, rounds: int, tokens: int) -> dict[int, list[Sample]]:
    """Run jobs over one, two and three stages in turn; return their samples."""
    samples: dict[int, list[Sample]] = {stages: [] for stages in STAGES}
    async with AsyncExitStack() as swarms:
        urls = {}
        for stages in STAGES:
            # Submitted where the first stage is, so that one more stage is one more peer and nothing else.
            urls[stages] = (await swarms.enter_async_context(whole_model(package, stages))).api_url
        client = await swarms.enter_async_context(httpx.AsyncClient(timeout=300))
        for round_number in range(rounds + 1):
            for stages, url in urls.items():
                sample = await run_job(client, url, stages, tokens)
                if round_number:  # the first round warms up
                    samples[stages].append(sample)
    return samples


async def run_job(client: httpx.AsyncClient, url: str, stages: int, tokens: int) -> Sample:
    """Run one job over a route of so many stages."""
    body = {
        "model": DEMO_MODEL,
        "prompt": "Once",
        "max_tokens": tokens,
        "temperature": 0,
        "metaswarm": {"ignore_eos": True},
    }
    answer = (await client.post(f"{url}/v1/completions", json=body)).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == tokens
    job = answer["metaswarm"]
    assert len(job["route"]) == stages
    # Each token, the first included, is one step of one row: the prompt is one token.
    assert answer["usage"]["prompt_tokens"] == 1
    engine_s = sum(stage["compute_s"] for stage in job["route"]) / tokens
    return Sample(token_ms=job["timing"]["tpot_s"] * 1e3, engine_ms=engine_s * 1e3)


def describe_stages(stages: int, samples: list[Sample]) -> dict[str, Any]:
    """Return the figures of the jobs over so many stages."""
    return {
        "stages": stages,
        "token_ms": asdict(spread_of([sample.token_ms for sample in samples])),
        "engine_ms": asdict(spread_of([sample.engine_ms for sample in samples])),
        "overhead_ms": asdict(spread_of([sample.overhead_ms for sample in samples])),
    }


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; milliseconds a token, medians of jobs",
        "",
        "stages    time   in the engine   overhead   worst job's",
    ]
    for row in result["stages"]:
        token_ms, engine_ms, overhead_ms = (row[name] for name in ("token_ms", "engine_ms", "overhead_ms"))
        lines.append(
            f"{row['stages']:6} {token_ms['median']:7.1f} {engine_ms['median']:15.1f} {overhead_ms['median']:10.2f}"
            f" {overhead_ms['greatest']:13.2f}"
        )
    hop = result["hop_ms"]
    lines += [
        "",
        f"one more stage costs {hop['median']:.2f} ms (worst round: {hop['greatest']:.2f})",
        f"the second costs {result['second_stage_ms']:.2f} ms, the third {result['third_stage_ms']:.2f}",
        f"target: at most {result['target_ms']:.0f} ms at the median: {result['verdict']}",
        "",
        f"{'its parts, each by itself':<50}      p5   median      p99",
    ]
    for name, title in PARTS.items():
        part = Spread(**result["parts_ms"][name])
        lines.append(f"  {title:<48} {part.p5:7.3f}  {part.median:7.3f}  {part.p99:7.3f}")
    lines += [
        "",
        f"where no part has to wait for a core, they come to {result['undisturbed_ms']:.2f} ms",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
