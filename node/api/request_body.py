"""How endpoints get what is in a request's body: counted against its key first, then parsed."""

from collections.abc import Callable
from typing import Final, TypeVar

import trio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive, Scope

from node.api.access import begin_answers

T = TypeVar("T")

IN_THREAD_BYTES: Final = 64 << 10
"""Bodies beyond are parsed in a thread: those of megabytes take up to seconds, for which all else would wait."""

_ONE_AT_A_TIME: Final = trio.CapacityLimiter(1)
"""Each thread that computes delays the event loop's by the interpreter's switch interval."""


async def parse_counted(scope: Scope, receive: Receive, parse: Callable[[bytes, Headers], T]) -> T:
    """Count a request as one answer, and return what its body means. Raises ApiError, also where it is counted.

    Counted before it is parsed, as parsing costs this node something that no limit of a key would bind else.
    """
    begin_answers(scope)
    return await parse_uncounted(scope, receive, parse)


async def parse_uncounted(scope: Scope, receive: Receive, parse: Callable[[bytes, Headers], T]) -> T:
    """Return what the body of a request means that is no answer of a model. Raises ApiError."""
    request = Request(scope, receive)
    body = await request.body()
    if len(body) <= IN_THREAD_BYTES:
        return parse(body, request.headers)
    return await trio.to_thread.run_sync(parse, body, request.headers, limiter=_ONE_AT_A_TIME)
