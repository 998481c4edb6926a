"""Segments in torch: matrices that take the same rows are fused into one, and packed for the arithmetic in use."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from node.engine.backends.batched import QKV, BatchedSpan, RotaryTables
from node.engine.backends.interface import BACKENDS, BackendContext
from node.engine.backends.linear import PackedMatrix, Product, arithmetics_on, multiply, pack
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
        self._context = context
        self._packed: dict[str, PackedSpan] = {}

    def start_threads(self) -> None:
        """Torch has started its threads already."""

    def build(self, arithmetic: str, kv: KvCache) -> BatchedSpan:
        """Pack the matrices, unless another arithmetic with the same packing has, and warm them."""
        packing, product = self._packing_of(arithmetic)
        if packing not in self._packed:
            self._packed[packing] = pack_span(self._context, packing)
        return BatchedSpan(self._context, TorchSegments(self._context.span, self._packed[packing], product), kv)

    def forget(self, arithmetic: str) -> None:
        """Let go of packed matrices."""
        self._packed.pop(self._packing_of(arithmetic)[0], None)

    def _packing_of(self, arithmetic: str) -> tuple[str, Product]:
        packing, product = arithmetics_on(self._context.device)[arithmetic]
        return BACKENDS["fused"].held_packing(packing, as_bf16=self._context.as_bf16), product


@torch.inference_mode()
def pack_span(context: BackendContext, packing: str) -> PackedSpan:
    """Return the matrices of a span of the Llama family, fused and packed, a block at a time from its file."""
    span, device = context.span, context.device
    blocks = []
    for block, file in zip(span.blocks, span.block_files, strict=True):
        blocks.append(_pack_block(block, packing, device))
        file.drop_pages()
    if not span.is_last:
        return PackedSpan(blocks, None, None)
    head: Any = span.model.get_output_embeddings()
    base: Any = span.base
    weight = head.weight
    if context.embedding is not None and weight is span.model.get_input_embeddings().weight:
        weight = context.embedding  # on a GPU it is there already
    packed, norm = pack(packing, [weight], joint_bias(head), device), _copied(base.norm, device)
    for file in span.outer_files:
        file.drop_pages()
    return PackedSpan(blocks, norm, packed)


def _copied(norm: Any, device: torch.device) -> torch.Tensor:
    """Return the weight of a norm: so little that its file need not stay in memory for it."""
    weight: torch.Tensor = norm.weight
    return weight.to(device, copy=True)


def _pack_block(block: Any, packing: str, device: torch.device) -> _Block:
    """Return a block's weights (Any: modules of transformers, whose attributes have no types)."""

    def packed(*linears: Any) -> PackedMatrix:
        return pack(packing, [linear.weight for linear in linears], joint_bias(*linears), device)

    attention, mlp = block.self_attn, block.mlp
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    return _Block(
        norm=_copied(block.input_layernorm, device),
        qkv=packed(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=(_copied(norms[0], device), _copied(norms[1], device)) if norms else None,
        out=packed(attention.o_proj),
        mlp_norm=_copied(block.post_attention_layernorm, device),
        gate_up=packed(mlp.gate_proj, mlp.up_proj),
        down=packed(mlp.down_proj),
    )


def joint_bias(*linears: Any) -> torch.Tensor | None:
    """Return the bias of matrices that take the same rows, side by side."""
    biases = [linear.bias for linear in linears]
    return None if biases[0] is None else torch.cat(biases)


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
