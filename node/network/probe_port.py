"""What answers at an address, by the first bytes that it says: for the doctor, where a dial says only that it failed.

Whoever listens for libp2p connections says at once which negotiation it speaks; in a private swarm it says the same,
encrypted. That tells a closed port, a stopped process, another program and another swarm's key from each other.
"""

from enum import StrEnum
from typing import Final

import trio

from node.network.addresses import TcpAddress

GREETING: Final = b"\x13/multistream/1.0.0\n"
GREETING_TIMEOUT_S: Final = 4.0


class Greeting(StrEnum):
    """What answers at an address."""

    OPEN = "open"
    """A libp2p host without a swarm key."""
    PRIVATE = "private"
    """A libp2p host with a swarm key, most likely: it speaks, and not in the clear."""
    FOREIGN = "foreign"
    """Some other program: it speaks in text."""
    SILENT = "silent"
    """Connections are accepted, and nobody speaks."""
    CLOSED = "closed"
    """The machine is there, and refuses: nothing listens on the port."""
    UNREACHABLE = "unreachable"
    """Nothing comes back, or there is no way there."""


async def greet(address: TcpAddress) -> Greeting:
    """Return what answers at an address, within a bounded time."""
    try:
        with trio.fail_after(GREETING_TIMEOUT_S):
            stream = await trio.open_tcp_stream(address.host, address.port)
    except ConnectionRefusedError:
        return Greeting.CLOSED
    except (OSError, trio.TooSlowError) as error:
        # Several addresses of one name: trio raises one error from a group of what each attempt said.
        causes = error.__cause__.exceptions if isinstance(error.__cause__, BaseExceptionGroup) else ()
        refused = bool(causes) and all(isinstance(cause, ConnectionRefusedError) for cause in causes)
        return Greeting.CLOSED if refused else Greeting.UNREACHABLE
    async with stream:
        said = b""
        try:
            with trio.move_on_after(GREETING_TIMEOUT_S):
                await stream.send_all(GREETING)
                while len(said) < len(GREETING) and (data := await stream.receive_some(len(GREETING) - len(said))):
                    said += data
        except trio.BrokenResourceError:
            pass
    if not said:
        return Greeting.SILENT
    if said == GREETING:
        return Greeting.OPEN
    return Greeting.FOREIGN if said.isascii() else Greeting.PRIVATE
