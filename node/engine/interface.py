"""The engine as the rest of the node sees it: tensors in, tensors out, no network.

An engine serves one span of one model. `client.py` runs the real one in a worker process; `fake.py` keeps a hash chain
of its inputs, so that in a simulation a lost row, a wrong replay or a swapped session changes tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.identity import BlockRange, ModelId, SessionId
from protocol.messages import Sampling
from protocol.tensors import Tensor


class EngineError(Exception):
    """The engine failed: the jobs in the call are lost. The message is one line, fit for a user."""


class EngineCrashed(EngineError):
    """The worker process died: every session it held is lost."""


class EngineFull(EngineError):
    """No KV memory for another session now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanInfo:
    """What an engine holds and can hold."""

    model: ModelId
    blocks: BlockRange
    block_count: int
    """Blocks of the whole model."""
    hidden_size: int
    vocabulary_size: int
    max_positions: int
    """The longest session the model allows."""
    kv_bytes_per_position: int
    kv_positions: int
    """Positions that all sessions together may reserve."""
    weight_bytes: int
    load_s: float

    @property
    def is_first(self) -> bool:
        """Whether the span embeds token ids."""
        return self.blocks.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the span draws tokens."""
        return self.blocks.end == self.block_count


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceInput:
    """Rows of one session for one step.

    `tensor`: token ids i32 (rows,) on a first span, hidden states (rows, hidden_size) elsewhere. `position`: absolute
    position of the first row; rows already cached from there on are forgotten first (a rollback). `draws`: number of
    trailing rows after each of which a last span draws a token.
    """

    session: SessionId
    position: int
    tensor: Tensor
    draws: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceOutput:
    """What a step made of one slice: hidden states (rows, hidden_size); on a last span tokens drawn, i32 (draws,)."""

    session: SessionId
    tensor: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outputs in the order of the inputs, and the time spent inside the forward passes, seconds."""

    outputs: tuple[SliceOutput, ...]
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """How an engine is doing."""

    sessions: int
    reserved_positions: int
    steps: int
    compute_s: float
    worker_pid: int | None


class Engine(Protocol):
    """One span of one model. Calls may overlap; steps are carried out one after another, in the order of the calls."""

    @property
    def info(self) -> SpanInfo:
        """What it holds."""
        ...

    async def open(self, session: SessionId, positions: int, sampling: Sampling | None) -> None:
        """Reserve KV memory for a session. Raises EngineFull, or EngineError when it cannot be served at all."""
        ...

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run one step. Raises EngineError: then every session in the step is lost and closed, others live on."""
        ...

    async def close(self, session: SessionId) -> None:
        """Free a session; an unknown one is no error."""
        ...

    async def wait_crashed(self) -> str:
        """Wait until the engine is gone for good, and return why in one line; for most engines that is never."""
        ...

    def statistics(self) -> EngineStatistics:
        """Return the counts without waiting for a running step."""
        ...
