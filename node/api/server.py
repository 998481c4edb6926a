"""Serves the HTTP application on a TCP port: our own listener, which bounds the connections, and hypercorn's server."""

import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, cast

import hypercorn
import trio
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from hypercorn.utils import wrap_app
from starlette.types import ASGIApp

from node.config import StartError, is_unspecified
from node.util.open_files import open_file_limit

GRACE_S: Final = 3.0
"""How long answers under way may take to finish once the server was told to stop."""
STALL_TIMEOUT_S: Final = 30.0
"""A client that takes none of its answer for this long is cut off."""
BACKLOG: Final = 100

MAX_CONNECTIONS: Final = 256
"""At a time; fewer where the limit of open files is low. On top of that a newcomer is told to come back later."""
FILES_SHARE: Final = 8
"""The API takes one of so many files that may be open."""
SILENT_TIMEOUT_S: Final = 5.0
"""How long a client may take to say anything. One that has said nothing yet makes room for a newcomer at once."""

_BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s"
)
_BUSY_BODY: Final = (
    b'{"error": {"message": "this node has as many API connections as it takes; try again", '
    b'"type": "server_error", "param": null, "code": "too_many_connections"}}'
)


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
    config.graceful_timeout = GRACE_S
    config.include_server_header = False
    log = logging.getLogger("metaswarm.api")
    log.setLevel(logging.WARNING)
    config.errorlog = log
    context = WorkerContext(None)
    wrapped = wrap_app(cast("Any", app), config.wsgi_max_body_size, "asgi")

    async def handle(stream: trio.SocketStream) -> None:
        await TCPServer(wrapped, config, context, ConnectionState(LifespanState()), cast("Any", stream)).run()

    limit = max(4, min(MAX_CONNECTIONS, open_file_limit() // FILES_SHARE))
    door = _Door(handle, limit)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
            accepting.start_soon(_accept, door, listeners, connections)
            task_status.started(actual_port)
            await (trio.Event() if stop is None else stop).wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + GRACE_S


async def _accept(door: "_Door", listeners: list[trio.SocketListener], connections: trio.Nursery) -> None:
    await trio.serve_listeners(door.enter, listeners, handler_nursery=connections)


class _Door:
    """Lets so many clients in at a time, of whom those who have said nothing yet make room for others."""

    def __init__(self, handle: Callable[[trio.SocketStream], Awaitable[None]], limit: int) -> None:
        self._handle = handle
        self._limit = limit
        self._inside = 0
        self._silent: dict[trio.CancelScope, None] = {}

    async def enter(self, stream: trio.SocketStream) -> None:
        """Serve a client, unless there are too many."""
        if self._inside >= self._limit:
            if not self._silent:
                await self._turn_away(stream)
                return
            next(iter(self._silent)).cancel()
        self._inside += 1
        try:
            if await self._speaks(stream):
                await self._handle(stream)
        finally:
            self._inside -= 1

    async def _speaks(self, stream: trio.SocketStream) -> bool:
        with trio.move_on_after(SILENT_TIMEOUT_S) as scope:
            self._silent[scope] = None
            try:
                await trio.lowlevel.wait_readable(stream.socket)
            finally:
                self._silent.pop(scope, None)
        return not scope.cancelled_caught

    async def _turn_away(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            with trio.move_on_after(1):
                await stream.send_all(_BUSY % (len(_BUSY_BODY), _BUSY_BODY))


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
