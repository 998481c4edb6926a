"""Whom a relay serves: the bounds of reservations and circuits."""

from contextlib import ExitStack, suppress

import pytest

from node.network.relay_ledger import RelayLedger, RelayLimits, RelayRefusal
from node.network.relay_messages import Status
from protocol.identity import PeerId

LIMITS = RelayLimits(
    reservations=6,
    reservations_per_origin=2,
    reservations_per_range=3,
    circuits=4,
    circuits_per_peer=3,
    circuits_per_pair=2,
    circuits_of_outsiders=1,
    reservation_s=100,
)


def peers(count: int) -> list[PeerId]:
    return [PeerId(f"peer{number}") for number in range(count)]


def reserve(ledger: RelayLedger, peer: PeerId, host: str, now_s: float = 0.0) -> bool:
    return ledger.reserve(peer, host, now_s) is Status.OK


def test_reservations_are_bounded_by_origin_range_and_total() -> None:
    ledger = RelayLedger(LIMITS)
    first, second, third, fourth, *others = peers(10)
    assert reserve(ledger, first, "8.8.8.8")
    assert reserve(ledger, second, "8.8.8.8")
    assert not reserve(ledger, third, "8.8.8.8")
    assert reserve(ledger, third, "8.8.8.9")
    assert not reserve(ledger, fourth, "8.8.8.10")
    assert [reserve(ledger, peer, f"9.9.{number}.9") for number, peer in enumerate(others[:4])] == [True] * 3 + [False]


def test_reservation_is_renewed_expires_and_ends_with_the_connection() -> None:
    ledger = RelayLedger(LIMITS)
    first, second, third = peers(3)
    assert reserve(ledger, first, "8.8.8.8")
    assert reserve(ledger, second, "8.8.8.8")
    assert reserve(ledger, first, "8.8.8.8", 90.0)
    assert ledger.reserved(101.0) == (first,)
    assert reserve(ledger, third, "8.8.8.8", 101.0)
    ledger.release(first)
    assert ledger.reserved(102.0) == (third,)


def test_circuits_are_bounded_by_pair_peer_and_total() -> None:
    ledger = RelayLedger(LIMITS)
    a, b, c, d, e = peers(5)
    for number, peer in enumerate((a, b, c)):
        assert reserve(ledger, peer, f"9.9.{number}.9")
    with ExitStack() as held:

        def connect(source: PeerId, target: PeerId) -> None:
            held.enter_context(ledger.circuit(source, "7.7.7.7", target, 0.0))

        connect(d, a)
        connect(a, b)
        connect(b, a)
        for source, target, status in (
            (a, b, Status.RESOURCE_LIMIT_EXCEEDED),  # the pair, in either direction
            (e, a, Status.RESOURCE_LIMIT_EXCEEDED),  # the peer
            (a, d, Status.NO_RESERVATION),
            (c, c, Status.RESOURCE_LIMIT_EXCEEDED),
        ):
            with pytest.raises(RelayRefusal) as refused:
                connect(source, target)
            assert refused.value.status is status
        connect(e, c)
        with pytest.raises(RelayRefusal):
            connect(d, c)  # all together
        assert ledger.circuits == 4
    assert ledger.circuits == 0


def test_one_address_or_range_cannot_take_all_circuits_with_many_identities() -> None:
    limits = RelayLimits()
    for near, most in (("8.8.8.8", limits.circuits_per_origin), ("8.8.8.{}", limits.circuits_per_range)):
        ledger = RelayLedger(limits)
        target, *sources = peers(100)
        honest = PeerId("honest")
        assert reserve(ledger, honest, "4.4.4.4")
        behind = [PeerId(f"behind{number}") for number in range(8)]
        for number, peer in enumerate(behind):
            assert reserve(ledger, peer, near.format(number))
        with ExitStack() as held:
            for number, source in enumerate(sources):
                with suppress(RelayRefusal):
                    held.enter_context(ledger.circuit(source, near.format(number), behind[number % 8], 0.0))
            assert ledger.circuits == most
            held.enter_context(ledger.circuit(target, "9.9.9.9", honest, 0.0))


def test_circuits_of_outsiders_leave_room_for_those_of_the_swarm() -> None:
    ledger = RelayLedger(LIMITS)
    a, b, c, d = peers(4)
    for number, peer in enumerate((a, b)):
        assert reserve(ledger, peer, f"9.9.{number}.9")
    with ledger.circuit(c, "7.7.7.7", a, 0.0, outsider=True):
        with pytest.raises(RelayRefusal), ledger.circuit(d, "6.6.6.6", b, 0.0, outsider=True):
            pass
        with ledger.circuit(d, "6.6.6.6", b, 0.0):
            assert ledger.circuits == 2
    with ledger.circuit(d, "6.6.6.6", b, 0.0, outsider=True):
        assert ledger.circuits == 1
