"""The engine of one span of a GGUF package and its sessions, in this process and thread.

llama.cpp computes it, and is the reference. Besides, onnxruntime can compute spans of the Llama family with the same
quantised weights, for jobs that accept its rounding of activations; neither torch nor transformers is imported for it.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple, cast

import psutil

from node.engine.graphs.runner import GraphRows, PageSlots
from node.engine.interface import (
    AUTO,
    PAGE_POSITIONS,
    EngineError,
    EngineLost,
    EngineOptions,
    ShardSource,
    SpanInfo,
    Variant,
)
from node.engine.kv_allocator import KvReservation
from node.engine.llamacpp.context import ContextOptions, Floats, SequenceRows, SpanContext, cells_for
from node.engine.llamacpp.embedding import Embedding
from node.engine.llamacpp.graph_variant import GRAPHS, GraphVariant
from node.engine.llamacpp.kv_budget import KvBudget
from node.engine.llamacpp.kv_memory import OWN_SEQUENCES, PassFailed
from node.engine.llamacpp.library import GGML_KV_TYPES, load_library
from node.engine.llamacpp.sequences import Sequences
from node.engine.llamacpp.span_file import EMBEDDING, kv_bytes_per_position, load_span, tensors_of, weight_bytes
from node.engine.llamacpp.span_model import SpanModel
from node.engine.memory_plan import GGUF_COSTS, ModelSizes, mebibytes, memory_plan
from node.engine.shard import FREE_MEMORY_SHARE, Array, SessionRows, Shard
from node.models.manifest import find_integer, longest_text
from node.util.processor import physical_cores
from protocol.identity import BlockRange
from protocol.limits import MAX_POSITIONS
from selector.cuts import Cuts

LLAMACPP: Final = Variant("llamacpp", "native")
"""The reference of a GGUF package: llama.cpp, with the weights as they were published."""

_NARROW_FIRST_POSITIONS: Final = 256
"""Of KV memory that only some jobs use, if any."""

_SEQUENCES: Final = 256 - OWN_SEQUENCES  # LLAMA_MAX_SEQ
"""Of open sessions, and of closed ones with cached pages."""


class _Held(NamedTuple):
    """A sequence in the KV memory of a variant of llama.cpp's."""

    sequences: Sequences
    sequence: int


Kv = _Held | PageSlots
"""Where a session holds its keys and values: a sequence of llama.cpp's, or pages of the graphs' memory."""


