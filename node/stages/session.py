"""One job's session on one span of this node: its state, and the rows that arrive for it.

Rows are checked before they are queued for the engine, where they share a step with those of others: shape and number
when the step's header arrives, so that nothing is buffered that will not be taken, and values when they are complete.
Rows that fail cost the session. Its opener is told who sent them, and is charged, as it decides what a stage sends
where; for values that no honest stage sends their sender is, and for foreign token ids only an opener that sent them.
"""

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import trio

from node.engine.activation_codec import check_tensor, check_tokens
from node.engine.base import Engine
from node.engine.interface import BadRows, Prefix, SessionOptions, SliceInput, SpanInfo, variant_of
from node.engine.kv_allocator import HIDDEN_DTYPES
from node.links.base_link import LinkBroken
from node.links.inbound_link import InboundLink
from node.stages.local_id import local_id
from node.stages.outbox import Outbox, Output, StepLoop, max_rows
from node.stages.peer_penalties import Charge
from node.stages.replay_buffer import ReplayBuffer, ReplayMemory, ResumableState
from node.stages.scheduler import Work
from node.stages.session_report import SessionPhases
from node.stages.speculation import Drafter, DraftTracker
from node.stages.step_timings import StepTimings, step_timing
from node.stages.voter import Agreement
from protocol.identity import PeerId, SessionId
from protocol.messages import Begin, FailureReason, FinishReason, Open, Slice, Step
from protocol.reports import Progress, Timings
from protocol.tensors import DType, Tensor, drawn_tokens, tensor_from_tokens, tokens_from_tensor
from selector.task import Method

CHECKED_AT_ONCE_BYTES = 2 << 20
"""Rows of more bytes than this are checked piece by piece, while the event loop goes on."""


class SpanPort(StepLoop, Protocol):
    """What a session asks of the span that runs it."""

    replay_memory: ReplayMemory

    @property
    def info(self) -> SpanInfo:
        """What the engine holds."""

    def fail(self, session: "StageSession", reason: FailureReason, message: str, blamed: PeerId | None = None) -> None:
        """Report to the coordinator that the session is lost here, and free it."""

    def reject(self, session: "StageSession", sender: InboundLink, fault: str, charged: Charge = Charge.OPENER) -> None:
        """Fail a session because of invalid rows, and charge a peer with them."""


