"""What a node concludes about itself from observations and dial-backs."""

from node.network.addresses import TcpAddress, parse_address
from node.network.observed_addresses import ObservedAddresses
from node.network.verdicts import VALID_S, Verdicts
from protocol.announcements import Verdict
from protocol.identity import PeerId

A, B = PeerId("server-a"), PeerId("server-b")
HOME = parse_address("/ip4/8.8.8.8/tcp/4001")
OTHER = parse_address("/ip4/8.8.8.8/tcp/50000")
SIX = parse_address("/ip6/2a00::1/tcp/4001")
NAME = parse_address("/dns4/example.org/tcp/4001")


def test_one_success_outweighs_failures_that_servers_claim() -> None:
    verdicts = Verdicts()
    assert verdicts.overall([HOME], 0.0) is Verdict.UNKNOWN
    verdicts.record(HOME, A, reached=False, now_s=0.0)
    assert verdicts.overall([HOME], 0.0) is Verdict.PRIVATE
    verdicts.record(HOME, B, reached=True, now_s=1.0)
    assert verdicts.overall([HOME], 1.0) is Verdict.PUBLIC
    verdicts.record(HOME, B, reached=False, now_s=2.0)
    assert verdicts.overall([HOME], 2.0) is Verdict.PRIVATE


def test_address_that_others_told_of_takes_peers_in_two_ranges() -> None:
    seen_by: dict[TcpAddress, set[str]] = {HOME: {"9.9.9.0/24"}, OTHER: {"9.9.9.0/24", "1.1.1.0/24"}}
    verdicts = Verdicts(seen_by.get)
    for address in (HOME, OTHER):
        verdicts.record(address, A, reached=True, now_s=0.0, server_range="9.9.9.0/24")
    assert verdicts.of(HOME, 0.0) is Verdict.UNKNOWN  # who says that we are there has confirmed it, too
    assert verdicts.of(OTHER, 0.0) is Verdict.PUBLIC
    verdicts.record(HOME, B, reached=True, now_s=0.0, server_range="4.4.4.0/24")
    assert verdicts.of(HOME, 0.0) is Verdict.PUBLIC


def test_reports_expire() -> None:
    verdicts = Verdicts()
    verdicts.record(HOME, A, reached=True, now_s=0.0)
    assert verdicts.overall([HOME], VALID_S) is Verdict.UNKNOWN


def test_ipv4_decides_as_many_peers_have_nothing_else() -> None:
    verdicts = Verdicts()
    verdicts.record(SIX, A, reached=True, now_s=0.0)
    assert verdicts.overall([SIX], 0.0) is Verdict.PUBLIC
    verdicts.record(HOME, A, reached=False, now_s=0.0)
    assert verdicts.overall([SIX, HOME], 0.0) is Verdict.PRIVATE
    assert verdicts.of(SIX, 0.0) is Verdict.PUBLIC


def test_announced_name_counts_as_public() -> None:
    assert Verdicts().overall([NAME], 0.0) is Verdict.PUBLIC


def observed(*seen: tuple[str, TcpAddress]) -> ObservedAddresses:
    found = ObservedAddresses()
    for host, address in seen:
        found.record(host, address)
    return found


def test_symmetric_nat_is_recognised_by_different_ports() -> None:
    assert not observed(("9.9.9.9", HOME)).endpoint_dependent
    assert not observed(("9.9.9.9", HOME), ("1.1.1.1", HOME)).endpoint_dependent
    assert observed(("9.9.9.9", HOME), ("1.1.1.1", OTHER)).endpoint_dependent
    assert not observed(("9.9.9.9", HOME), ("1.1.1.1", HOME), ("4.4.4.4", OTHER)).endpoint_dependent


def test_one_range_of_observers_counts_once() -> None:
    liars = [(f"9.9.9.{number}", OTHER) for number in range(20)]
    assert observed(*liars, ("1.1.1.1", HOME), ("4.4.4.4", HOME)).addresses()[0] == HOME
