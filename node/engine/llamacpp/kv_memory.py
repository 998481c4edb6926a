"""What the sequences of a span hold in llama.cpp's KV memory: given up, shared, and moved."""

from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from node.engine.llamacpp.kv_cells import KvCells
from node.engine.llamacpp.library import Library

OWN_SEQUENCES: Final = 2
"""Sequences that this class needs beside those of sessions."""

_PIECE: Final = 512
"""Positions that are moved at once, for models without a sliding window."""

_ALL: Final = -1

State = npt.NDArray[np.uint8]
"""Keys and values of some positions, as llama.cpp writes them."""


class PassFailed(Exception):
    """llama.cpp could not compute the rows of a pass."""


class Piece(NamedTuple):
    """Positions of a sequence, and the bytes of their state."""

    sequence: int
    start: int
    end: int
    state_bytes: int


class KvMemory:
    """The sequences of a context, and the cells that they are in.

    `sequences`: of sessions; those after them are this class's own, of cells that no other holds any more and of what
    is being moved. `window`: positions of the model's sliding window, 0 for none. llama.cpp gives a sequence's state
    without what lies outside the window, though a rollback may need it; so it is moved in pieces that lie within.
    """

    def __init__(self, library: Library, sequences: int, window: int) -> None:
        self.cells = KvCells()
        self._library = library
        self._given_up, self._scratch = sequences, sequences + 1
        self._piece = min(_PIECE, window - 1) if window > 1 else _PIECE

    def use(self, context: int) -> None:
        """Work on the memory of another context from now on."""
        self._context = context
        self._memory = self._library.llama_get_memory(context)

    def truncate(self, sequence: int, position: int) -> None:
        """Drop a sequence's positions from one on."""
        if position < self.cells.end(sequence):
            self.cells.cut(sequence, position)
            self._give_up(sequence, position, _ALL)

    def drop(self, sequence: int, start: int, end: int) -> None:
        """Drop some of a sequence's positions."""
        self.cells.drop(sequence, start, end)
        self._give_up(sequence, start, end)

    def clear(self) -> None:
        """Drop everything."""
        self._library.llama_memory_clear(self._memory, False)

    def share(self, source: int, target: int, start: int, end: int) -> bool:
        """Have a target hold positions of a source, too, behind its own; not where their cells come before those."""
        if not self.cells.follows(source, target, start, end):
            return False
        self._library.llama_memory_seq_cp(self._memory, source, target, start, end)
        self.cells.share(source, target, start, end)
        return True

    def duplicate(self, source: int, target: int, start: int, end: int) -> None:
        """Write positions of a source into cells of a target's own, behind its others. Raises PassFailed."""
        self.append(target, start, end, self.states(source, start, end))

    def states(self, sequence: int, start: int, end: int) -> Iterator[State]:
        """Yield what some of a sequence's positions hold, for `append`. Raises MemoryError."""
        for first, last in self._pieces(start, end):
            yield self._taken_out(sequence, first, last)

    def append(self, sequence: int, start: int, end: int, states: Iterable[State]) -> None:
        """Write positions into cells of a sequence's own, behind its others. Raises PassFailed."""
        for (first, last), state in zip(self._pieces(start, end), states, strict=True):
            if not self._put(sequence, first, last, state):
                raise PassFailed("llama.cpp has no room for cached positions")
            self.cells.write(sequence, first, last - first)

    def save(self, file: IO[bytes]) -> Sequence[Piece]:
        """Write what all sequences hold, to be read from the start. Raises OSError, MemoryError."""
        pieces = []
        for sequence in self.cells:
            for start, end in self.cells.stretches(sequence):
                for first, last in self._pieces(start, end):
                    state = self._taken_out(sequence, first, last)
                    file.write(state.data)
                    pieces.append(Piece(sequence, first, last, state.nbytes))
        file.seek(0)
        return pieces

    def restore(self, pieces: Sequence[Piece], file: IO[bytes]) -> bool:
        """Read into empty memory what was written; return whether there was room. Raises OSError, MemoryError."""
        for piece in pieces:
            state = np.frombuffer(file.read(piece.state_bytes), np.uint8)
            if len(state) < piece.state_bytes or not self._put(piece.sequence, piece.start, piece.end, state):
                return False
        self.cells.compact()
        return True

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Return parts of a stretch of positions; none crosses a multiple of their size."""
        while start < end:
            last = min(end, (start // self._piece + 1) * self._piece)
            yield start, last
            start = last

    def _taken_out(self, sequence: int, start: int, end: int) -> State:
        """Return the state of some of a sequence's positions."""
        library, memory = self._library, self._memory
        library.llama_memory_seq_cp(memory, sequence, self._scratch, start, end)
        try:
            state = np.empty(library.llama_state_seq_get_size(self._context, self._scratch), np.uint8)
            library.llama_state_seq_get_data(self._context, state.ctypes.data, state.nbytes, self._scratch)
        finally:
            library.llama_memory_seq_rm(memory, self._scratch, _ALL, _ALL)
        return state

    def _put(self, sequence: int, start: int, end: int, state: State) -> bool:
        """Write positions into the next cells; return whether there was room."""
        library = self._library
        if not library.llama_state_seq_set_data(self._context, state.ctypes.data, state.nbytes, self._scratch):
            return False
        library.llama_memory_seq_cp(self._memory, self._scratch, sequence, start, end)
        library.llama_memory_seq_rm(self._memory, self._scratch, _ALL, _ALL)
        return True

    def _give_up(self, sequence: int, start: int, end: int) -> None:
        """Take positions from a sequence, but leave their cells taken unless nothing else is."""
        if not self.cells.held:
            self.clear()
            self.cells.clear()
            return
        self._library.llama_memory_seq_cp(self._memory, sequence, self._given_up, start, end)
        self._library.llama_memory_seq_rm(self._memory, sequence, start, end)
