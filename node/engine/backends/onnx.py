"""Segments as ONNX graphs, which onnxruntime calculates, in fp32 or with int8 weights.

A span is cut at its attention (see `node.engine.backends.batched`), because onnxruntime has no paged attention on CPUs:
GroupQueryAttention needs each session's keys contiguous and all sessions at the same stride, and would copy the KV
memory of a ragged batch in each step. The rest, all the matrices, is what onnxruntime is good at.

int8 is symmetric, with a scale for each 32 inputs of an output, and multiplied in int8: the operator (MatMulNBits,
accuracy level 4) rounds the rows, too, in blocks of 32 with scales of their own, which costs next to no quality, unlike
one scale for a whole row (`w8a8`).
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import ModelProto, StringStringEntryProto, TensorProto, ValueInfoProto, helper

from node.engine.backends.batched import QKV, BatchedSpan, RotaryTables
from node.engine.backends.interface import BackendContext
from node.engine.backends.torch import fuse
from node.engine.interface import EngineError
from node.engine.kv_cache import KvCache
from node.engine.loading import LoadedSpan
from node.util.disk_cache import FolderCache
from node.util.text import one_line

FORMAT: Final = 3
"""Of the graphs; part of their name in a cache, so that a version with other graphs makes its own."""

_BLOCK_INPUTS = 32
_OPERATORS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
_IR_VERSION = 10
_ALIGNMENT = 4096
_CONTRIBUTED = "com.microsoft"

Array = npt.NDArray[np.generic]


class Backend:
    """Implements the backend `onnxruntime`."""

    def __init__(self, context: BackendContext) -> None:
        self._context = context

    def start_threads(self) -> None:
        """Start the threads that all graphs of this process share, once."""
        with suppress(Exception):  # they have been started already, which raises a plain Exception
            onnxruntime.set_global_thread_pool_sizes(self._context.threads, 1)

    def build(self, arithmetic: str, kv: KvCache) -> BatchedSpan:
        """Open the graphs of a variant, written to disk first if they are not cached there, and warm them."""
        self.start_threads()
        span, name = self._context.span, f"{self._context.name}-{arithmetic}-{FORMAT}"
        try:
            return BatchedSpan(span, open_graphs(span, name, arithmetic, self._context.disk_cache), kv)
        except OSError as error:
            raise EngineError(f"no graphs for onnxruntime/{arithmetic}: {error}") from error


class OnnxSegments:
    """A span whose segments onnxruntime calculates; see `node.engine.backends.batched.Segments`."""

    def __init__(self, folder: Path, span: LoadedSpan) -> None:
        """Open the graphs of a span. Raises EngineError where they are damaged."""
        try:
            self._between = [_session(folder / f"{number}.onnx") for number in range(len(span.blocks) + 1)]
            self._head = _session(folder / "head.onnx") if span.is_last else None
        except Exception as error:  # onnxruntime's exceptions have no base class but Exception
            raise EngineError(f"the graphs in {folder} cannot be used: {one_line(error, 200)}") from error

    def qkv(self, number: int, hidden: torch.Tensor, rotary: RotaryTables) -> QKV:
        """Return the inputs of the first block's attention: there is no graph that begins at another."""
        if number:
            raise EngineError("a graph begins at the first block of its span")
        return QKV(*_run(self._between[0], hidden=hidden, cos=rotary.cos, sin=rotary.sin))

    def post_attention(
        self, number: int, hidden: torch.Tensor, attended: torch.Tensor, rotary: RotaryTables
    ) -> tuple[torch.Tensor, QKV | None]:
        """Complete a block; return its output, and the inputs of the next one's attention."""
        if number + 2 == len(self._between):
            return _run(self._between[-1], hidden=hidden, attended=attended)[0], None
        output, *qkv = _run(self._between[number + 1], hidden=hidden, attended=attended, cos=rotary.cos, sin=rotary.sin)
        return output, QKV(*qkv)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        assert self._head is not None
        return _run(self._head, hidden=hidden)[0]


