"""The library's host, such that nothing a peer does ends the process or locks others out.

Subclasses and wrappers, no patches. README.md in this folder lists each fault with its cure and its test.
"""

import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio
from cachetools import TTLCache
from libp2p.abc import INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.defaults import get_default_protocols
from libp2p.host.observed_addr_manager import ObservedAddrManager
from libp2p.identity.identify.identify import ID as IDENTIFY_PROTOCOL
from libp2p.identity.identify.identify import _mk_identify_protobuf, _remote_address_to_multiaddr
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.identity.identify_push import update_peerstore_from_identify
from libp2p.identity.identify_push.identify_push import ID_PUSH as IDENTIFY_PUSH_PROTOCOL
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.tools.anyio_service import Service
from libp2p.tools.anyio_service.trio_manager import TrioManager
from libp2p.utils.varint import encode_varint_prefixed, read_length_prefixed_protobuf
from multiaddr import Multiaddr

from node.network.guarded_swarm import GuardedSwarm
from node.network.yamux import Yamux
from node.network.yamux_stream import YamuxStream, shielded

logger = logging.getLogger(__name__)

RESTART_DELAY_S: Final = 1.0
ADDRESS_CACHE_S: Final = 10.0
REQUEST_TIMEOUT_S: Final = 30.0
"""How long a peer may occupy one of the library's handlers of short requests."""
MAX_REQUESTS_PER_PEER: Final = 16
IDENTIFY_TIMEOUT_S: Final = 10.0
IDENTIFY_PAUSE_S: Final = 5.0
"""Pause before a peer is asked once more that did not answer."""
IDENTIFY_AGAIN: Final = "again"

StreamHandler = Callable[[INetStream], Awaitable[None]]
AsyncFunction = Callable[..., Awaitable[Any]]


def isolate_errors(handler: StreamHandler) -> StreamHandler:
    """Wrap a stream handler so that it raises nothing but Cancelled: an error costs the stream."""

    async def isolated(stream: INetStream) -> None:
        try:
            await handler(stream)
        except Exception as error:  # noqa: BLE001  # a peer's bytes reach every decoder of the library through here
            logger.debug("a stream of %s failed: %r", stream.muxed_conn.peer_id, error)
            await reset(stream)

    return isolated


