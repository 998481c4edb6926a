"""Opens the shard for a package's format, and imports no other engine: torch alone takes seconds and 200 MiB."""

from typing import Any

from node.engine.interface import EngineOptions, ShardSource
from node.engine.shard import Shard
from node.models.layout import GGUF
from protocol.identity import BlockRange


def open_shard(source: ShardSource, blocks: BlockRange, options: EngineOptions) -> Shard[Any]:
    """Return a span ready to serve. Raises EngineError where it cannot be."""
    shard = _open_shard(source, blocks, options)
    shard.tokenizer_file = source.tokenizer_file
    return shard


def _open_shard(source: ShardSource, blocks: BlockRange, options: EngineOptions) -> Shard[Any]:
    if source.format == GGUF:
        from node.engine.llamacpp.shard import LlamaShard

        return LlamaShard(source, blocks, options)
    import torch

    from node.engine.lean_imports import import_lean

    import_lean()
    from node.engine.torch_shard import open_torch_shard

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return open_torch_shard(source, blocks, options)
