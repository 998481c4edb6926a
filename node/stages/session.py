"""One job's session on one span of this node: what is known of it, and the rows that arrive for it.

Rows are checked before they get in line for the engine, where they share a step with those of others: their shape and
number when the step's header comes, so that nothing is held that will not be taken, and their values when they are
there. Rows that do not pass cost the session. Its opener is told who sent them, and pays, as it says what a stage sends
where; values that no honest stage sends cost their sender.
"""

from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from node.engine.activation_codec import check_tensor, check_tokens
from node.engine.interface import BadRows, KvCompatibilityKey, Prefix, SessionOptions, Variant
from node.engine.kv_allocator import HIDDEN_DTYPES
from node.links.inbound_link import InboundLink
from node.links.outbound_link import OutboundLink
from node.stages.replay_buffer import ReplayBuffer
from node.stages.scheduler import Work
from node.stages.speculation import Drafter, TokenFeed
from node.stages.voting import Agreement
from protocol.identity import PeerId, SessionId
from protocol.messages import Begin, FailureReason, FinishReason, Open, Progress, SessionStatistics, Slice, Step
from protocol.tensors import DType, Tensor, tensor_from_tokens, tokens_from_tensor
from selector.task import Method

if TYPE_CHECKING:
    from node.stages.span import Span

CHECKED_AT_ONCE_BYTES = 2 << 20
"""Rows of more bytes than this are checked piece by piece, while the event loop goes on."""


