"""AutoNAT v2: whether an address of a node can be dialled from elsewhere, by asking other peers to dial it.

The server dials the first address that it is willing to dial, from a port of its own choice and under an identity that
is good for nothing else: so no hole that the client has opened for the server lets the connection in. The client
believes a success only where the number that it chose has arrived over a connection that somebody opened to it since.
"""

import logging
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio
from cachetools import LRUCache
from libp2p.abc import INetConn, INetStream, IRawConnection
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, origin, parse_address
from node.network.autonat_messages import (
    DIAL_BACK_PROTOCOL,
    DIAL_REQUEST_PROTOCOL,
    MAX_DIAL_DATA_BYTES,
    AutonatMessage,
    DialBack,
    DialBackResponse,
    DialBackStatus,
    DialDataRequest,
    DialDataResponse,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
)
from node.network.guarded_host import GuardedHost
from node.network.message_stream import MessageStream
from node.network.protobuf import MalformedMessage
from node.network.transport import TcpStream, reason, secure_upgrader
from node.network.yamux import Yamux
from node.util.token_bucket import Allowance, TokenBucket

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S: Final = 5.0
REQUEST_TIMEOUT_S: Final = 15.0
MAX_ADDRESSES: Final = 8

REQUESTS_PER_S: Final = 1.0
REQUESTS_BURST: Final = 16
ORIGIN_REQUESTS_PER_S: Final = 0.1
ORIGIN_REQUESTS_BURST: Final = 6
MAX_AT_ONCE: Final = 8
MAX_AT_ONCE_PER_ORIGIN: Final = 2

DIAL_DATA_BYTES: Final = (30_000, 100_000)
"""The price of a dial to an address that is not the client's own: more than a handshake costs its victim."""

MAX_DIAL_DATA_TOTAL: Final = 100 << 10
"""What this node pays at most for a dial,"""
PAID: Final = Allowance(per_s=(2 << 20) / 3600, burst=2 << 20)
"""and in an hour: which of its addresses others see, others say."""


class AutonatServer:
    """Dials others, within limits."""

    def __init__(self, host: GuardedHost, kinds: Callable[[], set[str]]) -> None:
        """`kinds`: of the addresses that this machine can dial, ip4 and ip6."""
        self._host = host
        self._kinds = kinds
        self._rate = TokenBucket(REQUESTS_PER_S, REQUESTS_BURST, trio.current_time())
        self._origin_rates: LRUCache[str, TokenBucket] = LRUCache(1024)
        self._from_origin: Counter[str] = Counter()
        """Requests under way."""
        self._upgrader = secure_upgrader(create_new_key_pair(os.urandom(32)))

    async def handle(self, stream: INetStream) -> None:
        """Serve one dial request."""
        async with MessageStream(stream) as messages:
            with trio.fail_after(REQUEST_TIMEOUT_S + DIAL_TIMEOUT_S):
                request = (await messages.receive(AutonatMessage)).dial_request
                if request is None:
                    raise MalformedMessage("expected a dial request")
                response = await self._serve(messages, request)
                await messages.send(AutonatMessage(dial_response=response))

    async def _serve(self, messages: MessageStream, request: DialRequest) -> DialResponse:
        # By origin: identities cost nothing.
        host = messages.connection.host
        client = None if host is None or messages.connection.relay is not None else origin(host)
        if client is None or self._from_origin[client] >= MAX_AT_ONCE_PER_ORIGIN or not self._admits(client):
            return DialResponse(status=ResponseStatus.E_REQUEST_REJECTED)
        self._from_origin[client] += 1
        try:
            return await self._dial(messages, request)
        finally:
            self._from_origin[client] -= 1
            self._from_origin += Counter()  # drops those without any

    def _admits(self, client: str) -> bool:
        """Take a request out of the rations of its origin and of all."""
        now_s = trio.current_time()
        full = TokenBucket(ORIGIN_REQUESTS_PER_S, ORIGIN_REQUESTS_BURST, now_s)
        bucket = self._origin_rates.setdefault(client, full)
        return self._from_origin.total() < MAX_AT_ONCE and bucket.take(1, now_s) and self._rate.take(1, now_s)

    async def _dial(self, messages: MessageStream, request: DialRequest) -> DialResponse:
        client_host = messages.connection.host
        for index, data in enumerate(request.addrs[:MAX_ADDRESSES]):
            address = _parse(data)
            if address is None or address.kind not in self._kinds():
                continue
            if address.host != client_host:
                if not address.is_public:
                    continue
                await _charge(messages, index)
            outcome = await self._dial_back(address, messages.connection.peer_id, request.nonce or 0)
            return DialResponse(status=ResponseStatus.OK, addr_index=index, dial_status=outcome)
        return DialResponse(status=ResponseStatus.E_DIAL_REFUSED)

    async def _dial_back(self, address: TcpAddress, peer_id: ID, nonce: int) -> DialStatus:
        outcome = DialStatus.E_DIAL_ERROR
        with trio.move_on_after(DIAL_TIMEOUT_S):
            try:
                stream = TcpStream(await trio.open_tcp_stream(address.host, address.port))
                try:
                    muxed = await self._secured(RawConnection(stream, initiator=True), peer_id)
                    outcome = DialStatus.E_DIAL_BACK_ERROR
                    await _tell(muxed, nonce)
                    outcome = DialStatus.OK
                finally:
                    await trio.aclose_forcefully(stream.socket_stream)
            except Exception as error:  # noqa: BLE001  # a dozen types for a dial that failed
                logger.debug("dial-back to %s: %s", address.transport, reason(error))
        return outcome

    async def _secured(self, raw: IRawConnection, peer_id: ID) -> Yamux:
        secured = await self._upgrader.upgrade_security(self._host.swarm.protected(raw), True, peer_id)
        muxed = await self._upgrader.upgrade_connection(secured, peer_id)
        assert isinstance(muxed, Yamux)
        return muxed


