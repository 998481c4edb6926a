"""How soon a daemon answers a libp2p ping while its engine computes long prompts.

    python -m benchmarks.ping [--pings N] [--json]

A daemon serves the whole demo model and is given prompts of 1,024 tokens, one after another; a peer in another process
pings it all the while, and for comparison while it is idle.
"""

import json
import os
import statistics

import click
import httpx
import trio

from node.config import default_cache_dir
from node.demo import local_swarm
from node.models.catalogue import DEMO_MODEL
from node.network.host import Libp2pNetwork

BLOCKS = 30
PROMPT_TOKENS = 1024
TARGET_MS = 50.0
INTERVAL_S = 0.02


@click.command()
@click.option("--pings", default=400, show_default=True, help="Pings in each state.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(pings: int, as_json: bool) -> None:
    """Measure how responsive a busy daemon is."""
    result = trio.run(measure, pings)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo("milliseconds        p50      p99      max")
    for state in ("idle", "busy"):
        figures = result[state]
        click.echo(f"{state:12} {figures['p50_ms']:10.1f} {figures['p99_ms']:8.1f} {figures['max_ms']:8.1f}")
    click.echo(f"target while busy: p99 at most {TARGET_MS:.0f} ms")


async def measure(pings: int) -> dict[str, dict[str, float]]:
    """Return the figures of the idle and of the busy daemon."""
    async with local_swarm(DEMO_MODEL, BLOCKS, 1, default_cache_dir(), lambda *_: None) as (peer,):
        network = Libp2pNetwork(os.urandom(32), listen=["/ip4/127.0.0.1/tcp/0"])
        async with network.running():
            target = await network.connect(peer.ready.multiaddrs[0])

            async def ping_often() -> dict[str, float]:
                times_ms = []
                for _ in range(pings):
                    times_ms.append(await network.ping(target) * 1e3)
                    await trio.sleep(INTERVAL_S)
                times_ms.sort()
                p99_ms = times_ms[int(0.99 * (len(times_ms) - 1))]
                return {"p50_ms": statistics.median(times_ms), "p99_ms": p99_ms, "max_ms": times_ms[-1]}

            idle = await ping_often()
            async with trio.open_nursery() as nursery:
                await nursery.start(keep_prefilling, peer.ready.api_url)
                busy = await ping_often()
                nursery.cancel_scope.cancel()
    return {"idle": idle, "busy": busy}


async def keep_prefilling(api_url: str, *, task_status: trio.TaskStatus[None]) -> None:
    """Submit one long prompt after another; started once the first is done."""
    body = {"model": DEMO_MODEL, "prompt": [504] * PROMPT_TOKENS, "max_tokens": 1, "temperature": 0}
    async with httpx.AsyncClient(timeout=300) as client:
        started = False
        while True:
            (await client.post(f"{api_url}/v1/completions", json=body)).raise_for_status()
            if not started:
                started = True
                task_status.started()


if __name__ == "__main__":
    main()
