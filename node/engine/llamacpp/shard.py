"""The engine of one span of a GGUF package and its sessions, in this process and thread.

llama.cpp computes it, and is the reference. Besides, onnxruntime can compute spans of the Llama family with the same
quantised weights, for jobs that accept its rounding of activations; neither torch nor transformers is imported for it.
"""

import time
from collections.abc import Sequence
from typing import Final, cast

import psutil

from node.engine.graphs.runner import GraphRows, PageSlots
from node.engine.interface import PAGE_POSITIONS, EngineError, EngineOptions, ShardSource, SpanInfo, Variant
from node.engine.kv_allocator import KvReservation
from node.engine.llamacpp.context import FIRST_POSITIONS, ContextOptions, Floats, PassFailed, SequenceRows, SpanContext
from node.engine.llamacpp.embedding import Embedding
from node.engine.llamacpp.graph_variant import GRAPHS, GraphVariant
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
"""The reference of a GGUF package: llama.cpp, with the weights as they were published."""

_SEQUENCES: Final = 256  # LLAMA_MAX_SEQ
"""Of open sessions, and of closed ones with cached pages."""

Kv = int | PageSlots
"""Where a session holds its keys and values: a sequence of llama.cpp's, or pages of the graphs' memory."""


class LlamaShard(Shard[Kv]):
    """A span of a GGUF package."""

    def __init__(self, source: ShardSource, blocks: BlockRange, options: EngineOptions) -> None:
        super().__init__()
        started_s = time.perf_counter()
        library = load_library()
        tensors = tensors_of(source)
        weights = weight_bytes(tensors, blocks)
        position_bytes = kv_bytes_per_position(tensors, blocks)
        plan = memory_plan(ModelSizes.of_source(source, Cuts(tensors.block_count)), blocks, GGUF_COSTS)
        self._options = options
        self._graphs = GraphVariant(library, tensors, blocks)
        kv_positions = _kv_positions(
            options, blocks, weights + plan.reserve_bytes, position_bytes, tensors.hidden_size, self._graphs
        )
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
        """Return the variants that are ready."""
        return frozenset({LLAMACPP, GRAPHS} if self._graphs.is_built else {LLAMACPP})

    def prepare(self, variant: Variant) -> None:
        """Build a variant; may run beside `step`. Raises EngineError where it is unavailable."""
        if variant == GRAPHS:
            self._graphs.build(self.info, self._options)
        elif variant != LLAMACPP:
            raise EngineError(f"{variant} is not for GGUF packages, whose weights serve as they were published")

    def unload_reference(self) -> None:
        """Nothing to do: the reference is what serves."""

    def start_threads(self, variant: Variant) -> None:
        """Start the threads of graphs; llama.cpp starts its own with the first pass."""
        if variant == GRAPHS:
            self._graphs.start_threads(self._options)

    def run_alone(self, variant: Variant, rows: Array, *, draws: int) -> Floats:
        """Return hidden states or logits as Shard describes it; not while sessions take up the KV memory."""
        self.prepare(variant)
        if variant == GRAPHS:
            pages = PageSlots(range(-(-len(rows) // PAGE_POSITIONS)))
            return self._compute(variant, self.info.blocks, [SessionRows(rows, pages, 0, draws)])[0]
        sequence = self._sequences.take()
        try:
            return self._context.run([SequenceRows(sequence, 0, rows, draws)])[0]
        except PassFailed as error:
            raise EngineError(str(error)) from None
        finally:
            self._sequences.free(sequence)

    def _reserve(self, variant: Variant, reservation: KvReservation) -> Kv:
        if variant == LLAMACPP:
            return self._sequences.begin(reservation)
        self._sequences.give_up(reservation)
        self._graphs.span.copy(reservation.copied, reservation.pages[: len(reservation.copied)])
        return PageSlots(reservation.pages)

    def _release(self, kv: Kv) -> None:
        if isinstance(kv, int):  # the allocator gives pages to others, who write over them
            self._sequences.close(kv)

    def _compute(self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[Kv]]) -> Sequence[Floats]:
        if variant == GRAPHS:
            given = [GraphRows(p.rows, cast("PageSlots", p.kv), p.position, p.draws) for p in parts]
            return self._graphs.span.run(given)
        return self._context.run([SequenceRows(cast("int", p.kv), p.position, p.rows, p.draws) for p in parts])


def _kv_positions(
    options: EngineOptions, blocks: BlockRange, taken: int, position_bytes: int, hidden_size: int, graphs: GraphVariant
) -> int:
    """Return how many positions, in whole pages, fit into the memory that weights, reserve and graphs leave.

    A third of it is left for the moment when KV memory has doubled, and the former is not yet given back.
    """
    memory_bytes = options.memory_bytes
    if memory_bytes is None:
        memory_bytes = taken + int(psutil.virtual_memory().available * FREE_MEMORY_SHARE)
    free_bytes = memory_bytes - taken
    page_bytes = PAGE_POSITIONS * (position_bytes + (4 * hidden_size if options.plan_rows else 0))
    pages = free_bytes // page_bytes
    if pages < 1:
        raise EngineError(
            f"blocks {blocks} need {mebibytes(page_bytes - free_bytes)} of memory more than the "
            f"{mebibytes(memory_bytes)} given: weights and reserve take {mebibytes(taken)}"
        )
    pages = graphs.pages_beside(free_bytes, page_bytes) or pages
    if pages * PAGE_POSITIONS > FIRST_POSITIONS:
        pages = max(FIRST_POSITIONS // PAGE_POSITIONS, pages * 2 // 3)
    if options.kv_positions is not None:
        pages = min(pages, -(-options.kv_positions // PAGE_POSITIONS))
    return pages * PAGE_POSITIONS
