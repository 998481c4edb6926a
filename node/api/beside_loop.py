"""Computing for the API that would keep everybody else waiting, beside the event loop."""

import json
from collections.abc import Callable
from typing import Any, Final, TypeVar

import trio

T = TypeVar("T")

_ONE_AT_A_TIME: Final = trio.CapacityLimiter(1)
"""Each thread that computes delays the event loop by the interpreter's switch interval."""

_PIECES_DEPTH: Final = 5
"""Levels of a document that are encoded element by element: lists of log probabilities lie within them."""

_encode: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


async def compute(call: Callable[[], T], *, is_large: bool) -> T:
    """Return what a call returns, which computes in a thread where that takes long."""
    return await trio.to_thread.run_sync(call, limiter=_ONE_AT_A_TIME) if is_large else call()


def encode_in_pieces(value: Any, depth: int = _PIECES_DEPTH) -> str:
    """Return JSON. Encoded as a whole, a document of megabytes would not let other threads run meanwhile."""
    if depth and isinstance(value, dict):
        return "{" + ",".join([f"{_encode(key)}:{encode_in_pieces(value[key], depth - 1)}" for key in value]) + "}"
    if depth and isinstance(value, list):
        return "[" + ",".join([encode_in_pieces(each, depth - 1) for each in value]) + "]"
    return _encode(value)