class StageSession:
    """A session; takes the rows that arrive for it, once it has begun. Implements `RowReceiver` and `OutboxOwner`."""

    def __init__(self, request: Open, span: SpanPort, opened_by: InboundLink, description_bytes: int = 0) -> None:
        self.id, self.wire_id = local_id(request.session, opened_by.peer), request.session
        self.following = SessionId(self.wire_id.job, self.wire_id.stage + 1)
        self.request = request
        self.info = span.info.part(request.blocks)
        """Of the part of the span that it runs."""
        self.opened_by = opened_by
        self.description_bytes = description_bytes
        """Approximate size of the request."""
        # What is cached of a part of the span is of no use to sessions that run another.
        namespace = f"{opened_by.peer}/{request.blocks}"
        self.prefix = Prefix(namespace=namespace, hashes=request.prefix) if request.prefix else None
        self.admitted = trio.Event()
        """Set when the request is answered."""
        self.opened_s = 0.0
        """When it was opened, from which on it may begin."""
        self.phases = SessionPhases()
        """What was done for it."""
        self.cached_rows = 0
        """Positions that the engine held when it began."""
        self.votes: Mapping[str, float] = {}
        self.agreement: Agreement | None = None
        """What the swarm had agreed when it was opened."""
        self.method: Method | None = None
        """Once it has begun."""
        self.state = ResumableState(ReplayBuffer(span.replay_memory))
        self.outbox = Outbox(self, span)
        self.is_ended = False
        self.held_rows = 0
        """Rows that have arrived, or are arriving, and whose outputs have not all left."""
        self.known_tokens = 0
        """Where draws depend on the history: how many of its tokens the engine has, or is about to get."""
        self.active_s = trio.current_time()
        self._span = span
        self._stages = int(count) if isinstance(count := request.context.get("stage_count"), int | float) else 1
        self._sources: set[InboundLink] = set()
        self._permitted = {opened_by.peer, *request.upstream}
        self._history: array[int] | None = None
        """Tokens of the history that the engine is about to get."""
        self._drawn = 0
        self._received = 0
        """The position after the last row that arrived, drafts left out."""
        self._reached = 0
        """The position after the last row that was computed for this route, drafts left out."""
        self._queued = 0
        """The position after the last row that is queued or computed."""
        self._forward_from = 0
        """The first position whose output is sent on."""
        self._tracker: DraftTracker | None = None
        """Where the model's first block is run, once begun."""
        self._early: list[tuple[Slice, Tensor, InboundLink]] = []
        """Rows that arrived before Begin did, over another link."""
        self._unchecked: deque[tuple[Slice, Tensor, InboundLink]] = deque()
        """Rows that are being checked piece by piece, and what arrived behind them."""

    # Opening, beginning and ending

    @property
    def needs_history(self) -> bool:
        """Whether draws depend on the tokens so far."""
        return self.request.sampling is not None and self.request.sampling.needs_history

    def on_opened(self, votes: Mapping[str, float], agreement: Agreement | None, opened_s: float) -> None:
        """Record the vote that the answer carries, and when the session was opened."""
        self.votes, self.agreement, self.opened_s = votes, agreement, opened_s

    async def reserve(self, engine: Engine) -> None:
        """Reserve KV memory. Raises EngineFull, or EngineError."""
        self.state.reserved_positions = self.request.positions
        self.state.cached = await engine.open(self.id, self.request.positions, self.prefix)

    def take_over(self, former: "StageSession") -> None:
        """Go on with what a session of a former attempt holds."""
        self.state = former.state

    def add_history(self, tokens: Sequence[int]) -> str | None:
        """Append to the tokens so far, from position 0 on; return what is wrong with them, if anything is."""
        known = self.known_tokens + len(tokens)
        if not self.needs_history:
            return "history was sent, on which no draw depends"
        if known > self.request.positions:
            return f"history of {known} tokens was sent for {self.request.positions} positions"
        if max(tokens) >= self.info.vocabulary_size:
            return f"a token of the history is not below {self.info.vocabulary_size}"
        self._history = self._history or array("i")
        self._history.extend(tokens)
        self.known_tokens = known
        return None

    async def begin_on_engine(self, engine: Engine, method: Method) -> None:
        """Choose how the engine computes, unless that was chosen by a session that this one continues."""
        if self.state.method is None:
            options = SessionOptions(
                blocks=self.info.blocks,
                sampling=self.request.sampling,
                variant=variant_of(method),
                activations=method.activations,
                prefix_cache=method.prefix_cache,
            )
            self.state.computed = await engine.begin(self.id, options)
            self.state.reserved_positions = engine.held_positions(self.id)
            self.state.method = method
            self.state.replay.drop(self.state.computed)

    def begin(self, message: Begin, method: Method, drafter: Drafter | None) -> None:
        """Begin with a method: queue rows that arrived early, and replay outputs that the next stage lacks."""
        if self.info.is_first:
            self._tracker = DraftTracker(
                start=message.start, positions=self.request.positions, draft_tokens=method.draft_tokens, drafter=drafter
            )
        self.method = self.state.method = method
        self._forward_from = message.onward
        self._reached = self.cached_rows = message.start
        self._queued = self.state.computed
        early, self._early = self._early, []
        for part, tensor, link in early:
            if not self.is_ended:
                self._queue(part, tensor, link)
        if message.onward < message.start and self.request.sampling is None and not self.outbox.is_closed:
            rows = min(max_rows(4 * self.info.hidden_size), method.prefill_chunk or message.start)
            starts = range(message.onward, message.start, max(1, rows))
            ends = (*starts[1:], message.start)
            self.outbox.queue_steps(*(partial(self._replay_step, *piece) for piece in zip(starts, ends, strict=True)))

    def end(self) -> None:
        """Let go of everything but the engine's memory: from now on rows of the session are unknown here."""
        self.is_ended = True
        self._unchecked.clear()
        self.outbox.disconnect()
        if self._tracker is not None:
            self._tracker.close()
        for source in self._sources - {self.opened_by}:
            source.forget(self.wire_id)

    def progress(self) -> Progress:
        """Return how far the session has come: what has not left yet is in the outbox."""
        is_last = self.request.sampling is not None
        sent = min([self._reached + (is_last and self.state.counters.steps > 0), *self.outbox.unsent_positions])
        received = max(self._received, self._reached)
        return Progress(session=self.wire_id, received=received, computed=self._reached, sent=sent)

    # Rows that arrive

    def permits(self, peer: PeerId) -> bool:
        """Whether this peer is the coordinator or stands before us on the route."""
        return peer in self._permitted

    @property
    def held_bytes(self) -> int:
        """What its rows take, at most."""
        return self.held_rows * (4 if self.info.is_first else 4 * self.info.hidden_size)

    def admit(self, part: Slice, dtype: DType, width: tuple[int, ...], link: InboundLink) -> bool:
        """Return whether rows that are arriving are taken; if not, the session is lost."""
        self._sources.add(link)
        if fault := self._header_fault(part, dtype, width):
            self._span.reject(self, link, fault)
            return False
        if any(draft >= self.info.vocabulary_size for draft in part.drafts):
            self._span.reject(self, link, f"a draft is not below {self.info.vocabulary_size}", Charge.NOBODY)
            return False
        if self.held_rows + part.rows > (positions := self.request.positions):
            fault = f"{part.rows} rows beside {self.held_rows} that wait, where {positions} positions are reserved"
            self._span.reject(self, link, fault)
            if link.peer == self.opened_by.peer:  # else it may be the opener's doing that so many arrive
                link.overrun(fault)
            return False
        self.held_rows += part.rows
        return True

    def _header_fault(self, part: Slice, dtype: DType, width: tuple[int, ...]) -> str | None:
        """Return why rows cannot be taken, as far as their header shows."""
        info, positions = self.info, self.request.positions
        if info.is_first:
            if dtype is not DType.INT32 or part.drafts:
                return f"the first stage takes token ids without drafts, not {dtype}{list(width)}"
        elif dtype not in HIDDEN_DTYPES or width != (info.hidden_size,):
            return f"this stage takes hidden states of {info.hidden_size} elements, not {dtype}{list(width)}"
        if part.position + part.rows > positions:
            return f"rows up to position {part.position + part.rows} of {positions}"
        if part.draws > len(part.drafts) + 1:
            return f"{part.draws} tokens to draw after {len(part.drafts)} drafts"
        return None

    def receive(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        """Take rows that were admitted."""
        self.active_s = trio.current_time()
        self.state.counters.bytes_in += len(tensor.data)
        self._received = max(self._received, part.position + part.rows - len(part.drafts))
        if self._unchecked or len(tensor.data) > CHECKED_AT_ONCE_BYTES:
            self._unchecked.append((part, tensor, link))
            if len(self._unchecked) == 1:
                self._span.start_soon(self._check_large)
        elif self._is_valid(tensor, link):
            self._accept(part, tensor, link)

    async def _check_large(self) -> None:
        """Check rows piece by piece, and take them in the order of arrival."""
        while self._unchecked:
            part, tensor, link = self._unchecked[0]
            rows = max(1, CHECKED_AT_ONCE_BYTES // tensor.row_bytes)
            for start in range(0, tensor.rows, rows):
                if not self._is_valid(tensor.cut(start, min(start + rows, tensor.rows)), link):
                    return
                await trio.lowlevel.checkpoint()
                if not self._unchecked:  # the session has ended
                    return
            self._unchecked.popleft()
            self._accept(part, tensor, link)

    def _is_valid(self, tensor: Tensor, link: InboundLink) -> bool:
        """Return whether rows can be computed with; if not, the session is lost."""
        try:
            if self.info.is_first:
                check_tokens(tensor, self.info.vocabulary_size)
            else:
                check_tensor(tensor)
        except BadRows as fault:
            self._span.reject(self, link, str(fault), Charge.NOBODY if self.info.is_first else Charge.SENDER)
            return False
        return True

    def _accept(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        if self.needs_history and part.draws and part.position + part.rows - part.draws + 1 > self.known_tokens:
            why = f"draws depend on the history, of which {self.known_tokens} tokens are known"
            self._span.fail(self, FailureReason.ENGINE, why)
        elif self.method is None:
            self._early.append((part, tensor, link))
        else:
            self._queue(part, tensor, link)

    def _queue(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        now_s = trio.current_time()
        work = Work(
            part=replace(part, session=self.id),
            tensor=tensor,
            coordinator=self.opened_by.peer,
            origin=link,
            payload_bytes=len(tensor.data),
            arrived_s=now_s,
            received_s=now_s,
            held_rows=part.rows,
            is_scored=self._scored_rows(part) > 0,
            is_background=self.request.background,
            stages=self._stages,
        )
        if self._tracker is not None:
            self._queue_with_drafts(self._tracker, work)
        elif part.position > self._queued:
            self._span.reject(
                self, link, f"rows from position {part.position} on do not follow the {self._queued} before"
            )
        else:
            self._queued = part.position + part.rows
            self._span.scheduler.add(work)

    def _queue_with_drafts(self, tracker: DraftTracker, work: Work[InboundLink]) -> None:
        """Queue the rows of tokens that are not computed yet, with drafts behind the last where it is to be drawn."""

        def queue(position: int, rows: list[int], drafts: Sequence[int]) -> None:
            if not rows:
                self.return_credit(work)
            elif not self.is_ended:
                computed = [*rows, *drafts]
                draws = work.part.draws + len(drafts)
                part = replace(work.part, position=position, rows=len(computed), draws=draws, drafts=tuple(drafts))
                tensor, now_s = tensor_from_tokens(computed), trio.current_time()
                self._span.scheduler.add(replace(work, part=part, tensor=tensor, arrived_s=now_s))

        try:
            tracker.feed(work.part.position, tokens_from_tensor(work.tensor), work.part.draws, queue)
        except ValueError as error:
            self._span.reject(self, work.origin, str(error))

    # Rows that are computed

    def slice_input(self, work: Work[InboundLink]) -> SliceInput:
        """Return rows for the engine, with the history that it has not got yet."""
        history: Sequence[int] | None = None
        if work.part.draws or self._scored_rows(work.part):
            history, self._history = self._history, None
        return SliceInput(
            session=self.id,
            position=work.part.position,
            tensor=work.tensor,
            draws=work.part.draws,
            drafts=work.part.drafts if self.info.is_last else (),
            history=history,
        )

    def on_computed(self, work: Work[InboundLink], compute_s: float, queue_s: float) -> None:
        """Count rows that were computed. `compute_s`: their share of the step, for which they waited `queue_s`."""
        state, counters = self.state, self.state.counters
        self.active_s = now_s = trio.current_time()
        phase = self.phases.prefill if work.is_prefill else self.phases.decode
        phase.add(work.rows, compute_s, queue_s, work.arrived_s, now_s)
        counters.queue_s += queue_s
        counters.steps += 1
        counters.rows += work.rows
        counters.compute_s += compute_s
        state.computed = work.part.position + work.rows
        self._reached = max(self._reached, state.computed - len(work.part.drafts))

    def on_sent(self, work: Work[InboundLink], began_s: float, compute_s: float, now_s: float) -> None:
        """Record where the time of a step went whose outputs were handed to the links, if the job is traced."""
        if self.state.timings is not None:
            self.state.timings.add(step_timing(work, began_s, compute_s, now_s))

    def collect_timings(self) -> Timings:
        """Return the timing of the steps since the last call, and record that of further ones."""
        self.state.timings = self.state.timings or StepTimings()
        return self.state.timings.collect(self.wire_id, trio.current_time())

    def outputs_of(self, part: Slice, output: Tensor) -> list[Output]:
        """Return what a slice's output makes to be sent: rows for the next stage, or tokens for the next round."""
        following = self.following
        if self.request.sampling is None:
            self.state.replay.write(part.position, output)
            known = min(part.rows, max(0, self._forward_from - part.position))
            if known == part.rows:
                return []
            forward = replace(part, session=following, position=part.position + known, rows=part.rows - known)
            return self._outputs((forward, output.cut(known, part.rows)))
        sampling, scored = self.request.sampling, self._scored_rows(part)
        position = part.position + part.rows - part.draws + 1
        if sampling.pooling is not None and part.draws:
            return self._outputs((Slice(session=following, position=position, rows=1, draws=0), output))
        tokens, finish = self.accept_tokens(drawn_tokens(output.cut(scored, output.rows))) if part.draws else ([], None)
        if tokens:
            self.known_tokens = position + len(tokens)
        count = scored + len(tokens)
        if not count:
            return []
        first = part.position + 1 if scored else position  # nothing is between what is scored and what is drawn
        sent = Slice(session=following, position=first, rows=count, draws=0, finish_reason=finish)
        reported = output.cut(0, count)  # with log probabilities, where the coordinator wants them
        if finish is not None or not tokens:
            return self._outputs((sent, reported))
        fed_back = replace(sent, session=SessionId(following.job, 0), position=position, rows=len(tokens), draws=1)
        return self._outputs((sent, reported), (fed_back, tensor_from_tokens(tokens)))

    def _scored_rows(self, part: Slice) -> int:
        """Return behind how many of a slice's rows the engine scores a token of the prompt."""
        sampling = self.request.sampling
        return 0 if sampling is None else sampling.scored_rows(part.position, part.rows)

    def _outputs(self, *rows: tuple[Slice, Tensor]) -> list[Output]:
        if self.outbox.is_closed:
            return []
        self.state.counters.bytes_out += sum(len(tensor.data) for _, tensor in rows)
        return [Output(self.outbox, part, tensor) for part, tensor in rows]

    def accept_tokens(self, drawn: list[int]) -> tuple[list[int], FinishReason | None]:
        """Count the tokens that were drawn; return those that belong to the text, and why it ends with them, if so."""
        sampling = self.request.sampling
        if sampling is None:
            raise AssertionError("tokens are drawn on a last span")
        for count, token in enumerate(drawn, 1):
            self._drawn += 1
            if token in sampling.stop_tokens:
                return drawn[:count], FinishReason.STOP
            if self._drawn >= sampling.max_tokens:
                return drawn[:count], FinishReason.LENGTH
        return drawn, None

    def _replay_step(self, start: int, end: int) -> Step:
        """Return outputs of the replay buffer. Raises ValueError when they are not retained any more."""
        tensor = self.state.replay.read(start, end)
        self.state.counters.bytes_out += len(tensor.data)
        return Step(slices=(Slice(session=self.following, position=start, rows=tensor.rows, draws=0),), tensor=tensor)

    # For the outbox

    def return_credit(self, work: Work[InboundLink]) -> None:
        """Return credit for rows that take no memory any more."""
        self.held_rows -= work.held_rows
        if work.payload_bytes:
            work.origin.consumed(self.wire_id, work.payload_bytes)

    def on_send_failed(self, error: Exception) -> None:
        """Keep the session without sending until its coordinator has found another route; or give it up."""
        if not isinstance(error, LinkBroken):
            self._span.fail(self, FailureReason.ENGINE, str(error))
        elif self.method is None:  # it has nothing yet that would be worth keeping
            self._span.fail(self, FailureReason.DOWNSTREAM, str(error), error.peer)
        elif not self.outbox.is_closed:
            self.outbox.close()
            self.opened_by.reroute(self.wire_id, FailureReason.DOWNSTREAM, str(error), error.peer)
