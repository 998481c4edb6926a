"""What a node concludes about itself from observations and dial-backs."""

from node.network.addresses import TcpAddress, parse_address
from node.network.observed_addresses import ObservedAddresses
from node.network.reachability_verdicts import VALID_S, Verdicts
from protocol.announcements import Verdict
from protocol.identity import PeerId

A, B, C = "9.9.9.0/24", "4.4.4.0/24", "1.1.1.0/24"
HOME = parse_address("/ip4/8.8.8.8/tcp/4001")
THIRD = parse_address("/ip4/8.8.8.8/tcp/60000")
OTHER = parse_address("/ip4/8.8.8.8/tcp/50000")
SIX = parse_address("/ip6/2a00::1/tcp/4001")
NAME = parse_address("/dns4/example.org/tcp/4001")


def test_one_success_outweighs_failures_that_servers_claim() -> None:
    verdicts = Verdicts()
    assert verdicts.overall([HOME], 0.0) is Verdict.UNKNOWN
    for server in (A, C):
        verdicts.record(HOME, server, reached=False, now_s=0.0)
    assert verdicts.overall([HOME], 0.0) is Verdict.PRIVATE
    verdicts.record(HOME, B, reached=True, now_s=1.0)
    assert verdicts.overall([HOME], 1.0) is Verdict.PUBLIC
    verdicts.record(HOME, B, reached=False, now_s=2.0)
    assert verdicts.overall([HOME], 2.0) is Verdict.PRIVATE


def test_address_that_we_know_ourselves_fails_when_two_ranges_say_so() -> None:
    verdicts = Verdicts({OTHER: {A}}.get)
    for address in (HOME, OTHER):
        verdicts.record(address, A, reached=False, now_s=0.0)
    assert verdicts.of(HOME, 0.0) is Verdict.UNKNOWN  # one machine may have said it, under any number of identities
    assert verdicts.of(OTHER, 0.0) is Verdict.PRIVATE  # there is a NAT in between


def test_failure_without_success_casts_doubt_before_there_is_a_verdict() -> None:
    verdicts = Verdicts()
    assert not verdicts.is_doubtful([HOME], 0.0)
    verdicts.record(SIX, B, reached=True, now_s=0.0)
    verdicts.record(HOME, A, reached=False, now_s=0.0)
    assert verdicts.overall([HOME, SIX], 0.0) is Verdict.UNKNOWN
    assert verdicts.is_doubtful([HOME, SIX], 0.0)  # many peers have IPv4 only
    verdicts.record(HOME, B, reached=True, now_s=1.0)
    assert not verdicts.is_doubtful([HOME, SIX], 1.0)
    assert not verdicts.is_doubtful([HOME, SIX], 1.0 + VALID_S)


def test_address_that_others_told_of_takes_peers_in_two_ranges() -> None:
    seen_by: dict[TcpAddress, set[str]] = {HOME: {A}, OTHER: {A, C}}
    verdicts = Verdicts(seen_by.get)
    for address in (HOME, OTHER):
        verdicts.record(address, A, reached=True, now_s=0.0)
    assert verdicts.of(HOME, 0.0) is Verdict.UNKNOWN  # who says that we are there has confirmed it, too
    assert verdicts.of(OTHER, 0.0) is Verdict.PUBLIC
    verdicts.record(HOME, B, reached=True, now_s=0.0)
    assert verdicts.of(HOME, 0.0) is Verdict.PUBLIC


def test_reports_expire() -> None:
    verdicts = Verdicts()
    verdicts.record(HOME, A, reached=True, now_s=0.0)
    assert verdicts.overall([HOME], VALID_S) is Verdict.UNKNOWN


def test_ipv4_decides_as_many_peers_have_nothing_else() -> None:
    verdicts = Verdicts()
    verdicts.record(SIX, A, reached=True, now_s=0.0)
    assert verdicts.overall([SIX], 0.0) is Verdict.PUBLIC
    for server in (A, B):
        verdicts.record(HOME, server, reached=False, now_s=0.0)
    assert verdicts.overall([SIX, HOME], 0.0) is Verdict.PRIVATE
    assert verdicts.of(SIX, 0.0) is Verdict.PUBLIC


