"""The variant of a GGUF package that onnxruntime computes, beside llama.cpp: refused, possible, or built."""

from typing import Final

from node.engine.graphs.runner import GraphSpan
from node.engine.importing import importing
from node.engine.interface import PAGE_POSITIONS, EngineError, EngineOptions, SpanInfo, Variant
from node.engine.kv_allocator import page_count
from node.engine.llamacpp.embedding import Embedding
from node.engine.llamacpp.graph_model import GraphModel, graph_model, write_graphs
from node.engine.llamacpp.library import Library
from node.engine.llamacpp.span_file import EMBEDDING, SpanTensors
from node.engine.memory_plan import PLANNED_POSITIONS, mebibytes
from node.util.disk_cache import FolderCache
from node.util.heap import trim_heap
from node.util.processor import physical_cores
from protocol.identity import BlockRange

GRAPHS: Final = Variant("onnxruntime", "native")
"""The weights as they were published, in onnxruntime; built when a job names it."""

_SHARE: Final = 0.5
"""Of the memory beside llama.cpp's weights: graphs have room where they take no more of it."""


class GraphVariant:
    """The graphs of a span, and their memory. onnxruntime is imported when they are built."""

    def __init__(self, library: Library, tensors: SpanTensors, blocks: BlockRange) -> None:
        self._library = library
        self._tensors = tensors
        self._model: GraphModel | None = None
        self._refusal: str | None = None
        self._span: GraphSpan | None = None
        try:
            self._model = graph_model(tensors, blocks)
        except EngineError as error:
            self._refusal = str(error)

    @property
    def is_built(self) -> bool:
        """Whether it is ready."""
        return self._span is not None

    @property
    def span(self) -> GraphSpan:
        """What runs it, once it is built."""
        assert self._span is not None
        return self._span

    def pages_beside(self, free_bytes: int, page_bytes: int, narrowest: float) -> int | None:
        """Return how many pages fit into memory beside the graphs, with keys and values for both engines.

        `page_bytes`: of a page without the graphs' keys and values. `narrowest`: the share of that which a page of the
        narrowest type takes: there are the more of these, and the graphs' memory has room for as many. None where
        graphs have no room, which are refused then: the planned positions come first.
        """
        if self._model is None:
            return None
        weight_bytes = self._model.weight_bytes
        kv_bytes = int(PAGE_POSITIONS * self._model.kv_bytes_per_position / narrowest)
        pages = (free_bytes - weight_bytes) // (page_bytes + kv_bytes)
        if weight_bytes <= free_bytes * _SHARE and pages * PAGE_POSITIONS >= PLANNED_POSITIONS:
            return pages
        needed_bytes = weight_bytes + PLANNED_POSITIONS // PAGE_POSITIONS * kv_bytes
        self._refusal = (
            f"{GRAPHS} takes {mebibytes(needed_bytes)} of memory, too much of the {mebibytes(free_bytes)} beside "
            "llama.cpp's weights"
        )
        return None

    def start_threads(self, options: EngineOptions) -> None:
        """Start the threads of the steps, from the thread that runs them. Raises EngineError."""
        if self._refusal is None:
            with importing("onnxruntime"):
                from node.engine.graphs.sessions import start_graph_threads

            start_graph_threads(options.threads or physical_cores())

    def build(self, info: SpanInfo, options: EngineOptions) -> None:
        """Write the graphs, unless the disk cache has them, open and warm them. Raises EngineError."""
        if self._span is not None:
            return
        if self._model is None or self._refusal is not None:
            raise EngineError(self._refusal or "")
        with importing("onnxruntime"):
            from node.engine.graphs.sessions import FORMAT, open_graphs

        model = self._model
        self.start_threads(options)
        try:
            graphs = open_graphs(
                f"{info.model}-{info.blocks.start}-{info.blocks.end}-native-{FORMAT}",
                None if options.cache_dir is None else FolderCache(options.cache_dir),
                lambda folder: write_graphs(model, folder),
                len(info.blocks),
                is_last=info.is_last,
            )
        except OSError as error:
            raise EngineError(f"no graphs for {GRAPHS}: {error}") from error
        embed = None
        if info.is_first:
            embed = Embedding(self._library, self._tensors.common, self._tensors.tensors[EMBEDDING]).rows
        self._span = GraphSpan(model.attention, graphs, page_count(info) * PAGE_POSITIONS, embed)
        trim_heap()
