"""Outbox of a session: outputs on their way to the next stage, sent at once or queued until link and credit allow it.

The outputs of a batch that go to the same peer leave in one frame. While a session has queued outputs, none of its rows
are computed, and no credit is returned for those that were: so a slow next stage slows the one before, too.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import trio

from node.links.base_link import LinkBroken
from node.links.inbound_link import InboundLink
from node.links.outbound_link import OutboundLink, SessionLost
from node.stages.scheduler import Scheduler, Work
from protocol.errors import LocalProtocolError
from protocol.identity import SessionId
from protocol.limits import MAX_DRAFTS, MAX_SLICES, MAX_STEP_BYTES
from protocol.messages import Slice, Step
from protocol.tensors import Tensor, join

OUTGOING_ROWS: Final = 512
OUTGOING_BYTES: Final = 2 << 20
"""Limit of the rows in one step of outputs: the larger of the two."""


class StepLoop(Protocol):
    """The step loop of a span, as its sessions use it."""

    scheduler: Scheduler[InboundLink]

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run a task beside the loop."""


class OutboxOwner(Protocol):
    """What an outbox asks of its session."""

    @property
    def id(self) -> SessionId:
        """The session here."""

    def return_credit(self, work: Work[InboundLink]) -> None:
        """Return credit for rows whose outputs have left."""

    def on_send_failed(self, error: Exception) -> None:
        """Ask for another route after LinkBroken; after any other error give the session up."""


@dataclass(frozen=True, slots=True)
class Output:
    """Rows of one session that are to be sent; `part.session` is the session's id at the receiver."""

    outbox: "Outbox"
    part: Slice
    tensor: Tensor

    @property
    def size(self) -> int:
        """The bytes of the rows."""
        return len(self.tensor.data)


class Outbox:
    """Links to the receivers of one session's outputs, and the outputs that have not left yet."""

    def __init__(self, owner: OutboxOwner, loop: StepLoop) -> None:
        self.owner = owner
        self.is_closed = False
        """Nothing is sent any more: the session has ended, or its route is broken."""
        self._loop = loop
        self._links: dict[SessionId, OutboundLink] = {}
        self._unwatch: list[Callable[[], None]] = []
        self._backlog: deque[Step | Callable[[], Step]] = deque()
        """Steps, and functions that read them from the replay buffer when their turn comes."""
        self._pending_credit: list[Work[InboundLink]] = []
        """Rows whose outputs are in the backlog."""
        self._sending = trio.CancelScope()

    @property
    def is_busy(self) -> bool:
        """Whether outputs are queued, behind which further ones have to wait."""
        return bool(self._backlog)

    @property
    def unsent_positions(self) -> list[int]:
        """The first positions of the outputs that are queued."""
        return [part.position for step in self._backlog if isinstance(step, Step) for part in step.slices]

    def connect(self, receiver: SessionId, link: OutboundLink) -> None:
        """Send outputs for a receiver over a link from now on. Raises LinkBroken when it is gone."""
        self._links[receiver] = link
        self._unwatch.append(link.watch(receiver, self._on_lost))

    def disconnect(self) -> None:
        """Close the outbox of a session that has ended, and let go of its links."""
        self.close()
        self._pending_credit.clear()
        for unwatch in self._unwatch:
            unwatch()
        for receiver, link in self._links.items():
            link.forget(receiver)

    def close(self) -> None:
        """Send nothing any more."""
        self.is_closed = True
        self._sending.cancel()
        self._backlog.clear()

    def link_of(self, output: Output) -> OutboundLink:
        """Return the link that an output leaves by."""
        return self._links[output.part.session]

    def queue(self, output: Output) -> None:
        """Keep the order, and send when link and credit allow it; a copy, as a batch's outputs share memory."""
        tensor = replace(output.tensor, data=bytes(output.tensor.data))
        self.queue_steps(Step(slices=(output.part,), tensor=tensor))

    def queue_steps(self, *steps: Step | Callable[[], Step]) -> None:
        """Send steps in order; a function reads retained outputs, or raises ValueError where they are not any more."""
        was_busy = self.is_busy
        self._backlog.extend(steps)
        if self._backlog and not was_busy:
            self._loop.scheduler.hold(self.owner.id)
            self._sending = trio.CancelScope()
            self._loop.start_soon(self._send_backlog)

    def on_computed(self, work: Work[InboundLink]) -> None:
        """Return credit for rows that were computed, once their outputs have left."""
        self._pending_credit.append(work)
        if not self._backlog:
            self._return_credit()

    def _return_credit(self) -> None:
        for work in self._pending_credit:
            self.owner.return_credit(work)
        self._pending_credit.clear()

    def _on_lost(self, lost: SessionLost) -> None:
        self.owner.on_send_failed(LinkBroken(lost.blamed, lost.message))

    async def _send_backlog(self) -> None:
        try:
            with self._sending:
                while self._backlog:
                    step = self._backlog[0]
                    step = step if isinstance(step, Step) else step()
                    await self._links[step.slices[0].session].send_step(step)
                    if self._backlog:  # else closed meanwhile
                        self._backlog.popleft()
                if not self.is_closed:
                    self._return_credit()
                    self._loop.scheduler.release(self.owner.id)
        except (LinkBroken, LocalProtocolError, ValueError) as error:
            self.owner.on_send_failed(error)


