"""The sessions of one span and the steps over them, whatever computes: what the shards of all engines share.

It imports no engine, so that a worker loads only the one that it runs.
"""

import enum
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from node.engine.activation_codec import check_rows, decode_rows, encode_rows
from node.engine.constraint import Constraint, ConstraintProcess
from node.engine.interface import (
    BadRequest,
    BadRows,
    EngineError,
    SessionNotOpen,
    SessionOptions,
    SliceFault,
    SliceInput,
    SliceOutput,
    SpanInfo,
    StepFailed,
    StepResult,
    Variant,
    session_part,
)
from node.engine.kv_allocator import KvReservation, check_slice
from node.engine.pooling import Pool, pool_for
from node.engine.sampling import TokenCounts, draw_and_verify, history_for
from node.engine.scoring import Scored, logprob_rows, scored_pieces
from node.util.heap import trim_heap
from node.util.text import one_line
from protocol.identity import BlockRange, SessionId
from protocol.tensors import DType, Tensor, tensor_from_tokens, tokens_from_tensor

FREE_MEMORY_SHARE: Final = 0.5
"""What a shard takes of the free memory, by default."""

CONSTRAINTS_S: Final = 0.25
"""Once the constraints of a step's texts have taken this long, other such texts draw in the next one: all sessions wait
for a step. What one text may cost beyond is bounded by `constraint_worker`."""

KvT = TypeVar("KvT")
"""Where an engine holds the keys and values of one session."""

Array = npt.NDArray[Any]


@dataclass(slots=True)
class ShardSession(Generic[KvT]):
    """A session that has begun. `info`: of the part of the span that it runs."""

    options: SessionOptions
    info: SpanInfo
    positions: int
    kv: KvT
    length: int
    """Positions whose keys and values are in KV memory."""
    history: TokenCounts | None
    """Where draws depend on the tokens so far."""
    constraint: Constraint | None = None
    """Where the text follows a JSON Schema."""
    left_out: int = 0
    """Steps since its last output that had no time for its constraint."""
    pool: Pool | None = None
    """Where the prompt's embedding is wanted, and no text."""


@dataclass(frozen=True, slots=True)
class SessionRows(Generic[KvT]):
    """Rows of one session in a step: token ids i64 (rows,), or hidden states f32 (rows, hidden size)."""

    rows: Array
    kv: KvT
    position: int
    draws: int
    following: Sequence[int] = ()
    """The tokens of the prompt behind its first rows, where these are scored; with each so many likeliest ones:"""
    likeliest: int = 0


@dataclass(slots=True)
class _Batch(Generic[KvT]):
    """The slices of a step, and their outcomes by number."""

    slices: Sequence[SliceInput]
    sessions: dict[int, ShardSession[KvT]] = field(default_factory=dict)
    rows: dict[int, SessionRows[KvT]] = field(default_factory=dict)
    outputs: dict[int, SliceOutput] = field(default_factory=dict)
    faults: dict[int, SliceFault] = field(default_factory=dict)
    left_out: list[SessionId] = field(default_factory=list)
    constraints_s: float = 0.0
    """How long the constraints of its texts have taken."""

    def most_left_out(self, numbers: Iterable[int]) -> int:
        """Return how often the slice that was left out most often was; of several groups its goes first."""
        return max(self.sessions[number].left_out for number in numbers)

    def fail(self, number: int, error: Exception) -> None:
        message = str(error)
        if not isinstance(error, EngineError):
            message = f"the forward pass failed: {one_line(message, 300)}"
        self.faults[number] = SliceFault(
            self.slices[number].session, message, isinstance(error, BadRows), isinstance(error, BadRequest)
        )


class _Pass(enum.Enum):
    """What is wanted of the rows of a last span; rows of others give their states anyway."""

    LOGITS = enum.auto()
    STATES = enum.auto()
    """Behind the final norm, for an embedding."""
    SCORES = enum.auto()


_Outputs = Sequence[Array | Scored]
_Compute = Callable[[Sequence[SessionRows[KvT]]], _Outputs]