class StageSession:
    """A session; takes the rows that arrive for it, once it has begun."""

    def __init__(self, message: Open, span: "Span", opened_by: InboundLink, description_bytes: int = 0) -> None:
        self.id = message.session
        self.span = span
        self.info = span.info.part(message.blocks)
        """Of the part of the span that it runs."""
        self.opened_by = opened_by
        self.description_bytes = description_bytes
        """What is held of the message, about."""
        self.background = message.background
        self.methods = message.methods
        # What is cached of a part of the span is no use to sessions that run another.
        namespace = f"{opened_by.peer}/{message.blocks}"
        self.prefix = Prefix(namespace=namespace, hashes=message.prefix) if message.prefix else None
        self.votes: dict[str, float] = {}
        self.agreed: Agreement | None = None
        """What the swarm had agreed when it was opened."""
        self.method: Method | None = None
        """Once it has begun."""
        self.calculated_by: Method | None = None
        """How the engine calculates it, since it or a session that it continues has begun."""
        self.cached: Mapping[KvCompatibilityKey, int] = {}
        self.computed = 0
        """Positions that the engine holds, and whose outputs were handed on."""
        self.reached = 0
        """The position after the last row that is computed for this route, guesses left out."""
        self._received = 0
        """The position after the last row that came, guesses left out."""
        self.forward_from = 0
        """The first position whose output goes on."""
        self.kept = ReplayBuffer(span.replay_memory)
        self.cut_off = False
        """Its outputs cannot be sent on; it waits until it is continued on another route."""
        self.sampling = message.sampling
        self.needs_history = message.sampling is not None and message.sampling.needs_history
        self.known = 0
        """Where draws depend on the tokens so far: how many of them the engine knows, or is about to be told."""
        self._history: array[int] | None = None
        """Those that it is about to be told."""
        self.positions = message.positions
        self.drawn = 0
        self.steps = 0
        self.rows = 0
        self.compute_s = 0.0
        self.queue_s = 0.0
        self.bytes_in = 0
        self.bytes_out = 0
        self.ended = trio.Event()
        self.sources: set[InboundLink] = set()
        self.outputs: dict[SessionId, OutboundLink] = {}
        self.unwatch: list[Callable[[], None]] = []
        self.opened = trio.Event()
        self.reserved_positions = 0
        """KV memory that is reserved for it, or about to be; more than `positions` where it continues a larger one."""
        self.opened_s = 0.0
        """When it was opened, from which on it may begin."""
        self.backlog: deque[tuple[SessionId, Step]] = deque()
        self.again: tuple[int, int, int] | None = None
        """Kept outputs that the next stage lacks, which go before the backlog: positions from, to, and rows a step."""
        self.owed: list[Work[InboundLink]] = []
        """Rows whose outputs are in the backlog; credit for them is given once these have left."""
        self.held_rows = 0
        """Rows that have come, or are coming, and whose outputs have not all left."""
        self.ahead = 0
        """The position behind the last rows that are in line or computed."""
        self.active_s = trio.current_time()
        self.sending = trio.CancelScope()
        """Around the task that sends the backlog; it ends with the session."""
        self.feed: TokenFeed | None = None
        """Where the model's first block is run, once begun."""
        self.drafter: Drafter | None = None
        self._is_guessing = False
        """Rows wait for guesses; no others may come meanwhile, as nothing was drawn yet that they could follow."""
        self._permitted = {opened_by.peer, *message.upstream}
        self._early: list[tuple[Slice, Tensor, InboundLink]] = []
        """Rows that came before Begin did, over another link."""
        self._unchecked: deque[tuple[Slice, Tensor, InboundLink]] = deque()
        """Rows that are being checked piece by piece, and what came behind them."""

    def permits(self, peer: PeerId) -> bool:
        """Whether this peer is the coordinator or stands before us on the route."""
        return peer in self._permitted

    @property
    def held_bytes(self) -> int:
        """What its rows take, at most."""
        return self.held_rows * (4 if self.info.is_first else 4 * self.info.hidden_size)

    def admit(self, part: Slice, dtype: DType, width: tuple[int, ...], link: InboundLink) -> bool:
        """Say whether rows that are coming may come; if not, the session is lost."""
        self.sources.add(link)
        if fault := self._fault_of(part, dtype, width):
            self.span.reject(self, link, fault)
            return False
        if self.held_rows + part.rows > self.positions:
            fault = f"{part.rows} rows beside {self.held_rows} that wait, where {self.positions} positions are reserved"
            self.span.reject(self, link, fault)
            if link.peer == self.opened_by.peer:  # else it may be the opener's doing that so many come
                link.overrun(fault)
            return False
        self.held_rows += part.rows
        return True

    def _fault_of(self, part: Slice, dtype: DType, width: tuple[int, ...]) -> str | None:
        """Return why rows cannot be taken, as far as their header tells."""
        info = self.info
        if info.is_first:
            if dtype is not DType.INT32 or part.drafts:
                return f"the first stage takes token ids without drafts, not {dtype}{list(width)}"
        elif dtype not in HIDDEN_DTYPES or width != (info.hidden_size,):
            return f"this stage takes hidden states of {info.hidden_size} elements, not {dtype}{list(width)}"
        if part.position + part.rows > self.positions:
            return f"rows up to position {part.position + part.rows} of {self.positions}"
        if part.draws > len(part.drafts) + 1:
            return f"{part.draws} tokens to draw after {len(part.drafts)} drafts"
        if any(draft >= info.vocabulary_size for draft in part.drafts):
            return f"a draft is not below {info.vocabulary_size}"
        return None

    def receive(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        """Take rows that were admitted."""
        self.active_s = trio.current_time()
        self.bytes_in += len(tensor.data)
        self._received = max(self._received, part.position + part.rows - len(part.drafts))
        if self._unchecked or len(tensor.data) > CHECKED_AT_ONCE_BYTES:
            self._unchecked.append((part, tensor, link))
            if len(self._unchecked) == 1:
                self.span.start_checking(self)
        elif self._passes(tensor, link):
            self._take(part, tensor, link)

    async def check(self) -> None:
        """Check rows piece by piece, and take them in the order in which they came."""
        while self._unchecked and not self.ended.is_set():
            part, tensor, link = self._unchecked[0]
            rows = max(1, CHECKED_AT_ONCE_BYTES // tensor.row_bytes)
            for start in range(0, tensor.rows, rows):
                if self.ended.is_set() or not self._passes(tensor.cut(start, min(start + rows, tensor.rows)), link):
                    return
                await trio.lowlevel.checkpoint()
            if self.ended.is_set():
                return
            self._unchecked.popleft()
            self._take(part, tensor, link)

    def _passes(self, tensor: Tensor, link: InboundLink) -> bool:
        """Say whether the values of rows can be computed with; if not, the session is lost."""
        try:
            if self.info.is_first:
                check_tokens(tensor, self.info.vocabulary_size)
            else:
                check_tensor(tensor)
        except BadRows as fault:
            # Token ids may come of another model, with which the opener has linked this one up.
            self.span.reject(self, link, str(fault), by_sender=not self.info.is_first)
            return False
        return True

    def _take(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        if self.needs_history and part.draws and part.position + part.rows - part.draws + 1 > self.known:
            message = f"draws depend on the tokens so far, of which {self.known} are known"
            self.span.fail(self, FailureReason.ENGINE, message)
        elif self.method is None:
            self._early.append((part, tensor, link))
        else:
            self._queue(part, tensor, link)

    def tell_history(self, tokens: Sequence[int]) -> str | None:
        """Take the next of the tokens so far, from position 0 on; return what is wrong with them, if anything is."""
        if not self.needs_history:
            return "tokens so far were told, on which no draw depends"
        if self.known + len(tokens) > self.positions:
            return f"{self.known + len(tokens)} tokens so far were told of {self.positions} positions"
        if max(tokens) >= self.info.vocabulary_size:
            return f"a token so far is not below {self.info.vocabulary_size}"
        self._history = self._history or array("i")
        self._history.extend(tokens)
        self.known += len(tokens)
        return None

    def take_history(self) -> Sequence[int] | None:
        """Return the tokens so far that the engine has not been told."""
        history, self._history = self._history, None
        return history

    @property
    def replay_from(self) -> int:
        """The outputs from there to `computed` can be sent again."""
        return min(self.kept.start, self.computed) if self.kept.end >= self.computed else self.computed

    def take_over(self, former: "StageSession") -> None:
        """Go on with what a session of a former attempt holds."""
        self.calculated_by, self.cached, self.computed = former.calculated_by, former.cached, former.computed
        self.reserved_positions = former.reserved_positions
        self.kept = former.kept
        self.steps, self.rows, self.compute_s, self.queue_s = (
            former.steps,
            former.rows,
            former.compute_s,
            former.queue_s,
        )
        self.bytes_in, self.bytes_out = former.bytes_in, former.bytes_out

    def options(self, method: Method) -> SessionOptions:
        """Return how the engine is to compute with a method."""
        return SessionOptions(
            blocks=self.info.blocks,
            sampling=self.sampling,
            variant=Variant(method.engine, method.arithmetic),
            activations=method.activations,
            prefix_cache=method.prefix_cache,
        )

    def begin(self, message: Begin, method: Method, drafter: Drafter | None) -> None:
        """Begin with a method; rows that came early go into the line. `drafter`: guesses, on a first stage."""
        if self.info.is_first:
            draft_tokens = method.draft_tokens if drafter is not None else 0
            self.feed = TokenFeed(start=message.start, positions=self.positions, draft_tokens=draft_tokens)
            self.drafter = drafter
        self.method = self.calculated_by = method
        self.forward_from = message.onward
        self.reached = message.start
        self.ahead = self.computed
        early, self._early = self._early, []
        for part, tensor, link in early:
            if not self.ended.is_set():
                self._queue(part, tensor, link)

    def pay(self, work: Work[InboundLink]) -> None:
        """Give credit for rows that take no memory any more."""
        self.held_rows -= work.held_rows
        if work.payload_bytes:
            work.origin.consumed(self.id, work.payload_bytes)

    def told(self, drawn: list[int]) -> tuple[list[int], FinishReason | None]:
        """Count the tokens that were drawn; return those that belong to the text, and why it ends with them, if so."""
        if self.sampling is None:
            raise AssertionError("tokens are drawn on a last span")
        for count, token in enumerate(drawn, 1):
            self.drawn += 1
            if token in self.sampling.stop_tokens:
                return drawn[:count], FinishReason.STOP
            if self.drawn >= self.sampling.max_tokens:
                return drawn[:count], FinishReason.LENGTH
        return drawn, None

    def progress(self) -> Progress:
        """Return how far the session has come: what has not left yet is in the backlog."""
        unsent = [part.position for _, step in self.backlog for part in step.slices]
        sent = min([self.reached + (self.sampling is not None and self.steps > 0), *unsent])
        return Progress(session=self.id, received=max(self._received, self.reached), computed=self.reached, sent=sent)

    def statistics(self) -> SessionStatistics:
        """Return what the session cost so far."""
        return SessionStatistics(
            steps=self.steps,
            rows=self.rows,
            compute_s=self.compute_s,
            queue_s=self.queue_s,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
        )

    def _queue(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        work = Work(
            part=replace(part, session=self.id),
            tensor=tensor,
            coordinator=self.opened_by.peer,
            origin=link,
            payload_bytes=len(tensor.data),
            arrived_s=trio.current_time(),
            held_rows=part.rows,
        )
        if self.feed is not None:
            self._feed(self.feed, work)
        elif part.position > self.ahead:
            fault = f"rows from position {part.position} on do not follow the {self.ahead} before"
            self.span.reject(self, link, fault)
        else:
            self.ahead = part.position + part.rows
            self.span.queue(work)

    def _feed(self, feed: TokenFeed, work: Work[InboundLink]) -> None:
        """Queue the rows of tokens that are not computed yet, with guesses behind the last where it is to be drawn."""
        tokens = tokens_from_tensor(work.tensor)
        if self._is_guessing:
            self.span.reject(self, work.origin, "rows came where a token was to be drawn first")
            return
        try:
            position, rows = feed.take(work.part.position, tokens, work.part.draws)
        except ValueError as error:
            self.span.reject(self, work.origin, str(error))
            return
        if not rows:
            self.pay(work)

        def queue(drafts: Sequence[int]) -> None:
            self._is_guessing = False
            if rows and not self.ended.is_set():
                feed.guess(drafts)
                draws = work.part.draws + len(drafts)
                computed = [*rows, *drafts]
                part = replace(work.part, position=position, rows=len(computed), draws=draws, drafts=tuple(drafts))
                tensor, now_s = tensor_from_tokens(computed), trio.current_time()
                self.span.queue(replace(work, part=part, tensor=tensor, arrived_s=now_s))

        if self.drafter is not None:
            self.drafter.extend(tokens)
            if work.part.draws == 1 and feed.wanted:
                self._is_guessing = True
                self.drafter.draft(feed.wanted, queue)
                return
        queue(())