def test_announced_name_counts_as_public() -> None:
    assert Verdicts().overall([NAME], 0.0) is Verdict.PUBLIC


def observed(*seen: tuple[str, TcpAddress]) -> ObservedAddresses:
    found = ObservedAddresses()
    for host, address in seen:
        found.record(PeerId(host), host, address)
    return found


def test_symmetric_nat_is_recognised_by_different_ports() -> None:
    assert not observed(("9.9.9.9", HOME)).endpoint_dependent
    assert not observed(("9.9.9.9", HOME), ("1.1.1.1", HOME)).endpoint_dependent
    assert not observed(("9.9.9.9", HOME), ("1.1.1.1", OTHER)).endpoint_dependent, "one of the two may lie"
    assert observed(("9.9.9.9", HOME), ("1.1.1.1", OTHER), ("4.4.4.4", THIRD)).endpoint_dependent
    assert not observed(("9.9.9.9", HOME), ("1.1.1.1", HOME), ("4.4.4.4", OTHER)).endpoint_dependent


def test_one_range_of_observers_counts_once() -> None:
    liars = [(f"9.9.9.{number}", OTHER) for number in range(20)]
    assert observed(*liars, ("1.1.1.1", HOME), ("4.4.4.4", HOME)).addresses()[0] == HOME


def test_peer_that_connected_tells_of_no_host_that_peers_dialled_by_us_do_not_see() -> None:
    victim = parse_address("/ip4/7.7.7.7/tcp/443")
    found = observed(("9.9.9.9", victim))
    assert found.addresses() == (victim,)  # nobody else has seen us
    found.record_host(PeerId("dialled"), "1.1.1.1", HOME)
    assert found.addresses() == ()
    for number in range(4):
        found.record(PeerId(f"liar-{number}"), f"9.9.9.{number}", victim)
    found.record(PeerId("honest"), "4.4.4.4", OTHER)  # the same host
    assert found.addresses() == (OTHER,)
    assert not found.endpoint_dependent


def test_host_that_peers_in_two_ranges_name_is_a_candidate_and_says_nothing_of_the_nat() -> None:
    ingress = [parse_address(f"/ip4/7.7.7.7/tcp/{port}") for port in (4001, 4002, 4003)]
    found = observed(("9.9.9.9", ingress[0]), ("4.4.4.4", ingress[0]))
    found.record_host(PeerId("dialled"), "1.1.1.1", HOME)
    assert found.addresses() == (ingress[0],)
    for host, address in zip(("5.5.5.5", "6.6.6.6"), ingress[1:], strict=True):
        found.record(PeerId(host), host, address)
    assert not found.endpoint_dependent


def test_observation_ends_when_its_peer_disconnects() -> None:
    moved = observed(*((host, HOME) for host in ("9.9.9.9", "1.1.1.1", "4.4.4.4")))
    for host in ("9.9.9.9", "1.1.1.1"):
        moved.disconnected(PeerId(host))
    moved.record(PeerId("new"), "5.5.5.5", OTHER)
    moved.record(PeerId("another"), "6.6.6.6", OTHER)
    assert moved.addresses() == (OTHER, HOME)
    moved.disconnected(PeerId("4.4.4.4"))
    assert moved.addresses() == (OTHER,)
    assert not moved.endpoint_dependent


def test_last_observation_of_each_kind_stands_until_there_is_a_new_one() -> None:
    alone = observed(("9.9.9.9", HOME), ("2a01::1", SIX))
    alone.disconnected(PeerId("9.9.9.9"))
    alone.disconnected(PeerId("2a01::1"))
    assert alone.addresses() == (HOME, SIX)
    alone.record(PeerId("new"), "1.1.1.1", OTHER)
    assert alone.addresses() == (OTHER, SIX)
