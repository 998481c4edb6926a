"""The reference of a span: loaded when a job needs it, unloaded when none does.

On the CPU it computes with the mapped files, so that loading is reading them, and unloading is to give their pages
back. On a GPU it is a copy in f32.
"""

import gc

import torch

from node.engine.backends.transformers import TransformersSpan
from node.engine.device_probe import empty_cache
from node.engine.interface import ShardSource
from node.engine.kv_cache import BlockKvCache
from node.engine.loading import LoadedSpan, load_span
from protocol.identity import BlockRange


class Reference:
    """Transformers' own layers over a span whose weights are mapped from files."""

    def __init__(self, span: LoadedSpan, source: ShardSource, blocks: BlockRange, device: torch.device) -> None:
        self._span = span
        self._source = source
        self._blocks = blocks
        self._device = device
        self._mapped = TransformersSpan(span) if span.device.type == device.type else None
        self._runner: TransformersSpan | None = None

    @property
    def runner(self) -> TransformersSpan | None:
        """What runs it, while it is loaded."""
        return self._runner

    @property
    def needed_bytes(self) -> int:
        """What loading it takes of memory that the kernel cannot take back: mapped pages it can."""
        return 0 if self._mapped is not None else 4 * self._span.element_count

    def load(self) -> tuple[BlockKvCache, ...]:
        """Read the weights by running a few rows; return the KV memory that these took. Raises EngineError.

        May run beside the steps of other variants.
        """
        runner = self._mapped
        if runner is None:
            runner = TransformersSpan(load_span(self._source, self._blocks, torch.float32, self._device))
        memory = runner.trial_run()
        self._runner = runner
        return memory

    def unload(self, *, keep_pages: bool = False) -> None:
        """Give the memory back; `keep_pages`: but for the mapped files'."""
        if (runner := self._runner) is None:
            return
        self._runner = None
        runner.release()
        if not keep_pages:
            self._span.drop_pages()
        if self._mapped is None:
            del runner
            gc.collect()  # its hooks refer to it
            empty_cache(self._device)
