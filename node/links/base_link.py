"""A job link: one end of a job stream between two peers, shared by all the sessions between them.

`protocol.connection` holds the state machine; here it meets real streams. Each link has one task that reads and one
that writes, so that a cancelled sender never cuts a frame short, and one for liveness. Messages that arrive are handed
to plain functions that must not block.
"""

from abc import ABC, abstractmethod

import structlog
import trio

from node.links.buffers import LinkBuffers, SendQueue
from node.network.interface import NetworkError, Stream
from protocol.connection import Admission, JobConnection
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import PeerId, SessionId
from protocol.messages import Hello, Message, Ping, Pong, Step
from protocol.states import Role, SessionState

WINDOW_BYTES = 64 << 20
"""Flow-control window: unconsumed step payload of one session, which can only cause it once it was admitted."""

ANSWER_TIMEOUT_S = 10.0
"""Timeout for the Hello, for opening and for closing a session."""

PING_INTERVAL_S = 1.0
"""A link that received nothing for this long sends a ping."""

SILENCE_LIMIT_S = 3.0
"""A link that received nothing for this long, despite pings, is broken: a stopped machine closes no connection."""

_logger = structlog.get_logger(__name__)


class LinkBroken(Exception):
    """The link to a peer is gone, and with it everything that was under way on it."""

    def __init__(self, peer: PeerId, message: str) -> None:
        super().__init__(message)
        self.peer = peer


class JobLink(ABC):
    """What both directions share: the stream, its tasks, and the bounded send queue."""

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
        """Why the link is broken, if it is."""
        self._buffers = buffers or LinkBuffers()
        self._queue = SendQueue(self._buffers)
        self._scope = trio.CancelScope()
        self._stream = stream
        self._connection = JobConnection(
            role, agent=agent, window_bytes=WINDOW_BYTES, protocol=stream.protocol, admission=admission
        )
        self._agent = agent
        self._greeted = trio.Event()
        self._received_s = trio.current_time()
        """When data last arrived."""
        self._received = trio.Event()
        """Set, and replaced, whenever data arrives; several tasks may wait for it."""

    @property
    def minor(self) -> int:
        """The version of the job protocol that both ends speak: 1.`minor`."""
        return self._connection.minor

    @property
    def silence_s(self) -> float:
        """For how long no data has arrived."""
        return trio.current_time() - self._received_s

    @property
    def session_count(self) -> int:
        """Sessions that the link carries."""
        return self._connection.session_count

    @property
    def is_relayed(self) -> bool:
        """Whether the link passes a relay."""
        return self._stream.relay is not None

    async def run(self) -> None:
        """Carry the link until it breaks or is cancelled. Raises nothing else: a link never ends the node."""
        try:
            self._send_now(Hello(agent=self._agent, window_bytes=WINDOW_BYTES))
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_loop)
                    nursery.start_soon(self._liveness_loop)
                    await self._read_loop(nursery)
                    nursery.cancel_scope.cancel()
        except* NetworkError as group:
            self._break(f"connection lost: {_first_line(group)}")
        except* (LinkBroken, LocalProtocolError) as group:
            self._break(_first_line(group))
        except* RemoteProtocolError as group:
            self._break(f"broke the protocol: {_first_line(group)}")
            _logger.warning("peer broke the job protocol", peer=self.peer, fault=_first_line(group))
        except* Exception as group:  # a defect of ours, which a peer has found: it costs this link only
            self._break("internal error on this link")
            _logger.exception("link failed with an internal error", peer=self.peer, exc_info=group)
        finally:
            self._break("closed")
            self._queue.clear()
            with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                await self._stream.reset()

    def end(self, why: str) -> None:
        """Break the link."""
        _logger.warning("link ended", peer=self.peer, reason=why)
        self._break(why)
        self._scope.cancel()

    async def ready(self) -> None:
        """Wait for the other side's Hello. Raises LinkBroken when none arrives in time."""
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            await self._greeted.wait()
        if self.broken or not self._greeted.is_set():
            raise LinkBroken(self.peer, self.broken or f"no Hello within {ANSWER_TIMEOUT_S:.0f} s")

    async def send(self, message: Message) -> None:
        """Send a message once there is room. Raises LinkBroken when the link is gone."""
        await self._wait_for_room()
        self._send_now(message)

    async def _wait_for_room(self) -> None:
        while self._queue.is_full and not self.broken:
            await self._queue.room.park()

    def _send_now(self, message: Message) -> None:
        """Encode a message now, so that the order of calls is that of states; see `JobConnection` for that on the wire.

        A Ping overtakes nothing: its pong confirms that what was sent before has arrived.
        """
        if self.broken:
            raise LinkBroken(self.peer, self.broken)
        pieces = self._connection.send(message)
        if isinstance(message, Step):
            self._queue.put(pieces)
        else:
            self._queue.put_control(pieces, overtakes=not isinstance(message, Ping))

    def forget(self, session: SessionId) -> None:
        """Drop the state of a session, unless it was opened over this very link: then it ends by Close."""
        if self._connection.session_state(session) is SessionState.FORWARDED:
            self._connection.forget(session)

    async def _write_loop(self) -> None:
        while True:
            await self._queue.filled.wait()
            while (data := self._queue.take()) is not None:
                await self._stream.send_all(data)
                self._queue.on_sent(len(data))

    async def _read_loop(self, nursery: trio.Nursery) -> None:
        while data := await self._stream.receive_some():
            self._received_s = trio.current_time()
            self._received.set()
            self._received = trio.Event()
            for message in self._decode(data):
                match message:
                    case Hello():
                        self._on_hello()
                    case Ping():
                        self._send_now(Pong(nonce=message.nonce))
                    case _:
                        self._on_message(message, nursery)
            await self._before_next_read()
        self._decode(b"")
        self._break("the peer ended the connection")

    def _decode(self, data: bytes) -> list[Message]:
        try:
            return self._connection.receive_data(data)
        except RemoteProtocolError as error:
            # At once: nothing may be sent on this link any more, even while its tasks are still ending.
            self._break(f"broke the protocol: {error}")
            raise

    def _on_hello(self) -> None:
        self._greeted.set()

    async def _before_next_read(self) -> None:  # noqa: B027 - a hook, empty by default
        """Wait before reading on, where replying could fill our memory."""

    @abstractmethod
    async def _liveness_loop(self) -> None:
        """Break the link when the other side is silent for too long."""

    @abstractmethod
    def _on_message(self, message: Message, nursery: trio.Nursery) -> None:
        """Act on any message but Hello and Ping."""

    @abstractmethod
    def _on_broken(self) -> None:
        """Notify everything that depends on the link that it is gone."""

    def _break(self, why: str) -> None:
        if not self.broken:
            self.broken = why
            self._greeted.set()
            self._queue.room.unpark_all()
            self._on_broken()


def _first_line(group: BaseExceptionGroup[Exception]) -> str:
    """Return the message of the first exception in a group, in one line."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error).partition("\n")[0]
