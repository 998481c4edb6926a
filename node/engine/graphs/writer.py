"""Writes the graphs of a span of the Llama family.

A span is cut at its attention, because onnxruntime has no paged attention on CPUs: GroupQueryAttention needs each
session's keys contiguous and all sessions at the same stride, and would copy the KV memory of a ragged batch in each
step. The rest, all the matrices, is what onnxruntime is good at.

Quantised matrices are multiplied in int8: the operator (MatMulNBits, accuracy level 4) rounds the rows, too, in blocks
with scales of their own, which costs next to no quality, unlike one scale for a whole row. Offsets of blocks are a
product of their own, of the sums of the rows' blocks and the offsets, in which nothing is rounded.

Graphs are written block by block, each matrix piece by piece, so that writing takes little memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, StringStringEntryProto, TensorProto, ValueInfoProto, helper

from node.engine.graphs.matrix import Floats, GraphBlock, Matrix, Quantisation, packed_nibbles

_PIECE_ELEMENTS: Final = 1 << 22
_OPERATORS: Final = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
_IR_VERSION: Final = 10
_ALIGNMENT: Final = 4096
_CONTRIBUTED: Final = "com.microsoft"

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphShape:
    """Sizes of a span that its graphs depend on.

    `is_interleaved`: whether rotary embedding turns neighbouring elements of a head, not those half a head apart.
    """

    hidden_size: int
    head_size: int
    epsilon: float
    is_interleaved: bool = False


def write_span(
    folder: Path, shape: GraphShape, blocks: Iterable[GraphBlock], written: Callable[[int], None] = lambda _: None
) -> None:
    """Write the graphs of blocks: 0 the part before the first attention, then the part after each.

    `written`: called with the number of each block that is not read again.
    """
    before: GraphBlock | None = None
    number = 0
    for after in (*blocks, None):
        with (folder / f"{number}.constants").open("wb") as constants:
            graph = _Graph({"hidden": shape.hidden_size}, constants)
            outputs: dict[str, int] = {}
            block_input = "hidden"
            if before is not None:
                graph.inputs["attended"], outputs["output"] = before.out.inputs, shape.hidden_size
                block_input = _complete(graph, before, shape)
            if after is not None:
                graph.inputs |= {"cos": shape.head_size // 2, "sin": shape.head_size // 2}
                normed = graph.norm(block_input, "input.normed", after.norm, shape.epsilon)
                outputs |= _qkv(graph, after, normed, shape)
            graph.save(folder / f"{number}.onnx", outputs)
        if number:
            written(number - 1)
        before, number = after, number + 1


def write_head(folder: Path, shape: GraphShape, norm: Floats, head: Matrix) -> None:
    """Write the graph behind the model's last block."""
    with (folder / "head.constants").open("wb") as constants:
        graph = _Graph({"hidden": shape.hidden_size}, constants)
        graph.multiply(graph.norm("hidden", "normed", norm, shape.epsilon), "logits", head)
        graph.save(folder / "head.onnx", {"logits": head.outputs})


