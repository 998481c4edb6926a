"""Identities that cost nothing: a neighbour that tells of peers which do not exist gains no route and few dials."""

import random

import trio

from node.identity import Identity
from node.network.interface import Stream
from node.swarm.directory import MAX_UNREACHED_PER_RELAY
from node.swarm.heartbeats import NEW_PEERS_BURST, NEW_PEERS_PER_S
from node.testing.memory_links import LinkModel
from protocol.announcements import HEARTBEAT_TOPIC, Heartbeat, ServedSpan
from protocol.identity import BlockRange, ModelId, PeerId
from protocol.messages import Load
from protocol.presence import PROTOCOL_ID, encode_present
from protocol.records import seal
from selector.cuts import Cuts
from selector.routing import Link
from tests.simulation import virtual_time
from tests.simulation.swarm import EPOCH_S, SimulatedPeer, Swarm, signatures_verified_once

MADE_UP = 600
MODEL = ModelId("ab" * 32)


def made_up_heartbeat(identity: Identity, address: str, *, interval_ms: int = 300_000) -> bytes:
    heartbeat = Heartbeat(
        peer=identity.peer_id,
        sequence=1,
        issued_at_s=EPOCH_S,
        expires_at_s=EPOCH_S + 1200,
        interval_ms=interval_ms,
        multiaddrs=(address,),
        agent="made up",
        spans=(ServedSpan(model=MODEL, blocks=BlockRange(0, 30), load=Load(step_s=1e-9)),),
    )
    return seal(heartbeat, identity.private_key)


def count_dials(peer: SimulatedPeer) -> list[PeerId]:
    dialled: list[PeerId] = []
    ping = peer.network.ping

    async def counted(peer_id: PeerId) -> float:
        if peer_id not in peer.network.connected_peers():
            dialled.append(peer_id)
        return await ping(peer_id)

    setattr(peer.network, "ping", counted)  # noqa: B010  # a method, for this one peer
    return dialled


async def plant(swarm: Swarm, address: str) -> tuple[SimulatedPeer, list[PeerId]]:
    """Have a newcomer ask a hostile neighbour who is here; return it, and a list of whom it dials from then on."""
    rng = random.Random(7)
    envelopes = [made_up_heartbeat(Identity(rng.randbytes(32)), address.format(4001 + n)) for n in range(MADE_UP)]

    async def lie(stream: Stream) -> None:
        for frame in encode_present(envelopes):
            await stream.send_all(frame)

    liar = swarm.peers[0]
    liar.network.set_stream_handler(PROTOCOL_ID, lie)
    victim = await swarm.join()
    dialled = count_dials(victim)
    return victim, dialled


def test_made_up_peers_are_rarely_dialled_and_expire() -> None:
    async def program() -> None:
        swarm = Swarm(seed=1, link=LinkModel(latency_s=0.01))
        async with swarm.running(1, bootstrap_count=1):
            victim, dialled = await plant(swarm, "/ip4/127.0.0.1/tcp/{}")
            await trio.sleep(5)
            assert victim.membership is not None
            directory = victim.membership.directory
            assert len(directory.unreached()) == MAX_UNREACHED_PER_RELAY
            assert not directory.models()
            assert await victim.membership.candidates(MODEL, Cuts(30), lambda a, b: Link(0.01, 1e9), without=()) == ()
            await trio.sleep(25)
            assert len(dialled) < 60, "about one a second, as before, for every one of them"
            await trio.sleep(30)
            assert not directory.unreached(), "they said that they speak every five minutes"
            assert len(directory.reached()) == 2

    virtual_time.run(program, seed=1)


def test_honest_peer_is_reached_among_made_up_ones() -> None:
    async def program() -> None:
        swarm = Swarm(seed=2, link=LinkModel(latency_s=0.01))
        async with swarm.running(3, bootstrap_count=1):
            victim, _ = await plant(swarm, "/ip4/10.9.9.9/tcp/{}")
            assert victim.membership is not None
            directory = victim.membership.directory
            with trio.fail_after(20):
                while {peer.peer_id for peer in swarm.peers} != {each.peer for each in directory.reached()}:
                    await trio.sleep(0.1)

    virtual_time.run(program, seed=2)


def test_gossiped_new_peers_are_rate_limited() -> None:
    async def program() -> None:
        swarm = Swarm(seed=4, link=LinkModel(latency_s=0.01))
        async with swarm.running(3, bootstrap_count=1):
            await trio.sleep(5)
            rng, rounds = random.Random(9), 20
            handed_on: list[bool] = []
            for _ in range(rounds):
                for number in range(100):
                    identity = Identity(rng.randbytes(32))
                    envelope = made_up_heartbeat(identity, f"/ip4/10.{number}.1.1/tcp/4001")
                    for peer in swarm.peers:
                        assert peer.membership is not None
                        handed_on.append(peer.membership.heartbeats.validate(identity.peer_id, envelope))
                await trio.sleep(1)
            assert sum(handed_on) <= len(swarm.peers) * (NEW_PEERS_BURST + NEW_PEERS_PER_S * rounds)
            for peer in swarm.peers:
                assert peer.membership is not None
                directory = peer.membership.directory
                assert len(directory.unreached()) <= NEW_PEERS_BURST + NEW_PEERS_PER_S * rounds
                assert not directory.models()
                assert len(directory.reached()) == len(swarm.peers)

    with signatures_verified_once():
        virtual_time.run(program, seed=4)


def test_heartbeat_with_excessive_validity_is_refused() -> None:
    async def program() -> None:
        swarm = Swarm(seed=3, link=LinkModel(latency_s=0.01))
        async with swarm.running(2, bootstrap_count=1):
            await trio.sleep(5)
            teller, hearer = swarm.peers
            lasting = Heartbeat(
                peer=teller.peer_id,
                sequence=1 << 50,
                issued_at_s=EPOCH_S,
                expires_at_s=EPOCH_S + 86_400,
                interval_ms=2500,
                multiaddrs=(),
                agent="lasting",
            )
            await teller.network.publish(HEARTBEAT_TOPIC, seal(lasting, teller.identity.private_key))
            await trio.sleep(1)
            assert hearer.membership is not None
            heard = hearer.membership.directory.get(teller.peer_id)
            assert heard is not None
            assert heard.agent == "simulated"

    virtual_time.run(program, seed=3)
