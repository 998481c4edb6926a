"""Job loss and recovery time while daemons are killed and restarted continually.

    python -m benchmarks.churn [--duration 300] [--every 10] [--json]

Six daemons, two for each third of the demo model, and a coordinator that serves no blocks. The daemons are killed in
turn and restarted at once on their data, while three jobs run concurrently. Each job must end with the right text.
"""

import json
import os
import signal
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
import trio

from benchmarks.common import Spread, demo_package, describe_machine, spread_of, verdict
from benchmarks.daemons import Daemon, running_daemon, until
from node.models.catalogue import DEMO_MODEL

SPANS = ("0-10", "10-20", "20-30") * 2
PROMPTS = ("Once upon a time there was", "The capital of France is", "def fibonacci(n):")
TOKENS = 32
BACK_TARGET_S = 15.0


@dataclass
class Tally:
    """Counts and times of one run."""

    kills: int = 0
    done: int = 0
    replays: int = 0
    different_texts: int = 0
    failures: list[str] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    job_s: list[float] = field(default_factory=list)


@click.command()
@click.option("--duration", type=click.FloatRange(1), default=300.0, show_default=True, help="Seconds of kills.")
@click.option("--every", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Seconds between kills.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(duration: float, every: float, as_json: bool) -> None:
    """Measure job loss and recovery time under kills."""
    demo_package()
    result = trio.run(measure, duration, every)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(duration_s: float, every_s: float) -> dict[str, Any]:
    """Return counts and times of kills and jobs; times in seconds."""
    tally = Tally()
    with TemporaryDirectory(prefix="metaswarm-churn-") as folder:
        async with running_daemon(Path(folder) / "coordinator") as coordinator, trio.open_nursery() as nursery:
            peers = [_Peer(Path(folder) / str(number), span, coordinator) for number, span in enumerate(SPANS)]
            async with trio.open_nursery() as starting:
                for peer in peers:
                    starting.start_soon(nursery.start, peer.run)
            await until(partial(_all_serve, coordinator, peers), timeout_s=60)
            machine = describe_machine()
            expected = [(await _complete(coordinator, prompt))["token_ids"] for prompt in PROMPTS]
            async with trio.open_nursery() as jobs:
                ends_s = trio.current_time() + duration_s
                for prompt, tokens in zip(PROMPTS, expected, strict=True):
                    jobs.start_soon(_submit, coordinator, prompt, tokens, ends_s, tally)
                await _kill(peers, ends_s, every_s, tally)
            nursery.cancel_scope.cancel()
    return {
        **machine,
        "kills": tally.kills,
        "jobs": tally.done,
        "replays": tally.replays,
        "failures": tally.failures,
        "different_texts": tally.different_texts,
        "back_s": asdict(spread_of(tally.back_s or [0.0])),
        "job_s": asdict(spread_of(tally.job_s or [0.0])),
    }


class _Peer:
    """A daemon that is started again whenever it ends."""

    def __init__(self, folder: Path, span: str, coordinator: Daemon) -> None:
        self.daemon: Daemon | None = None
        """While it is there, and has not been killed."""
        self._folder = folder
        self._coordinator = coordinator
        self._flags = (
            "--serve",
            f"{DEMO_MODEL}:{span}",
            "--threads",
            "1",
            "--bootstrap",
            coordinator.ready.multiaddrs[0],
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        while True:
            async with running_daemon(self._folder, *self._flags) as daemon:
                self.daemon = daemon
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                await daemon.process.wait()

    async def is_known(self) -> bool:
        """Whether it serves and the coordinator sees it."""
        return self.daemon is not None and self.daemon.ready.peer_id in await _serving(self._coordinator)

    async def kill(self, tally: Tally) -> None:
        """Kill it, and wait until it is back."""
        if self.daemon is None:
            return
        daemon, self.daemon = self.daemon, None
        os.killpg(daemon.process.pid, signal.SIGKILL)
        tally.kills += 1
        tally.back_s.append(await until(self.is_known, timeout_s=120))


async def _serving(coordinator: Daemon) -> set[str]:
    return {peer["peer_id"] for peer in (await coordinator.get("/swarm/peers"))["peers"] if peer["spans"]}


async def _all_serve(coordinator: Daemon, peers: list[_Peer]) -> bool:
    return len(await _serving(coordinator)) == len(peers)


async def _kill(peers: list[_Peer], ends_s: float, every_s: float, tally: Tally) -> None:
    async with trio.open_nursery() as nursery:
        number = 0
        while trio.current_time() + every_s < ends_s:
            await trio.sleep(every_s)
            nursery.start_soon(peers[number % len(peers)].kill, tally)
            number += 1


async def _complete(coordinator: Daemon, prompt: str) -> dict[str, Any]:
    """Return the API's response to a greedy job. Raises HTTPError."""
    body = {"model": DEMO_MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    async with httpx.AsyncClient(base_url=coordinator.ready.api_url, timeout=120) as client:
        answer = await client.post("/v1/completions", json={**body, "metaswarm": {"ignore_eos": True}})
    if answer.is_error:
        raise httpx.HTTPError(answer.text)
    told: dict[str, Any] = answer.json()["metaswarm"]
    return told


async def _submit(coordinator: Daemon, prompt: str, expected: list[int], ends_s: float, tally: Tally) -> None:
    while trio.current_time() < ends_s:
        began_s = trio.current_time()
        try:
            told = await _complete(coordinator, prompt)
        except httpx.HTTPError as error:
            tally.failures.append(str(error))
            await trio.sleep(1)
            continue
        tally.done += 1
        tally.replays += told["replays"]
        tally.different_texts += told["token_ids"] != expected
        tally.job_s.append(trio.current_time() - began_s)


def report(result: dict[str, Any]) -> str:
    """Return the figures as lines."""
    back, job = Spread(**result["back_s"]), Spread(**result["job_s"])
    is_met = verdict(back.median, BACK_TARGET_S)
    return "\n".join(
        [
            f"load average {result['load_average']:.1f} on {result['cores']} cores",
            f"{result['kills']} kills, {result['jobs']} jobs done, {result['replays']} stages replaced under way",
            f"jobs lost: {len(result['failures'])}; texts that differ: {result['different_texts']}",
            f"s to the end of a job:   median {job.median:.1f}, worst {job.greatest:.1f}",
            f"s until it serves again: median {back.median:.1f}, worst {back.greatest:.1f}   {is_met}",
            *(f"lost: {failure}" for failure in result["failures"]),
        ]
    )


if __name__ == "__main__":
    main()
