"""Probes a TCP port by its first bytes: for `doctor`, where a failed dial alone says too little.

A libp2p listener sends its multistream header at once; in a private swarm the same, encrypted. That distinguishes a
closed port, a stopped process, another program and another swarm key.
"""

from enum import StrEnum
from typing import Final

import trio

from node.network.addresses import TcpAddress

MULTISTREAM_HEADER: Final = b"\x13/multistream/1.0.0\n"
PROBE_TIMEOUT_S: Final = 4.0


class PortState(StrEnum):
    """What listens at an address."""

    OPEN = "open"
    """A libp2p host without a swarm key."""
    PRIVATE = "private"
    """A libp2p host with a swarm key, most likely: it answers, encrypted."""
    FOREIGN = "foreign"
    """Another program: it answers in text."""
    SILENT = "silent"
    """Connections are accepted, and nothing is sent."""
    CLOSED = "closed"
    """The machine refuses: nothing listens on the port."""
    UNREACHABLE = "unreachable"
    """No answer, or no route."""


async def probe_port(address: TcpAddress) -> PortState:
    """Return what listens at an address, within a bounded time."""
    try:
        with trio.fail_after(PROBE_TIMEOUT_S):
            stream = await trio.open_tcp_stream(address.host, address.port)
    except ConnectionRefusedError:
        return PortState.CLOSED
    except (OSError, trio.TooSlowError) as error:
        # Several addresses of one name: trio raises one error from a group of what each attempt said.
        causes = error.__cause__.exceptions if isinstance(error.__cause__, BaseExceptionGroup) else ()
        refused = bool(causes) and all(isinstance(cause, ConnectionRefusedError) for cause in causes)
        return PortState.CLOSED if refused else PortState.UNREACHABLE
    async with stream:
        said = b""
        try:
            with trio.move_on_after(PROBE_TIMEOUT_S):
                await stream.send_all(MULTISTREAM_HEADER)
                while len(said) < len(MULTISTREAM_HEADER) and (
                    data := await stream.receive_some(len(MULTISTREAM_HEADER) - len(said))
                ):
                    said += data
        except trio.BrokenResourceError:
            pass
    if not said:
        return PortState.SILENT
    if said == MULTISTREAM_HEADER:
        return PortState.OPEN
    return PortState.FOREIGN if said.isascii() else PortState.PRIVATE
