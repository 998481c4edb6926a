"""What a span takes in memory: the one calculation behind placement, admission, and the hints of `status` and `doctor`.

It needs the sizes of a model's files and its config, no file and no torch: so a node plans models that it does not hold
yet, and refuses one that does not fit before it fetches it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from node.engine.interface import PAGE_POSITIONS, ShardSource
from node.models.manifest import FileEntry, Json, Manifest, find_integer
from protocol.identity import BlockRange
from protocol.limits import MAX_POSITIONS, MAX_WIDTH
from selector.cuts import Cuts

PLANNED_POSITIONS: Final = 2048
"""Tokens whose keys and values must fit, of all sessions together; those of the longest text where that is shorter."""

STEP_ROWS: Final = 512
"""Rows of the largest step, whose intermediate results the reserve holds."""

DRAWN_ROWS: Final = 32
"""Rows of logits that the reserve of a last span holds."""

_F32_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """A model's config, and the bytes of its files: of blocks by their number, and of the parts around them.

    `common`: needed by every span. `tied`: whether a last span needs the embedding, too.
    """

    config: Mapping[str, Any]
    cuts: Cuts
    blocks: Mapping[int, int]
    embed: int
    head: int
    common: int = 0
    tied: bool = False
    max_positions: int = MAX_POSITIONS

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> "ModelSizes":
        """Return the sizes that a manifest states."""
        return cls(
            config=manifest.config,
            cuts=manifest.cuts,
            blocks={number: file.size_bytes for number, file in enumerate(manifest.blocks)},
            embed=manifest.embed.size_bytes,
            head=manifest.head.size_bytes,
            common=_size_of(manifest.common),
            tied=manifest.tied,
            max_positions=min(manifest.max_positions or MAX_POSITIONS, MAX_POSITIONS),
        )

    @classmethod
    def of_source(cls, source: ShardSource, cuts: Cuts) -> "ModelSizes":
        """Return the sizes of a span's files, for plans of it and parts of it. Raises OSError."""
        return cls(
            config=source.config,
            cuts=cuts,
            blocks={number: path.stat().st_size for number, path in source.block_files.items()},
            embed=source.embed_file.stat().st_size if source.embed_file else 0,
            head=source.head_file.stat().st_size if source.head_file else 0,
            common=source.common_file.stat().st_size if source.common_file else 0,
            tied=source.config.get("tie_word_embeddings") is True,
        )

    def file_bytes(self, blocks: BlockRange) -> int:
        """Return the bytes of the files that a span needs: the embedding and the head only where they are used."""
        first, last = blocks.start == 0, blocks.end == self.cuts.block_count
        return (
            self.common
            + (self.embed if first or (last and self.tied) else 0)
            + sum(self.blocks[number] for number in range(blocks.start, blocks.end))
            + (self.head if last else 0)
        )


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """What an engine holds.

    `weight_factor`: bytes in memory for each byte of the files. `kv_element_bytes`: of an element of keys and values.
    """

    weight_factor: float
    kv_element_bytes: float


GGUF_COSTS: Final = EngineCosts(weight_factor=1.0, kv_element_bytes=2.5)
"""llama.cpp: the files as they are, and 16 bits, with a quarter more cells than are held at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes that a span takes. `kv_bytes`: of keys and values of so many positions, and of the rows queued for them.

    `reserve_bytes`: intermediate results of the largest step.
    """

    weight_bytes: int
    kv_bytes: int
    reserve_bytes: int
    positions: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes

    def __str__(self) -> str:
        return (
            f"{mebibytes(self.weight_bytes)} of weights, {mebibytes(self.kv_bytes)} of KV cache for {self.positions} "
            f"tokens and {mebibytes(self.reserve_bytes)} in reserve"
        )


