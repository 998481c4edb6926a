"""The GGUF file of a span: its blocks as a smaller model of the same architecture, which llama.cpp runs as any other.

The blocks are renumbered from 0, `block_count` is the span's, and metadata by block are cut alike. There is no
tokenizer. Tensors that another span computes with (the head, an embedding that is not the head, too) are replaced by
zeros, because llama.cpp requires them: holes in the file, which are never read and take neither disk nor memory.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypeVar

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from node.engine.interface import EngineError, ShardSource
from node.engine.memory_plan import mebibytes
from node.models.gguf_file import GgufError, GgufModel, GgufTensor, read_gguf
from node.models.gguf_layout import LONG_FACTORS, SHORT_FACTORS, arrange
from node.models.gguf_writer import (
    STRING,
    U32,
    AnyTensor,
    GgufValue,
    GgufZeros,
    assemble_gguf,
    is_gguf_of,
    typed_metadata,
)
from node.util.disk_cache import FolderCache
from protocol.identity import BlockRange

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
OUTPUT_NORM: Final = "output_norm.weight"

FORMAT: Final = 2
"""Of the span files in the cache: a change of what is written into them needs another number."""

_FILE_NAME: Final = "span.gguf"
_DUMMY_VOCABULARY: Final = 32
_PADDING_TYPES: Final = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.F16)
"""Of a matrix that is never read: the smallest that its rows fit."""

_DROPPED_NAMESPACES: Final = ("tokenizer.", "split.")
_NOT_BY_BLOCK: Final = frozenset({"rope.dimension_sections"})
"""Arrays that may have as many elements as the model has blocks, and belong to none."""


@dataclass(frozen=True, slots=True)
class SpanTensors:
    """What a span is assembled from: the source's metadata, and the tensors at hand under their own names.

    `vocabulary_size` is that of the embedding or head, where one is at hand.
    """

    common: GgufModel
    tensors: Mapping[str, GgufTensor]
    block_count: int
    vocabulary_size: int
    tied: bool
    """Whether the head is the embedding."""

    @property
    def hidden_size(self) -> int:
        """Elements of a row of hidden states."""
        return self.common.integer("embedding_length")


def tensors_of(source: ShardSource) -> SpanTensors:
    """Return what the files of a span hold. Raises EngineError for files that are damaged or do not belong together."""
    assert source.common_file is not None, "a GGUF package has a common file"
    outer = [file for file in (source.embed_file, source.head_file) if file is not None]
    try:
        common = read_gguf(source.common_file)
        parts = [read_gguf(file) for file in (*outer, *source.block_files.values())]
        tensors = _joined([common, *parts])
        block_count = common.integer("block_count")
    except (GgufError, OSError) as error:
        raise EngineError(f"the model's files cannot be read: {error}") from None
    outer_tensor = tensors.get(EMBEDDING) or tensors.get(OUTPUT)
    vocabulary_size = outer_tensor.shape[0] if outer_tensor else _DUMMY_VOCABULARY
    tied = source.config.get("tie_word_embeddings") is True
    return SpanTensors(common, tensors, block_count, vocabulary_size, tied)


def whole_model(model: GgufModel) -> SpanTensors:
    """Return what a published file holds. Raises GgufError."""
    if EMBEDDING not in model.tensors:
        raise GgufError(f"{model.name} has no tensor {EMBEDDING}: not a language model")
    return SpanTensors(
        model,
        model.tensors,
        model.integer("block_count"),
        model.tensors[EMBEDDING].shape[0],
        OUTPUT not in model.tensors,
    )


def at_hand(whole: SpanTensors, blocks: BlockRange) -> SpanTensors:
    """Return what `tensors_of` gives where a peer has the files of a span only. Raises GgufError."""
    layout = arrange(whole.common, whole.block_count)
    first, last = blocks.start == 0, blocks.end == whole.block_count
    names = [*layout.common, *chain.from_iterable(layout.blocks[blocks.start : blocks.end])]
    names += layout.embed if first or (last and whole.tied) else ()
    names += layout.head if last else ()
    tensors = {name: whole.tensors[name] for name in names}
    size = whole.vocabulary_size if EMBEDDING in tensors or OUTPUT in tensors else _DUMMY_VOCABULARY
    return replace(whole, tensors=tensors, vocabulary_size=size)


def _joined(parts: Iterable[GgufModel]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name in part.tensors.keys() & tensors.keys():
            raise GgufError(f"tensor {name!r} is in {tensors[name].path.name} and in {part.name}")
        tensors |= part.tensors
    return tensors


_Loaded = TypeVar("_Loaded")


def load_span(
    cache_dir: Path | None,
    source: ShardSource,
    tensors: SpanTensors,
    blocks: BlockRange,
    load: Callable[[Path], _Loaded],
) -> _Loaded:
    """Return what `load` makes of the span's file, of the disk cache if there is one; it maps the file.

    Daemons with the same cache map the same file, and so share the memory of its pages. A damaged file found there is
    built again; a sound one that cannot be loaded, for want of memory perhaps, is not. Raises EngineError.
    """
    cache = None if cache_dir is None else FolderCache(cache_dir)

    def build(folder: Path) -> None:
        _find_space(folder, tensors, blocks, cache)
        write_span(folder / _FILE_NAME, tensors, blocks)

    try:
        if cache is None:
            with TemporaryDirectory(prefix="metaswarm-span-") as folder:
                build(Path(folder))
                return load(Path(folder) / _FILE_NAME)
        name = f"{source.model}-{blocks.start}-{blocks.end}-gguf-{FORMAT}"
        path = cache.directory / name / _FILE_NAME
        if not is_gguf_of(path, span_metadata(tensors, blocks), _span_tensors(tensors, blocks)):
            cache.drop(name)
        return load(cache.folder(name, build) / _FILE_NAME)
    except OSError as error:
        raise EngineError(f"the file of blocks {blocks} cannot be assembled: {error}") from None


def _find_space(folder: Path, tensors: SpanTensors, blocks: BlockRange, cache: FolderCache | None) -> None:
    """Have the cache make room for the copy of a span's tensors. Raises EngineError where there is none."""
    needed = sum(each.size_bytes for each in _span_tensors(tensors, blocks) if not isinstance(each, GgufZeros))
    if cache is not None:
        cache.make_room(needed)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise EngineError(
            f"the file of blocks {blocks} needs {mebibytes(needed)} of disk in {folder.parent}, where "
            f"{mebibytes(free)} are free: free some space, or set METASWARM_CACHE_DIR"
        )


