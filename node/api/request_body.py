"""How endpoints get what is in a request's body: counted against its key first, then parsed."""

from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive, Scope

from node.api.access import begin_answers, release_body
from node.api.beside_loop import compute

T = TypeVar("T")

IN_THREAD_BYTES: Final = 64 << 10
"""Bodies beyond are parsed in a thread: those of megabytes take up to seconds, for which all else would wait."""


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
    parsed = await compute(partial(parse, body, request.headers), is_large=len(body) > IN_THREAD_BYTES)
    # A refusal, the exception of which refers to the body, releases it once it is sent.
    release_body(scope)
    return parsed