def memory_plan(
    model: ModelSizes, blocks: BlockRange, costs: EngineCosts, positions: int = PLANNED_POSITIONS
) -> MemoryPlan:
    """Return what a span takes, with keys and values of `positions` tokens, or of the longest text if that is less.

    Blocks with a sliding window hold those of all positions, too: rollbacks and cached prefixes may end anywhere.
    """
    positions = -(-min(positions, model.max_positions) // PAGE_POSITIONS) * PAGE_POSITIONS
    kv_bytes = positions * _hidden_size(model.config) * _F32_BYTES
    for number in range(blocks.start, blocks.end):
        kv_bytes += int(positions * kv_elements(model.config, number) * costs.kv_element_bytes)
    return MemoryPlan(
        weight_bytes=int(model.file_bytes(blocks) * costs.weight_factor),
        kv_bytes=kv_bytes,
        reserve_bytes=reserve_bytes(model.config, is_last=blocks.end == model.cuts.block_count),
        positions=positions,
    )


def reserve_bytes(config: Mapping[str, Json], *, is_last: bool) -> int:
    """Return what the intermediate results of the largest step take."""
    hidden = _hidden_size(config)
    inner = find_integer(config, ("intermediate_size", "n_inner", "ffn_dim")) or 4 * hidden
    numbers = STEP_ROWS * (4 * hidden + 2 * inner)
    if is_last:
        numbers += DRAWN_ROWS * (find_integer(config, ("vocab_size",)) or 0)
    return numbers * _F32_BYTES


def _hidden_size(config: Mapping[str, Json]) -> int:
    return find_integer(config, ("hidden_size", "n_embd", "d_model")) or MAX_WIDTH


def fitting_span(model: ModelSizes, within: BlockRange, memory_bytes: int, costs: EngineCosts) -> BlockRange | None:
    """Return the longest span from the start of a range on that fits into memory; None where not even one block does.

    Spans begin and end where the model may be cut.
    """
    if (units := model.cuts.units_of(within)) is None:
        return None
    spans = (model.cuts.blocks_of(BlockRange(units.start, end)) for end in range(units.end, units.start, -1))
    return next((each for each in spans if memory_plan(model, each, costs).total_bytes <= memory_bytes), None)


def longest_spans(model: ModelSizes, memory_bytes: int, costs: EngineCosts) -> Sequence[int]:
    """Return for each unit of a model how many units from it on fit into memory: fewer with the embedding or head."""
    count, end = model.cuts.unit_count, 0
    longest: list[int] = []
    for start in range(count):
        end = max(end, start)
        while end < count:
            blocks = model.cuts.blocks_of(BlockRange(start, end + 1))
            if memory_plan(model, blocks, costs).total_bytes > memory_bytes:
                break
            end += 1
        longest.append(end - start)
    return longest


def refusal(model: ModelSizes, blocks: BlockRange, memory_bytes: int, costs: EngineCosts) -> str | None:
    """Return why a span does not fit: how much memory is missing, and which blocks would fit. None where it fits."""
    plan = memory_plan(model, blocks, costs)
    if plan.total_bytes <= memory_bytes:
        return None
    fitting = fitting_span(model, blocks, memory_bytes, costs)
    instead = f"blocks {fitting} would fit" if fitting else "not even its first block would fit"
    missing = mebibytes(plan.total_bytes - memory_bytes)
    return f"{mebibytes(memory_bytes)} of memory are {missing} too little for {plan}; {instead}"


def kv_elements(config: Mapping[str, Json], block: int) -> int:
    """Return the elements of a position's keys and values in a block; what the config leaves open counts as the most.

    Heads may differ from block to block (a list). Latent attention (MLA) is cached as the heads that it expands to.
    """
    hidden = _hidden_size(config)
    heads = _of_block(config, block, ("num_attention_heads", "n_head", "num_heads")) or 1
    if latent := find_integer(config, ("qk_nope_head_dim",)):
        keys = latent + (find_integer(config, ("qk_rope_head_dim",)) or 0)
        return heads * (keys + (find_integer(config, ("v_head_dim",)) or keys))
    kv_heads = _of_block(config, block, ("num_key_value_heads", "num_kv_heads", "n_head_kv"))
    sizes = [find_integer(config, (key,)) for key in ("head_dim", "global_head_dim")]
    head_size = max((size for size in sizes if size), default=-(-hidden // heads))
    return 2 * (heads if kv_heads is None else kv_heads) * head_size


def mebibytes(count: int) -> str:
    """Return a size in whole MiB, rounded up, as `--memory` takes it."""
    return f"{-(-count // (1 << 20))} MiB"


def _of_block(config: Mapping[str, Json], block: int, keys: tuple[str, ...]) -> int | None:
    """Return the first integer under one of the keys, or that of the block where there is a list of them."""
    for key in keys:
        value = _find(config, key)
        if isinstance(value, list) and block < len(value):
            value = value[block]
        if type(value) is int:
            return value
    return None


def _find(config: Mapping[str, Json], key: str) -> Json:
    decoder = config.get("text_config")
    return config.get(key, decoder.get(key) if isinstance(decoder, dict) else None)


def _size_of(file: FileEntry | None) -> int:
    return 0 if file is None else file.size_bytes
