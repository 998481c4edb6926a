"""Multiaddrs: parsing, wildcards, address ranges, and the bounded address book of peers."""

import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Final

import psutil
from cachetools import FIFOCache
from cachetools.func import ttl_cache
from multiaddr import Multiaddr

from node.network.interface import NetworkError
from protocol.identity import PeerId, parse_peer_id
from protocol.limits import MAX_ADDRESSES

MAX_BOOK_PEERS: Final = 4096
MAX_ADDRESS_CHARACTERS: Final = 256

INTERFACES_S: Final = 2.0
"""How long the addresses of the interfaces are not asked for again: each dial and each heartbeat needs them."""

_HOST_PROTOCOLS: Final = ("ip4", "ip6", "dns", "dns4", "dns6")


_BRIDGES: Final = re.compile(
    r"docker\d|docker_gwbridge|br-[0-9a-f]{12}|nerdctl|veth|virbr|podman|cni|lxcbr|lxdbr|incusbr|flannel|cali|cilium_"
    r"|weave|kube-|vmnet|vboxnet"
)
"""Beginnings of the names of interfaces that lead to containers and virtual machines of this machine only."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP endpoint and, where the multiaddr named them, the peer behind it, and the relay through which it is."""

    kind: str
    """ip4, ip6, dns, dns4 or dns6."""
    host: str
    port: int
    peer: PeerId | None
    relay: PeerId | None = None
    """The peer at this endpoint, where the address is that of a circuit through it."""

    @property
    def transport(self) -> str:
        """The multiaddr of the TCP endpoint alone."""
        return f"/{self.kind}/{self.host}/tcp/{self.port}"

    @property
    def endpoint(self) -> str:
        """The multiaddr without the peer."""
        return self.transport if self.relay is None else f"{self.transport}/p2p/{self.relay}/p2p-circuit"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can dial it."""
        ip = _parse_ip(self.host)
        return self.host == "localhost" or (ip is not None and ip.is_loopback)

    @property
    def is_public(self) -> bool:
        """Whether it may be dialled from anywhere: an address that the internet routes, or a name."""
        return not is_private(self.host) and not self.is_loopback

    def of(self, peer: PeerId) -> str:
        """Return the multiaddr with this peer."""
        return f"{self.endpoint}/p2p/{peer}"


@lru_cache(maxsize=MAX_BOOK_PEERS)
def parse_address(text: str) -> TcpAddress:
    """Return a multiaddr like /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW…; raise ValueError with one line."""
    if len(text) > MAX_ADDRESS_CHARACTERS:
        raise ValueError(f"a multiaddr has at most {MAX_ADDRESS_CHARACTERS} characters")
    try:
        parts = str(Multiaddr(text)).strip("/").split("/")
    except Exception:  # noqa: BLE001  # the parser raises whatever its codecs raise
        parts = []
    relay = None
    if len(parts) in {7, 9} and parts[4] == "p2p" and parts[6] == "p2p-circuit":
        relay = parse_peer_id(parts[5])
        parts = [*parts[:4], *parts[7:]]
    if len(parts) not in {4, 6} or parts[0] not in _HOST_PROTOCOLS or parts[2] != "tcp":
        raise ValueError(f"{text[:80]!r} is not a TCP multiaddr: expected for example /ip4/192.0.2.1/tcp/4001")
    peer = None
    if len(parts) == 6:
        if parts[4] != "p2p":
            raise ValueError(f"{text[:80]!r} is not a TCP multiaddr: the part after the port must be /p2p/<peer id>")
        peer = parse_peer_id(parts[5])
    return TcpAddress(parts[0], parts[1], int(parts[3]), peer, relay)


def without_loopback(addresses: Iterable[TcpAddress]) -> list[TcpAddress]:
    """Return the addresses that other machines could dial; where there are none, those of this machine."""
    found = list(addresses)
    return [address for address in found if not address.is_loopback] or found


def expand_wildcard(address: TcpAddress) -> list[TcpAddress]:
    """Return the addresses of this machine's interfaces for 0.0.0.0 and ::, loopback last; others as they are.

    Without those of bridges to containers: every machine has the same ones, and behind them are others' containers.
    """
    if address.host not in {"0.0.0.0", "::"}:  # noqa: S104  # compared with, not bound to
        return [address]
    version = 4 if address.kind == "ip4" else 6
    parsed = map(_parse_ip, _interface_addresses())  # None: a hardware address
    found = [ip for ip in parsed if ip is not None and ip.version == version and not ip.is_link_local]
    found.sort(key=lambda ip: (ip.is_loopback, ip.packed))
    return [TcpAddress(address.kind, str(ip), address.port, address.peer) for ip in found]


def interface_hosts() -> set[str]:
    """Return the addresses of this machine's interfaces."""
    return {str(ip) for text in _interface_addresses() if (ip := _parse_ip(text)) is not None}


