"""Whether others can reach the running node: by what peers found that dialled it, not by dialling it from here."""

import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from node.api.interface import ReachabilityDocument
from node.config import NodeConfig
from node.doctor.report import Consequence, Fault, Finding, RunningNode
from node.network.addresses import TcpAddress, parse_peer_address
from node.network.probe_port import PortState, probe_port

SOMEWHERE: Final = ("2001:db8::1", 9)
"""An IPv6 address that the internet would route, if it were in use; nothing is sent there."""


async def check_reach(config: NodeConfig, running: RunningNode) -> AsyncIterator[Finding]:
    """Check how peers reach the node, and what stands in their way."""
    addresses = [parse_peer_address(text)[1] for text in running.status["multiaddrs"]]
    direct = [address for address in addresses if address.relay is None]
    reach = running.status["reachability"]
    if not direct:
        message = (
            "reachable through relays only, which are slow: see --listen"
            if addresses
            else "this node has no address that others could dial: see --listen"
        )
        yield Finding(Fault.RELAY_ONLY, Consequence.REACH, message)
    elif reach["verdict"] == "private":
        for finding in _private(config, reach, direct):
            yield finding
    elif reach["verdict"] == "unknown":
        async for finding in _untried(direct):
            yield finding
    for finding in _ipv6(direct):
        yield finding


def _private(config: NodeConfig, reach: ReachabilityDocument, direct: Sequence[TcpAddress]) -> Iterator[Finding]:
    """Say what keeps others from dialling the node, and what helps."""
    public = [address.transport for address in direct if address.is_public]
    announced = [address for address in public if address in config.announce]
    port = direct[0].port if direct else 4001
    if announced:
        why = f"peers cannot dial {announced[0]}, which --announce names: forward that port to this machine"
        yield Finding(Fault.CLOSED_PORT, Consequence.REACH, why, grave=False)
    elif public:
        why = f"peers cannot dial {public[0]}: a firewall keeps them out; open TCP port {port}"
        yield Finding(Fault.FIREWALL, Consequence.REACH, why, grave=False)
    else:
        seen = f", which others see at {reach['observed'][0]}" if reach["observed"] else ""
        mapped = (
            "the gateway says that it forwards a port, and peers cannot dial it: there is another NAT behind it"
            if reach["port_mapped"]
            else "the gateway does not forward a port by itself (UPnP)"
        )
        why = f"this node is behind a NAT{seen}; {mapped}: forward TCP port {port}, and name it with --announce"
        yield Finding(Fault.PRIVATE_ONLY, Consequence.REACH, why, grave=False)
    if reach["endpoint_dependent"]:
        why = (
            "the NAT gives every connection another port (symmetric NAT), so no hole can be punched: peers behind "
            "other NATs are reached through a relay"
        )
        yield Finding(Fault.SYMMETRIC_NAT, Consequence.REACH, why, grave=False)
    if not reach["relays"]:
        why = "no connected peer relays to this node: connect to one with a public address (--bootstrap)"
        yield Finding(Fault.NO_RELAY, Consequence.REACH, why)


async def _untried(direct: Sequence[TcpAddress]) -> AsyncIterator[Finding]:
    """Check from here what nobody elsewhere has tried."""
    if not direct:
        return
    answers = {address: await probe_port(address) for address in direct}
    if not {PortState.OPEN, PortState.PRIVATE}.intersection(answers.values()):
        why = (
            f"nothing answers at {direct[0].transport}, which this node announces ({answers[direct[0]]}): "
            f"open the port in the firewall, or listen on another address"
        )
        yield Finding(Fault.CLOSED_PORT, Consequence.REACH, why)
    elif not any(address.is_public for address in direct):
        why = "all addresses of this node are private, and no peer elsewhere has tried to dial it"
        yield Finding(Fault.PRIVATE_ONLY, Consequence.REACH, why, grave=False)


def _ipv6(direct: Sequence[TcpAddress]) -> Iterator[Finding]:
    """Check that a machine with a public IPv6 address has a route to others."""
    public = [address for address in direct if address.kind == "ip6" and address.is_public]
    if public and not has_ipv6_route():
        why = f"this node announces {public[0].transport}, and this machine has no IPv6 route to the internet: mend it"
        yield Finding(Fault.IPV6_BROKEN, Consequence.REACH, why, grave=False)


def has_ipv6_route() -> bool:
    """Return whether this machine has a route for IPv6; sends nothing."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(SOMEWHERE)
    except OSError:
        return False
    return True
