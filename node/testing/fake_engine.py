"""An engine without a model, for simulations: its state is a hash chain of all its inputs.

Each block hashes, for every row, the row itself, its position, and its state before it. So the tokens depend on every
row, block and position and on their order, as those of a transformer do; and they are the same however the blocks are
divided into spans. `expected_tokens` gives the tokens of an undisturbed job.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import MappingProxyType

import numpy as np
import trio

from node.engine.activation_codec import decode_rows, encode_rows
from node.engine.base import Engine
from node.engine.interface import (
    PAGE_POSITIONS,
    REFERENCE,
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
)
from node.engine.kv_allocator import KvReservation, check_slice
from node.engine.pooling import Pool, pool_for
from node.engine.sampling import history_for
from protocol.identity import BlockRange, ModelId, SessionId
from protocol.messages import Sampling
from protocol.tensors import DType, Pooling, Tensor, tensor_from_tokens, tokens_from_tensor
from selector.task import KV_TYPES, VARIANTS, PackageFormat

FAKE_MODEL = ModelId(hashlib.sha256(b"metaswarm fake model").hexdigest())
"""The id of the imaginary model, unless another is given."""

FAKE_GGUF_MODEL = ModelId(hashlib.sha256(b"metaswarm fake GGUF model").hexdigest())
"""The id of an imaginary model whose package has GGUF files."""

UNSATISFIABLE = '{"type": "string", "pattern": "^(.{0,200}a.{0,200}b){1,20}$"}'
"""A JSON Schema that fails after some tokens: the real library gives up on it, too."""


def fake_format(model: ModelId) -> PackageFormat:
    """Return the package format of an imaginary model."""
    return PackageFormat.GGUF if model == FAKE_GGUF_MODEL else PackageFormat.SAFETENSORS


def fake_variants(model: ModelId) -> frozenset[Variant]:
    """Return the variants of an imaginary model: all calculate the same, but none takes another's pages."""
    variants = VARIANTS[fake_format(model)]
    return frozenset(
        Variant(engine, arithmetic, kv)
        for engine, found in variants.items()
        for arithmetic in found
        for kv in KV_TYPES[engine]
    )


def fake_span_info(
    blocks: BlockRange,
    *,
    model: ModelId = FAKE_MODEL,
    block_count: int,
    hidden_size: int = 32,
    vocabulary_size: int = 1000,
    max_positions: int = 4096,
    kv_positions: int = 16384,
    kv_shares: Mapping[str, float] = MappingProxyType({}),
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
        kv_shares=kv_shares,
        weight_bytes=12 * hidden_size**2 * len(blocks),
        load_s=0.0,
    )


