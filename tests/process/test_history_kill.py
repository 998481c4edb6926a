"""What a killed process leaves behind: every observation that it had acknowledged. And one that may write no more."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.storage.database import open_database
from node.storage.history import HistoryStore
from protocol.observations import verify_observation

KILLS = 20
ROOT = Path(__file__).parents[2]


def kill_while_writing(writers: "subprocess.Popen[str]", first: int, acknowledged: int) -> set[bytes]:
    """Have a process write, kill it once it has told so many ids, and return all that it told."""
    assert writers.stdin
    assert writers.stdout
    writers.stdin.write(f"{first}\n")
    writers.stdin.flush()
    pid = int(writers.stdout.readline())
    told = {bytes.fromhex(writers.stdout.readline()) for _ in range(acknowledged)}
    os.kill(pid, signal.SIGKILL)
    return told | {bytes.fromhex(line) for line in iter(writers.stdout.readline, "dead\n")}


@pytest.fixture
def writers(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start what starts a process for each kill."""
    command = [sys.executable, "-m", "tests.support.history_writer", str(tmp_path / "metaswarm.sqlite3")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


async def test_sigkill_loses_no_acknowledged_observation(tmp_path: Path, writers: "subprocess.Popen[str]") -> None:
    path, dice = tmp_path / "metaswarm.sqlite3", random.Random(20)
    acknowledged: set[bytes] = set()
    for kill in range(KILLS):
        acknowledged |= kill_while_writing(writers, kill * 1_000_000, dice.randint(1, 120))
        async with open_database(path) as database:
            assert database.set_aside is None
            assert len(await HistoryStore(database).get_many(list(acknowledged))) == len(acknowledged)
    async with open_database(path) as database, open_database(tmp_path / "other") as other:
        store, fresh = HistoryStore(database), HistoryStore(other)
        kept = [verify_observation(stored.envelope) async for page in store.pages() for stored in page]
        await fresh.add_many(kept)
        assert await store.digest() == await fresh.digest(), "digests and counts fit what is there"
        assert {each.id for each in kept} >= acknowledged


def test_write_error_on_full_disk_is_survived(tmp_path: Path) -> None:
    """The operating system refuses the write: an I/O error in the middle of a transaction, as on a failing disk."""
    command = [sys.executable, "-m", "tests.support.limited_writer", str(tmp_path / "metaswarm.sqlite3")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3
