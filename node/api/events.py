"""`GET /swarm/events`: the documents of `/swarm/…` as server-sent events, again whenever they change.

A subscriber is sent the latest state, not a queue of events: a slow one skips what is outdated, so that it needs no
buffer and does not block the node.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import trio
from starlette.types import Receive, Scope, Send

from node.api.access import begin_reading
from node.api.endpoint import until_disconnect
from node.api.errors import ApiError
from node.api.interface import NodeView
from node.util.json_line import json_line

JOBS_INTERVAL_S: Final = 0.25
"""Pause between two looks at the jobs."""

INTERVAL_S: Final = 1.0
"""The same for everything else, which is read once for all subscribers."""

MAX_SUBSCRIBERS: Final = 16
RETRY_MS: Final = 2000
"""When a browser should connect again."""

_HEADERS: Final = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a buffering proxy would hold the events back
)


class EventsEndpoint:
    """The ASGI application of `/swarm/events`."""

    def __init__(self, node: NodeView) -> None:
        self._node = node
        self._subscribers = 0
        self._reading = trio.Lock()
        self._read_s = -math.inf
        self._documents: Mapping[str, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the client disconnects, its key is revoked or the node stops.

        Raises ApiError before the response starts.
        """
        may_read = begin_reading(scope)
        if self._subscribers >= MAX_SUBSCRIBERS:
            message = f"{MAX_SUBSCRIBERS} clients read the events already: close a page, or ask /swarm/status"
            raise ApiError(503, message, code="too_many_subscribers", headers={"Retry-After": "5"})
        self._subscribers += 1
        try:
            await until_disconnect(receive, partial(self._answer, send, may_read))
        finally:
            self._subscribers -= 1

    async def _answer(self, send: Send, may_read: Callable[[], bool]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_stopping, nursery.cancel_scope)
            await self._send_events(send, may_read)
            nursery.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _cancel_when_stopping(self, scope: trio.CancelScope) -> None:
        await self._node.stopping.wait()
        scope.cancel()

    async def _send_events(self, send: Send, may_read: Callable[[], bool]) -> None:
        sent: dict[str, str] = {}
        revision = 0
        opening = f"retry: {RETRY_MS}\n\n"
        while may_read():
            jobs, revision = self._node.jobs(revision)
            due = {name: text for name, text in (await self._current()).items() if sent.get(name) != text}
            sent |= due
            if jobs or not sent.get("jobs"):
                sent["jobs"] = "sent"
                due["jobs"] = _json({"jobs": jobs, "running": self._node.running_jobs()})
            body = opening + "".join(f"event: {name}\ndata: {text}\n\n" for name, text in due.items())
            opening = ""
            if body:
                await send({"type": "http.response.body", "body": body.encode(), "more_body": True})
            await trio.sleep(JOBS_INTERVAL_S)

    async def _current(self) -> Mapping[str, str]:
        """Return the documents, read anew if they are older than the interval."""
        async with self._reading:
            if trio.current_time() >= self._read_s + INTERVAL_S:
                self._documents = {
                    "status": _json(await self._node.status()),
                    "peers": _json({"peers": self._node.peers()}),
                    "models": _json({"models": self._node.models()}),
                    "learning": _json(self._node.learning()),
                }
                self._read_s = trio.current_time()
        return self._documents


def _json(document: Any) -> str:
    return json_line(document, compact=True)
