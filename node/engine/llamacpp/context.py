"""One span in llama.cpp: rows of many sequences in, hidden states or logits out."""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from node.engine.interface import EngineError
from node.engine.llamacpp.embedding import Embedding
from node.engine.llamacpp.library import FLASH_ATTENTION_ON, LOAD_MAPPED, Batch, EvalCallback, Library
from node.util.mapped_pages import drop_mapped_pages

Floats = npt.NDArray[np.float32]

BATCH_ROWS: Final = 512
"""Of one call of llama.cpp; no fewer than there are sequences."""

PASS_ROWS: Final = 60
"""Of those that it computes at once (n_ubatch). From 64 rows on its flash attention, which calculates row by row, takes
another way with other rounding: a prompt would have other keys and values in chunks, or beside other sessions."""

FIRST_POSITIONS: Final = 2048
"""KV memory has so many positions at first, and doubles when sessions fill it: llama.cpp writes to all of it at once,
so that it is resident whether or not a session ever needs it."""

_ALL_POSITIONS: Final = -1


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """Rows of one sequence: token ids i32 (rows,) on a first span, hidden states f32 (rows, hidden size) elsewhere.

    `outputs`: number of trailing rows whose logits a last span returns; the others return the states of all rows.
    """

    sequence: int
    position: int
    rows: npt.NDArray[Any]
    outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions:
    """What a span is loaded with; `positions` and `sequences` are the limits of all sessions together.

    `embedding`: of a first span that is not the last.
    """

    first: bool
    last: bool
    embedding: Embedding | None = None
    block_count: int
    positions: int
    sequences: int
    threads: int


class PassFailed(Exception):
    """llama.cpp could not compute the rows of a pass."""