class Shard(ABC, Generic[KvT]):
    """Serves a span as Engine describes it, synchronously; the KV allocator runs elsewhere."""

    info: SpanInfo

    def __init__(self) -> None:
        self._sessions: dict[SessionId, ShardSession[KvT]] = {}
        self.tokenizer_file: Path | None = None
        """For texts that follow a JSON Schema."""
        self._constraints: ConstraintProcess | None = None
        self._unused_pages: set[int] = set()
        """Pages given up by sessions, and not taken by others; also those given back: memory at the edge of two can be
        only when neither is in use."""

    @abstractmethod
    def variants(self) -> frozenset[Variant]:
        """Return the variants that are available."""

    @abstractmethod
    def prepare(self, variant: Variant) -> None:
        """Build a variant and warm it; may run beside `step` in a thread of its own, one at a time.

        Raises EngineError where it is unavailable: no such variant, not for this architecture, or too little memory.
        """

    def drop(self, variant: Variant) -> None:
        """Give up a variant that no session uses, where a variant may lack memory; from the thread of the steps."""

    @abstractmethod
    def start_threads(self, variant: Variant) -> None:
        """Start the threads that a variant's steps will need, from the thread that runs the steps.

        Raises EngineError where what runs it cannot be imported.
        """

    @abstractmethod
    def unload_reference(self) -> None:
        """Give the reference's memory back until a session wants it, unless nothing else can serve the span."""

    def trim(self, dropped: Sequence[int], *, idle: bool) -> None:
        """Give memory back that sessions had taken: what they have not needed since the last time, or all of it.

        `dropped`: pages whose content was given up since the last session began. `idle`: there are no sessions for the
        time being.
        """
        self._unused_pages.update(dropped)
        self._give_back(sorted(self._unused_pages))
        trim_heap()

    @abstractmethod
    def run_alone(self, variant: Variant, rows: Array, *, draws: int) -> npt.NDArray[np.float32]:
        """Return hidden states of rows from position 0 on or, on a last span, logits after the last `draws` of them.

        For quality measurements, without sessions: it may write into any page. `rows`: token ids i64 (rows,) on a
        first span, hidden states f32 (rows, hidden size) elsewhere. Raises EngineError.
        """

    @abstractmethod
    def _reserve(self, variant: Variant, reservation: KvReservation) -> KvT:
        """Take over the pages of a new session. Raises EngineError where its cached ones are gone."""

    @abstractmethod
    def _release(self, kv: KvT) -> None:
        """Give up the pages of a session that is over."""

    @abstractmethod
    def _give_back(self, pages: Sequence[int]) -> None:
        """Give the memory of pages that hold nothing back to the operating system, where pages are memory."""

    @abstractmethod
    def _compute(self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[KvT]]) -> Sequence[Array]:
        """Return the output of each part: hidden states, or logits behind the model's last block.

        What a part finds at its positions and behind them is from before a rollback. Raises whatever the engine raises.
        """

    @abstractmethod
    def _embed(self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[KvT]]) -> Sequence[Array]:
        """Return all rows of each part behind the model's final norm, f32 (rows, hidden size), on a last span.

        Otherwise it is as `_compute`.
        """

    def _is_lost(self, _error: Exception) -> bool:
        """Return whether nothing can be computed here any more."""
        return False

    def _score(self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[KvT]]) -> Sequence[Scored]:
        """Return the scores of each part's rows, and the logits that `_compute` would."""
        scores: list[list[Array]] = [[] for _ in parts]
        logits: list[list[Array]] = [[] for _ in parts]
        for pieces in scored_pieces([len(part.rows) for part in parts], self.info.vocabulary_size):
            given = [
                replace(part, rows=part.rows[start:end], position=part.position + start, draws=end - start)
                for number, start, end in pieces
                for part in [parts[number]]
            ]
            for (number, start, end), output in zip(pieces, self._compute(variant, blocks, given), strict=True):
                part = parts[number]
                scores[number].append(logprob_rows(output, part.following[start:end], part.likeliest))
                logits[number].append(output[max(0, len(part.rows) - part.draws - start) :].copy())
        return [Scored(np.concatenate(of), np.concatenate(tail)) for of, tail in zip(scores, logits, strict=True)]

    def _parts(self, _variant: Variant, numbers: Sequence[int]) -> Sequence[Sequence[int]]:
        """Return which slices of a variant are computed together."""
        return [numbers]

    def begin(self, session: SessionId, options: SessionOptions, reservation: KvReservation) -> None:
        """Begin a session on its pages; raise EngineError as `session_part` does.

        One whose cached pages are gone does not begin, and its first slice fails as that of an unknown session.
        """
        self._unused_pages.update(reservation.dropped)
        self._unused_pages.difference_update(reservation.pages)
        info = session_part(self.info, self.variants(), options)
        try:
            kv = self._reserve(options.variant, reservation)
        except EngineError:
            return
        history = history_for(options.sampling)
        pool = pool_for(options.sampling)
        opened = ShardSession(options, info, reservation.positions, kv, reservation.cached, history, pool=pool)
        if options.sampling is not None and options.sampling.json_schema:
            opened.constraint = self._constraint_process().open(options.sampling.json_schema)
        self._sessions[session] = opened

    def rename(self, session: SessionId, successor: SessionId) -> None:
        """Give a session another id; an unknown one is ignored."""
        if (found := self._sessions.pop(session, None)) is not None:
            self._sessions[successor] = found

    def close(self, session: SessionId) -> None:
        """Drop a session; an unknown one is ignored."""
        if (found := self._sessions.pop(session, None)) is not None:
            self._release(found.kv)
            if found.constraint is not None:
                found.constraint.close()

    def start_constraints(self) -> None:
        """Start what texts that follow a JSON Schema need; may run beside `step` in a thread. Raises EngineError."""
        self._constraint_process().start()

    def end_constraints(self) -> None:
        """Give its memory back, until a session needs it."""
        if self._constraints is not None:
            self._constraints.close()

    def _constraint_process(self) -> ConstraintProcess:
        if self._constraints is None:
            self._constraints = ConstraintProcess(self.tokenizer_file, self.info.vocabulary_size)
        return self._constraints

    def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run the slices, those of a variant together. Sessions whose slices fail are closed; see Engine."""
        started_s = perf_counter()
        batch: _Batch[KvT] = _Batch(slices)
        try:
            groups = sorted(self._grouped(batch).items(), key=lambda group: -batch.most_left_out(group[1]))
            for (variant, blocks, pass_), numbers in groups:
                passes: dict[_Pass, Callable[[Variant, BlockRange, Sequence[SessionRows[KvT]]], _Outputs]] = {
                    _Pass.LOGITS: self._compute,
                    _Pass.STATES: self._embed,
                    _Pass.SCORES: self._score,
                }
                compute: _Compute[KvT] = partial(passes[pass_], variant, blocks)
                for part in sorted(self._parts(variant, numbers), key=lambda part: -batch.most_left_out(part)):
                    self._run(batch, compute, part)
        except EngineError:
            for rows in slices:
                self.close(rows.session)
            raise
        for fault in batch.faults.values():
            self.close(fault.session)
        faults = tuple(fault for _, fault in sorted(batch.faults.items()))
        if faults and not (batch.outputs or batch.left_out):
            raise StepFailed(faults)
        outputs = tuple(output for _, output in sorted(batch.outputs.items()))
        compute_s, left_out = perf_counter() - started_s, tuple(batch.left_out)
        return StepResult(outputs=outputs, compute_s=compute_s, faults=faults, left_out=left_out)

    def _grouped(self, batch: _Batch[KvT]) -> dict[tuple[Variant, BlockRange, _Pass], list[int]]:
        """Return the valid slices, by number, grouped by variant, blocks, and what is wanted of their rows."""
        groups: dict[tuple[Variant, BlockRange, _Pass], list[int]] = {}
        counts = Counter(rows.session for rows in batch.slices)
        for number, rows in enumerate(batch.slices):
            try:
                session = batch.sessions[number] = self._session_of(rows, alone=counts[rows.session] == 1)
                prepared = self._input(rows.tensor, session.info)
                following = _scored_tokens(rows, session)
            except EngineError as error:
                batch.fail(number, error)
                continue
            sampling = session.options.sampling
            likeliest = sampling.logprobs - 1 if sampling is not None and following else 0
            batch.rows[number] = SessionRows(prepared, session.kv, rows.position, rows.draws, following, likeliest)
            wanted = _Pass.STATES if session.pool is not None else _Pass.SCORES if following else _Pass.LOGITS
            groups.setdefault((session.options.variant, session.info.blocks, wanted), []).append(number)
        return groups

    def _run(self, batch: _Batch[KvT], compute: _Compute[KvT], numbers: Sequence[int]) -> None:
        """Run slices together; where that fails, each half of them again, until those that fail are alone.

        The next pass overwrites the positions that a failed one wrote. Raises EngineError where the device is lost.
        """
        try:
            computed = compute([batch.rows[number] for number in numbers])
        except Exception as error:  # engines fail in many ways
            if self._is_lost(error):
                raise EngineError(f"the forward pass failed: {one_line(error)}") from error
            if len(numbers) == 1:
                batch.fail(numbers[0], error)
                return
        else:
            outputs = zip(numbers, computed, strict=True)
            for number, output in sorted(outputs, key=lambda each: -batch.sessions[each[0]].left_out):
                _finish(batch, number, output)
            return
        middle = len(numbers) // 2
        for half in (numbers[:middle], numbers[middle:]):
            self._run(batch, compute, half)

    def _session_of(self, rows: SliceInput, *, alone: bool) -> ShardSession[KvT]:
        if not alone:
            raise EngineError("a session has more than one slice in a step")
        session = self._sessions.get(rows.session)
        if session is None:
            raise SessionNotOpen(rows.session)
        check_slice(session.info, rows, cached=session.length, reserved=session.positions)
        return session

    def _input(self, tensor: Tensor, info: SpanInfo) -> Array:
        """Return rows as engines take them; token ids are checked, as a bad one fails its whole batch or crashes."""
        if not info.is_first:
            return decode_rows(tensor)
        tokens = np.array(tokens_from_tensor(tensor), np.int64)
        if tokens.min() < 0 or tokens.max() >= self.info.vocabulary_size:
            raise BadRows(f"a token id is not below {self.info.vocabulary_size}")
        return tokens


def _scored_tokens(rows: SliceInput, session: ShardSession[Any]) -> Sequence[int]:
    """Return the tokens behind the rows of a slice that are to be scored. Raises EngineError for unknown ones."""
    sampling, history = session.options.sampling, session.history
    if sampling is None or history is None:
        return ()
    if rows.history is not None:
        history.reset(rows.history)
    return history.following(rows.position, sampling.scored_rows(rows.position, rows.tensor.rows))


def _finish(batch: _Batch[Any], number: int, output: Array | Scored) -> None:
    """Make a slice's output of what was computed, or leave it out where its constraint has no time in this step."""
    rows, session = batch.slices[number], batch.sessions[number]
    constraint = session.constraint if rows.draws else None
    if constraint is not None and batch.constraints_s >= CONSTRAINTS_S:
        session.left_out += 1
        batch.left_out.append(rows.session)
        return
    session.left_out = 0
    before_s = constraint.spent_s if constraint is not None else 0.0
    try:
        tensor = _output(rows, session, output)
    except BadRequest as error:
        batch.fail(number, error)
    except EngineError as error:  # never BadRows: the input was checked, so the fault is here
        batch.fail(number, EngineError(str(error)))
    else:
        session.length = rows.position + rows.tensor.rows
        batch.outputs[number] = SliceOutput(session=rows.session, tensor=tensor)
    if constraint is not None:
        batch.constraints_s += constraint.spent_s - before_s


