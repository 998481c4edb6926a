"""The sequences of llama.cpp's KV memory: one for each session, and some of closed ones while their pages are cached.

The KV allocator, on the node's side, thinks in pages; llama.cpp in sequences of positions. A page is a stretch of the
sequence that calculated it. A new sequence shares it, if that keeps the order of its cells, and it is given up with the
allocator.

Attention passes over every cell of a context, also over those of other sequences: a thousand take about as long as
three hundredths of a step of a model of 135 million parameters. So what closed sessions have left in the prefix cache
is set aside, out of the context, where it is more than what open ones hold.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

from node.engine.interface import PAGE_POSITIONS, EngineError
from node.engine.kv_allocator import KvReservation
from node.engine.llamacpp.context import FIRST_POSITIONS, SpanContext
from node.engine.llamacpp.kv_budget import ROUNDED_TO, KvBudget
from node.engine.llamacpp.kv_memory import PassFailed, State


class _Stretch(NamedTuple):
    """The positions of page `number` of a sequence."""

    sequence: int
    number: int


class _Page(NamedTuple):
    """A page that is set aside: its number in the prompt, and what its positions hold."""

    number: int
    states: Sequence[State]


class _PagesAside(dict[int, _Page]):
    """Cached pages outside of the context, by page. The budget counts them as a context that is full."""

    def __init__(self, position_bytes: int) -> None:
        super().__init__()
        self.position_bytes = position_bytes

    @property
    def positions(self) -> int:
        """Positions of all pages."""
        return len(self) * PAGE_POSITIONS

    needed = positions

    def resize(self, positions: int) -> None:
        """Nothing to do: there is no room in it."""


class Sequences:
    """Gives sequences to sessions, and keeps what the allocator may still copy."""

    def __init__(self, context: SpanContext, limit: int, budget: KvBudget) -> None:
        self.context = context
        self._budget = budget
        self._aside = _PagesAside(context.position_bytes)
        self._budget.add(self._aside)
        self._free = list(reversed(range(limit)))
        self._stretches: dict[int, _Stretch] = {}
        """By page."""
        self._pages: dict[int, set[int]] = {}
        """By sequence, of sessions open and closed."""
        self._closed: dict[int, None] = {}
        """Sequences of closed sessions, the first closed first."""
        self._sources: dict[int, set[int | None]] = {}
        """Those whose cells a sequence of an open session shares."""

    def forget(self, pages: Iterable[int]) -> None:
        """Give up pages that the allocator has given up, or to a session that begins."""
        for page in pages:
            self._forget(page)

    def begin(self, reservation: KvReservation) -> int:
        """Return a sequence that holds the copied pages. Raises EngineError where one of them is gone."""
        sequence = self._take()
        try:
            runs = self._runs(reservation.copied)
            for source, start, end in runs:
                if source is None:
                    self._append(sequence, reservation.copied[start:end])
                else:
                    self.context.copy(source, sequence, start * PAGE_POSITIONS, end * PAGE_POSITIONS)
        except (EngineError, PassFailed) as error:
            self.context.truncate(sequence, 0)
            self._free.append(sequence)
            raise EngineError(str(error)) from None
        self._pages[sequence] = set(reservation.pages)
        self._sources[sequence] = {source for source, _, _ in runs}
        self._stretches |= {page: _Stretch(sequence, number) for number, page in enumerate(reservation.pages)}
        for closed in self._excess():
            self._set_aside(closed)
        return sequence

    def set_aside(self) -> None:
        """Move cached pages of closed sessions out of the context, unless they are few, as far as KV memory has room.

        For that the context gives back what it does not need, once: a session that begins does not wait for it.
        """
        excess = self._excess()
        size_bytes = sum(map(self.context.end, excess)) * self.context.position_bytes
        if self._budget.free_bytes < size_bytes and self.context.positions > self.context.needed + ROUNDED_TO:
            with suppress(PassFailed):  # all is as before
                self.context.resize(self.context.needed)
        for sequence in excess:
            self._set_aside(sequence)

    def _excess(self) -> Sequence[int]:
        """Return closed sequences beyond what open ones hold; the latest are kept.

        None on a GPU, beside which no memory is planned for them.
        """
        if self.context.is_on_gpu:
            return ()
        shared = set().union(*self._sources.values())
        room = max(FIRST_POSITIONS, sum(map(self.context.end, self._pages.keys() - self._closed.keys())))
        movable = [sequence for sequence in reversed(self._closed) if sequence not in shared]
        held = accumulate(map(self.context.end, movable))
        return [sequence for sequence, positions in zip(movable, held, strict=True) if positions > room]

    def _set_aside(self, sequence: int) -> None:
        end = self.context.end(sequence)
        numbers = {page: self._stretches[page].number for page in self._pages[sequence]}
        pages = {page: number for page, number in numbers.items() if _positions(number)[1] <= end}
        if self._budget.free_bytes < len(pages) * PAGE_POSITIONS * self.context.position_bytes:
            return
        try:
            aside = {
                page: _Page(number, self.context.states(sequence, *_positions(number)))
                for page, number in pages.items()
            }
        except MemoryError:  # it is served where it is
            return
        self.free(sequence)
        self._aside.update(aside)

    def _append(self, sequence: int, pages: Iterable[int]) -> None:
        """Append pages that are set aside to a sequence."""
        for number, states in (self._aside[page] for page in pages):
            self.context.append(sequence, *_positions(number), states)

    def close(self, sequence: int) -> None:
        """Keep the sequence of a closed session until the allocator gives its pages up."""
        self._closed[sequence] = None
        self._sources.pop(sequence, None)

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

    def _runs(self, pages: tuple[int, ...]) -> list[tuple[int | None, int, int]]:
        """Return stretches of cached pages from position 0 on as [sequence, first page, last page + 1].

        The sequence of those that are set aside is None.
        """
        runs: list[tuple[int | None, int, int]] = []
        for number, page in enumerate(pages):
            found = self._aside.get(page) or self._stretches.get(page)
            if found is None or found.number != number:
                raise EngineError("the cached start of the prompt is gone")
            sequence = found.sequence if isinstance(found, _Stretch) else None
            if runs and runs[-1][0] == sequence:
                runs[-1] = (sequence, runs[-1][1], number + 1)
            else:
                runs.append((sequence, number, number + 1))
        return runs

    def _forget(self, page: int) -> None:
        self._aside.pop(page, None)
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


def _positions(number: int) -> tuple[int, int]:
    """Return where a page of a prompt begins and ends."""
    return number * PAGE_POSITIONS, (number + 1) * PAGE_POSITIONS
