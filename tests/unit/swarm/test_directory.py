"""The directory of live peers: leaving, expiring, coming back; and bounds on peers that were never reached."""

import random
from dataclasses import replace

import pytest

from node.stages.block_placement import PlacementAnnouncements
from node.swarm.directory import (
    LIFE_IN_INTERVALS,
    LOADING_S,
    MAX_PER_RANGE,
    MAX_UNREACHED,
    MAX_UNREACHED_PER_RANGE,
    MAX_UNREACHED_PER_RELAY,
    RESTART_S,
    Directory,
)
from protocol.announcements import Heartbeat, Placement, Reachability, ServedSpan, Verdict
from protocol.identity import BlockRange, ModelId, PeerId, peer_id_from_public_key
from protocol.messages import Load
from selector.placement import plan_moves

PEER = peer_id_from_public_key(bytes(32))
US = peer_id_from_public_key(bytes([1] * 32))
MODEL = ModelId("ab" * 32)
LONGEST_S = 300.0


def other_peer(number: int) -> PeerId:
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


def test_leaving_peer_is_draining_and_no_longer_a_candidate() -> None:
    directory = Directory(own_peer=US)
    assert directory.update(heartbeat(1), 0.0, dialled=True)
    assert directory.candidates(MODEL)
    assert directory.update(heartbeat(2, leaving=True), 1.0)
    assert not directory.candidates(MODEL)
    assert not directory.entries()
    assert [entry.peer for entry in directory.draining()] == [PEER]


def test_only_newer_heartbeats_revive_a_peer_that_left() -> None:
    directory = Directory(own_peer=US)
    directory.update(heartbeat(2, leaving=True), 0.0)
    assert not directory.update(heartbeat(1), 0.1)
    assert not directory.entries()
    assert directory.update(heartbeat(3), 0.2)
    assert directory.entries()
    assert not directory.draining()


def test_number_of_a_clock_that_was_ahead_counts_until_its_heartbeat_has_expired() -> None:
    directory = Directory(own_peer=US)
    hours_ahead = heartbeat(2_000_000_000_000, leaving=True)
    directory.update(hours_ahead, 0.0)
    assert not directory.update(replace(heartbeat(1), issued_at_s=hours_ahead.expires_at_s - 1), 59.0)
    assert directory.update(replace(heartbeat(1), issued_at_s=hours_ahead.expires_at_s), 60.0)
    assert directory.entries()


def test_peer_with_overdue_heartbeats_expires_also_while_draining() -> None:
    directory = Directory(own_peer=US)
    other = peer_id_from_public_key(bytes([2] * 32))
    directory.update(heartbeat(1), 0.0)
    directory.update(heartbeat(1, peer=other, leaving=True), 0.0)
    directory.update(heartbeat(2, peer=other, leaving=True), 5.0)
    life_s = LIFE_IN_INTERVALS * 2.0
    assert directory.expire(life_s, LONGEST_S) == ()
    assert directory.expire(life_s + 1, LONGEST_S) == (PEER,)
    assert directory.draining()
    assert directory.expire(life_s + 6, LONGEST_S) == ()
    assert not directory.draining()


def test_expiry_follows_the_announced_interval() -> None:
    directory = Directory(own_peer=US)
    directory.update(heartbeat(1, interval_ms=60_000), 0.0)
    assert directory.expire(LIFE_IN_INTERVALS * 60.0, LONGEST_S) == ()
    directory.update(heartbeat(2, interval_ms=1000), 240.0)
    assert directory.expire(240.0 + LIFE_IN_INTERVALS + 1, LONGEST_S) == (PEER,)


def test_restart_revokes_earlier_placement_announcements() -> None:
    directory = Directory(own_peer=US)
    for sequence, blocks in enumerate((BlockRange(0, 3), None)):
        clock_s = 1_800_000_000.0 + sequence
        statements = PlacementAnnouncements(lambda: None, lambda clock_s=clock_s: clock_s)  # type: ignore[misc]
        if blocks is not None:
            statements.publish(MODEL, Placement(model=MODEL, blocks=blocks, rate=1.0, movable=False))
        announced = statements.current()
        said_in = replace(heartbeat(sequence), placements=announced.placements, placed_at_ms=announced.since_ms)
        directory.update(said_in, float(sequence), dialled=True)
        assert bool(directory.servers(MODEL, 1_800_000_060_000)) == (blocks is not None)