def _output(rows: SliceInput, session: ShardSession[Any], output: Array | Scored) -> Tensor:
    """Return a slice's output: encoded hidden states, scores and the tokens drawn from logits, or the embedding."""
    scores = np.empty((0, 0), np.float32)
    if isinstance(output, Scored):
        scores, output = output
    if not session.info.is_last:
        check_rows(output)
        return encode_rows(output, session.options.activations)
    if session.pool is not None:
        if output.shape[1] != session.info.hidden_size:
            raise EngineError("the model's last states are of another width than its blocks': it gives no embeddings")
        session.pool.add(rows.position, output)
        pooled = session.pool.embedding()[: rows.draws]
        return Tensor(DType.FLOAT32, pooled.shape, pooled.tobytes())
    sampling = session.options.sampling
    assert sampling is not None
    first_drawn = rows.position + rows.tensor.rows - rows.draws + 1
    history = session.history if sampling.draws_by_history else None
    tokens = draw_and_verify(output, sampling, first_drawn, rows.drafts, history, session.constraint)
    if sampling.logprobs:
        found = logprob_rows(output, tokens, sampling.logprobs - 1)
        found = np.concatenate([scores, found]) if len(scores) else found
        return Tensor(DType.FLOAT32, found.shape, found.tobytes())
    return tensor_from_tokens(tokens)
