"""How many sessions share a step, and tokens a second, where jobs begin one after another or all at once.

    python -m benchmarks.batching [--tokens 100] [--apart-s 0.13] [--json]

First one daemon with the whole demo model, then three with one thread and a third each. A step for two sessions reads
the weights once. On one peer all sessions should share each step; three stages are busy at the same time where the
sessions go around in several groups. Each figure is the median of three runs.
"""

import json
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine
from benchmarks.daemons import Daemon, running_daemon, until
from node.models.catalogue import DEMO_MODEL

SESSIONS = (2, 4, 8)
ROUNDS = 3
THIRDS = ("0-10", "10-20", "20-30")


@click.command()
@click.option("--tokens", type=click.IntRange(2), default=100, show_default=True, help="New tokens of a job.")
@click.option("--apart-s", type=float, default=0.13, show_default=True, help="Between the beginnings of two jobs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(tokens: int, apart_s: float, as_json: bool) -> None:
    """Measure how sessions share steps."""
    demo_package()
    result = trio.run(measure, tokens, apart_s)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(tokens: int, apart_s: float) -> dict[str, Any]:
    """Return the figures of one peer and of three."""
    machine, rows = describe_machine(), []
    for spans, flags in ((("0-30",), ()), (THIRDS, ("--threads", "1"))):
        with TemporaryDirectory(prefix="metaswarm-batching-") as folder:
            serving = running_daemon(Path(folder) / "first", *_serve(spans[0]), *flags)
            async with serving as first, trio.open_nursery() as nursery:
                for span in spans[1:]:
                    joins = ("--bootstrap", first.ready.multiaddrs[0])
                    await nursery.start(_run, Path(folder) / span, (*_serve(span), *flags, *joins))
                await until(partial(_is_complete, first), timeout_s=60)
                await _job(first, 4, 0)
                for sessions in SESSIONS:
                    for pause_s in (apart_s, 0.0):
                        runs = [await _run_jobs(first, sessions, tokens, pause_s) for _ in range(ROUNDS)]
                        figures = {key: median(run[key] for run in runs) for key in runs[0]}
                        rows.append({"peers": len(spans), "sessions": sessions, "apart_s": pause_s, **figures})
                nursery.cancel_scope.cancel()
    return {**machine, "rows": rows}


def _serve(span: str) -> tuple[str, ...]:
    return ("--serve", f"{DEMO_MODEL}:{span}", "--exploration", "0")


async def _run(folder: Path, flags: tuple[str, ...], *, task_status: trio.TaskStatus[None]) -> None:
    async with running_daemon(folder, *flags):
        task_status.started()
        await trio.sleep_forever()


async def _is_complete(daemon: Daemon) -> bool:
    return any(model["complete"] for model in (await daemon.get("/swarm/models"))["models"])


async def _run_jobs(daemon: Daemon, sessions: int, tokens: int, apart_s: float) -> dict[str, float]:
    """Run jobs at the same time; return tokens a second, and tokens that the first stage had in a step."""
    steps, began_s = await _steps(daemon), trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(sessions):
            nursery.start_soon(_job, daemon, tokens, number)
            await trio.sleep(apart_s)
    drawn = sessions * tokens
    return {"tokens_per_s": drawn / (trio.current_time() - began_s), "per_step": drawn / (await _steps(daemon) - steps)}


async def _steps(daemon: Daemon) -> int:
    return int((await daemon.get("/swarm/status"))["spans"][0]["steps"])


async def _job(daemon: Daemon, tokens: int, number: int) -> None:
    body = {"model": DEMO_MODEL, "prompt": f"Chapter {number} begins with", "max_tokens": tokens, "temperature": 0}
    extras = {"ignore_eos": True, "method": "engine=llamacpp"}
    async with httpx.AsyncClient(base_url=daemon.ready.api_url, timeout=600) as client:
        (await client.post("/v1/completions", json={**body, "metaswarm": extras})).raise_for_status()


def report(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [f"load average {result['load_average']:.1f} on {result['cores']} cores", ""]
    lines.append("peers  sessions  begin            tokens/s  sessions in a step of the first stage")
    for row in result["rows"]:
        begin = f"{row['apart_s']:g} s apart" if row["apart_s"] else "at once"
        lines.append(
            f"{row['peers']:5}  {row['sessions']:8}  {begin:<14} {row['tokens_per_s']:10.1f}  {row['per_step']:.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
