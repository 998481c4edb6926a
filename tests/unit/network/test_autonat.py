"""AutoNAT v2 over loopback: a server dials what it is asked to, and the client believes only what has arrived."""

from typing import Any

from libp2p.abc import INetConn
from libp2p.peer.id import ID

from node.network.addresses import parse_address
from node.network.autonat import PEER_REQUESTS_BURST, AutonatClient
from node.network.host import Libp2pNetwork
from protocol.identity import PeerId

from .conftest import limited, until

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KEY = "5a" * 32


def host(number: int, **arguments: Any) -> Libp2pNetwork:
    return Libp2pNetwork(number.to_bytes(32, "big"), listen=[LOOPBACK], **arguments)


def connection(network: Libp2pNetwork, peer: PeerId) -> INetConn:
    assert network._swarm is not None
    return network._swarm.live_connections(ID.from_base58(peer))[0]


async def check(client: Libp2pNetwork, server: Libp2pNetwork, address: str) -> bool | None:
    """Have a server dial an address of a client; return whether it was reached, None where nothing was dialled."""
    assert client._host is not None
    autonat = AutonatClient(client._host)
    client._host.set_stream_handler("/libp2p/autonat/2/dial-back", autonat.handle_dial_back)  # type: ignore[arg-type]
    found = await autonat.check(connection(client, server.peer_id), [parse_address(address)])
    return None if found is None else found[1]


async def test_server_tells_whether_an_address_can_be_dialled() -> None:
    for key in (None, KEY):
        client, server = host(1, swarm_key=key), host(2, swarm_key=key)
        with limited(20):
            async with client.running(), server.running():
                await client.connect(server.multiaddrs[0])
                own = client.multiaddrs[0].rpartition("/p2p/")[0]
                assert await check(client, server, own) is True
                assert await check(client, server, "/ip4/127.0.0.1/tcp/9") is False
                # Another peer answers there.
                assert await check(client, server, server.multiaddrs[0].rpartition("/p2p/")[0]) is False


async def test_server_dials_no_private_address_but_the_clients_own() -> None:
    client, server = host(1), host(2)
    with limited(20):
        async with client.running(), server.running():
            await client.connect(server.multiaddrs[0])
            assert await check(client, server, "/ip4/10.1.2.3/tcp/4001") is None


async def test_server_limits_requests() -> None:
    client, server = host(1), host(2)
    with limited(20):
        async with client.running(), server.running():
            await client.connect(server.multiaddrs[0])
            answers = [await check(client, server, "/ip4/127.0.0.1/tcp/9") for _ in range(int(PEER_REQUESTS_BURST) + 1)]
            assert answers == [False] * int(PEER_REQUESTS_BURST) + [None]


async def test_dial_back_leaves_no_connection_behind() -> None:
    client, server = host(1), host(2)
    with limited(20):
        async with client.running(), server.running():
            await client.connect(server.multiaddrs[0])
            await check(client, server, client.multiaddrs[0].rpartition("/p2p/")[0])
            await until(lambda: client.connected_peers() == (server.peer_id,))
