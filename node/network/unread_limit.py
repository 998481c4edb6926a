"""One bound on what waits unread in the buffers of all connections: windows alone allow each stream its own."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

import trio

from node.network.yamux import Yamux

ROUND_S: Final = 1.0


async def bound_unread(connections: Callable[[], Iterable[Yamux]], max_bytes: int) -> None:
    """Break connections while more than `max_bytes` wait, until cancelled.

    First the one with most of those from the host, or through the relay, from which most waits.
    """
    while True:
        await trio.sleep(ROUND_S)
        waiting = {connection: size for connection in connections() if (size := connection.unread_bytes())}
        while sum(waiting.values()) > max_bytes:
            by_origin: defaultdict[str | None, int] = defaultdict(int)
            for connection, size in waiting.items():
                by_origin[connection.host or connection.relay] += size
            largest = max(waiting, key=lambda each: (by_origin[each.host or each.relay], waiting[each]))
            del waiting[largest]
            largest.abort("too much that it sent waits unread")
