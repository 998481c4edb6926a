"""The graphs of a span, opened by onnxruntime."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from node.engine.interface import EngineError
from node.util.disk_cache import FolderCache
from node.util.text import one_line

FORMAT: Final = 5
"""Of the graphs; part of their name in a cache, so that a version with other graphs makes its own."""

Floats = npt.NDArray[np.float32]


def start_graph_threads(count: int) -> None:
    """Start the threads that all graphs of this process share, once; they inherit the caller's priority."""
    with suppress(Exception):  # they have been started already, which raises a plain Exception
        onnxruntime.set_global_thread_pool_sizes(count, 1)


class SpanGraphs:
    """The graphs of a span, by their number, and the head of a last span."""

    def __init__(self, folder: Path, block_count: int, *, is_last: bool) -> None:
        """Open the graphs in a folder. Raises EngineError where they are damaged."""
        try:
            self._between = [_session(folder / f"{number}.onnx") for number in range(block_count + 1)]
            self._head = _session(folder / "head.onnx") if is_last else None
        except Exception as error:  # onnxruntime's exceptions have no base class but Exception
            raise EngineError(f"the graphs in {folder} cannot be used: {one_line(error, 200)}") from error

    def __len__(self) -> int:
        return len(self._between)

    def run(self, number: int, inputs: Mapping[str, Floats]) -> list[Floats]:
        """Run the graph that ends with the attention of block `number`, or with the span's last block."""
        outputs: list[Any] = self._between[number].run(None, inputs)
        return outputs

    def logits(self, hidden: Floats) -> Floats:
        """Return logits."""
        assert self._head is not None
        outputs: list[Any] = self._head.run(None, {"hidden": hidden})
        logits: Floats = outputs[0]
        return logits


def open_graphs(
    name: str, cache: FolderCache | None, write: Callable[[Path], None], block_count: int, *, is_last: bool
) -> SpanGraphs:
    """Return the graphs of a span, from the cache if they are there under this name; `write` writes them to a folder.

    Without a cache they are built for this one use. Raises EngineError, OSError.
    """
    if cache is None:
        with tempfile.TemporaryDirectory() as temporary:
            write(Path(temporary))
            return SpanGraphs(Path(temporary), block_count, is_last=is_last)
    try:
        return SpanGraphs(cache.folder(name, write), block_count, is_last=is_last)
    except EngineError:
        cache.drop(name)  # and rebuild it: a file may be cut short
        return SpanGraphs(cache.folder(name, write), block_count, is_last=is_last)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