class LlamaShard(Shard[Kv]):
    """A span of a GGUF package. Variants of llama.cpp are other types of keys and values, beside the same weights."""

    def __init__(self, source: ShardSource, blocks: BlockRange, options: EngineOptions) -> None:
        super().__init__()
        started_s = time.perf_counter()
        library = load_library()
        tensors = tensors_of(source)
        weights = weight_bytes(tensors, blocks)
        kv_bytes = {kv: kv_bytes_per_position(tensors, blocks, kind) for kv, kind in GGML_KV_TYPES.items()}
        position_bytes = kv_bytes[AUTO]
        plan = memory_plan(ModelSizes.of_source(source, Cuts(tensors.block_count)), blocks, GGUF_COSTS)
        self._options = options
        self._graphs = GraphVariant(library, tensors, blocks)
        page_bytes = {kv: _page_bytes(each, options, tensors.hidden_size) for kv, each in kv_bytes.items()}
        shares = {kv: each / page_bytes[AUTO] for kv, each in page_bytes.items() if each < page_bytes[AUTO]}
        reserved = weights + plan.reserve_bytes
        narrowest = min([1.0, *shares.values()])
        kv_positions = _kv_positions(options, blocks, reserved, page_bytes[AUTO], self._graphs, narrowest)
        sequences = min(_SEQUENCES, kv_positions // PAGE_POSITIONS + 1)  # each but that of `run_alone` has a page
        first, last = blocks.start == 0, blocks.end == tensors.block_count
        self._context_options = ContextOptions(
            first=first,
            last=last,
            embedding=None if last or not first else Embedding(library, tensors.common, tensors.tensors[EMBEDDING]),
            block_count=len(blocks),
            positions=kv_positions,
            sequences=sequences,
            threads=options.threads or physical_cores(),
            scratch_dir=options.cache_dir,
        )
        self._model = load_span(
            options.cache_dir, source, tensors, blocks, lambda path: SpanModel(library, path, options.device)
        )
        self._kv_bytes = kv_bytes
        self._budget = KvBudget(cells_for(kv_positions) * position_bytes)
        self._kv = {LLAMACPP: self._open(self._context_options)}
        self.info = SpanInfo(
            model=source.model,
            blocks=blocks,
            block_count=tensors.block_count,
            hidden_size=tensors.hidden_size,
            vocabulary_size=find_integer(source.config, ("vocab_size",)) or tensors.vocabulary_size,
            max_positions=min(longest_text(source.config, source.format) or MAX_POSITIONS, MAX_POSITIONS),
            kv_bytes_per_position=position_bytes,
            kv_positions=kv_positions,
            weight_bytes=weights,
            load_s=time.perf_counter() - started_s,
            kv_shares=shares,
            max_sequences=sequences - 1,
            engine=library.build(),
        )

    def _open(self, options: ContextOptions) -> Sequences:
        context = SpanContext(self._model, options, self._budget, self._kv_bytes[options.kv])
        return Sequences(context, options.sequences, self._budget)

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are ready."""
        return frozenset({*self._kv, GRAPHS} if self._graphs.is_built else self._kv)

    def prepare(self, variant: Variant) -> None:
        """Build a variant or open its KV memory; may run beside `step`. Raises EngineError where it is unavailable."""
        if variant == GRAPHS:
            self._graphs.build(self.info, self._options)
            return
        if variant in self._kv:
            return
        if variant._replace(kv=AUTO) != LLAMACPP or variant.kv not in GGML_KV_TYPES:
            raise EngineError(f"{variant} is not for GGUF packages, whose weights serve as they were published")
        options = self._context_options
        positions = options.positions * self._kv_bytes[AUTO] // self._kv_bytes[variant.kv]
        self._kv[variant] = self._open(
            replace(options, kv=variant.kv, positions=positions, first_positions=_NARROW_FIRST_POSITIONS)
        )

    def unload_reference(self) -> None:
        """Nothing to do: the reference is what serves."""

    def trim(self, dropped: Sequence[int], *, idle: bool) -> None:
        """Give memory back as Shard describes it, but for what the prefix cache holds."""
        for sequences in tuple(self._kv.values()):
            sequences.forget(dropped)
            sequences.set_aside()
            sequences.context.shrink(idle=idle)
        super().trim(dropped, idle=idle)

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
        sequences = self._kv[variant]
        sequence = sequences.take()
        try:
            return sequences.context.run([SequenceRows(sequence, 0, rows, draws)])[0]
        except PassFailed as error:
            raise EngineError(str(error)) from None
        finally:
            sequences.free(sequence)

    def _is_lost(self, error: Exception) -> bool:
        return isinstance(error, EngineLost)

    def _reserve(self, variant: Variant, reservation: KvReservation) -> Kv:
        for each in tuple(self._kv.values()):
            each.forget((*reservation.dropped, *reservation.pages))
        if variant == GRAPHS:
            self._graphs.span.copy(reservation.copied, reservation.pages[: len(reservation.copied)])
            return PageSlots(reservation.pages)
        sequences = self._kv[variant]
        return _Held(sequences, sequences.begin(reservation))

    def _release(self, kv: Kv) -> None:
        if isinstance(kv, _Held):  # the allocator gives pages to others, who write over them
            kv.sequences.close(kv.sequence)

    def _give_back(self, pages: Sequence[int]) -> None:
        if self._graphs.is_built:  # llama.cpp's memory is not in pages: see SpanContext.shrink
            self._graphs.span.give_back(pages)

    def _compute(self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[Kv]]) -> Sequence[Floats]:
        return self._run_parts(variant, blocks, parts, embeds=False)

    def _embed(self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[Kv]]) -> Sequence[Floats]:
        return self._run_parts(variant, blocks, parts, embeds=True)

    def _run_parts(
        self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[Kv]], *, embeds: bool
    ) -> Sequence[Floats]:
        if variant == GRAPHS:
            given = [GraphRows(p.rows, cast("PageSlots", p.kv), p.position, p.draws) for p in parts]
            return self._graphs.span.run(given, embeds=embeds)
        rows = [SequenceRows(cast("_Held", p.kv).sequence, p.position, p.rows, p.draws) for p in parts]
        return self._kv[variant].context.run(rows, len(blocks), embeds=embeds)


def _page_bytes(position_bytes: int, options: EngineOptions, hidden_size: int) -> int:
    """Return what a page takes: its keys and values, and the rows queued for it where the span plans for them."""
    return cells_for(PAGE_POSITIONS) * position_bytes + (PAGE_POSITIONS * 4 * hidden_size if options.plan_rows else 0)


def _kv_positions(
    options: EngineOptions, blocks: BlockRange, taken: int, page_bytes: int, graphs: GraphVariant, narrowest: float
) -> int:
    """Return how many positions, in whole pages, fit into the memory that weights, reserve and graphs leave."""
    memory_bytes = options.memory_bytes
    if memory_bytes is None:
        memory_bytes = taken + int(psutil.virtual_memory().available * FREE_MEMORY_SHARE)
    free_bytes = memory_bytes - taken
    pages = free_bytes // page_bytes
    if pages < 1:
        raise EngineError(
            f"blocks {blocks} need {mebibytes(page_bytes - free_bytes)} of memory more than the "
            f"{mebibytes(memory_bytes)} given: weights and reserve take {mebibytes(taken)}"
        )
    pages = graphs.pages_beside(free_bytes, page_bytes, narrowest) or pages
    if options.kv_positions is not None:
        pages = min(pages, -(-options.kv_positions // PAGE_POSITIONS))
    return pages * PAGE_POSITIONS
