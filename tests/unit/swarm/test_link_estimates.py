"""The link between two peers: as measured by either, else estimated; none where they cannot reach each other."""

import math
from typing import Any

from node.swarm.directory import Directory
from node.swarm.link_estimates import HANDLING_S, UNKNOWN_ROUND_TRIP_S, LinkEstimates
from protocol.announcements import Heartbeat, Reachability, Verdict
from protocol.capabilities import Links, Neighbour
from protocol.identity import PeerId
from selector.routing import UNKNOWN_BYTES_PER_S

A, B, C, D = map(PeerId, "abcd")


def estimates() -> LinkEstimates:
    told = {
        B: Links(neighbours=(Neighbour(peer=C, round_trip_s=0.004, upload_bytes_per_s=1e6),)),
        C: Links(neighbours=(Neighbour(peer=B, round_trip_s=0.006, upload_bytes_per_s=2e6, download_bytes_per_s=5e5),)),
    }
    return LinkEstimates(Directory(own_peer=A), A, {B: 0.08, C: 0.09}.get, told.get)


def test_own_pings_take_precedence_over_announced_round_trips() -> None:
    assert estimates().between(A, B).round_trip_s == 0.08 + HANDLING_S
    assert estimates().between(C, A).round_trip_s == 0.09 + HANDLING_S


def test_remote_link_uses_either_round_trip_and_the_slower_rate() -> None:
    assert estimates().between(B, C)[:2] == (0.004 + HANDLING_S, 5e5)
    assert estimates().between(C, B)[:2] == (0.006 + HANDLING_S, 2e6)


def test_unknown_links_get_default_estimates() -> None:
    assert estimates().between(B, D)[:2] == (0.08 + HANDLING_S, UNKNOWN_BYTES_PER_S)
    assert LinkEstimates(Directory(own_peer=A), A, lambda _: None, lambda _: None).between(B, D)[:2] == (
        UNKNOWN_ROUND_TRIP_S + HANDLING_S,
        UNKNOWN_BYTES_PER_S,
    )
    assert estimates().between(B, B).round_trip_s == HANDLING_S


def test_guesses_are_told_from_what_was_measured() -> None:
    known = {pair: estimates().between(*pair)[2:] for pair in ((B, C), (A, B), (B, D))}
    assert known == {(B, C): (True, True), (A, B): (True, False), (B, D): (False, False)}, "round trip, rate"
    relay = heartbeat(D, "50.0.0.1", verdict=Verdict.PUBLIC)
    homes = [home(peer, host, relays=(D,), endpoint_dependent=True) for peer, host in ((B, "8.8.8.8"), (C, "9.9.9.9"))]
    assert swarm(relay, *homes).between(B, C)[2:] == (False, False), "both legs are guessed"


def heartbeat(peer: PeerId, host: str, **reachability: Any) -> Heartbeat:
    return Heartbeat(
        peer=peer,
        sequence=1,
        issued_at_s=0,
        expires_at_s=60,
        interval_ms=1000,
        multiaddrs=("/ip4/192.168.1.2/tcp/4001",),
        agent="test/1",
        reachability=Reachability(observed=(f"/ip4/{host}/tcp/4001",), **reachability),
    )


def swarm(*heartbeats: Heartbeat, relay_to: PeerId | None = None) -> LinkEstimates:
    directory = Directory(own_peer=A)
    for each in heartbeats:
        directory.update(each, 0.0)
    known = {B: 0.04, C: 0.05, D: 0.01}
    return LinkEstimates(directory, A, known.get, lambda _: None, relay_to=lambda _: relay_to)


def home(peer: PeerId, host: str, **reachability: Any) -> Heartbeat:
    return heartbeat(peer, host, verdict=Verdict.PRIVATE, **reachability)


