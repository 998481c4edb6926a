"""Models without memory for their weights, whatever their size."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.big_modeling import init_empty_weights
from torch.overrides import TorchFunctionMode


@contextmanager
def without_weights() -> Iterator[None]:
    """Have modules made in the block of code hold parameters without memory; buffers are computed."""
    with init_empty_weights(include_buffers=False), _WithoutMemory():
        yield


class _WithoutMemory(TorchFunctionMode):
    """Allocates large tensors without memory, and initialises no weight.

    The experts of a block are one tensor: 30 GB in DeepSeek-V3. Computed tensors, such as masks and rotary
    frequencies, stay.
    """

    _INITIALISERS = frozenset({"normal_", "uniform_", "zero_", "fill_", "erfinv_", "mul_", "add_", "clamp_"})
    _MAKERS = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn})
    _LARGE_ELEMENTS = 1 << 24

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if isinstance(filled, torch.Tensor) and filled.is_meta and func.__name__ in self._INITIALISERS:
            return filled
        if func in self._MAKERS and kwargs.get("device") is None:
            sizes = args or (kwargs.get("size", ()),)
            sizes = tuple(sizes[0]) if isinstance(sizes[0], tuple | list) else sizes
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > self._LARGE_ELEMENTS:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
