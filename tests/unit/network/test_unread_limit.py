"""What peers send and nobody reads: it takes a bounded part of the memory."""

from contextlib import suppress

import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError, PeerDisconnected, Stream
from node.network.limits import NetworkLimits
from node.network.yamux_stream import INITIAL_WINDOW_BYTES

from .conftest import limited, until
from .hosts import assert_serves, our_host

SENT = INITIAL_WINDOW_BYTES - 1024
"""What is left of a window after the negotiation, nearly."""


def unread_by(host: Libp2pNetwork) -> int:
    assert host._swarm is not None
    return sum(each.unread_bytes() for each in host._swarm.multiplexers())


async def test_what_arrives_after_an_identify_request_was_answered_is_discarded() -> None:
    victim, hostile = our_host(1), our_host(2)
    with limited(30):
        async with victim.running(), hostile.running():
            await hostile.connect(victim.multiaddrs[0])
            host = hostile._host
            assert host is not None
            for _ in range(10):
                stream = await host.new_stream(ID.from_base58(victim.peer_id), [TProtocol("/ipfs/id/1.0.0")])
                assert await stream.read(), "its answer arrives"
                with suppress(Exception):  # the stream is reset once something arrives
                    await stream.write(bytes(SENT))
            await assert_serves(victim)
            assert unread_by(victim) == 0


async def test_connection_with_most_unread_bytes_is_broken() -> None:
    limits = NetworkLimits(max_unread_bytes=4 * SENT)
    victim, hostile, honest = our_host(1, limits=limits), our_host(2), our_host(3)

    async def read_nothing(stream: Stream) -> None:
        await trio.sleep_forever()

    victim.set_stream_handler("/test/unread/1", read_nothing)
    with limited(30):
        async with victim.running(), hostile.running(), honest.running(), victim.events() as events:
            kept = []
            for visitor, streams in ((honest, 1), (hostile, 5)):
                await visitor.connect(victim.multiaddrs[0])
                for _ in range(streams):
                    stream = await visitor.open_stream(victim.peer_id, "/test/unread/1")
                    kept.append(stream)
                    with suppress(NetworkError):  # it may be over already
                        await stream.send_all(bytes(SENT))
            async for event in events:
                if isinstance(event, PeerDisconnected):
                    assert event.peer == hostile.peer_id
                    break
            assert victim.connected_peers() == (honest.peer_id,)
            await until(lambda: unread_by(victim) == SENT)


async def test_tiny_frames_are_gathered() -> None:
    victim, hostile = our_host(1), our_host(2)
    read = trio.Event()
    received = bytearray()

    async def read_late(stream: Stream) -> None:
        await read.wait()
        while data := await stream.receive_some():
            received.extend(data)

    victim.set_stream_handler("/test/unread/1", read_late)
    with limited(30):
        async with victim.running(), hostile.running():
            await hostile.connect(victim.multiaddrs[0])
            stream = await hostile.open_stream(victim.peer_id, "/test/unread/1")
            sent = bytes(range(200)) * 2
            for each in sent:
                await stream.send_all(bytes([each]))
            await until(lambda: unread_by(victim) == len(sent))
            assert victim._swarm is not None
            streams = [each for muxed in victim._swarm.multiplexers() for each in muxed._streams.values()]
            assert max(len(each.chunks) for each in streams) == 1
            read.set()
            await until(lambda: bytes(received) == sent)