_interfaces: dict[str, list[str]] = {}


@ttl_cache(maxsize=1, ttl=INTERFACES_S)
def _interface_addresses() -> tuple[str, ...]:
    """Return the addresses of all interfaces, as last seen where no file can be opened to ask."""
    with suppress(OSError):
        found = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
        _interfaces.clear()
        _interfaces.update(found)
    return tuple(chain.from_iterable(found for name, found in _interfaces.items() if not _BRIDGES.match(name)))


def origin(host: str) -> str:
    """Return the key by which connections are limited: an IPv4 address, an IPv6 /64."""
    ip = _parse_ip(host)
    if ip is not None and ip.version == 6:
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return host if ip is None else str(ip)


def address_range(host: str) -> str | None:
    """Return the public IPv4 /24 or IPv6 /56 of a host: what one party is likely to own as a whole.

    None for names and for addresses that the internet does not route: whole swarms live within one private range.
    """
    ip = _parse_ip(host)
    if ip is None or not _is_routed(ip):
        return None
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 56), strict=False))


def is_private(host: str) -> bool:
    """Return whether a host is an address that the internet does not route; False for names."""
    ip = _parse_ip(host)
    return ip is not None and not _is_routed(ip)


_TRANSLATED: Final = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")))
"""IPv6 addresses that stand for IPv4 ones, also for private ones: of NAT64 and of 6to4."""


def _is_routed(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _TRANSLATED)


def _parse_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, an IPv4-mapped one as IPv4; None for anything else."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


class AddressBook:
    """Last known addresses of peers. Bounded: the peer updated longest ago is evicted first."""

    def __init__(self) -> None:
        self._addresses: FIFOCache[PeerId, tuple[TcpAddress, ...]] = FIFOCache(MAX_BOOK_PEERS)

    def add(self, peer: PeerId, multiaddrs: Iterable[str]) -> None:
        """Learn addresses, newest first. Those that are malformed or name another peer are dropped."""
        learned: list[TcpAddress] = []
        for text in multiaddrs:
            try:
                address = parse_address(text)
            except ValueError:
                continue
            if address.peer in {None, peer} and address.port != 0:
                learned.append(replace(address, peer=peer))
        if merged := tuple(dict.fromkeys([*learned, *self.of(peer)]))[:MAX_ADDRESSES]:
            self._addresses[peer] = merged

    def of(self, peer: PeerId) -> tuple[TcpAddress, ...]:
        """Return the known addresses of a peer, the latest first."""
        return self._addresses.get(peer, ())


def parse_peer_address(multiaddr: str) -> tuple[PeerId, TcpAddress]:
    """Return the peer and the endpoint of a full address; raise NetworkError with one line."""
    try:
        address = parse_address(multiaddr)
    except ValueError as error:
        raise NetworkError(str(error)) from None
    if address.peer is None:
        raise NetworkError(f"{multiaddr} has no peer id: it must end in /p2p/<peer id>")
    return address.peer, address
