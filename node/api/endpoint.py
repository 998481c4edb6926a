"""The endpoint of one protocol: a request becomes a generation, its events the answer, whole or streamed.

When the client disconnects, the jobs are cancelled on every stage at once.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Protocol

import trio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from node.api.access import begin_answers, key_sha256_of
from node.api.beside_loop import compute, encode_in_pieces
from node.api.errors import ApiError
from node.api.generation import (
    MAX_LOGPROBS_IN_ANSWER,
    ChoiceStarted,
    ChoiceText,
    Generation,
    GenerationEvent,
    Outcome,
    count_logprobs,
    run_generation,
)
from node.api.request_body import parse_counted
from node.coordinator.submission import JobError, JobErrorCode, RequestOrigin, Submitter

UNACCEPTED_S: Final = 9.0
"""Longest wait of the first keep-alive for a job's route to open: until then an error can still be a status."""

KEEP_ALIVE_S: Final = 5.0
"""Pause without an event after which a keep-alive is sent: proxies and clients time out on silence."""

LOGPROBS_AT_ONCE: Final = 10_000
"""Answers with more log probabilities are encoded in a thread: they take up to seconds."""

DETAILS_HEADER: Final = "x-metaswarm"
"""A request with this header gets the field `metaswarm` in its answer."""


class AnswerWriter(Protocol):
    """Writes one answer in the form of a protocol: `whole`, or a stream of everything else."""

    media_type: str
    """Of the stream."""

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """Return the answer in one document."""

    def chunks(self, event: GenerationEvent) -> bytes:
        """Return what an event adds to the stream, if anything."""

    def end(self, outcome: Outcome) -> bytes:
        """Return the end of the stream."""

    def failure(self, error: ApiError) -> bytes:
        """Return the end of a stream that fails."""

    def keep_alive(self) -> bytes:
        """Return what clients of the protocol skip."""


Parse = Callable[[bytes, Headers], tuple[Generation, AnswerWriter]]
"""Returns the request in a body, and what writes its answer. Raises ApiError."""


class GenerationEndpoint:
    """The ASGI application of one protocol."""

    def __init__(self, submitter: Submitter, parse: Parse) -> None:
        self._submitter = submitter
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError before the response starts."""
        generation, writer = await parse_counted(scope, receive, self._parse)
        if not generation.stream:
            generation = generation.held_whole()
            if generation.logprob_count() > MAX_LOGPROBS_IN_ANSWER:
                raise ApiError.from_job_error(_too_many_logprobs("stream it, or "))
        begin_answers(scope, len(generation.jobs))
        generation = generation.from_request(origin_of(scope))
        answer = self._stream if generation.stream else self._answer_whole
        await until_disconnect(receive, partial(answer, generation, writer, scope, receive, send))

    async def _answer_whole(
        self, generation: Generation, writer: AnswerWriter, scope: Scope, receive: Receive, send: Send
    ) -> None:
        outcome = Outcome()
        left = MAX_LOGPROBS_IN_ANSWER - generation.logprob_count()
        async with run_generation(self._submitter, generation) as events:
            async for event in events:
                outcome.take(event)
                left = _logprobs_left(left, event, generation)
        count = sum(count_logprobs(choice.logprobs) for choice in outcome.ordered())
        body = await compute(lambda: encode_in_pieces(writer.whole(outcome)), is_large=count > LOGPROBS_AT_ONCE)
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(
        self, generation: Generation, writer: AnswerWriter, scope: Scope, receive: Receive, send: Send
    ) -> None:
        del scope, receive
        stream = EventStream(send, writer)
        outcome = Outcome(keeps_logprobs=False)
        error: JobError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.keep_alive)
            try:
                await self._send_events(generation, outcome, stream)
            except JobError as caught:
                error = caught
            await stream.end_keep_alive()
        if error is not None and not stream.started:
            raise error
        await stream.send(writer.failure(ApiError.from_job_error(error)) if error else writer.end(outcome))
        await stream.close()

    async def _send_events(self, generation: Generation, outcome: Outcome, stream: "EventStream") -> None:
        """Run the jobs and send their events. What comes before any text waits for it: until then an error is a status.

        The route of the first job that starts is that of the answer.
        """
        left = MAX_LOGPROBS_IN_ANSWER
        async with run_generation(self._submitter, generation) as events:
            waiting = b""
            async for event in events:
                outcome.take(event)
                left = _logprobs_left(left, event, generation)
                count = count_logprobs(event.logprobs) if isinstance(event, ChoiceText) else 0
                waiting += await compute(partial(stream.writer.chunks, event), is_large=count > LOGPROBS_AT_ONCE)
                if isinstance(event, ChoiceStarted) and not stream.started:
                    stream.accepted.set()
                elif waiting:
                    await stream.send(waiting)
                    waiting = b""


def _logprobs_left(left: int, event: GenerationEvent, generation: Generation) -> int:
    """Return how many log probabilities an answer may have after an event. Raises JobError where a prompt has more.

    All of a prompt are in memory at a time, also for a stream; how long it is shows only once its job begins.
    """
    if isinstance(event, ChoiceStarted) and (job := generation.jobs[event.choice]).prompt_logprobs:
        left -= event.job.prompt_tokens * (1 + (job.top_logprobs or 0))
        if left < 0:
            raise _too_many_logprobs()
    return left


def _too_many_logprobs(hint: str = "") -> JobError:
    message = f"the answer may have more than {MAX_LOGPROBS_IN_ANSWER} log probabilities: {hint}ask for"
    message += " fewer choices, tokens or top_logprobs"
    return JobError(JobErrorCode.INVALID, message, param="top_logprobs")


def origin_of(scope: Scope) -> RequestOrigin:
    """Return what logs and traces name a job's request by, and whose it is."""
    state = scope["state"]
    return RequestOrigin(
        request_id=state["request_id"],
        endpoint=scope["path"],
        trace_parent=state.get("trace_parent", ""),
        key_sha256=key_sha256_of(scope),
    )


