"""Announcers of several peers over the network in memory, in virtual time."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.capabilities.announcer import (
    GRADUAL_INTERVAL_S,
    LOOKUP_AGAIN_S,
    MAX_KNOWN,
    PER_PUBLISHER,
    RECORD_LIFETIME_S,
    RECORD_REFRESH_S,
    CapabilityAnnouncer,
)
from node.identity import Identity
from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError
from node.swarm.dht_records import RecordKinds
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.capabilities import (
    CAPABILITY_TOPIC,
    Capabilities,
    CapabilityRecord,
    Links,
    Neighbour,
    Throughput,
    capability_key,
)
from protocol.identity import PeerId
from protocol.records import seal, verify_dht_record
from tests.support.capabilities import EPYC, GIB, H100, peer_of

FACTS = replace(EPYC, processor=replace(EPYC.processor, throughput=Throughput()))
BETTER = replace(EPYC, accelerators=(H100,))


class Peer:
    """One peer of a swarm, which does nothing but say what it is capable of."""

    def __init__(self, hub: MemoryNetworkHub, number: int, capabilities: Capabilities | None) -> None:
        self.capabilities = capabilities
        self.clock_ahead_s = 0.0
        self.meets: list[PeerId] = []
        self.identity = Identity(number.to_bytes(32, "big"))
        self.id = self.identity.peer_id
        self.network = hub.network(self.id)
        self.announcer = CapabilityAnnouncer(
            network=self.network,
            identity=self.identity,
            records=RecordKinds(self.network, self.wall_clock),
            capabilities=lambda: self.capabilities,
            peers=lambda: self.meets,
            jitter=random.Random(number),
            wall_clock=self.wall_clock,
        )

    def wall_clock(self) -> float:
        return 1_700_000_000 + trio.current_time() + self.clock_ahead_s

    def record(self, capabilities: Capabilities | None, *, sequence: int, lifetime_s: int = 600) -> CapabilityRecord:
        now_s = int(self.wall_clock())
        return CapabilityRecord(
            peer=self.id,
            sequence=sequence,
            issued_at_s=now_s,
            expires_at_s=now_s + lifetime_s,
            capabilities=capabilities,
        )

    def stored(self, peer: PeerId) -> CapabilityRecord | None:
        """Return the record of a peer that this one keeps for the DHT."""
        key = capability_key(peer)
        data = self.network.records.get(key)
        return None if data is None else verify_dht_record(CapabilityRecord, key, data, self.wall_clock())

    async def join(self, *others: "Peer") -> None:
        for other in others:
            await self.network.connect(other.network.multiaddrs[0])


class Swarm:
    """Makes peers with numbers that count up."""

    def __init__(self) -> None:
        self.hub = MemoryNetworkHub(random.Random(1), LinkModel(latency_s=0.01))
        self._count = 0

    @asynccontextmanager
    async def peer(
        self, capabilities: Capabilities | None = EPYC, *, polite: bool = True, announcing: bool = True
    ) -> AsyncIterator[Peer]:
        """Run a peer; at the end a polite one withdraws what it said."""
        self._count += 1
        peer = Peer(self.hub, self._count, capabilities)
        async with peer.network.running(), trio.open_nursery() as nursery:
            if announcing:
                nursery.start_soon(peer.announcer.run)
            yield peer
            nursery.cancel_scope.cancel()
            if polite:
                await peer.announcer.withdraw()


@pytest.fixture
def swarm() -> Swarm:
    return Swarm()


async def test_announcement_reaches_all_peers_and_the_dht(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(BETTER) as alice, swarm.peer() as bob, swarm.peer(announcing=False) as carol:
        await bob.join(alice)
        await carol.join(bob)
        await trio.sleep(5)
        assert bob.announcer.known(alice.id) == BETTER
        assert alice.announcer.known(bob.id) == EPYC
        assert alice.announcer.known(alice.id) == BETTER
        # Carol has heard no gossip: she did not listen.
        assert carol.announcer.known(alice.id) is None
        assert await carol.announcer.lookup(alice.id) == BETTER
        assert await carol.announcer.lookup(bob.id) == EPYC
        assert carol.announcer.known(alice.id) == BETTER


async def test_announcement_without_neighbours_is_repeated_to_the_first(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(BETTER) as alice, swarm.peer(announcing=False) as bob:
        await trio.sleep(30)
        assert bob.stored(alice.id) is None
        await bob.join(alice)
        await trio.sleep(3)
        assert bob.stored(alice.id) is not None


async def test_newcomer_looks_up_the_peers_that_it_meets(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(BETTER) as alice, swarm.peer() as bob:
        await bob.join(alice)
        await trio.sleep(60)
        async with swarm.peer(capabilities=None) as carol:
            await carol.join(bob)
            carol.meets = [alice.id, bob.id, carol.id, peer_of(500)]
            await trio.sleep(5)
            assert carol.announcer.known(alice.id) == BETTER
            assert carol.announcer.known(bob.id) == EPYC
            assert carol.announcer.known(carol.id) is None


async def test_peer_without_a_record_is_looked_up_again(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(announcing=False) as alice, swarm.peer(capabilities=None) as bob:
        await bob.join(alice)
        bob.meets = [alice.id]
        await trio.sleep(5)
        envelope = seal(alice.record(EPYC, sequence=1), alice.identity.private_key)
        await alice.network.put_record(capability_key(alice.id), envelope)
        await trio.sleep(LOOKUP_AGAIN_S)
        assert bob.announcer.known(alice.id) == EPYC


async def test_record_is_refreshed_before_it_expires(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer() as alice, swarm.peer() as bob:
        await bob.join(alice)
        await trio.sleep(5)
        sequences = set()
        for _ in range(100):
            record = bob.stored(alice.id)
            assert record is not None
            assert record.expires_at_s - bob.wall_clock() > RECORD_LIFETIME_S - RECORD_REFRESH_S - 60
            sequences.add(record.sequence)
            await trio.sleep(60)
        assert 100 * 60 / RECORD_REFRESH_S <= len(sequences) <= 2 * 100 * 60 / RECORD_REFRESH_S


async def test_record_is_renewed_after_sleep_and_to_the_neighbours_that_come_then(
    swarm: Swarm, virtual_clock: MockClock
) -> None:
    async with swarm.peer() as alice, swarm.peer() as bob, swarm.peer() as carol:
        await bob.join(alice)
        await trio.sleep(5)
        for peer in (alice, bob, carol):
            peer.clock_ahead_s = 8 * 3600.0  # the monotonic clock stood still
        assert bob.announcer.known(alice.id) is None
        await trio.sleep(5)
        assert bob.announcer.known(alice.id) == EPYC
        await alice.network.disconnect(bob.id)
        await trio.sleep(5)
        before = alice.stored(alice.id)
        await carol.join(alice)
        await trio.sleep(5)
        renewed = carol.stored(alice.id)
        assert before is not None
        assert renewed is not None
        assert renewed.sequence > before.sequence


async def test_record_without_refresh_expires(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer() as bob:
        async with swarm.peer(BETTER, polite=False) as alice:
            await alice.join(bob)
            await trio.sleep(5)
            assert bob.announcer.known(alice.id) == BETTER
        await trio.sleep(RECORD_LIFETIME_S)
        assert bob.announcer.known(alice.id) is None
        assert await bob.announcer.lookup(alice.id) is None


async def test_graceful_stop_withdraws_the_record(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer() as bob, swarm.peer(announcing=False) as carol:
        await carol.join(bob)
        async with swarm.peer(BETTER) as alice:
            await alice.join(bob)
            await trio.sleep(5)
            assert await carol.announcer.lookup(alice.id) == BETTER
        await trio.sleep(1)
        assert bob.announcer.known(alice.id) is None
        assert await carol.announcer.lookup(alice.id) is None


async def test_withdrawal_overtakes_a_pending_announcement(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer() as bob, swarm.peer(capabilities=None, polite=False) as alice:
        await alice.join(bob)
        alice.capabilities = BETTER
        while alice.announcer.known(alice.id) is None:
            await trio.sleep(0.001)
        assert bob.stored(alice.id) is None, "the record is under way"
        await alice.announcer.withdraw()
        await trio.sleep(30)
        record = bob.stored(alice.id)
        assert record is not None
        assert record.capabilities is None


async def test_nothing_is_withdrawn_without_an_announcement(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer() as bob:
        async with swarm.peer(capabilities=None) as alice:
            await alice.join(bob)
            await trio.sleep(5)
        await trio.sleep(1)
        assert bob.stored(alice.id) is None


async def test_returning_peer_replaces_its_withdrawal(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer() as bob:
        async with swarm.peer(BETTER) as alice:
            await alice.join(bob)
            await trio.sleep(5)
        await trio.sleep(1)
        assert bob.announcer.known(alice.id) is None
        again = Peer(swarm.hub, 2, EPYC)
        async with again.network.running(), trio.open_nursery() as nursery:
            nursery.start_soon(again.announcer.run)
            await again.join(bob)
            await trio.sleep(5)
            assert again.id == alice.id
            assert await bob.announcer.lookup(alice.id) == EPYC
            nursery.cancel_scope.cancel()


async def test_changed_facts_are_announced_at_once(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(FACTS) as alice, swarm.peer() as bob:
        await bob.join(alice)
        await trio.sleep(5)
        assert bob.announcer.known(alice.id) == FACTS
        alice.capabilities = EPYC
        await trio.sleep(2)
        assert bob.announcer.known(alice.id) == EPYC


def moved(step: int) -> Capabilities:
    """Return a machine whose free memory and links change all the time."""
    neighbours = (Neighbour(peer=peer_of(100 + step), round_trip_s=0.01),)
    memory = replace(EPYC.memory, available_bytes=(20 - 10 * (step % 2)) * GIB)
    return replace(EPYC, memory=memory, links=Links(upload_bytes_per_s=10.0**step, neighbours=neighbours))


async def test_gradual_changes_are_announced_at_intervals(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(moved(0)) as alice, swarm.peer() as bob:
        await bob.join(alice)
        await trio.sleep(5)
        told = set()
        for step in range(60):
            alice.capabilities = moved(step % 10)
            await trio.sleep(10)
            record = bob.stored(alice.id)
            assert record is not None
            told.add(record.sequence)
        assert 600 / GRADUAL_INTERVAL_S <= len(told) <= 600 / GRADUAL_INTERVAL_S + 2


@pytest.mark.parametrize(
    "changed",
    [
        replace(EPYC, memory=replace(EPYC.memory, available_bytes=10 * GIB)),
        replace(EPYC, links=replace(EPYC.links, upload_bytes_per_s=1e7)),
        replace(EPYC, links=replace(EPYC.links, download_bytes_per_s=1e7)),
        replace(EPYC, links=replace(EPYC.links, neighbours=())),
        replace(EPYC, links=replace(EPYC.links, neighbours=(replace(EPYC.links.neighbours[0], round_trip_s=0.2),))),
    ],
    ids=["memory", "upload", "download", "neighbours", "round trip"],
)
async def test_large_gradual_change_is_announced_before_the_refresh(
    swarm: Swarm, changed: Capabilities, virtual_clock: MockClock
) -> None:
    async with swarm.peer(EPYC) as alice, swarm.peer() as bob:
        await bob.join(alice)
        await trio.sleep(5)
        alice.capabilities = changed
        await trio.sleep(GRADUAL_INTERVAL_S + 1)
        assert bob.announcer.known(alice.id) == changed


@pytest.mark.parametrize(
    "barely",
    [
        replace(EPYC, memory=replace(EPYC.memory, available_bytes=EPYC.memory.available_bytes - GIB)),
        replace(EPYC, links=replace(EPYC.links, upload_bytes_per_s=6e6)),
    ],
    ids=["memory", "upload"],
)
async def test_small_gradual_change_is_not_announced(
    swarm: Swarm, barely: Capabilities, virtual_clock: MockClock
) -> None:
    async with swarm.peer(EPYC) as alice, swarm.peer() as bob:
        await bob.join(alice)
        await trio.sleep(5)
        before = bob.stored(alice.id)
        alice.capabilities = barely
        # Well before the first refresh, and after gradual changes may be told.
        await trio.sleep(GRADUAL_INTERVAL_S + 30)
        assert bob.stored(alice.id) == before


async def test_record_signed_by_another_peer_is_rejected(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(EPYC) as alice, swarm.peer(announcing=False) as mallory, swarm.peer() as bob:
        await bob.join(alice, mallory)
        await trio.sleep(5)
        key = capability_key(alice.id)
        theirs = seal(mallory.record(BETTER, sequence=1 << 50), mallory.identity.private_key)
        genuine = seal(alice.record(BETTER, sequence=1 << 50), alice.identity.private_key)
        for envelope in (theirs, genuine[:-1] + bytes([genuine[-1] ^ 1]), b"", b"\xff" * 100):
            with pytest.raises(NetworkError):
                await mallory.network.put_record(key, envelope)
            assert not bob.network.store_record(key, envelope)
        # Alice's own words, but published by another: nobody knows how old they are.
        await mallory.network.publish(CAPABILITY_TOPIC, genuine)
        await mallory.network.publish(CAPABILITY_TOPIC, b"\xff" * 100)
        await trio.sleep(5)
        assert bob.announcer.known(alice.id) == EPYC
        assert await bob.announcer.lookup(alice.id) == EPYC


async def test_older_record_does_not_replace_a_newer_one(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(EPYC) as alice, swarm.peer() as bob:
        await bob.join(alice)
        await trio.sleep(5)
        replayed = seal(alice.record(BETTER, sequence=1), alice.identity.private_key)
        assert not bob.network.store_record(capability_key(alice.id), replayed)
        await alice.network.publish(CAPABILITY_TOPIC, replayed)
        await trio.sleep(5)
        assert bob.announcer.known(alice.id) == EPYC


async def test_number_of_a_clock_that_was_ahead_counts_until_its_record_has_expired(
    swarm: Swarm, virtual_clock: MockClock
) -> None:
    async with swarm.peer() as bob, swarm.peer(announcing=False) as carol:
        async with swarm.peer(BETTER, polite=False, announcing=False) as alice:
            await alice.join(bob)
            await carol.join(bob)
            ahead = alice.record(None, sequence=int(1000 * (alice.wall_clock() + 7200)), lifetime_s=RECORD_LIFETIME_S)
            envelope = seal(ahead, alice.identity.private_key)
            assert all(each.network.store_record(capability_key(alice.id), envelope) for each in (bob, carol))
            await alice.network.publish(CAPABILITY_TOPIC, envelope)
            await trio.sleep(RECORD_LIFETIME_S)
        again = Peer(swarm.hub, 3, BETTER)
        async with again.network.running(), trio.open_nursery() as nursery:
            await again.join(bob)
            nursery.start_soon(again.announcer.run)
            await trio.sleep(5)
            assert bob.announcer.known(again.id) == BETTER
            assert await carol.announcer.lookup(again.id) == BETTER
            nursery.cancel_scope.cancel()


async def test_record_from_the_future_is_rejected(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(EPYC) as alice, swarm.peer() as bob:
        alice.clock_ahead_s = 300
        await bob.join(alice)
        await trio.sleep(5)
        assert bob.announcer.known(alice.id) is None
        assert await bob.announcer.lookup(alice.id) is None


async def test_failed_put_is_retried_after_a_pause(
    swarm: Swarm, virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm.peer(capabilities=None) as alice, swarm.peer() as bob:
        await bob.join(alice)
        # A node whose clock was set back: for a minute, what it said before the restart has the higher number.
        said = alice.record(BETTER, sequence=int(alice.wall_clock() * 1000) + 60_000)
        await alice.network.put_record(capability_key(alice.id), seal(said, alice.identity.private_key))
        asked_at_s = []

        put_record = alice.network.put_record

        async def watched_put_record(key: str, value: bytes) -> None:
            asked_at_s.append(trio.current_time())
            await put_record(key, value)

        monkeypatch.setattr(alice.network, "put_record", watched_put_record)
        alice.capabilities = EPYC
        await trio.sleep(30)
        assert await bob.announcer.lookup(alice.id) == BETTER
        await trio.sleep(60)
        assert await bob.announcer.lookup(alice.id) == EPYC
        assert 4 <= len(asked_at_s) <= 12


async def test_unrepresentable_hardware_does_not_stop_the_node(swarm: Swarm, virtual_clock: MockClock) -> None:
    strange = replace(EPYC, processor=replace(EPYC.processor, model="\x1b"))
    async with swarm.peer(strange) as alice, swarm.peer() as bob:
        await bob.join(alice)
        await trio.sleep(5)
        assert bob.announcer.known(alice.id) is None
        assert alice.announcer.known(alice.id) is None


async def test_cached_records_are_bounded(swarm: Swarm, virtual_clock: MockClock) -> None:
    async with swarm.peer(announcing=False) as alice:
        others = [Peer(swarm.hub, 1000 + number, EPYC) for number in range(MAX_KNOWN + 1)]
        for other in others:
            envelope = seal(other.record(EPYC, sequence=1), other.identity.private_key)
            assert alice.network.store_record(capability_key(other.id), envelope)
            await alice.announcer.lookup(other.id)
        assert alice.announcer.known(others[0].id) is None
        assert all(alice.announcer.known(other.id) == EPYC for other in others[1:])


async def test_the_same_holds_over_libp2p() -> None:
    async with AsyncExitStack() as stack:
        networks = []
        announcers = []
        for number in (1, 2, 3):
            identity = Identity(number.to_bytes(32, "big"))
            network = Libp2pNetwork(identity.seed, listen=["/ip4/127.0.0.1/tcp/0"])
            announcer = CapabilityAnnouncer(
                network=network,
                identity=identity,
                records=RecordKinds(network),
                capabilities=lambda: BETTER,
                peers=tuple,
                jitter=random.Random(number),
            )
            await stack.enter_async_context(network.running())
            networks.append(network)
            announcers.append(announcer)
        alice, bob, carol = networks
        await alice.connect(bob.multiaddrs[0])
        await carol.connect(bob.multiaddrs[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(announcers[0].run)
            # Carol does not listen to gossip: what she knows she has looked up.
            with trio.fail_after(30):
                while await announcers[2].lookup(alice.peer_id) != BETTER:
                    await trio.sleep(0.1)
            await announcers[0].withdraw()
            with trio.fail_after(30):
                while await announcers[2].lookup(alice.peer_id) is not None:
                    await trio.sleep(0.1)
            nursery.cancel_scope.cancel()


async def test_copies_and_floods_of_records_are_not_forwarded(autojump_clock: MockClock) -> None:
    hub = MemoryNetworkHub(random.Random(0), LinkModel())
    hearer, hostile = Peer(hub, 1, None), Peer(hub, 2, FACTS)
    hearer.clock_ahead_s = hostile.clock_ahead_s = 0.0

    def forwards(sequence: int) -> bool:
        record = hostile.record(FACTS, sequence=sequence)
        envelope = seal(record, hostile.identity.private_key)
        taken = hearer.announcer._validate_gossip(hostile.id, envelope)
        if taken:
            hearer.announcer._store(record)
        return taken

    assert [forwards(sequence) for sequence in (7, 7, 6, 8)] == [True, False, False, True]
    assert sum(forwards(sequence) for sequence in range(100, 1000)) == PER_PUBLISHER.burst - 4
