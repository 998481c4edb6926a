"""Time until an observation of one daemon is in the history of all, and until a late daemon has caught up.

    python -m benchmarks.spread [--peers 10] [--jobs 200] [--history 10000] [--json]

Real daemons on loopback, one of which serves the demo model. Jobs of one token are submitted at all of them in turn,
with random pauses; each makes an observation, which is looked for in the SQLite file of every daemon. Then a dataset is
imported beside one running daemon (`metaswarm history import`) and spreads to all, and a new daemon starts with an
empty directory. Finally counts and digests of all files are compared.
"""

import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine, spread_of, verdict
from benchmarks.daemons import Daemon, Tail, digest_of, run_command, running_daemon, until
from node.models.catalogue import DEMO_MODEL
from node.storage.dataset import to_row
from tests.support.observations import signed

QUIETLY = ("--exploration", "0")
"""What the daemons are started with: how they try methods on the one that serves is not what is measured here."""
POLL_S = 0.02
JOBS_AT_A_TIME = 4
OBSERVERS = 40
HISTORY_DAYS = 14
TARGET_P99_S = 10.0
TARGET_LATE_S = 30.0
TIMEOUT_S = 300.0


@click.command()
@click.option("--peers", type=click.IntRange(2), default=10, show_default=True, help="Daemons.")
@click.option("--jobs", type=click.IntRange(10), default=200, show_default=True, help="Observations that are made.")
@click.option("--rate", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Jobs a second, on average.")
@click.option("--history", type=click.IntRange(1), default=10_000, show_default=True, help="Observations of the past.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(peers: int, jobs: int, rate: float, history: int, as_json: bool) -> None:
    """Measure how the history spreads between daemons."""
    demo_package()
    with TemporaryDirectory(prefix="metaswarm-spread-") as folder:
        result = trio.run(partial(measure, Path(folder), peers=peers, jobs=jobs, rate=rate, history=history))
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(folder: Path, *, peers: int, jobs: int, rate: float, history: int) -> dict[str, Any]:
    """Return all times, in seconds."""
    dataset = folder / "history.jsonl"
    write_history(dataset, history)
    async with AsyncExitStack() as stack:
        daemons = await start_swarm(stack, folder, peers)
        delays = await spread_jobs(daemons, jobs, rate)
        machine = describe_machine()
        began_s = trio.current_time()
        await run_command("history", "import", str(dataset), "--data-dir", str(daemons[0].data_dir))
        import_s = trio.current_time() - began_s
        spread_s = await until_all_hold(daemons, jobs + history)
        began_s = trio.current_time()
        flags = ("--bootstrap", daemons[0].ready.multiaddrs[0], *QUIETLY)
        late = await stack.enter_async_context(running_daemon(folder / "late", *flags))
        ready_s = trio.current_time() - began_s
        late_s = ready_s + await until_all_hold([late], jobs + history)
        digests = [await digest_of(daemon.database) for daemon in (*daemons, late)]
    return {
        **machine,
        "peers": peers,
        "observations": jobs,
        "rate_per_s": rate,
        "one_s": asdict(spread_of([delay for each in delays for delay in each])),
        "all_s": asdict(spread_of([max(each) for each in delays])),
        "all_target_s": TARGET_P99_S,
        "history": history,
        "import_s": import_s,
        "history_spread_s": spread_s,
        "late_ready_s": ready_s,
        "late_s": late_s,
        "late_target_s": TARGET_LATE_S,
        "counts": [digest.count for digest in digests],
        "digests_equal": len({digest.digest for digest in digests}) == 1,
        "verdict": {
            "all": verdict(spread_of([max(each) for each in delays]).p99, TARGET_P99_S),
            "late": verdict(late_s, TARGET_LATE_S),
        },
    }


def write_history(path: Path, count: int) -> None:
    """Write a dataset of observations from many observers over the last days, all countersigned by three stages."""
    dice = random.Random(count)
    now_s = int(time.time())
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            observer, *stages = dice.sample(range(OBSERVERS), 4)
            issued_at_s = now_s - dice.randrange(3600, HISTORY_DAYS * 24 * 3600)
            made = signed(number, observer=observer, issued_at_s=issued_at_s, stages=stages)
            lines.write(json.dumps(to_row(made)) + "\n")


async def start_swarm(stack: AsyncExitStack, folder: Path, peers: int) -> list[Daemon]:
    """Start the daemons, of which the first serves the model, and wait until each can submit a job."""
    first = await stack.enter_async_context(running_daemon(folder / "peer-0", "--serve", DEMO_MODEL, *QUIETLY))
    daemons = [first]
    for number in range(1, peers):
        flags = ("--bootstrap", first.ready.multiaddrs[0], *QUIETLY)
        daemons.append(await stack.enter_async_context(running_daemon(folder / f"peer-{number}", *flags)))

    async def all_see_the_model() -> bool:
        answers = [await daemon.get("/swarm/models") for daemon in daemons]
        return all(any(model["complete"] for model in answer["models"]) for answer in answers)

    await until(all_see_the_model, TIMEOUT_S)
    return daemons


async def spread_jobs(daemons: Sequence[Daemon], jobs: int, rate: float) -> list[list[float]]:
    """Submit jobs; return for each observation the seconds until each daemon but the first had it."""
    seen: dict[bytes, dict[int, float]] = {}
    async with watching(daemons) as tails, trio.open_nursery() as nursery:
        nursery.start_soon(submit_jobs, daemons, jobs, rate)
        with trio.move_on_after(jobs / rate + TIMEOUT_S) as limit:
            while len(seen) < jobs or any(len(times) < len(daemons) for times in seen.values()):
                for number, tail in enumerate(tails):
                    for content_id in tail.new():
                        seen.setdefault(content_id, {})[number] = trio.current_time()
                await trio.sleep(POLL_S)
        if limit.cancelled_caught:
            raise click.ClickException(what_is_missing(seen, jobs, len(daemons)))
    return [[at_s - first_s for at_s in rest] for first_s, *rest in (sorted(times.values()) for times in seen.values())]


def what_is_missing(seen: Mapping[bytes, Mapping[int, float]], jobs: int, peers: int) -> str:
    """Return the number of observations and those that some daemon lacks."""
    lines = [f"{jobs} jobs left {len(seen)} observations"]
    for content_id, times in seen.items():
        if absent := sorted(set(range(peers)) - set(times)):
            lines.append(f"{content_id.hex()} of daemon {min(times, key=times.__getitem__)} is not at {absent}")
    return "\n".join(lines)


async def submit_jobs(daemons: Sequence[Daemon], jobs: int, rate: float) -> None:
    """Submit jobs at every daemon in turn; each leaves an observation where it was submitted."""
    dice = random.Random(jobs)
    slots = trio.Semaphore(JOBS_AT_A_TIME)
    async with httpx.AsyncClient(timeout=120) as client, trio.open_nursery() as nursery:
        for number in range(jobs):
            await slots.acquire()
            nursery.start_soon(submit_job, client, daemons[number % len(daemons)], slots)
            await trio.sleep(dice.expovariate(rate))


async def submit_job(client: httpx.AsyncClient, daemon: Daemon, slots: trio.Semaphore) -> None:
    """Submit one short job and wait for its answer."""
    body = {"model": DEMO_MODEL, "prompt": "Once", "max_tokens": 1, "temperature": 0}
    try:
        answer = await client.post(f"{daemon.ready.api_url}/v1/completions", json=body)
        if answer.is_error:
            raise click.ClickException(f"a job was refused with {answer.status_code}: {answer.text}")
    finally:
        slots.release()


@asynccontextmanager
async def watching(daemons: Sequence[Daemon]) -> AsyncIterator[list[Tail]]:
    """Open the histories of daemons inside the block."""
    tails = [Tail(daemon.database) for daemon in daemons]
    try:
        yield tails
    finally:
        for tail in tails:
            tail.close()


async def until_all_hold(daemons: Sequence[Daemon], count: int) -> float:
    """Wait until every daemon holds `count` observations; return the seconds it took."""
    async with watching(daemons) as tails:

        async def all_hold() -> bool:
            return all(tail.count() >= count for tail in tails)

        return await until(all_hold, TIMEOUT_S)


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    one, everybody = result["one_s"], result["all_s"]
    counts = sorted(set(result["counts"]))
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; {result['peers']} daemons",
        "",
        f"{result['observations']} observations, {result['rate_per_s']:g} a second       p50      p99      max",
    ]
    for title, spread in (("a certain file   ", one), ("the files of all ", everybody)):
        figures = f"{spread['median']:6.2f} s {spread['p99']:6.2f} s {spread['greatest']:6.2f} s"
        lines.append(f"until it is in {title}   {figures}")
    lines += [
        f"target: p99 until all have it at most {result['all_target_s']:.0f} s: {result['verdict']['all']}",
        "",
        f"{result['history']} observations imported beside one daemon in {result['import_s']:.1f} s",
        f"all daemons had them                        {result['history_spread_s']:6.1f} s later",
        f"a late daemon was ready after               {result['late_ready_s']:6.1f} s",
        f"and had all, from its start, after          {result['late_s']:6.1f} s",
        f"target: at most {result['late_target_s']:.0f} s: {result['verdict']['late']}",
        f"counts {counts}, digests {'equal' if result['digests_equal'] else 'DIFFERENT'}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