class FakeEngine(Engine):
    """A span of an imaginary model, in this process, on trio's clock.

    A step through the whole span takes `step_s` plus `row_s` for each of its rows, times the variant's `slowness`:
    virtual seconds under a MockClock. What its blocks know lies in pages, as the keys and values of a real engine do,
    so that a page given out twice changes tokens, too. The model with the id FAKE_GGUF_MODEL is a GGUF package, which
    has one variant, any other is a safetensors package.
    """

    _sessions: "dict[SessionId, _Session]"

    def __init__(
        self,
        info: SpanInfo,
        *,
        step_s: float = 0.0,
        row_s: float = 0.0,
        variants: Iterable[Variant] | None = None,
        slowness: Mapping[Variant, float] | None = None,
    ) -> None:
        """`variants`: those that are ready; None: all that there are."""
        self._possible = fake_variants(info.model)
        super().__init__(info, self._possible if variants is None else variants)
        self._slowness = slowness or {}
        self._step_s = step_s
        self._row_s = row_s
        self._memory: _Memory = {}
        self._turn = trio.StrictFIFOLock()

    async def prepare(self, variant: Variant) -> None:
        """Pretend to build a variant, which takes no time."""
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        if variant not in self._possible:
            raise EngineError(f"there is no variant {variant}")
        self._variants.add(variant)

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Hash the rows of each slice in order."""
        self._raise_if_crashed()
        async with self._turn:
            running = [session for rows in slices if (session := self._sessions.get(rows.session))]
            share = max((len(session.info.blocks) for session in running), default=0) / len(self.info.blocks)
            compute_s = self._step_s * share + self._row_s * sum(rows.tensor.rows for rows in slices)
            compute_s *= max((self._slowness.get(session.variant, 1.0) for session in running), default=1.0)
            with trio.move_on_after(compute_s):
                await self._crashed.wait()
            self._raise_if_crashed()
            outputs: list[SliceOutput] = []
            faults: list[SliceFault] = []
            for rows in slices:
                try:
                    outputs.append(SliceOutput(session=rows.session, tensor=self._run(rows)))
                except EngineError as error:
                    by_rows, by_request = isinstance(error, BadRows), isinstance(error, BadRequest)
                    faults.append(SliceFault(rows.session, str(error), by_rows, by_request))
                    self._close(rows.session, keep=False)
            if faults and not outputs:
                raise StepFailed(faults)
            self._steps += 1
            self._compute_s += compute_s
            return StepResult(outputs=tuple(outputs), compute_s=compute_s, faults=tuple(faults))

    def crash(self, reason: str = "the worker process was killed") -> None:
        """Behave from now on like an engine whose worker process died."""
        self._crash(reason)

    def _begun(self, session: SessionId, options: SessionOptions, reservation: KvReservation) -> "_Session":
        return _Session(self.info.part(options.blocks), options, self._memory, reservation)

    def _run(self, rows: SliceInput) -> Tensor:
        session = self._sessions.get(rows.session)
        if session is None:
            raise SessionNotOpen(rows.session)
        check_slice(session.info, rows, cached=session.length, reserved=session.positions)
        self._pages.rewind(rows.session, rows.position)
        if session.info.is_first:
            tokens = tokens_from_tensor(rows.tensor)
            if any(not 0 <= token < self.info.vocabulary_size for token in tokens):
                raise BadRows(f"a token id is not below {self.info.vocabulary_size}")
            hidden = session.run(rows.position, [_embed(self.info, token) for token in tokens])
        else:
            states = decode_rows(rows.tensor)
            hidden = session.run(rows.position, [row.tobytes() for row in states])
        self._pages.advance(rows.session, session.length)
        if not session.info.is_last:
            states = np.frombuffer(b"".join(hidden), np.float32).reshape(-1, self.info.hidden_size)
            return encode_rows(states, session.activations)
        if session.pool is not None:
            session.pool.add(rows.position, np.frombuffer(b"".join(hidden), np.float32).reshape(len(hidden), -1))
            pooled = session.pool.embedding()[: rows.draws]
            return Tensor(DType.FLOAT32, pooled.shape, pooled.tobytes())
        if session.history is not None and rows.history is not None:
            session.history.reset(rows.history)
        scores = session.score(rows.position, hidden)
        first_drawn = len(hidden) - rows.draws
        drawn: list[int] = []
        for number, row in enumerate(hidden[first_drawn:]):
            drawn.append(session.draw(rows.position + first_drawn + number + 1, row))
            if number < len(rows.drafts) and rows.drafts[number] != drawn[-1]:
                break
        return session.reported(drawn, scores)


_Memory = dict[tuple[int, int], bytes]
"""The state of a block after a row, by block and slot."""


class _Session:
    """The state of one session in some blocks."""

    def __init__(self, info: SpanInfo, options: SessionOptions, memory: _Memory, reservation: KvReservation) -> None:
        self.info = info
        self._blocks = range(info.blocks.start, info.blocks.end)
        self._sampling = options.sampling
        self._memory = memory
        self._pages = reservation.pages
        self.history = history_for(options.sampling)
        self.pool = pool_for(options.sampling)
        self.activations = options.activations
        self.variant = options.variant
        self.positions = reservation.positions
        self.length = reservation.cached
        """Cached positions."""
        for source, page in zip(reservation.copied, reservation.pages, strict=False):
            for block, offset in product(self._blocks, range(PAGE_POSITIONS)):
                memory[block, page * PAGE_POSITIONS + offset] = memory[block, source * PAGE_POSITIONS + offset]

    def run(self, position: int, rows: Iterable[bytes]) -> list[bytes]:
        """Drop the positions from `position` on, then pass rows through the blocks; return their output."""
        self.length = position
        return [self._pass(row) for row in rows]

    def _pass(self, row: bytes) -> bytes:
        for block in self._blocks:
            before = self._memory[block, self._place(self.length - 1)] if self.length else b""
            state = _digest(self.info.model, block, self.length, before, row)
            self._memory[block, self._place(self.length)] = state
            row = _hidden(self.info, state)
        self.length += 1
        return row

    def _place(self, position: int) -> int:
        return self._pages[position // PAGE_POSITIONS] * PAGE_POSITIONS + position % PAGE_POSITIONS

    def draw(self, position: int, row: bytes) -> int:
        """Return the token at `position`, from the row before it and the sampling options."""
        sampling = self._sampling
        history = self.history if sampling is not None and sampling.draws_by_history else None
        if sampling is None:
            return int.from_bytes(_digest("head", row, ())[:8], "big") % self.info.vocabulary_size
        if sampling.json_schema == UNSATISFIABLE and position >= sampling.prompt_length + 4:
            raise BadRequest("the JSON Schema cannot be followed: it admits nothing")
        noise: tuple[object, ...] = (sampling.seed, position) if sampling.temperature else ()
        if sampling.temperature and (sampling.top_k or sampling.min_p):
            noise += (sampling.top_k, sampling.min_p)
        if sampling.logit_bias:
            noise += sampling.logit_bias
        if sampling.json_schema:
            noise += (sampling.json_schema,)
        if history is not None:
            history.rewind(position)
            text = sorted(zip(*(each.tolist() for each in history.counts()), strict=True))
            noise += (sampling.repetition_penalty, sorted(history.seen().tolist()))
            noise += (sampling.frequency_penalty, sampling.presence_penalty, text)
        token = int.from_bytes(_digest("head", row, noise)[:8], "big") % self.info.vocabulary_size
        while position < sampling.min_length and token in sampling.stop_tokens:
            token = (token + 1) % self.info.vocabulary_size
        if history is not None:
            history.append(token)
        return token

    def score(self, position: int, rows: Sequence[bytes]) -> list[list[float]]:
        """Return the scores of the prompt's tokens that follow rows from a position on, where they are wanted."""
        sampling, history = self._sampling, self.history
        if sampling is None or history is None:
            return []
        following = history.following(position, sampling.scored_rows(position, len(rows)))
        return [
            fake_score(row, token, sampling.logprobs, self.info.vocabulary_size)
            for row, token in zip(rows, following, strict=False)
        ]

    def reported(self, tokens: Sequence[int], scores: Sequence[list[float]] = ()) -> Tensor:
        """Return scores and tokens that were drawn, with what the options want beside them."""
        count = 0 if self._sampling is None else self._sampling.logprobs
        if not count:
            return tensor_from_tokens(tokens)
        found = [*scores, *(fake_logprobs(token, count, self.info.vocabulary_size) for token in tokens)]
        rows = np.array(found, np.float32).reshape(-1, 2 * count)
        return Tensor(DType.FLOAT32, rows.shape, rows.tobytes())


