"""The engine of one span of one model and its sessions, in this process and thread."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from node.engine.admission import Placement, check_slice
from node.engine.cache import KvMemory, Places
from node.engine.codec import decode_rows, encode_rows
from node.engine.devices import CPU, free_bytes, synchronize
from node.engine.folders import FolderCache
from node.engine.forward import SpanModel
from node.engine.fused import FusedSegments, PackedSpan, pack_span
from node.engine.interface import (
    DIVISIBLE_ENGINES,
    PAGE_POSITIONS,
    REFERENCE,
    EngineError,
    SessionOptions,
    SliceInput,
    SliceOutput,
    SpanInfo,
    StepResult,
    Variant,
    VariantNotReady,
)
from node.engine.linear import ARITHMETICS
from node.engine.loading import load_span
from node.engine.ragged import RaggedSpan, Rows, Segments, refusal
from node.engine.sampling import TokenCounts, draw_until_wrong, history_for
from node.engine.source import EngineOptions, ShardSource
from protocol.identity import BlockRange, SessionId
from protocol.limits import MAX_POSITIONS
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

_FREE_MEMORY_SHARE = 0.5
"""Of the memory that is free, where the options do not say how much to use."""

_VARIANT_SHARE = 0.5
"""Of what the reference's weights leave, at most, for the weights of other variants; the rest is KV memory."""

_PACKED_BYTES = {
    "fused": {"fp32": 4.0, "bf16": 2.0, "int8": 1.0},
    "onnxruntime": {"fp32": 4.0, "int8": 1.125},
}
"""Bytes of an element in each packing of each engine; onnxruntime's int8 has a scale for each 32 elements."""


@dataclass(slots=True)
class _Session:
    options: SessionOptions
    info: SpanInfo
    """Of the part of the span that it runs."""
    positions: int
    places: Places
    length: int
    """Positions whose keys and values are in KV memory."""
    history: TokenCounts | None
    """Where draws depend on the tokens so far."""


