"""The KV cache of one session: transformers' cache, with rows that can be taken back."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

from node.engine.interface import EngineError


class RewindableLayer(DynamicLayer):
    """Keys and values of one block for every position, in buffers of the size that was reserved.

    transformers' own layers append by copying the whole cache, and those with a sliding window throw away what has
    left the window, so that a replay could not go back there. Here a window is only a view. Memory is the operating
    system's until a position is first written.
    """

    def __init__(self, capacity: int, window: int | None) -> None:
        # What the base class's own, untyped __init__ sets.
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.is_initialized = False
        self.is_sliding = window is not None
        self._capacity = capacity
        self._window = window
        self._length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers, in the shapes of the first rows: (1, heads, rows, head size)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], self._capacity, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], self._capacity, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add rows; return those that attention may see."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self._length + key_states.shape[-2]
        self.keys[:, :, self._length : end] = key_states
        self.values[:, :, self._length : end] = value_states
        start = self._first_visible
        self._length = end
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many rows attention will see after `query_length` more, and the position of the first."""
        return self._length + query_length - self._first_visible, self._first_visible

    def get_seq_length(self) -> int:
        """Return how many positions are cached."""
        return self._length

    def rewind(self, position: int) -> None:
        """Forget the rows from `position` on."""
        self._length = position

    @property
    def _first_visible(self) -> int:
        """The first position that the next row may see: itself and window - 1 before it."""
        return 0 if self._window is None else max(0, self._length - self._window + 1)

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position, once there are rows."""
        return sum(
            tensor.element_size() * tensor.shape[0] * tensor.shape[1] * tensor.shape[3]
            for tensor in (self.keys, self.values)
            if tensor is not None
        )


class RewindableCache(Cache):
    """Layers for each block of a span, all of the same length."""

    def __init__(self, windows: tuple[int | None, ...], capacity: int) -> None:
        self._rows = [RewindableLayer(capacity, window) for window in windows]
        super().__init__(layers=list(self._rows))

    @property
    def length(self) -> int:
        """How many positions are cached."""
        return self._rows[0].get_seq_length()

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position in all blocks together, once there are rows."""
        return sum(layer.bytes_per_position for layer in self._rows)

    def rewind(self, position: int) -> None:
        """Forget the rows from `position` on, also those that a failed forward pass left in some blocks."""
        for layer in self._rows:
            layer.rewind(min(position, layer.get_seq_length()))


def attention_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Return each block's sliding window, None where it sees everything, for all blocks of a model.

    Raises EngineError for architectures whose blocks keep something else than a key and a value per position.
    """
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        else:
            raise EngineError(
                f"{config.model_type} models cannot be served: their blocks keep a {type(layer).__name__}, "
                "which cannot be divided by position"
            )
    return tuple(windows)
