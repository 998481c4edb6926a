"""Discovers the swarm's peers on the local network by multicast DNS.

Follows the mDNS discovery of libp2p: a DNS-SD service whose TXT record contains multiaddrs as `dnsaddr=…`. The service
name is our own, so that nodes of other libp2p networks are not dialled, and in a private swarm derived from its key.
py-libp2p's own discovery blocks its caller, and is unbounded.

zeroconf runs on a thread of its own; only service names cross from there, through a bounded channel.
"""

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from ipaddress import ip_address

import structlog
import trio
from zeroconf import Error, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from node.network.addresses import interface_hosts, parse_address
from node.network.interface import Network, NetworkError
from protocol.limits import MAX_ADDRESSES

MAX_WAITING = 64
"""Seen services that are not resolved yet; further ones are dropped until they are seen again."""

RESOLVE_TIMEOUT_MS = 3000
"""Timeout for the addresses of a service."""

CLOSE_TIMEOUT_S = 2.0
"""Timeout for unregistering our service."""

REFRESH_S = 60.0
"""Interval at which known services are dialled again, if connections are few."""

MAX_KNOWN = 256
"""Services remembered: hosts on the network may invent any number."""

MAX_CONNECTIONS = 32
"""With this many connections no local peers are dialled."""

MAX_TXT_BYTES = 255
"""Length of one string in a TXT record (RFC 6763, section 6.1)."""

_logger = structlog.get_logger(__name__)


def service_type(swarm_key: str | None) -> str:
    """Return the DNS-SD service under which the peers of a swarm find each other; at most 15 characters (RFC 6335)."""
    suffix = "" if swarm_key is None else f"-{hashlib.sha256(swarm_key.encode()).hexdigest()[:5]}"
    return f"_metaswarm{suffix}._udp.local."


async def find_neighbours(network: Network, swarm_key: str | None) -> None:
    """Register our service and dial the peers behind others, until cancelled; the network must be running.

    Begins anew when this machine's interfaces change: it may start before its network is up, or move to another one.
    Without multicast nothing is found, which is logged.
    """
    kind, failure = service_type(swarm_key), ""
    while True:
        try:
            if interfaces := interfaces_of(network.multiaddrs, interface_hosts()):
                await _find_on(interfaces, network, kind)
                failure = ""
                continue
        except (OSError, Error) as error:
            if (reason := str(error) or type(error).__name__) != failure:
                _logger.warning("local discovery failed", reason=reason)
                failure = reason
        await trio.sleep(REFRESH_S)


async def _find_on(interfaces: set[str], network: Network, kind: str) -> None:
    """Find neighbours until the interfaces are others. Raises OSError and zeroconf's Error."""
    own = _describe(network, kind)
    seen, names = trio.open_memory_channel[str](MAX_WAITING)
    token = trio.lowlevel.current_trio_token()

    def notice(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """Pass a name to our own thread. zeroconf prescribes the argument names."""
        # Anybody may answer for our service with a name of another, which zeroconf passes on and refuses to resolve.
        is_ours = name.endswith(f".{kind}") and name != own.name
        if state_change is not ServiceStateChange.Removed and is_ours:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(_put, seen, name)

    def start() -> Zeroconf:
        zeroconf = Zeroconf(interfaces=sorted(interfaces))
        try:
            zeroconf.register_service(own)
            ServiceBrowser(zeroconf, kind, handlers=[notice])
        except BaseException:
            zeroconf.close()
            raise
        return zeroconf

    zeroconf = await trio.to_thread.run_sync(start)
    try:
        known: dict[str, None] = {}
        while interfaces_of(network.multiaddrs, interface_hosts()) == interfaces:
            found = tuple(known)
            with trio.move_on_after(REFRESH_S):
                found = (await names.receive(),)
            for name in found:
                known[name] = None
                if len(known) > MAX_KNOWN:
                    del known[next(iter(known))]
                if len(network.connected_peers()) < MAX_CONNECTIONS:
                    await _connect(network, zeroconf, kind, name)
    finally:
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
            await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)


def interfaces_of(multiaddrs: Iterable[str], own_hosts: Collection[str]) -> set[str]:
    """Return the addresses of this machine's interfaces at which this node can be dialled: there it announces itself.

    Not those that a gateway forwards, nor those of relays.
    """
    direct = [address for address in map(parse_address, multiaddrs) if address.relay is None]
    return {each.host for each in direct if each.host in own_hosts and not ip_address(each.host).is_link_local}


def _describe(network: Network, kind: str) -> ServiceInfo:
    """Return our service, under a random name."""
    name = secrets.token_hex(16)
    announced = [each for each in network.multiaddrs if len(f"dnsaddr={each}".encode()) <= MAX_TXT_BYTES][
        :MAX_ADDRESSES
    ]
    # zeroconf writes one string per key, so further ones are numbered, as in py-libp2p. Readers accept every string
    # that begins with dnsaddr.
    properties = {f"dnsaddr{number or ''}": each for number, each in enumerate(announced)}
    port = int(announced[0].split("/")[4]) if announced else 0
    addresses = [ip_address(host).packed for host in sorted(interfaces_of(announced, interface_hosts()))]
    return ServiceInfo(
        kind, f"{name}.{kind}", port=port, properties=properties, server=f"{name}.local.", addresses=addresses
    )


def _put(seen: trio.MemorySendChannel[str], name: str) -> None:
    with suppress(trio.WouldBlock):
        seen.send_nowait(name)


async def _connect(network: Network, zeroconf: Zeroconf, kind: str, name: str) -> None:
    """Resolve a service, and dial its addresses unless we are connected already."""
    resolve = partial(zeroconf.get_service_info, kind, name, timeout=RESOLVE_TIMEOUT_MS)
    try:
        found = await trio.to_thread.run_sync(resolve)
    except (OSError, Error) as error:
        _logger.debug("local service not resolved", name=name, reason=str(error) or type(error).__name__)
        return
    if found is None:
        return
    for multiaddr in addresses_in(found.properties):
        peer = multiaddr.rpartition("/p2p/")[2]
        if peer == network.peer_id or peer in network.connected_peers():
            return
        try:
            await network.connect(multiaddr)
        except NetworkError as error:
            _logger.debug("local peer not reached", multiaddr=multiaddr, reason=str(error))
        else:
            _logger.info("local peer discovered", peer=peer)
            return


def addresses_in(properties: Mapping[bytes, bytes | None]) -> list[str]:
    """Return the multiaddrs in a service's TXT record, without invalid ones."""
    texts = [value for key, value in properties.items() if key.startswith(b"dnsaddr") and value]
    return [text for value in texts[:MAX_ADDRESSES] if "/p2p/" in (text := value.decode("utf-8", errors="replace"))]
