"""The link between two peers: as measured by either, else guessed."""

from node.swarm.link_estimates import HANDLING_S, UNKNOWN_BYTES_PER_S, UNKNOWN_ROUND_TRIP_S, LinkEstimates
from protocol.capabilities import Links, Neighbour
from protocol.identity import PeerId

A, B, C, D = map(PeerId, "abcd")


def estimates() -> LinkEstimates:
    told = {
        B: Links(neighbours=(Neighbour(peer=C, round_trip_s=0.004, upload_bytes_per_s=1e6),)),
        C: Links(neighbours=(Neighbour(peer=B, round_trip_s=0.006, upload_bytes_per_s=2e6, download_bytes_per_s=5e5),)),
    }
    return LinkEstimates(A, {B: 0.08, C: 0.09}.get, told.get)


def test_own_pings_take_precedence_over_announced_round_trips() -> None:
    assert estimates().between(A, B).round_trip_s == 0.08 + HANDLING_S
    assert estimates().between(C, A).round_trip_s == 0.09 + HANDLING_S


def test_remote_link_uses_either_round_trip_and_the_slower_rate() -> None:
    assert estimates().between(B, C) == (0.004 + HANDLING_S, 5e5)
    assert estimates().between(C, B) == (0.006 + HANDLING_S, 2e6)


def test_unknown_links_get_default_estimates() -> None:
    assert estimates().between(B, D) == (0.08 + HANDLING_S, UNKNOWN_BYTES_PER_S)
    assert LinkEstimates(A, lambda _: None, lambda _: None).between(B, D) == (
        UNKNOWN_ROUND_TRIP_S + HANDLING_S,
        UNKNOWN_BYTES_PER_S,
    )
    assert estimates().between(B, B).round_trip_s == HANDLING_S
