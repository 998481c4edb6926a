"""Segments in torch: matrices that take the same rows are fused into one, and packed for the arithmetic in use."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from node.engine.backends.batched import QKV, BatchedSpan, RotaryTables
from node.engine.backends.interface import BackendContext
from node.engine.backends.linear import ARITHMETICS, PackedMatrix, Product, multiply, pack
from node.engine.kv_cache import KvCache
from node.engine.loading import LoadedSpan


@dataclass(frozen=True, slots=True)
class _Block:
    norm: torch.Tensor
    qkv: PackedMatrix
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    """Of queries and keys, where there are any."""
    out: PackedMatrix
    mlp_norm: torch.Tensor
    gate_up: PackedMatrix
    down: PackedMatrix


@dataclass(slots=True)
class PackedSpan:
    """A span's matrices in one packing. `norm`, `head`: of a last span."""

    blocks: list[_Block]
    norm: torch.Tensor | None
    head: PackedMatrix | None


class Backend:
    """Implements the backend `fused`."""

    def __init__(self, context: BackendContext) -> None:
        self._span = context.span
        self._packed: dict[str, PackedSpan] = {}

    def start_threads(self) -> None:
        """Torch has started its threads already."""

    def build(self, arithmetic: str, kv: KvCache) -> BatchedSpan:
        """Pack the matrices, unless another arithmetic with the same packing has, and warm them."""
        packing, product = ARITHMETICS[arithmetic]
        if packing not in self._packed:
            self._packed[packing] = pack_span(self._span, packing)
        return BatchedSpan(self._span, TorchSegments(self._span, self._packed[packing], product), kv)


@torch.inference_mode()
def pack_span(span: LoadedSpan, packing: str) -> PackedSpan:
    """Return the matrices of a span of the Llama family, fused and packed."""
    blocks = [_pack_block(block, packing) for block in span.blocks]
    if not span.is_last:
        return PackedSpan(blocks, None, None)
    head: Any = span.model.get_output_embeddings()
    base: Any = span.base
    return PackedSpan(blocks, base.norm.weight, pack(packing, head.weight, getattr(head, "bias", None)))


def _pack_block(block: Any, packing: str) -> _Block:
    """Return a block's weights (Any: modules of transformers, whose attributes have no types)."""
    attention, mlp = block.self_attn, block.mlp
    return _Block(
        norm=block.input_layernorm.weight,
        qkv=pack(packing, *fuse(attention.q_proj, attention.k_proj, attention.v_proj)),
        head_norms=(attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None,
        out=pack(packing, *fuse(attention.o_proj)),
        mlp_norm=block.post_attention_layernorm.weight,
        gate_up=pack(packing, *fuse(mlp.gate_proj, mlp.up_proj)),
        down=pack(packing, *fuse(mlp.down_proj)),
    )


def fuse(*linears: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return matrices (outputs, inputs) that take the same rows as one, and its bias."""
    biases = [linear.bias for linear in linears]
    return torch.cat([linear.weight for linear in linears]), None if biases[0] is None else torch.cat(biases)


class TorchSegments:
    """A packed span in one arithmetic; see `node.engine.backends.batched.Segments`."""

    def __init__(self, span: LoadedSpan, packed: PackedSpan, product: Product) -> None:
        self._packed = packed
        self._multiply = partial(multiply, product)
        config = span.model.config
        self._epsilon: float = config.rms_norm_eps
        self._counts = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]

    def qkv(self, number: int, hidden: torch.Tensor, rotary: RotaryTables) -> QKV:
        """Return the inputs of a block's attention."""
        return self._qkv(hidden, self._packed.blocks[number], rotary)

    def post_attention(
        self, number: int, hidden: torch.Tensor, attended: torch.Tensor, rotary: RotaryTables
    ) -> tuple[torch.Tensor, QKV | None]:
        """Complete a block; return its output, and the inputs of the next one's attention."""
        block = self._packed.blocks[number]
        hidden = hidden + self._multiply(attended, block.out)
        gate, up = self._multiply(self._norm(hidden, block.mlp_norm), block.gate_up).chunk(2, dim=1)
        hidden = hidden + self._multiply(nn.functional.silu(gate) * up, block.down)
        if number + 1 == len(self._packed.blocks):
            return hidden, None
        return hidden, self._qkv(hidden, self._packed.blocks[number + 1], rotary)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        assert self._packed.norm is not None
        assert self._packed.head is not None
        return self._multiply(self._norm(hidden, self._packed.norm), self._packed.head)

    def _qkv(self, hidden: torch.Tensor, block: _Block, rotary: RotaryTables) -> QKV:
        rows = self._multiply(self._norm(hidden, block.norm), block.qkv).view(len(hidden), sum(self._counts), -1)
        rotated, values = rows.split([sum(self._counts[:2]), self._counts[2]], dim=1)
        if block.head_norms is not None:
            parts = zip(rotated.split(self._counts[:2], dim=1), block.head_norms, strict=True)
            rotated = torch.cat([self._norm(part, norm) for part, norm in parts], dim=1)
        # Each pair of elements, half a head apart, is rotated: (a cos - b sin, b cos + a sin).
        (cos, sin), (one, other) = (table.unsqueeze(1) for table in rotary), rotated.chunk(2, dim=-1)
        rotated = torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
        return QKV(rotated, values)

    def _norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(rows, weight.shape, weight, self._epsilon)
