"""A link: one end of a job stream between two peers, shared by all the sessions between them.

`protocol.connection` knows what may be said when; here it meets real streams. A link has one task that reads and one
that writes, so that nobody who sends is ever cut off in the middle of a frame, and one that asks whether the other side
is still there. What arrives is handed to plain functions that must not block.
"""

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import structlog
import trio

from node.network.interface import NetworkError, Stream
from protocol.codec import StepHeader
from protocol.connection import Admission, JobConnection
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import PeerId, SessionId
from protocol.limits import MAX_HISTORY_TOKENS
from protocol.messages import (
    Begin,
    Close,
    Closed,
    Credit,
    Failed,
    FailureReason,
    Hello,
    Load,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Progress,
    ProgressRequest,
    RefusalReason,
    Refused,
    Reroute,
    SessionStatistics,
    Slice,
    Step,
    TokenHistory,
)
from protocol.states import Role, SessionState
from protocol.tensors import DType, Tensor

WINDOW_BYTES = 64 << 20
"""Step payload of one session that we hold unconsumed. A session can only cause it after it was admitted."""

OUTBOX_BYTES = 4 << 20
"""Encoded frames of a link that wait for the network before a sender has to wait."""

OUTBOXES_BYTES = 24 << 20
"""The same of all links together, beyond which none takes more than what it has no other step to send before."""

PARTIAL_BYTES = 16 << 20
"""Frames of all links that are not complete yet; where there is more, links break that have brought nothing longest."""

MAX_OPENINGS = 256
"""Sessions that may wait for admission on one link."""

MAX_OVERRUNS = 1
"""Times that a link may bring rows beyond what a session of its peer has reserved; one more ends the link."""

PING_INTERVAL_S = 1.0
"""A link that heard nothing for this long asks whether the other side is there."""

SILENCE_LIMIT_S = 3.0
"""A link that heard nothing for this long, though it asked, is broken: a stopped machine closes no connection."""

ANSWER_LIMIT_S = 8.0
"""A link on which a ping has no pong for this long is broken, whatever else trickles in."""

MAX_UNANSWERED = 8
"""Pings that await their pong; there is no use in more."""

UNMARKED_BYTES = 256 << 10
"""After so much a ping goes out, whose pong tells that it has arrived."""

SLOWEST_BYTES_PER_S = 500e3
"""What has not arrived is still on its way at this rate, and a pong behind it: a home's upstream of 4 Mb/s."""

ANSWER_TIMEOUT_S = 10.0
"""How long an opening or a closing may take."""

_AWAITS_ADMISSION = frozenset({SessionState.OPENING, SessionState.CLOSING})

_logger = structlog.get_logger(__name__)


class LinkBroken(Exception):
    """The link to a peer is gone, and with it everything that was under way on it."""

    def __init__(self, peer: PeerId, message: str) -> None:
        super().__init__(message)
        self.peer = peer


class SessionRefused(Exception):
    """A stage did not admit a session."""

    def __init__(self, peer: PeerId, refused: Refused) -> None:
        super().__init__(refused.message)
        self.peer = peer
        self.reason = refused.reason


@dataclass(frozen=True, slots=True)
class SessionLost:
    """A session is lost beyond a link: the other side says so, or the link broke.

    `reporter` is the peer at the other end of the link; `blamed` whom it says to be at fault, itself or another.
    `held`: the reporter has the session still, and waits for another route. `lagged`: it lives and makes no progress.
    """

    reporter: PeerId
    blamed: PeerId
    reason: FailureReason
    message: str
    held: bool = False
    lagged: bool = False


class Receiver(Protocol):
    """Takes the rows of one session that arrive here: a stage's session, or the coordinator's end of a job."""

    def permits(self, peer: PeerId) -> bool:
        """Whether this peer may send rows of the session."""
        ...

    def admit(self, part: Slice, dtype: DType, width: tuple[int, ...], link: "InboundLink") -> bool:
        """Say whether rows that are coming may come; where not, nothing is kept of them, and the session is lost.

        `width`: the shape of a row. Must not block.
        """
        ...

    def receive(self, part: Slice, tensor: Tensor, link: "InboundLink") -> None:
        """Take rows that were admitted. Must not block; calls `link.consumed` once they no longer occupy memory."""
        ...


