"""GGUF packages cut into spans, and llama.cpp alone on the whole published file, which they are compared with."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from node.engine.interface import EngineOptions, ShardSource
from node.engine.llamacpp.context import ContextOptions, Floats, SequenceRows, SpanContext
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.shard import LlamaShard
from node.engine.llamacpp.span_model import SpanModel
from node.models.gguf_config import read_config
from node.models.gguf_file import GgufModel, read_gguf
from node.models.gguf_layout import OUTPUT_MATRIX
from node.models.gguf_package import arrange_package
from node.models.layout import GGUF, block_file, part_file
from protocol.identity import BlockRange, ModelId

POSITIONS = 1024


@dataclass(frozen=True)
class GgufFiles:
    """A published file, and the files of its package in a folder."""

    model: GgufModel
    folder: Path

    @property
    def block_count(self) -> int:
        return self.model.integer("block_count")

    @property
    def vocabulary_size(self) -> int:
        return self.model.tensors["token_embd.weight"].shape[0]

    def source(self, blocks: BlockRange) -> ShardSource:
        first, last = blocks.start == 0, blocks.end == self.block_count
        tied = OUTPUT_MATRIX not in self.model.tensors
        return ShardSource(
            model=ModelId("ab" * 32),
            config=read_config(self.model),
            block_files={block: self.folder / block_file(block, GGUF) for block in range(blocks.start, blocks.end)},
            embed_file=self.folder / part_file("embed", GGUF) if first or (last and tied) else None,
            head_file=self.folder / part_file("head", GGUF) if last else None,
            format=GGUF,
            common_file=self.folder / part_file("common", GGUF),
        )

    def shards(self, cuts: Sequence[int], options: EngineOptions | None = None) -> list[LlamaShard]:
        """Open the spans between the cuts."""
        options = options or EngineOptions(threads=1, kv_positions=POSITIONS)
        edges = [0, *cuts, self.block_count]
        spans = [BlockRange(start, end) for start, end in itertools.pairwise(edges)]
        return [LlamaShard(self.source(blocks), blocks, options) for blocks in spans]

    def alone(self, sequences: int = 1, positions: int = POSITIONS) -> "Alone":
        return Alone(self, sequences, positions)


def write_package(path: Path, folder: Path) -> GgufFiles:
    """Split a published file into the files of its package."""
    model = read_gguf(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in arrange_package(model).parts.items():
        part.write(folder / name, lambda _count: None)
    return GgufFiles(model, folder)


class Alone:
    """llama.cpp on the whole published file, one text at a time."""

    def __init__(self, files: GgufFiles, sequences: int = 1, positions: int = POSITIONS) -> None:
        held = (
            positions * 4 // 5
        )  # so that llama.cpp is asked for no larger context, on which rotary factors may depend
        options = ContextOptions(
            first=True, last=True, block_count=files.block_count, positions=held, sequences=sequences, threads=1
        )
        self.context = SpanContext(SpanModel(load_library(), files.model.paths[0]), options)

    def logits(self, tokens: Sequence[int], position: int = 0, outputs: int = 1) -> Floats:
        self.context.truncate(0, position)
        return self.context.run([SequenceRows(0, position, np.array(tokens, np.int32), outputs)])[0]

    def decode(self, prompt: Sequence[int], count: int) -> list[int]:
        """Continue a prompt greedily."""
        tokens = list(prompt)
        position = 0
        for _ in range(count):
            logits = self.logits(tokens[position:], position)
            position = len(tokens)
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :]
