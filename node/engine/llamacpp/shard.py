"""The engine of one span of a GGUF package and its sessions, in this process and thread."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psutil

from node.engine.activation_codec import check_rows, decode_rows, encode_rows
from node.engine.interface import (
    PAGE_POSITIONS,
    BadRows,
    EngineError,
    EngineOptions,
    SessionNotOpen,
    SessionOptions,
    ShardSource,
    SliceFault,
    SliceInput,
    SliceOutput,
    SpanInfo,
    StepFailed,
    StepResult,
    Variant,
    VariantNotReady,
)
from node.engine.kv_allocator import KvReservation, check_slice
from node.engine.llamacpp.context import FIRST_POSITIONS, ContextOptions, PassFailed, SequenceRows, SpanContext
from node.engine.llamacpp.embedding import Embedding
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.sequences import Sequences
from node.engine.llamacpp.span_file import EMBEDDING, assembled_span, kv_bytes_per_position, tensors_of, weight_bytes
from node.engine.memory_plan import GGUF_COSTS, ModelSizes, mebibytes, memory_plan
from node.engine.sampling import TokenCounts, draw_and_verify, history_for
from node.models.manifest import constant_positions
from node.util.processor import physical_cores
from protocol.identity import BlockRange, SessionId
from protocol.limits import MAX_POSITIONS
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor
from selector.cuts import Cuts

LLAMACPP: Final = Variant("llamacpp", "native")
"""The one variant of a GGUF package, and so its reference: llama.cpp, with the weights as they were published."""

_SEQUENCES: Final = 256  # LLAMA_MAX_SEQ
"""Of open sessions, and of closed ones with cached pages."""

_FREE_MEMORY_SHARE = 0.5
"""Of the free memory, by default."""

Rows = npt.NDArray[Any]


@dataclass(slots=True)
class _Session:
    options: SessionOptions
    positions: int
    sequence: int
    length: int
    """Positions whose keys and values are in KV memory."""
    history: TokenCounts | None
    """Where draws depend on the tokens so far."""


@dataclass(slots=True)
class _Batch:
    """The slices of a step, and their outcomes by number."""

    slices: Sequence[SliceInput]
    sessions: dict[int, _Session] = field(default_factory=dict)
    rows: dict[int, SequenceRows] = field(default_factory=dict)
    outputs: dict[int, SliceOutput] = field(default_factory=dict)
    faults: dict[int, SliceFault] = field(default_factory=dict)

    def fail(self, number: int, error: Exception) -> None:
        self.faults[number] = SliceFault(self.slices[number].session, str(error), isinstance(error, BadRows))


class LlamaShard:
    """Serves a span as Engine describes it, synchronously; the KV allocator runs elsewhere."""

    def __init__(self, source: ShardSource, blocks: BlockRange, options: EngineOptions) -> None:
        started_s = time.perf_counter()
        library = load_library()
        tensors = tensors_of(source)
        weights = weight_bytes(tensors, blocks)
        position_bytes = kv_bytes_per_position(tensors, blocks)
        plan = memory_plan(ModelSizes.of_source(source, Cuts(tensors.block_count)), blocks, GGUF_COSTS)
        kv_positions = _kv_positions(options, blocks, weights + plan.reserve_bytes, position_bytes, tensors.hidden_size)
        sequences = min(_SEQUENCES, kv_positions // PAGE_POSITIONS + 1)  # each but that of `run_alone` has a page
        first, last = blocks.start == 0, blocks.end == tensors.block_count
        limits = ContextOptions(
            first=first,
            last=last,
            embedding=None if last or not first else Embedding(library, tensors.common, tensors.tensors[EMBEDDING]),
            block_count=len(blocks),
            positions=kv_positions,
            sequences=sequences,
            threads=options.threads or physical_cores(),
        )
        with assembled_span(options.cache_dir, source, tensors, blocks) as path:
            self._context = SpanContext(library, path, limits)
        self._sequences = Sequences(self._context, sequences)
        self._sessions: dict[SessionId, _Session] = {}
        self.info = SpanInfo(
            model=source.model,
            blocks=blocks,
            block_count=tensors.block_count,
            hidden_size=tensors.hidden_size,
            vocabulary_size=tensors.vocabulary_size,
            max_positions=min(constant_positions(source.config) or MAX_POSITIONS, MAX_POSITIONS),
            kv_bytes_per_position=position_bytes,
            kv_positions=kv_positions,
            weight_bytes=weights,
            load_s=time.perf_counter() - started_s,
            max_sequences=sequences - 1,
        )

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are ready: the only one."""
        return frozenset({LLAMACPP})

    def prepare(self, variant: Variant) -> None:
        """Raise EngineError for any variant but the one that is there."""
        if variant != LLAMACPP:
            raise EngineError(f"{variant} is not for GGUF packages, which llama.cpp computes as they were published")

    def unload_reference(self) -> None:
        """Nothing to do: the reference is what serves."""

    def start_threads(self, variant: Variant) -> None:
        """Nothing to do: llama.cpp starts its threads with the first pass."""

    def begin(self, session: SessionId, options: SessionOptions, reservation: KvReservation) -> None:
        """Begin a session on its pages; raise EngineError for a variant that is not ready."""
        if options.variant != LLAMACPP:
            raise VariantNotReady(f"the variant {options.variant} is not ready here")
        if self.info.part(options.blocks) is not self.info:
            raise VariantNotReady(f"the variant {options.variant} runs the whole span or nothing")
        try:
            sequence = self._sequences.begin(reservation)
        except EngineError:
            return  # the session's first slice is answered as that of one that is not open
        history = history_for(options.sampling)
        self._sessions[session] = _Session(options, reservation.positions, sequence, reservation.cached, history)

    def run_alone(self, variant: Variant, rows: Rows, *, draws: int) -> Rows:
        """Return hidden states of rows from position 0 on or, on a last span, logits after the last `draws` of them.

        For quality measurements, without sessions. `rows`: token ids i32 (rows,) on a first span, hidden states f32
        (rows, hidden size) elsewhere. Raises EngineError, also while sessions take up the KV memory.
        """
        self.prepare(variant)
        sequence = self._sequences.take()
        try:
            return self._context.run([SequenceRows(sequence, 0, rows, draws)])[0]
        except PassFailed as error:
            raise EngineError(str(error)) from None
        finally:
            self._sequences.free(sequence)

    def rename(self, session: SessionId, successor: SessionId) -> None:
        """Give a session another id; an unknown one is ignored."""
        if (found := self._sessions.pop(session, None)) is not None:
            self._sessions[successor] = found

    def close(self, session: SessionId) -> None:
        """Drop a session; an unknown one is ignored."""
        if (found := self._sessions.pop(session, None)) is not None:
            self._sequences.close(found.sequence)

    def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run the slices together. Sessions whose slices fail are closed; see Engine."""
        started_s = time.perf_counter()
        batch = _Batch(slices)
        counts = Counter(rows.session for rows in slices)
        for number, rows in enumerate(slices):
            try:
                session = batch.sessions[number] = self._session_of(rows, alone=counts[rows.session] == 1)
                batch.rows[number] = SequenceRows(session.sequence, rows.position, self._input(rows.tensor), rows.draws)
            except EngineError as error:
                batch.fail(number, error)
        if batch.rows:
            self._run(batch, list(batch.rows))
        for fault in batch.faults.values():
            self.close(fault.session)
        faults = tuple(fault for _, fault in sorted(batch.faults.items()))
        if faults and not batch.outputs:
            raise StepFailed(faults)
        outputs = tuple(output for _, output in sorted(batch.outputs.items()))
        return StepResult(outputs=outputs, compute_s=time.perf_counter() - started_s, faults=faults)

    def _run(self, batch: _Batch, numbers: Sequence[int]) -> None:
        """Run slices together; where that fails, each half of them again, until those that fail are alone."""
        for number in numbers:
            rows, session = batch.slices[number], batch.sessions[number]
            if rows.position < session.length:
                self._context.truncate(session.sequence, rows.position)
        try:
            computed = self._context.run([batch.rows[number] for number in numbers])
        except PassFailed as error:
            if len(numbers) == 1:
                batch.fail(numbers[0], error)
                return
            middle = len(numbers) // 2
            for half in (numbers[:middle], numbers[middle:]):
                self._run(batch, half)
            return
        for number, output in zip(numbers, computed, strict=True):
            rows, session = batch.slices[number], batch.sessions[number]
            try:
                tensor = self._output(rows, session, output)
            except EngineError as error:  # never BadRows: the input was checked, so the fault is here
                batch.fail(number, EngineError(str(error)))
                continue
            session.length = rows.position + rows.tensor.rows
            batch.outputs[number] = SliceOutput(session=rows.session, tensor=tensor)

    def _session_of(self, rows: SliceInput, *, alone: bool) -> _Session:
        if not alone:
            raise EngineError("a session has more than one slice in a step")
        session = self._sessions.get(rows.session)
        if session is None:
            raise SessionNotOpen(rows.session)
        check_slice(self.info, rows, cached=session.length, reserved=session.positions)
        return session

    def _output(self, rows: SliceInput, session: _Session, output: Rows) -> Tensor:
        if not self.info.is_last:
            check_rows(output)
            return encode_rows(output, session.options.activations)
        sampling = session.options.sampling
        assert sampling is not None
        first_drawn = rows.position + rows.tensor.rows - rows.draws + 1
        history = session.history
        if history is not None and rows.history is not None:
            history.reset(rows.history)
        return tensor_from_tokens(draw_and_verify(output, sampling, first_drawn, rows.drafts, history))

    def _input(self, tensor: Tensor) -> Rows:
        """Return rows as llama.cpp takes them; token ids are checked, as a bad one fails its whole batch."""
        if not self.info.is_first:
            return decode_rows(tensor)
        tokens = np.array(tokens_from_tensor(tensor), np.int32)
        if tokens.min() < 0 or tokens.max() >= self.info.vocabulary_size:
            raise BadRows(f"a token id is not below {self.info.vocabulary_size}")
        return tokens


def _kv_positions(options: EngineOptions, blocks: BlockRange, taken: int, position_bytes: int, hidden_size: int) -> int:
    """Return how many positions, in whole pages, fit into the memory that weights and reserve leave.

    A third of it is left for the moment when KV memory has doubled, and the former is not yet given back.
    """
    memory_bytes = options.memory_bytes
    if memory_bytes is None:
        memory_bytes = taken + int(psutil.virtual_memory().available * _FREE_MEMORY_SHARE)
    page_bytes = PAGE_POSITIONS * (position_bytes + (4 * hidden_size if options.plan_rows else 0))
    pages = (memory_bytes - taken) // page_bytes
    if pages < 1:
        raise EngineError(
            f"blocks {blocks} need {mebibytes(taken + page_bytes - memory_bytes)} of memory more than the "
            f"{mebibytes(memory_bytes)} given: weights and reserve take {mebibytes(taken)}"
        )
    if pages * PAGE_POSITIONS > FIRST_POSITIONS:
        pages = max(FIRST_POSITIONS // PAGE_POSITIONS, pages * 2 // 3)
    if options.kv_positions is not None:
        pages = min(pages, -(-options.kv_positions // PAGE_POSITIONS))
    return pages * PAGE_POSITIONS
