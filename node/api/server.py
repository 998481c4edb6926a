"""Serves the HTTP application on a TCP port, by hypercorn's trio worker."""

import errno
import logging
import socket
from functools import partial
from typing import Any, Final, cast

import hypercorn
import hypercorn.trio
import trio
from starlette.types import ASGIApp

from node.config import StartError, is_unspecified

GRACE_S: Final = 3.0
"""How long answers under way may take to finish once the server was told to stop."""
STALL_TIMEOUT_S: Final = 30.0
"""A client that takes none of its answer for this long is cut off."""
BACKLOG: Final = 100


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    stop: trio.Event | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` is set: then no new connection is taken and answers under way get `GRACE_S` to finish.

    Reports the port it listens on, which differs from `port` where that is 0. Cancelling ends everything at once.
    Raises StartError, one line, where the address cannot be had.
    """
    listener = _bind(host, port)
    actual_port: int = listener.getsockname()[1]
    config = hypercorn.Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.graceful_timeout = GRACE_S
    config.include_server_header = False
    log = logging.getLogger("metaswarm.api")
    log.setLevel(logging.WARNING)
    config.errorlog = log
    shutdown_trigger = (trio.Event() if stop is None else stop).wait
    async with trio.open_nursery() as nursery:
        run = partial(hypercorn.trio.serve, shutdown_trigger=shutdown_trigger, mode="asgi")
        await nursery.start(run, cast("Any", app), config)
        task_status.started(actual_port)


def url_of(host: str, port: int) -> str:
    """Return the URL at which this machine reaches an API that listens on host and port."""
    if is_unspecified(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"the API's port {port} on {host} is taken: stop the program that has it, "
                f"or choose another with --api HOST:PORT"
            ) from None
        raise StartError(f"the API cannot listen on {host}:{port}: {error.strerror}") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # hypercorn sends under a shield, so that nobody can cancel it; the kernel can. Accepted sockets inherit it.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_TIMEOUT_S * 1000))
    return listener
