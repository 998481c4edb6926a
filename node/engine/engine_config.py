"""Where a shard's weights lie, and how its engine runs: plain values that are sent to the worker process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.identity import BlockRange, ModelId

if TYPE_CHECKING:
    from node.models.store import Package


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSource:
    """The model's config and the files of one span.

    `config`: the content of config.json. `block_files`: by absolute block number, those of the span at least.
    `embed_file`: for a first span, and for a last one with tied embeddings. `head_file`: for a last span.
    """

    model: ModelId
    config: Mapping[str, Any]
    block_files: Mapping[int, Path]
    embed_file: Path | None = None
    head_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine runs.

    `memory_bytes`: for weights and KV caches together; None takes half of the device's free memory. `kv_positions`: for
    all sessions together, if fewer than the memory allows. `threads`: None takes one for each physical core.
    `start_timeout_s`: limit of loading. `cache_dir`: disk cache of built variants, if any. `device`: torch's name of
    the device that computes and holds weights and KV caches: "cpu", "cuda:0" (also ROCm), "mps". `plan_rows`: whether
    `memory_bytes` includes the rows queued in the node: one for each position, as f32.
    """

    memory_bytes: int | None = None
    kv_positions: int | None = None
    threads: int | None = None
    start_timeout_s: float = 600.0
    cache_dir: Path | None = None
    device: str = "cpu"
    plan_rows: bool = False


def source_from_package(package: "Package", blocks: BlockRange) -> ShardSource:
    """Return where the files of a span lie in a model package."""
    manifest = package.manifest
    first, last = blocks.start == 0, blocks.end == manifest.block_count
    return ShardSource(
        model=manifest.model_id,
        config=manifest.config,
        block_files={block: package.path_of(manifest.blocks[block]) for block in range(blocks.start, blocks.end)},
        embed_file=package.path_of(manifest.embed) if first or (last and manifest.tied) else None,
        head_file=package.path_of(manifest.head) if last else None,
    )
