"""An engine without a model, for simulations: its state is a hash chain of everything it was given.

Each block hashes, for every row, the row itself, its position, and what the block had before it. So the tokens depend
on every row, block and position and on their order, as those of a transformer do; and they are the same however the
blocks are divided into spans. `expected_tokens` says what an undisturbed job yields.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import trio

from node.engine.admission import Reservations, check_slice
from node.engine.interface import (
    EngineCrashed,
    EngineError,
    EngineStatistics,
    SliceInput,
    SliceOutput,
    SpanInfo,
    StepResult,
)
from protocol.identity import BlockRange, ModelId, SessionId
from protocol.messages import Sampling
from protocol.tensors import DType, Tensor, tensor_from_tokens, tokens_from_tensor

FAKE_MODEL = ModelId(hashlib.sha256(b"metaswarm fake model").hexdigest())
"""The id of the imaginary model, unless another is given."""


def fake_span_info(
    blocks: BlockRange,
    *,
    model: ModelId = FAKE_MODEL,
    block_count: int,
    hidden_size: int = 32,
    vocabulary_size: int = 1000,
    max_positions: int = 4096,
    kv_positions: int = 16384,
) -> SpanInfo:
    """Describe a span of an imaginary model."""
    return SpanInfo(
        model=model,
        blocks=blocks,
        block_count=block_count,
        hidden_size=hidden_size,
        vocabulary_size=vocabulary_size,
        max_positions=max_positions,
        kv_bytes_per_position=8 * hidden_size * len(blocks),
        kv_positions=kv_positions,
        weight_bytes=12 * hidden_size**2 * len(blocks),
        load_s=0.0,
    )


class FakeEngine:
    """A span of an imaginary model, in this process, on trio's clock.

    A step takes `step_s` plus `row_s` for each of its rows: virtual seconds under a MockClock.
    """

    def __init__(self, info: SpanInfo, *, step_s: float = 0.0, row_s: float = 0.0) -> None:
        self._info = info
        self._step_s = step_s
        self._row_s = row_s
        self._reservations = Reservations(info)
        self._sessions: dict[SessionId, _Session] = {}
        self._turn = trio.StrictFIFOLock()
        self._crashed = trio.Event()
        self._reason = ""
        self._steps = 0
        self._compute_s = 0.0

    @property
    def info(self) -> SpanInfo:
        """What it pretends to hold."""
        return self._info

    async def open(self, session: SessionId, positions: int, sampling: Sampling | None) -> None:
        """Reserve positions; see Engine."""
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        self._reservations.open(session, positions, sampling)
        self._sessions[session] = _Session(self._info, self._info.blocks, sampling)

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Hash the rows of each slice in order; see Engine."""
        self._raise_if_crashed()
        async with self._turn:
            compute_s = self._step_s + self._row_s * sum(rows.tensor.rows for rows in slices)
            with trio.move_on_after(compute_s):
                await self._crashed.wait()
            self._raise_if_crashed()
            try:
                outputs = tuple(SliceOutput(session=rows.session, tensor=self._run(rows)) for rows in slices)
            except EngineError:
                for rows in slices:
                    self._forget(rows.session)
                raise
            self._steps += 1
            self._compute_s += compute_s
            return StepResult(outputs=outputs, compute_s=compute_s)

    async def close(self, session: SessionId) -> None:
        """Free a session; see Engine."""
        await trio.lowlevel.checkpoint()
        self._forget(session)

    async def wait_crashed(self) -> str:
        """Wait until `crash` was called; see Engine."""
        await self._crashed.wait()
        return self._reason

    def statistics(self) -> EngineStatistics:
        """Return the counts; see Engine."""
        return EngineStatistics(
            sessions=len(self._reservations),
            reserved_positions=self._reservations.total,
            steps=self._steps,
            compute_s=self._compute_s,
            worker_pid=None,
        )

    def crash(self, reason: str = "the worker process was killed") -> None:
        """Behave from now on as an engine does whose worker process died."""
        self._reason = reason
        self._crashed.set()
        for session in tuple(self._sessions):
            self._forget(session)

    def _raise_if_crashed(self) -> None:
        if self._crashed.is_set():
            raise EngineCrashed(self._reason)

    def _forget(self, session: SessionId) -> None:
        self._reservations.close(session)
        self._sessions.pop(session, None)

    def _run(self, rows: SliceInput) -> Tensor:
        reserved = self._reservations.of(rows.session)
        session = self._sessions[rows.session]
        check_slice(self._info, rows, cached=session.cached, reserved=reserved)
        if self._info.is_first:
            tokens = tokens_from_tensor(rows.tensor)
            if any(not 0 <= token < self._info.vocabulary_size for token in tokens):
                raise EngineError(f"a token id is not below {self._info.vocabulary_size}")
            hidden = session.run(rows.position, [_embed(self._info, token) for token in tokens])
        else:
            hidden = session.run(
                rows.position, [bytes(rows.tensor.cut(n, n + 1).data) for n in range(rows.tensor.rows)]
            )
        if not self._info.is_last:
            return Tensor(DType.FLOAT32, (len(hidden), self._info.hidden_size), b"".join(hidden))
        first_drawn = len(hidden) - rows.draws
        position = rows.position + first_drawn + 1
        return tensor_from_tokens([session.draw(position + n, row) for n, row in enumerate(hidden[first_drawn:])])


class _Session:
    """What some blocks remember of one session."""

    def __init__(self, info: SpanInfo, blocks: BlockRange, sampling: Sampling | None) -> None:
        self._info = info
        self._sampling = sampling
        # By block, by position: what the block knows after that row.
        self._states: dict[int, list[bytes]] = {block: [] for block in range(blocks.start, blocks.end)}

    @property
    def cached(self) -> int:
        """Positions that are remembered."""
        return len(next(iter(self._states.values())))

    def run(self, position: int, rows: Iterable[bytes]) -> list[bytes]:
        """Forget the positions from `position` on, then pass rows through the blocks; return what comes out."""
        for states in self._states.values():
            del states[position:]
        return [self._pass(position + offset, row) for offset, row in enumerate(rows)]

    def _pass(self, position: int, row: bytes) -> bytes:
        for block, states in self._states.items():
            before = states[-1] if states else b""
            states.append(_digest(self._info.model, block, position, before, row))
            row = _hidden(self._info, states[-1])
        return row

    def draw(self, position: int, row: bytes) -> int:
        """Return the token that takes `position`, from the row before it."""
        noise = (self._sampling.seed, position) if self._sampling and self._sampling.temperature else ()
        return int.from_bytes(_digest("head", row, noise)[:8], "big") % self._info.vocabulary_size


def expected_tokens(
    info: SpanInfo, prompt: Sequence[int], count: int, sampling: Sampling | None = None
) -> tuple[int, ...]:
    """Return the first `count` tokens that a model yields after a prompt; `info` describes any of its spans."""
    session = _Session(info, BlockRange(0, info.block_count), sampling)
    tokens: list[int] = []
    rows = session.run(0, [_embed(info, token) for token in prompt])
    while len(tokens) < count:
        position = len(prompt) + len(tokens)
        tokens.append(session.draw(position, rows[-1]))
        rows = session.run(position, [_embed(info, tokens[-1])])
    return tuple(tokens)


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _hidden(info: SpanInfo, state: bytes) -> bytes:
    """Return a state as hidden_size elements of f32: small whole numbers, which bf16 and f16 keep exactly."""
    return array("f", list(hashlib.shake_128(state).digest(info.hidden_size))).tobytes()


def _embed(info: SpanInfo, token: int) -> bytes:
    return _hidden(info, _digest(info.model, "embed", token))
