"""The reference engine: one span of one model and its sessions, in this process and thread, one slice at a time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from node.engine.admission import Reservations, check_slice
from node.engine.cache import RewindableCache
from node.engine.forward import SpanModel
from node.engine.interface import EngineError, SliceInput, SliceOutput, SpanInfo, StepResult
from node.engine.loading import load_span
from node.engine.sampling import draw
from node.engine.source import EngineOptions, ShardSource
from protocol.identity import BlockRange, SessionId
from protocol.limits import MAX_POSITIONS
from protocol.messages import Sampling
from protocol.tensors import DType, Tensor, tensor_from_tokens

_TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.INT32: torch.int32,
}

_FREE_MEMORY_SHARE = 0.5
"""Of the memory that is free, where the options do not say how much to use."""


@dataclass(frozen=True, slots=True)
class _Session:
    cache: RewindableCache
    sampling: Sampling | None


class Shard:
    """Serves a span as Engine describes it, but at once, without overlap."""

    def __init__(self, source: ShardSource, blocks: BlockRange, options: EngineOptions) -> None:
        started_s = time.perf_counter()
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        span = load_span(source, blocks, self._dtype)
        self._model = SpanModel(span, first=blocks.start == 0, last=blocks.end == span.block_count)
        kv_bytes_per_position = self._model.try_out()
        self.info = SpanInfo(
            model=source.model,
            blocks=blocks,
            block_count=span.block_count,
            hidden_size=span.hidden_size,
            vocabulary_size=span.vocabulary_size,
            max_positions=min(span.max_positions or MAX_POSITIONS, MAX_POSITIONS),
            kv_bytes_per_position=kv_bytes_per_position,
            kv_positions=_kv_positions(options, span.weight_bytes, kv_bytes_per_position),
            weight_bytes=span.weight_bytes,
            load_s=time.perf_counter() - started_s,
        )
        self._reservations = Reservations(self.info)
        self._sessions: dict[SessionId, _Session] = {}

    def open(self, session: SessionId, positions: int, sampling: Sampling | None) -> None:
        """Reserve KV memory; raise EngineFull or EngineError."""
        self._reservations.open(session, positions, sampling)
        self._sessions[session] = _Session(self._model.new_cache(positions), sampling)

    def close(self, session: SessionId) -> None:
        """Free a session; an unknown one is no error."""
        self._reservations.close(session)
        self._sessions.pop(session, None)

    def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run the slices in order. Raises EngineError after it has closed every session in the step."""
        started_s = time.perf_counter()
        try:
            outputs = tuple(SliceOutput(session=rows.session, tensor=self._run(rows)) for rows in slices)
        except Exception as error:  # torch fails in many ways; whichever, these sessions' caches are not to be trusted
            for rows in slices:
                self.close(rows.session)
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"the forward pass failed: {' '.join(str(error).split())[:300]}") from error
        return StepResult(outputs=outputs, compute_s=time.perf_counter() - started_s)

    def _run(self, rows: SliceInput) -> Tensor:
        reserved = self._reservations.of(rows.session)
        session = self._sessions[rows.session]
        check_slice(self.info, rows, cached=session.cache.length, reserved=reserved)
        output = self._model.run(self._input(rows.tensor), session.cache, position=rows.position, draws=rows.draws)
        if not self.info.is_last:
            return _tensor_from_torch(output)
        assert session.sampling is not None
        first_drawn = rows.position + rows.tensor.rows - rows.draws + 1
        return tensor_from_tokens(
            [draw(logits, session.sampling, first_drawn + row) for row, logits in enumerate(output.numpy())]
        )

    def _input(self, tensor: Tensor) -> torch.Tensor:
        """Return rows in the dtype that the model computes in; token ids are checked, as torch may crash on bad."""
        rows = _torch_from_tensor(tensor)
        if not self.info.is_first:
            return rows.to(self._dtype)
        if int(rows.min()) < 0 or int(rows.max()) >= self.info.vocabulary_size:
            raise EngineError(f"a token id is not below {self.info.vocabulary_size}")
        return rows.long()


def _kv_positions(options: EngineOptions, weight_bytes: int, kv_bytes_per_position: int) -> int:
    """Return how many positions fit into the memory that the weights leave."""
    memory_bytes = options.memory_bytes
    if memory_bytes is None:
        memory_bytes = weight_bytes + int(psutil.virtual_memory().available * _FREE_MEMORY_SHARE)
    positions = (memory_bytes - weight_bytes) // max(1, kv_bytes_per_position)
    if positions < 1:
        raise EngineError(
            f"{memory_bytes} bytes of memory are too few: the weights take {weight_bytes}, "
            f"and each position of a session {kv_bytes_per_position}"
        )
    return positions if options.kv_positions is None else min(positions, options.kv_positions)


def _torch_from_tensor(tensor: Tensor) -> torch.Tensor:
    """Return a tensor over the same bytes, or over a copy of what may not be written to, as torch insists."""
    data = memoryview(tensor.data)
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=_TORCH_DTYPES[tensor.dtype]).reshape(
        tensor.shape
    )


def _tensor_from_torch(tensor: torch.Tensor) -> Tensor:
    """Return the rows of a two-dimensional tensor as bytes."""
    dtype = next(name for name, known in _TORCH_DTYPES.items() if known is tensor.dtype)
    return Tensor(dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().data.cast("B"))