def open_graphs(span: LoadedSpan, name: str, arithmetic: str, cache: FolderCache | None) -> OnnxSegments:
    """Return a span of the Llama family as graphs, from the cache if they are there under this name.

    Without a cache they are built for this one use. Raises EngineError, OSError.
    """
    if cache is None:
        with tempfile.TemporaryDirectory() as temporary:
            _write(span, Path(temporary), arithmetic)
            return OnnxSegments(Path(temporary), span)

    def build(folder: Path) -> None:
        _write(span, folder, arithmetic)

    try:
        return OnnxSegments(cache.folder(name, build), span)
    except EngineError:
        cache.drop(name)  # and rebuild it: a file may be cut short
        return OnnxSegments(cache.folder(name, build), span)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, **rows: torch.Tensor) -> list[torch.Tensor]:
    outputs = session.run(None, {name: values.numpy() for name, values in rows.items()})
    return [torch.from_numpy(output) for output in outputs]


@dataclass
class _Graph:
    """A graph under construction, whose constants go straight to a file beside it."""

    inputs: dict[str, int]
    """Names and widths; every input is f32 (rows, width)."""
    int8: bool
    constants: BinaryIO
    nodes: list[Any] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def add(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def constant(self, name: str, values: Array) -> str:
        start = -(-self.constants.tell() // _ALIGNMENT) * _ALIGNMENT
        self.constants.seek(start)
        self.constants.write(np.ascontiguousarray(values).data.cast("B"))
        tensor = TensorProto(
            name=name,
            dims=values.shape,
            data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": Path(self.constants.name).name, "offset": start, "length": values.nbytes}
        tensor.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
        self.initializers.append(tensor)
        return name

    def shape(self, name: str, *values: int) -> str:
        """Add a constant that shapes depend on, which has to stand in the graph itself; return its name."""
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def multiply(self, rows: str, to: str, matrix: torch.Tensor, bias: torch.Tensor | None) -> str:
        product = to if bias is None else f"{to}.product"
        if self.int8:
            outputs, inputs = matrix.shape
            weights = [self.constant(f"{to}.{part}", values) for part, values in _quantise(matrix).items()]
            shape = {"N": outputs, "K": inputs, "bits": 8, "block_size": _BLOCK_INPUTS, "accuracy_level": 4}
            self.add("MatMulNBits", [rows, *weights], [product], domain=_CONTRIBUTED, **shape)
        else:
            self.add("MatMul", [rows, self.constant(f"{to}.matrix", matrix.t().numpy())], [product])
        return product if bias is None else self.add("Add", [product, self.constant(f"{to}.bias", bias.numpy())], [to])

    def norm(self, rows: str, to: str, weight: torch.Tensor, epsilon: float) -> str:
        scale = self.constant(f"{to}.scale", weight.float().numpy())
        return self.add("SimplifiedLayerNormalization", [rows, scale], [to], axis=-1, epsilon=epsilon)

    def save(self, path: Path, outputs: Mapping[str, int]) -> None:
        """Write the graph, which gives `outputs`: f32 (rows, width) each."""
        graph = helper.make_graph(
            self.nodes, path.stem, _described(self.inputs), _described(outputs), self.initializers
        )
        model: ModelProto = helper.make_model(graph, opset_imports=_OPERATORS, ir_version=_IR_VERSION)
        path.write_bytes(model.SerializeToString())


def _described(widths: Mapping[str, int]) -> list[ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width]) for name, width in widths.items()]


def _quantise(matrix: torch.Tensor) -> dict[str, Array]:
    """Return a matrix (outputs, inputs) in blocks: elements u8 around 128 (outputs, blocks, 32), scales f32."""
    outputs, inputs = matrix.shape
    blocks = -(-inputs // _BLOCK_INPUTS)
    padded = torch.nn.functional.pad(matrix.float(), (0, blocks * _BLOCK_INPUTS - inputs))
    padded = padded.view(outputs, blocks, _BLOCK_INPUTS)
    scales = padded.abs().amax(2).clamp_min(1e-12).div(127)
    elements = padded.div(scales.unsqueeze(2)).round_().add_(128).to(torch.uint8)
    return {"elements": elements.numpy(), "scales": scales.numpy()}


@torch.inference_mode()
def _write(span: LoadedSpan, folder: Path, arithmetic: str) -> None:
    """Write the graphs of a span: 0 the part before the first attention, then the part after each; and the head."""
    blocks: list[Any] = list(span.blocks)
    hidden, epsilon = span.hidden_size, span.model.config.rms_norm_eps
    for number in range(len(blocks) + 1):
        before, after = (blocks[n] if 0 <= n < len(blocks) else None for n in (number - 1, number))
        with (folder / f"{number}.constants").open("wb") as constants:
            inputs: dict[str, int] = {"hidden": hidden}
            outputs: dict[str, int] = {}
            if before is not None:
                inputs["attended"], outputs["output"] = before.self_attn.o_proj.in_features, hidden
            graph = _Graph(inputs, arithmetic == "int8", constants)
            block_input = "hidden" if before is None else _complete(graph, before, epsilon)
            if after is not None:
                half = after.self_attn.head_dim // 2
                graph.inputs |= {"cos": half, "sin": half}
                normed = graph.norm(block_input, "input.normed", after.input_layernorm.weight, epsilon)
                outputs |= _qkv(graph, after.self_attn, normed, epsilon)
            graph.save(folder / f"{number}.onnx", outputs)
    if span.is_last:
        base: Any = span.base
        head: Any = span.model.get_output_embeddings()
        with (folder / "head.constants").open("wb") as constants:
            graph = _Graph({"hidden": hidden}, arithmetic == "int8", constants)
            normed = graph.norm("hidden", "normed", base.norm.weight, epsilon)
            graph.multiply(normed, "logits", head.weight, getattr(head, "bias", None))
            graph.save(folder / "head.onnx", {"logits": span.vocabulary_size})


def _qkv(graph: _Graph, attention: Any, normed: str, epsilon: float) -> dict[str, int]:
    """Add the projections before a block's attention; return the names and widths of their outputs."""
    queries, keys, values = attention.q_proj, attention.k_proj, attention.v_proj
    matrix, bias = fuse(queries, keys)
    size = attention.head_dim
    count = len(matrix) // size
    heads = graph.multiply(normed, "heads", matrix, bias)
    if hasattr(attention, "q_norm"):
        split = graph.add("Reshape", [heads, graph.shape("by head", 0, count, size)], ["split"])
        normed_heads = graph.norm(split, "heads.normed", torch.ones(size), epsilon)
        norms = [
            norm.weight.float().expand(len(projection.weight) // size, size)
            for norm, projection in ((attention.q_norm, queries), (attention.k_norm, keys))
        ]
        scale = graph.constant("head scales", torch.cat(norms).numpy())
        scaled = graph.add("Mul", [normed_heads, scale], ["heads.scaled"])
        heads = graph.add("Reshape", [scaled, graph.shape("by row", 0, count * size)], ["heads.flat"])
    # The operator wants a batch, and positions as places in its tables, which hold those of the rows in order.
    batch = graph.add("Unsqueeze", [heads, graph.shape("axis", 0)], ["batch"])
    inputs = [batch, graph.shape("first", 0), "cos", "sin"]
    rotated = graph.add("RotaryEmbedding", inputs, ["rotated.batch"], domain=_CONTRIBUTED, num_heads=count)
    graph.add("Squeeze", [rotated, "axis"], ["rotated"])
    graph.multiply(normed, "values", *fuse(values))
    return {"rotated": count * size, "values": len(values.weight)}


def _complete(graph: _Graph, block: Any, epsilon: float) -> str:
    """Add what follows a block's attention; return the name of the block's output."""
    projected = graph.multiply("attended", "out", *fuse(block.self_attn.o_proj))
    between = graph.add("Add", [projected, "hidden"], ["between"])
    normed = graph.norm(between, "between.normed", block.post_attention_layernorm.weight, epsilon)
    gate = graph.multiply(normed, "gate", *fuse(block.mlp.gate_proj))
    up = graph.multiply(normed, "up", *fuse(block.mlp.up_proj))
    active = graph.add("QuickGelu", [gate], ["active"], domain=_CONTRIBUTED, alpha=1.0)  # x * sigmoid(x): SiLU
    gated = graph.add("Mul", [active, up], ["gated"])
    return graph.add("Add", [graph.multiply(gated, "down", *fuse(block.mlp.down_proj)), between], ["output"])
