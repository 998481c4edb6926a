"""Processes that write observations until they are killed, and tell each one that was acknowledged.

    python -m tests.support.history_writer FILE

For each number on standard input a process is forked, which spares it the imports. It prints its id, then begins to
write observations from that number on; once it is dead, `dead` is printed.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import trio

from node.storage.database import open_database
from node.storage.history import HistoryStore
from tests.support.observations import signed

WRITERS = 4


async def write(path: Path, first: int) -> None:
    """Write with several tasks at once, for longer than anybody waits before the kill."""
    numbers = iter(range(first, first + 100_000))
    async with open_database(path) as database, trio.open_nursery() as nursery:
        for _ in range(WRITERS):
            nursery.start_soon(write_on, HistoryStore(database), numbers)


async def write_on(store: HistoryStore, numbers: Iterator[int]) -> None:
    """Write batches of one to three observations; print an observation's id when the store has taken it."""
    for number in numbers:
        batch = [signed(each) for each in (number, *itertools.islice(numbers, number % 3))]
        for new in await store.add_many(batch):
            print(new.id.hex(), flush=True)


if __name__ == "__main__":
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            print(os.getpid(), flush=True)
            trio.run(write, Path(sys.argv[1]), int(line))
        os.waitpid(child, 0)
        print("dead", flush=True)
