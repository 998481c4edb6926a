"""The forward pass of one span, run by transformers' own code.

The base model's own forward runs, so masks, rotary embeddings and their order are transformers'. A stage that is not
the first puts the hidden states it received in front of its first block, by a hook, whatever the embedding part of the
forward made before: learned positions, embedding norms and multipliers belong to the first stage, so no architecture
needs a special case here. Likewise, a stage that is not the last takes its output right behind its last block. The last
one runs the whole model, with its head and whatever scales or caps the logits. A session that runs a part of the span
enters and leaves it in the same way; the other blocks return their input.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from node.engine.backends.interface import Rows
from node.engine.backends.narrow import NarrowWeights
from node.engine.interface import EngineError
from node.engine.kv_cache import BlockKvCache, KvCache, RewindableCache, SlotMapping
from node.engine.loading import LoadedSpan
from node.engine.outer_modules import accepted_options, select_options
from node.util.text import one_line

_TRIAL_ROWS = 2


class TransformersSpan:
    """The blocks of one span, ready to run."""

    def __init__(self, span: LoadedSpan) -> None:
        self._span = span
        self._name = str(span.model.config.model_type)
        self._device = span.device
        self._narrow = NarrowWeights(span)
        self._base_options = accepted_options(span.base.forward)
        self._model_options = accepted_options(span.model.forward, span.base.forward)
        self._entering: torch.Tensor | None = None
        self._leaving: torch.Tensor | None = None
        self._running = range(len(span.blocks))
        """The blocks that take part in the pass, counted from the span's first."""
        self._gives_tuples = False
        for number, block in enumerate(span.blocks):
            block.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)
            block.register_forward_hook(partial(self._leave, number))
            block.forward = partial(self._pass, number, block.forward)

    def trial_run(self) -> tuple[BlockKvCache, ...]:
        """Run a few rows, which fetches the weights from disk; return the KV cache that this took, block by block.

        Raises EngineError where the architecture cannot be divided between stages.
        """
        slots = SlotMapping([0])
        cache = RewindableCache(self._span.windows, slots)
        size, is_first = self._span.hidden_size, self._span.is_first
        shape, dtype = ((_TRIAL_ROWS,), torch.long) if is_first else ((_TRIAL_ROWS, size), torch.float32)
        rows = torch.zeros(shape, dtype=dtype, device=self._device)
        try:
            output = self._forward(Rows(rows, slots, 0, 1), cache, range(len(self._span.blocks)))
        except (EngineError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an untested architecture may raise anything
            raise EngineError(f"{self._name} models cannot be served: {one_line(error, 200)}") from error
        expected = (1, self._span.vocabulary_size) if self._span.is_last else (_TRIAL_ROWS, size)
        if tuple(output.shape) != expected or output.is_meta or cache.length != _TRIAL_ROWS:
            raise EngineError(f"{self._name} models cannot be served: they are not a plain stack of blocks")
        return cache.memory

    def release(self) -> None:
        """Give back what the next pass can make again."""
        self._narrow.release()

    @torch.inference_mode()
    def run(
        self, slices: Sequence[Rows], kv: KvCache, blocks: range | None = None, *, embeds: bool = False
    ) -> list[torch.Tensor]:
        """Run the rows of sessions one session after another; see SpanRunner."""
        blocks = range(len(self._span.blocks)) if blocks is None else blocks
        return [
            self._forward(part, RewindableCache(self._span.windows, part.slots, kv, part.position), blocks, embeds)
            for part in slices
        ]

    @torch.inference_mode()
    def _forward(self, part: Rows, cache: RewindableCache, blocks: range, embeds: bool = False) -> torch.Tensor:
        """Run rows on top of what is cached before them."""
        self._running = blocks
        rows, position, draws = part.rows, part.position, part.draws
        first = self._span.is_first and blocks.start == 0
        last = self._span.is_last and blocks.stop == len(self._span.blocks)
        cache.rewind(position)
        batch = rows.unsqueeze(0)
        # Where the model's first block is here but not run, its embedding runs for nothing, and so on anything.
        tokens = batch if first else torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)
        options: dict[str, Any] = {
            **({"input_ids": tokens} if self._span.is_first else {"inputs_embeds": batch}),
            "position_ids": torch.arange(position, position + len(rows), device=rows.device).unsqueeze(0),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": draws,
        }
        self._entering = None if first else batch
        if last and draws and not embeds:
            output = self._span.model(**select_options(options, self._model_options))
            logits: torch.Tensor = output.logits[0, -draws:]
            return logits.float()
        final = self._span.base(**select_options(options, self._base_options))
        if last and embeds:
            states: torch.Tensor = final.last_hidden_state[0]
            return states.float()
        if last:
            return torch.empty(0, self._span.vocabulary_size, device=rows.device)
        assert self._leaving is not None
        leaving, self._leaving = self._leaving[0], None
        return leaving

    def _enter(
        self, number: int, _block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give the first block of the pass the hidden states from the previous stage."""
        if self._entering is None or number != self._running.start:
            return None
        embedded = inputs[0] if inputs else options.get("hidden_states")
        if not isinstance(embedded, torch.Tensor) or embedded.shape != self._entering.shape:
            raise EngineError(f"{self._name} models cannot be served: their blocks take more than hidden states")
        if inputs:
            return (self._entering, *inputs[1:]), options
        return (), {**options, "hidden_states": self._entering}

    def _pass(self, number: int, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Run a block, or return its input if it takes no part."""
        if number in self._running:
            with self._narrow.widened(number):
                return forward(*inputs, **options)
        hidden = inputs[0] if inputs else options["hidden_states"]
        return (hidden, None) if self._gives_tuples else hidden

    def _leave(self, number: int, _block: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if number != self._running.stop - 1:
            return
        self._gives_tuples = isinstance(output, tuple)
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, torch.Tensor)
        self._leaving = hidden
