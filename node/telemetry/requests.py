"""The report of an HTTP request that has been answered, for metrics and traces."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport:
    """One request to the API. `route`: the pattern of its path, `other` where there is none.

    `status`: 499, as nginx has it, where the client disconnected before the answer began. `parent`: the client's
    `traceparent`; `trace_parent`: the request's own span. Times are trio's clock.
    """

    route: str
    method: str
    status: int
    request_id: str
    began_s: float
    ended_s: float
    parent: str = ""
    trace_parent: str = ""
