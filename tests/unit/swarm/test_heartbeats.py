"""Which gossiped heartbeats are verified, entered and forwarded."""

import random

import pytest
import structlog.testing
import trio.testing

from node.identity import Identity
from node.swarm.directory import Directory
from node.swarm.heartbeats import OF_UNREACHED, PER_PUBLISHER, TWIN_S, Heartbeats
from node.swarm.presence import PresenceServer
from node.swarm.sequence_numbers import SequenceNumbers
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.announcements import Heartbeat
from protocol.presence import PROTOCOL_ID
from protocol.records import seal, verify_record
from tests.support.memberships import heartbeat_of, membership_of

US, *PEERS = (Identity(number.to_bytes(32, "big")) for number in range(1, 6))


def envelope(sender: Identity, sequence: int) -> bytes:
    return seal(heartbeat_of(sender.peer_id, sequence=sequence), sender.private_key)


def ours() -> Heartbeats:
    network = MemoryNetworkHub(random.Random(0), LinkModel()).network(US.peer_id)
    return membership_of(network, US).heartbeats


async def test_copies_of_a_heartbeat_are_not_forwarded(autojump_clock: trio.testing.MockClock) -> None:
    node, sender = ours(), PEERS[0]
    assert [node.validate(sender.peer_id, envelope(sender, each)) for each in (5, 5, 4, 6)] == [
        True,
        False,
        False,
        True,
    ]


async def test_node_with_our_key_is_reported_and_does_not_outnumber_us(autojump_clock: trio.testing.MockClock) -> None:
    node = ours()

    def heard(sequence: int, issued_at_s: int) -> str | None:
        heartbeat = heartbeat_of(US.peer_id, sequence=sequence, issued_at_s=issued_at_s)
        node.validate(US.peer_id, seal(heartbeat, US.private_key))
        return node.twin()

    with structlog.testing.capture_logs() as logs:
        assert heard(100, 0) is None, "of an earlier process"
        assert heard(99, 1) is None, "an earlier one of ours"
        for sequence in (200, 201):
            assert "stop it" in (heard(sequence, 1) or "")
        await node._publish()
        entry = node._directory.get(US.peer_id)
        assert entry is not None
        assert entry.sequence == 202
        node.validate(US.peer_id, entry.envelope or b"")
    assert [each["log_level"] for each in logs if each["log_level"] != "debug"] == ["error"]
    await trio.sleep(TWIN_S + 1)
    assert node.twin() is None


async def test_node_with_our_key_is_noticed_in_the_answer_to_a_presence_query(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Gossip does not bring its heartbeats: neighbours forward no message to the id that it comes from."""
    hub = MemoryNetworkHub(random.Random(0), LinkModel())
    us, neighbour = hub.network(US.peer_id), hub.network(PEERS[0].peer_id)
    directory = Directory(own_peer=neighbour.peer_id)
    twins = heartbeat_of(US.peer_id, sequence=100, issued_at_s=1)
    directory.update(twins, 0.0, seal(twins, US.private_key), dialled=True)
    neighbour.set_stream_handler(PROTOCOL_ID, PresenceServer(directory).handle)
    membership = membership_of(us, US)
    async with us.running(), neighbour.running(), trio.open_nursery() as nursery:
        nursery.start_soon(membership.heartbeats.run)
        await trio.sleep(1)
        assert membership.heartbeats.twin() is None
        await us.connect(neighbour.multiaddrs[0])
        await trio.sleep(1)
        assert "stop it" in (membership.heartbeats.twin() or "")
        nursery.cancel_scope.cancel()


async def test_number_follows_the_clock_so_that_a_node_with_our_key_is_not_missed_once_it_is_gone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    directory, sequence = Directory(own_peer=PEERS[0].peer_id), SequenceNumbers(lambda: trio.current_time())
    next(sequence)
    await trio.sleep(86_400)
    twin = SequenceNumbers(lambda: trio.current_time())
    assert directory.update(heartbeat_of(US.peer_id, sequence=next(twin)), 0.0)
    await trio.sleep(1)
    assert directory.update(heartbeat_of(US.peer_id, sequence=next(sequence)), 1.0)


async def test_flood_of_a_publisher_is_neither_verified_nor_forwarded(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, (hostile, honest, *_) = ours(), PEERS
    verified = 0

    def count(record_type: type[Heartbeat], envelope: bytes, now_s: float) -> Heartbeat:
        nonlocal verified
        verified += 1
        return verify_record(record_type, envelope, now_s)

    monkeypatch.setattr("node.swarm.heartbeats.verify_record", count)
    forwarded = sum(node.validate(hostile.peer_id, envelope(hostile, each)) for each in range(1, 300))
    assert forwarded == verified == PER_PUBLISHER.burst
    assert node.validate(honest.peer_id, envelope(honest, 1))
    await trio.sleep(10)
    assert node.validate(hostile.peer_id, envelope(hostile, 1000))


async def test_flood_of_many_publishers_does_not_drop_those_that_were_reached(
    autojump_clock: trio.testing.MockClock,
) -> None:
    node, (known, other, *_) = ours(), PEERS
    assert node.validate(known.peer_id, envelope(known, 1))
    node._directory.on_dialled(known.peer_id, True)
    for number in range(int(OF_UNREACHED.burst)):
        node._limits.take(Identity(number.to_bytes(32, "little")).peer_id, 0.0)
    assert not node.validate(other.peer_id, envelope(other, 1))
    assert node.validate(known.peer_id, envelope(known, 2))
