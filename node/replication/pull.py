"""Sessions with neighbours, by which peers fetch what gossip lost: whom to ask, and bounds on what others ask of us."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import trio

from node.network.interface import Network, NetworkError, PeerConnected, Stream
from node.replication.peer_limits import LimitedPeer, PeerLimits
from node.replication.session import Responder, Session, SessionOutcome, SilentPeerError, Throttle
from node.storage.database import StorageError
from node.util.token_bucket import Allowance
from protocol.errors import RemoteProtocolError
from protocol.identity import PeerId

BUSY_S: Final = 3
"""Pause that a refused initiator is asked for."""

SESSIONS_PER_PEER: Final = 2
"""Sessions of one peer that are served at a time."""

SILENCE_COST: Final = 60
"""Sessions that a silent one costs its peer: it may not begin the next ones for a while."""

YIELDING_COST: Final = 6
"""The same of one that gave its place to a newcomer: its peer may just have been slow."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullLimits:
    """Bounds of the sessions of one protocol. Work is measured in signatures verified, about 0.1 ms each."""

    pull_work: Allowance = field(default=Allowance(4000, 64_000))
    """For records that we requested. A newcomer verifies most of a history at once."""
    serve_work: Allowance = field(default=Allowance(2000, 4000))
    """For all sessions that others began, together."""
    traffic: Allowance = field(default=Allowance(4 << 20, 8 << 20))
    """Bytes sent in all sessions together."""
    served_sessions: int = 8
    session_timeout_s: float = 60.0
    catching_up: int | None = None
    """While a session of ours has brought this many records, others are refused: we lack too much ourselves."""


@dataclass(frozen=True, slots=True, eq=False)
class _Served:
    """A session that a peer began."""

    peer: PeerId
    session: Session[Any, Any]
    scope: trio.CancelScope