class OpenHandler(Protocol):
    """The stages of this node: asked to open and close sessions by coordinators."""

    async def open(self, message: Open, link: "InboundLink") -> Opened | Refused:
        """Admit or refuse a session."""
        ...

    def tell_history(self, message: TokenHistory, link: "InboundLink") -> None:
        """Take tokens so far of a session that this link opened; see TokenHistory."""
        ...

    async def begin(self, message: Begin, link: "InboundLink") -> None:
        """Begin a session that this link opened; one that cannot begin fails."""
        ...

    def progress(self, session: SessionId, link: "InboundLink") -> Progress:
        """Return how far a session that this link opened has come."""
        ...

    async def close(self, session: SessionId, link: "InboundLink") -> Closed:
        """Free a session that this link opened and say what it cost. An unknown one is no error."""
        ...

    def link_broken(self, link: "InboundLink") -> None:
        """Free everything that was opened over the link."""
        ...


class SessionRegistry(Protocol):
    """Finds who takes the rows of a session."""

    def get(self, session: SessionId) -> Receiver | None:
        """Return the receiver of a session, if there is one here."""
        ...


class LinkBuffers:
    """What the links of a node hold together: frames that wait to be sent, and those that have come in part."""

    def __init__(self) -> None:
        self.outgoing_bytes = 0
        self._partial: dict[InboundLink, int] = {}
        self._partial_bytes = 0

    @property
    def partial_bytes(self) -> int:
        """Bytes of frames that have come in part."""
        return self._partial_bytes

    def note(self, link: "InboundLink", partial_bytes: int) -> None:
        """Take note of how much a link that was just heard holds of a frame.

        Where all hold too much, those links break that were silent longest: identities cost nothing, so that no peer's
        share tells it from many others, but who is in the middle of a frame and honest goes on with it.
        """
        self._partial_bytes += partial_bytes - self._partial.pop(link, 0)
        if partial_bytes:
            self._partial[link] = partial_bytes  # behind all others
        while self._partial_bytes > PARTIAL_BYTES:
            stalest = next(iter(self._partial))
            self.drop(stalest)
            stalest.end("a frame is not complete, and memory for such is short")

    def drop(self, link: "InboundLink") -> None:
        """Forget a link."""
        self._partial_bytes -= self._partial.pop(link, 0)


