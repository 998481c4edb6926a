"""The engine of one span of a GGUF package and its sessions, in this process and thread."""

import time
from collections.abc import Sequence
from typing import Final

import psutil

from node.engine.interface import PAGE_POSITIONS, EngineError, EngineOptions, ShardSource, SpanInfo, Variant
from node.engine.kv_allocator import KvReservation
from node.engine.llamacpp.context import FIRST_POSITIONS, ContextOptions, Floats, PassFailed, SequenceRows, SpanContext
from node.engine.llamacpp.embedding import Embedding
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.sequences import Sequences
from node.engine.llamacpp.span_file import EMBEDDING, assembled_span, kv_bytes_per_position, tensors_of, weight_bytes
from node.engine.memory_plan import GGUF_COSTS, ModelSizes, mebibytes, memory_plan
from node.engine.shard import FREE_MEMORY_SHARE, Array, SessionRows, Shard
from node.models.manifest import constant_positions
from node.util.processor import physical_cores
from protocol.identity import BlockRange
from protocol.limits import MAX_POSITIONS
from selector.cuts import Cuts

LLAMACPP: Final = Variant("llamacpp", "native")
"""The one variant of a GGUF package, and so its reference: llama.cpp, with the weights as they were published."""

_SEQUENCES: Final = 256  # LLAMA_MAX_SEQ
"""Of open sessions, and of closed ones with cached pages."""


class LlamaShard(Shard[int]):
    """A span of a GGUF package; where a session holds its keys and values is a sequence of llama.cpp's."""

    def __init__(self, source: ShardSource, blocks: BlockRange, options: EngineOptions) -> None:
        super().__init__()
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

    def run_alone(self, variant: Variant, rows: Array, *, draws: int) -> Floats:
        """Return hidden states or logits as Shard describes it; not while sessions take up the KV memory."""
        self.prepare(variant)
        sequence = self._sequences.take()
        try:
            return self._context.run([SequenceRows(sequence, 0, rows, draws)])[0]
        except PassFailed as error:
            raise EngineError(str(error)) from None
        finally:
            self._sequences.free(sequence)

    def _reserve(self, reservation: KvReservation) -> int:
        return self._sequences.begin(reservation)

    def _release(self, kv: int) -> None:
        self._sequences.close(kv)

    def _compute(self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[int]]) -> Sequence[Floats]:
        rows = [SequenceRows(part.kv, part.position, part.rows, part.draws) for part in parts]
        return self._context.run(rows, len(blocks))


def _kv_positions(options: EngineOptions, blocks: BlockRange, taken: int, position_bytes: int, hidden_size: int) -> int:
    """Return how many positions, in whole pages, fit into the memory that weights and reserve leave.

    A third of it is left for the moment when KV memory has doubled, and the former is not yet given back.
    """
    memory_bytes = options.memory_bytes
    if memory_bytes is None:
        memory_bytes = taken + int(psutil.virtual_memory().available * FREE_MEMORY_SHARE)
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
