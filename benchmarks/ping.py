"""Latency of libp2p pings to a daemon while its engine computes long prompts.

    python -m benchmarks.ping [--pings N] [--json]

A daemon serves the whole demo model and computes prompts of 1,024 tokens, one after another, while a peer in another
process pings it; for comparison also while it is idle. Each ping is timed twice: from the bytes sent to their echo, and
including the opening of its stream.
"""

import json
import os
import random
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click
import httpx
import trio

from benchmarks.common import Spread, demo_package, describe_machine, spread_of, verdict, whole_model
from node.models.catalogue import DEMO_MODEL
from node.models.store import Package
from node.network.host import Libp2pNetwork
from node.network.interface import Network
from protocol.identity import PeerId

PROMPT_TOKENS = 1024
TOKEN_IDS = range(1000, 40_000)
"""Ordinary tokens of the demo model's vocabulary."""
TARGET_MS = 50.0
INTERVAL_S = 0.02


@click.command()
@click.option("--pings", type=click.IntRange(100), default=400, show_default=True, help="Pings in each state.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(pings: int, as_json: bool) -> None:
    """Measure the ping latency of a busy daemon."""
    result = trio.run(measure, demo_package(), pings)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(package: Package, pings: int) -> dict[str, Any]:
    """Return the figures of the idle and of the busy daemon, in milliseconds."""
    network = Libp2pNetwork(os.urandom(32), listen=["/ip4/127.0.0.1/tcp/0"])
    compute_s: list[float] = []
    async with whole_model(package, 1) as daemon, network.running():
        target = await network.connect(daemon.multiaddrs[0])
        idle = await ping_often(network, target, pings)
        async with trio.open_nursery() as nursery:
            await nursery.start(keep_prefilling, daemon.api_url, compute_s)
            busy = await ping_often(network, target, pings)
            machine = describe_machine()
            nursery.cancel_scope.cancel()
    return {
        **machine,
        "idle": idle,
        "busy": busy,
        "prefill_s": spread_of(compute_s).median,
        "target_ms": TARGET_MS,
        "verdict": verdict(busy["echo_ms"]["p99"], TARGET_MS),
    }


async def ping_often(network: Network, target: PeerId, pings: int) -> dict[str, dict[str, float]]:
    """Ping repeatedly; return the percentiles of the echo, and of echo plus opening the stream."""
    echo_ms, whole_ms = [], []
    for _ in range(pings):
        start_s = trio.current_time()
        echo_ms.append(await network.ping(target) * 1e3)
        whole_ms.append((trio.current_time() - start_s) * 1e3)
        await trio.sleep(INTERVAL_S)
    return {"echo_ms": asdict(spread_of(echo_ms)), "with_stream_ms": asdict(spread_of(whole_ms))}


async def keep_prefilling(api_url: str, compute_s: list[float], *, task_status: trio.TaskStatus[None]) -> None:
    """Submit distinct long prompts one after another and record their times; started once the first is done."""
    prompts = random.Random(0)
    async with httpx.AsyncClient(timeout=300) as client:
        while True:
            prompt = prompts.choices(TOKEN_IDS, k=PROMPT_TOKENS)
            body = {"model": DEMO_MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, "metaswarm": {}}
            answer = (await client.post(f"{api_url}/v1/completions", json=body)).raise_for_status().json()
            compute_s.append(answer["metaswarm"]["route"][0]["compute_s"])
            if len(compute_s) == 1:
                task_status.started()


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores",
        f"a prompt of {PROMPT_TOKENS} tokens takes the engine {result['prefill_s']:.1f} s",
        "",
        "milliseconds                     p50      p99      max",
    ]
    for state in ("idle", "busy"):
        for name, title in (("echo_ms", "ping"), ("with_stream_ms", "ping with its stream")):
            spread = Spread(**result[state][name])
            title = f"{state}, {title}"
            lines.append(f"{title:28} {spread.median:7.1f}  {spread.p99:7.1f}  {spread.greatest:7.1f}")
    target = f"target while busy: p99 of the ping at most {result['target_ms']:.0f} ms"
    return "\n".join([*lines, "", f"{target}: {result['verdict']}"])


if __name__ == "__main__":
    main()
