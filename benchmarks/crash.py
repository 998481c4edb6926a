"""Durability and restart time of a daemon that is killed with SIGKILL while it writes.

    python -m benchmarks.crash [--kills 20] [--history 10000] [--json]

Real daemons on loopback. One serves the demo model; short jobs are submitted concurrently at another, which is killed
at a random moment and restarted. A job that was answered has an acknowledged observation; these are counted in the
SQLite file after each kill, before the restart. Opening that file, with an older history in it, is timed as well.
"""

import json
import random
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine, spread_of, verdict
from benchmarks.daemons import Daemon, run_command, running_daemon, until
from benchmarks.spread import write_history
from node.models.catalogue import DEMO_MODEL
from node.storage.database import DATABASE_FILE, open_database

SUBMITTERS = 4
JOBS_BEFORE_KILL = (3, 30)
"""A kill comes after so many answers, and a moment."""
MOMENT_S = 0.1
TARGET_REOPEN_S = 0.5
TIMEOUT_S = 300.0


@click.command()
@click.option("--kills", type=click.IntRange(1), default=20, show_default=True)
@click.option("--history", type=click.IntRange(0), default=10_000, show_default=True, help="Observations of the past.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(kills: int, history: int, as_json: bool) -> None:
    """Kill a daemon while it writes, again and again."""
    demo_package()
    with TemporaryDirectory(prefix="metaswarm-crash-") as folder:
        result = trio.run(partial(measure, Path(folder), kills=kills, history=history))
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(folder: Path, *, kills: int, history: int) -> dict[str, Any]:
    """Return the observations acknowledged and lost, and the times of opening and starting in seconds."""
    victim = folder / "victim"
    victim.mkdir(mode=0o700)
    if history:
        write_history(folder / "history.jsonl", history)
        await run_command("history", "import", str(folder / "history.jsonl"), "--data-dir", str(victim))
    dice = random.Random(kills)
    acknowledged = lost = 0
    opened_s: list[float] = []
    started_s: list[float] = []
    async with running_daemon(folder / "server", "--serve", DEMO_MODEL) as server:
        for _ in range(kills):
            began_s = trio.current_time()
            async with running_daemon(victim, "--bootstrap", server.ready.multiaddrs[0]) as daemon:
                started_s.append(trio.current_time() - began_s)
                await until(partial(sees_the_model, daemon), TIMEOUT_S)
                acknowledged += await answers_before_kill(daemon, dice)
            opened_s.append(await time_to_open(victim / DATABASE_FILE))
            lost = max(lost, acknowledged - count_own(victim / DATABASE_FILE, daemon.ready.peer_id))
    return {
        **describe_machine(),
        "kills": kills,
        "history": history,
        "acknowledged": acknowledged,
        "lost": lost,
        "opened_s": asdict(spread_of(opened_s)),
        "started_s": asdict(spread_of(started_s)),
        "target_s": TARGET_REOPEN_S,
        "verdict": verdict(max(opened_s), TARGET_REOPEN_S),
    }


async def sees_the_model(daemon: Daemon) -> bool:
    return any(model["complete"] for model in (await daemon.get("/swarm/models"))["models"])


async def answers_before_kill(daemon: Daemon, dice: random.Random) -> int:
    """Submit jobs until some are answered, then kill the daemon at once; return how many were answered by then."""
    wanted = dice.randint(*JOBS_BEFORE_KILL)
    answered = 0
    enough = trio.Event()

    async def submit(client: httpx.AsyncClient) -> None:
        nonlocal answered
        body = {"model": DEMO_MODEL, "prompt": "Once", "max_tokens": 1, "temperature": 0}
        try:
            while True:
                (await client.post("/v1/completions", json=body)).raise_for_status()
                answered += 1
                if answered >= wanted:
                    enough.set()
        except httpx.TransportError:
            return  # the daemon is dead

    async with httpx.AsyncClient(base_url=daemon.ready.api_url, timeout=120) as client, trio.open_nursery() as nursery:
        for _ in range(SUBMITTERS):
            nursery.start_soon(submit, client)
        with trio.fail_after(TIMEOUT_S):
            await enough.wait()
        await trio.sleep(dice.uniform(0, MOMENT_S))
        await daemon.kill()
    return answered


def count_own(database: Path, observer: str) -> int:
    """Return the number of its own observations in a daemon's file."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        (count,) = connection.execute("SELECT count(*) FROM observations WHERE observer = ?", (observer,)).fetchone()
    return int(count)


async def time_to_open(database: Path) -> float:
    """Return the time to open, as the daemon does, what the killed one left behind."""
    began_s = time.perf_counter()
    async with open_database(database) as opened:
        took_s = time.perf_counter() - began_s
        assert opened.set_aside is None, "a sound file was taken for damaged"
    return took_s


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    opened, started = result["opened_s"], result["started_s"]
    return "\n".join(
        [
            f"load average {result['load_average']:.1f} on {result['cores']} cores",
            f"{result['kills']} kills, {result['acknowledged']} jobs acknowledged, {result['lost']} observations lost",
            f"with {result['history']} more: open in {opened['median']:.3f} s, at most {opened['greatest']:.3f} s",
            f"target: at most {result['target_s']} s: {result['verdict']}",
            f"daemon ready again after {started['median']:.1f} s, at most {started['greatest']:.1f} s",
        ]
    )


if __name__ == "__main__":
    main()
