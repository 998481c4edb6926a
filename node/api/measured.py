"""Reports every request when it has been answered, for metrics and traces."""

from collections.abc import Sequence
from typing import Final

import trio
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.telemetry.observer import Telemetry
from node.telemetry.requests import RequestReport
from node.telemetry.trace_context import TRACE_PARENT_HEADER, TraceContext

DISCONNECTED_STATUS: Final = 499
OTHER_ROUTE: Final = "other"


class Measured:
    """ASGI middleware, inside `RequestIds`: it reports requests, and begins a span for each.

    The span is in the scope's state, for the jobs of the request.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], telemetry: Telemetry) -> None:
        self.app = app
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(TRACE_PARENT_HEADER, "")
        parent = given if TraceContext.parse(given) else ""
        trace_parent = scope["state"]["trace_parent"] = self._telemetry.start_trace(parent)
        began_s = trio.current_time()
        status = DISCONNECTED_STATUS

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            report = RequestReport(
                route=self._route_of(scope),
                method=scope["method"],
                status=status,
                request_id=scope["state"]["request_id"],
                began_s=began_s,
                ended_s=trio.current_time(),
                parent=parent,
                trace_parent=trace_parent,
            )
            self._telemetry.on_request_ended(report)

    def _route_of(self, scope: Scope) -> str:
        """Return the pattern of the path: as a label, paths would be without bound."""
        matching = (route for route in self._routes if route.matches(scope)[0] is not Match.NONE)
        return next((route.path_format for route in matching), OTHER_ROUTE)