def fake_score(row: bytes, token: int, count: int, vocabulary_size: int) -> list[float]:
    """Return a token's score, which depends on all rows before it, and those of the tokens that follow it in number."""
    scores = [-_digest("score", row, token + number)[0] / 16 for number in range(count)]
    return [value for number, score in enumerate(scores) for value in ((token + number) % vocabulary_size, score)]


def fake_logprobs(token: int, count: int, vocabulary_size: int) -> list[float]:
    """Return a row of log probabilities: a token, the same again as the likeliest, and others that follow it."""
    pairs = [(token, -0.5), *(((token + number) % vocabulary_size, -0.5 * (number + 1)) for number in range(count - 1))]
    return [value for pair in pairs for value in pair]


def expected_tokens(
    info: SpanInfo, prompt: Sequence[int], count: int, sampling: Sampling | None = None
) -> tuple[int, ...]:
    """Return the first `count` tokens that a model yields after a prompt; `info` describes any of its spans."""
    positions = len(prompt) + count
    pages = tuple(range(-(-positions // PAGE_POSITIONS)))
    session = _Session(
        replace(info, blocks=BlockRange(0, info.block_count)),
        SessionOptions(variant=REFERENCE, sampling=sampling),
        {},
        KvReservation(positions=positions, pages=pages),
    )
    if session.history is not None:
        session.history.reset(prompt)
    tokens: list[int] = []
    rows = session.run(0, [_embed(info, token) for token in prompt])
    while len(tokens) < count:
        position = len(prompt) + len(tokens)
        tokens.append(session.draw(position, rows[-1]))
        rows = session.run(position, [_embed(info, tokens[-1])])
    return tuple(tokens)


def expected_scores(info: SpanInfo, prompt: Sequence[int]) -> list[float]:
    """Return the log probability of each token of a prompt but the first; `info` describes any of its spans."""
    pages = tuple(range(-(-len(prompt) // PAGE_POSITIONS)))
    whole = replace(info, blocks=BlockRange(0, info.block_count))
    session = _Session(whole, SessionOptions(variant=REFERENCE), {}, KvReservation(positions=len(prompt), pages=pages))
    rows = session.run(0, [_embed(info, token) for token in prompt])
    return [fake_score(row, token, 1, info.vocabulary_size)[1] for row, token in zip(rows, prompt[1:], strict=False)]


def expected_embedding(info: SpanInfo, prompt: Sequence[int], pooling: Pooling) -> list[float]:
    """Return the embedding that a model yields of a prompt; `info` describes any of its spans."""
    pages = tuple(range(-(-len(prompt) // PAGE_POSITIONS)))
    whole = replace(info, blocks=BlockRange(0, info.block_count))
    reservation = KvReservation(positions=len(prompt), pages=pages)
    session = _Session(whole, SessionOptions(variant=REFERENCE), {}, reservation)
    rows = session.run(0, [_embed(info, token) for token in prompt])
    pool = Pool(pooling)
    pool.add(0, np.frombuffer(b"".join(rows), np.float32).reshape(len(rows), -1))
    embedding: list[float] = pool.embedding()[0].tolist()
    return embedding


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _hidden(info: SpanInfo, state: bytes) -> bytes:
    """Return a state as hidden_size elements of f32, which every wire codec keeps exactly.

    They are whole numbers up to 127, which is among the first of any 32 of them: so int8 has nothing to scale.
    """
    elements = np.frombuffer(hashlib.shake_128(state).digest(info.hidden_size), np.uint8) % 128
    elements[::32] = 127
    return elements.astype(np.float32).tobytes()


def _embed(info: SpanInfo, token: int) -> bytes:
    return _hidden(info, _digest(info.model, "embed", token))
