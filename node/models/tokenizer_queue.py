"""The requests that wait for a model's tokenizer process, and whose turn it is."""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import trio

from node.models.errors import TokenizerEndedError


@dataclass(order=True, slots=True)
class Call:
    """A request; smaller priorities are served first, then smaller turns."""

    priority: int
    turn: float
    number: int
    asker: str = field(compare=False)
    subject: str = field(compare=False)
    """What its error begins with: the part of the model that is at fault."""
    request: dict[str, Any] = field(compare=False)
    over: trio.Event = field(compare=False, default_factory=trio.Event)
    abandoned: bool = field(compare=False, default=False)
    outcome: dict[str, Any] | Exception = field(compare=False, default_factory=TokenizerEndedError)


class CallQueue:
    """Waiting requests. Those of priority 0 come first; of the others each asker gets as much time as any other.

    By start-time fair queueing [Goyal, Vin, Cheng, SIGCOMM 1996]: a request starts, in a time that advances with what
    is served, when the one before it of the same asker would have ended.
    """

    def __init__(self) -> None:
        self._waiting: list[Call] = []
        self._numbers = itertools.count()
        self._turn = 0.0
        self._ends: dict[str, float] = {}
        """When the last request of an asker would end, also of one that was abandoned; empty while nothing waits."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Call]:
        return iter(self._waiting)

    def count(self, asker: str) -> int:
        """Return how many requests of an asker wait."""
        return sum(call.asker == asker for call in self._waiting)

    def add(self, priority: int, asker: str, cost: float, subject: str, request: dict[str, Any]) -> Call:
        """Add a request, and return it. `cost`: about how long it takes, in any unit."""
        turn = 0.0
        if priority:
            turn = max(self._turn, self._ends.get(asker, 0.0))
            self._ends[asker] = turn + cost
        call = Call(priority, turn, next(self._numbers), asker, subject, request)
        heapq.heappush(self._waiting, call)
        return call

    def take(self) -> Call | None:
        """Return the next request to be served, if any waits that is still wanted."""
        while self._waiting:
            call = heapq.heappop(self._waiting)
            if not call.abandoned:
                self._turn = max(self._turn, call.turn)
                self._ends = {asker: end for asker, end in self._ends.items() if end > self._turn}
                return call
        self._ends.clear()  # the next request has no other to wait for
        return None