def write_span(path: Path, source: SpanTensors, blocks: BlockRange) -> None:
    """Write the file of a span. Raises OSError, EngineError for a source without one of the blocks."""
    assemble_gguf(path, span_metadata(source, blocks), _span_tensors(source, blocks))


def span_metadata(source: SpanTensors, blocks: BlockRange) -> dict[str, GgufValue]:
    """Return the metadata of a span."""
    architecture = source.common.architecture
    metadata = {
        key: _of_blocks(key.removeprefix(f"{architecture}."), value, blocks, source.block_count)
        for key, value in typed_metadata(source.common).items()
        if not key.startswith(_DROPPED_NAMESPACES)
    }
    if blocks.start > 0:  # the first span has scaled the embedding already
        metadata.pop(f"{architecture}.embedding_scale", None)
    metadata[f"{architecture}.block_count"] = GgufValue(len(blocks), U32)
    metadata[f"{architecture}.vocab_size"] = GgufValue(_span_vocabulary(source, blocks), U32)
    metadata["tokenizer.ggml.model"] = GgufValue("no_vocab", STRING)
    return metadata


def _of_blocks(key: str, value: GgufValue, blocks: BlockRange, block_count: int) -> GgufValue:
    """Return the part of a value that belongs to some blocks, where it lists one for each or counts the first ones."""
    if key == "leading_dense_block_count" and isinstance(value.value, int):
        return value._replace(value=min(max(value.value - blocks.start, 0), len(blocks)))
    by_block = isinstance(value.value, list) and len(value.value) == block_count
    if not by_block or key in _NOT_BY_BLOCK or value.type[1] is GGUFValueType.STRING:
        return value
    assert isinstance(value.value, list)
    return value._replace(value=value.value[blocks.start : blocks.end])


def _span_vocabulary(source: SpanTensors, blocks: BlockRange) -> int:
    return source.vocabulary_size if blocks.end == source.block_count else _DUMMY_VOCABULARY


