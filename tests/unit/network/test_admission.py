"""Whom we let in, and who has to make room."""

from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock

from node.network.addresses import address_range, origin
from node.network.admission import (
    HANDSHAKE_BURST,
    HANDSHAKE_INTERVAL_S,
    IDLE_S,
    SILENT_S,
    HandshakeLimiter,
    InboundLimits,
    NoRoom,
    choose_eviction,
)

LIMITS = InboundLimits(total=6, per_origin=3, per_range=4)
NOW_S = 100.0


@dataclass(frozen=True)
class Connection:
    """A finished connection; by default one that talks."""

    host: str | None
    established_s: float = 0.0
    last_data_s: float | None = NOW_S
    relay: str | None = None


def idle(host: str | None, since_s: float = 0.0) -> Connection:
    return Connection(host, last_data_s=since_s)


def silent(host: str | None, since_s: float = 0.0) -> Connection:
    return Connection(host, established_s=since_s, last_data_s=None)


def newcomer(host: str | None) -> Connection:
    return Connection(host, established_s=NOW_S, last_data_s=None)


@pytest.mark.parametrize(
    ("held", "host"),
    [
        ([], "203.0.112.1"),
        ([Connection("8.8.8.1")] * 2, "8.8.8.1"),
        ([Connection("8.8.8.1")] * 3, "8.8.8.2"),
        ([Connection("8.8.8.1"), Connection("8.8.8.2"), Connection("8.8.8.3")], "8.8.8.4"),
        ([Connection("10.0.0.1"), Connection("10.0.0.2"), Connection("10.0.0.3"), Connection("10.0.0.4")], "10.0.0.5"),
    ],
)
def test_no_eviction_below_the_limits(held: list[Connection], host: str) -> None:
    assert choose_eviction(newcomer(host), held, LIMITS, NOW_S) is None


@pytest.mark.parametrize(
    ("held", "host"),
    [
        ([Connection("8.8.8.1")] * 3, "8.8.8.1"),
        ([Connection("10.0.0.1")] * 3, "10.0.0.1"),
        ([Connection(f"8.8.8.{n}") for n in range(4)], "8.8.8.9"),
        ([Connection(f"2600:1:2:3{n}::1") for n in range(4)], "2600:1:2:39::1"),
        ([Connection(f"10.0.0.{n}") for n in range(6)], "10.0.1.1"),
        ([Connection(None)] * 6, None),
    ],
)
def test_active_connections_are_not_evicted(held: list[Connection], host: str) -> None:
    with pytest.raises(NoRoom):
        choose_eviction(newcomer(host), held, LIMITS, NOW_S)


def test_evicts_longest_idle_of_narrowest_full_group() -> None:
    older, elsewhere = idle("8.8.8.1", 20), idle("9.9.9.9", 1)
    held = [idle("8.8.8.1", 30), older, Connection("8.8.8.1"), elsewhere]
    assert choose_eviction(newcomer("8.8.8.1"), held, LIMITS, NOW_S) is older
    range_full = [Connection("8.8.8.1"), idle("8.8.8.2", 5), Connection("8.8.8.3"), Connection("8.8.8.4"), elsewhere]
    assert choose_eviction(newcomer("8.8.8.5"), range_full, LIMITS, NOW_S) is range_full[1]
    everywhere = [Connection("10.0.0.1"), idle("10.0.0.2", 8), *([Connection(None)] * 3), elsewhere]
    assert choose_eviction(newcomer("10.0.0.3"), everywhere, LIMITS, NOW_S) is elsewhere


def test_silent_connection_is_evicted_sooner() -> None:
    here = "8.8.8.1"
    just_come = silent(here, NOW_S - SILENT_S / 2)
    with pytest.raises(NoRoom):
        choose_eviction(newcomer(here), [just_come] * 3, LIMITS, NOW_S)
    mute = silent(here, NOW_S - 2 * SILENT_S)
    assert choose_eviction(newcomer(here), [just_come, mute, Connection(here)], LIMITS, NOW_S) is mute
    pausing = idle(here, NOW_S - IDLE_S / 2)
    with pytest.raises(NoRoom):
        choose_eviction(newcomer(here), [pausing] * 3, LIMITS, NOW_S)


async def test_handshake_rate_limit_delays_only_its_origin(virtual_clock: MockClock) -> None:
    handshakes = HandshakeLimiter()
    began_s = trio.current_time()
    for _ in range(HANDSHAKE_BURST):
        await handshakes.wait_turn("8.8.8.1")
    assert trio.current_time() == began_s
    for _ in range(40):
        await handshakes.wait_turn("8.8.8.1")
    late_s = trio.current_time()
    assert late_s - began_s == pytest.approx(39 * HANDSHAKE_INTERVAL_S, abs=2 * HANDSHAKE_INTERVAL_S)
    await handshakes.wait_turn("8.8.8.2")
    assert trio.current_time() == late_s


async def test_cancelled_handshake_wait_takes_no_turn(virtual_clock: MockClock) -> None:
    handshakes = HandshakeLimiter()
    for _ in range(HANDSHAKE_BURST + 1):
        await handshakes.wait_turn("8.8.8.1")
    began_s = trio.current_time()
    for _ in range(1000):
        with trio.move_on_after(0):
            await handshakes.wait_turn("8.8.8.1")
    await handshakes.wait_turn("8.8.8.1")
    assert trio.current_time() - began_s <= 2 * HANDSHAKE_INTERVAL_S


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("8.8.8.8", "8.8.8.0/24"),
        ("2600:1:2:3456::1", "2600:1:2:3400::/56"),
        ("::ffff:8.8.8.8", "8.8.8.0/24"),
        ("127.0.0.1", None),
        ("10.1.2.3", None),
        ("192.168.1.1", None),
        ("100.64.0.1", None),
        ("169.254.1.1", None),
        ("::1", None),
        ("fe80::1", None),
        ("fd00::1", None),
        ("node.example", None),
    ],
)
def test_only_public_addresses_have_a_range(host: str, expected: str | None) -> None:
    assert address_range(host) == expected


def test_origin_is_ipv4_address_or_ipv6_prefix() -> None:
    assert origin("::ffff:10.0.0.1") == origin("10.0.0.1") == "10.0.0.1"
    assert origin("2600:1:2:3::1") == origin("2600:1:2:3::2") != origin("2600:1:2:4::1")


def test_one_relay_cannot_fill_all_places() -> None:
    limits = InboundLimits(total=6, per_origin=3, per_range=4, per_relay=2)
    relayed = [Connection(None, relay="R") for _ in range(2)]
    with pytest.raises(NoRoom, match="the relay R"):
        choose_eviction(Connection(None, relay="R"), relayed, limits, NOW_S)
    assert choose_eviction(Connection(None, relay="S"), relayed, limits, NOW_S) is None
    assert choose_eviction(Connection("192.0.2.1"), relayed, limits, NOW_S) is None
