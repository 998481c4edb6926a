"""Rows of many sessions through a span at once: the Llama family, over KV memory in pages.

Prompts' parts and decode rows of any sessions are laid one after another into one matrix, so that each weight is read
once in a step however many sessions are in it. Only attention looks at the sessions one by one, in place in KV memory;
what lies between one attention and the next is a segment, and the variants differ in who calculates those. (vLLM cuts
its graphs at the same places, and for the same reason: all but attention is blind to whose row it is.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from node.engine.cache import BlockMemory, KvMemory, Places
from node.engine.interface import PAGE_POSITIONS
from node.engine.loading import LoadedSpan

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose blocks are: norm, rotary grouped-query attention, norm, gated SiLU."""

_WARM_ROWS = (1, 2, 8, 32)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one session in a step. `rows`: token ids i64 (rows,), or hidden states f32 (rows, hidden size)."""

    rows: torch.Tensor
    places: Places
    position: int
    draws: int


class Segments(Protocol):
    """All of a span but its embedding and its attention. Rows are f32 (rows, hidden size)."""

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values of the first block, (rows, (heads + 2 groups) * head size)."""
        ...

    def advance(
        self, number: int, hidden: torch.Tensor, mixed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Complete a block (counted from the span's first), given what entered it and what attention made of that.

        Returns what leaves it, and queries, keys and values of the next block where there is one.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows that left a last span, (rows, vocabulary size)."""
        ...


@dataclass(frozen=True, slots=True)
class _Attention:
    """What a block's attention needs besides its rows."""

    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    scaling: float
    window: int | None


@dataclass(slots=True)
class _Sight:
    """What the rows of one session see of it in a block: `first` to `end`; `mask` where not all of them see all."""

    span: slice
    seen: slice | torch.Tensor
    mask: torch.Tensor | None
    causal: bool


@dataclass(slots=True)
class _Plan:
    """What all blocks share in a step."""

    places: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    slices: Sequence[Rows]
    sights: dict[int | None, list[_Sight]] = field(default_factory=dict)
    """By sliding window."""


def refusal(span: LoadedSpan) -> str | None:
    """Return why a span cannot be calculated here, if it cannot."""
    config = span.model.config
    if config.model_type not in FAMILIES:
        return f"{config.model_type} models have no fast path"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act} has no fast path"
    if getattr(span.base.rotary_emb, "rope_type", "default") not in {"default", "linear", "llama3", "yarn"}:
        return "rotary frequencies that change with the length have no fast path"
    return None


class RaggedSpan:
    """A span in one variant, ready to run."""

    def __init__(self, span: LoadedSpan, segments: Segments, *, first: bool, last: bool) -> None:
        self._segments = segments
        base: Any = span.base
        self._embedding = base.embed_tokens if first else None
        self._rotary = base.rotary_emb
        config = span.model.config
        self._epsilon: float = config.rms_norm_eps
        self._hidden_size = span.hidden_size
        self._vocabulary_size = span.vocabulary_size
        self._last = last
        self._heads: int = config.num_attention_heads
        blocks: Any = span.blocks
        self._blocks = [_attention(block.self_attn, window) for block, window in zip(blocks, span.windows, strict=True)]
        self._device = next(span.blocks.parameters()).device
        self._tables = self._rotary_tables(PAGE_POSITIONS)

    @torch.inference_mode()
    def warm(self, memory: Sequence[BlockMemory]) -> None:
        """Run every kind of product once, over memory of its own in the shapes of `memory`."""
        pages = -(-max(_WARM_ROWS) // PAGE_POSITIONS)
        scratch = KvMemory([block.resized(pages * PAGE_POSITIONS) for block in memory])
        for count in _WARM_ROWS:
            if self._embedding is not None:
                rows = torch.zeros(count, dtype=torch.long, device=self._device)
            else:
                rows = torch.zeros(count, self._hidden_size, device=self._device)
            self.run([Rows(rows, Places(range(pages)), 0, min(count, 2))], scratch)

    @torch.inference_mode()
    def run(self, slices: Sequence[Rows], memory: KvMemory) -> list[torch.Tensor]:
        """Run the rows of several sessions together.

        Returns for each hidden states f32 (rows, hidden size), on a last span logits f32 (draws, vocabulary size).
        """
        plan = self._plan(slices)
        hidden = torch.cat([part.rows for part in slices])
        if self._embedding is not None:
            hidden = self._embedding(hidden)
        fused: torch.Tensor | None = self._segments.enter(hidden)
        for number, (block, there) in enumerate(zip(self._blocks, memory.blocks, strict=True)):
            assert fused is not None
            hidden, fused = self._segments.advance(number, hidden, self._attend(block, there, fused, plan))
        counts = [len(part.rows) for part in slices]
        return self._logits(hidden, slices) if self._last else list(hidden.split(counts))

    def _logits(self, hidden: torch.Tensor, slices: Sequence[Rows]) -> list[torch.Tensor]:
        """Return the logits of the rows after which tokens are drawn."""
        counts = [part.draws for part in slices]
        if not any(counts):
            return [hidden.new_empty(0, self._vocabulary_size)] * len(slices)
        parts = hidden.split([len(part.rows) for part in slices])
        drawn = torch.cat([part[len(part) - count :] for part, count in zip(parts, counts, strict=True)])
        return list(self._segments.logits(drawn).split(counts))

    def _attend(self, block: _Attention, memory: BlockMemory, fused: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Add the rows' keys and values to KV memory; return what attention makes of them: (rows, heads * size)."""
        groups, size = memory.keys.shape[1:]
        turned, values = fused.view(len(fused), -1, size).split([self._heads + groups, groups], dim=1)
        if block.query_norm is not None and block.key_norm is not None:
            queries, keys = turned.split([self._heads, groups], dim=1)
            turned = torch.cat([self._norm(queries, block.query_norm), self._norm(keys, block.key_norm)], dim=1)
        queries, keys = _rotate(turned, plan).split([self._heads, groups], dim=1)
        memory.keys.index_copy_(0, plan.places, keys)
        memory.values.index_copy_(0, plan.places, values)
        if block.window not in plan.sights:
            plan.sights[block.window] = self._sights(plan.slices, block.window)
        mixed = [
            _see(queries[sight.span], memory.keys[sight.seen], memory.values[sight.seen], sight, block.scaling)
            for sight in plan.sights[block.window]
        ]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]

    def _norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(rows, weight.shape, weight, self._epsilon)

    def _plan(self, slices: Sequence[Rows]) -> _Plan:
        ends = [part.position + len(part.rows) for part in slices]
        if max(ends) > len(self._tables[0]):
            self._tables = self._rotary_tables(max(max(ends), 2 * len(self._tables[0])))
        positions = torch.cat([torch.arange(p.position, end) for p, end in zip(slices, ends, strict=True)])
        positions = positions.to(self._device)
        places = torch.cat([p.places.all[p.position : end] for p, end in zip(slices, ends, strict=True)])
        cos, sin = (table[positions].unsqueeze(1) for table in self._tables)
        return _Plan(places.to(self._device), cos, sin, slices)

    def _sights(self, slices: Sequence[Rows], window: int | None) -> list[_Sight]:
        sights, start = [], 0
        for part in slices:
            count, end = len(part.rows), part.position + len(part.rows)
            first = 0 if window is None else max(0, part.position - window + 1)
            mask = None
            causal = count > 1 and part.position == 0 and (window is None or end <= window)
            if count > 1 and not causal:
                # Row r stands at position + r; it sees itself and what is before it, as far as the window reaches.
                distance = torch.arange(part.position, end).unsqueeze(1) - torch.arange(first, end)
                mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
                mask = mask.to(self._device)
            sights.append(_Sight(slice(start, start + count), part.places.of(first, end), mask, causal))
            start += count
        return sights

    def _rotary_tables(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines f32 (positions, head size); of the latter the first half is negated."""
        positions = torch.arange(count, device=self._device).unsqueeze(0)
        with torch.inference_mode():
            cos, sin = self._rotary(torch.zeros(1, device=self._device), positions)
        half = sin.shape[-1] // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)


def _attention(attention: Any, window: int | None) -> _Attention:
    """Return a block's attention (Any: modules of transformers, whose attributes have no types)."""
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else norm.weight for norm in norms)
    return _Attention(query_norm, key_norm, attention.scaling, window)


def _rotate(heads: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """Turn queries or keys (rows, heads, head size) by their positions."""
    return torch.addcmul(heads * plan.cos, heads.roll(heads.shape[-1] // 2, dims=-1), plan.sin)


def _see(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sight: _Sight, scaling: float
) -> torch.Tensor:
    """Return (rows, heads * head size) of one session's queries (rows, heads, head size) and all it sees."""
    rows, heads, size = queries.shape
    groups = keys.shape[1]
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    if rows == 1:
        # It sees everything there is, so the heads of a group may pass for rows, and nothing is repeated for them.
        grouped = queries.view(1, groups, heads // groups, size)
        mixed = nn.functional.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
        return mixed.reshape(1, heads * size)
    mixed = nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=sight.mask,
        is_causal=sight.causal,
        scale=scaling,
        enable_gqa=heads != groups,
    )
    return mixed[0].transpose(0, 1).reshape(rows, heads * size)
