"""The client that blocks."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, Unpack

import httpx

from metaswarm_client.answers import Answer, AnswerBuilder, Delta, Score
from metaswarm_client.connection import Retries, build_request, client_settings, json_of, split_lines, transport_errors
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


class AnswerStream:
    """An answer as it comes: iterate over its deltas; afterwards `answer` is the whole."""

    def __init__(self, lines: Iterator[str], builder: AnswerBuilder) -> None:
        self._lines = lines
        self._builder = builder

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        with transport_errors(self._builder.url):
            for line in () if self._builder.is_left else self._lines:
                if (delta := self._builder.take(line)) is not None:
                    return delta
        self._builder.check_end()
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream is at its end."""
        return self._builder.answer()

    @property
    def score(self) -> Score:
        """The tokens of a completion with `echo`, once the stream is at its end."""
        return self._builder.score()


class Swarm:
    """A swarm, through the API of one of its nodes. Threads may share it.

    `url`: default METASWARM_API, else this machine's node. `api_key`: default METASWARM_API_KEY. `model`: of jobs that
    name none. `retry_limit_s`: how long a request is retried that the node refuses with 429 or 503, at the times that
    Retry-After says; 0: never. `silence_timeout_s`: without a byte, keep-alives included, a node counts as dead.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        retry_limit_s: float = 60.0,
        silence_timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        settings = client_settings(url, api_key, silence_timeout_s)
        self._http = httpx.Client(transport=transport, **settings)
        self.url: str = settings["base_url"]
        self._model = model
        self._retry_limit_s = retry_limit_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def chat(self, messages: str | Sequence[Message], **options: Unpack[ChatOptions]) -> Answer:
        """Return the answer to a conversation; a text is one turn of the user."""
        with self.stream_chat(messages, **options) as stream:
            for _ in stream:
                pass
        return stream.answer

    def complete(self, prompt: str | Sequence[int], **options: Unpack[JobOptions]) -> Answer:
        """Return what follows a text, or token ids."""
        with self.stream_complete(prompt, **options) as stream:
            for _ in stream:
                pass
        return stream.answer

    @contextmanager
    def stream_chat(self, messages: str | Sequence[Message], **options: Unpack[ChatOptions]) -> Iterator[AnswerStream]:
        """Stream the answer to a conversation inside the block; leaving the block early cancels the job."""
        with self._stream(CHAT, chat_body(messages, options)) as stream:
            yield stream

    @contextmanager
    def stream_complete(self, prompt: str | Sequence[int], **options: Unpack[JobOptions]) -> Iterator[AnswerStream]:
        """Stream what follows a text inside the block; leaving the block early cancels the job."""
        with self._stream(COMPLETIONS, completion_body(prompt, options)) as stream:
            yield stream

    def score(self, text: str | Sequence[int], **options: Unpack[ScoreOptions]) -> Score:
        """Return the log probability of each token of a text; nothing is generated."""
        with self._stream(COMPLETIONS, score_body(text, options)) as stream:
            for _ in stream:
                pass
        return stream.score

    def embed(self, texts: str | Sequence[str], *, model: str | None = None) -> tuple[tuple[float, ...], ...]:
        """Return an embedding for each text."""
        return decode_embeddings(self._post("/v1/embeddings", self._with_model(embedding_body(texts, model))))

    def explain(self, **task: Unpack[TaskOptions]) -> Explanation:
        """Return which method a task would be served with, and why; the stages vote, and nothing is run."""
        return decode(Explanation, self._post("/swarm/explain", self._with_model(task)))

    def status(self) -> NodeStatus:
        """Return what the node is and does."""
        return decode(NodeStatus, self.get("/swarm/status"))

    def peers(self) -> tuple[Peer, ...]:
        """Return the peers that the node knows."""
        return decode_peers(self.get("/swarm/peers"))

    def models(self) -> tuple[Model, ...]:
        """Return the models of the swarm, complete or not."""
        return decode_models(self.get("/swarm/models"))

    def get(self, path: str) -> Any:
        """Return the JSON document at a path of the node's API, as it is."""
        return self._document("GET", path)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._document("POST", path, body)

    def _document(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        response = self._send(method, path, body)
        with transport_errors(self.url):
            try:
                response.read()
            finally:
                response.close()
        return json_of(response)

    @contextmanager
    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[AnswerStream]:
        response = self._send("POST", path, self._with_model(body))
        builder = AnswerBuilder(self.url, response.headers.get("X-Request-Id"))
        try:
            yield AnswerStream(split_lines(response.iter_text()), builder)
        finally:
            builder.is_left = True
            response.close()

    def _with_model(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {**body, "model": body.get("model") or self._model or choose_model(self.models())}

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        """Return the response, of status 200, before its body was read."""
        retries = Retries(self._retry_limit_s)
        while True:
            request = build_request(self._http, method, path, body)
            with transport_errors(self.url):
                response = self._http.send(request, stream=True)
                if response.is_success:
                    return response
                try:
                    response.read()
                finally:
                    response.close()
            time.sleep(retries.delay_s(error_of(response)))