async def _tell(muxed: Yamux, nonce: int) -> None:
    """Send a dial-back over a connection of its own; return when the client has received it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxed.start)
        stream = await muxed.open_stream()
        await MultiselectClient().select_one_of([TProtocol(DIAL_BACK_PROTOCOL)], MultiselectCommunicator(stream))
        messages = MessageStream(stream)
        await messages.send(DialBack(nonce=nonce))
        messages.muxed.close_now(discard=False)
        await messages.receive(DialBackResponse)
        nursery.cancel_scope.cancel()


async def _charge(messages: MessageStream, index: int) -> None:
    """Have a client send so much that nobody uses this node to have others dialled."""
    price = random.randint(*DIAL_DATA_BYTES)
    await messages.send(AutonatMessage(dial_data_request=DialDataRequest(addr_index=index, byte_count=price)))
    while price > 0:
        part = (await messages.receive(AutonatMessage)).dial_data_response
        if part is None or not part.data:
            raise MalformedMessage("expected dial data")
        price -= len(part.data)


def _parse(data: bytes) -> TcpAddress | None:
    try:
        address = parse_address(str(Multiaddr(data)))
    except Exception:  # noqa: BLE001  # the bytes are a peer's, and the codecs raise what they like
        return None
    return address if address.relay is None and address.port else None


class AutonatClient:
    """Asks others to dial this node."""

    def __init__(self, host: GuardedHost) -> None:
        self._host = host
        self._requests: dict[int, _Request] = {}
        """Those under way, by the number that has to arrive."""
        self._paid = PAID.bucket(trio.current_time())

    async def check(self, server: INetConn, addresses: Sequence[TcpAddress]) -> tuple[TcpAddress, bool] | None:
        """Return the address that a server has dialled, and whether it reached us; None where it dialled none."""
        nonce = secrets.randbits(64)
        request = self._requests[nonce] = _Request(trio.current_time())
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                stream = await self._host.open_stream_on(server, DIAL_REQUEST_PROTOCOL)
                async with MessageStream(stream) as messages:
                    response = await self._ask(messages, addresses, nonce)
        except Exception as error:  # noqa: BLE001  # the server's answer, or that it does not speak the protocol
            logger.debug("no dial-back from %s: %s", server.muxed_conn.peer_id, reason(error))
            return None
        finally:
            del self._requests[nonce]
        index = response.addr_index or 0
        if response.status is not ResponseStatus.OK or index >= len(addresses):
            return None
        if response.dial_status is DialStatus.OK and request.arrived:
            return addresses[index], True
        return (addresses[index], False) if response.dial_status is DialStatus.E_DIAL_ERROR else None

    async def _ask(self, messages: MessageStream, addresses: Sequence[TcpAddress], nonce: int) -> DialResponse:
        binary = tuple(Multiaddr(address.transport).to_bytes() for address in addresses)
        await messages.send(AutonatMessage(dial_request=DialRequest(addrs=binary, nonce=nonce)))
        left = MAX_DIAL_DATA_TOTAL
        while True:
            message = await messages.receive(AutonatMessage)
            if message.dial_response is not None:
                return message.dial_response
            wanted = message.dial_data_request.byte_count if message.dial_data_request is not None else None
            if wanted is None or wanted > left or not self._paid.take(wanted, trio.current_time()):
                raise MalformedMessage("the server asks too much")
            left -= wanted
            part = AutonatMessage(dial_data_response=DialDataResponse(data=bytes(MAX_DIAL_DATA_BYTES)))
            for _ in range(-(-wanted // MAX_DIAL_DATA_BYTES)):
                await messages.send(part)

    async def handle_dial_back(self, stream: INetStream) -> None:
        """Take a dial-back.

        Only over a connection that the server has dialled for it: on one that was there before, on a circuit, or
        through a hole that we have opened for it, it could tell the number without having reached any address of ours.
        """
        async with MessageStream(stream) as messages:
            with trio.fail_after(DIAL_TIMEOUT_S):
                request = self._requests.get((await messages.receive(DialBack)).nonce or 0)
                over = messages.connection
                if request is None or over.established_s < request.asked_s:
                    raise MalformedMessage("a dial-back that nobody asked for")
                if over.is_initiator or over.relay is not None or over.punched:
                    raise MalformedMessage("a dial-back over a connection that was not dialled for it")
                request.arrived = True
                await messages.send(DialBackResponse(status=DialBackStatus.OK))


@dataclass(slots=True)
class _Request:
    """A request under way: when it began, and whether its number has arrived."""

    asked_s: float
    arrived: bool = False
