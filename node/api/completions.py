"""`POST /v1/chat/completions` and `POST /v1/completions`: a request becomes a job, its events the answer.

When the client disconnects, the `submit` block is left at once and the job is cancelled on every stage.
"""

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from node.api.documents import Answer
from node.api.errors import ApiError
from node.api.requests import CompletionRequest
from node.coordinator.submission import JobError, JobResult, JobStarted, Submitter, TextDelta

UNACCEPTED_S: Final = 9.0
"""Longest wait of the first keep-alive for the job's route to open: until then an error can still be a status."""

KEEP_ALIVE_S: Final = 5.0
"""Pause without an event after which a keep-alive comment is sent: proxies and clients time out on silence."""


class CompletionEndpoint:
    """The ASGI application of one kind of completion request."""

    def __init__(self, submitter: Submitter, parse: Callable[[bytes], CompletionRequest]) -> None:
        self._submitter = submitter
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError before the response starts."""
        request = self._parse(await Request(scope, receive).body())
        answer = self._stream if request.stream else self._answer_whole
        await until_disconnect(receive, partial(answer, request, scope, receive, send))

    async def _answer_whole(self, request: CompletionRequest, scope: Scope, receive: Receive, send: Send) -> None:
        document: dict[str, Any] = {}
        async with self._submitter.submit(request.job) as events:
            async for event in events:
                match event:
                    case JobStarted():
                        answer = Answer(event, request.chat)
                    case JobResult():
                        document = answer.whole(event)
        await JSONResponse(document)(scope, receive, send)

    async def _stream(self, request: CompletionRequest, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        stream = EventStream(send)
        error: JobError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.keep_alive)
            try:
                await self._send_events(request, stream)
            except JobError as caught:
                error = caught
            await stream.end_keep_alive()
        if error is not None and not stream.started:
            raise error
        await stream.send(ApiError.from_job_error(error).document() if error else "[DONE]")
        await stream.close()

    async def _send_events(self, request: CompletionRequest, stream: "EventStream") -> None:
        """Run the job and send its events. The first chunk waits for the first token; errors before it are a status."""
        async with self._submitter.submit(request.job) as events:
            stream.accepted.set()
            async for event in events:
                match event:
                    case JobStarted():
                        answer = Answer(event, request.chat)
                        chunks = answer.first_chunks()
                        continue
                    case TextDelta(text=text) if text:
                        chunks.append(answer.text_chunk(text))
                    case JobResult():
                        chunks += answer.last_chunks(event, include_usage=request.include_usage)
                if chunks:
                    await stream.send(*chunks)
                    chunks = []


class EventStream:
    """Server-sent events; the status line is sent with the first event or keep-alive."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._sending = trio.Lock()
        self._sent_s = trio.current_time()
        self._keeping_alive = trio.CancelScope()
        self.started = False
        self.accepted = trio.Event()
        """Set once the job has a route."""

    async def keep_alive(self) -> None:
        """Send keep-alive comments while the stream is idle, until `end_keep_alive`."""
        with self._keeping_alive:
            await trio.sleep_until(self._sent_s + KEEP_ALIVE_S)
            with trio.move_on_at(self._sent_s + UNACCEPTED_S):
                await self.accepted.wait()
            while True:
                await trio.sleep_until(self._sent_s + KEEP_ALIVE_S)
                async with self._sending:
                    if trio.current_time() >= self._sent_s + KEEP_ALIVE_S:
                        await self._send_body(b": waiting\n\n")

    async def end_keep_alive(self) -> None:
        """Stop keep-alives; `started` does not change from now on."""
        async with self._sending:
            self._keeping_alive.cancel()

    async def send(self, *events: dict[str, Any] | str) -> None:
        """Send events: JSON documents or texts."""
        lines = (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events)
        async with self._sending:
            await self._send_body("".join(f"data: {line}\n\n" for line in lines).encode())

    async def _send_body(self, body: bytes) -> None:
        if not self.started:
            self.started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),  # a buffering proxy would hold the text back
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._sent_s = trio.current_time()

    async def close(self) -> None:
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, answer: Callable[[], Awaitable[None]]) -> None:
    """Run `answer`, and cancel it when the client disconnects. Its JobError becomes an ApiError."""
    error: JobError | None = None

    async def cancel_on_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_on_disconnect)
        try:
            await answer()
        except JobError as caught:
            error = caught  # raised outside the nursery, which would wrap it in a group
        nursery.cancel_scope.cancel()
    if error is not None:
        raise ApiError.from_job_error(error)
