"""Who is alive, as far as a peer has heard: leaving, dying, coming back; and who is only said to be."""

from dataclasses import replace

import pytest

from node.stages.block_placement import PlacementAnnouncements
from node.swarm.directory import (
    LIFE_IN_INTERVALS,
    MAX_PER_RANGE,
    MAX_UNREACHED,
    MAX_UNREACHED_PER_RANGE,
    MAX_UNREACHED_PER_TELLER,
    Directory,
)
from protocol.announcements import Heartbeat, Placement, ServedSpan
from protocol.identity import BlockRange, ModelId, PeerId, peer_id_from_public_key
from protocol.messages import Load

PEER = peer_id_from_public_key(bytes(32))
US = peer_id_from_public_key(bytes([1] * 32))
MODEL = ModelId("ab" * 32)
LONGEST_S = 300.0


def stranger(number: int) -> PeerId:
    return peer_id_from_public_key(number.to_bytes(32, "big"))


def heartbeat(
    sequence: int,
    *,
    leaving: bool = False,
    peer: PeerId = PEER,
    interval_ms: int = 2000,
    multiaddrs: tuple[str, ...] = (),
) -> Heartbeat:
    return Heartbeat(
        peer=peer,
        sequence=sequence,
        issued_at_s=1_800_000_000,
        expires_at_s=1_800_000_060,
        interval_ms=interval_ms,
        multiaddrs=multiaddrs,
        agent="",
        spans=(ServedSpan(model=MODEL, blocks=BlockRange(0, 3), load=Load()),),
        leaving=leaving,
    )


def test_who_says_goodbye_is_no_candidate_any_more_but_is_known_to_be_leaving() -> None:
    directory = Directory(own_peer=US)
    assert directory.hear(heartbeat(1), 0.0, dialled=True)
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
    assert directory.expire(life_s, LONGEST_S) == ()
    assert directory.expire(life_s + 1, LONGEST_S) == (PEER,)
    assert directory.departing()
    assert directory.expire(life_s + 6, LONGEST_S) == ()
    assert not directory.departing()


def test_who_says_less_often_that_it_lives_is_forgotten_later() -> None:
    directory = Directory(own_peer=US)
    directory.hear(heartbeat(1, interval_ms=60_000), 0.0)
    assert directory.expire(LIFE_IN_INTERVALS * 60.0, LONGEST_S) == ()
    directory.hear(heartbeat(2, interval_ms=1000), 240.0)
    assert directory.expire(240.0 + LIFE_IN_INTERVALS + 1, LONGEST_S) == (PEER,)


def test_who_is_started_again_no_longer_means_to_serve_what_it_said_before() -> None:
    directory = Directory(own_peer=US)
    for sequence, blocks in enumerate((BlockRange(0, 3), None)):
        clock_s = 1_800_000_000.0 + sequence
        statements = PlacementAnnouncements(lambda: None, lambda clock_s=clock_s: clock_s)  # type: ignore[misc]
        if blocks is not None:
            statements.publish(MODEL, Placement(model=MODEL, blocks=blocks, rate=1.0, movable=False))
        said = statements.current()
        said_in = replace(heartbeat(sequence), placements=said.placements, placed_at_ms=said.said_at_ms)
        directory.hear(said_in, float(sequence), dialled=True)
        assert bool(directory.servers(MODEL, 1_800_000_060_000)) == (blocks is not None)


def test_what_a_peer_says_it_serves_counts_once_it_was_reached() -> None:
    connected: list[PeerId] = []
    directory = Directory(own_peer=US, connected=lambda: connected)
    placement = Placement(model=MODEL, blocks=BlockRange(0, 3), rate=1.0, movable=True)
    directory.hear(replace(heartbeat(1), placements=(placement,), placed_at_ms=1), 0.0)

    def counts() -> list[bool]:
        return [bool(directory.candidates(MODEL)), bool(directory.models()), bool(directory.servers(MODEL, 2))]

    assert counts() == [False] * 3
    connected.append(PEER)
    assert counts() == [True] * 3
    connected.clear()
    assert counts() == [False] * 3, "a connection that it opened says nothing once it is gone"
    directory.was_dialled(PEER, True)
    assert counts() == [True] * 3
    directory.hear(heartbeat(2), 1.0)
    assert directory.candidates(MODEL)
    directory.was_dialled(PEER, False)
    assert not directory.candidates(MODEL)


def test_whoever_is_asked_who_is_here_can_plant_only_so_many_peers_that_nobody_reached() -> None:
    directory = Directory(own_peer=US)
    teller, other = stranger(1), stranger(2)
    for number in range(1890):
        directory.hear(heartbeat(1, peer=stranger(number)), 0.0, teller=teller)
    assert len(directory.presences()) == MAX_UNREACHED_PER_TELLER
    assert directory.hear(heartbeat(1, peer=stranger(5000)), 0.0, teller=other), "others may tell of theirs"
    directory.was_dialled(stranger(0), True)
    assert directory.hear(heartbeat(1, peer=stranger(5001)), 0.0, teller=teller), "who was reached does not count"


@pytest.mark.parametrize("address", ["/ip4/203.0.112.{0}/tcp/{1}", "/ip6/2a00:1:2:{0}::{1}/tcp/4001"])
def test_one_public_range_is_full_of_unreached_peers_soon_and_of_reached_ones_later(address: str) -> None:
    directory = Directory(own_peer=US)

    def hear(number: int, dialled: bool) -> bool:
        multiaddrs = (address.format(number % 250, 4001 + number),)
        return directory.hear(heartbeat(1, peer=stranger(number), multiaddrs=multiaddrs), 0.0, dialled=dialled)

    assert sum(hear(number, dialled=False) for number in range(500)) == MAX_UNREACHED_PER_RANGE
    assert sum(hear(number, dialled=True) for number in range(1000, 2000)) == MAX_PER_RANGE - MAX_UNREACHED_PER_RANGE


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.7", "10.2.3.4"])
def test_hundreds_of_peers_may_live_at_one_private_address(host: str) -> None:
    directory = Directory(own_peer=US)
    for number in range(600):
        heard = heartbeat(1, peer=stranger(number), multiaddrs=(f"/ip4/{host}/tcp/{4001 + number}",))
        assert directory.hear(heard, 0.0)
        directory.was_dialled(stranger(number), True)
    assert len(directory.reached()) == 600


def test_who_was_never_reached_makes_room_first_and_of_those_the_crowd() -> None:
    directory = Directory(own_peer=US)
    directory.hear(heartbeat(1), 0.0, dialled=True)
    lone = heartbeat(1, peer=stranger(9_999_999), multiaddrs=("/ip4/192.168.9.9/tcp/4001",))
    directory.hear(lone, 0.0)
    for number in range(MAX_UNREACHED + 100):
        crowd = heartbeat(1, peer=stranger(number), multiaddrs=(f"/ip4/10.0.0.1/tcp/{4001 + number}",))
        directory.hear(crowd, 1.0)
    assert directory.get(PEER)
    assert directory.get(lone.peer)
    assert len(directory.unreached()) == MAX_UNREACHED


def test_nobody_is_waited_for_as_long_as_it_says_where_that_is_absurd() -> None:
    directory = Directory(own_peer=US)
    directory.hear(heartbeat(1, interval_ms=300_000), 0.0)
    assert directory.expire(LIFE_IN_INTERVALS * 10.0, 10.0) == ()
    assert directory.expire(LIFE_IN_INTERVALS * 10.0 + 1, 10.0) == (PEER,)
