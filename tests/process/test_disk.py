"""Disks that are full or damaged under a running daemon: one clear line, and it lives and goes on."""

import os
from pathlib import Path
from typing import Any

import psutil
import trio

from node.models.store import Package
from node.storage.database import DATABASE_FILE
from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, limit_files, until

PROMPT = {"prompt": "The capital of France is", "max_tokens": 4}


async def observations(daemon: Daemon) -> tuple[int, str] | None:
    """Return how many observations a daemon has and their digest; None while it cannot read them."""
    history = (await daemon.get("/swarm/status"))["history"]
    return None if history is None else (history["count"], history["digest"])


async def test_fetch_reports_full_disk_and_retries(start_daemon: StartDaemon, package: Package, tmp_path: Path) -> None:
    first = await start_daemon("--serve", f"{MODEL}:0-2", "--threads", "1")
    folder, cache = tmp_path / "newcomer", tmp_path / "cache"
    started: list[trio.Process] = []
    newcomers: list[Daemon] = []

    async def start() -> None:
        newcomers.append(
            await start_daemon(
                *("--serve", f"{MODEL}:2-3", "--threads", "1", "--no-catalogue", "--bootstrap", first.multiaddr),
                data_dir=folder,
                environment={"METASWARM_CACHE_DIR": str(cache)},
                file_limit_bytes=1 << 20,  # less than a block, more than what else is written
                on_started=started.append,
            )
        )

    async def is_told() -> bool:
        return (folder / "log").exists() and "the disk is full" in (folder / "log").read_text()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        await until(is_told, timeout_s=90)
        assert started[0].poll() is None
        for process in (psutil.Process(started[0].pid), *psutil.Process(started[0].pid).children()):
            limit_files(process.pid, None)
    [newcomer] = newcomers
    log = (folder / "log").read_text()
    assert "free some space, or set METASWARM_CACHE_DIR" in log
    assert "Traceback" not in log
    status = await newcomer.get("/swarm/status")
    assert [(span["start"], span["end"]) for span in status["spans"]] == [(2, 3)]
    block = package.manifest.blocks[2]
    assert (cache / "models" / package.model_id / block.name).read_bytes() == package.path_of(block).read_bytes()


async def test_full_disk_fails_no_job_and_history_recovers(
    start_daemon: StartDaemon, package: Package, tmp_path: Path
) -> None:
    folder = tmp_path / "node"
    daemon = await start_daemon("--serve", MODEL, data_dir=folder, file_limit_bytes=1 << 40)
    answer = await daemon.complete(**PROMPT)

    async def has(count: int) -> bool:
        return ((await observations(daemon)) or (0, ""))[0] == count

    await until(lambda: has(1))
    # The database's log may not grow any more; the daemon's own, which is far shorter, may.
    limit_files(daemon.process.pid, (folder / f"{DATABASE_FILE}-wal").stat().st_size)
    for _ in range(2):
        assert (await daemon.complete(**PROMPT))["choices"][0]["text"] == answer["choices"][0]["text"]
    assert await has(1)

    async def is_told() -> bool:
        return str(folder / DATABASE_FILE) in (folder / "log").read_text()

    await until(is_told)
    assert "Traceback" not in (folder / "log").read_text()
    limit_files(daemon.process.pid, None)
    await daemon.complete(**PROMPT)
    await until(lambda: has(2))


async def test_truncated_history_is_set_aside_and_synced_again(
    start_daemon: StartDaemon, package: Package, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    first = await start_daemon("--serve", MODEL)
    flags: tuple[Any, ...] = ("--bootstrap", first.multiaddr)
    second = await start_daemon(*flags, data_dir=folder)
    await until(lambda: is_complete(second))
    answer = await second.complete(**PROMPT)

    async def agree(other: Daemon) -> bool:
        held = await observations(other)
        return held is not None and held[0] > 0 and held == await observations(first)

    await until(lambda: agree(second), timeout_s=60)
    database = folder / DATABASE_FILE
    os.truncate(database, database.stat().st_size - 1000)
    (folder / f"{DATABASE_FILE}-wal").unlink(missing_ok=True)
    # It goes on serving, whatever it can still say of its history.
    assert (await second.complete(**PROMPT))["choices"][0]["text"] == answer["choices"][0]["text"]
    await second.kill()
    again = await start_daemon(*flags, data_dir=folder)
    await until(lambda: is_complete(again))
    assert list(folder.glob(f"{DATABASE_FILE}.damaged-*")), "kept for whoever wants to look at it"
    await until(lambda: agree(again), timeout_s=60)
    assert (await again.complete(**PROMPT))["choices"][0]["text"] == answer["choices"][0]["text"]