class _Link(ABC):
    """What both directions share: the stream, its tasks, and a bounded outbox."""

    def __init__(
        self,
        stream: Stream,
        role: Role,
        agent: str,
        buffers: LinkBuffers | None = None,
        admission: Admission | None = None,
    ) -> None:
        self.peer = stream.peer
        self.broken: str | None = None
        self._buffers = buffers or LinkBuffers()
        self._scope = trio.CancelScope()
        self._stream = stream
        self._connection = JobConnection(
            role, agent=agent, window_bytes=WINDOW_BYTES, protocol=stream.protocol, admission=admission
        )
        self._agent = agent
        self._outbox: deque[bytes | bytearray | memoryview] = deque()
        self._outbox_bytes = 0
        self._outbox_filled = trio.Event()
        self._room = trio.lowlevel.ParkingLot()
        self._greeted = trio.Event()
        self._last_heard_s = trio.current_time()
        self._heard = trio.Event()
        """Set, and replaced, whenever anything is heard."""
        self._said_bytes = 0
        """All that was ever given to the outbox."""

    @property
    def minor(self) -> int:
        """The version of the job protocol that both ends speak: 1.`minor`."""
        return self._connection.minor

    async def run(self) -> None:
        """Carry the link until it breaks or is cancelled. Raises nothing else: a link never ends the node."""
        try:
            self._say(Hello(agent=self._agent, window_bytes=WINDOW_BYTES))
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._watch)
                    await self._read(nursery)
                    nursery.cancel_scope.cancel()
        except* NetworkError as group:
            self._break(f"connection lost: {_first_line(group)}")
        except* (LinkBroken, LocalProtocolError) as group:
            self._break(_first_line(group))
        except* RemoteProtocolError as group:
            self._break(f"broke the protocol: {_first_line(group)}")
            _logger.warning("peer broke the job protocol", peer=self.peer, fault=_first_line(group))
        except* Exception as group:  # a defect of ours, which a peer has found: it costs this link only
            self._break("this node could not go on with the link")
            _logger.exception("link ended by a defect", peer=self.peer, exc_info=group)
        finally:
            self._break("closed")
            self._buffers.outgoing_bytes -= self._outbox_bytes
            self._outbox_bytes = 0
            self._outbox.clear()
            with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                await self._stream.reset()

    def end(self, why: str) -> None:
        """Break the link."""
        _logger.warning("link ended", peer=self.peer, reason=why)
        self._break(why)
        self._scope.cancel()

    async def ready(self) -> None:
        """Wait for the other side's Hello; raise LinkBroken where none comes."""
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            await self._greeted.wait()
        if self.broken or not self._greeted.is_set():
            raise LinkBroken(self.peer, self.broken or "no greeting")

    async def send(self, message: Message) -> None:
        """Send a message once there is room; raise LinkBroken where there is no link any more."""
        while self._outbox_bytes > OUTBOX_BYTES and not self.broken:
            await self._room.park()
        self._say(message)

    def _say(self, message: Message) -> None:
        """Encode a message now, so that the order of calls is the order on the wire."""
        if self.broken:
            raise LinkBroken(self.peer, self.broken)
        for piece in self._connection.send(message):
            self._outbox.append(piece)
            self._outbox_bytes += len(piece)
            self._buffers.outgoing_bytes += len(piece)
            self._said_bytes += len(piece)
        self._outbox_filled.set()

    async def _write(self) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled = trio.Event()
            while self._outbox:
                pieces = self._take_small_pieces()
                await self._stream.send_all(pieces[0] if len(pieces) == 1 else b"".join(pieces))
                sent_bytes = sum(map(len, pieces))
                self._outbox_bytes -= sent_bytes
                self._buffers.outgoing_bytes -= sent_bytes
                self._room.unpark_all()

    def _take_small_pieces(self) -> list[bytes | bytearray | memoryview]:
        """Take the next piece and those that fit into one packet with it: a send costs far more than a copy."""
        pieces = [self._outbox.popleft()]
        size = len(pieces[0])
        while self._outbox and size + len(self._outbox[0]) <= 64 << 10:
            pieces.append(self._outbox.popleft())
            size += len(pieces[-1])
        return pieces

    async def _read(self, nursery: trio.Nursery) -> None:
        while data := await self._stream.receive_some():
            self._last_heard_s = trio.current_time()
            self._heard.set()
            self._heard = trio.Event()
            for message in self._receive(data):
                match message:
                    case Hello():
                        self._greet()
                    case Ping():
                        self._say(Pong(nonce=message.nonce))
                    case _:
                        self._take(message, nursery)
            await self._make_room()
        self._receive(b"")
        self._break("the peer ended the connection")

    def _receive(self, data: bytes) -> list[Message]:
        try:
            return self._connection.receive_data(data)
        except RemoteProtocolError as error:
            # At once: nobody may say anything on this link any more, also not while its tasks come to their end.
            self._break(f"broke the protocol: {error}")
            raise

    def _greet(self) -> None:
        self._greeted.set()

    @abstractmethod
    async def _make_room(self) -> None:
        """Wait before reading on, where answering what is read could fill our memory."""

    @abstractmethod
    async def _watch(self) -> None:
        """Break the link when the other side is silent for too long."""

    @abstractmethod
    def _take(self, message: Message, nursery: trio.Nursery) -> None:
        """Act on a message that is no greeting and asks for no pong."""

    @abstractmethod
    def _lost(self) -> None:
        """Tell everybody who depends on the link that it is gone."""

    def _break(self, why: str) -> None:
        if not self.broken:
            self.broken = why
            self._greeted.set()
            self._room.unpark_all()
            self._lost()


def _forget_lent(connection: JobConnection, session: SessionId) -> None:
    """Forget a session unless it was opened over this very link: then it ends by Close."""
    if connection.session_state(session) is SessionState.FORWARDED:
        connection.forget(session)


