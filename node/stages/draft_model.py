"""Draft model for speculative decoding [Leviathan, Kalman, Matias, ICML 2023].

It lies whole on the node that runs a job's first stage, in an engine of its own, so that drafting costs no round of the
route. Its drafts are greedy and only save time: it may be smaller, or computed in coarser numbers. Where it fails, is
late, has no room, or has not read the text yet, jobs go on without drafts.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Final

import structlog
import trio

from node.engine.base import Engine
from node.engine.interface import PAGE_POSITIONS, EngineError, Prefix, SessionOptions, SliceInput, Variant
from node.stages.engine_loop import EngineLoop
from node.stages.fair_share import may_take
from node.stages.speculation import matching_prefix
from node.util.signal import Signal
from protocol.identity import PeerId, SessionId
from protocol.limits import MAX_SLICES
from protocol.messages import Sampling
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

DRAFT_TIMEOUT_S: Final = 0.5
"""A session waits this long for its drafts; then it goes on with those that are there."""

STEP_ROWS: Final = 256
"""Rows of texts that are read in one step while no session waits for drafts,"""

MIN_STEP_ROWS: Final = 32
"""and while one does."""

MAX_BEHIND: Final = 32
"""Tokens that are read before drafting; a session that lags farther behind reads first, and is not waited for."""

_logger = structlog.get_logger(__name__)


class DraftModel(EngineLoop):
    """Drafts for many sessions at a time, each step one token for every session that waits."""

    def __init__(self, engine: Engine, variant: Variant, own: PeerId) -> None:
        """`engine`: of a whole model. `variant`: one that is ready there. `own`: this node."""
        super().__init__(engine)
        self._variant = variant
        self._own = own
        self._pages: dict[SessionId, tuple[PeerId, int]] = {}
        """Of KV memory that sessions have, or are about to, and for whom."""
        self._drafts: dict[SessionId, Draft] = {}
        self._step_began_s = 0.0
        self._work_ready = Signal()
        self._deadline_set = Signal()

    async def open(
        self, session: SessionId, peer: PeerId, positions: int, vocabulary_size: int, prefix: Prefix | None
    ) -> "Draft | None":
        """Return the drafter of a session of so many positions; None where there is no room for it.

        `peer`: its coordinator: they share the memory fairly. `vocabulary_size`: of the target model; two models that
        share a tokenizer may be padded differently.
        """
        info = self.engine.info
        positions = min(positions, info.max_positions)
        pages = -(-positions // PAGE_POSITIONS)
        if not may_take(peer, pages, own=self._own, pages=info.kv_positions // PAGE_POSITIONS, held=self._held()):
            _logger.info("session opened without drafts", session=session, why="the memory is for other peers")
            return None
        self._pages[session] = peer, pages
        options = SessionOptions(sampling=Sampling(max_tokens=positions), variant=self._variant)
        try:
            await self.engine.open(session, positions, prefix)
            held = await self.engine.begin(session, options)
        except EngineError as error:
            _logger.info("session opened without drafts", session=session, why=str(error))
            self._pages.pop(session, None)
            return None
        except trio.Cancelled:
            self._pages.pop(session, None)
            self.start_freeing(session)
            raise
        sizes = info.vocabulary_size, vocabulary_size
        draft = self._drafts[session] = Draft(session, self, held=held, positions=positions, vocabulary_sizes=sizes)
        return draft

    def _held(self) -> Counter[PeerId]:
        """Return how many pages the sessions of each peer have."""
        held: Counter[PeerId] = Counter()
        for peer, pages in self._pages.values():
            held[peer] += pages
        return held

    @property
    def is_late(self) -> bool:
        """Whether the step under way has taken longer than any session waits."""
        return bool(self._in_step) and trio.current_time() > self._step_began_s + DRAFT_TIMEOUT_S

    def wake(self) -> None:
        """Look again for rows to compute, and for sessions that wait."""
        self._work_ready.set()
        self._deadline_set.set()

    def release(self, session: SessionId) -> None:
        """Forget a session, and free what the engine holds of it, once it is in no step."""
        if self._drafts.pop(session, None) is not None:
            self._pages.pop(session, None)
            if session not in self._in_step:
                self.start_freeing(session)

    def _background_tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        return (self._timeout_loop,)

    def _on_stopped(self) -> None:
        for draft in tuple(self._drafts.values()):
            draft.fail()
        self._drafts.clear()
        self._pages.clear()

    async def _timeout_loop(self) -> None:
        """Let sessions go on that have waited for long enough: the engine may hang."""
        while True:
            deadlines_s = [draft.deadline_s for draft in self._drafts.values() if draft.is_pending]
            if not deadlines_s:
                await self._deadline_set.wait()
                continue
            await trio.sleep_until(min(deadlines_s))
            for draft in tuple(self._drafts.values()):
                draft.expire()

    async def _step_loop(self) -> None:
        while True:
            if slices := list(self._next_slices())[:MAX_SLICES]:
                await self._step(slices)
            else:
                await self._work_ready.wait()

    def _next_slices(self) -> Iterator[SliceInput]:
        """Yield rows for the next step: of sessions that wait, then of texts to be read."""
        pending = [draft for draft in self._drafts.values() if draft.is_pending]
        for draft in pending:
            if rows := draft.next_rows(MAX_BEHIND + 1):
                yield rows
        room = MIN_STEP_ROWS if pending else STEP_ROWS
        for draft in self._drafts.values():
            if room > 0 and not draft.is_pending and (rows := draft.next_rows(room)):
                room -= rows.tensor.rows
                yield rows

    async def _step(self, slices: Sequence[SliceInput]) -> None:
        self._in_step = frozenset(rows.session for rows in slices)
        self._step_began_s = trio.current_time()
        try:
            result = await self.engine.step(slices)
        except EngineError as error:
            _logger.info("draft session lost", why=str(error))
            self._on_step_done(slices, {})
        else:
            self._on_step_done(slices, {output.session: output.tensor for output in result.outputs})
        finally:
            for session in self._in_step - self._drafts.keys():
                self.start_freeing(session)
            self._in_step = frozenset()

    def _on_step_done(self, slices: Sequence[SliceInput], outputs: Mapping[SessionId, Tensor]) -> None:
        for rows in slices:
            if draft := self._drafts.get(rows.session):
                if rows.session in outputs:
                    draft.on_computed(rows, tokens_from_tensor(outputs[rows.session]) if rows.draws else ())
                else:
                    del self._drafts[rows.session]
                    self._pages.pop(rows.session, None)
                    draft.fail()


class Draft:
    """The drafts of one session. Implements `node.stages.speculation.Drafter`."""

    def __init__(
        self, session: SessionId, model: DraftModel, *, held: int, positions: int, vocabulary_sizes: tuple[int, int]
    ) -> None:
        self._session = session
        self._model = model
        self._positions = positions
        self._own_vocabulary, self._target_vocabulary = vocabulary_sizes
        self._tokens: list[int] = []
        self._drafted: list[int] = []
        """Drafts behind the tokens so far."""
        self._held = held
        """Rows that the engine holds and that follow from the tokens and drafts."""
        self._wanted = 0
        self._then: Callable[[Sequence[int]], None] | None = None
        self._has_begun = False
        self._has_failed = False
        self.deadline_s = 0.0
        """When the session that waits goes on with the drafts that are there."""

    @property
    def is_pending(self) -> bool:
        """Whether the session waits for drafts."""
        return self._then is not None

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text; see Drafter."""
        if self._drafted:
            self._held = min(self._held, len(self._tokens) + matching_prefix(self._drafted, tokens))
            self._drafted = []
        self._tokens.extend(tokens)
        if len(self._tokens) > self._positions or not all(0 <= token < self._own_vocabulary for token in tokens):
            self.close()
            self.fail()
        self._model.wake()

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        """Draft once the text is read, but not before its first token, which is not to wait; see Drafter."""
        self._wanted = min(count, self._positions - len(self._tokens))
        is_behind = len(self._tokens) - self._held > MAX_BEHIND
        if self._has_failed or not self._has_begun or is_behind or self._wanted < 1 or self._model.is_late:
            self._has_begun = True
            then(())
            return
        self._then, self.deadline_s = then, trio.current_time() + DRAFT_TIMEOUT_S
        self._model.wake()

    def close(self) -> None:
        """Free the session at the draft model; see Drafter."""
        self._then = None
        self._model.release(self._session)

    def fail(self) -> None:
        """Draft nothing any more, and let the session go on without."""
        self._has_failed = True
        self._answer(())

    def expire(self) -> None:
        """Let the session go on with the drafts that are there, if it has waited for long enough."""
        if self.is_pending and trio.current_time() >= self.deadline_s:
            self._answer(self._drafted)

    def next_rows(self, most: int) -> SliceInput | None:
        """Return rows to compute next; None if none. The last token's waits until a draft, drawn from it, is wanted."""
        length = len(self._tokens) + len(self._drafted)
        start = min(self._held, length - 1) if self.is_pending else self._held
        end = min(length if self.is_pending else length - 1, start + most)
        if start >= end:
            return None
        rows = self._text(start, end)
        draws = 1 if end == length else 0
        return SliceInput(session=self._session, position=start, tensor=tensor_from_tokens(rows), draws=draws)

    def on_computed(self, rows: SliceInput, drawn: Sequence[int]) -> None:
        """Record rows that were computed, and the token that was drawn behind the last, if one was.

        Meanwhile the session may have gone on with other tokens: what was computed behind those that differ is void.
        """
        end = rows.position + rows.tensor.rows
        same = matching_prefix(tokens_from_tensor(rows.tensor), self._text(rows.position, end))
        self._held = rows.position + same
        if same < rows.tensor.rows or end < len(self._tokens) + len(self._drafted):
            return
        is_foreign = any(token >= self._target_vocabulary for token in drawn)
        if not is_foreign:
            self._drafted.extend(drawn)
        if self.is_pending and (is_foreign or len(self._drafted) >= self._wanted):
            self._answer(self._drafted)

    def _text(self, start: int, end: int) -> list[int]:
        """Return tokens and, behind them, drafts."""
        known = len(self._tokens)
        return [*self._tokens[start:end], *self._drafted[max(0, start - known) : max(0, end - known)]]

    def _answer(self, drafts: Sequence[int]) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(tuple(drafts))
