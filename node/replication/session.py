"""One session with a neighbour over a half-duplex stream: messages in turn, bounded silence, traffic paid for."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import trio

from node.network.interface import NetworkError, Stream
from node.util.token_bucket import TokenBucket
from protocol.half_duplex import Busy, HalfDuplexConnection, M, S

SILENCE_S: Final = 15.0
"""Longest wait for the other side's next message."""

PATIENCE_S: Final = 2.0
"""The same where all places are taken: then a session gives its place to a newcomer."""

SHORTEST_WAIT_S: Final = 0.02
"""Debts to a token bucket below this accumulate: sleeping costs more."""

_E = TypeVar("_E")


@dataclass(slots=True)
class SessionOutcome:
    """Result of a session. `received`: records that were new to us; `sent`: records that the peer got from us."""

    received: int = 0
    sent: int = 0
    bytes_sent: int = 0
    retry_s: float | None = None
    """Set when the responder was busy: the pause that it asked for."""
    equal: bool = False
    """Nothing was left to exchange at the end."""
    differed: bool = False
    more: bool = False
    """The session reached its bounds before the end: another one continues."""


class SilentPeerError(NetworkError):
    """The other side sent nothing for too long."""


class Throttle:
    """Slows a session down to the rate limits of its peer and of all sessions together."""

    def __init__(self, *, work: Sequence[TokenBucket] = (), traffic: Sequence[TokenBucket] = ()) -> None:
        self._work = work
        self._traffic = traffic

    async def pay_work(self, amount: float) -> None:
        """Wait until this much work, measured in signatures to verify, is within the limits."""
        await _spend(self._work, amount)

    async def pay_traffic(self, sent_bytes: int) -> None:
        """Wait until this many bytes are within the limits."""
        await _spend(self._traffic, sent_bytes)


async def _spend(buckets: Sequence[TokenBucket], amount: float) -> None:
    now_s = trio.current_time()
    wait_s = max((bucket.spend(amount, now_s) for bucket in buckets), default=0.0)
    if wait_s >= SHORTEST_WAIT_S:
        await trio.sleep(wait_s)


class Session(Generic[M, S]):
    """One side of a session. Subclasses implement `run`."""

    def __init__(self, stream: Stream, connection: HalfDuplexConnection[M, S], throttle: Throttle) -> None:
        self.outcome = SessionOutcome()
        self.yields_at_s: float | None = None
        """From when on the session may be ended for another, None while it is our turn.

        Its peer has sent nothing for PATIENCE_S then, or not taken what is sent for SILENCE_S: slow links take seconds.
        """
        self._stream = stream
        self._connection = connection
        self._throttle = throttle
        self._received: deque[M] = deque()

    async def run(self) -> None:
        """Exchange until the end. Raises NetworkError, StorageError, and RemoteProtocolError for a peer that cheats."""
        raise NotImplementedError

    async def _send(self, message: M) -> None:
        """Send a message, then wait until its traffic is within the limits. Raises NetworkError."""
        data = self._connection.send(message)
        self.yields_at_s = trio.current_time() + SILENCE_S
        await self._stream.send_all(data)
        self.yields_at_s = None
        self.outcome.bytes_sent += len(data)
        await self._throttle.pay_traffic(len(data))

    async def _receive_any(self) -> M | None:
        """Return the next message, None at the end. Raises NetworkError and RemoteProtocolError."""
        while not self._received:
            self.yields_at_s = trio.current_time() + PATIENCE_S
            with trio.move_on_after(SILENCE_S) as scope:
                data = await self._stream.receive_some()
            if scope.cancelled_caught:
                raise SilentPeerError(f"no message within {SILENCE_S:g} s")
            self.yields_at_s = None
            self._received += self._connection.receive_data(data)
            if not data:
                return None
        return self._received.popleft()

    async def _receive(self, expected: type[_E]) -> _E:
        """Return the next message, which by the state of the connection has this type. Raises as `_receive_any`."""
        message = await self._receive_any()
        if not isinstance(message, expected):
            raise NetworkError("the peer ended the session")
        return message


class Responder(Session[M | Busy, S]):
    """The side of a session that the other side began, and that may refuse it."""

    async def refuse(self, retry_s: int) -> None:
        """Refuse the session: the initiator may retry after this many seconds."""
        if await self._receive_any() is not None:
            await self._send(Busy(retry_s=retry_s))