def max_rows(row_bytes: int) -> int:
    """Return how many rows leave in one step at most."""
    return min(max(OUTGOING_ROWS, OUTGOING_BYTES // row_bytes), max(1, MAX_STEP_BYTES // row_bytes - MAX_DRAFTS))


def send_outputs(outputs: Iterable[Output]) -> None:
    """Send the outputs of a batch: in one frame for each peer, except for sessions that have to wait for credit."""
    groups: dict[tuple[OutboundLink, str, tuple[int, ...]], list[Output]] = {}
    for output in outputs:
        outbox = output.outbox
        if outbox.is_closed:
            continue
        link = outbox.link_of(output)
        if output.tensor.rows > max_rows(output.tensor.row_bytes):
            for piece in _cut(output):
                outbox.queue(piece)
        elif outbox.is_busy or not link.has_credit(output.part.session, output.size):
            outbox.queue(output)
        else:
            groups.setdefault((link, output.tensor.dtype, output.tensor.shape[1:]), []).append(output)
    for (link, _, _), group in groups.items():
        for frame in _frames(group):
            _send_frame(link, frame)


def _cut(output: Output) -> Iterator[Output]:
    """Yield rows in steps' worth; the rows behind which tokens are drawn stay together in the last."""
    part, most = output.part, max_rows(output.tensor.row_bytes)
    last = (part.rows - max(1, part.draws)) // most * most
    for start in range(0, last, most):
        before = replace(part, position=part.position + start, rows=most, draws=0, drafts=(), finish_reason=None)
        yield replace(output, part=before, tensor=output.tensor.cut(start, start + most))
    behind = replace(part, position=part.position + last, rows=part.rows - last)
    yield replace(output, part=behind, tensor=output.tensor.cut(last, part.rows))


def _frames(group: Sequence[Output]) -> Iterator[list[Output]]:
    """Yield what fits into one step each: the slices and bytes of a step are bounded."""
    frame: list[Output] = []
    payload_bytes = 0
    for output in group:
        if frame and (len(frame) == MAX_SLICES or payload_bytes + output.size > MAX_STEP_BYTES):
            yield frame
            frame, payload_bytes = [], 0
        frame.append(output)
        payload_bytes += output.size
    yield frame


def _send_frame(link: OutboundLink, frame: Sequence[Output]) -> None:
    step = Step(slices=tuple(each.part for each in frame), tensor=join([each.tensor for each in frame]))
    try:
        sent = link.try_send_step(step)
    except (LinkBroken, LocalProtocolError) as error:
        if isinstance(error, LinkBroken) or len(frame) == 1:
            for output in frame:
                output.outbox.owner.on_send_failed(error)
        else:  # the input of one session made its output invalid; the others are not to suffer
            for output in frame:
                _send_frame(link, [output])
    else:
        if not sent:
            for output in frame:
                output.outbox.queue(output)
