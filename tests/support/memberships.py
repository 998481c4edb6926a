"""The membership of a node in tests, and heartbeats of peers that serve nothing."""

import random
from collections.abc import Callable, Iterable

from node.identity import Identity
from node.swarm.dht_records import RecordKinds
from node.swarm.heartbeats import OwnServices
from node.swarm.membership import Membership
from node.testing.memory_network import MemoryNetwork
from protocol.announcements import Heartbeat
from protocol.identity import PeerId

LIFETIME_S = 60


def membership_of(
    network: MemoryNetwork,
    identity: Identity,
    *,
    bootstrap: Iterable[str] = (),
    wall_clock: Callable[[], float] = lambda: 0.0,
    on_round_trip: Callable[[PeerId, float], None] = lambda peer, seconds: None,
) -> Membership:
    """Return the membership of a node that serves nothing."""
    return Membership(
        network=network,
        identity=identity,
        services=OwnServices(agent="test/1", served_spans=tuple),
        bootstrap=tuple(bootstrap),
        records=RecordKinds(network),
        jitter=random.Random(0),
        wall_clock=wall_clock,
        on_round_trip=on_round_trip,
    )


def heartbeat_of(peer: PeerId, *, sequence: int = 1, issued_at_s: int = 0) -> Heartbeat:
    """Return a heartbeat of a peer that serves nothing, valid for LIFETIME_S."""
    return Heartbeat(
        peer=peer,
        sequence=sequence,
        issued_at_s=issued_at_s,
        expires_at_s=issued_at_s + LIFETIME_S,
        interval_ms=2500,
        multiaddrs=(),
        agent="test/1",
        spans=(),
    )
