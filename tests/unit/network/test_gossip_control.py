"""Control messages of gossip: what a neighbour may make us dial, remember and send by them."""

import hashlib
import time
from collections.abc import Callable

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from libp2p.peer.peerstore import create_signed_peer_record
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from node.network.gossip import MAX_BACK_OFF_S, Router
from node.network.host import Libp2pNetwork
from node.network.interface import PeerConnected, PeerDisconnected, Stream

from .conftest import limited, until
from .hosts import TOPIC, our_host

PRUNED = [f"invented/{number}" for number in range(500)]


async def say(stream: Stream, rpc: rpc_pb2.RPC) -> None:
    await stream.send_all(encode_varint_prefixed(rpc.SerializeToString()))


def prunes(topics: list[str], backoff: int = 60) -> rpc_pb2.RPC:
    rpc = rpc_pb2.RPC()
    for topic in topics:
        rpc.control.prune.add(topicID=topic, backoff=backoff)
    return rpc


def router_of(host: Libp2pNetwork) -> Router:
    assert host._gossip._pubsub is not None
    router = host._gossip._pubsub.router
    assert isinstance(router, Router)
    return router


def back_off_of(host: Libp2pNetwork, peer: Libp2pNetwork) -> Callable[[], int]:
    """Return what reads the end of a peer's backoff in our topic: whatever was sent before a PRUNE was handled then."""
    return lambda: router_of(host).back_off.get(TOPIC, {}).get(ID.from_base58(peer.peer_id), 0)


async def test_nobody_is_dialled_because_a_prune_names_it() -> None:
    victim, hostile = our_host(1), our_host(2)
    dialled: list[object] = []

    async def third_party(stream: trio.SocketStream) -> None:
        dialled.append(await stream.receive_some())

    with limited(20):
        async with victim.running(), hostile.running(), trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, third_party, [listener])
            port = listener.socket.getsockname()[1]
            await hostile.connect(victim.multiaddrs[0])
            stream = await hostile.open_stream(victim.peer_id, "/meshsub/1.1.0")
            exchange = prunes([TOPIC])
            for number in range(16):
                pair = create_new_key_pair(bytes([number]) * 32)
                peer = ID.from_pubkey(pair.public_key)
                record = create_signed_peer_record(peer, [Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")], pair.private_key)
                exchange.control.prune[0].peers.add(peerID=peer.to_bytes(), signedPeerRecord=record.marshal_envelope())
            await say(stream, exchange)
            await say(stream, prunes([TOPIC], 200))
            # The library dials before it handles the next message.
            await until(lambda: back_off_of(victim, hostile)() > time.time() + 100)
            assert dialled == []
            nursery.cancel_scope.cancel()


async def test_prunes_and_ihaves_of_invented_topics_leave_nothing_behind() -> None:
    victim, hostile = our_host(1), our_host(2)
    with limited(20):
        async with victim.running(), hostile.running():
            await hostile.connect(victim.multiaddrs[0])
            stream = await hostile.open_stream(victim.peer_id, "/meshsub/1.1.0")
            invented = prunes(PRUNED[:300])
            for topic in PRUNED[:50]:
                invented.control.ihave.add(topicID=topic, messageIDs=[b"\0"])
            await say(stream, invented)
            await say(stream, prunes([TOPIC], 10**9))
            read = back_off_of(victim, hostile)
            await until(read)
            router = router_of(victim)
            assert set(router.back_off) == {TOPIC}
            assert read() <= time.time() + MAX_BACK_OFF_S
            assert not set(PRUNED) & set(router.ihave_message_limits[ID.from_base58(hostile.peer_id)])


async def test_flood_of_control_messages_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.gossip.MAX_RATE_HZ", 5.0)
    monkeypatch.setattr("node.network.gossip.DISCONNECT_DEBT", 400)
    victim, hostile = our_host(1), our_host(2)
    with limited(20):
        async with victim.running(), hostile.running(), victim.events() as events:
            await hostile.connect(victim.multiaddrs[0])
            assert await anext(events) == PeerConnected(hostile.peer_id)
            stream = await hostile.open_stream(victim.peer_id, "/meshsub/1.1.0")
            await say(stream, prunes(PRUNED))
            assert await anext(events) == PeerDisconnected(hostile.peer_id)


async def test_backoff_is_forgotten_once_it_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    victim, neighbour = our_host(1), our_host(2)
    with limited(20):
        async with victim.running(), neighbour.running():
            await neighbour.connect(victim.multiaddrs[0])
            stream = await neighbour.open_stream(victim.peer_id, "/meshsub/1.1.0")
            await say(stream, prunes([TOPIC], 20))
            await until(back_off_of(victim, neighbour))
            await neighbour.disconnect(victim.peer_id)
            now_s = time.time()
            monkeypatch.setattr("node.network.gossip.time.time", lambda: now_s + 30)
            await until(lambda: not router_of(victim).back_off[TOPIC])


async def test_every_message_is_sent_of_a_burst_that_is_requested_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    victim = our_host(1)
    neighbour = ID(hashlib.sha256(b"one").digest())
    sent: list[bytes] = []
    with limited(20):
        async with victim.running():
            router = router_of(victim)
            for index in range(30):
                await victim.publish(TOPIC, bytes([index]))
            monkeypatch.setattr(router, "send_rpc", lambda peer, rpc: sent.extend(each.data for each in rpc.publish))
            for message_id in list(router.mcache.msgs):
                await router.handle_iwant(rpc_pb2.ControlIWant(messageIDs=[message_id.hex().encode()]), neighbour)
            assert sorted(sent) == [bytes([index]) for index in range(30)]
            assert router.scorer.of(neighbour) == 0


async def test_message_is_sent_once_however_often_it_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    victim = our_host(1)
    sent: list[int] = []
    with limited(20):
        async with victim.running():
            router = router_of(victim)
            await victim.publish(TOPIC, b"a message")
            (message_id,) = router.mcache.msgs
            monkeypatch.setattr(router, "send_rpc", lambda peer, rpc: sent.append(len(rpc.publish)))
            forms = (message_id, message_id.hex().encode(), message_id.hex().upper().encode())
            for neighbour in (b"one", b"one", b"other"):
                iwant = rpc_pb2.ControlIWant(messageIDs=forms * 300)
                await router.handle_iwant(iwant, ID(hashlib.sha256(neighbour).digest()))
            assert sent == [1, 1]
            while router.mcache.msgs:
                router.mcache.shift()
            router.mesh_heartbeat()
            assert not router._sent_to