def test_private_peers_in_two_networks_cannot_reach_each_other_without_a_relay() -> None:
    links = swarm(home(B, "8.8.8.8"), home(C, "9.9.9.9"))
    assert math.isinf(links.between(B, C).round_trip_s)
    assert math.isfinite(swarm(home(B, "8.8.8.8"), home(C, "8.8.8.8")).between(B, C).round_trip_s)
    relayed, relay = home(C, "9.9.9.9", relays=(D,)), heartbeat(D, "50.0.0.1", relay_bytes_per_s=1e6)
    assert math.isfinite(swarm(home(B, "8.8.8.8"), relayed, relay).between(B, C).round_trip_s)
    assert math.isfinite(swarm(home(B, "8.8.8.8"), heartbeat(C, "9.9.9.9")).between(B, C).round_trip_s)


def test_connected_peer_is_reached_however_private_it_is() -> None:
    directory = Directory(own_peer=A, connected=lambda: (C,))
    for each in (home(A, "8.8.8.8"), home(B, "9.9.9.9"), home(C, "7.7.7.7")):
        directory.update(each, 0.0)
    links = LinkEstimates(directory, A, lambda _: None, lambda _: None)
    assert math.isinf(links.between(A, B).round_trip_s)
    assert math.isfinite(links.between(A, C).round_trip_s)


def test_relayed_pair_costs_both_legs_at_most_at_the_rate_of_the_relay() -> None:
    relay = heartbeat(D, "50.0.0.1", verdict=Verdict.PUBLIC, relay_bytes_per_s=1e6)
    symmetric = home(B, "8.8.8.8", relays=(D,), endpoint_dependent=True)
    links = swarm(relay, symmetric, home(C, "9.9.9.9", relays=(D,)))
    legs = links.between(B, D).round_trip_s + links.between(D, C).round_trip_s
    assert links.between(B, C)[:2] == (legs, 1e6)
    # A hole is punched between ports that stay the same.
    punched = swarm(relay, home(B, "8.8.8.8", relays=(D,)), home(C, "9.9.9.9", relays=(D,)))
    assert punched.between(B, C).bytes_per_s == UNKNOWN_BYTES_PER_S


def test_peers_that_name_each_other_as_relays_cost_an_estimate_and_no_recursion() -> None:
    symmetric = home(C, "9.9.9.9", relays=(D,), endpoint_dependent=True)
    for says in (Verdict.PRIVATE, Verdict.PUBLIC):
        relay = heartbeat(D, "50.0.0.1", verdict=says, relays=(B,), endpoint_dependent=True, relay_bytes_per_s=1e6)
        links = swarm(relay, home(B, "8.8.8.8", relays=(D,), endpoint_dependent=True), symmetric)
        for one, other in ((B, C), (C, B), (B, D), (D, B), (C, D), (D, C)):
            assert links.between(one, other).round_trip_s > 0


def test_relay_that_is_gone_or_invented_or_does_not_relay_makes_no_way() -> None:
    homes = home(B, "8.8.8.8"), home(C, "9.9.9.9", relays=(D,))
    assert math.isinf(swarm(*homes).between(B, C).round_trip_s)
    assert math.isinf(swarm(*homes, heartbeat(D, "50.0.0.1", verdict=Verdict.PUBLIC)).between(B, C).round_trip_s)
    private = home(D, "50.0.0.1", relay_bytes_per_s=1e6)
    assert math.isinf(swarm(*homes, private).between(B, C).round_trip_s)
    # One that announces nothing, as this node is connected to it.
    directory = Directory(own_peer=A, connected=lambda: (D,))
    for each in homes:
        directory.update(each, 0.0)
    connected = LinkEstimates(directory, A, lambda _: None, lambda _: None)
    assert math.isfinite(connected.between(B, C).round_trip_s)


def test_only_a_public_peer_is_believed_to_relay() -> None:
    private = home(D, "50.0.0.1", relay_bytes_per_s=1.0)
    links = swarm(private, home(B, "8.8.8.8", relays=(D,), endpoint_dependent=True), home(C, "9.9.9.9", relays=(D,)))
    assert links.between(B, C).bytes_per_s == UNKNOWN_BYTES_PER_S


def test_own_circuit_is_as_slow_as_was_measured_through_it() -> None:
    relay = heartbeat(D, "50.0.0.1", verdict=Verdict.PUBLIC, relay_bytes_per_s=1e6)
    assert swarm(relay, home(B, "8.8.8.8"), relay_to=D).between(A, B)[:2] == (0.04 + HANDLING_S, 1e6)