def test_placements_announced_by_a_clock_that_was_ahead_count_once_it_is_set() -> None:
    ahead_s = 7200
    statements = PlacementAnnouncements(lambda: None, lambda: 1_800_000_000.0 + ahead_s)
    statements.publish(MODEL, Placement(model=MODEL, blocks=BlockRange(0, 3), rate=1.0, movable=False))
    directory = Directory(own_peer=PEER)  # which hears its own heartbeats at any time
    for sequence, ahead_s in enumerate((7200, 0, 0)):
        said = heartbeat(sequence)
        said = replace(said, issued_at_s=said.issued_at_s + ahead_s, expires_at_s=said.expires_at_s + ahead_s)
        announced = statements.current()
        directory.update(replace(said, placements=announced.placements, placed_at_ms=announced.since_ms), 0.0)
        assert len(directory.servers(MODEL, 1_800_000_000_000)) == (ahead_s == 0)


def test_announced_spans_count_once_the_peer_was_reached() -> None:
    connected: list[PeerId] = []
    directory = Directory(own_peer=US, connected=lambda: connected)
    placement = Placement(model=MODEL, blocks=BlockRange(0, 3), rate=1.0, movable=True)
    directory.update(replace(heartbeat(1), placements=(placement,), placed_at_ms=1), 0.0)

    def counts() -> list[bool]:
        return [bool(directory.candidates(MODEL)), bool(directory.models()), bool(directory.servers(MODEL, 2))]

    assert counts() == [False] * 3
    connected.append(PEER)
    assert counts() == [True] * 3
    connected.clear()
    assert counts() == [False] * 3, "a connection that it opened says nothing once it is gone"
    directory.on_dialled(PEER, True)
    assert counts() == [True] * 3
    directory.update(heartbeat(2), 1.0)
    assert directory.candidates(MODEL)
    directory.on_dialled(PEER, False)
    assert not directory.candidates(MODEL)


def test_placements_are_the_same_wherever_the_observer_is() -> None:
    def home(sequence: int, peer: PeerId, host: str) -> Heartbeat:
        placement = Placement(model=MODEL, blocks=BlockRange(0, 3), rate=1.0, movable=True)
        reachability = Reachability(verdict=Verdict.PRIVATE, observed=(f"/ip4/{host}/tcp/4001",))
        said = heartbeat(sequence, peer=peer)
        return replace(said, placements=(placement,), placed_at_ms=1, reachability=reachability)

    one, other, friend = US, other_peer(1), other_peer(2)
    said = [home(1, one, "8.8.8.8"), home(1, other, "9.9.9.9"), home(1, friend, "9.9.9.9")]
    observers = [Directory(own_peer=each) for each in (one, other, friend)]
    for directory in observers:
        for each in said:
            directory.update(each, 0.0, dialled=True)
    assert {len(directory.servers(MODEL, 2)) for directory in observers} == {3}


def announcing(sequence: int, *spans: BlockRange, after_s: float = 0, placed_after_s: float = 0) -> Heartbeat:
    """Return a heartbeat of a peer that announces blocks 0 to 9 some time after the first, and serves others."""
    said = heartbeat(sequence)
    return replace(
        said,
        issued_at_s=said.issued_at_s + int(after_s),
        spans=tuple(ServedSpan(model=MODEL, blocks=blocks, load=Load()) for blocks in spans),
        placements=(Placement(model=MODEL, blocks=BlockRange(0, 9), rate=1.0 + sequence, movable=True),),
        placed_at_ms=1000 * (said.issued_at_s + int(placed_after_s)),
    )


def planned(directory: Directory) -> list[tuple[str, bool]]:
    """Return the blocks that plans count, and whether they can be moved."""
    return [(str(each.stage.blocks), each.movable) for each in directory.servers(MODEL, 1_900_000_000_000)]


