"""The sequences of llama.cpp's KV memory: one for each session, and closed sessions' while their pages are cached.

The KV allocator, on the node's side, thinks in pages; llama.cpp in sequences of positions. A page is a stretch of the
sequence that calculated it. A new sequence shares it, if that keeps the order of its cells, and it is given up with the
allocator.
"""

from collections.abc import Iterable
from typing import NamedTuple

from node.engine.interface import PAGE_POSITIONS, EngineError
from node.engine.kv_allocator import KvReservation
from node.engine.llamacpp.context import SpanContext
from node.engine.llamacpp.kv_memory import PassFailed


class _Stretch(NamedTuple):
    """The positions of page `number` of a sequence."""

    sequence: int
    number: int


class Sequences:
    """Gives sequences to sessions, and keeps what the allocator may still copy."""

    def __init__(self, context: SpanContext, limit: int) -> None:
        self.context = context
        self._free = list(reversed(range(limit)))
        self._stretches: dict[int, _Stretch] = {}
        """By page."""
        self._pages: dict[int, set[int]] = {}
        """By sequence, of sessions open and closed."""
        self._closed: dict[int, None] = {}
        """Sequences of closed sessions, the first closed first."""

    def forget(self, pages: Iterable[int]) -> None:
        """Give up pages that the allocator has given up, or to a session that begins."""
        for page in pages:
            self._forget(page)

    def begin(self, reservation: KvReservation) -> int:
        """Return a sequence that holds the copied pages. Raises EngineError where one of them is gone."""
        sequence = self._take()
        try:
            for source, start, end in self._runs(reservation.copied):
                self.context.copy(source, sequence, start * PAGE_POSITIONS, end * PAGE_POSITIONS)
        except (EngineError, PassFailed) as error:
            self.context.truncate(sequence, 0)
            self._free.append(sequence)
            raise EngineError(str(error)) from None
        self._pages[sequence] = set(reservation.pages)
        self._stretches |= {page: _Stretch(sequence, number) for number, page in enumerate(reservation.pages)}
        return sequence

    def close(self, sequence: int) -> None:
        """Keep the sequence of a closed session until the allocator gives its pages up."""
        self._closed[sequence] = None

    def take(self) -> int:
        """Return an empty sequence without pages; `free` gives it back."""
        return self._take()

    def free(self, sequence: int) -> None:
        """Drop all that a sequence holds, and give it back."""
        self.context.truncate(sequence, 0)
        self._closed.pop(sequence, None)
        for page in self._pages.pop(sequence, ()):
            del self._stretches[page]
        self._free.append(sequence)

    def _take(self) -> int:
        if not self._free:  # the allocator's count is ahead: it has given up pages in a session that never began
            if not self._closed:
                raise EngineError("no sequence is free")
            self.free(next(iter(self._closed)))
        return self._free.pop()

    def _runs(self, pages: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Return stretches of cached pages from position 0 on as [sequence, first page, last page + 1]."""
        runs: list[tuple[int, int, int]] = []
        for number, page in enumerate(pages):
            stretch = self._stretches.get(page)
            if stretch is None or stretch.number != number:
                raise EngineError("the cached start of the prompt is gone")
            if runs and runs[-1][0] == stretch.sequence:
                runs[-1] = (stretch.sequence, runs[-1][1], number + 1)
            else:
                runs.append((stretch.sequence, number, number + 1))
        return runs

    def _forget(self, page: int) -> None:
        stretch = self._stretches.pop(page, None)
        if stretch is None:
            return
        pages = self._pages[stretch.sequence]
        pages.discard(page)
        if stretch.sequence not in self._closed:
            return
        if pages:
            start = stretch.number * PAGE_POSITIONS
            self.context.drop(stretch.sequence, start, start + PAGE_POSITIONS)
        else:
            self.free(stretch.sequence)
