"""When a node's span records are put into the DHT."""

import random

import trio
import trio.testing

from node.identity import Identity
from node.swarm.dht_records import RecordKinds
from node.swarm.directory import Directory
from node.swarm.sequence_numbers import SequenceNumbers
from node.swarm.span_records import SpanRecords
from node.testing.memory_network import MemoryNetworkHub
from protocol.announcements import ServedSpan, SpanRecord, span_key
from protocol.identity import BlockRange, ModelId
from protocol.messages import Load
from protocol.records import verify_dht_record

US, *PEERS = (Identity(bytes([number]) * 32) for number in range(3))
MODEL = ModelId("ab" * 32)
NOON = 1_800_000_000


async def test_record_is_put_again_after_sleep_and_to_the_neighbours_that_come_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    hub, slept_s = MemoryNetworkHub(random.Random(0)), 0.0

    def wall_clock() -> float:
        return NOON + trio.current_time() + slept_s

    network = hub.network(US.peer_id)
    spans = (ServedSpan(model=MODEL, blocks=BlockRange(0, 3), load=Load()),)
    directory, numbers = Directory(own_peer=US.peer_id), SequenceNumbers(wall_clock)
    records = SpanRecords(network, US, directory, RecordKinds(network, wall_clock), lambda: spans, numbers, wall_clock)

    def stored() -> SpanRecord:
        key = span_key(MODEL, US.peer_id)
        return verify_dht_record(SpanRecord, key, network.records[key], wall_clock())

    first, second = (hub.network(each.peer_id) for each in PEERS)
    async with network.running(), first.running(), second.running(), trio.open_nursery() as nursery:
        nursery.start_soon(records.run)
        await network.connect(first.multiaddrs[0])
        await trio.sleep(5)
        assert stored().blocks == (BlockRange(0, 3),)
        slept_s = 8 * 3600.0
        await trio.sleep(5)
        awake = stored()
        await network.disconnect(first.peer_id)
        await trio.sleep(5)
        assert stored() == awake
        await network.connect(second.multiaddrs[0])
        await trio.sleep(5)
        assert stored().sequence > awake.sequence
        nursery.cancel_scope.cancel()
