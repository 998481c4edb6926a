"""The simulated network under a virtual clock: time, loss, faults, and the same trace for the same seed."""

import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from node.network.interface import Network, NetworkError, PeerConnected, PeerDisconnected, Stream, StreamClosed
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetwork, MemoryNetworkHub
from protocol.identity import PeerId, peer_id_from_public_key

from .conftest import echo, limited, receive_exactly

CLOCK = trio.testing.MockClock
ECHO = "/test/echo/1"
TOPIC = "test/topic"


def peer(number: int) -> PeerId:
    return peer_id_from_public_key(number.to_bytes(32, "big"))


def prepare(network: MemoryNetwork) -> MemoryNetwork:
    network.set_stream_handler(ECHO, echo)
    network.join_topic(TOPIC, lambda source, data: True)
    network.register_record("metaswarm", lambda key, value: True, lambda key, values: len(values) - 1)
    return network


async def start(stack: AsyncExitStack, hub: MemoryNetworkHub, count: int) -> list[MemoryNetwork]:
    """Run so many networks, each connected to up to three before it, for a virtual hour at most."""
    stack.enter_context(trio.fail_after(3600))
    networks = [prepare(hub.network(peer(number))) for number in range(count)]
    for index, network in enumerate(networks):
        await stack.enter_async_context(network.running())
        for neighbour in hub.rng.sample(range(index), min(3, index)):
            await network.connect(networks[neighbour].multiaddrs[0])
    return networks


async def test_round_trip_takes_twice_the_latency(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.1))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        stream = await a.open_stream(b.peer_id, ECHO)
        before = trio.current_time()
        await stream.send_all(b"x")
        await receive_exactly(stream, 1)
        assert trio.current_time() - before == pytest.approx(0.2)
        assert await a.ping(b.peer_id) == pytest.approx(0.2)


async def test_latency_may_depend_on_pair(virtual_clock: CLOCK) -> None:
    def latency(sender: PeerId, receiver: PeerId) -> float:
        return 1.0 if peer(2) in {sender, receiver} else 0.01

    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=latency))
    async with AsyncExitStack() as stack:
        a, b, c = await start(stack, hub, 3)
        assert await a.ping(b.peer_id) == pytest.approx(0.02)
        assert await a.ping(c.peer_id) == pytest.approx(2.0)


async def test_bandwidth_bounds_transfer(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.001, bandwidth=1e6))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        stream = await a.open_stream(b.peer_id, ECHO)
        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(1_000_000))
            await receive_exactly(stream, 1_000_000)
        assert 1 < trio.current_time() - before < 2


async def test_jitter_and_loss_delay_stream_without_reordering(virtual_clock: CLOCK) -> None:
    payload = random.Random(1).randbytes(1_000_000)
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.01, jitter_s=0.05, loss=0.2))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        stream = await a.open_stream(b.peer_id, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, payload)
            assert await receive_exactly(stream, len(payload)) == payload


