"""One span in llama.cpp: rows of many sequences in, hidden states or logits out.

A model has a context, with KV memory of its own, for each type of keys and values that is in use.
"""

import ctypes
import io
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from node.engine.interface import AUTO, EngineError, EngineLost
from node.engine.llamacpp.block_states import BlockStates
from node.engine.llamacpp.embedding import Embedding
from node.engine.llamacpp.kv_budget import ROUNDED_TO, KvBudget
from node.engine.llamacpp.kv_memory import OWN_SEQUENCES, KvMemory, PassFailed, Piece, State
from node.engine.llamacpp.library import FLASH_ATTENTION_ON, GGML_KV_TYPES, Batch, Library
from node.engine.llamacpp.span_model import SpanModel
from node.engine.llamacpp.thread_tuner import ThreadTuner
from node.util.mapped_pages import drop_pages
from node.util.text import one_line

Floats = npt.NDArray[np.float32]

BATCH_ROWS: Final = 512
"""Of one call of llama.cpp; no fewer than there are sequences."""

PASS_ROWS: Final = 60
"""Of those that it computes at once (n_ubatch). From 64 rows on its flash attention, which calculates row by row, may
take another way with other rounding: a prompt would have other keys and values in chunks, or beside other sessions. It
does so only where keys and values have one type, which is not the case here; but more rows are no faster either."""

GPU_PASS_ROWS: Final = 512
"""On a GPU, where rounding depends on the number of rows anyway, and prefill on how many there are at once."""

_FINAL_NORM: Final = b"result_norm"
"""llama.cpp's name of the tensor that goes into the head."""

_LOGIT_BYTES: Final = 4

FIRST_POSITIONS: Final = 512
"""KV memory has room for so many at first, and doubles when sessions fill it: llama.cpp writes to all of it at once, so
that it is resident whether or not a session ever needs it."""

_BUSY_SHRINK: Final = 8
"""KV memory is given back beside sessions where they have needed no more than this part of it."""


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
    """How a span computes; `positions` and `sequences` are the limits of all sessions together.

    `embedding`: of a first span that is not the last. `kv`: the type of keys and values. `first_positions`: KV memory
    has room for so many at first; None for FIRST_POSITIONS. `scratch_dir`: of a file in which sessions are moved.
    """

    first: bool
    last: bool
    embedding: Embedding | None = None
    block_count: int
    positions: int
    sequences: int
    threads: int
    kv: str = AUTO
    first_positions: int | None = None
    scratch_dir: Path | None = None


def cells_for(positions: int) -> int:
    """Return how many cells of KV memory so many positions need.

    A quarter more: none is used again (`KvCells`) until the memory is compacted, which must not be every few rows.
    """
    return positions + positions // 4


