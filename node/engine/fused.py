"""The fast path: the Llama family in few, large operations, over rows of many sessions at once.

Prompts' parts and decode rows of any sessions are laid one after another into one matrix, so that each weight is read
once in a step however many sessions are in it. Only attention looks at the sessions one by one, in place in KV memory.
The weights come from the reference path's modules, and the rotary tables are calculated by transformers' own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from node.engine.cache import BlockMemory, KvMemory, Places
from node.engine.interface import PAGE_POSITIONS, EngineError
from node.engine.linear import ARITHMETICS, Packed, Product, multiply, pack
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


@dataclass(frozen=True, slots=True)
class _Block:
    """The weights of one block."""

    norm: torch.Tensor
    qkv: Packed
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    out: Packed
    mlp_norm: torch.Tensor
    gate_up: Packed
    down: Packed
    scaling: float
    window: int | None


@dataclass(slots=True)
class PackedSpan:
    """A span's matrices in one packing."""

    blocks: list[_Block]
    norm: torch.Tensor | None
    head: Packed | None

    @property
    def bytes(self) -> int:
        """Memory that the matrices take."""
        packed = [matrix for block in self.blocks for matrix in (block.qkv, block.out, block.gate_up, block.down)]
        return sum(matrix.bytes for matrix in (*packed, *filter(None, [self.head])))


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


@torch.inference_mode()
def pack_span(span: LoadedSpan, packing: str, *, last: bool) -> PackedSpan:
    """Return the matrices of a span, fused and packed. Raises EngineError for what has no fast path."""
    if why := refusal(span):
        raise EngineError(why)
    blocks = [_pack_block(block, packing, window) for block, window in zip(span.blocks, span.windows, strict=True)]
    if not last:
        return PackedSpan(blocks, None, None)
    head: Any = span.model.get_output_embeddings()
    base: Any = span.base
    return PackedSpan(blocks, base.norm.weight, pack(packing, head.weight, getattr(head, "bias", None)))


def _pack_block(block: Any, packing: str, window: int | None) -> _Block:
    """Return a block's weights (Any: modules of transformers, whose attributes have no types)."""
    attention, mlp = block.self_attn, block.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return _Block(
        norm=block.input_layernorm.weight,
        qkv=_fuse(packing, attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=norms[0].weight if norms[0] is not None else None,
        key_norm=norms[1].weight if norms[1] is not None else None,
        out=_fuse(packing, attention.o_proj),
        mlp_norm=block.post_attention_layernorm.weight,
        gate_up=_fuse(packing, mlp.gate_proj, mlp.up_proj),
        down=_fuse(packing, mlp.down_proj),
        scaling=attention.scaling,
        window=window,
    )


def _fuse(packing: str, *linears: Any) -> Packed:
    """Return matrices that take the same rows as one."""
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat(biases)
    return pack(packing, torch.cat([linear.weight for linear in linears]), bias)


class FusedSpan:
    """A span in one arithmetic, ready to run."""

    def __init__(self, span: LoadedSpan, packed: PackedSpan, arithmetic: str, *, first: bool) -> None:
        self._packed = packed
        self._product: Product = ARITHMETICS[arithmetic][1]
        base: Any = span.base
        self._embedding = base.embed_tokens if first else None
        self._rotary = base.rotary_emb
        config = span.model.config
        self._epsilon: float = config.rms_norm_eps
        self._hidden_size = span.hidden_size
        self._vocabulary_size = span.vocabulary_size
        self._last = packed.head is not None
        self._heads: int = config.num_attention_heads
        self._device = packed.blocks[0].norm.device
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
        for block, there in zip(self._packed.blocks, memory.blocks, strict=True):
            hidden = hidden + self._attend(block, there, self._norm(hidden, block.norm), plan)
            gate, up = multiply(self._product, self._norm(hidden, block.mlp_norm), block.gate_up).chunk(2, dim=1)
            hidden = hidden + multiply(self._product, nn.functional.silu(gate) * up, block.down)
        if not self._last:
            return list(hidden.split([len(part.rows) for part in slices]))
        return self._logits(hidden, slices)

    def _logits(self, hidden: torch.Tensor, slices: Sequence[Rows]) -> list[torch.Tensor]:
        """Return the logits of the rows after which tokens are drawn."""
        assert self._packed.norm is not None
        assert self._packed.head is not None
        counts = [part.draws for part in slices]
        if not any(counts):
            return [hidden.new_empty(0, self._vocabulary_size)] * len(slices)
        parts = hidden.split([len(part.rows) for part in slices])
        drawn = torch.cat([part[len(part) - count :] for part, count in zip(parts, counts, strict=True)])
        logits = multiply(self._product, self._norm(drawn, self._packed.norm), self._packed.head)
        return list(logits.split(counts))

    def _norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(rows, weight.shape, weight, self._epsilon)

    def _attend(self, block: _Block, memory: BlockMemory, rows: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Add the rows' keys and values to KV memory, and return what attention makes of them."""
        groups, size = memory.keys.shape[1:]
        fused = multiply(self._product, rows, block.qkv).view(len(rows), -1, size)
        queries, keys, values = fused.split([self._heads, groups, groups], dim=1)
        if block.query_norm is not None and block.key_norm is not None:
            queries, keys = self._norm(queries, block.query_norm), self._norm(keys, block.key_norm)
        queries = _rotate(queries, plan)
        memory.keys.index_copy_(0, plan.places, _rotate(keys, plan))
        memory.values.index_copy_(0, plan.places, values)
        if block.window not in plan.sights:
            plan.sights[block.window] = self._sights(plan.slices, block.window)
        mixed = torch.empty_like(queries)
        for sight in plan.sights[block.window]:
            mixed[sight.span] = nn.functional.scaled_dot_product_attention(
                queries[sight.span].transpose(0, 1).unsqueeze(0),
                memory.keys[sight.seen].transpose(0, 1).unsqueeze(0),
                memory.values[sight.seen].transpose(0, 1).unsqueeze(0),
                attn_mask=sight.mask,
                is_causal=sight.causal,
                scale=block.scaling,
                enable_gqa=self._heads != groups,
            )[0].transpose(0, 1)
        return multiply(self._product, mixed.flatten(1), block.out)

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


def _rotate(heads: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """Turn queries or keys (rows, heads, head size) by their positions."""
    return heads * plan.cos + heads.roll(heads.shape[-1] // 2, dims=-1) * plan.sin