def test_announced_blocks_that_are_not_served_in_time_do_not_count_until_they_are() -> None:
    directory = Directory(own_peer=US)
    directory.update(announcing(1), 0.0, dialled=True)
    directory.update(announcing(2, after_s=LOADING_S, placed_after_s=LOADING_S), 0.0)
    assert planned(directory) == [("0-9", True)]
    directory.update(announcing(3, after_s=LOADING_S + 1, placed_after_s=LOADING_S + 1), 0.0)
    assert planned(directory) == [], "also where it announces them anew"
    directory.update(announcing(4, BlockRange(0, 4), after_s=LOADING_S + 2), 0.0)
    assert planned(directory) == [("0-4", False)], "what it serves counts"
    directory.update(announcing(5, BlockRange(4, 9), BlockRange(0, 4), after_s=LOADING_S + 3), 0.0)
    assert planned(directory) == [("0-9", True)]
    directory.update(announcing(6, after_s=2 * LOADING_S), 0.0)
    assert planned(directory) == [("0-9", True)], "an engine that died has its time to come back"


def test_newcomer_counts_blocks_that_were_announced_long_ago_only_while_their_peer_may_be_restarting() -> None:
    directory, days_s = Directory(own_peer=US), 3 * 86_400
    directory.update(announcing(7, after_s=days_s), 0.0, dialled=True)
    assert planned(directory) == [("0-9", True)], "its engine may have died just now"
    directory.update(announcing(8, after_s=days_s + RESTART_S), 0.0)
    assert planned(directory) == [("0-9", True)]
    directory.update(announcing(9, after_s=days_s + RESTART_S + 1), 0.0)
    assert planned(directory) == []
    directory.update(announcing(10, BlockRange(0, 9), after_s=days_s + RESTART_S + 2), 0.0)
    assert planned(directory) == [("0-9", True)]


def test_newcomer_counts_blocks_that_were_announced_lately_for_the_rest_of_their_time() -> None:
    directory = Directory(own_peer=US)
    directory.update(announcing(1, after_s=60), 0.0, dialled=True)
    directory.update(announcing(2, after_s=LOADING_S), 0.0)
    assert planned(directory) == [("0-9", True)]
    directory.update(announcing(3, after_s=LOADING_S + 1), 0.0)
    assert planned(directory) == []


def test_absurd_announced_rate_does_not_hide_unserved_blocks_from_the_plan() -> None:
    directory = Directory(own_peer=US)
    for number, (start, rate) in enumerate([(0, 1e9), (10, 0.3), (10, 0.3)]):
        said = heartbeat(1, peer=other_peer(number))
        blocks = BlockRange(start, start + 10)
        directory.update(
            replace(
                said,
                spans=(ServedSpan(model=MODEL, blocks=blocks, load=Load()),),
                placements=(Placement(model=MODEL, blocks=blocks, rate=rate, movable=number > 0),),
                placed_at_ms=1,
            ),
            0.0,
            dialled=True,
        )
    moves = plan_moves(30, directory.servers(MODEL, 2), random.Random(0))
    assert list(moves.values()) == [BlockRange(20, 30)]


def test_number_of_unreached_peers_from_one_relay_is_bounded() -> None:
    directory = Directory(own_peer=US)
    relay, other = other_peer(1), other_peer(2)
    for number in range(1890):
        directory.update(heartbeat(1, peer=other_peer(number)), 0.0, relay=relay)
    assert len(directory.entries()) == MAX_UNREACHED_PER_RELAY
    assert directory.update(heartbeat(1, peer=other_peer(5000)), 0.0, relay=other), "others may tell of theirs"
    directory.on_dialled(other_peer(0), True)
    assert directory.update(heartbeat(1, peer=other_peer(5001)), 0.0, relay=relay), "who was reached does not count"


