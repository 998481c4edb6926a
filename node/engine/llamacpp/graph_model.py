"""A span of a GGUF package as graphs take it: its weights by block, its rotary embedding, or why there are none for it.

What decides is which tensors and metadata a file has, not a list of models: whatever is not known here to change
nothing refuses the package, as a wrong graph would give wrong answers without any error.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType

from node.engine.graphs.gguf_matrix import GgufMatrix, graph_bytes, is_graph_type, is_quantised, plain_values
from node.engine.graphs.matrix import Floats, GraphBlock
from node.engine.graphs.runner import AttentionShape
from node.engine.importing import importing
from node.engine.interface import EngineError
from node.engine.llamacpp.span_file import EMBEDDING, OUTPUT, OUTPUT_NORM, SpanTensors, block_of
from node.models.gguf_file import GgufError, GgufModel, GgufTensor, Value
from protocol.identity import BlockRange

_INTERLEAVED: Final[Mapping[str, bool]] = {"llama": True, "qwen2": False, "qwen3": False}
"""By architecture, which elements of a head the rotary embedding turns together: neighbours, or those half a head
apart. (The converter reorders queries and keys of the former, so that both give the published model's attention.)"""

_MATRICES: Final = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NORMS: Final = ("attn_norm", "ffn_norm")
_HEAD_NORMS: Final = ("attn_q_norm", "attn_k_norm")
_FACTORS: Final = "rope_freqs.weight"

_KNOWN_KEYS: Final = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "vocab_size",
    }
)
_DEFAULT_BASE: Final = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphModel:
    """The facts of a span that its graphs and their runner need."""

    tensors: SpanTensors
    blocks: BlockRange
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    is_interleaved: bool
    frequencies: Floats
    """By which positions are multiplied, of each pair of elements that is turned: (head size / 2,)."""

    @property
    def is_last(self) -> bool:
        """Whether the span ends with the head."""
        return self.blocks.end == self.tensors.block_count

    @property
    def attention(self) -> AttentionShape:
        """What lies between the graphs."""
        return AttentionShape(
            block_count=len(self.blocks),
            hidden_size=self.tensors.hidden_size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            frequencies=self.frequencies,
            vocabulary_size=self._head.shape[0] if self.is_last else None,
            norm=self.norm if self.is_last else None,
            epsilon=self.epsilon,
        )

    @property
    def weight_bytes(self) -> int:
        """Return what the graphs take in memory."""
        taken = [each for each in self.tensors.tensors.values() if block_of(each.name) in self._range]
        head = [self._head] if self.is_last else []
        return sum(graph_bytes(each) for each in (*taken, *head) if len(each.shape) == 2)

    @property
    def kv_bytes_per_position(self) -> int:
        """Return what keys and values of a position take, in bf16."""
        return 2 * 2 * self.kv_heads * self.head_size * len(self.blocks)

    @property
    def norm(self) -> Floats:
        """The norm before the head."""
        return plain_values(self.tensors.tensors[OUTPUT_NORM])

    @property
    def head(self) -> GgufMatrix:
        """The head of a last span."""
        return GgufMatrix(self._head)

    @property
    def _head(self) -> GgufTensor:
        return self.tensors.tensors[EMBEDDING if self.tensors.tied else OUTPUT]

    @property
    def _range(self) -> range:
        return range(self.blocks.start, self.blocks.end)

    def graph_blocks(self) -> Iterator[GraphBlock]:
        """Yield the weights of the blocks, whose files are mapped while they are used."""
        for number in self._range:
            queries, keys, values, out, gate, up, down = (self._matrix(number, name) for name in _MATRICES)
            norm, mlp_norm = (plain_values(self._tensor(number, name)) for name in _NORMS)
            query_norm, key_norm = (self.tensors.tensors.get(f"blk.{number}.{name}.weight") for name in _HEAD_NORMS)
            yield GraphBlock(
                norm=norm,
                queries=queries,
                keys=keys,
                values=values,
                head_norms=(plain_values(query_norm), plain_values(key_norm)) if query_norm and key_norm else None,
                out=out,
                mlp_norm=mlp_norm,
                gate=gate,
                up=up,
                down=down,
            )

    def _tensor(self, block: int, name: str) -> GgufTensor:
        return self.tensors.tensors[f"blk.{block}.{name}.weight"]

    def _matrix(self, block: int, name: str) -> GgufMatrix:
        bias = self.tensors.tensors.get(f"blk.{block}.{name}.bias")
        return GgufMatrix(self._tensor(block, name), None if bias is None else plain_values(bias))


