"""Continuous batching for the Llama family: rows of many sessions through a span at once, with paged attention.

Prefill chunks and decode rows of any sessions are concatenated into one matrix, so that each weight is read once in a
step for all of them. Only attention treats the sessions one by one, in place in KV memory; the operations between one
attention and the next are a segment, and variants differ in the backend that calculates those. (vLLM splits its graphs
at the same places.)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from node.engine.backends.interface import BackendContext, Rows
from node.engine.interface import PAGE_POSITIONS
from node.engine.kv_cache import BlockKvCache, KvCache, SlotMapping
from node.engine.loading import LoadedSpan

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose blocks are: norm, rotary grouped-query attention, norm, gated SiLU."""

_WARM_ROWS = (1, 2, 8, 32)

_MOST_GATHERED = 192
"""Positions up to which the attention of several sessions is gathered: beyond, the copy costs more than operations."""


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
class _AttentionView:
    """The positions that the rows of one session attend to in a block; `mask` where not all of them see all."""

    span: slice
    visible: slice | torch.Tensor
    mask: torch.Tensor | None
    causal: bool

    def attend(self, queries: torch.Tensor, memory: BlockKvCache, scaling: float) -> torch.Tensor:
        queries = queries[self.span]
        rows, heads, size = queries.shape
        groups = memory.keys.shape[1]
        keys, values = (there[self.visible].transpose(0, 1).unsqueeze(0) for there in (memory.keys, memory.values))
        if rows == 1:
            # It attends to every position, so the heads of a group are passed as rows, and no key is repeated.
            grouped = queries.view(1, groups, heads // groups, size)
            attended = nn.functional.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
            return attended.reshape(1, heads * size)
        if queries.device.type != "cpu":  # no fp32 kernel there has grouped queries: it would materialise all scores
            keys, values = (each.repeat_interleave(heads // groups, dim=1) for each in (keys, values))
        attended = nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=self.mask,
            is_causal=self.causal,
            scale=scaling,
            enable_gqa=heads != keys.shape[1],
        )
        return attended[0].transpose(0, 1).reshape(rows, heads * size)


@dataclass(frozen=True, slots=True)
class _BatchedAttentionView:
    """The positions that several sessions with a row each attend to in a block.

    Their keys and values are gathered for one operation, as copying them costs less than many small operations.
    `visible`: the slots of each, padded to the longest. `mask`: f32 (sessions, 1, 1, longest).
    """

    visible: torch.Tensor
    mask: torch.Tensor

    def attend(self, queries: torch.Tensor, memory: BlockKvCache, scaling: float) -> torch.Tensor:
        rows, longest = len(self.mask), self.mask.shape[-1]
        _, heads, size = queries.shape
        groups = memory.keys.shape[1]
        keys, values = (
            there.index_select(0, self.visible).view(rows, longest, groups, size).transpose(1, 2)
            for there in (memory.keys, memory.values)
        )
        grouped = queries[:rows].view(rows, groups, heads // groups, size)
        attended = nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scaling)
        return attended.reshape(rows, heads * size)


@dataclass(slots=True)
class _Plan:
    """State that all blocks share in a step."""

    slots: torch.Tensor
    rotary: RotaryTables
    slices: Sequence[Rows]
    views: dict[int | None, list[_AttentionView | _BatchedAttentionView]] = field(default_factory=dict)
    """By sliding window."""


def refusal(span: LoadedSpan) -> str | None:
    """Return why a span is not supported here, if it is not."""
    config = span.model.config
    if config.model_type not in FAMILIES:
        return f"{config.model_type} models have no fast path"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act} has no fast path"
    if getattr(span.base.rotary_emb, "rope_type", "default") not in {"default", "linear", "llama3", "yarn"}:
        return "rotary frequencies that change with the length have no fast path"
    return None


def empty_kv_blocks(span: LoadedSpan, device: torch.device) -> list[BlockKvCache]:
    """Return the KV memory of each block of a supported span, without slots."""
    config = span.model.config
    blocks: Any = span.blocks
    shapes = [(0, config.num_key_value_heads, block.self_attn.head_dim) for block in blocks]
    return [BlockKvCache(*(torch.empty(shape, device=device) for _ in range(2))) for shape in shapes]


class BatchedSpan:
    """A span in one variant, warmed over memory in the shapes of `kv`; implements SpanRunner."""

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
        blocks: Any = span.blocks
        self._blocks = [
            _Attention(block.self_attn.scaling, window) for block, window in zip(blocks, span.windows, strict=True)
        ]
        self._tables = self._rotary_tables(PAGE_POSITIONS)
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
    def run(self, slices: Sequence[Rows], kv: KvCache, blocks: range | None = None) -> list[torch.Tensor]:
        """Run the rows of several sessions together; see SpanRunner."""
        # Sessions with a single row first, and next to each other.
        order = sorted(range(len(slices)), key=lambda number: len(slices[number].rows) > 1)
        ordered = [slices[number] for number in order]
        plan = self._plan(ordered)
        hidden = torch.cat([part.rows for part in ordered])
        blocks = range(len(self._blocks)) if blocks is None else blocks
        if self._embedding is not None and blocks.start == 0:
            hidden = nn.functional.embedding(hidden, self._embedding).float()
        qkv: QKV | None = self._segments.qkv(blocks.start, hidden, plan.rotary)
        for number in blocks:
            assert qkv is not None
            attended = self._attend(self._blocks[number], kv.blocks[number], qkv, plan)
            hidden, qkv = self._segments.post_attention(number, hidden, attended, plan.rotary)
        last = self._last and blocks.stop == len(self._blocks)
        outputs = self._logits(hidden, ordered) if last else hidden.split([len(part.rows) for part in ordered])
        return [output for _, output in sorted(zip(order, outputs, strict=True), key=lambda pair: pair[0])]

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
        memory.keys.index_copy_(0, plan.slots, rotated[:, self._heads :])
        memory.values.index_copy_(0, plan.slots, qkv.values.view(-1, groups, size))
        if block.window not in plan.views:
            plan.views[block.window] = self._views(plan.slices, block.window)
        attended = [view.attend(queries, memory, block.scaling) for view in plan.views[block.window]]
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def _plan(self, slices: Sequence[Rows]) -> _Plan:
        ends = [part.position + len(part.rows) for part in slices]
        if max(ends) > len(self._tables[0]):
            self._tables = self._rotary_tables(max(max(ends), 2 * len(self._tables[0])))
        positions = torch.cat([torch.arange(p.position, end) for p, end in zip(slices, ends, strict=True)])
        positions = positions.to(self._device)
        slots = torch.cat([p.slots.all[p.position : end] for p, end in zip(slices, ends, strict=True)])
        return _Plan(slots.to(self._device), RotaryTables(*(table[positions] for table in self._tables)), slices)

    def _views(self, slices: Sequence[Rows], window: int | None) -> list[_AttentionView | _BatchedAttentionView]:
        """Return what the slices attend to, those with a single row together where that pays."""
        single = [part for part in slices if len(part.rows) == 1]
        views: list[_AttentionView | _BatchedAttentionView] = []
        joint = self._joint_view(single, window) if len(single) > 1 else None
        if joint is not None:
            views.append(joint)
        start = 0
        for part in slices:
            count, end = len(part.rows), part.position + len(part.rows)
            if joint is None or count > 1:
                views.append(self._view(part, slice(start, start + count), end, window))
            start += count
        return views

    def _joint_view(self, single: Sequence[Rows], window: int | None) -> _BatchedAttentionView | None:
        """Return what sessions with a row each attend to together, if that is little enough to be gathered."""
        firsts = [_first_visible(part, window) for part in single]
        counts = [part.position + 1 - first for part, first in zip(single, firsts, strict=True)]
        longest = max(counts)
        if longest > _MOST_GATHERED:
            return None
        visible = torch.zeros(len(single), longest, dtype=torch.long)
        mask = torch.full((len(single), 1, 1, longest), -torch.inf)
        for row, (part, first, count) in enumerate(zip(single, firsts, counts, strict=True)):
            slots = part.slots.all[first : first + count]
            visible[row, :count] = slots
            visible[row, count:] = slots[0]  # any slot of its own, which holds finite numbers: it is masked
            mask[row, ..., :count] = 0
        return _BatchedAttentionView(visible.flatten().to(self._device), mask.to(self._device))

    def _view(self, part: Rows, span: slice, end: int, window: int | None) -> _AttentionView:
        first = _first_visible(part, window)
        count, mask = len(part.rows), None
        causal = count > 1 and part.position == 0 and (window is None or end <= window)
        if count > 1 and not causal:
            # Row r, at position + r, attends to itself and the positions before it within the window.
            distance = torch.arange(part.position, end).unsqueeze(1) - torch.arange(first, end)
            mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            mask = mask.to(self._device)
        visible = part.slots.of(first, end)
        return _AttentionView(span, visible if isinstance(visible, slice) else visible.to(self._device), mask, causal)

    def _rotary_tables(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines f32 (positions, half of the head size)."""
        positions = torch.arange(count, device=self._device).unsqueeze(0)
        with torch.inference_mode():
            cos, sin = self._rotary(torch.zeros(1, device=self._device), positions)
        half = sin.shape[-1] // 2  # of which the other is a copy
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _first_visible(part: Rows, window: int | None) -> int:
    return 0 if window is None else max(0, part.position - window + 1)
