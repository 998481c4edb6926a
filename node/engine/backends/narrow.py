"""Has transformers' modules compute in f32 with matrices that are held as bf16 or fp16, as they were published.

A block's matrices are widened while it runs, into one buffer for all blocks; of the embedding the rows that are looked
up; the head's product widens piece by piece. Meanwhile the modules hold other weights than those of the files: nothing
else may read them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from node.engine.loading import NARROW_DTYPES, LoadedSpan
from node.engine.widened import multiply_widened


class NarrowWeights:
    """The narrow matrices of a span."""

    def __init__(self, span: LoadedSpan) -> None:
        self._blocks = [_narrow_parameters(block) for block in span.blocks]
        self._elements = max(sum(weight.numel() for _, _, weight in found) for found in self._blocks)
        self._buffer: torch.Tensor | None = None
        embedding, head = span.model.get_input_embeddings(), span.model.get_output_embeddings()
        if span.is_first and isinstance(embedding, nn.Embedding) and embedding.weight.dtype in NARROW_DTYPES:
            embedding.padding_idx = None  # used in training alone
            embedding.forward = partial(_embed, embedding, embedding.forward)  # type: ignore[method-assign]
        if span.is_last and type(head) is nn.Linear and head.weight.dtype in NARROW_DTYPES:
            head.forward = partial(_multiply, head)  # type: ignore[method-assign]

    @contextmanager
    def widened(self, number: int) -> Iterator[None]:
        """Have a block, counted from the span's first, hold f32 inside of the block of code."""
        narrow = self._blocks[number]
        if narrow and self._buffer is None:
            self._buffer = torch.empty(self._elements, device=narrow[0][2].device)
        start = 0
        try:
            for module, name, weight in narrow:
                assert self._buffer is not None
                widened = self._buffer[start : start + weight.numel()].view(weight.shape)
                parameters: dict[str, Any] = module._parameters  # noqa: SLF001
                parameters[name] = widened.copy_(weight)
                start += weight.numel()
            yield
        finally:
            for module, name, weight in narrow:
                module._parameters[name] = weight  # noqa: SLF001

    def release(self) -> None:
        """Free the buffer until the next block runs."""
        self._buffer = None


def _narrow_parameters(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype in NARROW_DTYPES
    ]


def _embed(embedding: nn.Embedding, forward: Callable[..., Any], tokens: torch.Tensor) -> Any:
    """Run an embedding on the rows that it looks up, so that whatever else its class calculates is in f32, too."""
    parameters: dict[str, Any] = embedding._parameters  # noqa: SLF001
    weight = parameters["weight"]
    parameters["weight"] = weight[tokens.flatten()].float()
    try:
        return forward(torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape))
    finally:
        parameters["weight"] = weight


def _multiply(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    rows = multiply_widened(hidden.reshape(-1, hidden.shape[-1]), [head.weight])
    return (rows if head.bias is None else rows + head.bias).view(*hidden.shape[:-1], -1)
