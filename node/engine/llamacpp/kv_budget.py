"""The KV memory of a span's contexts together, which have one for each type of keys and values in use.

The KV allocator sees to it that what all sessions hold fits. A context grows ahead of its sessions, so it may have
taken memory that those of another one need now: then it gives back what its own do not need.
"""

from collections.abc import Iterable
from typing import Final, Protocol
from weakref import ReferenceType, ref

ROUNDED_TO: Final = 256
"""A context's positions are multiples of this: llama.cpp rounds them up, but not the rows that it takes at once."""


class KvContext(Protocol):
    """What the budget knows of a context."""

    position_bytes: int

    @property
    def positions(self) -> int:
        """Positions of its KV memory."""

    @property
    def needed(self) -> int:
        """Those that its sequences hold."""

    def resize(self, positions: int) -> None:
        """Take other memory."""


class KvBudget:
    """Decides how large the KV memory of each context is."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._contexts: list[ReferenceType[KvContext]] = []

    def add(self, context: KvContext) -> None:
        """Count a context from now on, for as long as it exists. Another thread may do this meanwhile."""
        self._contexts.append(ref(context))

    @property
    def free_bytes(self) -> int:
        """What the contexts have not taken."""
        found = (each() for each in tuple(self._contexts))
        return self._total_bytes - _bytes_of(each for each in found if each is not None)

    def positions_for(self, context: KvContext, needed: int) -> int:
        """Return how many positions a context takes that needs so many: twice what it has, if there is memory for it.

        Where the others leave too little they give back what they do not need, but for a part of what is left then.
        """
        contexts = [found() for found in tuple(self._contexts)]
        others = [each for each in contexts if each is not None and each is not context]
        needed_bytes = needed * context.position_bytes
        if self._total_bytes - _bytes_of(others) < needed_bytes:
            used_bytes = needed_bytes + sum(each.needed * each.position_bytes for each in others)
            part_bytes = max(0, self._total_bytes - used_bytes) // (len(others) + 1)
            for each in others:
                positions = _rounded(each.needed + part_bytes // each.position_bytes, each.needed)
                if positions < each.positions:
                    each.resize(positions)
        most = (self._total_bytes - _bytes_of(others)) // context.position_bytes
        return _rounded(min(2 * context.positions, most), needed)


def _rounded(positions: int, needed: int) -> int:
    """Return the largest multiple of ROUNDED_TO up to a number, but no less than is needed."""
    return max(ROUNDED_TO, needed, positions // ROUNDED_TO * ROUNDED_TO)


def _bytes_of(contexts: Iterable[KvContext]) -> int:
    return sum(each.positions * each.position_bytes for each in contexts)
