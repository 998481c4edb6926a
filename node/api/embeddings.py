"""The endpoints for embeddings: each text is a job of its own, and its vector a piece of the answer.

A model's embedding of a text is pooled over what its final norm gives for the tokens; see `protocol.tensors.Pooling`.
"""

import base64
import math
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from node.api.endpoint import origin_of, until_disconnect
from node.api.generation import Generation, Outcome, run_generation
from node.api.request_body import parse_counted
from node.coordinator.submission import JobResult, Submitter


class EmbeddingWriter(Protocol):
    """Writes one answer in the form of a protocol."""

    def pieces(self, results: Sequence[JobResult]) -> Iterator[bytes]:
        """Yield the answer in pieces: those of a thousand texts are megabytes, which the event loop writes between."""


ParseEmbedding = Callable[[bytes, Headers], tuple[Generation, EmbeddingWriter]]
"""Returns the request in a body, with a job for each text, and what writes the answer. Raises ApiError."""


class EmbeddingEndpoint:
    """The ASGI application of one protocol."""

    def __init__(self, submitter: Submitter, parse: ParseEmbedding) -> None:
        self._submitter = submitter
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError before the response starts."""
        generation, writer = await parse_counted(scope, receive, self._parse)
        generation = generation.from_request(origin_of(scope))
        await until_disconnect(receive, partial(self._answer, generation, writer, send))

    async def _answer(self, generation: Generation, writer: EmbeddingWriter, send: Send) -> None:
        outcome = Outcome()
        async with run_generation(self._submitter, generation) as events:
            async for event in events:
                outcome.take(event)
        await send({
            "type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]
        })  # fmt: skip
        for piece in writer.pieces([choice.done for choice in outcome.ordered()]):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def embedding_of(result: JobResult) -> "array[float]":
    """Return a job's embedding."""
    if result.embedding is None:
        raise AssertionError("a job with pooling has an embedding")
    return result.embedding


def normalised(vector: "array[float]") -> "array[float]":
    """Return a vector of length 1 in the same direction."""
    length = math.hypot(*vector)
    return array("f", (value / length for value in vector)) if length else vector


def as_json(vector: "array[float]") -> str:
    """Return a JSON array of numbers, which f32 needs nine digits for."""
    return "[" + ",".join(["%.9g"] * len(vector)) % tuple(vector) + "]"


def as_base64(vector: "array[float]") -> str:
    """Return the little-endian bytes of f32 in base64."""
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    return base64.b64encode(vector).decode()