class PullService:
    """Begins and serves the sessions of one protocol, within rate limits, bans and backoff."""

    def __init__(
        self,
        network: Network,
        protocol: str,
        peer_limits: PeerLimits,
        limits: PullLimits,
        jitter: random.Random,
        *,
        respond: Callable[[Stream, Throttle], Responder[Any, Any]],
        on_outcome: Callable[[SessionOutcome], None] = lambda outcome: None,
    ) -> None:
        """Serve the protocol. `respond` makes the responder of a session; `on_outcome` is called after each session."""
        self._network = network
        self._protocol = protocol
        self._peer_limits = peer_limits
        self._limits = limits
        self._jitter = jitter
        self._respond = respond
        self._on_outcome = on_outcome
        self._pull_work = limits.pull_work.bucket(0.0)
        self._serve_work = limits.serve_work.bucket(0.0)
        self._traffic = limits.traffic.bucket(0.0)
        self._pulling: dict[PeerId, SessionOutcome] = {}
        self._served: list[_Served] = []
        self._preferred: dict[PeerId, int] = {}
        network.set_stream_handler(protocol, self._serve)

    @property
    def pulling(self) -> int:
        """Sessions that we began and that still run."""
        return len(self._pulling)

    def prefer(self, peer: PeerId, score: int = 1) -> None:
        """Choose a peer next, before those with a lower score."""
        self._preferred[peer] = score

    def choose_neighbour(self) -> PeerId | None:
        """Return the neighbour to begin a session with: the most preferred, else a random one, if any is ready."""
        now_s = trio.current_time()
        ready = [
            peer
            for peer in self._network.connected_peers()
            if peer not in self._pulling and self._peer_limits.of(peer, now_s).may_ask(now_s)
        ]
        if not ready:
            return None
        preferred = max(ready, key=lambda peer: self._preferred.get(peer, 0))
        return preferred if self._preferred.pop(preferred, 0) else self._jitter.choice(ready)

    async def pull(self, peer: PeerId, initiate: Callable[[Stream, Throttle], Session[Any, Any]]) -> SessionOutcome:
        """Run one session with a neighbour, and adapt its backoff or ban it; return the outcome, also of a failure."""
        outcome = self._pulling[peer] = SessionOutcome()
        throttle = Throttle(work=(self._pull_work,), traffic=(self._traffic,))
        try:
            with trio.move_on_after(self._limits.session_timeout_s):
                stream = await self._network.open_stream(peer, self._protocol)
                session = initiate(stream, throttle)
                outcome = self._pulling[peer] = session.outcome
                try:
                    await session.run()
                finally:
                    await stream.aclose()
        except RemoteProtocolError as error:
            self._peer_limits.ban(peer, trio.current_time(), str(error))
        except (NetworkError, StorageError) as error:
            _logger.debug("session failed", protocol=self._protocol, peer=peer, reason=str(error))
            self._peer_limits.of(peer, trio.current_time()).back_off(trio.current_time(), self._jitter)
        else:
            self._adapt_backoff(peer, outcome)
        finally:
            self._pulling.pop(peer, None)
            self._on_outcome(outcome)
        return outcome

    def _adapt_backoff(self, peer: PeerId, outcome: SessionOutcome) -> None:
        now_s = trio.current_time()
        limited = self._peer_limits.of(peer, now_s)
        if outcome.retry_s is not None:
            limited.retry_at_s = now_s + outcome.retry_s * self._jitter.uniform(1, 2)
        elif outcome.equal or outcome.received or outcome.sent:
            limited.reset_backoff()
        else:
            # Nothing can be exchanged although we differ: one side declines what the other has, or the peer lies.
            limited.back_off(now_s, self._jitter)

    async def watch_connections(self, on_connected: Callable[[PeerId], Awaitable[None]]) -> None:
        """Prefer new neighbours, which may have what a partition withheld, until cancelled."""
        async with self._network.events() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    self._preferred.setdefault(event.peer, 1)
                    await on_connected(event.peer)
                else:
                    self._preferred.pop(event.peer, None)

    async def _serve(self, stream: Stream) -> None:
        now_s = trio.current_time()
        peer = self._peer_limits.of(stream.peer, now_s)
        if peer.is_banned(now_s):
            await stream.reset()
            return
        throttle = Throttle(work=(peer.work, self._serve_work), traffic=(peer.traffic, self._traffic))
        session = self._respond(stream, throttle)
        try:
            with trio.move_on_after(self._limits.session_timeout_s) as scope:
                served = _Served(stream.peer, session, scope)
                if not self._admits(served, peer, now_s):
                    await session.refuse(BUSY_S)
                    return
                try:
                    await session.run()
                finally:
                    self._leave(served)
        except RemoteProtocolError as error:
            self._peer_limits.ban(stream.peer, trio.current_time(), str(error))
            await stream.reset()
        except (NetworkError, StorageError) as error:
            if isinstance(error, SilentPeerError):
                peer.sessions.spend(SILENCE_COST, trio.current_time())
            _logger.debug("served session failed", protocol=self._protocol, peer=stream.peer, reason=str(error))
        finally:
            self._on_outcome(session.outcome)

    def _admits(self, newcomer: _Served, peer: LimitedPeer, now_s: float) -> bool:
        """Return whether a session is served; it has a place then."""
        bound = self._limits.catching_up
        if bound is not None and any(each.received >= bound for each in self._pulling.values()):
            return False
        of_the_peer = sum(each.peer == newcomer.peer for each in self._served)
        if of_the_peer >= SESSIONS_PER_PEER or not peer.sessions.take(1, now_s):
            return False
        if len(self._served) >= self._limits.served_sessions and not self._end_silent_session(now_s):
            return False
        self._served.append(newcomer)
        return True

    def _end_silent_session(self, now_s: float) -> bool:
        """End the session whose peer is silent for longest, if it is for too long; return whether it is."""
        waiting = [(at_s, each) for each in self._served if (at_s := each.session.yields_at_s) is not None]
        at_s, longest = min(waiting, key=lambda pair: pair[0], default=(now_s, None))
        if longest is None or now_s < at_s:
            return False
        self._leave(longest)
        longest.scope.cancel()
        self._peer_limits.of(longest.peer, now_s).sessions.spend(YIELDING_COST, now_s)
        return True

    def _leave(self, served: _Served) -> None:
        if served in self._served:
            self._served.remove(served)