def _first_line(group: BaseExceptionGroup[Exception]) -> str:
    """Return what the first exception of a group says, in one line."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error).partition("\n")[0]


class OutboundLink(_Link):
    """The initiator's end: we open sessions and send rows."""

    def __init__(self, stream: Stream, agent: str, buffers: LinkBuffers | None = None) -> None:
        super().__init__(stream, Role.INITIATOR, agent, buffers)
        self._answers: dict[SessionId, trio.Event] = {}
        self._answer: dict[SessionId, Opened | Refused | Closed | Failed] = {}
        self._progress_asked: dict[SessionId, trio.Event] = {}
        self._progress: dict[SessionId, Progress] = {}
        """Answers that nobody has taken yet: of sessions that were asked about only."""
        self._watchers: dict[SessionId, dict[object, Callable[[SessionLost], None]]] = {}
        self._credit = trio.lowlevel.ParkingLot()
        self._pings = 0
        self._asked: deque[tuple[float, int]] = deque()
        """Of each ping that awaits its pong, when it went out and how much had been said before it."""
        self._marked_bytes = 0
        """What had been said before the last ping,"""
        self._arrived_bytes = 0
        """and before the last that was answered."""

    async def open(self, message: Open) -> Opened:
        """Open a session. Raises SessionRefused, or LinkBroken also when no answer comes in time."""
        answer = await self._ask(message)
        if isinstance(answer, Refused):
            raise SessionRefused(self.peer, answer)
        if not isinstance(answer, Opened):
            raise LinkBroken(self.peer, f"session lost while it was opened: {answer}")
        return answer

    def tell_history(self, session: SessionId, tokens: Sequence[int]) -> None:
        """Tell the tokens so far of a session that we opened and that is about to begin, at once.

        Raises LinkBroken where the link is gone, or the session is lost already.
        """
        self._raise_unless_open(session)
        for start in range(0, len(tokens), MAX_HISTORY_TOKENS):
            self._say(TokenHistory(session=session, tokens=tuple(tokens[start : start + MAX_HISTORY_TOKENS])))

    def begin(self, message: Begin) -> None:
        """Begin a session that we opened, at once: before any rows that are sent from now on, over whichever link.

        Raises LinkBroken where the link is gone, or the session is lost already.
        """
        self._raise_unless_open(message.session)
        self._say(message)

    def _raise_unless_open(self, session: SessionId) -> None:
        if self._connection.session_state(session) is not SessionState.OPEN:
            raise LinkBroken(self.peer, self.broken or "the session was lost before it began")

    async def close(self, session: SessionId) -> Closed:
        """Close a session that we opened and return what it cost; nothing is raised for a link that is gone.

        Close is said before this waits for anything: whoever calls it may have little time left, and the other side
        holds memory until it hears it.
        """
        unknown = Closed(session=session, statistics=SessionStatistics())
        try:
            state = self._connection.session_state(session)
            if state in {SessionState.IDLE, SessionState.CLOSING}:
                return unknown
            if state is SessionState.FAILED:
                self._say(Close(session=session))  # confirms what the other side said; it has no answer
                return unknown
            answer = await self._ask(Close(session=session))
        except LinkBroken:
            return unknown
        return answer if isinstance(answer, Closed) else unknown

    async def _ask(self, message: Open | Close) -> Opened | Refused | Closed | Failed:
        answered = self._answers[message.session] = trio.Event()
        try:
            if isinstance(message, Close):
                self._say(message)
            else:
                await self.send(message)
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await answered.wait()
        except trio.TooSlowError:
            raise LinkBroken(self.peer, f"no answer to {type(message).__name__} in {ANSWER_TIMEOUT_S:.0f} s") from None
        finally:
            if self._answers.get(message.session) is answered:
                del self._answers[message.session]
            answer = self._answer.pop(message.session, None)
        if answer is None:
            raise LinkBroken(self.peer, self.broken or "connection lost")
        return answer

    def has_credit(self, session: SessionId, payload_bytes: int) -> bool:
        """Whether so much more of a session may be sent now; a link that is broken says so when it is used."""
        return bool(self.broken) or payload_bytes <= self._connection.sendable_bytes(session)

    def try_send_step(self, step: Step) -> bool:
        """Send a step now if the outbox has room and every session has credit; say whether it was sent."""
        if self.broken:
            raise LinkBroken(self.peer, self.broken)
        if self._outbox_bytes > OUTBOX_BYTES or (self._outbox_bytes and self._is_crowded(len(step.tensor.data))):
            return False
        row_bytes = step.tensor.row_bytes
        if any(part.rows * row_bytes > self._connection.sendable_bytes(part.session) for part in step.slices):
            return False
        self._say(step)
        if self._said_bytes - self._marked_bytes > UNMARKED_BYTES:
            self._ping()
        return True

    def _is_crowded(self, payload_bytes: int) -> bool:
        """Whether the links hold so much together that this one takes a step only once it has sent what it has."""
        return self._buffers.outgoing_bytes + payload_bytes > OUTBOXES_BYTES

    async def send_step(self, step: Step) -> None:
        """Send a step as soon as there is room and credit for it."""
        size = len(step.tensor.data)
        while not self.try_send_step(step):
            is_full = self._outbox_bytes > OUTBOX_BYTES or (self._outbox_bytes and self._is_crowded(size))
            await (self._room if is_full else self._credit).park()

    async def probe(self, timeout_s: float) -> None:
        """Ask whether the other side is there; break the link, at once and for all, if nothing is heard in time."""
        if self.broken:
            return
        heard = self._heard
        if not self._asked:  # else an answer is due in any case; many jobs may ask at once
            self._ping()
        with trio.move_on_after(timeout_s + self._on_the_way_s()) as scope:
            await heard.wait()
        if scope.cancelled_caught:
            self._break(f"silent for {trio.current_time() - self._last_heard_s:.1f} s")

    async def ask_progress(self, session: SessionId, timeout_s: float) -> Progress | None:
        """Return how far a session that we opened and began has come; None where no answer comes in time.

        A peer of version 1.0 cannot be asked.
        """
        is_begun = self._connection.session_state(session) is SessionState.BEGUN
        if self.broken or self._connection.minor < 1 or not is_begun:
            return None
        answered = self._progress_asked.setdefault(session, trio.Event())
        self._say(ProgressRequest(session=session))
        with trio.move_on_after(timeout_s):
            await answered.wait()
        if self._progress_asked.get(session) is answered:
            del self._progress_asked[session]
        return self._progress.pop(session, None)

    def watch(self, session: SessionId, lost: Callable[[SessionLost], None]) -> Callable[[], None]:
        """Call `lost` once if the other side gives the session up or the link breaks; return what ends the watch."""
        if self.broken:
            raise LinkBroken(self.peer, self.broken)
        watchers = self._watchers.setdefault(session, {})
        token = object()
        watchers[token] = lost

        def unwatch() -> None:
            watchers.pop(token, None)
            if not watchers and self._watchers.get(session) is watchers:
                del self._watchers[session]

        return unwatch

    def forget(self, session: SessionId) -> None:
        """Drop what the link remembers of a session that somebody else opened."""
        _forget_lent(self._connection, session)

    def _take(self, message: Message, nursery: trio.Nursery) -> None:
        match message:
            case Opened() | Refused() | Closed():
                self._deliver(message)
            case Credit():
                self._credit.unpark_all()
            case Pong():  # they come in the order of the pings
                _, self._arrived_bytes = self._asked.popleft()
            case Progress():
                if (answered := self._progress_asked.pop(message.session, None)) is not None:
                    self._progress[message.session] = message
                    answered.set()
            case Reroute():
                lost = SessionLost(self.peer, message.peer or self.peer, message.reason, message.message, held=True)
                for watcher in tuple(self._watchers.get(message.session, {}).values()):
                    watcher(lost)
            case Failed():
                self._deliver(message)
                lost = SessionLost(self.peer, message.peer or self.peer, message.reason, message.message)
                # A copy: who loses a session ends its watches, also those that others hold here.
                for watcher in tuple(self._watchers.pop(message.session, {}).values()):
                    watcher(lost)
            case _:
                raise AssertionError(f"the state tables let {message} through to an initiator")

    def _deliver(self, message: Opened | Refused | Closed | Failed) -> None:
        answered = self._answers.get(message.session)
        if answered is not None:
            self._answer[message.session] = message
            answered.set()

    async def _watch(self) -> None:
        while True:
            await trio.sleep(PING_INTERVAL_S)
            if self.broken:
                raise NetworkError(self.broken)
            now_s, on_the_way_s = trio.current_time(), self._on_the_way_s()
            silence_s = now_s - self._last_heard_s
            unanswered_s = now_s - self._asked[0][0] if self._asked else 0.0
            if silence_s > SILENCE_LIMIT_S + on_the_way_s or unanswered_s > ANSWER_LIMIT_S + on_the_way_s:
                raise NetworkError(f"nothing heard for {silence_s:.1f} s, and no pong for {unanswered_s:.1f} s")
            if silence_s >= PING_INTERVAL_S * 0.9 and not self.broken:
                self._ping()

    def _ping(self) -> None:
        if len(self._asked) >= MAX_UNANSWERED:
            return
        self._pings += 1
        self._asked.append((trio.current_time(), self._said_bytes))
        self._marked_bytes = self._said_bytes
        self._say(Ping(nonce=self._pings))

    def _on_the_way_s(self) -> float:
        """Return how long what was said may still be on its way: what is asked behind it is answered no sooner."""
        return max(0, self._said_bytes - self._arrived_bytes - UNMARKED_BYTES) / SLOWEST_BYTES_PER_S

    async def _make_room(self) -> None:
        """Go on reading: an initiator is answered, and answers nothing."""

    def _greet(self) -> None:
        super()._greet()
        self._credit.unpark_all()  # from now on the window is known

    def _lost(self) -> None:
        self._credit.unpark_all()
        for answered in self._answers.values():
            answered.set()
        watchers, self._watchers = self._watchers, {}
        lost = SessionLost(self.peer, self.peer, FailureReason.DOWNSTREAM, self.broken or "connection lost")
        for watcher in [watcher for of_session in watchers.values() for watcher in of_session.values()]:
            watcher(lost)


