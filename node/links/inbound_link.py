"""The responder's end of a job link: others open sessions here and send rows."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import trio

from node.links.base_link import PING_INTERVAL_S, SILENCE_LIMIT_S, WINDOW_BYTES, JobLink
from node.links.buffers import LinkBuffers
from node.network.interface import NetworkError, Stream
from protocol.codec import StepHeader
from protocol.errors import RemoteProtocolError
from protocol.identity import PeerId, SessionId
from protocol.messages import (
    Begin,
    Close,
    Closed,
    Credit,
    Failed,
    FailureReason,
    Load,
    Message,
    Open,
    Opened,
    RefusalReason,
    Refused,
    Reroute,
    Slice,
    Step,
    TokenHistory,
)
from protocol.reports import Progress, ProgressRequest, Timings, TimingsRequest
from protocol.states import Role, SessionState
from protocol.tensors import DType, Tensor

MAX_OPENINGS = 256
"""Sessions that may wait for admission on one link."""

MAX_OVERRUNS = 1
"""Times that a link may bring rows beyond what a session of its peer has reserved; one more ends the link."""

_AWAITS_ADMISSION = frozenset({SessionState.OPENING, SessionState.CLOSING})


class RowReceiver(Protocol):
    """Receives the rows of one session: a stage's session, or the coordinator's end of a job."""

    def permits(self, peer: PeerId) -> bool:
        """Whether this peer may send rows of the session."""

    def admit(self, part: Slice, dtype: DType, width: tuple[int, ...], link: "InboundLink") -> bool:
        """Return whether rows that are arriving are taken; where not, they are discarded, and the session is lost.

        `width`: the shape of a row. Must not block.
        """

    def receive(self, part: Slice, tensor: Tensor, link: "InboundLink") -> None:
        """Take rows that were admitted. Must not block; calls `link.consumed` once they no longer occupy memory."""


class SessionHandler(Protocol):
    """The stage server of this node, which opens and closes sessions for coordinators."""

    async def open(self, message: Open, link: "InboundLink") -> Opened | Refused:
        """Admit or refuse a session."""

    def add_history(self, message: TokenHistory, link: "InboundLink") -> None:
        """Take tokens so far of a session that this link opened; see TokenHistory."""

    async def begin(self, message: Begin, link: "InboundLink") -> None:
        """Begin a session that this link opened; one that cannot begin fails."""

    def progress(self, session: SessionId, link: "InboundLink") -> Progress:
        """Return the progress of a session that this link opened."""

    def timings(self, session: SessionId, link: "InboundLink") -> Timings:
        """Return the timing of a session that this link opened, and record more of it; see TimingsRequest."""

    async def close(self, session: SessionId, link: "InboundLink") -> Closed:
        """Free a session that this link opened and return what it cost; an unknown one costs nothing."""

    def link_broken(self, link: "InboundLink") -> None:
        """Free everything that was opened over the link."""


class InboundLink(JobLink):
    """The responder's end."""

    def __init__(
        self,
        stream: Stream,
        agent: str,
        receivers: Mapping[SessionId, RowReceiver],
        handler: SessionHandler,
        buffers: LinkBuffers | None = None,
    ) -> None:
        super().__init__(stream, Role.RESPONDER, agent, buffers, self._admit_step)
        self._receivers = receivers
        self._handler = handler
        self._openings: dict[SessionId, trio.Event] = {}
        """Of sessions that await admission; set when that is decided."""
        self._admitted: deque[list[RowReceiver]] = deque()
        """For each step that is arriving, or has arrived and is not delivered yet: the receivers of its slices."""
        self._overruns = 0
        self._consumed: defaultdict[SessionId, int] = defaultdict(int)

    def consumed(self, session: SessionId, consumed_bytes: int) -> None:
        """Return credit for rows that were consumed; sent in lumps of a quarter of the flow-control window."""
        self._consumed[session] += consumed_bytes
        if self._consumed[session] >= WINDOW_BYTES // 4 and not self.broken:
            self._send_now(Credit(session=session, consumed_bytes=self._consumed.pop(session)))

    def fail(self, session: SessionId, reason: FailureReason, message: str, peer: PeerId | None = None) -> None:
        """Report to the other side that a session is lost here."""
        self._consumed.pop(session, None)
        if not self.broken:
            self._send_now(Failed(session=session, reason=reason, message=message[:200], peer=peer))

    def overrun(self, fault: str) -> None:
        """Count rows beyond what a session of this peer has reserved. Raises RemoteProtocolError past the limit."""
        self._overruns += 1
        if self._overruns > MAX_OVERRUNS:
            raise RemoteProtocolError(fault)

    def reroute(self, session: SessionId, reason: FailureReason, message: str, peer: PeerId | None = None) -> None:
        """Ask the coordinator for another route; the session is kept here."""
        if not self.broken:
            self._send_now(Reroute(session=session, reason=reason, message=message[:200], peer=peer))

    def forget(self, session: SessionId) -> None:
        """Drop the state of a session that was opened over another link; see JobLink."""
        self._consumed.pop(session, None)
        super().forget(session)

    def _decode(self, data: bytes) -> list[Message]:
        messages = super()._decode(data)
        self._buffers.update_partial(self, self._connection.held_bytes)
        return messages

    async def _before_next_read(self) -> None:
        # Initiators always read, so this cannot deadlock; a peer that asks and never reads has to wait.
        await self._wait_for_room()

    def _on_message(self, message: Message, nursery: trio.Nursery) -> None:
        match message:
            case Step():
                self._deliver_rows(message)
            case Open():
                # At once: a Close may be right behind, whose task may run first.
                opening = self._openings[message.session] = trio.Event()
                nursery.start_soon(self._open, message, opening)
            case TokenHistory():
                self._handler.add_history(message, self)
            case Begin():
                nursery.start_soon(self._handler.begin, message, self)
            case ProgressRequest():
                self._send_now(self._handler.progress(message.session, self))
            case TimingsRequest():
                self._send_now(self._handler.timings(message.session, self))
            case Close():
                nursery.start_soon(self._close, message)
            case _:
                raise AssertionError(f"the state tables let {message} through to a responder")

    def _admit_step(self, header: StepHeader) -> list[bool]:
        """Return which slices of a step, whose rows are still to arrive, have a receiver here that takes them."""
        receivers = [self._receiver_of(part, header) for part in header.slices]
        if any(receivers):
            self._admitted.append([receiver for receiver in receivers if receiver is not None])
        return [receiver is not None for receiver in receivers]

    def _receiver_of(self, part: Slice, header: StepHeader) -> RowReceiver | None:
        receiver = self._receivers.get(part.session)
        if receiver is None or not receiver.permits(self.peer):
            self._reject_unknown(part.session)
            return None
        return receiver if receiver.admit(part, header.dtype, header.shape[1:], self) else None

    def _reject_unknown(self, session: SessionId) -> None:
        self.fail(session, FailureReason.UNKNOWN_SESSION, "no such session here, or not from you")

    def _deliver_rows(self, step: Step) -> None:
        start = 0
        for part, receiver in zip(step.slices, self._admitted.popleft(), strict=True):
            rows = step.tensor.cut(start, start + part.rows)
            start += part.rows
            if self._receivers.get(part.session) is not receiver:  # ended meanwhile; a new one has not admitted these
                self._reject_unknown(part.session)
                continue
            if len(step.slices) > 1:  # a slice that waits is not to hold the memory of those that do not
                rows = replace(rows, data=bytes(rows.data))
            receiver.receive(part, rows, self)

    async def _open(self, message: Open, opening: trio.Event) -> None:
        try:
            if len(self._openings) > MAX_OPENINGS:
                why = f"{MAX_OPENINGS} sessions of this link already await admission"
                answer: Opened | Refused = Refused(
                    session=message.session, reason=RefusalReason.FULL, message=why, load=Load()
                )
            else:
                answer = await self._handler.open(message, self)
            if not self.broken and self._connection.session_state(message.session) in _AWAITS_ADMISSION:
                self._send_now(answer)
        finally:
            opening.set()
            self._openings.pop(message.session, None)

    async def _close(self, message: Close) -> None:
        if (opening := self._openings.get(message.session)) is not None:
            await opening.wait()
        closed = await self._handler.close(message.session, self)
        self._consumed.pop(message.session, None)
        # A session that was refused or has failed meanwhile is answered by that.
        if not self.broken and self._connection.session_state(message.session) is SessionState.CLOSING:
            self._send_now(closed)

    async def _liveness_loop(self) -> None:
        """End the link of a silent initiator, which pings every second: it would hold our memory for nothing."""
        while True:
            await trio.sleep(PING_INTERVAL_S)
            if self.silence_s > 4 * SILENCE_LIMIT_S:
                raise NetworkError(f"nothing received for {self.silence_s:.1f} s")

    def _on_broken(self) -> None:
        self._buffers.forget(self)
        self._handler.link_broken(self)
