"""Segments as ONNX graphs, which onnxruntime calculates, in fp32 or with weights of 8 or 4 bits.

A span is cut at its attention (see `node.engine.backends.batched`), because onnxruntime has no paged attention on CPUs:
GroupQueryAttention needs each session's keys contiguous and all sessions at the same stride, and would copy the KV
memory of a ragged batch in each step. The rest, all the matrices, is what onnxruntime is good at.

int8 and int4 are symmetric, with a scale for each 32 or 64 inputs of an output, and multiplied in int8: the operator
(MatMulNBits, accuracy level 4) rounds the rows, too, in blocks with scales of their own, which costs next to no
quality, unlike one scale for a whole row (`w8a8`).

Graphs are written block by block, each matrix piece by piece, so that building takes little memory.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from node.engine.backends.torch import joint_bias
from node.engine.interface import EngineError
from node.engine.kv_cache import KvCache
from node.engine.loading import LoadedSpan
from node.util.disk_cache import FolderCache
from node.util.text import one_line

FORMAT: Final = 3
"""Of the graphs; part of their name in a cache, so that a version with other graphs makes its own."""

_PIECE_ELEMENTS = 1 << 22
_OPERATORS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
_IR_VERSION = 10
_ALIGNMENT = 4096
_CONTRIBUTED = "com.microsoft"

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How matrices are rounded. `block_inputs`: of an output, that share a scale."""

    bits: int
    block_inputs: int

    def of(self, matrix: torch.Tensor) -> tuple[Array, Array]:
        """Return a matrix (outputs, inputs) in blocks: elements u8 (outputs, blocks, bytes), scales f32."""
        outputs, inputs = matrix.shape
        blocks = -(-inputs // self.block_inputs)
        padded = torch.nn.functional.pad(matrix.float(), (0, blocks * self.block_inputs - inputs))
        padded = padded.view(outputs, blocks, self.block_inputs)
        if self.bits == 8:  # around 128
            scales = padded.abs().amax(2).clamp_min(1e-12).div(127)
            elements = padded.div(scales.unsqueeze(2)).round_().add_(128).to(torch.uint8)
            return elements.numpy(), scales.numpy()
        # Around 8. The largest of a block becomes 0, by a scale of the other sign, as there is one more number below 8.
        largest = padded.gather(2, padded.abs().argmax(2, keepdim=True)).squeeze(2)
        scales = torch.where(largest.abs() < 1e-12, 1e-12, largest.div(-8))
        elements = padded.div(scales.unsqueeze(2)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
        return (elements[..., 0::2] | elements[..., 1::2] << 4).numpy(), scales.numpy()


QUANTISATIONS: Final = {"int8": Quantisation(8, 32), "int4": Quantisation(4, 64)}
"""Of the arithmetics that round; fp32 does not."""


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
        context, name = self._context, f"{self._context.name}-{arithmetic}-{FORMAT}"
        try:
            return BatchedSpan(context, open_graphs(context.span, name, arithmetic, context.disk_cache), kv)
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
    quantisation: Quantisation | None
    constants: BinaryIO
    nodes: list[Any] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def add(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def constant(self, name: str, *pieces: Array) -> str:
        """Add a constant, whose pieces stand one after another."""
        with self._writing(name, pieces[0].dtype, (sum(map(len, pieces)), *pieces[0].shape[1:])) as write:
            for piece in pieces:
                write(piece)
        return name

    @contextmanager
    def _writing(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> Iterator[Callable[[Array], int]]:
        """Add a constant, whose elements are written in the block, in order."""
        start = -(-self.constants.tell() // _ALIGNMENT) * _ALIGNMENT
        self.constants.seek(start)
        yield lambda values: self.constants.write(np.ascontiguousarray(values).data.cast("B"))
        tensor = TensorProto(
            name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(dtype), data_location=TensorProto.EXTERNAL
        )
        place = {"location": Path(self.constants.name).name, "offset": start, "length": self.constants.tell() - start}
        tensor.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
        self.initializers.append(tensor)

    def shape(self, name: str, *values: int) -> str:
        """Add a constant that shapes depend on, which has to stand in the graph itself; return its name."""
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def multiply(self, rows: str, to: str, *linears: Any) -> str:
        """Add the product of rows and matrices side by side, with their bias; return its name."""
        matrices, bias = [linear.weight for linear in linears], joint_bias(*linears)
        product = to if bias is None else f"{to}.product"
        if self.quantisation is None:
            self.add("MatMul", [rows, self._transposed(f"{to}.matrix", matrices)], [product])
        else:
            self._multiply_quantised(rows, to, product, matrices, self.quantisation)
        return product if bias is None else self.add("Add", [product, self.constant(f"{to}.bias", bias.numpy())], [to])

    def _transposed(self, name: str, matrices: Sequence[torch.Tensor]) -> str:
        inputs, outputs = matrices[0].shape[1], sum(map(len, matrices))
        count = max(1, _PIECE_ELEMENTS // outputs)
        with self._writing(name, np.dtype(np.float32), (inputs, outputs)) as write:
            for start in range(0, inputs, count):
                columns = [matrix[:, start : start + count].float().t() for matrix in matrices]
                write(torch.cat(columns, dim=1).numpy())
        return name

    def _multiply_quantised(
        self, rows: str, to: str, product: str, matrices: Sequence[torch.Tensor], how: Quantisation
    ) -> None:
        inputs, outputs = matrices[0].shape[1], sum(map(len, matrices))
        count = max(1, _PIECE_ELEMENTS // inputs)
        blocks = -(-inputs // how.block_inputs)
        elements, scales = f"{to}.elements", list[Array]()
        shape = (outputs, blocks, how.block_inputs * how.bits // 8)
        with self._writing(elements, np.dtype(np.uint8), shape) as write:
            for piece in (piece for matrix in matrices for piece in matrix.split(count)):
                rounded, scale = how.of(piece)
                write(rounded)
                scales.append(scale)
        names = [rows, elements, self.constant(f"{to}.scales", *scales)]
        sizes = {"N": outputs, "K": inputs, "bits": how.bits, "block_size": how.block_inputs, "accuracy_level": 4}
        self.add("MatMulNBits", names, [product], domain=_CONTRIBUTED, **sizes)

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
            graph = _Graph(inputs, QUANTISATIONS.get(arithmetic), constants)
            block_input = "hidden" if before is None else _complete(graph, before, epsilon)
            if after is not None:
                half = after.self_attn.head_dim // 2
                graph.inputs |= {"cos": half, "sin": half}
                normed = graph.norm(block_input, "input.normed", after.input_layernorm.weight, epsilon)
                outputs |= _qkv(graph, after.self_attn, normed, epsilon)
            graph.save(folder / f"{number}.onnx", outputs)
        if before is not None:
            span.block_files[number - 1].drop_pages()
    if span.is_last:
        base: Any = span.base
        head: Any = span.model.get_output_embeddings()
        with (folder / "head.constants").open("wb") as constants:
            graph = _Graph({"hidden": hidden}, QUANTISATIONS.get(arithmetic), constants)
            normed = graph.norm("hidden", "normed", base.norm.weight, epsilon)
            graph.multiply(normed, "logits", head)
            graph.save(folder / "head.onnx", {"logits": span.vocabulary_size})
        for file in span.outer_files:
            file.drop_pages()


def _qkv(graph: _Graph, attention: Any, normed: str, epsilon: float) -> dict[str, int]:
    """Add the projections before a block's attention; return the names and widths of their outputs."""
    queries, keys, values = attention.q_proj, attention.k_proj, attention.v_proj
    size = attention.head_dim
    count = (len(queries.weight) + len(keys.weight)) // size
    heads = graph.multiply(normed, "heads", queries, keys)
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
    graph.multiply(normed, "values", values)
    return {"rotated": count * size, "values": len(values.weight)}


def _complete(graph: _Graph, block: Any, epsilon: float) -> str:
    """Add what follows a block's attention; return the name of the block's output."""
    projected = graph.multiply("attended", "out", block.self_attn.o_proj)
    between = graph.add("Add", [projected, "hidden"], ["between"])
    normed = graph.norm(between, "between.normed", block.post_attention_layernorm.weight, epsilon)
    gate = graph.multiply(normed, "gate", block.mlp.gate_proj)
    up = graph.multiply(normed, "up", block.mlp.up_proj)
    active = graph.add("QuickGelu", [gate], ["active"], domain=_CONTRIBUTED, alpha=1.0)  # x * sigmoid(x): SiLU
    gated = graph.add("Mul", [active, up], ["gated"])
    return graph.add("Add", [graph.multiply(gated, "down", block.mlp.down_proj), between], ["output"])