class InboundLink(_Link):
    """The responder's end: others open sessions and send rows."""

    def __init__(
        self,
        stream: Stream,
        agent: str,
        receivers: SessionRegistry,
        stages: OpenHandler,
        buffers: LinkBuffers | None = None,
    ) -> None:
        super().__init__(stream, Role.RESPONDER, agent, buffers, self._admit)
        self._receivers = receivers
        self._stages = stages
        self._openings: dict[SessionId, trio.Event] = {}
        """Of sessions that are being admitted; set when that is over."""
        self._arriving: deque[list[Receiver]] = deque()
        """Of each step that is coming, or has come and is not spread yet: who has admitted its slices."""
        self._overruns = 0
        self._consumed: defaultdict[SessionId, int] = defaultdict(int)

    def consumed(self, session: SessionId, consumed_bytes: int) -> None:
        """Give credit back for rows that were taken on; told to the other side in lumps of a quarter of the window."""
        self._consumed[session] += consumed_bytes
        if self._consumed[session] >= WINDOW_BYTES // 4 and not self.broken:
            self._say(Credit(session=session, consumed_bytes=self._consumed.pop(session)))

    def fail(self, session: SessionId, reason: FailureReason, message: str, peer: PeerId | None = None) -> None:
        """Tell the other side that a session is lost here."""
        self._consumed.pop(session, None)
        if not self.broken:
            self._say(Failed(session=session, reason=reason, message=message[:200], peer=peer))

    def overrun(self, fault: str) -> None:
        """Take note of rows beyond what a session of this peer has reserved.

        Raises RemoteProtocolError where that is too often.
        """
        self._overruns += 1
        if self._overruns > MAX_OVERRUNS:
            raise RemoteProtocolError(fault)

    def reroute(self, session: SessionId, reason: FailureReason, message: str, peer: PeerId | None = None) -> None:
        """Ask the coordinator for another route; the session is held here."""
        if not self.broken:
            self._say(Reroute(session=session, reason=reason, message=message[:200], peer=peer))

    def forget(self, session: SessionId) -> None:
        """Drop what the link remembers of a session that somebody else opened."""
        self._consumed.pop(session, None)
        _forget_lent(self._connection, session)

    def _receive(self, data: bytes) -> list[Message]:
        messages = super()._receive(data)
        self._buffers.note(self, self._connection.held_bytes)
        return messages

    async def _make_room(self) -> None:
        # Initiators read all the time, so that this cannot lock up; a stranger who asks and never listens waits.
        while self._outbox_bytes > OUTBOX_BYTES and not self.broken:
            await self._room.park()

    def _take(self, message: Message, nursery: trio.Nursery) -> None:
        match message:
            case Step():
                self._spread(message)
            case Open():
                # At once: a Close may be right behind, whose task may run first.
                opening = self._openings[message.session] = trio.Event()
                nursery.start_soon(self._open, message, opening)
            case TokenHistory():
                self._stages.tell_history(message, self)
            case Begin():
                nursery.start_soon(self._stages.begin, message, self)
            case ProgressRequest():
                self._say(self._stages.progress(message.session, self))
            case Close():
                nursery.start_soon(self._close, message)
            case _:
                raise AssertionError(f"the state tables let {message} through to a responder")

    def _admit(self, header: StepHeader) -> list[bool]:
        """Say which slices of a step, whose rows are still to come, are for somebody here who takes them."""
        receivers = [self._admits(part, header) for part in header.slices]
        if any(receivers):
            self._arriving.append([receiver for receiver in receivers if receiver is not None])
        return [receiver is not None for receiver in receivers]

    def _admits(self, part: Slice, header: StepHeader) -> Receiver | None:
        receiver = self._receivers.get(part.session)
        if receiver is None or not receiver.permits(self.peer):
            self._disown(part.session)
            return None
        return receiver if receiver.admit(part, header.dtype, header.shape[1:], self) else None

    def _disown(self, session: SessionId) -> None:
        self.fail(session, FailureReason.UNKNOWN_SESSION, "no such session here, or not from you")

    def _spread(self, step: Step) -> None:
        start = 0
        for part, receiver in zip(step.slices, self._arriving.popleft(), strict=True):
            rows = step.tensor.cut(start, start + part.rows)
            start += part.rows
            if self._receivers.get(part.session) is not receiver:  # any more; another has not looked at these rows
                self._disown(part.session)
                continue
            if len(step.slices) > 1:  # one that waits is not to hold the memory of those that do not
                rows = replace(rows, data=bytes(rows.data))
            receiver.receive(part, rows, self)

    async def _open(self, message: Open, opening: trio.Event) -> None:
        try:
            if len(self._openings) > MAX_OPENINGS:
                why = f"{MAX_OPENINGS} sessions are being opened over this link already"
                answer: Opened | Refused = Refused(
                    session=message.session, reason=RefusalReason.FULL, message=why, load=Load()
                )
            else:
                answer = await self._stages.open(message, self)
            if not self.broken and self._connection.session_state(message.session) in _AWAITS_ADMISSION:
                self._say(answer)
        finally:
            opening.set()
            self._openings.pop(message.session, None)

    async def _close(self, message: Close) -> None:
        if (opening := self._openings.get(message.session)) is not None:
            await opening.wait()
        closed = await self._stages.close(message.session, self)
        self._consumed.pop(message.session, None)
        # What was refused or has failed meanwhile was answered by that.
        if not self.broken and self._connection.session_state(message.session) is SessionState.CLOSING:
            self._say(closed)

    async def _watch(self) -> None:
        """The initiator asks every second; one that is silent for much longer holds our memory for nothing."""
        while True:
            await trio.sleep(PING_INTERVAL_S)
            silence_s = trio.current_time() - self._last_heard_s
            if silence_s > 4 * SILENCE_LIMIT_S:
                raise NetworkError(f"nothing heard for {silence_s:.1f} s")

    def _lost(self) -> None:
        self._buffers.drop(self)
        self._stages.link_broken(self)
