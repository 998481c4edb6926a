"""Port mapping by UPnP: asks the gateway of a home to forward the port that this node listens on.

The library under it (miniupnpc) is C code that parses what any device of the local network sends, and blocks. So it
runs in a child process with limits, once for each lease.
"""

import ipaddress
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import trio

from node.network.addresses import TcpAddress
from node.util.child_process import ChildError, run
from node.util.elapsed import Elapsed
from node.util.interpreter import python

logger = logging.getLogger(__name__)

LEASE_S: Final = 3600
RENEWAL_S: Final = LEASE_S / 2
RETRY_S: Final = 600.0
"""Until a gateway that was not found is looked for again."""
FIRST_RETRIES_S: Final = (10.0, 20.0, 30.0)
"""The same for the first times on another network or after a long suspend: a gateway may take a while to answer."""

POLL_S: Final = 10.0
"""Interval at which addresses and clock are compared: no event says that the network is another, or of a suspend."""

TIME_LIMIT_S: Final = 20.0
DISCOVERY_MS: Final = 2000
PORTS_TRIED: Final = 8
"""Ports above our own that are asked for where another machine has it."""

DESCRIPTION: Final = "metaswarm"
COMMAND: Final = python("-m", "node.network.port_mapping")


class _Mapping(NamedTuple):
    """One of our addresses, and where the gateway forwards it from."""

    own: TcpAddress
    external: TcpAddress


async def keep_port_mapping(
    candidates: Callable[[], list[TcpAddress]],
    on_mapped: Callable[[TcpAddress | None], None],
    wall_clock: Callable[[], float] = time.time,
) -> None:
    """Keep a port of the gateway mapped to one of our addresses, and remove the mapping at the end.

    `candidates`: the private addresses that this node listens on; without any, as on a public machine, nothing is done.
    """
    mapped: _Mapping | None = None
    leased: _Mapping | None = None
    own: list[TcpAddress] = []
    retries_s: Iterator[float] = iter(())
    since_leased, since_asked, pause_s = Elapsed(wall_clock), Elapsed(wall_clock), 0.0
    try:
        while True:
            before, own = own, candidates()
            if own != before or since_asked.seconds() > pause_s + 2 * POLL_S:
                retries_s = iter(FIRST_RETRIES_S)
            if mapped is not None and mapped.own not in own:
                mapped = None  # it was a gateway of a network that we may have left
                on_mapped(None)
            found = await _ask("add", own, mapped.external.port if mapped else own[0].port) if own else None
            pause_s = RENEWAL_S if found else next(retries_s, RETRY_S)
            since_asked.restart()
            if found is not None:
                leased = found
                since_leased.restart()
            elif since_leased.seconds() < LEASE_S:
                found = mapped  # a renewal that failed ends no lease
            if found != mapped:
                mapped = found
                on_mapped(mapped.external if mapped else None)
                if mapped is not None:
                    logger.info("the gateway forwards %s to this node", mapped.external.transport)
            while since_asked.seconds() < pause_s and candidates() == own:  # noqa: ASYNC110 - no signal
                await trio.sleep(POLL_S)
    finally:
        if leased is not None:
            with trio.move_on_after(TIME_LIMIT_S / 4) as scope:
                scope.shield = True
                await _ask("remove", [leased.own], leased.external.port)


async def _ask(verb: str, own: Sequence[TcpAddress], port: int) -> _Mapping | None:
    """Have the child process talk to the gateway; return the mapping that it made."""
    by_host = {each.host: each for each in own if each.port == own[0].port}
    arguments = (verb, ",".join(by_host), str(own[0].port), str(port))
    try:
        answer = await run((*COMMAND, *arguments), what="the port mapping", time_limit_s=TIME_LIMIT_S)
        found = json.loads(answer)
        return _Mapping(by_host[found["own"]], _external(found["host"], found["port"])) if verb == "add" else None
    except (ChildError, ValueError, KeyError, TypeError) as error:
        logger.debug("no port mapping: %s", error)
        return None


def _external(host: object, port: object) -> TcpAddress:
    """Return the address that a gateway claims; raise ValueError where the internet does not route it.

    As that of a gateway behind another NAT (100.64.0.0/10), or the answer of whatever else speaks UPnP.
    """
    address = TcpAddress("ip4", str(ipaddress.IPv4Address(str(host))), int(str(port)), None)
    if not address.is_public or not 0 < address.port < 65536:
        raise ValueError(f"the gateway claims {address.transport}")
    return address


def change_mapping(gateway: Any, verb: str, host: str, port: int, external_port: int) -> dict[str, object]:
    """Add or remove a mapping at a gateway, an object of miniupnpc; return the external address and which is ours."""
    if verb == "remove":
        held = gateway.getspecificportmapping(external_port, "TCP")
        if held is None or (held[0], int(held[1])) == (host, port):  # a gateway of another network has others' there
            gateway.deleteportmapping(external_port, "TCP")
        return {}
    external = gateway.externalipaddress()
    for wanted in range(external_port, min(external_port + PORTS_TRIED, 65536)):
        held = gateway.getspecificportmapping(wanted, "TCP")
        if held is not None and (held[0], int(held[1])) != (host, port):
            continue  # another node's
        try:
            gateway.addportmapping(wanted, "TCP", host, port, DESCRIPTION, "", LEASE_S)
        except Exception as error:
            if "OnlyPermanentLeasesSupported" not in str(error):
                raise
            gateway.addportmapping(wanted, "TCP", host, port, DESCRIPTION, "", 0)
        return {"host": external, "port": wanted, "own": host}
    raise RuntimeError(f"the gateway has no free port from {external_port} on")


def main(arguments: list[str]) -> None:
    """Change a mapping, and print the external address as JSON."""
    import miniupnpc

    verb, hosts, port, external_port, *url = arguments
    gateway = miniupnpc.UPnP()
    gateway.discoverdelay = DISCOVERY_MS
    if not url:
        gateway.discover()
    gateway.selectigd(*url)
    own = hosts.split(",")
    # Of several networks, as with a VPN, that of the gateway.
    host = gateway.lanaddr if gateway.lanaddr in own else own[0]
    print(json.dumps(change_mapping(gateway, verb, host, int(port), int(external_port))))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