class Shard:
    """Serves a span as Engine describes it, but at once, without overlap; who may hold which pages is told to it."""

    def __init__(self, source: ShardSource, blocks: BlockRange, options: EngineOptions) -> None:
        started_s = time.perf_counter()
        self._device = torch.device(options.device)
        span = load_span(source, blocks, torch.float32, self._device, options.memory_bytes)
        self._span = span
        self._model = SpanModel(span, first=blocks.start == 0, last=blocks.end == span.block_count)
        tried = self._model.try_out()
        kv_bytes_per_position = sum(block.bytes_per_position for block in tried)
        memory_bytes = _memory_bytes(options, span.weight_bytes)
        kv_positions = _kv_positions(
            options, memory_bytes - span.weight_bytes, span.weight_bytes, kv_bytes_per_position
        )
        self.info = SpanInfo(
            model=source.model,
            blocks=blocks,
            block_count=span.block_count,
            hidden_size=span.hidden_size,
            vocabulary_size=span.vocabulary_size,
            max_positions=min(span.max_positions or MAX_POSITIONS, MAX_POSITIONS),
            kv_bytes_per_position=kv_bytes_per_position,
            kv_positions=kv_positions,
            weight_bytes=span.weight_bytes,
            load_s=time.perf_counter() - started_s,
        )
        self._variant_bytes = memory_bytes - span.weight_bytes - kv_positions * kv_bytes_per_position
        self._memory = KvMemory([block.resized(kv_positions) for block in tried])
        self._threads = torch.get_num_threads()
        self._graph_cache = None if options.cache_dir is None else FolderCache(options.cache_dir)
        self._packed: dict[str, PackedSpan] = {}
        self._ragged: dict[Variant, RaggedSpan] = {}
        self._taken_bytes: dict[tuple[str, str], int] = {}
        """By engine and packing: variants of the same share their weights."""
        self._sessions: dict[SessionId, _Session] = {}

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are ready."""
        return frozenset({REFERENCE, *self._ragged})

    def prepare(self, variant: Variant) -> None:
        """Build a variant and warm it; may run beside `step` in a thread of its own, one at a time.

        Raises EngineError if it cannot be had: there is no such variant, or not for this architecture, or no memory.
        """
        if variant in self.variants():
            return
        packing = _packing(variant)
        if packing is None:
            raise EngineError(f"there is no variant {variant}")
        if why := refusal(self._span):
            raise EngineError(why)
        if variant.engine == "onnxruntime" and self._device.type != "cpu":
            raise EngineError(f"{variant} calculates on the CPU, and this span lies on {self._device}")
        needed = int(self.info.weight_bytes * _PACKED_BYTES[variant.engine][packing] / 4)
        shared = (variant.engine, packing)
        free = self._variant_bytes - sum(self._taken_bytes.values())
        if shared not in self._taken_bytes and needed > free:
            raise EngineError(f"{variant} takes {needed} bytes of memory, of which {max(0, free)} are left")
        segments = self._fuse(variant, packing) if variant.engine == "fused" else self._open_graphs(variant)
        ragged = RaggedSpan(self._span, segments, first=self.info.is_first, last=self.info.is_last)
        ragged.warm(self._memory.blocks)
        self._taken_bytes[shared] = needed
        self._ragged[variant] = ragged

    def start_threads(self, variant: Variant) -> None:
        """Start the threads that a variant's steps will need; from the thread of the steps, whose priority they get."""
        if variant.engine == "onnxruntime" and self._device.type == "cpu":
            from node.engine.graphs import start_threads  # only where it is asked for: it takes its time and memory

            start_threads(self._threads)

    def _fuse(self, variant: Variant, packing: str) -> Segments:
        if packing not in self._packed:
            self._packed[packing] = pack_span(self._span, packing, last=self.info.is_last)
        return FusedSegments(self._span, self._packed[packing], variant.arithmetic)

    def _open_graphs(self, variant: Variant) -> Segments:
        from node.engine.graphs import open_graphs

        self.start_threads(variant)
        name = f"{self.info.model}-{self.info.blocks.start}-{self.info.blocks.end}"
        try:
            return open_graphs(self._span, name, variant.arithmetic, self._graph_cache, last=self.info.is_last)
        except OSError as error:
            raise EngineError(f"no graphs for {variant}: {error}") from error

    def begin(self, session: SessionId, options: SessionOptions, placement: Placement) -> None:
        """Give a session its pages; raise EngineError for a variant that is not there."""
        if options.variant not in self.variants():
            raise VariantNotReady(f"the variant {options.variant} is not ready here")
        info = self.info.part(options.blocks)
        if info is not self.info and options.variant.engine not in DIVISIBLE_ENGINES:
            raise VariantNotReady(f"the variant {options.variant} runs the whole span or nothing")
        self._memory.copy(placement.copied, placement.pages[: len(placement.copied)])
        places = Places(placement.pages)
        history = history_for(options.sampling)
        self._sessions[session] = _Session(options, info, placement.positions, places, placement.cached, history)

    def run_alone(self, variant: Variant, rows: torch.Tensor, *, draws: int) -> torch.Tensor:
        """Return hidden states of rows from position 0 on or, on a last span, logits after the last `draws` of them.

        For measuring: there must be no sessions, since it writes into any pages. `rows`: token ids i64 (rows,) on a
        first span, hidden states f32 (rows, hidden size) elsewhere.
        """
        rows, pages = rows.to(self._device), range(-(-len(rows) // PAGE_POSITIONS))
        return self._compute(variant, self.info.blocks, [Rows(rows, Places(pages), 0, draws)])[0]

    def rename(self, session: SessionId, successor: SessionId) -> None:
        """Give a session another id; an unknown one is no error."""
        if (found := self._sessions.pop(session, None)) is not None:
            self._sessions[successor] = found

    def close(self, session: SessionId) -> None:
        """Forget a session; an unknown one is no error."""
        self._sessions.pop(session, None)

    def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run the slices, those of a variant together. On EngineError every session in the step is closed."""
        started_s = time.perf_counter()
        try:
            outputs = self._run(slices)
            synchronize(self._device)  # what nobody looked at may be under way still
        except Exception as error:  # torch fails in many ways; whichever, these sessions' caches are not to be trusted
            for rows in slices:
                self.close(rows.session)
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"the forward pass failed: {' '.join(str(error).split())[:300]}") from error
        return StepResult(outputs=outputs, compute_s=time.perf_counter() - started_s)

    def _run(self, slices: Sequence[SliceInput]) -> tuple[SliceOutput, ...]:
        sessions = [self._session_of(rows) for rows in slices]
        if len({rows.session for rows in slices}) < len(slices):
            raise EngineError("a session has more than one slice in a step")
        groups: dict[tuple[Variant, BlockRange], list[int]] = {}
        for number, session in enumerate(sessions):
            groups.setdefault((session.options.variant, session.info.blocks), []).append(number)
        computed: dict[int, torch.Tensor] = {}
        for (variant, blocks), numbers in groups.items():
            parts = [
                Rows(
                    self._input(slices[number].tensor, sessions[number].info),
                    sessions[number].places,
                    slices[number].position,
                    slices[number].draws,
                )
                for number in numbers
            ]
            computed |= zip(numbers, self._compute(variant, blocks, parts), strict=True)
        outputs = []
        for number, (rows, session) in enumerate(zip(slices, sessions, strict=True)):
            session.length = rows.position + rows.tensor.rows
            outputs.append(SliceOutput(session=rows.session, tensor=self._output(rows, session, computed[number])))
        return tuple(outputs)

    def _compute(self, variant: Variant, blocks: BlockRange, parts: Sequence[Rows]) -> Sequence[torch.Tensor]:
        """Return what blocks of the span make of each part: hidden states, or logits behind the model's last one."""
        run = range(blocks.start - self.info.blocks.start, blocks.end - self.info.blocks.start)
        if variant != REFERENCE:
            return self._ragged[variant].run(parts, self._memory, run)
        return [
            self._model.run(
                part.rows,
                self._model.new_cache(part.places, self._memory, part.position),
                position=part.position,
                draws=part.draws,
                blocks=run,
            )
            for part in parts
        ]

    def _session_of(self, rows: SliceInput) -> _Session:
        session = self._sessions.get(rows.session)
        if session is None:
            raise EngineError(f"session {rows.session.job}/{rows.session.stage} is not open, or has not begun")
        check_slice(session.info, rows, cached=session.length, reserved=session.positions)
        return session

    def _output(self, rows: SliceInput, session: _Session, output: torch.Tensor) -> Tensor:
        """Return hidden states on the wire, or the tokens drawn from logits."""
        if not session.info.is_last:
            return encode_rows(output.cpu().numpy(), session.options.activations)
        sampling = session.options.sampling
        assert sampling is not None
        first_drawn = rows.position + rows.tensor.rows - rows.draws + 1
        history = session.history
        if history is not None and rows.history is not None:
            history.tell(rows.history)
        return tensor_from_tokens(draw_until_wrong(output.cpu().numpy(), sampling, first_drawn, rows.drafts, history))

    def _input(self, tensor: Tensor, info: SpanInfo) -> torch.Tensor:
        """Return rows as the model takes them; token ids are checked, as torch may crash on bad ones."""
        if not info.is_first:
            return torch.from_numpy(decode_rows(tensor)).to(self._device)
        tokens = tokens_from_tensor(tensor)
        if min(tokens) < 0 or max(tokens) >= self.info.vocabulary_size:
            raise EngineError(f"a token id is not below {self.info.vocabulary_size}")
        return torch.tensor(tokens, device=self._device)


def open_shard(source: ShardSource, blocks: BlockRange, options: EngineOptions) -> Shard:
    """Return a shard. Raises EngineError where there can be none, also for what a GPU and its driver say."""
    try:
        return Shard(source, blocks, options)
    except torch.OutOfMemoryError:
        raise EngineError(f"{options.device} has too little memory left: see --memory") from None
    except RuntimeError as error:
        if options.device == CPU:
            raise
        raise EngineError(f"{options.device} failed: {' '.join(str(error).split())[:200]}") from None


def _packing(variant: Variant) -> str | None:
    """Return how a variant's weights are packed; None where there is no such variant."""
    packing = ARITHMETICS[variant.arithmetic][0] if variant.arithmetic in ARITHMETICS else None
    known = _PACKED_BYTES.get(variant.engine, {})
    return packing if variant.engine == "fused" or variant.arithmetic in known else None


def _memory_bytes(options: EngineOptions, weight_bytes: int) -> int:
    """Return how much memory weights, variants and KV memory may take together."""
    if options.memory_bytes is not None:
        return options.memory_bytes
    return weight_bytes + int(free_bytes(torch.device(options.device)) * _FREE_MEMORY_SHARE)


def _kv_positions(options: EngineOptions, free_bytes: int, weight_bytes: int, kv_bytes_per_position: int) -> int:
    """Return how many positions, in whole pages, fit into what the weights leave, beside the variants' own weights."""
    page_bytes = max(1, kv_bytes_per_position * PAGE_POSITIONS)
    engines = _PACKED_BYTES if torch.device(options.device).type == "cpu" else ("fused",)
    packed_bytes = sum(sum(_PACKED_BYTES[engine].values()) for engine in engines)
    variant_bytes = min(int(free_bytes * _VARIANT_SHARE), int(packed_bytes * weight_bytes / 4))
    pages = (free_bytes - max(0, variant_bytes)) // page_bytes
    if pages < 1:
        raise EngineError(
            f"{weight_bytes + free_bytes} bytes of memory are too few: the weights take {weight_bytes}, "
            f"and each page of {PAGE_POSITIONS} positions {page_bytes}"
        )
    if options.kv_positions is not None:
        pages = min(pages, -(-options.kv_positions // PAGE_POSITIONS))
    return pages * PAGE_POSITIONS