def graph_model(tensors: SpanTensors, blocks: BlockRange) -> GraphModel:
    """Return a span as graphs take it. Raises EngineError where there are none for it, with the reason."""
    common = tensors.common
    try:
        _check_metadata(common)
        _check_tensors(tensors, blocks)
        heads = common.integer("attention.head_count")
        head_size = _head_size(common, tensors.hidden_size // heads)
        return GraphModel(
            tensors=tensors,
            blocks=blocks,
            heads=heads,
            kv_heads=common.integer("attention.head_count_kv", heads),
            head_size=head_size,
            epsilon=common.number("attention.layer_norm_rms_epsilon", 1e-5),
            is_interleaved=_INTERLEAVED[common.architecture],
            frequencies=_frequencies(common, tensors.tensors.get(_FACTORS), head_size),
        )
    except (EngineError, GgufError) as error:
        raise EngineError(f"onnxruntime cannot compute this package: {error}") from None


def write_graphs(model: GraphModel, folder: Path) -> None:
    """Write the graphs of a span."""
    with importing("onnx"):  # which takes memory while it is there
        from node.engine.graphs.writer import GraphShape, write_head, write_span

    shape = GraphShape(
        hidden_size=model.tensors.hidden_size,
        head_size=model.head_size,
        epsilon=model.epsilon,
        is_interleaved=model.is_interleaved,
    )
    write_span(folder, shape, model.graph_blocks())
    if model.is_last:
        write_head(folder, shape, model.norm, model.head)


def _check_metadata(common: GgufModel) -> None:
    if common.architecture not in _INTERLEAVED:
        raise EngineError(f"there are no graphs of the architecture {common.architecture}")
    prefix = f"{common.architecture}."
    keys = (key.removeprefix(prefix) for key in sorted(common.metadata) if key.startswith(prefix))
    if (unknown := next((key for key in keys if key not in _KNOWN_KEYS), None)) is not None:
        raise EngineError(f"graphs have no {prefix}{unknown}")
    if _scaling(common) not in ("none", "linear"):
        raise EngineError(f"graphs have no RoPE scaling {_scaling(common)}")


def _head_size(common: GgufModel, usual: int) -> int:
    size = common.integer("attention.key_length", usual)
    if common.integer("attention.value_length", size) != size:
        raise EngineError("its keys and values differ in size")
    if common.integer("rope.dimension_count", size) != size:
        raise EngineError("its rotary embedding turns a part of each head")
    return size


def _check_tensors(tensors: SpanTensors, blocks: BlockRange) -> None:
    """Raise EngineError for a tensor that graphs have no place for, that is missing, or of another type."""
    known = re.compile(
        rf"blk\.\d+\.(({'|'.join((*_MATRICES, *_NORMS, *_HEAD_NORMS))})\.weight|({'|'.join(_MATRICES)})\.bias)"
    )
    outer = {EMBEDDING, OUTPUT, OUTPUT_NORM, _FACTORS}
    needed = {f"blk.{block}.{name}.weight" for block in range(blocks.start, blocks.end) for name in _MATRICES + _NORMS}
    if missing := sorted(needed - tensors.tensors.keys()):
        raise EngineError(f"graphs need the tensor {missing[0]}")
    found = False
    for name, tensor in tensors.tensors.items():
        if not known.fullmatch(name) and name not in outer:
            raise EngineError(f"graphs have no place for the tensor {name[:80]}")
        if len(tensor.shape) == 1 and is_quantised(tensor.type):
            raise EngineError(f"{name} is of type {tensor.type.name}")
        if not is_graph_type(tensor.type):
            raise EngineError(f"graphs cannot hold {name} of type {tensor.type.name} without rounding it again")
        found = found or (is_quantised(tensor.type) and block_of(name) is not None)
    if not found:
        raise EngineError(f"its weights are not quantised but {_common_type(tensors).name}")


def _common_type(tensors: SpanTensors) -> GGMLQuantizationType:
    return max(tensors.tensors.values(), key=lambda tensor: tensor.size_bytes).type


def _scaling(common: GgufModel) -> Value | None:
    """Return how positions are scaled: to llama.cpp a factor without a type is a linear one."""
    return common.get("rope.scaling.type", "linear")


def _frequencies(common: GgufModel, factors: GgufTensor | None, head_size: int) -> Floats:
    """Return the rotary frequencies, of which a model may divide each by a factor of its own."""
    base = common.number("rope.freq_base", _DEFAULT_BASE)
    frequencies = base ** -(np.arange(0, head_size, 2) / head_size)
    if _scaling(common) == "linear":
        frequencies /= common.number("rope.scaling.factor", 1.0) or 1.0
    if factors is not None:
        frequencies /= plain_values(factors)
    return frequencies.astype(np.float32)
