"""Continuous batching for the Llama family: rows of many sessions through a span at once, with paged attention.

Prefill chunks and decode rows of any sessions are concatenated into one matrix, so that each weight is read once in a
step for all of them. Only attention tells the sessions apart (`paged_attention.py`); the operations between one
attention and the next are a segment, and variants differ in the backend that calculates those. (vLLM splits its graphs
at the same places.) On a GPU steps of a row each are recorded as a whole (`decode_graphs.py`).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from node.engine.backends.decode_graphs import DecodeGraphs, DecodeInputs
from node.engine.backends.flash_attention import FlashAttention, flash_attention_on, flash_view
from node.engine.backends.interface import BackendContext, Rows, Step
from node.engine.backends.paged_attention import (
    MOST_GATHERED_ON_GPU,
    AttentionView,
    GatheredAttention,
    views_on_cpu,
    views_on_gpu,
)
from node.engine.interface import PAGE_POSITIONS
from node.engine.kv_cache import BlockKvCache, KvCache, SlotMapping
from node.engine.loading import DescribedModel, LoadedSpan

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose blocks are: norm, rotary grouped-query attention, norm, gated SiLU."""

_WARM_ROWS = (1, 2, 8, 32)


class RotaryTables(NamedTuple):
    """Cosines and sines that rotate the rows' queries and keys, f32 (rows, half of the head size) each."""

    cos: torch.Tensor
    sin: torch.Tensor


class QKV(NamedTuple):
    """Inputs of a block's attention, f32, the rows first: queries and then keys, both rotated; and values."""

    rotated: torch.Tensor
    values: torch.Tensor


class Segments(Protocol):
    """A span without its embedding and its attention. Rows are f32 (rows, hidden size)."""

    def qkv(self, number: int, hidden: torch.Tensor, rotary: RotaryTables) -> QKV:
        """Return the inputs of the attention of the first block that is run.

        That is the span's first; others only where the variant's engine runs any part.
        """

    def post_attention(
        self, number: int, hidden: torch.Tensor, attended: torch.Tensor, rotary: RotaryTables
    ) -> tuple[torch.Tensor, QKV | None]:
        """Complete a block (counted from the span's first), given its input and the output of its attention.

        `attended`: f32 (rows, heads * head size). Returns the block's output, and the inputs of the next block's
        attention, where there is one.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows that left a last span, (rows, vocabulary size)."""


class _Attention(NamedTuple):
    """A block's attention, rows apart."""

    scaling: float
    window: int | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """State that all blocks share in a step. `views`: what the rows attend to, by sliding window."""

    slots: torch.Tensor
    rotary: RotaryTables
    views: Mapping[int | None, Sequence[AttentionView]]


def refusal(described: DescribedModel) -> str | None:
    """Return why a model is not supported here, if it is not."""
    config: Any = described.config
    base: Any = described.base
    if config.model_type not in FAMILIES:
        return f"{config.model_type} models have no fast path"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act} has no fast path"
    if getattr(base.rotary_emb, "rope_type", "default") not in {"default", "linear", "llama3", "yarn"}:
        return "rotary frequencies that change with the length have no fast path"
    return None


def empty_kv_blocks(span: LoadedSpan, device: torch.device) -> list[BlockKvCache]:
    """Return the KV memory of each block of a supported span, without slots."""
    config = span.model.config
    blocks: Any = span.blocks
    shapes = [(0, config.num_key_value_heads, block.self_attn.head_dim) for block in blocks]
    return [BlockKvCache(*(torch.empty(shape, device=device) for _ in range(2))) for shape in shapes]


