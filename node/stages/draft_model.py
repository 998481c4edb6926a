"""A draft model guesses what a larger one will say [Leviathan, Kalman, Matias, ICML 2023].

It lies whole on the node that runs a job's first stage, in an engine of its own, so that guessing costs no round of the
route. Its guesses are greedy and only save time: it may be smaller, or computed in coarser numbers. Where it fails, is
late, has no room, or has not read the text yet, jobs go on without guesses.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import structlog
import trio

from node.engine.base import Engine
from node.engine.interface import EngineCrashed, EngineError, Prefix, SessionOptions, SliceInput, Variant
from protocol.identity import SessionId
from protocol.limits import MAX_SLICES
from protocol.messages import Sampling
from protocol.tensors import tensor_from_tokens, tokens_from_tensor

PATIENCE_S: Final = 0.5
"""So long guesses are waited for; then those that are there must do."""

STEP_ROWS: Final = 256
"""Of texts that are read in one step while nobody waits for guesses,"""

MIN_STEP_ROWS: Final = 32
"""and while somebody does."""

MAX_BEHIND: Final = 32
"""Tokens that are read before guessing; who lags farther behind reads first, and is not waited for."""

_logger = structlog.get_logger(__name__)


class DraftModel:
    """Guesses for many sessions at a time, each step one token for everybody who waits."""

    def __init__(self, engine: Engine, variant: Variant) -> None:
        """Take the engine of a whole model, and a variant that is ready there."""
        self._engine = engine
        self._variant = variant
        self._drafts: dict[SessionId, Draft] = {}
        self._in_step: frozenset[SessionId] = frozenset()
        self._step_began_s = 0.0
        self._asked = trio.Event()
        self._waited_for = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Guess until cancelled, or until the engine's worker is gone: then EngineCrashed passes."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._wait_for_crash)
                nursery.start_soon(self._keep_patience)
                task_status.started()
                try:
                    await self._work()
                finally:
                    self._nursery = None
        finally:
            for draft in tuple(self._drafts.values()):
                draft.lose()
            self._drafts.clear()

    async def open(
        self, session: SessionId, positions: int, vocabulary_size: int, prefix: Prefix | None
    ) -> "Draft | None":
        """Return what guesses for a session of so many positions; None where there is no room for it.

        `vocabulary_size`: of the model that is guessed for; two that share a tokenizer may be padded differently.
        """
        info = self._engine.info
        positions = min(positions, info.max_positions)
        options = SessionOptions(sampling=Sampling(max_tokens=positions), variant=self._variant)
        try:
            await self._engine.open(session, positions, prefix)
            held = await self._engine.begin(session, options)
        except EngineError as error:
            _logger.info("no guesses for a session", session=session, why=str(error))
            return None
        except trio.Cancelled:
            self._start_closing(session)
            raise
        sizes = info.vocabulary_size, vocabulary_size
        draft = self._drafts[session] = Draft(session, self, held=held, positions=positions, vocabulary_sizes=sizes)
        return draft

    @property
    def is_late(self) -> bool:
        """Whether the step under way has taken longer than anybody waits for."""
        return bool(self._in_step) and trio.current_time() > self._step_began_s + PATIENCE_S

    def wake(self) -> None:
        """Look again who has something to be computed, and who waits."""
        self._asked.set()
        self._waited_for.set()

    def release(self, session: SessionId) -> None:
        """Forget a session, and free what the engine holds of it, once it is in no step."""
        if self._drafts.pop(session, None) is not None and session not in self._in_step:
            self._start_closing(session)

    def _start_closing(self, session: SessionId) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._close, session)

    async def _close(self, session: SessionId) -> None:
        try:
            await self._engine.close(session)
        except EngineError as error:
            _logger.debug("engine gone before a session was closed", session=session, error=str(error))

    async def _wait_for_crash(self) -> None:
        raise EngineCrashed(await self._engine.wait_crashed())

    async def _keep_patience(self) -> None:
        """Let those go on who have waited for long enough: the engine may hang."""
        while True:
            deadlines_s = [draft.deadline_s for draft in self._drafts.values() if draft.waits]
            if not deadlines_s:
                self._waited_for = trio.Event()
                await self._waited_for.wait()
                continue
            await trio.sleep_until(min(deadlines_s))
            for draft in tuple(self._drafts.values()):
                draft.expire()

    async def _work(self) -> None:
        while True:
            slices = list(self._next_slices())[:MAX_SLICES]
            if slices:
                await self._step(slices)
            else:
                self._asked = trio.Event()
                await self._asked.wait()

    def _next_slices(self) -> Iterator[SliceInput]:
        """Yield rows for the next step: of those who wait, then of texts to be read, which they wait for, too."""
        waiting = [draft for draft in self._drafts.values() if draft.waits]
        for draft in waiting:
            if rows := draft.next_rows(MAX_BEHIND + 1):
                yield rows
        room = MIN_STEP_ROWS if waiting else STEP_ROWS
        for draft in self._drafts.values():
            if room > 0 and not draft.waits and (rows := draft.next_rows(room)):
                room -= rows.tensor.rows
                yield rows

    async def _step(self, slices: Sequence[SliceInput]) -> None:
        self._in_step = frozenset(rows.session for rows in slices)
        self._step_began_s = trio.current_time()
        try:
            result = await self._engine.step(slices)
        except EngineError as error:
            _logger.info("guesses lost", why=str(error))
            for rows in slices:
                if draft := self._drafts.pop(rows.session, None):
                    draft.lose()
        else:
            outputs = {output.session: output.tensor for output in result.outputs}
            for rows in slices:
                if draft := self._drafts.get(rows.session):
                    if rows.session in outputs:
                        draft.computed(rows, tokens_from_tensor(outputs[rows.session]) if rows.draws else ())
                    else:
                        del self._drafts[rows.session]
                        draft.lose()
        finally:
            for session in self._in_step - self._drafts.keys():
                self._start_closing(session)
            self._in_step = frozenset()


class Draft:
    """The guesses for one session. Implements `node.stages.speculation.Drafter`."""

    def __init__(
        self, session: SessionId, model: DraftModel, *, held: int, positions: int, vocabulary_sizes: tuple[int, int]
    ) -> None:
        self._session = session
        self._model = model
        self._positions = positions
        self._readable, self._sayable = vocabulary_sizes
        """Token ids below these mean something to the draft model, and to the model that it guesses for."""
        self._tokens: list[int] = []
        self._guesses: list[int] = []
        """That were made behind the tokens so far."""
        self._held = held
        """Rows that the engine holds and that follow from the tokens and guesses."""
        self._wanted = 0
        self._then: Callable[[Sequence[int]], None] | None = None
        self._has_begun = False
        self._lost = False
        self.deadline_s = 0.0
        """When whoever waits goes on with the guesses that are there."""

    @property
    def waits(self) -> bool:
        """Whether somebody waits for guesses."""
        return self._then is not None

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that have come; see Drafter."""
        if self._guesses:
            right = 0
            for guess, token in zip(self._guesses, tokens, strict=False):
                if guess != token:
                    break
                right += 1
            self._held = min(self._held, len(self._tokens) + right)
            self._guesses = []
        self._tokens.extend(tokens)
        if len(self._tokens) > self._positions or not all(0 <= token < self._readable for token in tokens):
            self.close()
            self.lose()
        self._model.wake()

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        """Guess once the text is read, but not before its first token, which is not to wait; see Drafter."""
        self._wanted = min(count, self._positions - len(self._tokens))
        is_behind = len(self._tokens) - self._held > MAX_BEHIND
        if self._lost or not self._has_begun or is_behind or self._wanted < 1 or self._model.is_late:
            self._has_begun = True
            then(())
            return
        self._then, self.deadline_s = then, trio.current_time() + PATIENCE_S
        self._model.wake()

    def close(self) -> None:
        """Guess no more; see Drafter."""
        self._then = None
        self._model.release(self._session)

    def lose(self) -> None:
        """Guess no more, and let who waits go on without."""
        self._lost = True
        self._answer(())

    def expire(self) -> None:
        """Let who has waited for long enough go on with the guesses that are there."""
        if self.waits and trio.current_time() >= self.deadline_s:
            self._answer(tuple(self._guesses))

    def next_rows(self, most: int) -> SliceInput | None:
        """Return what is to be computed next, at most so many rows; None where nothing is.

        The text's last token waits until a guess is wanted: it takes its row's logits.
        """
        length = len(self._tokens) + len(self._guesses)
        start = min(self._held, length - 1) if self.waits else self._held
        end = min(length if self.waits else length - 1, start + most)
        if start >= end:
            return None
        rows = self._text(start, end)
        draws = 1 if end == length else 0
        return SliceInput(session=self._session, position=start, tensor=tensor_from_tokens(rows), draws=draws)

    def computed(self, rows: SliceInput, drawn: Sequence[int]) -> None:
        """Take note of rows that are computed, and of the token that was drawn behind the last, if one was.

        Whoever did not wait for them may have brought other tokens meanwhile: what follows from them counts no more.
        """
        end = rows.position + rows.tensor.rows
        known = self._text(rows.position, end)
        same = 0
        for row, token in zip(tokens_from_tensor(rows.tensor), known, strict=False):
            if row != token:
                break
            same += 1
        self._held = rows.position + same
        if same < rows.tensor.rows or end < len(self._tokens) + len(self._guesses):
            return
        unsayable = any(token >= self._sayable for token in drawn)
        if not unsayable:
            self._guesses.extend(drawn)
        if self.waits and (unsayable or len(self._guesses) >= self._wanted):
            self._answer(tuple(self._guesses))

    def _text(self, start: int, end: int) -> list[int]:
        """Return tokens and, behind them, guesses."""
        known = len(self._tokens)
        return [*self._tokens[start:end], *self._guesses[max(0, start - known) : max(0, end - known)]]

    def _answer(self, guesses: Sequence[int]) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(guesses)
