"""HTTP server: a listener with a connection limit in front of hypercorn."""

import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, cast

import hypercorn
import trio
from hypercorn.events import Closed
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from hypercorn.utils import wrap_app
from starlette.types import ASGIApp

from node.api.request_id import new_request_id
from node.config import StartError, is_unspecified
from node.util.open_files import open_file_limit

GRACE_S: Final = 3.0
"""Longest time for running answers at shutdown."""
STALL_TIMEOUT_S: Final = 30.0
"""A client that reads nothing of its answer for this long is disconnected."""
BACKLOG: Final = 100

MAX_CONNECTIONS: Final = 256
"""Concurrent connections, fewer if the limit of open files is low; more get 503."""
FILES_SHARE: Final = 8
"""Divisor of the limit of open files."""
SILENT_TIMEOUT_S: Final = 5.0
"""Longest time until a client sends something; a silent one is evicted for a new one."""

_BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"x-request-id: %s\r\ncontent-length: %d\r\n\r\n%s"
)
_BUSY_BODY: Final = (
    b'{"error": {"message": "all API connections are in use: try again", '
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
    """Serve until `stop` is set: then refuse connections and give running answers `GRACE_S` to finish.

    Reports the port it listens on. Cancelling ends everything at once. Raises StartError.
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
        await _Connection(wrapped, config, context, ConnectionState(LifespanState()), cast("Any", stream)).run()

    limit = max(4, min(MAX_CONNECTIONS, open_file_limit() // FILES_SHARE))
    limiter = _ConnectionLimit(handle, limit)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
            accepting.start_soon(partial(trio.serve_listeners, limiter.serve, listeners, handler_nursery=connections))
            task_status.started(actual_port)
            await (trio.Event() if stop is None else stop).wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + GRACE_S


class _Connection(TCPServer):
    """A connection over HTTP/1.1 alone, which is answered where a client offers HTTP/2.

    Over HTTP/2 hypercorn buffers without limit what a client does not read, and waits for ever to send it.
    """

    async def _read_data(self) -> None:
        protocol = cast("Any", self.protocol.protocol)
        protocol._check_protocol = _stay_with_http_1  # noqa: SLF001 - hypercorn has no option for it
        protocol.can_read = _Pause(protocol, cast("trio.SocketStream", self.stream))
        try:
            await super()._read_data()
        except trio.EndOfChannel:
            await self.protocol.handle(Closed())


class _Pause:
    """The wait for a request's answer behind which more was sent, or which offers another protocol.

    hypercorn reads nothing meanwhile, and would not see the client leave: its job would run on.
    """

    def __init__(self, protocol: Any, stream: trio.SocketStream) -> None:
        self._protocol = protocol
        self._stream = stream
        self._over = trio.Event()
        self._read = b""
        self._has_left = False

    async def clear(self) -> None:
        """Begin."""
        self._over = trio.Event()

    async def set(self) -> None:
        """End."""
        self._over.set()

    async def wait(self) -> None:
        """Wait for the end. Raises EndOfChannel once the client has left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_ahead)
            await self._over.wait()
            nursery.cancel_scope.cancel()
        if self._has_left:
            raise trio.EndOfChannel
        if self._read:
            self._protocol.connection.receive_data(self._read)
            self._read = b""

    async def _read_ahead(self) -> None:
        """Read up to a bound of all that is unparsed; a client that sends more is not seen leaving."""
        room = MAX_RECV - len(self._protocol.connection.trailing_data[0])
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                if room <= 0:
                    return
                if not (data := await self._stream.receive_some(room)):
                    break
                self._read += data
                room -= len(data)
        self._has_left = True
        self._over.set()


async def _stay_with_http_1(_request: object) -> None:
    pass


class _ConnectionLimit:
    """Limits concurrent clients; those that have sent nothing yet are evicted first."""

    def __init__(self, handle: Callable[[trio.SocketStream], Awaitable[None]], limit: int) -> None:
        self._handle = handle
        self._limit = limit
        self._active = 0
        self._silent: dict[trio.CancelScope, None] = {}

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve a client, or answer 503 at the limit."""
        if self._active >= self._limit:
            if not self._silent:
                await self._refuse(stream)
                return
            (silent := next(iter(self._silent))).cancel()
            del self._silent[silent]
        self._active += 1
        try:
            if await self._has_sent_something(stream):
                await self._handle(stream)
        finally:
            self._active -= 1

    async def _has_sent_something(self, stream: trio.SocketStream) -> bool:
        with trio.move_on_after(SILENT_TIMEOUT_S) as scope:
            self._silent[scope] = None
            try:
                await trio.lowlevel.wait_readable(stream.socket)
            finally:
                self._silent.pop(scope, None)
        return not scope.cancelled_caught

    async def _refuse(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            with trio.move_on_after(1):
                request_id = new_request_id().encode()  # the request's own is not read any more
                await stream.send_all(_BUSY % (request_id, len(_BUSY_BODY), _BUSY_BODY))


def url_of(host: str, port: int) -> str:
    """Return the URL of an API on host and port, for this machine."""
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
                f"the API's port {port} on {host} is taken: stop the other program, or choose another --api HOST:PORT"
            ) from None
        raise StartError(f"the API cannot listen on {host}:{port}: {error.strerror}") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # hypercorn shields its sends from cancellation; the kernel can end them. Accepted sockets inherit the option.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_TIMEOUT_S * 1000))
    return listener