def _qkv(graph: "_Graph", block: GraphBlock, normed: str, shape: GraphShape) -> dict[str, int]:
    """Add the projections before a block's attention; return the names and widths of their outputs."""
    size = shape.head_size
    counts = [matrix.outputs // size for matrix in (block.queries, block.keys)]
    count = sum(counts)
    heads = graph.multiply(normed, "heads", block.queries, block.keys)
    if block.head_norms is not None:
        split = graph.add("Reshape", [heads, graph.shape("by head", 0, count, size)], ["split"])
        normed_heads = graph.norm(split, "heads.normed", np.ones(size, np.float32), shape.epsilon)
        norms = [np.tile(norm, (each, 1)) for norm, each in zip(block.head_norms, counts, strict=True)]
        scale = graph.constant("head scales", np.concatenate(norms))
        scaled = graph.add("Mul", [normed_heads, scale], ["heads.scaled"])
        heads = graph.add("Reshape", [scaled, graph.shape("by row", 0, count * size)], ["heads.flat"])
    # The operator wants a batch, and positions as places in its tables, which hold those of the rows in order.
    batch = graph.add("Unsqueeze", [heads, graph.shape("axis", 0)], ["batch"])
    inputs = [batch, graph.shape("first", 0), "cos", "sin"]
    how = {"num_heads": count, "interleaved": int(shape.is_interleaved)}
    rotated = graph.add("RotaryEmbedding", inputs, ["rotated.batch"], domain=_CONTRIBUTED, **how)
    graph.add("Squeeze", [rotated, "axis"], ["rotated"])
    graph.multiply(normed, "values", block.values)
    return {"rotated": count * size, "values": block.values.outputs}


def _complete(graph: "_Graph", block: GraphBlock, shape: GraphShape) -> str:
    """Add what follows a block's attention; return the name of the block's output."""
    projected = graph.multiply("attended", "out", block.out)
    between = graph.add("Add", [projected, "hidden"], ["between"])
    normed = graph.norm(between, "between.normed", block.mlp_norm, shape.epsilon)
    gate = graph.multiply(normed, "gate", block.gate)
    up = graph.multiply(normed, "up", block.up)
    active = graph.add("QuickGelu", [gate], ["active"], domain=_CONTRIBUTED, alpha=1.0)  # x * sigmoid(x): SiLU
    gated = graph.add("Mul", [active, up], ["gated"])
    return graph.add("Add", [graph.multiply(gated, "down", block.down), between], ["output"])


@dataclass
class _Graph:
    """A graph under construction, whose constants go straight to a file beside it."""

    inputs: dict[str, int]
    """Names and widths; every input is f32 (rows, width)."""
    constants: BinaryIO
    nodes: list[Any] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    sums: dict[tuple[str, int], str] = field(default_factory=dict)
    """By rows and size of a block, the sums of the rows' blocks."""

    def add(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def constant(self, name: str, values: Array) -> str:
        """Add a constant."""
        with self._writing(name, values.dtype, values.shape) as write:
            write(values)
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
        if all(each.name != name for each in self.initializers):
            self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def multiply(self, rows: str, to: str, *matrices: Matrix) -> str:
        """Add the product of rows and matrices side by side, with their bias; return its name."""
        if len({(matrix.quantisation, matrix.bias is None) for matrix in matrices}) > 1:
            parts = [self.multiply(rows, f"{to}.{number}", matrix) for number, matrix in enumerate(matrices)]
            return self.add("Concat", parts, [to], axis=1)
        biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
        product = f"{to}.product" if biases else to
        quantisation = matrices[0].quantisation
        if quantisation is None:
            self.add("MatMul", [rows, self._transposed(f"{to}.matrix", matrices)], [product])
        else:
            self._multiply_quantised(rows, to, product, matrices, quantisation)
        if not biases:
            return product
        return self.add("Add", [product, self.constant(f"{to}.bias", np.concatenate(biases))], [to])

    def _transposed(self, name: str, matrices: Sequence[Matrix]) -> str:
        inputs, outputs = matrices[0].inputs, sum(matrix.outputs for matrix in matrices)
        count = max(1, _PIECE_ELEMENTS // outputs)
        with self._writing(name, np.dtype(np.float32), (inputs, outputs)) as write:
            for start in range(0, inputs, count):
                end = min(inputs, start + count)
                write(np.concatenate([matrix.columns(start, end) for matrix in matrices], axis=1))
        return name

    def _multiply_quantised(
        self, rows: str, to: str, product: str, matrices: Sequence[Matrix], how: Quantisation
    ) -> None:
        inputs, outputs = matrices[0].inputs, sum(matrix.outputs for matrix in matrices)
        count, blocks = max(1, _PIECE_ELEMENTS // inputs), how.blocks_of(inputs)
        scales, offsets = list[Floats](), list[Floats]()
        shape = (outputs, blocks, how.block_inputs * how.bits // 8)
        with self._writing(f"{to}.elements", np.dtype(np.uint8), shape) as write:
            for matrix in matrices:
                for start in range(0, matrix.outputs, count):
                    piece = matrix.rows(start, min(matrix.outputs, start + count))
                    write(packed_nibbles(piece.numbers) if how.bits == 4 else piece.numbers)
                    scales.append(piece.scales)
                    if piece.offsets is not None:
                        offsets.append(piece.offsets)
        names = [rows, f"{to}.elements", self.constant(f"{to}.scales", np.concatenate(scales))]
        sizes = {"N": outputs, "K": inputs, "bits": how.bits, "block_size": how.block_inputs, "accuracy_level": 4}
        if not how.has_offsets:
            self.add("MatMulNBits", names, [product], domain=_CONTRIBUTED, **sizes)
            return
        self.add("MatMulNBits", names, [f"{to}.scaled"], domain=_CONTRIBUTED, **sizes)
        by_block = self.constant(f"{to}.offsets", np.concatenate(offsets).T)
        added = self.add("MatMul", [self._block_sums(rows, blocks, how.block_inputs), by_block], [f"{to}.added"])
        self.add("Add", [f"{to}.scaled", added], [product])

    def _block_sums(self, rows: str, blocks: int, block_inputs: int) -> str:
        if (rows, block_inputs) not in self.sums:
            shape = self.shape(f"{blocks} of {block_inputs}", 0, blocks, block_inputs)
            split = self.add("Reshape", [rows, shape], [f"{rows}.by{block_inputs}"])
            axis, name = self.shape("last axis", 2), f"{rows}.sums{block_inputs}"
            self.sums[rows, block_inputs] = self.add("ReduceSum", [split, axis], [name], keepdims=0)
        return self.sums[rows, block_inputs]

    def norm(self, rows: str, to: str, weight: Floats, epsilon: float) -> str:
        scale = self.constant(f"{to}.scale", weight)
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