async def test_streams_stall_during_partition_and_resume_after(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        stream = await a.open_stream(b.peer_id, ECHO)
        hub.partition([[a.peer_id], [b.peer_id]])
        await stream.send_all(b"across")
        with trio.move_on_after(15):
            raise AssertionError(await stream.receive_some())
        hub.heal()
        assert await receive_exactly(stream, 6) == b"across"


async def test_connections_time_out_in_long_partition(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        stream = await a.open_stream(b.peer_id, ECHO)
        async with a.events() as ours, b.events() as theirs:
            hub.partition([[a.peer_id]])
            with pytest.raises(StreamClosed):
                await stream.receive_some()
            assert await anext(ours) == PeerDisconnected(b.peer_id)
            assert await anext(theirs) == PeerDisconnected(a.peer_id)
            with pytest.raises(NetworkError, match="no answer within 5 s"):
                await a.open_stream(b.peer_id, ECHO)
            hub.heal()
            await a.open_stream(b.peer_id, ECHO)
            assert await anext(ours) == PeerConnected(b.peer_id)


async def test_gossip_and_dht_stay_within_partition(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0))
    async with AsyncExitStack() as stack:
        networks = await start(stack, hub, 6)
        for network in networks[1:]:
            await network.connect(networks[0].multiaddrs[0])
        near, far = networks[1], networks[5]
        async with near.subscribe(TOPIC) as heard_near, far.subscribe(TOPIC) as heard_far:
            hub.partition([[network.peer_id for network in networks[:3]]])
            await networks[0].publish(TOPIC, b"ours")
            assert (await anext(heard_near)).data == b"ours"
            await networks[0].put_record("/metaswarm/x", b"1")
            assert await near.get_record("/metaswarm/x") == b"1"
            assert await far.get_record("/metaswarm/x") is None
            hub.heal()
            assert await far.get_record("/metaswarm/x") == b"1"
            await networks[0].publish(TOPIC, b"all of us")
            assert (await anext(heard_far)).data == b"all of us"


async def test_stopped_peer_is_isolated_until_resumed(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        stream = await a.open_stream(b.peer_id, ECHO)
        hub.stop(b.peer_id)
        await stream.send_all(b"hello")
        with pytest.raises(NetworkError, match="no answer within 10 s"):
            await a.ping(b.peer_id)
        hub.resume(b.peer_id)
        assert await receive_exactly(stream, 5) == b"hello"


async def test_killed_peer_cancels_its_tasks_and_breaks_streams(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.05))
    survivor, victim = prepare(hub.network(peer(1))), prepare(hub.network(peer(2)))
    ended: list[str] = []

    async def live() -> None:
        async with victim.running():
            try:
                await trio.Event().wait()
            finally:
                ended.append("inside")
        ended.append("outside")

    with limited(3600):
        await _kill(hub, survivor, victim, live, ended)


async def _kill(
    hub: MemoryNetworkHub,
    survivor: MemoryNetwork,
    victim: MemoryNetwork,
    live: Callable[[], Awaitable[None]],
    ended: list[str],
) -> None:
    async with survivor.running(), survivor.events() as events, trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await trio.testing.wait_all_tasks_blocked()
        await survivor.connect(victim.multiaddrs[0])
        stream = await survivor.open_stream(victim.peer_id, ECHO)
        hub.kill(victim.peer_id)
        before = trio.current_time()
        with pytest.raises(StreamClosed):
            await stream.receive_some()
        assert trio.current_time() - before == pytest.approx(0.05)
        assert await anext(events) == PeerConnected(victim.peer_id)
        assert await anext(events) == PeerDisconnected(victim.peer_id)
        assert ended == ["inside", "outside"]
        with pytest.raises(NetworkError, match="refused"):
            await survivor.open_stream(victim.peer_id, ECHO)
        with pytest.raises(NetworkError, match="not running"):
            await victim.ping(survivor.peer_id)


async def test_killed_peer_can_restart(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        hub.kill(b.peer_id)
        reborn = prepare(hub.network(b.peer_id))
        async with reborn.running():
            await a.connect(reborn.multiaddrs[0])
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send_all(b"again")
            assert await receive_exactly(stream, 5) == b"again"


async def test_gossip_of_restarted_peer_is_not_a_duplicate(virtual_clock: CLOCK) -> None:
    hub = MemoryNetworkHub(random.Random(0))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        async with a.subscribe(TOPIC) as messages:
            await b.publish(TOPIC, b"before")
            assert (await anext(messages)).data == b"before"
            hub.kill(b.peer_id)
            reborn = prepare(hub.network(b.peer_id))
            async with reborn.running():
                await a.connect(reborn.multiaddrs[0])
                await reborn.publish(TOPIC, b"after")
                with trio.fail_after(1):
                    assert (await anext(messages)).data == b"after"


async def test_write_timeout_when_reader_takes_nothing(virtual_clock: CLOCK) -> None:
    async def stay(stream: Stream) -> None:
        await trio.sleep_forever()

    hub = MemoryNetworkHub(random.Random(0))
    async with AsyncExitStack() as stack:
        a, b = await start(stack, hub, 2)
        b.set_stream_handler("/test/stay/1", stay)
        stream = await a.open_stream(b.peer_id, "/test/stay/1")
        before = trio.current_time()
        with pytest.raises(StreamClosed, match="accepted nothing for 10 s"):
            await stream.send_all(bytes(1 << 20))
        assert trio.current_time() - before == pytest.approx(10, abs=0.1)


def run_seeded(scenario: Callable[[list[str]], Awaitable[None]]) -> str:
    trace: list[str] = []
    trio.run(scenario, trace, clock=trio.testing.MockClock(autojump_threshold=0))
    return hashlib.sha256("\n".join(trace).encode()).hexdigest()


async def churn(trace: list[str], seed: int, count: int = 30) -> None:
    """Let peers gossip, store, vanish and return on lossy links; write down what each of them sees."""
    hub = MemoryNetworkHub(random.Random(seed), LinkModel(latency_s=0.01, jitter_s=0.02, loss=0.05))

    async def listen(network: Network) -> None:
        async with network.subscribe(TOPIC) as messages:
            async for message in messages:
                trace.append(f"{trio.current_time():.9f} {network.peer_id[-6:]} {message.source[-6:]} {message.data!r}")

    async with AsyncExitStack() as stack:
        networks = await start(stack, hub, count)
        nursery = await stack.enter_async_context(trio.open_nursery())
        for network in networks:
            nursery.start_soon(listen, network)
            await trio.testing.wait_all_tasks_blocked()
        for turn in range(20):
            hub.stop(networks[turn].peer_id)
            await networks[turn - 1].publish(TOPIC, bytes([turn]))
            await networks[turn - 1].put_record(f"/metaswarm/{turn}", bytes([turn]))
            await trio.sleep(3)
            hub.resume(networks[turn].peer_id)
            trace.append(repr(await networks[-1].get_record(f"/metaswarm/{turn}")))
        nursery.cancel_scope.cancel()


def test_same_seed_gives_same_trace() -> None:
    def scenario(seed: int) -> Callable[[list[str]], Awaitable[None]]:
        return lambda trace: churn(trace, seed)

    assert run_seeded(scenario(1)) == run_seeded(scenario(1))
    assert run_seeded(scenario(1)) != run_seeded(scenario(2))


def test_gossip_and_dht_reach_three_hundred_peers() -> None:
    async def main() -> None:
        hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.02, jitter_s=0.02))
        heard: dict[PeerId, float] = {}

        async def listen(network: Network) -> None:
            async with network.subscribe(TOPIC) as messages:
                await anext(messages)
                heard[network.peer_id] = trio.current_time()

        async with AsyncExitStack() as stack:
            networks = await start(stack, hub, 300)
            async with trio.open_nursery() as nursery:
                for network in networks[1:]:
                    nursery.start_soon(listen, network)
                await trio.testing.wait_all_tasks_blocked()
                published = trio.current_time()
                await networks[0].publish(TOPIC, b"news")
            assert len(heard) == 299
            assert max(heard.values()) - published < 1
            await networks[7].put_record("/metaswarm/x", b"1")
            assert await networks[250].get_record("/metaswarm/x") == b"1"
            holders = [network for network in networks if "/metaswarm/x" in network.records]
            assert 20 <= len(holders) <= 22

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_dht_record_is_stored_at_nearest_peers() -> None:
    def ids(networks: Sequence[MemoryNetwork]) -> set[PeerId]:
        return {network.peer_id for network in networks}

    async def main() -> None:
        hub = MemoryNetworkHub(random.Random(0))
        async with AsyncExitStack() as stack:
            networks = await start(stack, hub, 60)
            await networks[0].put_record("/metaswarm/x", b"1")
            target = int.from_bytes(hashlib.sha256(b"/metaswarm/x").digest(), "big")
            nearest = sorted(networks[1:], key=lambda network: network.position ^ target)[:20]
            holders = [network for network in networks[1:] if "/metaswarm/x" in network.records]
            assert ids(holders) == ids(nearest)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
