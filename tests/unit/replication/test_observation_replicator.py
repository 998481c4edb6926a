"""What gossip brings while the disk is full."""

import random
from collections.abc import Sequence

import structlog.testing
import trio
from trio.testing import MockClock

from node.identity import Identity
from node.replication.observations import ObservationReplicator
from node.storage.database import StorageFull
from node.swarm.dht_records import RecordKinds
from node.testing.memory_history import MemoryHistory
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.observations import SignedObservation
from tests.support.observations import NOW_S
from tests.support.sync_sessions import made

US = Identity(bytes(32))


class FullDisk(MemoryHistory):
    """A history that has no room while it is `full`."""

    full = True

    async def add_many(self, observations: Sequence[SignedObservation]) -> Sequence[SignedObservation]:
        await trio.lowlevel.checkpoint()
        if self.full:
            raise StorageFull("the disk is full")
        return await super().add_many(observations)


async def test_full_disk_is_logged_once_until_there_is_room(virtual_clock: MockClock) -> None:
    network = MemoryNetworkHub(random.Random(0), LinkModel()).network(US.peer_id)
    history = FullDisk()
    replicator = ObservationReplicator(
        network=network,
        identity=US,
        history=history,
        records=RecordKinds(network),
        jitter=random.Random(0),
        wall_clock=lambda: NOW_S,
    )
    with structlog.testing.capture_logs() as logs:
        for number in range(9):
            await replicator._store_gossiped([made(number)])
        assert len(logs) == 1
        history.full = False
        await replicator._store_gossiped([made(10)])
        history.full = True
        await replicator._store_gossiped([made(11)])
    assert [entry["event"] for entry in logs] == ["gossiped observations not stored"] * 2