def _span_tensors(source: SpanTensors, blocks: BlockRange) -> list[AnyTensor]:
    first, last = blocks.start == 0, blocks.end == source.block_count
    taken: dict[str, AnyTensor] = {}
    if not last or (not first and not source.tied):
        taken[EMBEDDING] = _unread_matrix(EMBEDDING, _span_vocabulary(source, blocks), source.hidden_size)
    if not last:
        if not source.tied:
            taken[OUTPUT] = _unread_matrix(OUTPUT, _span_vocabulary(source, blocks), source.hidden_size)
        taken[OUTPUT_NORM] = GgufZeros(OUTPUT_NORM, (source.hidden_size,), GGMLQuantizationType.F32)
    present = set()
    for name, tensor in source.tensors.items():
        block = block_of(name)
        if block is None:
            if name in {SHORT_FACTORS, LONG_FACTORS} <= source.tensors.keys():
                tensor = replace(source.tensors[LONG_FACTORS if _is_long(source) else SHORT_FACTORS], name=name)
            if name in taken or (not last and name.startswith("output")):
                continue
            taken[name] = tensor
        elif block in range(blocks.start, blocks.end):
            present.add(block)
            renamed = name.replace(f"blk.{block}.", f"blk.{block - blocks.start}.", 1)
            taken[renamed] = replace(tensor, name=renamed)
    if missing := set(range(blocks.start, blocks.end)) - present:
        raise EngineError(f"the model's files have no tensors of block {min(missing)}")
    return list(taken.values())


def _is_long(source: SpanTensors) -> bool:
    """Return whether a text takes the rotary factors for long ones (LongRoPE).

    llama.cpp takes them for all texts where its context is longer than the original one. A span has KV memory of many
    sessions, and of another size elsewhere; so it finds under both names the factors that llama.cpp alone takes with
    the model's whole context, which is its default (`-c 0`).
    """
    original = source.common.get("rope.scaling.original_context_length")
    longest = source.common.get("context_length")
    if not isinstance(original, int) or not isinstance(longest, int):
        return False
    return longest > original and LONG_FACTORS in source.tensors


def weight_bytes(source: SpanTensors, blocks: BlockRange) -> int:
    """Return the bytes of a span's weights, without what is never read."""
    embedding = source.tensors[EMBEDDING].size_bytes if blocks.start == 0 and blocks.end < source.block_count else 0
    taken = (each for each in _span_tensors(source, blocks) if not isinstance(each, GgufZeros))
    return embedding + sum(each.size_bytes for each in taken)


def kv_bytes_per_position(
    source: SpanTensors, blocks: BlockRange, kind: GGMLQuantizationType = GGMLQuantizationType.F16
) -> int:
    """Return what keys and values of one position take in all blocks of a span, in whole quantisation blocks."""
    common = source.common

    def row_bytes(elements: int) -> int:
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        return -(-elements // block_elements) * block_bytes

    if common.get("attention.key_length_mla"):  # latent attention: one compressed key, which has the value within it
        return row_bytes(common.integer("attention.key_length")) * len(blocks)
    heads = common.get("attention.head_count")
    most = max(heads, default=1) if isinstance(heads, list) else heads
    head_size = source.hidden_size // (most if isinstance(most, int) and most > 0 else 1)
    widths = [common.integer(f"attention.{name}_length", head_size) for name in ("key", "value")]
    kv_heads = common.get("attention.head_count_kv", heads)
    by_block = kv_heads[blocks.start : blocks.end] if isinstance(kv_heads, list) else [kv_heads] * len(blocks)
    return sum(row_bytes(width * count) for width in widths for count in by_block if isinstance(count, int))


def block_of(name: str) -> int | None:
    """Return the block that a tensor belongs to, None for one around the blocks."""
    if not name.startswith("blk."):
        return None
    number = name.split(".", 2)[1]
    return int(number) if number.isdecimal() else None


def _unread_matrix(name: str, rows: int, hidden_size: int) -> GgufZeros:
    kind = next(kind for kind in _PADDING_TYPES if hidden_size % GGML_QUANT_SIZES[kind][0] == 0)
    return GgufZeros(name, (rows, hidden_size), kind)