@pytest.mark.parametrize("address", ["/ip4/203.0.112.{0}/tcp/{1}", "/ip6/2a00:1:2:0:{0}::{1}/tcp/4001"])
def test_peers_per_public_range_are_bounded_and_unreached_ones_more_so(address: str) -> None:
    directory = Directory(own_peer=US)

    def hear(number: int, dialled: bool) -> bool:
        multiaddrs = (address.format(number % 250, 4001 + number),)
        return directory.update(heartbeat(1, peer=other_peer(number), multiaddrs=multiaddrs), 0.0, dialled=dialled)

    assert sum(hear(number, dialled=False) for number in range(500)) == MAX_UNREACHED_PER_RANGE
    assert sum(hear(number, dialled=True) for number in range(1000, 1100)) == 100, "others' claims keep nobody out"


def test_reached_peers_of_a_public_range_are_bounded_and_connected_ones_come_first() -> None:
    connected: list[PeerId] = []
    directory = Directory(own_peer=US, connected=lambda: connected, range_of=lambda peer: "203.0.112.0/24")
    heard = [directory.update(heartbeat(1, peer=other_peer(each)), 0.0, dialled=True) for each in range(1, 300)]
    assert heard == [each <= MAX_PER_RANGE for each in range(1, 300)]
    assert directory.update(heartbeat(1, peer=other_peer(500)), 0.0)
    directory.on_dialled(other_peer(500), True)
    assert directory.get(other_peer(500)) not in directory.reached()
    connected.append(other_peer(1000))
    assert directory.update(heartbeat(1, peer=other_peer(1000)), 0.0)
    assert len(directory.reached()) == MAX_PER_RANGE
    assert not directory.knows(other_peer(1)), "the one that was heard longest ago"


def test_claimed_addresses_do_not_keep_a_connected_peer_out() -> None:
    """Hostile peers that were reached elsewhere claim addresses in the victim's range, too."""
    reached_in = {other_peer(number): f"45.9.{number // 200}.0/24" for number in range(1, 300)}
    connected: list[PeerId] = []
    directory = Directory(own_peer=US, connected=lambda: connected, range_of=reached_in.get)
    for peer in reached_in:
        claimed = heartbeat(1, peer=peer, multiaddrs=("/ip4/203.0.112.7/tcp/4001", "/ip4/45.9.0.1/tcp/4001"))
        directory.update(claimed, 0.0, dialled=True)
    victim = heartbeat(1, multiaddrs=("/ip4/203.0.112.34/tcp/4001",))
    assert directory.update(victim, 0.0), "not connected yet: only unreached claims count"
    directory.forget(PEER)
    for number in range(1000, 1100):
        directory.update(heartbeat(1, peer=other_peer(number), multiaddrs=("/ip4/203.0.112.8/tcp/4001",)), 0.0)
    connected.append(PEER)
    assert directory.update(victim, 0.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.7", "10.2.3.4"])
def test_private_address_is_not_bounded(host: str) -> None:
    directory = Directory(own_peer=US)
    for number in range(600):
        heard = heartbeat(1, peer=other_peer(number), multiaddrs=(f"/ip4/{host}/tcp/{4001 + number}",))
        assert directory.update(heard, 0.0)
        directory.on_dialled(other_peer(number), True)
    assert len(directory.reached()) == 600


def test_unreached_peers_of_the_most_crowded_place_are_evicted_first() -> None:
    directory = Directory(own_peer=US)
    directory.update(heartbeat(1), 0.0, dialled=True)
    lone = heartbeat(1, peer=other_peer(9_999_999), multiaddrs=("/ip4/192.168.9.9/tcp/4001",))
    directory.update(lone, 0.0)
    for number in range(MAX_UNREACHED + 100):
        crowd = heartbeat(1, peer=other_peer(number), multiaddrs=(f"/ip4/10.0.0.1/tcp/{4001 + number}",))
        directory.update(crowd, 1.0)
    assert directory.get(PEER)
    assert directory.get(lone.peer)
    assert len(directory.unreached()) == MAX_UNREACHED


def test_expiry_ignores_absurdly_long_announced_intervals() -> None:
    directory = Directory(own_peer=US)
    directory.update(heartbeat(1, interval_ms=300_000), 0.0)
    assert directory.expire(LIFE_IN_INTERVALS * 10.0, 10.0) == ()
    assert directory.expire(LIFE_IN_INTERVALS * 10.0 + 1, 10.0) == (PEER,)
