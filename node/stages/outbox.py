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
from node.stages.scheduler import Work
from protocol.errors import LocalProtocolError
from protocol.identity import PeerId, SessionId
from protocol.limits import MAX_DRAFTS, MAX_SLICES, MAX_STEP_BYTES
from protocol.messages import Slice, Step
from protocol.tensors import Tensor, join

OUTGOING_ROWS: Final = 512
OUTGOING_BYTES: Final = 2 << 20
"""Outputs leave in steps of at most so many rows, or as many as take so many bytes if these are more."""


class OutboxOwner(Protocol):
    """What an outbox asks of its session."""

    def pause(self) -> None:
        """Compute no rows until `resume`."""
        ...

    def resume(self) -> None:
        """Compute rows again."""
        ...

    def return_credit(self, work: Work[InboundLink]) -> None:
        """Return credit for rows whose outputs have left."""
        ...

    def on_route_broken(self, message: str, blamed: PeerId) -> None:
        """Ask for another route: the next stage cannot be reached."""
        ...

    def fail(self, message: str) -> None:
        """Give the session up: its outputs cannot be sent."""
        ...

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run a task beside the step loop."""
        ...


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


@dataclass(frozen=True, slots=True)
class _Replay:
    """Outputs in the replay buffer that the next stage lacks: positions `start` to `end`, `rows` in each step."""

    read: Callable[[int, int], Step]
    start: int
    end: int
    rows: int


class Outbox:
    """Links to the receivers of one session's outputs, and the outputs that have not left yet."""

    def __init__(self, owner: OutboxOwner) -> None:
        self.owner = owner
        self.is_closed = False
        """Nothing is sent any more: the session has ended, or its route is broken."""
        self._links: dict[SessionId, OutboundLink] = {}
        self._unwatch: list[Callable[[], None]] = []
        self._replay: _Replay | None = None
        """Sent before the backlog."""
        self._backlog: deque[Step] = deque()
        self._pending_credit: list[Work[InboundLink]] = []
        """Rows whose outputs are in the backlog."""
        self._sending = trio.CancelScope()

    @property
    def is_busy(self) -> bool:
        """Whether outputs are queued, behind which further ones have to wait."""
        return bool(self._backlog or self._replay)

    @property
    def unsent_positions(self) -> list[int]:
        """The first positions of the outputs that are queued."""
        return [part.position for step in self._backlog for part in step.slices]

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
        self._replay = None

    def link_of(self, output: Output) -> OutboundLink:
        """Return the link that an output leaves by."""
        return self._links[output.part.session]

    def replay(self, read: Callable[[int, int], Step], start: int, end: int, rows: int) -> None:
        """Send retained outputs again, `rows` at a time. `read` raises ValueError when they are not retained."""
        self._replay = _Replay(read, start, end, rows)
        self._start_sending()

    def queue(self, output: Output) -> None:
        """Keep the order, and send when link and credit allow it; a copy, as a batch's outputs share memory."""
        was_busy = self.is_busy
        tensor = replace(output.tensor, data=bytes(output.tensor.data))
        self._backlog.append(Step(slices=(output.part,), tensor=tensor))
        if not was_busy:
            self._start_sending()

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
        self.owner.on_route_broken(lost.message, lost.blamed)

    def _start_sending(self) -> None:
        self.owner.pause()
        self._sending = trio.CancelScope()
        self.owner.start_soon(self._send_queued)

    async def _send_queued(self) -> None:
        try:
            with self._sending:
                await self._send_replay()
                while self._backlog:
                    await self._send(self._backlog[0])
                    if self._backlog:  # else closed meanwhile
                        self._backlog.popleft()
                if not self.is_closed:
                    self._return_credit()
                    self.owner.resume()
        except LinkBroken as broken:
            self.owner.on_route_broken(str(broken), broken.peer)
        except (LocalProtocolError, ValueError) as error:
            self.owner.fail(str(error))

    async def _send_replay(self) -> None:
        while (replay := self._replay) is not None:
            end = min(replay.end, replay.start + replay.rows)
            await self._send(replay.read(replay.start, end))
            if self._replay is not None:  # else closed meanwhile
                self._replay = replace(replay, start=end) if end < replay.end else None

    async def _send(self, step: Step) -> None:
        await self._links[step.slices[0].session].send_step(step)


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
        before = replace(part, position=part.position + start, rows=most, draws=0, drafts=())
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
    except LinkBroken as broken:
        for output in frame:
            output.outbox.owner.on_route_broken(str(broken), broken.peer)
    except LocalProtocolError as error:  # a session's input made its output invalid
        if len(frame) == 1:
            frame[0].outbox.owner.fail(str(error))
        else:
            for output in frame:  # one of them is at fault, the others are not to suffer
                _send_frame(link, [output])
    else:
        if not sent:
            for output in frame:
                output.outbox.queue(output)
