"""The initiator's end of a job link: we open sessions and send rows under flow control.

Pings tell a dead peer from one that is still receiving what was sent before.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import trio

from node.links.base_link import ANSWER_TIMEOUT_S, PING_INTERVAL_S, SILENCE_LIMIT_S, JobLink, LinkBroken
from node.links.buffers import LinkBuffers
from node.network.interface import NetworkError, Stream
from protocol.codec import minor_of
from protocol.identity import PeerId, SessionId
from protocol.limits import MAX_HISTORY_TOKENS
from protocol.messages import (
    Begin,
    Close,
    Closed,
    Credit,
    Failed,
    FailureReason,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Refused,
    Reroute,
    Step,
    TokenHistory,
)
from protocol.reports import Progress, ProgressRequest, Timings, TimingsRequest
from protocol.states import Role, SessionState

PONG_LIMIT_S: Final = 8.0
"""A link on which a ping is unanswered for this long is broken, whatever else trickles in."""

LATE_WAKE_S: Final = 0.25
"""A timer that fires so late was held up by our own machine, which did not read meanwhile either."""

REMEMBERED_PONGS: Final = 16
"""Pongs whose round trips say how busy the peer is."""

SLACK_FACTOR: Final = 2.0
MAX_SLACK_S: Final = 5.0

MAX_PENDING_PINGS: Final = 8
"""Pings that await their pong; more are of no use."""

UNACKED_BYTES: Final = 256 << 10
"""After this much a ping is sent, whose pong confirms that it has arrived."""

SLOWEST_BYTES_PER_S: Final = 500e3
"""What has not arrived is still in flight at this rate, and a pong behind it: a home's upstream of 4 Mb/s."""


class PingTracker:
    """Pings that await their pong, and how much of what was sent the pongs have confirmed."""

    def __init__(self) -> None:
        self._count = 0
        self._pending: deque[tuple[float, int]] = deque()
        """When each ping was sent, and how much had been sent before it."""
        self._round_trips_s: deque[float] = deque(maxlen=REMEMBERED_PONGS)
        self._pinged_bytes = 0
        """What had been sent before the last ping,"""
        self._acked_bytes = 0
        """and before the last that was answered."""

    @property
    def is_pending(self) -> bool:
        """Whether a pong is due."""
        return bool(self._pending)

    def is_due(self, sent_bytes: int) -> bool:
        """Whether so much was sent since the last ping that another should follow."""
        return sent_bytes - self._pinged_bytes > UNACKED_BYTES

    def ping(self, sent_bytes: int, now_s: float) -> Ping | None:
        """Return the next ping to send, unless enough are pending."""
        if len(self._pending) >= MAX_PENDING_PINGS:
            return None
        self._count += 1
        self._pending.append((now_s, sent_bytes))
        self._pinged_bytes = sent_bytes
        return Ping(nonce=self._count)

    def on_pong(self, now_s: float) -> None:
        """Take the answer to the oldest pending ping: they come in order."""
        pinged_s, self._acked_bytes = self._pending.popleft()
        self._round_trips_s.append(now_s - pinged_s)

    @property
    def slack_s(self) -> float:
        """What to add to a timeout: one that was slow to answer recently is busy."""
        return min(MAX_SLACK_S, SLACK_FACTOR * max(self._round_trips_s, default=0.0))

    def pending_s(self, now_s: float) -> float:
        """Return for how long the oldest ping has been unanswered."""
        return now_s - self._pending[0][0] if self._pending else 0.0

    def in_flight_s(self, sent_bytes: int) -> float:
        """Return how long what was sent may still be in flight: a ping behind it is answered no sooner."""
        return max(0, sent_bytes - self._acked_bytes - UNACKED_BYTES) / SLOWEST_BYTES_PER_S


T = TypeVar("T")


class SessionRefused(Exception):
    """A stage did not admit a session."""

    def __init__(self, peer: PeerId, refused: Refused) -> None:
        super().__init__(refused.message)
        self.peer = peer
        self.reason = refused.reason
        self.most_positions = refused.most_positions
        self.load = refused.load


@dataclass(frozen=True, slots=True)
class SessionLost:
    """A session is lost beyond a link: the other side reports it, or the link broke.

    `reporter`: the peer at the other end of the link; `blamed`: the peer that it reports to be at fault, itself or
    another. `resumable`: the reporter keeps the session and waits for another route. `lagged`: a straggler, alive
    without progress.
    """

    reporter: PeerId
    blamed: PeerId
    reason: FailureReason
    message: str
    resumable: bool = False
    lagged: bool = False