class SpanContext:
    """A span that llama.cpp has loaded, and its KV memory. It has one thread of calls."""

    def __init__(self, library: Library, path: Path, options: ContextOptions) -> None:
        self._library = library
        self._options = options
        parameters = library.llama_model_default_params()
        parameters.load_mode = LOAD_MAPPED
        library.take_error()
        self._model = library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            reason = library.take_error().rpartition("error loading model: ")[2] or "it does not say why"
            raise EngineError(f"llama.cpp cannot load the model: {reason}")
        drop_mapped_pages(
            path.resolve()
        )  # of some types llama.cpp has made a copy in another order, and reads only that
        self._loaded = _Loaded(self._model)
        weakref.finalize(self, _free, library, self._loaded)
        if library.llama_model_is_recurrent(self._model) or library.llama_model_is_hybrid(self._model):
            raise EngineError("the architecture keeps a recurrent state, which cannot be rolled back: not supported")
        self.hidden_size: int = library.llama_model_n_embd(self._model)
        self.vocabulary_size: int = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._states = _LastStates(library, f"l_out-{options.block_count - 1}", self.hidden_size)
        self._loaded.states = self._states
        self._ends: dict[int, int] = {}
        """By sequence, the position after its last one."""
        positions = min(FIRST_POSITIONS, options.positions)
        if (context := self._open(positions)) is None:
            raise EngineError(f"llama.cpp has too little memory for {positions} positions of KV cache")
        self._use(context, positions)
        takes_tokens = options.first and options.last
        self._batch = _BatchArrays(BATCH_ROWS, None if takes_tokens else self.hidden_size)

    def _open(self, positions: int) -> int | None:
        """Return a context with KV memory for `positions`, or None where there is no memory for it."""
        return self._library.llama_init_from_model(self._model, self._parameters(positions)) or None

    def _use(self, context: int, positions: int) -> None:
        self._loaded.context = self._context = context
        self._positions = positions
        self._memory = self._library.llama_get_memory(context)

    def _parameters(self, positions: int) -> Any:
        options = self._options
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = positions
        parameters.n_batch, parameters.n_ubatch = BATCH_ROWS, PASS_ROWS
        parameters.n_seq_max = options.sequences
        parameters.n_outputs_max_per_seq = BATCH_ROWS
        parameters.n_threads = parameters.n_threads_batch = options.threads
        parameters.kv_unified = True  # any session may use any part of the memory
        # Without it, attention depends on the number of rows, and holds weights over all positions of the memory.
        parameters.flash_attn_type = FLASH_ATTENTION_ON
        parameters.swa_full = True  # else a rollback would reach behind the window
        if not options.last:
            parameters.cb_eval = self._states.callback
        return parameters

    def run(self, parts: Sequence[SequenceRows]) -> list[Floats]:
        """Return for each part the hidden states of its rows or, on a last span, logits after its trailing ones.

        Positions that a sequence holds from a part's on are dropped first (a rollback). Raises PassFailed; what the
        parts have written into KV memory is dropped then.
        """
        for part in parts:
            if part.position < self._ends.get(part.sequence, 0):
                self.truncate(part.sequence, part.position)
        if (embedding := self._options.embedding) is not None:
            parts = [replace(part, rows=embedding.rows(part.rows)) for part in parts]
        ends = self._ends | {part.sequence: part.position + len(part.rows) for part in parts}
        if (needed := sum(ends.values())) > self._positions < self._options.positions:
            self._grow(min(max(needed, 2 * self._positions), self._options.positions))
        self._ends = ends
        outputs: list[list[Floats]] = [[] for _ in parts]
        try:
            for pieces in self._batches(parts):
                self._decode(pieces, outputs)
        except PassFailed:
            for part in parts:
                self.truncate(part.sequence, part.position)
            raise
        width = self.vocabulary_size if self._options.last else self.hidden_size
        return [np.concatenate(each) if each else np.empty((0, width), np.float32) for each in outputs]

    def _batches(self, parts: Sequence[SequenceRows]) -> Sequence[Sequence[tuple[int, SequenceRows]]]:
        """Return the parts by number, cut and packed into passes of at most BATCH_ROWS rows."""
        batches: list[list[tuple[int, SequenceRows]]] = [[]]
        room = BATCH_ROWS
        for number, part in enumerate(parts):
            start, count = 0, len(part.rows)
            while start < count:
                if room == 0:
                    batches.append([])
                    room = BATCH_ROWS
                end = min(count, start + room)
                outputs = max(0, part.outputs - (count - end))
                piece = SequenceRows(
                    part.sequence, part.position + start, part.rows[start:end], min(outputs, end - start)
                )
                batches[-1].append((number, piece))
                room -= end - start
                start = end
        return batches

    def _decode(self, pieces: Sequence[tuple[int, SequenceRows]], outputs: list[list[Floats]]) -> None:
        count = self._batch.fill([piece for _, piece in pieces], last=self._options.last)
        self._states.taken.clear()
        failed = self._library.llama_decode(self._context, self._batch.batch)
        if failed:
            raise PassFailed(f"llama.cpp could not compute {count} rows (error {failed})")
        states = None if self._options.last else self._read_states(count)
        row = 0
        for number, piece in pieces:
            end = row + len(piece.rows)
            if states is not None:
                outputs[number].append(states[row:end])
            else:
                outputs[number] += [self._logits(each) for each in range(end - piece.outputs, end)]
            row = end

    def _read_states(self, count: int) -> Floats:
        taken = self._states.taken
        states = taken[0] if len(taken) == 1 else np.concatenate(taken)
        if len(states) != count:
            raise PassFailed(f"llama.cpp computed {len(states)} rows of hidden states, not {count}")
        return states

    def _logits(self, row: int) -> Floats:
        pointer = self._library.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise PassFailed("llama.cpp has no logits of a row that it was asked for")
        return np.ctypeslib.as_array(pointer, (1, self.vocabulary_size)).copy()

    def _grow(self, positions: int) -> None:
        """Move what the sequences hold into larger KV memory. Raises PassFailed; the former is in use then."""
        library, former = self._library, self._context
        if (context := self._open(positions)) is None:
            raise PassFailed(f"llama.cpp has too little memory for {positions} positions of KV cache")
        for sequence in self._ends:
            state = np.empty(library.llama_state_seq_get_size(former, sequence), np.uint8)
            library.llama_state_seq_get_data(former, state.ctypes.data, state.nbytes, sequence)
            if not library.llama_state_seq_set_data(context, state.ctypes.data, state.nbytes, sequence):
                library.llama_free(context)
                raise PassFailed(f"llama.cpp could not move a session into KV memory of {positions} positions")
        self._use(context, positions)
        library.llama_free(former)

    def truncate(self, sequence: int, position: int) -> None:
        """Drop a sequence's positions from one on."""
        if (end := min(position, self._ends.get(sequence, 0))) > 0:
            self._ends[sequence] = end
        else:
            self._ends.pop(sequence, None)
        self._library.llama_memory_seq_rm(self._memory, sequence, position, _ALL_POSITIONS)

    def drop(self, sequence: int, start: int, end: int) -> None:
        """Drop some of a sequence's positions."""
        self._library.llama_memory_seq_rm(self._memory, sequence, start, end)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Have a sequence hold positions of another one, too; they are not copied but shared."""
        self._library.llama_memory_seq_cp(self._memory, source, target, start, end)
        self._ends[target] = max(end, self._ends.get(target, 0))


class _LastStates:
    """Takes the hidden states behind the span's last block as llama.cpp computes them."""

    def __init__(self, library: Library, name: str, hidden_size: int) -> None:
        self._library = library
        self._name = name.encode()
        self._hidden_size = hidden_size
        self.taken: list[Floats] = []
        self.callback = EvalCallback(self._evaluated)

    def _evaluated(self, tensor: int, ask: bool, _: object) -> bool:
        """Take the tensor, and end the graph there: what follows is the head, which another span has."""
        library = self._library
        if library.ggml_get_name(tensor) != self._name:
            return not ask
        if ask:
            return True
        size = library.ggml_nbytes(tensor)
        states = np.empty((size // (4 * self._hidden_size), self._hidden_size), np.float32)
        library.ggml_backend_tensor_get(tensor, states.ctypes.data, 0, size)
        self.taken.append(states)
        return False


@dataclass(slots=True)
class _Loaded:
    """What llama.cpp holds for a span, and the callback that must live as long."""

    model: int
    context: int | None = None
    states: _LastStates | None = None


def _free(library: Library, loaded: _Loaded) -> None:
    if loaded.context is not None:
        library.llama_free(loaded.context)
    library.llama_model_free(loaded.model)


class _BatchArrays:
    """A llama_batch over arrays that are filled anew for each pass."""

    def __init__(self, rows: int, hidden_size: int | None) -> None:
        self._rows = np.zeros(rows, np.int32) if hidden_size is None else np.zeros((rows, hidden_size), np.float32)
        self._positions = np.zeros(rows, np.int32)
        self._sequences = np.zeros(rows, np.int32)
        self._sequence_counts = np.ones(rows, np.int32)
        self._outputs = np.zeros(rows, np.int8)
        start, step = self._sequences.ctypes.data, self._sequences.itemsize
        self._pointers = np.arange(start, start + rows * step, step, dtype=np.uintp)
        self.batch = Batch()
        if hidden_size is None:
            self.batch.token = _pointer(self._rows, ctypes.c_int32)
        else:
            self.batch.embd = _pointer(self._rows, ctypes.c_float)
        self.batch.pos = _pointer(self._positions, ctypes.c_int32)
        self.batch.n_seq_id = _pointer(self._sequence_counts, ctypes.c_int32)
        self.batch.seq_id = _pointer(self._pointers, ctypes.POINTER(ctypes.c_int32))
        self.batch.logits = _pointer(self._outputs, ctypes.c_int8)

    def fill(self, pieces: Sequence[SequenceRows], *, last: bool) -> int:
        """Fill the batch, and return its number of rows; off the last span every row is an output."""
        row = 0
        for piece in pieces:
            end = row + len(piece.rows)
            self._rows[row:end] = piece.rows
            self._positions[row:end] = range(piece.position, piece.position + len(piece.rows))
            self._sequences[row:end] = piece.sequence
            self._outputs[row:end] = not last
            if last:
                self._outputs[end - piece.outputs : end] = 1
            row = end
        self.batch.n_tokens = row
        return row


def _pointer(array: npt.NDArray[Any], element: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(element))