class BatchedSpan:
    """A span in one variant, warmed over memory in the shapes of `kv`; implements SpanRunner.

    `kv`: over which decode steps are recorded.
    """

    def __init__(self, context: BackendContext, segments: Segments, kv: KvCache) -> None:
        self._segments = segments
        span = context.span
        base: Any = span.base
        self._embedding = context.embedding
        self._device = context.device
        # A copy, as the reference's stays where that computes.
        self._rotary = copy.deepcopy(base.rotary_emb).to(self._device)
        config = span.model.config
        self._hidden_size = span.hidden_size
        self._vocabulary_size = span.vocabulary_size
        self._last = span.is_last
        self._heads: int = config.num_attention_heads
        self._epsilon: float = config.rms_norm_eps
        self._norm = base.norm.weight.to(self._device, torch.float32, copy=True) if span.is_last else None
        """The final one, for embeddings; that of logits is the segments'."""
        blocks: Any = span.blocks
        self._blocks = [
            _Attention(block.self_attn.scaling, window) for block, window in zip(blocks, span.windows, strict=True)
        ]
        self._tables = self._rotary_tables(PAGE_POSITIONS)
        self._kv = kv
        is_narrow = kv.blocks[0].keys.dtype == torch.bfloat16
        self._flash = flash_attention_on(self._device) if is_narrow else None
        # Through page tables nothing is gathered.
        most_positions = MOST_GATHERED_ON_GPU if self._flash is None else math.inf
        self._graphs = (
            DecodeGraphs(self._make_decode, context.capture, most_positions=most_positions) if context.capture else None
        )
        self._warm(kv)

    @torch.inference_mode()
    def _warm(self, kv: KvCache) -> None:
        pages = -(-max(_WARM_ROWS) // PAGE_POSITIONS)
        scratch = KvCache([block.resized(pages * PAGE_POSITIONS) for block in kv.blocks])
        for count in _WARM_ROWS:
            if self._embedding is not None:
                rows = torch.zeros(count, dtype=torch.long, device=self._device)
            else:
                rows = torch.zeros(count, self._hidden_size, device=self._device)
            self.run([Rows(rows, SlotMapping(range(pages)), 0, min(count, 2))], scratch)

    @torch.inference_mode()
    def run(
        self, slices: Sequence[Rows], kv: KvCache, blocks: range | None = None, *, embeds: bool = False
    ) -> list[torch.Tensor]:
        """Run the rows of several sessions together; see SpanRunner."""
        blocks = range(len(self._blocks)) if blocks is None else blocks
        last = self._last and blocks.stop == len(self._blocks) and not embeds
        if self._graphs is not None and kv is self._kv and len(blocks) == len(self._blocks) and not embeds:
            replayed = self._graphs.run(slices)
            if replayed is not None:
                return [row[: part.draws] if last else row for row, part in zip(replayed.split(1), slices, strict=True)]
        # Sessions with a single row first, and next to each other.
        order = sorted(range(len(slices)), key=lambda number: self._rank(slices[number]))
        ordered = [slices[number] for number in order]
        hidden = self._forward(torch.cat([part.rows for part in ordered]), self._plan(ordered, blocks), kv, blocks)
        if embeds and self._norm is not None:
            hidden = nn.functional.rms_norm(hidden, self._norm.shape, self._norm, self._epsilon)
        outputs = self._logits(hidden, ordered) if last else hidden.split([len(part.rows) for part in ordered])
        return [output for _, output in sorted(zip(order, outputs, strict=True), key=lambda pair: pair[0])]

    def _rank(self, part: Rows) -> tuple[int, int]:
        if self._device.type == "cpu":
            return int(len(part.rows) > 1), 0
        return len(part.rows), part.position  # those that are padded together, too

    def _forward(self, rows: torch.Tensor, plan: _Plan, kv: KvCache, blocks: range) -> torch.Tensor:
        """Return what leaves the last of the blocks."""
        hidden = rows
        if self._embedding is not None and blocks.start == 0:
            hidden = nn.functional.embedding(rows, self._embedding).float()
        qkv: QKV | None = self._segments.qkv(blocks.start, hidden, plan.rotary)
        for number in blocks:
            assert qkv is not None
            attended = self._attend(self._blocks[number], kv.blocks[number], qkv, plan)
            hidden, qkv = self._segments.post_attention(number, hidden, attended, plan.rotary)
        return hidden

    def _logits(self, hidden: torch.Tensor, slices: Sequence[Rows]) -> list[torch.Tensor]:
        counts = [part.draws for part in slices]
        if not any(counts):
            return [hidden.new_empty(0, self._vocabulary_size)] * len(slices)
        parts = hidden.split([len(part.rows) for part in slices])
        drawn = torch.cat([part[len(part) - count :] for part, count in zip(parts, counts, strict=True)])
        return list(self._segments.logits(drawn).split(counts))

    def _attend(self, block: _Attention, memory: BlockKvCache, qkv: QKV, plan: _Plan) -> torch.Tensor:
        """Write the rows' keys and values to the KV cache; return their attention: (rows, heads * size)."""
        groups, size = memory.keys.shape[1:]
        rotated = qkv.rotated.view(-1, self._heads + groups, size)
        queries = rotated[:, : self._heads]
        memory.keys.index_copy_(0, plan.slots, rotated[:, self._heads :].to(memory.keys.dtype))
        memory.values.index_copy_(0, plan.slots, qkv.values.view(-1, groups, size).to(memory.values.dtype))
        attended = [view.attend(queries, memory, block.scaling) for view in plan.views[block.window]]
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def _plan(self, slices: Sequence[Rows], blocks: range) -> _Plan:
        ends = [part.position + len(part.rows) for part in slices]
        self._extend_tables(max(ends))
        positions = torch.cat([torch.arange(p.position, end) for p, end in zip(slices, ends, strict=True)])
        positions = positions.to(self._device)
        slots = torch.cat([p.slots.all[p.position : end] for p, end in zip(slices, ends, strict=True)])
        rotary = RotaryTables(*(table[positions] for table in self._tables))
        windows = {self._blocks[number].window for number in blocks}
        return _Plan(slots.to(self._device), rotary, {window: self._views(slices, window) for window in windows})

    def _views(self, slices: Sequence[Rows], window: int | None) -> Sequence[AttentionView]:
        if self._flash is not None:
            return [flash_view(slices, window, self._device, self._flash)]
        if self._device.type == "cpu":
            return views_on_cpu(slices, window)
        return views_on_gpu(slices, window, self._device)

    def _make_decode(self, inputs: DecodeInputs) -> Step:
        """Return a decode step that reads its inputs and nothing else, so that it can be recorded."""
        pages = inputs.layout.shape[1] - 1
        size = inputs.page_positions
        self._extend_tables(pages * size)
        tables = self._tables
        offsets = torch.arange(pages * size, device=self._device)
        starts = torch.arange(len(inputs.layout) + 1, dtype=torch.int32, device=self._device)
        blocks, windows = range(len(self._blocks)), {block.window for block in self._blocks}

        def step() -> torch.Tensor:
            positions, table = inputs.layout[:, 0], inputs.layout[:, 1:]
            row = positions.unsqueeze(1)
            slots = table.gather(1, row // size) * size + row % size
            views: dict[int | None, list[AttentionView]] = {}
            if self._flash is not None:
                lengths, pages_i32 = (positions + 1).int(), table.int()
                for window in windows:
                    views[window] = [FlashAttention(self._flash, starts, lengths, pages_i32, size, 1, window)]
            else:
                every = (table.unsqueeze(2) * size + offsets[:size]).flatten(1)
                seen = offsets <= row
                # What is not seen was never written perhaps, and not finite: there the row's own slot is read.
                visible = torch.where(seen, every, slots).flatten()
                for window in windows:
                    mask = seen if window is None else seen & (offsets > row - window)
                    views[window] = [GatheredAttention(visible, mask[:, None, None])]
            rotary = RotaryTables(*(each[positions] for each in tables))
            hidden = self._forward(inputs.rows, _Plan(slots.squeeze(1), rotary, views), self._kv, blocks)
            return self._segments.logits(hidden) if self._last else hidden

        return step

    def _extend_tables(self, count: int) -> None:
        if count > len(self._tables[0]):
            self._tables = self._rotary_tables(max(count, 2 * len(self._tables[0])))

    def _rotary_tables(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines f32 (positions, half of the head size)."""
        positions = torch.arange(count, device=self._device).unsqueeze(0)
        with torch.inference_mode():
            cos, sin = self._rotary(torch.zeros(1, device=self._device), positions)
        half = sin.shape[-1] // 2  # of which the other is a copy
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
