"""CPU utilisation of the stages of a route with several sessions in flight, with and without batching.

    python -m benchmarks.pipeline [--tokens 64] [--method NAME] [--json]

Three daemons with one thread and a third of the demo model's work each, and a coordinator that serves no blocks; eight
concurrent jobs, all by one method, which every stage has built before. First each stage runs one session at a time,
then it batches. A stage's share is its engine's compute time. The target is on the CPU time of all daemons and workers
relative to that of all cores, excluding time stolen by the host of a virtual machine.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
import psutil
import trio

from benchmarks.common import demo_package, describe_machine
from benchmarks.daemons import Daemon, running_daemon, until
from node.models.catalogue import DEMO_MODEL

SPANS = ("0-12", "12-24", "24-30")
"""The head is worth eight blocks: 28 million parameters, of which a block has 3.5."""

SESSIONS = 8
BUSY_TARGET = 0.85


@dataclass(frozen=True)
class Use:
    """CPU time used. Shares are of the jobs' duration times all cores.

    `busy`: neither idle nor stolen, as a share of the time not stolen; `ours`: daemons and workers, as a share of it.
    """

    batching: str
    tokens_per_s: float
    busy: float
    ours: float
    stolen: float
    stages: list[float]


@click.command()
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of each job.")
@click.option("--method", default="engine=llamacpp", show_default=True, help="Method of all jobs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(tokens: int, method: str, as_json: bool) -> None:
    """Measure the CPU utilisation of stages and cores."""
    demo_package()
    result = trio.run(measure, tokens, method)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(tokens: int, method: str) -> dict[str, Any]:
    """Return the CPU time used, without and with batching."""
    machine = describe_machine()
    return {**machine, "uses": [asdict(await measure_batching(how, tokens, method)) for how in ("one", "continuous")]}


async def measure_batching(batching: str, tokens: int, method: str) -> Use:
    """Start a swarm with one batching mode, run the jobs twice, and return the CPU time of the second run."""
    with TemporaryDirectory(prefix="metaswarm-pipeline-") as folder:
        async with running_daemon(Path(folder) / "coordinator") as coordinator, trio.open_nursery() as nursery:
            stages: list[Daemon] = []

            async def serve(span: str, *, task_status: trio.TaskStatus[None]) -> None:
                flags = ("--serve", f"{DEMO_MODEL}:{span}", "--threads", "1", "--batching", batching)
                first = coordinator.ready.multiaddrs[0]
                async with running_daemon(Path(folder) / span, *flags, "--bootstrap", first) as daemon:
                    stages.append(daemon)
                    task_status.started()
                    await trio.sleep_forever()

            for span in SPANS:
                await nursery.start(serve, span)

            async def is_complete() -> bool:
                return any(model["complete"] for model in (await coordinator.get("/swarm/models"))["models"])

            await until(is_complete, timeout_s=60)
            await until(partial(_is_ready, coordinator, method), timeout_s=180)
            await _run_jobs(coordinator, 4, method)
            before_s, ours_s, began_s = await _computed_s(stages), _cpu_s([coordinator, *stages]), trio.current_time()
            times = psutil.cpu_times()
            await _run_jobs(coordinator, tokens, method)
            wall_s, ours_s = trio.current_time() - began_s, _cpu_s([coordinator, *stages]) - ours_s
            idle_s, stolen_s = _unused_s(times, psutil.cpu_times())
            after_s = await _computed_s(stages)
            nursery.cancel_scope.cancel()
    all_s = wall_s * (os.cpu_count() or 1)
    there_s = all_s - stolen_s
    return Use(
        batching=batching,
        tokens_per_s=SESSIONS * tokens / wall_s,
        busy=1 - idle_s / there_s,
        ours=ours_s / there_s,
        stolen=stolen_s / all_s,
        stages=[(after - before) / wall_s for before, after in zip(before_s, after_s, strict=True)],
    )


async def _is_ready(coordinator: Daemon, method: str) -> bool:
    """Whether all stages have the method; a missing variant is built once a stage is idle."""
    answer = await _run_job(coordinator, 1, method, 0)
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        await trio.sleep(1)
        return False
    answer.raise_for_status()
    return True


async def _run_jobs(coordinator: Daemon, tokens: int, method: str) -> None:
    async def run_job(number: int) -> None:
        (await _run_job(coordinator, tokens, method, number)).raise_for_status()

    async with trio.open_nursery() as nursery:
        for number in range(SESSIONS):
            nursery.start_soon(run_job, number)


async def _run_job(coordinator: Daemon, tokens: int, method: str, number: int) -> httpx.Response:
    body = {"model": DEMO_MODEL, "prompt": f"Chapter {number} begins with", "max_tokens": tokens, "temperature": 0}
    options = {"ignore_eos": True, "method": method}
    async with httpx.AsyncClient(base_url=coordinator.ready.api_url, timeout=600) as client:
        return await client.post("/v1/completions", json={**body, "metaswarm": options})


async def _computed_s(stages: list[Daemon]) -> list[float]:
    """Return the compute time of each stage's engine."""
    return [(await stage.get("/swarm/status"))["spans"][0]["compute_s"] for stage in stages]


def _cpu_s(daemons: list[Daemon]) -> float:
    """Return the processor time of daemons and their workers."""
    found = [psutil.Process(daemon.process.pid) for daemon in daemons]
    times = [p.cpu_times() for process in found for p in (process, *process.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def _unused_s(before: Any, after: Any) -> tuple[float, float]:
    """Return idle and stolen CPU time between two samples (Any: psutil's own)."""
    idle_s = sum(getattr(after, name, 0.0) - getattr(before, name, 0.0) for name in ("idle", "iowait"))
    return idle_s, getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)


def report(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; {SESSIONS} sessions",
        "",
        "batching     tokens/s   cores busy   by ours   stolen   engines of the stages busy",
    ]
    for use in result["uses"]:
        stages = "  ".join(f"{share:4.0%}" for share in use["stages"])
        shares = f"{use['busy']:12.0%} {use['ours']:9.0%} {use['stolen']:8.0%}"
        lines.append(f"{use['batching']:<10} {use['tokens_per_s']:10.1f} {shares}   {stages}")
    is_met = result["uses"][0]["ours"] >= BUSY_TARGET
    lines.append(f"target without batching: cores {BUSY_TARGET:.0%} busy, {'met' if is_met else 'MISSED'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
