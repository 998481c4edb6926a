"""A process whose files may not grow beyond a limit: it writes, is refused, lives, and writes again later.

    python -m tests.support.limited_writer FILE

Prints how many writes were refused; any other end is a failure.
"""

import resource
import signal
import sys
from pathlib import Path

import trio

from node.storage.database import StorageError, open_database
from node.storage.history import HistoryStore
from tests.support.observations import signed

LIMIT_BYTES = 200_000


async def write(path: Path) -> None:
    """Write beyond the limit, then without one."""
    refusals: list[str] = []
    records = [signed(number) for number in range(400)]
    async with open_database(path) as database:
        store = HistoryStore(database)
        written = 0
        for start in range(0, len(records), 10):
            try:
                written += len(await store.add_many(records[start : start + 10]))
            except StorageError as error:
                refusals.append(str(error))
        assert (await store.digest()).count == written
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await store.add_many(records)
        assert (await store.digest()).count == len(records)
    assert not any("\n" in refusal for refusal in refusals)
    print(len(refusals))


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, resource.RLIM_INFINITY))
    trio.run(write, Path(sys.argv[1]))
