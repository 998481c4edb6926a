"""Finds the swarm's peers on the local network, by multicast DNS, where nobody knows an address.

A node tells its addresses and looks for others that do, as the mDNS discovery of libp2p describes it: a DNS-SD service
whose TXT record holds multiaddrs as `dnsaddr=…`. The service has a name of our own, so that strangers' nodes of other
libp2p networks are not dialled, and in a private swarm that of its key. py-libp2p's own discovery blocks its caller,
and takes in whatever anybody says without bound.

zeroconf does its work on a thread of its own; only names of services cross from there, through a bounded channel.
"""

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from ipaddress import ip_address

import structlog
import trio
from zeroconf import Error, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from node.network.interface import Network, NetworkError
from protocol.limits import MAX_ADDRESSES

MAX_WAITING = 64
"""Services that were seen and not looked at yet; what comes on top waits until it is seen again."""

RESOLVE_TIMEOUT_MS = 3000
"""How long a service may take to tell its addresses."""

CLOSE_TIMEOUT_S = 2.0
"""How long a goodbye may take."""

REFRESH_S = 60.0
"""How often those seen are looked at again: a peer that was left or lost may be wanted again."""

MAX_KNOWN = 256
"""Services remembered. Whoever shares our network may invent as many as he likes."""

MAX_CONNECTIONS = 32
"""With so many connections nobody else is dialled for being near."""

MAX_TXT_BYTES = 255
"""Of one string in a TXT record (RFC 6763, section 6.1)."""

_logger = structlog.get_logger(__name__)


def service_type(swarm_key: str | None) -> str:
    """Return the DNS-SD service under which the peers of a swarm find each other; at most 15 characters (RFC 6335)."""
    suffix = "" if swarm_key is None else f"-{hashlib.sha256(swarm_key.encode()).hexdigest()[:5]}"
    return f"_metaswarm{suffix}._udp.local."


async def find_neighbours(network: Network, swarm_key: str | None) -> None:
    """Tell the local network of us, and dial whom it tells of, until cancelled; the network must be running.

    Where multicast is not to be had nothing is found, and a line in the log says so.
    """
    kind = service_type(swarm_key)
    own = _describe(network, kind)
    seen, names = trio.open_memory_channel[str](MAX_WAITING)
    token = trio.lowlevel.current_trio_token()

    def notice(
        zeroconf: Zeroconf,
        service_type: str,
        name: str,
        state_change: ServiceStateChange,
    ) -> None:
        """Hand a name over to our own thread; zeroconf calls by these very names."""
        if state_change is not ServiceStateChange.Removed and name != own.name:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(_put, seen, name)

    def start() -> Zeroconf:
        zeroconf = Zeroconf(interfaces=sorted(interfaces_of(network.multiaddrs)))
        zeroconf.register_service(own)
        ServiceBrowser(zeroconf, kind, handlers=[notice])
        return zeroconf

    try:
        zeroconf = await trio.to_thread.run_sync(start)
    except (OSError, Error) as error:
        _logger.warning("peers on the local network cannot be found", reason=str(error) or type(error).__name__)
        return
    try:
        known: dict[str, None] = {}
        while True:
            found = tuple(known)
            with trio.move_on_after(REFRESH_S):
                found = (await names.receive(),)
            for name in found:
                known[name] = None
                if len(known) > MAX_KNOWN:
                    del known[next(iter(known))]
                if len(network.connected_peers()) < MAX_CONNECTIONS:
                    await _meet(network, zeroconf, kind, name)
    finally:
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
            await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)


def interfaces_of(multiaddrs: Iterable[str]) -> set[str]:
    """Return the local addresses that we can be dialled at: there, and nowhere else, we tell of ourselves."""
    hosts = {parts[2] for parts in (address.split("/") for address in multiaddrs) if parts[1] in {"ip4", "ip6"}}
    return {host for host in hosts if not ip_address(host).is_link_local}


def _describe(network: Network, kind: str) -> ServiceInfo:
    """Return our service. Its name says nothing of us: the addresses do."""
    name = secrets.token_hex(16)
    told = [each for each in network.multiaddrs if len(f"dnsaddr={each}".encode()) <= MAX_TXT_BYTES][:MAX_ADDRESSES]
    # A map has a key once: zeroconf cannot write several strings of one name, so the next ones are numbered, as in
    # py-libp2p. Whoever reads takes every string that begins with dnsaddr.
    properties = {f"dnsaddr{number or ''}": each for number, each in enumerate(told)}
    port = int(told[0].split("/")[4]) if told else 0
    addresses = [ip_address(host).packed for host in sorted(interfaces_of(told))]
    return ServiceInfo(
        kind, f"{name}.{kind}", port=port, properties=properties, server=f"{name}.local.", addresses=addresses
    )


def _put(seen: trio.MemorySendChannel[str], name: str) -> None:
    with suppress(trio.WouldBlock):
        seen.send_nowait(name)


async def _meet(network: Network, zeroconf: Zeroconf, kind: str, name: str) -> None:
    """Ask a service for its addresses, and dial them unless we are connected already."""
    found = await trio.to_thread.run_sync(partial(zeroconf.get_service_info, kind, name, timeout=RESOLVE_TIMEOUT_MS))
    if found is None:
        return
    for multiaddr in addresses_in(found.properties):
        peer = multiaddr.rpartition("/p2p/")[2]
        if peer == network.peer_id or peer in network.connected_peers():
            return
        try:
            await network.connect(multiaddr)
        except NetworkError as error:
            _logger.debug("peer on the local network not reached", multiaddr=multiaddr, reason=str(error))
        else:
            _logger.info("peer found on the local network", peer=peer)
            return


def addresses_in(properties: Mapping[bytes, bytes | None]) -> list[str]:
    """Return the multiaddrs in a service's TXT record; what is none is left out."""
    texts = [value for key, value in properties.items() if key.startswith(b"dnsaddr") and value]
    return [text for value in texts[:MAX_ADDRESSES] if "/p2p/" in (text := value.decode("utf-8", errors="replace"))]
