"""The client of asyncio and trio: `metaswarm_client.client`, awaited."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Self, Unpack

import anyio
import httpx

from metaswarm_client.answers import Answer, AnswerBuilder, Delta, Score
from metaswarm_client.connection import (
    Retries,
    build_request,
    client_settings,
    json_of,
    split_lines_async,
    transport_errors,
)
from metaswarm_client.decoding import decode
from metaswarm_client.errors import error_of
from metaswarm_client.options import (
    CHAT,
    COMPLETIONS,
    ChatOptions,
    JobOptions,
    Message,
    ScoreOptions,
    TaskOptions,
    chat_body,
    choose_model,
    completion_body,
    embedding_body,
    score_body,
)
from metaswarm_client.swarm_documents import (
    Explanation,
    Model,
    NodeStatus,
    Peer,
    decode_embeddings,
    decode_models,
    decode_peers,
)

CLOSE_TIMEOUT_S: Final = 5.0
"""Longest time that it takes to leave a stream."""


class AsyncAnswerStream:
    """An answer as it comes: iterate over its deltas; afterwards `answer` is the whole."""

    def __init__(self, lines: AsyncIterator[str], builder: AnswerBuilder) -> None:
        self._lines = lines
        self._builder = builder

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if not self._builder.is_left:
            with transport_errors(self._builder.url):
                async for line in self._lines:
                    if (delta := self._builder.take(line)) is not None:
                        return delta
        self._builder.check_end()
        raise StopAsyncIteration

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream is at its end."""
        return self._builder.answer()

    @property
    def score(self) -> Score:
        """The tokens of a completion with `echo`, once the stream is at its end."""
        return self._builder.score()


class AsyncSwarm:
    """A swarm, through the API of one of its nodes; parameters as of `Swarm`. Tasks may share it."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        retry_limit_s: float = 60.0,
        silence_timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        settings = client_settings(url, api_key, silence_timeout_s)
        self._http = httpx.AsyncClient(transport=transport, **settings)
        self.url: str = settings["base_url"]
        self._model = model
        self._retry_limit_s = retry_limit_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def chat(self, messages: str | Sequence[Message], **options: Unpack[ChatOptions]) -> Answer:
        """Return the answer to a conversation; a text is one turn of the user."""
        async with self.stream_chat(messages, **options) as stream:
            async for _ in stream:
                pass
        return stream.answer

    async def complete(self, prompt: str | Sequence[int], **options: Unpack[JobOptions]) -> Answer:
        """Return what follows a text, or token ids."""
        async with self.stream_complete(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.answer

    @asynccontextmanager
    async def stream_chat(
        self, messages: str | Sequence[Message], **options: Unpack[ChatOptions]
    ) -> AsyncIterator[AsyncAnswerStream]:
        """Stream the answer to a conversation inside the block; leaving the block early cancels the job."""
        async with self._stream(CHAT, chat_body(messages, options)) as stream:
            yield stream

    @asynccontextmanager
    async def stream_complete(
        self, prompt: str | Sequence[int], **options: Unpack[JobOptions]
    ) -> AsyncIterator[AsyncAnswerStream]:
        """Stream what follows a text inside the block; leaving the block early cancels the job."""
        async with self._stream(COMPLETIONS, completion_body(prompt, options)) as stream:
            yield stream

    async def score(self, text: str | Sequence[int], **options: Unpack[ScoreOptions]) -> Score:
        """Return the log probability of each token of a text; nothing is generated."""
        async with self._stream(COMPLETIONS, score_body(text, options)) as stream:
            async for _ in stream:
                pass
        return stream.score

    async def embed(self, texts: str | Sequence[str], *, model: str | None = None) -> tuple[tuple[float, ...], ...]:
        """Return an embedding for each text."""
        body = await self._with_model(embedding_body(texts, model))
        return decode_embeddings(await self._post("/v1/embeddings", body))

    async def explain(self, **task: Unpack[TaskOptions]) -> Explanation:
        """Return which method a task would be served with, and why; the stages vote, and nothing is run."""
        return decode(Explanation, await self._post("/swarm/explain", await self._with_model(task)))

    async def status(self) -> NodeStatus:
        """Return what the node is and does."""
        return decode(NodeStatus, await self.get("/swarm/status"))

    async def peers(self) -> tuple[Peer, ...]:
        """Return the peers that the node knows."""
        return decode_peers(await self.get("/swarm/peers"))

    async def models(self) -> tuple[Model, ...]:
        """Return the models of the swarm, complete or not."""
        return decode_models(await self.get("/swarm/models"))

    async def get(self, path: str) -> Any:
        """Return the JSON document at a path of the node's API, as it is."""
        return await self._document("GET", path)

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return await self._document("POST", path, body)

    async def _document(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        response = await self._send(method, path, body)
        with transport_errors(self.url):
            try:
                await response.aread()
            finally:
                await response.aclose()
        return json_of(response)

    @asynccontextmanager
    async def _stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncAnswerStream]:
        response = await self._send("POST", path, await self._with_model(body))
        lines = split_lines_async(response.aiter_text())
        builder = AnswerBuilder(self.url, response.headers.get("X-Request-Id"))
        try:
            yield AsyncAnswerStream(lines, builder)
        finally:
            builder.is_left = True
            with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await response.aclose()
                with suppress(Exception):  # ends httpx's generators, of which trio warns when they are collected
                    async for _ in lines:
                        pass

    async def _with_model(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {**body, "model": body.get("model") or self._model or choose_model(await self.models())}

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        """Return the response, of status 200, before its body was read."""
        retries = Retries(self._retry_limit_s)
        while True:
            request = build_request(self._http, method, path, body)
            with transport_errors(self.url):
                response = await self._http.send(request, stream=True)
                if response.is_success:
                    return response
                try:
                    await response.aread()
                finally:
                    await response.aclose()
            await anyio.sleep(retries.delay_s(error_of(response)))