class SpanContext:
    """KV memory of a span, and the passes over it. It has one thread of calls.

    `budget`: of memory that it shares with other contexts, in bytes, where a position takes `position_bytes`.
    """

    def __init__(
        self, model: SpanModel, options: ContextOptions, budget: KvBudget | None = None, position_bytes: int = 1
    ) -> None:
        self._library = library = model.library
        self._model = model
        self._options = options
        self.position_bytes = position_bytes
        self._budget = budget or KvBudget(cells_for(options.positions))
        self._pass_rows = GPU_PASS_ROWS if model.is_on_gpu else PASS_ROWS
        self._states = BlockStates(library, model.hidden_size)
        self._is_watched = not options.last
        """Whether the context asks for each tensor if it is wanted. A last span's does once a part of it has run."""
        self._opened = _Opened(self._states)
        weakref.finalize(self, _free, library, self._opened, model)
        self._kv = KvMemory(library, options.sequences, model.window)
        library.take_error()
        self._most_needed = 0  # cells, since it was last asked to give memory back
        self._limit = cells_for(options.positions)
        self._first = min(cells_for(options.first_positions or FIRST_POSITIONS), self._limit)
        if (context := self._open(self._first, self._is_watched)) is None:
            reason = library.take_error() or "too little memory"
            raise EngineError(f"llama.cpp has no KV cache of type {options.kv} for {self._first} positions: {reason}")
        self._use(context)
        self._batch = _BatchArrays(BATCH_ROWS, None if options.first and options.last else model.hidden_size)
        self._tuner = ThreadTuner(1 if model.is_on_gpu else options.threads)
        self._budget.add(self)

    @property
    def is_on_gpu(self) -> bool:
        """Whether its KV memory is a GPU's."""
        return self._model.is_on_gpu

    @property
    def positions(self) -> int:
        """Cells of its KV memory."""
        return self._positions

    @property
    def needed(self) -> int:
        """Cells that it needs for what its sequences hold."""
        return cells_for(self._kv.cells.held)

    def _open(self, positions: int, is_watched: bool) -> int | None:
        """Return a context with KV memory for `positions`, or None where there is no memory for it."""
        parameters = self._parameters(positions, is_watched)
        context: int | None = self._library.llama_init_from_model(self._model.handle, parameters) or None
        if context is not None and not self._model.is_on_gpu:
            # llama.cpp has written zeros to the logits of as many rows as there may be sequences.
            row_bytes = self._model.vocabulary_size * _LOGIT_BYTES
            drop_pages(self._library.llama_get_logits(context), parameters.n_seq_max * row_bytes)
        return context

    def _use(self, context: int) -> None:
        self._opened.context = self._context = context
        self._positions: int = self._library.llama_n_ctx(context)
        self._kv.use(context)

    def _parameters(self, positions: int, is_watched: bool) -> Any:
        options = self._options
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = max(1, -(-positions // ROUNDED_TO)) * ROUNDED_TO  # 0 is all that the model was trained for
        parameters.n_batch, parameters.n_ubatch = BATCH_ROWS, self._pass_rows
        parameters.n_seq_max = options.sequences + OWN_SEQUENCES
        parameters.n_outputs_max_per_seq = BATCH_ROWS
        parameters.n_threads = parameters.n_threads_batch = options.threads
        parameters.kv_unified = True  # any session may use any part of the memory
        parameters.type_k = parameters.type_v = GGML_KV_TYPES[options.kv]
        if options.kv == AUTO and not self._model.is_on_gpu:
            # With values in f16, too, each thread calculates the attention of a single row over a part of the cells: so
            # rounding depends on threads, on what else is in memory, and on whether drafts are verified beside the row.
            parameters.type_v = GGMLQuantizationType.BF16
            if self._model.is_latent:
                parameters.type_k = GGMLQuantizationType.BF16
        # Without it, attention depends on the number of rows, holds weights over all positions of the memory, and takes
        # no quantised values.
        parameters.flash_attn_type = FLASH_ATTENTION_ON
        parameters.swa_full = True  # else a rollback would reach behind the window
        if is_watched:
            parameters.cb_eval = self._states.callback
        return parameters

    def run(
        self, parts: Sequence[SequenceRows], block_count: int | None = None, *, embeds: bool = False
    ) -> list[Floats]:
        """Return for each part the hidden states of its rows or, on a last span, logits after its trailing ones.

        `block_count`: only so many of the span's blocks are run, and hidden states returned; a sequence always has the
        same. `embeds`: on a last span, instead of logits all rows behind the final norm. Positions that a sequence
        holds from a part's on are dropped first (a rollback). Raises PassFailed; what the parts have written into KV
        memory is dropped then.
        """
        block_count = block_count or self._options.block_count
        returns_states = not self._options.last or block_count < self._options.block_count or embeds
        self._states.expect(_FINAL_NORM if embeds else f"l_out-{block_count - 1}".encode() if returns_states else None)
        if embeds:  # llama.cpp computes the final norm of output rows only
            parts = [replace(part, outputs=len(part.rows)) for part in parts]
        for part in parts:
            self.truncate(part.sequence, part.position)
            if part.position != self._kv.cells.end(part.sequence):
                raise PassFailed("the positions before these rows are no longer in KV memory")
        if (embedding := self._options.embedding) is not None:
            parts = [replace(part, rows=embedding.rows(part.rows)) for part in parts]
        if returns_states and not self._is_watched:
            self._compact(self._positions, is_watched=True)
        self._make_room(sum(len(part.rows) for part in parts))
        for part in parts:
            self._kv.cells.write(part.sequence, part.position, len(part.rows))
        outputs: list[list[Floats]] = [[] for _ in parts]
        try:
            for pieces in self._batches(parts, self._pass_rows if embeds else BATCH_ROWS):
                self._decode(pieces, outputs, returns_states)
        except PassFailed:
            for part in parts:
                self.truncate(part.sequence, part.position)
            raise
        width = self._model.hidden_size if returns_states else self._model.vocabulary_size
        return [np.concatenate(each) if each else np.empty((0, width), np.float32) for each in outputs]

    def _make_room(self, rows: int) -> None:
        """See to it that so many rows more find cells, and that attention has not too many given up to pass over."""
        needed = cells_for(self._kv.cells.held + rows)
        self._most_needed = max(self._most_needed, needed)
        if needed > self._positions < self._limit:
            self.resize(min(self._budget.positions_for(self, needed), self._limit))
        elif self._kv.cells.taken + rows > min(self._positions, 2 * needed + FIRST_POSITIONS):
            self._compact(self._positions, self._is_watched)

    def _batches(self, parts: Sequence[SequenceRows], rows: int) -> Sequence[Sequence[tuple[int, SequenceRows]]]:
        """Return the parts by number, cut and packed into calls of so many rows.

        llama.cpp holds memory for the logits of a call's outputs, also where it does not compute them.
        """
        batches: list[list[tuple[int, SequenceRows]]] = [[]]
        room = rows
        for number, part in enumerate(parts):
            start, count = 0, len(part.rows)
            while start < count:
                if room == 0:
                    batches.append([])
                    room = rows
                end = min(count, start + room)
                outputs = max(0, part.outputs - (count - end))
                piece = SequenceRows(
                    part.sequence, part.position + start, part.rows[start:end], min(outputs, end - start)
                )
                batches[-1].append((number, piece))
                room -= end - start
                start = end
        return batches

    def _decode(
        self, pieces: Sequence[tuple[int, SequenceRows]], outputs: list[list[Floats]], returns_states: bool
    ) -> None:
        count = self._batch.fill([piece for _, piece in pieces], last=self._options.last)
        self._states.taken.clear()
        threads = self._tuner.threads(count, self._states.name)
        self._library.llama_set_n_threads(self._context, threads, threads)
        started_s = time.perf_counter()
        failed = self._library.llama_decode(self._context, self._batch.batch)
        if failed:
            raise PassFailed(f"llama.cpp could not compute {count} rows (error {failed})")
        self._tuner.record(count, time.perf_counter() - started_s, self._states.name)
        states = self._read_states(count) if returns_states else None
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
        if (found := sum(map(len, taken))) != count:
            raise PassFailed(f"llama.cpp computed {found} rows of hidden states, not {count}")
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    def _logits(self, row: int) -> Floats:
        pointer = self._library.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise PassFailed("llama.cpp has no logits of a row that it was asked for")
        return np.ctypeslib.as_array(pointer, (1, self._model.vocabulary_size)).copy()

    def resize(self, positions: int) -> None:
        """Move what the sequences hold into KV memory of another size. Raises as `_compact` does."""
        self._compact(positions, self._is_watched)

    def shrink(self, *, idle: bool) -> None:
        """Give back KV memory beyond what it began with: what sequences do not need, or have not since the last time.

        While there are sessions (`idle` is false) they wait for what is moved: then most of the memory must be free.
        """
        positions = max(self.needed, self._first, 0 if idle else self._most_needed)
        self._most_needed = self.needed
        if positions <= self._positions // (2 if idle else _BUSY_SHRINK):
            with suppress(PassFailed):  # all is as before
                self.resize(positions)

    def _compact(self, positions: int, is_watched: bool) -> None:
        """Write what the sequences hold, and nothing else, one after the other into KV memory: defragment or resize it.

        By way of a file, as memory is planned for one context only. Raises PassFailed where all is as before, and
        EngineLost where it is not.
        """
        is_cleared, failure = False, None
        try:
            with self._saved() as (file, pieces):
                is_cleared = True
                if positions == self._positions and is_watched == self._is_watched:
                    self._kv.clear()
                else:
                    failure = self._reopen(positions, is_watched)
                if not self._kv.restore(pieces, file):
                    raise EngineLost("llama.cpp has lost what its sessions held")
        except (OSError, MemoryError) as error:
            if is_cleared:
                raise EngineLost(f"llama.cpp has lost what its sessions held: {one_line(error)}") from None
            raise PassFailed(f"cannot move sessions in KV memory: {one_line(error)}") from None
        if failure is not None:
            raise PassFailed(failure)

    @contextmanager
    def _saved(self) -> Iterator[tuple[IO[bytes], Sequence[Piece]]]:
        """Give a file with what the sequences hold: in memory where the disk has no room. Raises MemoryError."""
        with ExitStack() as files:
            try:
                file: IO[bytes] = files.enter_context(TemporaryFile(dir=self._options.scratch_dir))
                pieces = self._kv.save(file)
            except OSError:  # a full disk does not end what is served
                file = io.BytesIO()
                pieces = self._kv.save(file)
            yield file, pieces

    def _reopen(self, positions: int, is_watched: bool) -> str | None:
        """Exchange the context for an empty one, like the former where the wanted one is not to be had: return why."""
        self._library.llama_free(self._context)
        self._opened.context = failure = None
        if (context := self._open(positions, is_watched)) is None:
            failure = f"llama.cpp has too little memory for {positions} positions of KV cache"
            is_watched = self._is_watched
            context = self._open(self._positions, is_watched)
        if context is None:
            raise EngineLost(failure or "")
        self._use(context)
        self._is_watched = is_watched
        return failure

    def end(self, sequence: int) -> int:
        """Return the position after a sequence's last one."""
        return self._kv.cells.end(sequence)

    def truncate(self, sequence: int, position: int) -> None:
        """Drop a sequence's positions from one on."""
        self._kv.truncate(sequence, position)

    def drop(self, sequence: int, start: int, end: int) -> None:
        """Drop some of a sequence's positions."""
        self._kv.drop(sequence, start, end)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Append positions of another sequence to a sequence. Raises PassFailed where there is no room.

        They share their cells, unless those come before the target's own.
        """
        if not self._kv.share(source, target, start, end):
            self._make_room(end - start)
            self._kv.duplicate(source, target, start, end)

    def states(self, sequence: int, start: int, end: int) -> Sequence[State]:
        """Return what some of a sequence's positions hold, for `append`. Raises MemoryError."""
        return tuple(self._kv.states(sequence, start, end))

    def append(self, sequence: int, start: int, end: int, states: Sequence[State]) -> None:
        """Append positions to a sequence. Raises PassFailed where there is no room."""
        self._make_room(end - start)
        self._kv.append(sequence, start, end, states)


@dataclass(slots=True)
class _Opened:
    """The context in use, and the callback that must live as long."""

    states: BlockStates
    context: int | None = None


def _free(library: Library, opened: _Opened, _model: SpanModel) -> None:
    """Free a context; its model must live until then."""
    if opened.context is not None:
        library.llama_free(opened.context)


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
