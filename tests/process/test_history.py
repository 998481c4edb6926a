"""What one real daemon has seen, all of them know."""

import sqlite3
from pathlib import Path

from tests.process.daemons import MODEL, Daemon, StartDaemon, until


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
