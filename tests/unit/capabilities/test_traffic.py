import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.capabilities.traffic import MAX_PEERS, MIN_TRANSFER_BYTES, TrafficMeter
from protocol.capabilities import MAX_NEIGHBOURS, Capabilities, Links
from protocol.figures import MAX_ROUND_TRIP_S
from protocol.schema import from_map, to_map
from tests.support.capabilities import EPYC, peer_of

BOTH = ALICE, BOB = peer_of(1), peer_of(2)
MIB = 1 << 20


def test_without_traffic_there_are_no_estimates() -> None:
    assert TrafficMeter().links(BOTH) == Links()


def test_link_estimates_follow_the_traffic() -> None:
    meter = TrafficMeter()
    meter.sent(ALICE, 10 * MIB, 2.0)
    meter.received(ALICE, 30 * MIB, 2.0)
    meter.round_trip(ALICE, 0.05)
    links = meter.links(BOTH)
    (alice,) = links.neighbours
    assert (alice.peer, alice.round_trip_s) == (ALICE, 0.05)
    assert alice.upload_bytes_per_s == links.upload_bytes_per_s == pytest.approx(5 * MIB)
    assert alice.download_bytes_per_s == links.download_bytes_per_s == pytest.approx(15 * MIB)


def test_the_best_neighbour_shows_what_our_own_link_can_do() -> None:
    meter = TrafficMeter()
    meter.sent(ALICE, MIB, 1.0)
    meter.sent(BOB, MIB, 0.1)
    assert meter.links(BOTH).upload_bytes_per_s == pytest.approx(10 * MIB)
    assert meter.links(BOTH).download_bytes_per_s is None


def test_rates_are_weighted_by_transfer_size() -> None:
    meter = TrafficMeter()
    meter.received(ALICE, 100 * MIB, 10.0)
    meter.received(ALICE, MIB, 1.0)
    assert meter.links(BOTH).download_bytes_per_s == pytest.approx(10 * MIB, rel=0.1)


def test_rates_decay_to_the_recent_ones() -> None:
    meter = TrafficMeter()
    meter.received(ALICE, 100 * MIB, 1.0)
    for _ in range(20):
        meter.received(ALICE, 100 * MIB, 100.0)
    assert meter.links(BOTH).download_bytes_per_s == pytest.approx(MIB, rel=0.1)


def test_former_neighbour_is_not_announced_and_starts_afresh_when_it_comes_back() -> None:
    meter = TrafficMeter()
    meter.sent(ALICE, 10 * MIB, 0.1)
    meter.round_trip(ALICE, 0.001)
    meter.sent(BOB, 10 * MIB, 10.0)
    links = meter.links([BOB])
    assert [neighbour.peer for neighbour in links.neighbours] == [BOB]
    assert links.upload_bytes_per_s == pytest.approx(MIB)
    meter.round_trip(ALICE, 0.2)
    alice = meter.links(BOTH).neighbours[0]
    assert (alice.peer, alice.round_trip_s, alice.upload_bytes_per_s) == (ALICE, 0.2, None)


def test_small_transfers_show_no_rate() -> None:
    meter = TrafficMeter()
    meter.sent(ALICE, MIN_TRANSFER_BYTES - 1, 1.0)
    meter.received(ALICE, 10 * MIB, 0.0)
    assert meter.links(BOTH) == Links()


def test_neighbours_are_bounded_and_ordered_by_latest_traffic() -> None:
    meter = TrafficMeter()
    for number in range(MAX_PEERS + 1):
        meter.round_trip(peer_of(number), 0.01)
    meter.sent(peer_of(0), MIB, 1.0)
    neighbours = meter.links({peer_of(number) for number in range(MAX_PEERS + 1)}).neighbours
    assert len(neighbours) == MAX_NEIGHBOURS
    assert neighbours[0].peer == peer_of(0)
    assert neighbours[0].round_trip_s is None
    assert neighbours[1].peer == peer_of(MAX_PEERS)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sent", "received"]),
            st.integers(0, 1 << 60),
            st.floats(0, 1e9),
            st.floats(-1, 2 * MAX_ROUND_TRIP_S),
        ),
        max_size=20,
    )
)
def test_any_traffic_yields_a_valid_record(events: list[tuple[str, int, float, float]]) -> None:
    meter = TrafficMeter()
    for direction, byte_count, seconds, round_trip_s in events:
        getattr(meter, direction)(ALICE, byte_count, seconds)
        meter.round_trip(BOB, round_trip_s)
    said = Capabilities(processor=EPYC.processor, memory=EPYC.memory, software=EPYC.software, links=meter.links(BOTH))
    assert from_map(Capabilities, to_map(said), "capabilities") == said