class EventStream:
    """The body of a streamed answer; the status line is sent with the first event or keep-alive."""

    def __init__(self, send: Send, writer: AnswerWriter) -> None:
        self.writer = writer
        self._send = send
        self._sending = trio.Lock()
        self._sent_s = trio.current_time()
        self._keeping_alive = trio.CancelScope()
        self.started = False
        self.accepted = trio.Event()
        """Set once a job has a route."""

    async def keep_alive(self) -> None:
        """Send keep-alives while the stream is idle, until `end_keep_alive`."""
        with self._keeping_alive:
            await trio.sleep_until(self._sent_s + KEEP_ALIVE_S)
            with trio.move_on_at(self._sent_s + UNACCEPTED_S):
                await self.accepted.wait()
            while True:
                await trio.sleep_until(self._sent_s + KEEP_ALIVE_S)
                async with self._sending:
                    if trio.current_time() >= self._sent_s + KEEP_ALIVE_S:
                        await self._send_body(self.writer.keep_alive())

    async def end_keep_alive(self) -> None:
        """Stop keep-alives; `started` does not change from now on."""
        async with self._sending:
            self._keeping_alive.cancel()

    async def send(self, data: bytes) -> None:
        """Send events."""
        async with self._sending:
            await self._send_body(data)

    async def _send_body(self, body: bytes) -> None:
        if not self.started:
            self.started = True
            headers = [
                (b"content-type", self.writer.media_type.encode()),
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
    """Run `answer`, and cancel it when the client disconnects. Raises its ApiError, or one for its JobError."""
    error: ApiError | None = None

    async def cancel_on_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_on_disconnect)
        try:
            await answer()
        except (ApiError, JobError) as caught:  # raised outside the nursery, which would wrap it in a group
            error = caught if isinstance(caught, ApiError) else ApiError.from_job_error(caught)
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


def wants_details(headers: Headers) -> bool:
    """Return whether a request's header asks how the swarm ran the job."""
    return headers.get(DETAILS_HEADER, "").strip().lower() not in {"", "0", "false", "no"}
