"""A draft model guesses what a larger one will say [Leviathan, Kalman, Matias, ICML 2023].

It lies whole on the node that runs a job's first stage, in an engine of its own, so that guessing costs no round of the
route. Its guesses are greedy and only save time: it may be smaller, or computed in coarser numbers. Where it fails, or
has no room, or has not read the prompt yet, jobs go on without guesses.
"""

from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio

from node.engine.interface import Engine, EngineCrashed, EngineError, SessionOptions, SliceInput, Variant
from protocol.identity import SessionId
from protocol.limits import MAX_SLICES
from protocol.messages import Sampling
from protocol.tensors import tensor_from_tokens, tokens_from_tensor

MAX_ROWS: Final = 256
"""Of a text that are computed in one step, so that others wait no longer for their guesses."""

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
        self._asked = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Guess until cancelled, or until the engine's worker is gone: then EngineCrashed passes."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._wait_for_crash)
                task_status.started()
                try:
                    await self._work()
                finally:
                    self._nursery = None
        finally:
            for draft in tuple(self._drafts.values()):
                draft.lose()
            self._drafts.clear()

    async def open(self, session: SessionId, positions: int, vocabulary_size: int) -> "Draft | None":
        """Return what guesses for a session of so many positions; None where there is no room for it.

        `vocabulary_size`: of the model that is guessed for; two that share a tokenizer may be padded differently.
        """
        options = SessionOptions(sampling=Sampling(max_tokens=positions), variant=self._variant, prefix_cache=False)
        try:
            await self._engine.open(session, positions)
            await self._engine.begin(session, options)
        except EngineError as error:
            _logger.info("no guesses for a session", session=session, why=str(error))
            return None
        draft = self._drafts[session] = Draft(session, self, (self._engine.info.vocabulary_size, vocabulary_size))
        return draft

    def wake(self) -> None:
        """Look again who has something to be computed."""
        self._asked.set()

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

    async def _work(self) -> None:
        while True:
            slices = [rows for draft in self._drafts.values() if (rows := draft.next_rows()) is not None][:MAX_SLICES]
            if slices:
                await self._step(slices)
            else:
                self._asked = trio.Event()
                await self._asked.wait()

    async def _step(self, slices: Sequence[SliceInput]) -> None:
        self._in_step = frozenset(rows.session for rows in slices)
        try:
            result = await self._engine.step(slices)
        except EngineError as error:
            _logger.info("guesses lost", why=str(error))
            for rows in slices:
                if draft := self._drafts.pop(rows.session, None):
                    draft.lose()
        else:
            for rows, output in zip(slices, result.outputs, strict=True):
                if draft := self._drafts.get(rows.session):
                    draft.computed(rows, tokens_from_tensor(output.tensor) if rows.draws else ())
        finally:
            for session in self._in_step - self._drafts.keys():
                self._start_closing(session)
            self._in_step = frozenset()


class Draft:
    """The guesses for one session. Implements `node.jobs.speculation.Drafter`."""

    def __init__(self, session: SessionId, model: DraftModel, vocabulary_sizes: tuple[int, int]) -> None:
        self._session = session
        self._model = model
        self._readable, self._sayable = vocabulary_sizes
        """Token ids below these mean something to the draft model, and to the model that it guesses for."""
        self._tokens: list[int] = []
        self._guesses: list[int] = []
        """That were made behind the tokens so far."""
        self._held = 0
        """Rows that the engine holds and that follow from the tokens and guesses."""
        self._wanted = 0
        self._then: Callable[[Sequence[int]], None] | None = None
        self._lost = False

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that have come; see Drafter."""
        right = 0
        for guess, token in zip(self._guesses, tokens, strict=False):
            if guess != token:
                break
            right += 1
        self._held = min(self._held, len(self._tokens) + right)
        self._guesses = []
        self._tokens.extend(tokens)
        if any(token >= self._readable for token in tokens):
            self.close()
            self.lose()
        self._model.wake()

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        """Guess once the text is read; see Drafter."""
        if self._lost or len(self._tokens) - self._held > MAX_BEHIND:
            then(())
            return
        self._wanted, self._then = count, then
        self._model.wake()

    def close(self) -> None:
        """Guess no more; see Drafter."""
        self._then = None
        self._model.release(self._session)

    def lose(self) -> None:
        """Guess no more, and let who waits go on without."""
        self._lost = True
        self._answer(())

    def next_rows(self) -> SliceInput | None:
        """Return what is to be computed next; None where nothing is.

        The text's last token waits until a guess is wanted: it takes its row's logits.
        """
        text = [*self._tokens, *self._guesses]
        end = len(text) if self._then is not None else len(text) - 1
        start = min(self._held, len(text) - 1) if self._then is not None else self._held
        rows = text[start : min(end, start + MAX_ROWS)]
        if not rows:
            return None
        draws = 1 if start + len(rows) == len(text) else 0
        return SliceInput(session=self._session, position=start, tensor=tensor_from_tokens(rows), draws=draws)

    def computed(self, rows: SliceInput, drawn: Sequence[int]) -> None:
        """Take note of rows that are computed, and of the token that was drawn behind the last, if one was."""
        self._held = rows.position + rows.tensor.rows
        self._guesses.extend(drawn)
        unsayable = any(token >= self._sayable for token in drawn)
        if self._then is not None and (unsayable or len(self._guesses) >= self._wanted):
            self._answer(self._guesses[:-1] if unsayable else tuple(self._guesses))

    def _answer(self, guesses: Sequence[int]) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(guesses)
