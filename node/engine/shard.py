"""The engine of one span of one model and its sessions, in this process and thread."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from node.engine.admission import Placement, check_slice
from node.engine.cache import KvMemory, Places, RewindableCache
from node.engine.codec import decode_rows, encode_rows
from node.engine.forward import SpanModel
from node.engine.interface import (
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
from node.engine.loading import load_span
from node.engine.sampling import draw_until_wrong
from node.engine.source import EngineOptions, ShardSource
from protocol.identity import BlockRange, SessionId
from protocol.limits import MAX_POSITIONS
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

_FREE_MEMORY_SHARE = 0.5
"""Of the memory that is free, where the options do not say how much to use."""


@dataclass(frozen=True, slots=True)
class _Session:
    options: SessionOptions
    positions: int
    cache: RewindableCache


class Shard:
    """Serves a span as Engine describes it, but at once, without overlap; who may hold which pages is told to it."""

    def __init__(self, source: ShardSource, blocks: BlockRange, options: EngineOptions) -> None:
        started_s = time.perf_counter()
        span = load_span(source, blocks, torch.float32)
        self._model = SpanModel(span, first=blocks.start == 0, last=blocks.end == span.block_count)
        tried = self._model.try_out()
        kv_bytes_per_position = sum(block.bytes_per_position for block in tried)
        self.info = SpanInfo(
            model=source.model,
            blocks=blocks,
            block_count=span.block_count,
            hidden_size=span.hidden_size,
            vocabulary_size=span.vocabulary_size,
            max_positions=min(span.max_positions or MAX_POSITIONS, MAX_POSITIONS),
            kv_bytes_per_position=kv_bytes_per_position,
            kv_positions=_kv_positions(options, span.weight_bytes, kv_bytes_per_position),
            weight_bytes=span.weight_bytes,
            load_s=time.perf_counter() - started_s,
        )
        self._memory = KvMemory([block.resized(self.info.kv_positions) for block in tried])
        self._sessions: dict[SessionId, _Session] = {}

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are ready."""
        return frozenset({REFERENCE})

    def prepare(self, variant: Variant) -> None:
        """Build a variant. Raises EngineError if it cannot be had."""
        if variant != REFERENCE:
            raise EngineError(f"there is no variant {variant}")

    def begin(self, session: SessionId, options: SessionOptions, placement: Placement) -> None:
        """Give a session its pages; raise EngineError for a variant that is not there."""
        if options.variant != REFERENCE:
            raise VariantNotReady(f"the variant {options.variant} is not ready here")
        self._memory.copy(placement.copied, placement.pages[: len(placement.copied)])
        cache = self._model.new_cache(Places(placement.pages), self._memory, placement.cached)
        self._sessions[session] = _Session(options, placement.positions, cache)

    def close(self, session: SessionId) -> None:
        """Forget a session; an unknown one is no error."""
        self._sessions.pop(session, None)

    def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run the slices in order. Raises EngineError after it has closed every session in the step."""
        started_s = time.perf_counter()
        try:
            outputs = tuple(SliceOutput(session=rows.session, tensor=self._run(rows)) for rows in slices)
        except Exception as error:  # torch fails in many ways; whichever, these sessions' caches are not to be trusted
            for rows in slices:
                self.close(rows.session)
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"the forward pass failed: {' '.join(str(error).split())[:300]}") from error
        return StepResult(outputs=outputs, compute_s=time.perf_counter() - started_s)

    def _run(self, rows: SliceInput) -> Tensor:
        session = self._sessions.get(rows.session)
        if session is None:
            raise EngineError(f"session {rows.session.job}/{rows.session.stage} is not open, or has not begun")
        check_slice(self.info, rows, cached=session.cache.length, reserved=session.positions)
        output = self._model.run(self._input(rows.tensor), session.cache, position=rows.position, draws=rows.draws)
        if not self.info.is_last:
            return encode_rows(output.numpy(), session.options.activations)
        sampling = session.options.sampling
        assert sampling is not None
        first_drawn = rows.position + rows.tensor.rows - rows.draws + 1
        return tensor_from_tokens(draw_until_wrong(output.numpy(), sampling, first_drawn, rows.drafts))

    def _input(self, tensor: Tensor) -> torch.Tensor:
        """Return rows as the model takes them; token ids are checked, as torch may crash on bad ones."""
        if not self.info.is_first:
            return torch.from_numpy(decode_rows(tensor))
        tokens = tokens_from_tensor(tensor)
        if min(tokens) < 0 or max(tokens) >= self.info.vocabulary_size:
            raise EngineError(f"a token id is not below {self.info.vocabulary_size}")
        return torch.tensor(tokens)


def _kv_positions(options: EngineOptions, weight_bytes: int, kv_bytes_per_position: int) -> int:
    """Return how many positions, in whole pages, fit into the memory that the weights leave."""
    memory_bytes = options.memory_bytes
    if memory_bytes is None:
        memory_bytes = weight_bytes + int(psutil.virtual_memory().available * _FREE_MEMORY_SHARE)
    pages = (memory_bytes - weight_bytes) // max(1, kv_bytes_per_position * PAGE_POSITIONS)
    if pages < 1:
        raise EngineError(
            f"{memory_bytes} bytes of memory are too few: the weights take {weight_bytes}, "
            f"and each page of {PAGE_POSITIONS} positions {kv_bytes_per_position * PAGE_POSITIONS}"
        )
    if options.kv_positions is not None:
        pages = min(pages, -(-options.kv_positions // PAGE_POSITIONS))
    return pages * PAGE_POSITIONS
