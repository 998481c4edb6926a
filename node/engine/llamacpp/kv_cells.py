"""Where llama.cpp's KV memory holds the positions of its sequences.

llama.cpp writes rows into free cells from the last one on, and attention adds up values in the order of their cells.
Were a cell used again, a later position could come before an earlier one, and the same text would give other logits
beside other sessions. So none is: cells that are given up stay taken until the memory is cleared or compacted.
"""

from collections.abc import Iterator
from typing import NamedTuple


class _Run(NamedTuple):
    """Neighbouring positions in neighbouring cells."""

    position: int
    length: int
    cell: int


class KvCells:
    """The cells of each sequence.

    `taken`: cells that are not free. `held`: positions of all sequences; those that they share count for each.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.held = 0
        self._runs: dict[int, list[_Run]] = {}

    def __iter__(self) -> Iterator[int]:
        """Return the sequences that hold anything."""
        return iter(tuple(self._runs))

    def end(self, sequence: int) -> int:
        """Return the position after a sequence's last one."""
        runs = self._runs.get(sequence)
        return runs[-1].position + runs[-1].length if runs else 0

    def stretches(self, sequence: int) -> Iterator[tuple[int, int]]:
        """Return where its neighbouring positions begin and end, in whatever cells."""
        start = end = 0
        for run in tuple(self._runs.get(sequence, ())):
            if run.position != end:
                if end > start:
                    yield start, end
                start = run.position
            end = run.position + run.length
        if end > start:
            yield start, end

    def write(self, sequence: int, position: int, count: int) -> None:
        """Count positions as written behind those of a sequence, into the next cells."""
        if count:
            self._append(sequence, _Run(position, count, self.taken))
            self.taken += count

    def cut(self, sequence: int, position: int) -> None:
        """Take a sequence's positions from one on."""
        runs = self._runs.get(sequence, [])
        while runs and (excess := runs[-1].position + runs[-1].length - position) > 0:
            last = runs.pop()
            self.held -= min(excess, last.length)
            if excess < last.length:
                runs.append(last._replace(length=last.length - excess))
        if not runs:
            self._runs.pop(sequence, None)

    def drop(self, sequence: int, start: int, end: int) -> None:
        """Take positions out of a sequence."""
        behind = [_part(run, end, self.end(sequence)) for run in self._runs.get(sequence, ())]
        self.cut(sequence, start)
        for run in filter(None, behind):
            self._append(sequence, run)

    def follows(self, source: int, target: int, start: int, end: int) -> bool:
        """Return whether the cells of a source's positions come after all those of a target."""
        runs = self._runs.get(target)
        last = runs[-1].cell + runs[-1].length if runs else 0
        parts = (_part(run, start, end) for run in self._runs.get(source, ()))
        return all(part.cell >= last for part in parts if part is not None)

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Have a target hold positions of a source, too, behind its own."""
        for run in self._runs.get(source, ()):
            if (part := _part(run, start, end)) is not None:
                self._append(target, part)

    def compact(self) -> None:
        """Count all sequences as written into cleared memory, one after the other."""
        former, self._runs, self.taken, self.held = self._runs, {}, 0, 0
        for sequence, runs in former.items():
            for run in runs:
                self.write(sequence, run.position, run.length)

    def clear(self) -> None:
        """Forget everything."""
        self._runs, self.taken, self.held = {}, 0, 0

    def _append(self, sequence: int, run: _Run) -> None:
        runs = self._runs.setdefault(sequence, [])
        self.held += run.length
        if runs and (last := runs[-1]).position + last.length == run.position and last.cell + last.length == run.cell:
            runs[-1] = last._replace(length=last.length + run.length)
        else:
            runs.append(run)


def _part(run: _Run, start: int, end: int) -> _Run | None:
    """Return what of a run lies between two positions."""
    first, last = max(start, run.position), min(end, run.position + run.length)
    return _Run(first, last - first, run.cell + first - run.position) if first < last else None
