"""Who is alive, as far as a peer has heard: leaving, dying, coming back."""

from dataclasses import replace

from node.placing import Statements
from node.swarm.directory import LIFE_IN_INTERVALS, Directory
from protocol.identity import BlockRange, ModelId, PeerId, peer_id_from_public_key
from protocol.messages import Load
from protocol.records import Heartbeat, Placement, ServedSpan

PEER = peer_id_from_public_key(bytes(32))
US = peer_id_from_public_key(bytes([1] * 32))
MODEL = ModelId("ab" * 32)


def heartbeat(sequence: int, *, leaving: bool = False, peer: PeerId = PEER, interval_ms: int = 2000) -> Heartbeat:
    return Heartbeat(
        peer=peer,
        sequence=sequence,
        issued_at_s=1_800_000_000,
        expires_at_s=1_800_000_060,
        interval_ms=interval_ms,
        multiaddrs=(),
        agent="",
        spans=(ServedSpan(model=MODEL, blocks=BlockRange(0, 3), load=Load()),),
        leaving=leaving,
    )


def test_who_says_goodbye_is_no_candidate_any_more_but_is_known_to_be_leaving() -> None:
    directory = Directory(own_peer=US)
    assert directory.hear(heartbeat(1), 0.0)
    assert directory.candidates(MODEL)
    assert directory.hear(heartbeat(2, leaving=True), 1.0)
    assert not directory.candidates(MODEL)
    assert not directory.presences()
    assert [presence.peer for presence in directory.departing()] == [PEER]


def test_older_heartbeats_do_not_revive_who_left_and_newer_ones_do() -> None:
    directory = Directory(own_peer=US)
    directory.hear(heartbeat(2, leaving=True), 0.0)
    assert not directory.hear(heartbeat(1), 0.1)
    assert not directory.presences()
    assert directory.hear(heartbeat(3), 0.2)
    assert directory.presences()
    assert not directory.departing()


def test_who_is_not_heard_is_forgotten_also_while_it_leaves() -> None:
    directory = Directory(own_peer=US)
    other = peer_id_from_public_key(bytes([2] * 32))
    directory.hear(heartbeat(1), 0.0)
    directory.hear(heartbeat(1, peer=other, leaving=True), 0.0)
    directory.hear(heartbeat(2, peer=other, leaving=True), 5.0)
    life_s = LIFE_IN_INTERVALS * 2.0
    assert directory.expire(life_s) == ()
    assert directory.expire(life_s + 1) == (PEER,)
    assert directory.departing()
    assert directory.expire(life_s + 6) == ()
    assert not directory.departing()


def test_who_says_less_often_that_it_lives_is_forgotten_later() -> None:
    directory = Directory(own_peer=US)
    directory.hear(heartbeat(1, interval_ms=60_000), 0.0)
    assert directory.expire(LIFE_IN_INTERVALS * 60.0) == ()
    directory.hear(heartbeat(2, interval_ms=1000), 240.0)
    assert directory.expire(240.0 + LIFE_IN_INTERVALS + 1) == (PEER,)


def test_who_is_started_again_no_longer_means_to_serve_what_it_said_before() -> None:
    directory = Directory(own_peer=US)
    for sequence, blocks in enumerate((BlockRange(0, 3), None)):
        clock_s = 1_800_000_000.0 + sequence
        statements = Statements(lambda: None, lambda clock_s=clock_s: clock_s)  # type: ignore[misc]
        if blocks is not None:
            statements.say(MODEL, Placement(model=MODEL, blocks=blocks, rate=1.0, movable=False))
        said = statements.current()
        said_in = replace(heartbeat(sequence), placements=said.placements, placed_at_ms=said.said_at_ms)
        directory.hear(said_in, float(sequence))
        assert bool(directory.servers(MODEL, 1_800_000_060_000)) == (blocks is not None)