def limit_requests(handler: StreamHandler) -> StreamHandler:
    """Wrap a handler of short requests with limits for each peer: duration and concurrency."""
    busy: Counter[ID] = Counter()

    async def limited(stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        if busy[peer] >= MAX_REQUESTS_PER_PEER:
            await reset(stream)
            return
        busy[peer] += 1
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                await handler(stream)
            # The library leaves the other half open: what a peer still sends would wait unread.
            muxed = getattr(stream, "muxed_stream", None)
            if isinstance(muxed, YamuxStream):
                muxed.close_now(discard=True)
        finally:
            busy[peer] -= 1
            if not busy[peer]:
                del busy[peer]

    return limited


async def reset(stream: INetStream) -> None:
    """Reset a stream, whatever state the library believes it to be in."""
    with shielded(1):
        muxed = getattr(stream, "muxed_stream", None)
        if isinstance(muxed, YamuxStream):
            muxed.reset_now()
        await stream.reset()


class GuardedManager(TrioManager):
    """Runs a service of the library whose background tasks may fail without ending the process.

    The library ends a service, and with it the program, on the first exception of any of its tasks, and many of them
    handle peers' data. Here a short task that fails is dropped, and a daemon task is restarted.
    """

    def run_task(
        self,
        async_fn: AsyncFunction,
        *args: Any,
        daemon: bool = False,
        name: str | None = None,
        _internal: bool = False,
    ) -> None:
        """Start a task in the nursery of the service."""
        if self._task_nursery is None or not self.is_running:
            return  # the service is ending
        guard = self._run_restarting if daemon else self._run_once
        run = async_fn if _internal else partial(guard, async_fn)
        self._task_nursery.start_soon(run, *args, name=name or getattr(async_fn, "__qualname__", None))

    def run_daemon_task(self, async_fn: AsyncFunction, *args: Any, name: str | None = None) -> None:
        """Start a task that should never return."""
        self.run_task(async_fn, *args, daemon=True, name=name)

    async def _run_once(self, async_fn: AsyncFunction, *args: Any) -> None:
        try:
            await async_fn(*args)
        except Exception as error:  # what a peer sent made a task of the library fail
            logger.debug("%s: a task failed: %r", self._service, error, exc_info=True)

    async def _run_restarting(self, async_fn: AsyncFunction, *args: Any) -> None:
        while not self.is_cancelled:
            try:
                await async_fn(*args)
            except Exception as error:  # as above
                logger.warning("%s: a task failed and is restarted: %r", self._service, error, exc_info=True)
            await trio.sleep(RESTART_DELAY_S)


async def start_service(nursery: trio.Nursery, service: Service) -> None:
    """Run a service of the library in the nursery; return when it has started."""
    manager = GuardedManager(service)
    service._manager = manager  # noqa: SLF001  # as the library's own background_trio_service does
    nursery.start_soon(manager.run)
    await manager.wait_started()


class GuardedHost(BasicHost):
    """The library's host, with identify requests in our nursery: it would start them outside of every nursery."""

    def __init__(
        self,
        swarm: GuardedSwarm,
        nursery: trio.Nursery,
        advertised: Callable[[], list[str]],
        observed: ObservedAddrManager | None = None,
    ) -> None:
        """`advertised`: our addresses without our id. `observed` takes those that peers see us at."""
        self.swarm = swarm
        self._nursery = nursery
        self._advertised = advertised
        self._identified: dict[ID, trio.Event] = {}
        self._addresses: TTLCache[None, list[Multiaddr]] = TTLCache(1, ADDRESS_CACHE_S, trio.current_time)
        protocols = get_default_protocols(self)
        protocols[IDENTIFY_PROTOCOL] = self._tell_identity
        for protocol in (IDENTIFY_PROTOCOL, IDENTIFY_PUSH_PROTOCOL):
            protocols[protocol] = limit_requests(protocols[protocol])
        super().__init__(swarm, default_protocols=protocols, disable_identify_address_discovery=True)
        self._observed_addr_manager = observed
        swarm.set_stream_handler(isolate_errors(self._swarm_stream_handler))

    def get_addrs(self) -> list[Multiaddr]:
        """Return the addresses we advertise. The library asks for them with every message that it sends."""
        if (addresses := self._addresses.get(None)) is None:
            own = self.get_id()
            # The library's own would make the address of a circuit one of the relay itself.
            addresses = [Multiaddr(f"{address}/p2p/{own}") for address in self._advertised()]
            self._addresses[None] = addresses
        return list(addresses)

    def addresses_changed(self) -> None:
        """Advertise other addresses from now on."""
        self._addresses.clear()

    async def open_stream_on(self, connection: INetConn, protocol: str) -> INetStream:
        """Open a stream on this very connection, where the library would choose one, or dial."""
        stream = await connection.new_stream()
        try:
            communicator = MultiselectCommunicator(stream)
            await self.multiselect_client.select_one_of([TProtocol(protocol)], communicator)
        except BaseException:
            await reset(stream)
            raise
        stream.set_protocol(TProtocol(protocol))
        return stream

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        connection = self.swarm.best_connection(peer_id)
        if peer_id == self.get_id() or peer_id in self._identify_inflight or connection is None:
            return
        # Each connection: over another one the peer may see us elsewhere, and over a circuit it does not see us.
        if isinstance(connection.muxed_conn, Yamux) and not connection.muxed_conn.identified:
            connection.muxed_conn.identified = True
            self._identify_inflight.add(peer_id)
            self._nursery.start_soon(self._identify_quietly, peer_id, connection.muxed_conn, reason)

    async def _tell_identity(self, stream: INetStream) -> None:
        """Answer an identify request.

        The library's own tells no peer where it is seen that has a circuit besides a direct connection.
        """
        muxed = stream.muxed_conn
        seen_at = _remote_address_to_multiaddr(muxed.get_remote_address() if isinstance(muxed, Yamux) else None)
        await stream.write(encode_varint_prefixed(_mk_identify_protobuf(self, seen_at).SerializeToString()))
        await stream.close()

    async def _identify_quietly(self, peer_id: ID, over: Yamux, why: str) -> None:
        """Ask a peer, once more where it did not answer, and over a connection that opened in the meantime."""
        next_reason = why
        try:
            await self._identify_task_entry(peer_id, why)
        except Exception as error:  # noqa: BLE001  # a peer's answer, through the library's decoders
            logger.debug("identify of %s failed: %r", peer_id, error)
            over.identified, next_reason = False, IDENTIFY_AGAIN
        finally:
            if (event := self._identified.pop(peer_id, None)) is not None:
                event.set()
        if not over.identified:
            best = self.swarm.best_connection(peer_id)
            if why == IDENTIFY_AGAIN and best is not None and best.muxed_conn is over:
                return
            await trio.sleep(IDENTIFY_PAUSE_S)
        self._schedule_identify(peer_id, reason=next_reason)

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        """Ask a peer who it is and where it sees us, over the connection that new streams take.

        The library's own credits the answer to the peer's first connection, whichever it came over.
        """
        connection = self.swarm.best_connection(peer_id)
        if connection is None:
            return
        with trio.fail_after(IDENTIFY_TIMEOUT_S):
            stream = await self.open_stream_on(connection, IDENTIFY_PROTOCOL)
            try:
                answer = Identify.FromString(await read_length_prefixed_protobuf(stream))
            finally:
                await reset(stream)
        await update_peerstore_from_identify(self.get_peerstore(), peer_id, answer)
        if answer.observed_addr and self._observed_addr_manager is not None:
            self._observed_addr_manager.record_observation(connection, Multiaddr(answer.observed_addr), [])

    async def wait_identified(self, peer_id: ID) -> None:
        """Wait until an identify request to a peer has ended; the caller bounds it."""
        event = self._identified.setdefault(peer_id, trio.Event())
        try:
            await event.wait()
        finally:
            if self._identified.get(peer_id) is event and not event.statistics().tasks_waiting:
                del self._identified[peer_id]  # nobody may ever identify it


def silence_library_log() -> None:
    """Silence the library's log, which reports ordinary peer behaviour as warnings and errors.

    Set LIBP2P_DEBUG to see it. The root logger gets a handler, if it has none, because the library logs through it too,
    and a first call would install one that writes to the terminal.
    """
    if not os.environ.get("LIBP2P_DEBUG"):
        logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)
    if not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())
