"""What the status documents tell of peers: what was refused, failed, held, and who is barred."""

import enum
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from node.status import StatusView
from node.swarm.directory import Directory
from node.swarm.standing import Ban
from protocol.identity import BlockRange, ModelId, PeerId, peer_id_from_public_key
from protocol.messages import Load
from protocol.records import Heartbeat, ServedSpan

US, CONNECTED, HEARSAY, GONE = (peer_id_from_public_key(bytes([number]) * 32) for number in range(4))
MODEL = ModelId("ab" * 32)


class Reason(enum.StrEnum):
    FULL = "full"


@dataclass
class Asked:
    opened: int = 5
    refused: dict[Reason, int] = field(default_factory=lambda: {Reason.FULL: 3})
    failed: dict[Reason, int] = field(default_factory=dict)
    faults: int = 2
    sessions: int = 1
    positions: int = 64
    bytes: int = 4096


@dataclass
class Shown:
    served: int = 7
    failed: int = 1
    lagged: int = 1
    trust: float = 0.5
    avoided_s: float = 12.0
    block_s: dict[ModelId, float] = field(default_factory=lambda: {MODEL: 0.001})


def heartbeat(peer: PeerId) -> Heartbeat:
    return Heartbeat(
        peer=peer,
        sequence=1,
        issued_at_s=1_800_000_000,
        expires_at_s=1_800_000_060,
        interval_ms=2500,
        multiaddrs=(),
        agent="",
        spans=(ServedSpan(model=MODEL, blocks=BlockRange(0, 3), load=Load()),),
    )


async def test_of_each_peer_it_is_told_what_was_refused_failed_and_is_held_and_why_it_is_barred() -> None:
    directory = Directory(own_peer=US, connected=lambda: [CONNECTED])
    for peer in (US, CONNECTED, HEARSAY):
        directory.hear(heartbeat(peer), 0.0)
    nothing = cast("Any", SimpleNamespace())
    view = StatusView(
        agent="",
        serve=[],
        network=cast(
            "Any",
            SimpleNamespace(peer_id=US, connected_peers=lambda: (CONNECTED,), addresses_of=lambda peer: ()),
        ),
        membership=cast("Any", SimpleNamespace(directory=directory, round_trip_s=lambda peer: None)),
        coordinator=nothing,
        trials=nothing,
        stages=nothing,
        library=cast("Any", SimpleNamespace(name_of=lambda model: "tiny")),
        ledger=nothing,
        history=nothing,
        dissemination=cast("Any", SimpleNamespace(bans=lambda: {GONE: Ban(9.0, "garbage")})),
        consensus=cast("Any", SimpleNamespace(bans=dict)),
        chooser=nothing,
        learner=nothing,
        stage_peers=lambda: {CONNECTED: Asked(), GONE: Asked(sessions=0, bytes=0)},
        job_peers=lambda: {CONNECTED: Shown()},
    )
    peers = {each["peer_id"]: each for each in view.peers()}
    assert peers.keys() == {CONNECTED, HEARSAY, GONE}
    assert [peers[peer]["reached"] for peer in (CONNECTED, HEARSAY, GONE)] == [True, False, False]
    assert peers[GONE]["banned"] == {"left_s": 9.0, "reason": "garbage"}
    assert peers[CONNECTED]["banned"] is None
    assert peers[CONNECTED]["sessions"] == {
        "opened": 5,
        "refused": {"full": 3},
        "failed": {},
        "faults": 2,
        "held_sessions": 1,
        "held_positions": 64,
        "held_bytes": 4096,
    }
    shown = peers[CONNECTED]["jobs"]
    assert shown is not None
    assert (shown["failed"], shown["lagged"], shown["avoided_s"]) == (1, 1, 12.0)
    assert peers[HEARSAY]["sessions"] is None
    assert view._peer_counts() == {
        "known": 2,
        "reached": 1,
        "banned": 1,
        "sessions_opened": 10,
        "sessions_refused": 6,
        "sessions_failed": 0,
        "sessions_held": 1,
        "held_bytes": 4096,
    }
