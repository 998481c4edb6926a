"""Budget and objective where one peer is fast and dear, another slow and cheap: who serves, and what was predicted.

Two daemons hold the whole demo model, one with a price of 10 and all cores, one with a price of 1 and one thread; a
third submits jobs for each objective in turn, and within a budget that the dear one exceeds. The first jobs, by which
the predictions are calibrated, are not counted.

`python -m benchmarks.budget [--jobs 40] [--json]`
"""

import json
import math
import os
import statistics
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine, verdict
from benchmarks.daemons import running_daemon, until
from benchmarks.learning import body_of, in_exact
from node.models.catalogue import DEMO_MODEL

DEAR, CHEAP = 10.0, 1.0
WISHES: Final[dict[str, dict[str, Any]]] = {
    "latency": {"objective": "latency"},
    "cost": {"objective": "cost"},
    "budget": {"objective": "latency", "budget": math.nan},
}
CALIBRATING = 6
TARGET = 0.25


async def measure(jobs: int) -> dict[str, Any]:
    """Return what was asked, who served, and the predicted and the actual cost of each job."""
    demo_package()
    with TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:

            async def start(name: str, *flags: str) -> Any:
                return await stack.enter_async_context(running_daemon(Path(folder) / name, *flags))

            whole = ("--serve", DEMO_MODEL)
            fast = await start("fast", *whole, "--price", str(DEAR), "--threads", str(os.cpu_count() or 1))
            known = ("--bootstrap", fast.ready.multiaddrs[0])
            await start("slow", *whole, "--price", str(CHEAP), "--threads", "1", *known)
            client = await start("client", *known)

            async def sees_both() -> bool:
                """Whether both serve, and what they signed about their prices has arrived."""
                models = (await client.get("/swarm/models"))["models"]
                peers = (await client.get("/swarm/peers"))["peers"]
                covered = any(min(model["coverage"], default=0) == 2 for model in models)
                return covered and sum(each["hardware"] is not None for each in peers) == 2

            await until(sees_both, 120)
            async with httpx.AsyncClient(base_url=client.ready.api_url, timeout=600) as http:
                served = [await _serve(http, number, fast.ready.peer_id) for number in range(jobs)]
    return {**describe_machine(), "jobs": served[CALIBRATING:]}


async def _serve(http: httpx.AsyncClient, number: int, dear: str) -> dict[str, Any]:
    """Serve one job; the budget is half of what the dear peer takes for it."""
    wish = list(WISHES)[number % len(WISHES)]
    asked = WISHES[wish]
    body = in_exact(body_of("short question", number))
    if "budget" in asked:
        plain = (await http.post("/v1/completions", json=body)).raise_for_status().json()["metaswarm"]
        price = DEAR if plain["route"][0]["peer"] == dear else CHEAP
        asked = {**asked, "budget": DEAR / price * plain["cost"]["actual"] / 2}
    body["metaswarm"] |= asked
    done = (await http.post("/v1/completions", json=body)).raise_for_status().json()["metaswarm"]
    by = "dear" if done["route"][0]["peer"] == dear else "cheap"
    return {"wish": wish, "served_by": by, "total_s": done["timing"]["total_s"], **done["cost"]}


def error_of(jobs: list[dict[str, Any]]) -> float:
    """Return the median deviation of the predicted from the actual cost."""
    return float(statistics.median(abs(job["predicted"] / job["actual"] - 1) for job in jobs))


@click.command()
@click.option("--jobs", type=click.IntRange(1), default=40, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(jobs: int, as_json: bool) -> None:
    """Measure who serves where one peer is fast and dear, another slow and cheap."""
    found = trio.run(measure, jobs)
    if as_json:
        print(json.dumps(found))
        return
    print(f"load average {found['load_average']:.1f} on {found['cores']:.0f} cores")
    print("wish      jobs  by the cheap peer  seconds  cost")
    for wish in WISHES:
        done = [job for job in found["jobs"] if job["wish"] == wish]
        cheap = sum(job["served_by"] == "cheap" for job in done) / len(done)
        took_s, cost = (statistics.median(job[key] for job in done) for key in ("total_s", "actual"))
        print(f"{wish:<8}  {len(done):4}  {cheap:17.0%}  {took_s:7.2f}  {cost:.2f}")
    over = sum(job["actual"] > job["budget"] for job in found["jobs"] if job["budget"] is not None)
    error = error_of(found["jobs"])
    print(f"{over} jobs cost more than their budget")
    print(f"predicted against actual cost: {error:.0%} at the median  {verdict(error, TARGET)}")


if __name__ == "__main__":
    main()
