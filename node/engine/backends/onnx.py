"""Segments as ONNX graphs, which onnxruntime calculates, in fp32 or with weights of 8 or 4 bits.

int8 and int4 are symmetric, with a scale for each 32 or 64 inputs of an output.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from node.engine.backends.batched import QKV, BatchedSpan, RotaryTables
from node.engine.backends.interface import BackendContext
from node.engine.graphs.matrix import Floats, GraphBlock, Matrix, Quantisation, QuantisedRows
from node.engine.graphs.sessions import FORMAT, SpanGraphs, open_graphs, start_graph_threads
from node.engine.graphs.writer import GraphShape, write_head, write_span
from node.engine.interface import EngineError
from node.engine.kv_cache import KvCache
from node.engine.loading import LoadedSpan

QUANTISATIONS: Final = {"int8": Quantisation(8, 32), "int4": Quantisation(4, 64)}
"""Of the arithmetics that round; fp32 does not."""


class Backend:
    """Implements the backend `onnxruntime`."""

    def __init__(self, context: BackendContext) -> None:
        self._context = context

    def start_threads(self) -> None:
        """Start the threads that all graphs of this process share, once."""
        start_graph_threads(self._context.threads)

    def build(self, arithmetic: str, kv: KvCache) -> BatchedSpan:
        """Open the graphs of a variant, written to disk first if they are not cached there, and warm them."""
        self.start_threads()
        context, span = self._context, self._context.span

        def write(folder: Path) -> None:
            write_graphs(span, folder, arithmetic)

        name = f"{context.name}-{arithmetic}-{FORMAT}"
        try:
            graphs = open_graphs(name, context.disk_cache, write, len(span.blocks), is_last=span.is_last)
        except OSError as error:
            raise EngineError(f"no graphs for onnxruntime/{arithmetic}: {error}") from error
        return BatchedSpan(context, OnnxSegments(graphs), kv)

    def forget(self, arithmetic: str) -> None:
        """Nothing to do: each variant has its own graphs."""


class OnnxSegments:
    """A span whose segments onnxruntime calculates; see `node.engine.backends.batched.Segments`."""

    def __init__(self, graphs: SpanGraphs) -> None:
        self._graphs = graphs

    def qkv(self, number: int, hidden: torch.Tensor, rotary: RotaryTables) -> QKV:
        """Return the inputs of the first block's attention: there is no graph that begins at another."""
        if number:
            raise EngineError("a graph begins at the first block of its span")
        return QKV(*self._run(0, hidden=hidden, cos=rotary.cos, sin=rotary.sin))

    def post_attention(
        self, number: int, hidden: torch.Tensor, attended: torch.Tensor, rotary: RotaryTables
    ) -> tuple[torch.Tensor, QKV | None]:
        """Complete a block; return its output, and the inputs of the next one's attention."""
        if number + 2 == len(self._graphs):
            return self._run(number + 1, hidden=hidden, attended=attended)[0], None
        output, *qkv = self._run(number + 1, hidden=hidden, attended=attended, cos=rotary.cos, sin=rotary.sin)
        return output, QKV(*qkv)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return torch.from_numpy(self._graphs.logits(hidden.numpy()))

    def _run(self, number: int, **rows: torch.Tensor) -> list[torch.Tensor]:
        outputs = self._graphs.run(number, {name: values.numpy() for name, values in rows.items()})
        return [torch.from_numpy(output) for output in outputs]


@dataclass(frozen=True, slots=True)
class _RoundedMatrix:
    """A linear module's matrix, rounded while it is written."""

    linear: Any
    quantisation: Quantisation | None

    @property
    def outputs(self) -> int:
        return len(self.linear.weight)

    @property
    def inputs(self) -> int:
        inputs: int = self.linear.weight.shape[1]
        return inputs

    @property
    def bias(self) -> Floats | None:
        return None if self.linear.bias is None else _floats(self.linear.bias)

    def columns(self, start: int, end: int) -> Floats:
        return _floats(self.linear.weight[:, start:end].t())

    def rows(self, start: int, end: int) -> QuantisedRows:
        assert self.quantisation is not None
        return rounded(self.linear.weight[start:end], self.quantisation)


def rounded(matrix: torch.Tensor, how: Quantisation) -> QuantisedRows:
    """Return a matrix (outputs, inputs) in blocks."""
    outputs, inputs = matrix.shape
    blocks = how.blocks_of(inputs)
    padded = torch.nn.functional.pad(matrix.float(), (0, blocks * how.block_inputs - inputs))
    padded = padded.view(outputs, blocks, how.block_inputs)
    if how.bits == 8:  # around 128
        scales = padded.abs().amax(2).clamp_min(1e-12).div(127)
        numbers = padded.div(scales.unsqueeze(2)).round_().add_(128).to(torch.uint8)
        return QuantisedRows(numbers.numpy(), scales.numpy())
    # Around 8. The largest of a block becomes 0, by a scale of the other sign, as there is one more number below 8.
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True)).squeeze(2)
    scales = torch.where(largest.abs() < 1e-12, 1e-12, largest.div(-8))
    numbers = padded.div(scales.unsqueeze(2)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    return QuantisedRows(numbers.numpy(), scales.numpy())


@torch.inference_mode()
def write_graphs(span: LoadedSpan, folder: Path, arithmetic: str) -> None:
    """Write the graphs of a span, a block at a time, whose file's memory is given back then."""
    quantisation = QUANTISATIONS.get(arithmetic)
    blocks: Any = span.blocks
    shape = GraphShape(
        hidden_size=span.hidden_size, head_size=blocks[0].self_attn.head_dim, epsilon=span.model.config.rms_norm_eps
    )
    write_span(folder, shape, _blocks(blocks, quantisation), lambda number: span.block_files[number].drop_pages())
    if span.is_last:
        base: Any = span.base
        head: Matrix = _RoundedMatrix(span.model.get_output_embeddings(), quantisation)
        write_head(folder, shape, _floats(base.norm.weight), head)
        for file in span.outer_files:
            file.drop_pages()


def _blocks(blocks: Any, quantisation: Quantisation | None) -> Iterator[GraphBlock]:
    def matrix(linear: Any) -> Matrix:
        return _RoundedMatrix(linear, quantisation)

    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        yield GraphBlock(
            norm=_floats(block.input_layernorm.weight),
            queries=matrix(attention.q_proj),
            keys=matrix(attention.k_proj),
            values=matrix(attention.v_proj),
            head_norms=(_floats(norms[0].weight), _floats(norms[1].weight)) if norms else None,
            out=matrix(attention.o_proj),
            mlp_norm=_floats(block.post_attention_layernorm.weight),
            gate=matrix(mlp.gate_proj),
            up=matrix(mlp.up_proj),
            down=matrix(mlp.down_proj),
        )


def _floats(values: torch.Tensor) -> Floats:
    floats: Floats = values.detach().float().numpy()
    return floats
