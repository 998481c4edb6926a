"""Throughput, time to first token and failover pause over links with the latency of a WAN.

    python -m benchmarks.wan [--delay-ms 1 --delay-ms 20 --delay-ms 80] [--tokens 48] [--rounds 3] [--json]

On loopback: a coordinator that serves no blocks, a daemon for each third of the demo model and a spare for the middle
one; each pair is connected through a relay of `benchmarks.link`. A token makes one round trip through the three stages.
Then the middle stage is killed in the middle of a job; the pause runs from the kill to the next token.
"""

import json
import os
import signal
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine
from benchmarks.daemons import Daemon, running_daemon, until
from benchmarks.link import LinkShape, shaped_link
from node.models.catalogue import DEMO_MODEL

SPANS: Final = ("0-10", "10-20", "20-30", "10-20")
PROMPT: Final = "Once upon a time there was a small village at the foot of a mountain, and in it"
LOST_AFTER: Final = 12
"""Tokens that have come when the middle stage is killed."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Results for one delay. `delay_ms`: one way."""

    delay_ms: float
    tokens_per_s: float
    first_token_s: float
    pause_s: float
    same_text: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A job as seen by its client. `came_s`: arrival of each token, counted from the request."""

    text: str
    came_s: list[float]
    lost_s: float = 0.0
    """When the stage was killed."""

    @property
    def pause_s(self) -> float:
        """The longest wait for a token after the loss, counted from the loss."""
        return max(later - max(earlier, self.lost_s) for earlier, later in pairwise(self.came_s) if later > self.lost_s)


@click.command()
@click.option("--delay-ms", "delays_ms", type=click.FloatRange(0), multiple=True, default=(1.0, 20.0, 80.0))
@click.option("--jitter-ms", type=click.FloatRange(0), default=0.0, help="Random extra delay, up to this.")
@click.option("--bytes-per-s", type=click.FloatRange(0), default=0.0, help="Bandwidth of each link; 0: unlimited.")
@click.option("--tokens", type=click.IntRange(2 * LOST_AFTER), default=48, show_default=True, help="Of each job.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Jobs without a loss.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    delays_ms: Sequence[float], jitter_ms: float, bytes_per_s: float, tokens: int, rounds: int, as_json: bool
) -> None:
    """Measure jobs over links of several lengths."""
    demo_package()
    shapes = [LinkShape(delay_ms / 1000, jitter_ms / 1000, bytes_per_s) for delay_ms in delays_ms]
    result = trio.run(measure, shapes, tokens, rounds)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(shapes: Sequence[LinkShape], tokens: int, rounds: int) -> dict[str, Any]:
    """Return the results for each link."""
    machine = describe_machine()
    return {**machine, "distances": [asdict(await _measure(shape, tokens, rounds)) for shape in shapes]}


async def _measure(shape: LinkShape, tokens: int, rounds: int) -> Distance:
    flags = [(), *(("--serve", f"{DEMO_MODEL}:{span}", "--threads", "1") for span in SPANS)]
    async with distant_daemons(flags, shape) as (coordinator, *peers):
        await run_job(coordinator, tokens)  # warm-up
        undisturbed = [await run_job(coordinator, tokens) for _ in range(rounds)]
        disturbed = await run_job(coordinator, tokens, lose=(peers[1], peers[3]))
    speeds = [(tokens - 1) / (job.came_s[-1] - job.came_s[0]) for job in undisturbed]
    return Distance(
        delay_ms=1e3 * shape.delay_s,
        tokens_per_s=statistics.median(speeds),
        first_token_s=statistics.median(job.came_s[0] for job in undisturbed),
        pause_s=disturbed.pause_s,
        same_text=disturbed.text == undisturbed[0].text,
    )


async def run_job(coordinator: Daemon, tokens: int, lose: Sequence[Daemon] = ()) -> Job:
    """Run a greedy job; the daemon of `lose` that serves it is killed after some tokens."""
    body = {"model": DEMO_MODEL, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["metaswarm"] = {"ignore_eos": True}
    began_s, lost_s = trio.current_time(), 0.0
    text, came_s = "", list[float]()
    async with (
        httpx.AsyncClient(base_url=coordinator.ready.api_url, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: ")).get("choices")
            if not choices:
                continue
            text += "".join(choice["text"] for choice in choices)
            came_s.append(trio.current_time() - began_s)
            if lose and not lost_s and len(came_s) == LOST_AFTER:
                victim = await _serving(lose)
                lost_s = trio.current_time() - began_s
                os.killpg(victim.process.pid, signal.SIGKILL)
    if not came_s:
        raise click.ClickException(f"the job failed: {answer.status_code}")
    return Job(text, came_s, lost_s)


async def _serving(daemons: Sequence[Daemon]) -> Daemon:
    for daemon in daemons:
        if any(span["sessions"] for span in (await daemon.get("/swarm/status"))["spans"]):
            return daemon
    raise click.ClickException("nobody serves the stage that is to be lost")


@asynccontextmanager
async def distant_daemons(flags: Sequence[Sequence[str]], shape: LinkShape) -> AsyncIterator[list[Daemon]]:
    """Run a daemon for each set of flags inside the block, begun once all know each other and the model is complete.

    Each dials those before it through a relay.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="metaswarm-wan-")))
        daemons: list[Daemon] = []
        relayed: list[str] = []
        for number, own in enumerate(flags):
            bootstrap = [part for address in relayed for part in ("--bootstrap", address)]
            daemon = await stack.enter_async_context(running_daemon(folder / str(number), *own, *bootstrap))
            daemons.append(daemon)
            port = int(daemon.ready.multiaddrs[0].split("/")[4])
            relay = await stack.enter_async_context(shaped_link("127.0.0.1", port, shape))
            relayed.append(f"/ip4/127.0.0.1/tcp/{relay}/p2p/{daemon.ready.peer_id}")

        async def is_settled() -> bool:
            models = (await daemons[0].get("/swarm/models"))["models"]
            known = [(await daemon.get("/swarm/peers"))["peers"] for daemon in daemons]
            rtts_s = [peer["rtt_s"] for peers in known for peer in peers if peer["connected"]]
            everybody = len(rtts_s) == len(daemons) * (len(daemons) - 1)
            # A pair that found a shorter way than the relay would spoil the figures.
            slow = everybody and all(rtt_s is not None and rtt_s >= 2 * shape.delay_s for rtt_s in rtts_s)
            return slow and any(model["complete"] for model in models)

        await until(is_settled, 60)
        yield daemons


def report(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; three stages and a coordinator",
        "",
        "one way    tokens/s   first token   pause after a kill   text",
    ]
    for distance in (Distance(**each) for each in result["distances"]):
        text = "the same" if distance.same_text else "ANOTHER"
        lines.append(
            f"{distance.delay_ms:5.0f} ms {distance.tokens_per_s:10.1f} {distance.first_token_s:11.2f} s"
            f" {distance.pause_s:18.2f} s   {text}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