class _Reply(Generic[T]):
    """An answer that tasks wait for; without a value if the link broke first."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.arrived = trio.Event()

    def deliver(self, value: T) -> None:
        self.value = value
        self.arrived.set()


class OutboundLink(JobLink):
    """The initiator's end."""

    def __init__(self, stream: Stream, agent: str, buffers: LinkBuffers | None = None) -> None:
        super().__init__(stream, Role.INITIATOR, agent, buffers)
        self._openings: dict[SessionId, _Reply[Opened | Refused | Failed]] = {}
        self._closings: dict[SessionId, _Reply[Closed | Refused | Failed]] = {}
        self._progress_replies: dict[SessionId, _Reply[Progress]] = {}
        self._timings_replies: dict[SessionId, _Reply[Timings]] = {}
        self._watchers: dict[SessionId, dict[object, Callable[[SessionLost], None]]] = {}
        self._credit = trio.lowlevel.ParkingLot()
        self._pings = PingTracker()

    async def open(self, message: Open) -> Opened:
        """Open a session. Raises SessionRefused, or LinkBroken also when no answer arrives in time."""
        session = message.session
        reply = self._openings[session] = _Reply()
        try:
            await self.send(message)
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await reply.arrived.wait()
        except trio.TooSlowError:
            raise LinkBroken(self.peer, f"no answer to Open within {ANSWER_TIMEOUT_S:.0f} s") from None
        finally:
            del self._openings[session]
        answer = reply.value
        if answer is None:
            raise LinkBroken(self.peer, self.broken or "connection lost")
        if isinstance(answer, Refused):
            raise SessionRefused(self.peer, answer)
        if not isinstance(answer, Opened):
            raise LinkBroken(self.peer, f"session lost while it was opened: {answer}")
        return answer

    def send_history(self, session: SessionId, tokens: Sequence[int]) -> None:
        """Send the tokens so far of a session that we opened, before `begin`, at once. Raises LinkBroken; see there."""
        self._check_open(session)
        for start in range(0, len(tokens), MAX_HISTORY_TOKENS):
            self._send_now(TokenHistory(session=session, tokens=tuple(tokens[start : start + MAX_HISTORY_TOKENS])))

    def begin(self, message: Begin) -> None:
        """Begin a session, at once: before any further rows, over any link. Raises LinkBroken where it is lost."""
        self._check_open(message.session)
        self._send_now(message)

    def _check_open(self, session: SessionId) -> None:
        if self._connection.session_state(session) is not SessionState.OPEN:
            raise LinkBroken(self.peer, self.broken or "the session was lost before it began")

    def send_close(self, session: SessionId) -> None:
        """Close a session that we opened; `close` returns the answer. Raises nothing, also for a link that is gone.

        Close is sent at once: the caller may have little time left, and the other side holds memory until it arrives.
        """
        state = self._connection.session_state(session)
        if self.broken or state in {SessionState.IDLE, SessionState.CLOSING}:
            return
        if state is not SessionState.FAILED:  # else it confirms the other side's Failed, and has no answer
            self._closings[session] = _Reply()
        self._send_now(Close(session=session))

    async def close(self, session: SessionId) -> Closed | None:
        """Close a session, unless `send_close` has, and return what it cost; None where that is not known."""
        if session not in self._closings:
            self.send_close(session)
        if (reply := self._closings.get(session)) is None:
            return None
        try:
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                await reply.arrived.wait()
        finally:
            self._closings.pop(session, None)
        return reply.value if isinstance(reply.value, Closed) else None

    def has_credit(self, session: SessionId, payload_bytes: int) -> bool:
        """Whether flow control lets so much of a session be sent; always on a broken link, which fails on use."""
        return bool(self.broken) or payload_bytes <= self._connection.sendable_bytes(session)

    def try_send_step(self, step: Step) -> bool:
        """Send a step now if the queue has room and every session has credit; return whether it was sent."""
        if self.broken:
            raise LinkBroken(self.peer, self.broken)
        if not self._queue.has_room(len(step.tensor.data)):
            return False
        row_bytes = step.tensor.row_bytes
        if any(part.rows * row_bytes > self._connection.sendable_bytes(part.session) for part in step.slices):
            return False
        self._send_now(step)
        if self._pings.is_due(self._queue.accepted_bytes):
            self._ping()
        return True

    async def send_step(self, step: Step) -> None:
        """Send a step as soon as there is room and credit for it."""
        while not self.try_send_step(step):
            waits_for = self._credit if self._queue.has_room(len(step.tensor.data)) else self._queue.room
            await waits_for.park()

    async def probe(self, timeout_s: float) -> None:
        """Ping the other side; break the link, at once and for all its sessions, if nothing arrives in time."""
        if self.broken:
            return
        received = self._received
        if not self._pings.is_pending:  # else a pong is due in any case; many jobs may probe at once
            self._ping()
        with trio.move_on_after(timeout_s + self._in_flight_s() + self._pings.slack_s) as scope:
            await received.wait()
        if scope.cancelled_caught:
            await self._read_after_late_wake(scope.deadline)
            if not (received.is_set() or self.broken):
                self._break(f"silent for {self.silence_s:.1f} s")

    async def request_progress(self, session: SessionId, timeout_s: float) -> Progress | None:
        """Return the progress of a begun session; None without a timely answer, and from a peer of version 1.0."""
        return await self._ask(ProgressRequest(session=session), self._progress_replies, timeout_s)

    async def request_timings(self, session: SessionId, timeout_s: float) -> Timings | None:
        """Return the timing of a begun session; None without a timely answer, and from a peer before version 1.2."""
        return await self._ask(TimingsRequest(session=session), self._timings_replies, timeout_s)

    async def _ask(
        self, message: ProgressRequest | TimingsRequest, replies: dict[SessionId, _Reply[T]], timeout_s: float
    ) -> T | None:
        session = message.session
        is_begun = self._connection.session_state(session) is SessionState.BEGUN
        if self.broken or self._connection.minor < minor_of(message) or not is_begun:
            return None
        reply = replies.setdefault(session, _Reply())
        self._send_now(message)
        with trio.move_on_after(timeout_s):
            await reply.arrived.wait()
        if replies.get(session) is reply:
            del replies[session]
        return reply.value

    def watch(self, session: SessionId, on_lost: Callable[[SessionLost], None]) -> Callable[[], None]:
        """Call `on_lost` if the other side gives the session up or the link breaks; return what ends the watch."""
        if self.broken:
            raise LinkBroken(self.peer, self.broken)
        watchers = self._watchers.setdefault(session, {})
        token = object()
        watchers[token] = on_lost

        def unwatch() -> None:
            watchers.pop(token, None)
            if not watchers and self._watchers.get(session) is watchers:
                del self._watchers[session]

        return unwatch

    @property
    def is_in_use(self) -> bool:
        """Whether the link carries sessions, or will once their first rows are sent."""
        return bool(self._watchers) or self.session_count > 0

    def _on_message(self, message: Message, nursery: trio.Nursery) -> None:
        match message:
            case Opened() | Refused() | Closed():
                self._deliver(message)
            case Credit():
                self._credit.unpark_all()
            case Pong():
                self._pings.on_pong(trio.current_time())
            case Progress():
                if (reply := self._progress_replies.pop(message.session, None)) is not None:
                    reply.deliver(message)
            case Timings():
                if (timings := self._timings_replies.pop(message.session, None)) is not None:
                    timings.deliver(message)
            case Reroute() | Failed():
                watchers = self._watchers.get(message.session, {})
                if isinstance(message, Failed):
                    self._deliver(message)
                    self._watchers.pop(message.session, None)
                blamed, is_kept = message.peer or self.peer, isinstance(message, Reroute)
                lost = SessionLost(self.peer, blamed, message.reason, message.message, resumable=is_kept)
                # A copy: a watcher may end watches in turn, its own and those that others hold here.
                for on_lost in tuple(watchers.values()):
                    on_lost(lost)
            case _:
                raise AssertionError(f"the state tables let {message} through to an initiator")

    def _deliver(self, message: Opened | Refused | Closed | Failed) -> None:
        if not isinstance(message, Closed) and (opening := self._openings.get(message.session)) is not None:
            opening.deliver(message)
        if not isinstance(message, Opened) and (closing := self._closings.get(message.session)) is not None:
            closing.deliver(message)

    async def _liveness_loop(self) -> None:
        while True:
            due_s = trio.current_time() + PING_INTERVAL_S
            await trio.sleep_until(due_s)
            await self._read_after_late_wake(due_s)
            if self.broken:
                raise NetworkError(self.broken)
            silence_s, grace_s = self.silence_s, self._in_flight_s() + self._pings.slack_s
            pending_s = self._pings.pending_s(trio.current_time())
            if silence_s > SILENCE_LIMIT_S + grace_s or pending_s > PONG_LIMIT_S + grace_s:
                raise NetworkError(f"nothing received for {silence_s:.1f} s, and no pong for {pending_s:.1f} s")
            if silence_s >= PING_INTERVAL_S * 0.9:
                self._ping()

    async def _read_after_late_wake(self, due_s: float) -> None:
        """Wait, where we woke late, until what arrived meanwhile is read: a busy machine is not a dead peer."""
        late_s = trio.current_time() - due_s
        if late_s > LATE_WAKE_S:
            await trio.sleep(min(late_s, PING_INTERVAL_S))

    def _ping(self) -> None:
        if (ping := self._pings.ping(self._queue.accepted_bytes, trio.current_time())) is not None:
            self._send_now(ping)

    @property
    def answer_slack_s(self) -> float:
        """What to add to the time limit of an answer: it comes no sooner than round trips and what was sent allow."""
        return min(MAX_SLACK_S, self._in_flight_s() + self._pings.slack_s)

    def _in_flight_s(self) -> float:
        return self._pings.in_flight_s(self._queue.accepted_bytes)

    def _on_hello(self) -> None:
        super()._on_hello()
        self._credit.unpark_all()  # from now on the window is known
        self._ping()  # and soon the round trip

    def _on_broken(self) -> None:
        self._credit.unpark_all()
        for arrived in [reply.arrived for replies in (self._openings, self._closings) for reply in replies.values()]:
            arrived.set()
        watchers, self._watchers = self._watchers, {}
        lost = SessionLost(self.peer, self.peer, FailureReason.DOWNSTREAM, self.broken or "connection lost")
        for on_lost in [on_lost for of_session in watchers.values() for on_lost in of_session.values()]:
            on_lost(lost)
