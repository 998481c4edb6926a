"""Real daemons on loopback, each in its own process and data directory, and readers of their histories."""

import os
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trio

from node.config import ENVIRONMENT_PREFIX, NodeReady, default_cache_dir
from node.storage.database import DATABASE_FILE, open_database
from node.storage.history import HistoryStore
from node.util.interpreter import child_environment, python
from protocol.reconciliation import BucketDigest

COMMAND = python("-m", "node")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05


@dataclass(slots=True)
class Daemon:
    """A running daemon."""

    process: trio.Process
    data_dir: Path
    ready: NodeReady

    @property
    def database(self) -> Path:
        """The SQLite file of its history."""
        return self.data_dir / DATABASE_FILE

    async def get(self, path: str) -> Any:
        """Return the API's response for a path."""
        async with httpx.AsyncClient(base_url=self.ready.api_url, timeout=60) as client:
            return (await client.get(path)).raise_for_status().json()

    async def kill(self) -> None:
        """End it as `kill -9` does."""
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def running_daemon(data_dir: Path, *flags: str, timeout_s: float = START_TIMEOUT_S) -> AsyncIterator[Daemon]:
    """Run `metaswarm node` on loopback inside the block, begun once it is ready; its log is in the data directory."""
    await trio.Path(data_dir).mkdir(mode=0o700, exist_ok=True)
    # What configures the user's own node is not for these.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    environment = child_environment({f"{ENVIRONMENT_PREFIX}CACHE_DIR": str(default_cache_dir())}, base=inherited)
    command = [*COMMAND, "node", "--json", "--no-catalogue", "--no-mdns", "--data-dir", str(data_dir)]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--device", "cpu", *flags]
    with (data_dir / "log").open("ab") as log:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        with trio.fail_after(timeout_s):
            line = b""
            while not line.endswith(b"\n"):
                data = await process.stdout.receive_some()
                assert data, f"the daemon ended: {(data_dir / 'log').read_text(errors='replace')[-2000:]}"
                line += data
        yield Daemon(process, data_dir, NodeReady.parse(line.decode()))
    finally:
        with trio.CancelScope(shield=True):
            await _stop(process)
            await process.stdout.aclose()


async def _stop(process: trio.Process) -> None:
    if process.poll() is None:
        process.terminate()
        with trio.move_on_after(STOP_TIMEOUT_S):
            await process.wait()
    if process.poll() is None:
        process.kill()
        await process.wait()


async def run_command(*arguments: str) -> str:
    """Run a subcommand of `metaswarm` and return its output. Raises CalledProcessError."""
    done = await trio.run_process([*COMMAND, *arguments], capture_stdout=True)
    return done.stdout.decode()


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float) -> float:
    """Wait until a condition that other processes bring about holds; return the seconds it took."""
    began_s = trio.current_time()
    with trio.fail_after(timeout_s):
        while not await condition():
            await trio.sleep(POLL_S)
    return trio.current_time() - began_s


class Tail:
    """Reads new observations in a daemon's history from another process."""

    def __init__(self, database: Path) -> None:
        self._connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        self._last = 0

    def new(self) -> list[bytes]:
        """Return the ids that were committed since the last call."""
        query = "SELECT number, id FROM observations WHERE number > ? ORDER BY number"
        rows = self._connection.execute(query, (self._last,)).fetchall()
        if rows:
            self._last = rows[-1][0]
        return [row[1] for row in rows]

    def count(self) -> int:
        """Return the number of observations."""
        (count,) = self._connection.execute("SELECT coalesce(sum(count), 0) FROM buckets").fetchone()
        return int(count)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


async def digest_of(database: Path) -> BucketDigest:
    """Return count and digest of a whole history, by its own file."""
    async with open_database(database, set_aside=False) as opened:
        return await HistoryStore(opened).digest()
