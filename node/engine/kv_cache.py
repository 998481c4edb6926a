"""The paged KV cache of a span, slot mappings, and transformers' cache over them, which can be rewound."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

from node.engine.interface import PAGE_POSITIONS, EngineError
from node.models.manifest import architecture_name
from node.util.mapped_pages import drop_elements


@dataclass(frozen=True, slots=True)
class BlockKvCache:
    """Keys and values of one block, (slots, heads, head size) each; a slot is a position of a page."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one slot."""
        return sum(tensor.shape[1:].numel() * tensor.element_size() for tensor in (self.keys, self.values))

    def resized(self, slots: int) -> "BlockKvCache":
        """Return empty memory of the same shapes."""
        keys, values = (tensor.new_empty((slots, *tensor.shape[1:])) for tensor in (self.keys, self.values))
        return BlockKvCache(keys, values)

    def narrow(self) -> "BlockKvCache":
        """Return the same memory as bf16, which has two slots where f32 has one."""
        slots = 2 * len(self.keys)
        keys, values = (
            tensor.view(torch.bfloat16).view(slots, *tensor.shape[1:]) for tensor in (self.keys, self.values)
        )
        return BlockKvCache(keys, values)


class KvCache:
    """Keys and values of all sessions, block by block.

    Main memory is the operating system's until a page is first written; that of a GPU is taken at once.
    """

    def __init__(self, blocks: Sequence[BlockKvCache]) -> None:
        self.blocks = tuple(blocks)

    def narrow(self) -> "KvCache":
        """Return the same memory as bf16: pages have the same numbers, and hold twice as many positions."""
        return KvCache([block.narrow() for block in self.blocks])

    @torch.inference_mode()
    def copy(self, sources: Sequence[int], pages: Sequence[int]) -> None:
        """Copy whole pages."""
        device = self.blocks[0].keys.device
        if device.type != "cpu" and sources:  # where launching an operation costs more than the copy
            read, written = (SlotMapping(numbers).all.to(device) for numbers in (sources, pages))
            for block in self.blocks:
                block.keys.index_copy_(0, written, block.keys[read])
                block.values.index_copy_(0, written, block.values[read])
            return
        for source, page in zip(sources, pages, strict=True):
            here = slice(page * PAGE_POSITIONS, (page + 1) * PAGE_POSITIONS)
            there = slice(source * PAGE_POSITIONS, (source + 1) * PAGE_POSITIONS)
            for block in self.blocks:
                block.keys[here] = block.keys[there]
                block.values[here] = block.values[there]

    def give_back(self, pages: Sequence[int]) -> None:
        """Give the memory of pages, in order, back to the operating system, until they are written to again."""
        for block in self.blocks:
            for memory in (block.keys, block.values):
                if memory.device.type == "cpu":
                    drop_elements(memory.data_ptr(), PAGE_POSITIONS * memory[0].nbytes, pages)


class SlotMapping:
    """Maps the positions of one session to slots of KV memory: a slice where its pages are contiguous, else a list."""

    def __init__(self, pages: Sequence[int], page_positions: int = PAGE_POSITIONS) -> None:
        self.pages = torch.tensor(pages, dtype=torch.long)
        self.page_positions = page_positions
        self.all = (self.pages.unsqueeze(1) * page_positions + torch.arange(page_positions)).flatten()
        """By position."""
        is_contiguous = list(pages) == list(range(pages[0], pages[0] + len(pages)))
        self._start = pages[0] * page_positions if is_contiguous else None

    def of(self, start: int, end: int) -> slice | torch.Tensor:
        """Return the slots of positions `start` to `end`, as an index."""
        return self.all[start:end] if self._start is None else slice(self._start + start, self._start + end)


class RewindableLayer(DynamicLayer):
    """Keys and values of one block for every position of a session.

    transformers' own layers append by copying the whole cache, and those with a sliding window drop rows outside of
    it, so that a replay could not go back there. Here a window is only a view.
    """

    def __init__(self, slots: SlotMapping, memory: BlockKvCache | None, window: int | None, length: int) -> None:
        # Attributes that the base class's untyped __init__ sets.
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.is_initialized = memory is not None
        self.is_sliding = window is not None
        self.memory = memory
        self._slots = slots
        self._window = window
        self._length = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate memory in the shapes of the first rows: (1, heads, rows, head size)."""
        slots = len(self._slots.all)
        self.memory = BlockKvCache(
            *(rows.new_empty((slots, rows.shape[1], rows.shape[3])) for rows in (key_states, value_states))
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add rows; return the visible ones."""
        if self.memory is None:
            self.lazy_initialization(key_states, value_states)
        assert self.memory is not None
        end = self._length + key_states.shape[-2]
        added, seen = self._slots.of(self._length, end), self._slots.of(self._first_visible, end)
        self.memory.keys[added] = key_states[0].transpose(0, 1)
        self.memory.values[added] = value_states[0].transpose(0, 1)
        self._length = end
        keys, values = (memory[seen].transpose(0, 1) for memory in (self.memory.keys, self.memory.values))
        return keys.unsqueeze(0), values.unsqueeze(0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of visible rows after `query_length` more, and the position of the first."""
        return self._length + query_length - self._first_visible, self._first_visible

    def get_seq_length(self) -> int:
        """Return how many positions are cached."""
        return self._length

    def rewind(self, position: int) -> None:
        """Drop the rows from `position` on."""
        self._length = position

    @property
    def _first_visible(self) -> int:
        """The first position visible to the next row: window - 1 before it."""
        return 0 if self._window is None else max(0, self._length - self._window + 1)


class RewindableCache(Cache):
    """Layers for each block of a span, all of the same length; without `kv` each allocates its own."""

    def __init__(
        self, windows: tuple[int | None, ...], slots: SlotMapping, kv: KvCache | None = None, length: int = 0
    ) -> None:
        blocks = kv.blocks if kv else (None,) * len(windows)
        self._rows = [
            RewindableLayer(slots, block, window, length) for block, window in zip(blocks, windows, strict=True)
        ]
        super().__init__(layers=list(self._rows))

    @property
    def length(self) -> int:
        """How many positions are cached."""
        return self._rows[0].get_seq_length()

    @property
    def memory(self) -> tuple[BlockKvCache, ...]:
        """The memory of each block, once there are rows."""
        return tuple(layer.memory for layer in self._rows if layer.memory is not None)

    def rewind(self, position: int) -> None:
        """Drop the rows from `position` on, also those that a failed forward pass left in some blocks."""
        for layer in self._rows:
            layer.rewind(min(position, layer.get_seq_length()))


def attention_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Return the sliding window of each block of a model, None for full attention.

    Raises EngineError for architectures whose state is not a key and a value per position.
    """
    windows: list[int | None] = []
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        else:
            raise EngineError(
                f"{architecture_name(config.model_type)} ({config.model_type}) uses "
                f"{_kind_of(config, number, type(layer))}, which cannot be split into spans here"
            )
    return tuple(windows)


def _kind_of(config: PreTrainedConfig, block: int, layer: type) -> str:
    kinds = getattr(config, "layer_types", None) or ()
    kind = kinds[block] if block < len(kinds) else ""
    if kind == "conv":
        return "short convolutions, which keep a state"
    if layer is DummyLayer:
        shared = getattr(config, "kv_sharing_modes", None) is not None
        return "blocks that share the keys and values of others" if shared else "blocks without attention"
    if "Linear" not in layer.__name__:
        return "sparse attention, which keeps an index beside keys and values"
    if any(re.search("mamba|ssm|state_size", key) for key in config.to_dict()):
        return "state-space (Mamba) layers"
    return "linear attention"
