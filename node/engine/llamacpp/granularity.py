"""Finds where a model may be cut: `python -m node.engine.llamacpp.granularity FILE.gguf`.

A span runs as a model of its own, whose blocks are counted from 0; some architectures derive from a block's number what
it does. So a tiny random model of the same architecture and as many blocks is cut at all multiples of 1, 2, 3, …
blocks, until the spans give the very logits of the whole. A process of its own, as llama.cpp ends its process on models
that it finds impossible. The result is `{"granularity": blocks}`: the number of all blocks where no cut is right, or
where no tiny model can be made, whose `"reason"` is told then. A failure is reported as `{"error": message}`, with the
exit code 1.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from node.engine.interface import EngineError
from node.engine.llamacpp.context import ContextOptions, Floats, SequenceRows, SpanContext
from node.engine.llamacpp.embedding import Embedding
from node.engine.llamacpp.kv_memory import PassFailed
from node.engine.llamacpp.library import Library, load_library
from node.engine.llamacpp.span_file import EMBEDDING, SpanTensors, at_hand, whole_model, write_span
from node.engine.llamacpp.span_model import SpanModel
from node.engine.llamacpp.tiny_model import write_tiny_model
from node.models.gguf_file import GgufError, GgufModel, read_gguf
from node.util.child_process import report
from node.util.text import one_line
from protocol.identity import BlockRange

_PROMPT_TOKENS: Final = 24
"""More than the tiny models' sliding windows."""

_POSITIONS: Final = 256


class UntriedError(Exception):
    """No tiny model can be made of the architecture: whether it can be cut is unknown. The message is one line."""


def find_granularity(model: GgufModel, folder: Path) -> int:
    """Return the smallest number of blocks at multiples of which a model may be cut, with tiny models in `folder`.

    Raises EngineError for an architecture that llama.cpp does not know, or cannot run at all, and UntriedError.
    """
    library = load_library()
    path = folder / "tiny.gguf"
    try:
        write_tiny_model(model, path)
    except GgufError as error:
        raise UntriedError(one_line(error)) from error
    tiny = whole_model(read_gguf(path))
    count = tiny.block_count
    try:
        wanted = _logits(library, tiny, folder, [])
    except PassFailed as error:
        raise EngineError(f"llama.cpp cannot run the architecture {model.architecture}: {error}") from None
    if not np.isfinite(wanted).all() or np.ptp(wanted) == 0:
        raise EngineError(f"the architecture {model.architecture} cannot be tried out: its logits are not finite")
    for granularity in range(1, count):
        cuts = list(range(granularity, count, granularity))
        # Every span at its shortest, then two long ones.
        if all(_agrees(library, tiny, folder, each, wanted) for each in (cuts, [cuts[len(cuts) // 2]])):
            return granularity
    return count


def _agrees(library: Library, tiny: SpanTensors, folder: Path, cuts: Sequence[int], wanted: Floats) -> bool:
    try:
        return np.array_equal(_logits(library, tiny, folder, cuts), wanted)
    except (EngineError, PassFailed):  # a part that llama.cpp cannot load or run
        return False


def _logits(library: Library, tiny: SpanTensors, folder: Path, cuts: Sequence[int]) -> Floats:
    """Return the logits after each token of a prompt and one more, computed by the spans between the cuts."""
    tokens = np.random.default_rng(0).integers(0, tiny.vocabulary_size, _PROMPT_TOKENS + 1).astype(np.int32)
    parts: list[Floats | np.ndarray[tuple[int], np.dtype[np.int32]]] = [tokens[:-1], tokens[-1:]]
    for start, end in pairwise([0, *cuts, tiny.block_count]):
        path = folder / "span.gguf"
        blocks = BlockRange(start, end)
        write_span(path, at_hand(tiny, blocks), blocks)
        first, last = start == 0, end == tiny.block_count
        options = ContextOptions(
            first=first,
            last=last,
            embedding=Embedding(library, tiny.common, tiny.tensors[EMBEDDING]) if first and not last else None,
            block_count=end - start,
            positions=_POSITIONS,
            sequences=1,
            threads=1,
        )
        context = SpanContext(SpanModel(library, path), options)
        path.unlink()  # it is mapped
        position = 0
        for number, rows in enumerate(parts):
            [parts[number]] = context.run([SequenceRows(0, position, rows, len(rows))])
            position += len(rows)
    return np.concatenate(parts)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.engine.llamacpp.granularity", description=__doc__)
    parser.add_argument("source", type=Path)
    options = parser.parse_args(arguments)
    try:
        load_library().keep_errors_quiet()
        model = read_gguf(options.source)
        with TemporaryDirectory(prefix="metaswarm-tiny-") as folder:
            try:
                report(granularity=find_granularity(model, Path(folder)))
            except UntriedError as error:
                report(granularity=model.integer("block_count"), reason=str(error))
    except (EngineError, GgufError, OSError) as error:
        report(error=one_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
