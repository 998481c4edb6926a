"""What one real daemon has seen, all of them know."""

import sqlite3
from pathlib import Path

import httpx
import numpy as np
import trio

from node.evaluation.history_dataset import read_history
from node.selection.samples import read_samples
from node.util.child_process import run
from node.util.interpreter import python
from selector.dataset import Pairs
from selector.features import PHYSICS, physics
from selector.task import PORTFOLIO
from selector.task_buckets import canonicalise
from selector.task_features import tabulate
from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, until


def observations(daemon: Daemon) -> set[bytes]:
    """Return the ids in a daemon's database."""
    path: Path = daemon.data_dir / "metaswarm.sqlite3"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return {row[0] for row in connection.execute("SELECT id FROM observations")}


async def test_observation_reaches_every_peer_and_late_joiner(start_daemon: StartDaemon) -> None:
    first = await start_daemon("--serve", MODEL)
    second = await start_daemon("--bootstrap", first.multiaddr)

    async def is_served() -> bool:
        return any(model["complete"] for model in (await second.get("/swarm/models"))["models"])

    await until(is_served)
    for _ in range(3):
        await second.complete(prompt="Once", max_tokens=2, metaswarm={"ignore_eos": True})
    assert len(observations(second)) == 3
    third = await start_daemon("--bootstrap", second.multiaddr)

    async def all_know() -> bool:
        return observations(first) == observations(third) == observations(second)

    await until(all_know, timeout_s=30)


async def test_features_of_real_daemons_are_known_and_exported(start_daemon: StartDaemon) -> None:
    first = await start_daemon("--serve", f"{MODEL}:0-15")
    second = await start_daemon("--serve", f"{MODEL}:15-30", "--bootstrap", first.multiaddr)
    database, exported = second.data_dir / "metaswarm.sqlite3", second.data_dir / "history.jsonl"

    async def is_known() -> bool:
        """Whether both machines are measured, so that a job's observation has all facts."""
        if not await is_complete(second):
            return False
        await second.complete(prompt="Once", max_tokens=2, metaswarm={"ignore_eos": True})
        samples = await trio.to_thread.run_sync(lambda: list(read_samples(database)))
        facts = max(samples, key=lambda sample: len(sample.context.stage_facts)).context.stage_facts
        return len(facts) == 2 and all(each.memory_read_bytes_per_s for each in facts)

    await until(is_known, timeout_s=120)
    bench = {"model": MODEL, "methods": ["prefix_cache=on"], "rounds": 1}
    async with httpx.AsyncClient(base_url=second.api_url, timeout=300) as client:
        workload = {"prompt_tokens": 16, "max_tokens": 2}
        (await client.post("/swarm/bench", json={**bench, "workload": workload})).raise_for_status()
    command = python("-m", "node", "history", "export", "--data-dir", str(second.data_dir), "--output", str(exported))
    await run(command, what="the export", time_limit_s=60)
    learned = [each.context for each in read_samples(database) if each.log_ratio is not None]
    dataset = read_history(exported)
    known = {row.tobytes() for row in tabulate([canonicalise(each) for each in learned]).features}
    assert {row.tobytes() for row in dataset.pairs.contexts.features} <= known
    count, contexts = len(PORTFOLIO), dataset.pairs.contexts
    pairs = Pairs(contexts, tuple(PORTFOLIO), np.zeros(count, dtype=np.intp), np.arange(count))
    of_links = PHYSICS.index("communication")  # so little was sent that no rate is known
    assert np.isfinite(np.delete(physics(pairs), of_links, axis=1)).all()
