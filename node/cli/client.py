"""Client of a node's HTTP API.

Why it is not `metaswarm_client`: that is another distribution, on which the node does not depend, and it decodes
documents into types without the fields that it does not know, where verbs print documents as they came, show what came
of a stream that was stopped, and store whole answers with status and request id in batch files.
"""

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict, cast
from urllib.parse import urlsplit

import click
import httpx

from node.api.interface import Explanation, ModelDocument, NodeStatus
from node.cli.output import CommandError
from node.config import (
    DEFAULT_API,
    ENVIRONMENT_PREFIX,
    ConfigError,
    NodeReady,
    chosen_data_dir,
    is_loopback,
    is_unspecified,
    parse_api_key,
)

CONNECT_TIMEOUT_S: Final = 5.0
REQUEST_TIMEOUT_S: Final = 10.0
SILENCE_TIMEOUT_S: Final = 30.0
"""Of streamed answers: a node that sends nothing for so long, not even its keep-alives, is dead."""
UNLIMITED: Final = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
"""Of measurements, which send nothing until they are done."""


def find_api(api: str | None) -> str:
    """Return the URL of the API: from the flag, METASWARM_API, `node.json`, or the default."""
    given = api or os.environ.get(f"{ENVIRONMENT_PREFIX}API")
    if given:
        return _parse_url(given)
    ready = NodeReady.read(chosen_data_dir())
    return ready.api_url if ready else f"http://{DEFAULT_API}"


def _parse_url(text: str) -> str:
    """Return a URL from a URL or HOST:PORT."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        port, host = None, None
    if not host or port == 0 or parts.scheme not in {"http", "https"}:
        raise click.UsageError(f"--api: expected a URL such as http://{DEFAULT_API}, not {text!r}")
    if is_unspecified(host):
        url = url.replace(parts.netloc, f"{'[::1]' if ':' in host else '127.0.0.1'}{f':{port}' if port else ''}", 1)
    return url.rstrip("/").removesuffix("/v1")  # which clients of the OpenAI API have in their base URL


class BatchResponse(TypedDict):
    """An answer as lines of batches have it."""

    status_code: int
    request_id: str
    body: dict[str, Any]


def _document_type(url: str) -> type[dict[str, Any]]:
    """Return the type of the objects in a node's answers: a field they lack is another version's, no defect here."""

    class Document(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            raise CommandError(
                f"the node at {url} runs another version of metaswarm (no {name!r} in its answer): restart it"
            )

    return Document


class NodeLostError(CommandError):
    """No node answers, or the connection to it was lost."""


class RefusedError(CommandError):
    """The node answered with an error. `code` and `retry_after_s` are None if the answer has none.

    `response`: the whole answer, but for one that came in a stream.
    """

    def __init__(
        self,
        message: str,
        code: str | None,
        retry_after_s: float | None = None,
        response: "BatchResponse | None" = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.response = response


@dataclass(slots=True)
class Completion:
    """A streamed answer, as received so far."""

    text: str = ""
    reasoning: str = ""
    error: RefusedError | None = None
    model: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    metaswarm: dict[str, Any] = field(default_factory=dict)

    def take(self, chunk: dict[str, Any]) -> tuple[str, str]:
        """Add a chunk; return its text and its reasoning."""
        if "error" in chunk:
            self.error = RefusedError(chunk["error"]["message"], chunk["error"]["code"])
            return "", ""
        self.model = chunk["model"]
        self.usage = chunk.get("usage") or self.usage
        self.metaswarm = chunk.get("metaswarm") or self.metaswarm
        text = reasoning = ""
        for choice in chunk["choices"]:
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            delta = choice.get("delta", {"content": choice.get("text", "")})
            text += delta.get("content") or ""
            reasoning += delta.get("reasoning_content") or ""
        self.text += text
        self.reasoning += reasoning
        return text, reasoning

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `metaswarm submit --json`."""
        job = self.metaswarm
        return {
            "job_id": job["job_id"],
            "model": self.model,
            "text": self.text,
            "token_ids": job["token_ids"],
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.usage["prompt_tokens"],
                "completion_tokens": self.usage["completion_tokens"],
                "cached_tokens": self.usage["prompt_tokens_details"]["cached_tokens"],
                "accepted_draft_tokens": self.usage["completion_tokens_details"]["accepted_prediction_tokens"],
            },
            "timing": job["timing"],
            "cost": job["cost"],
            "route": [{key: stage[key] for key in ("peer", "start", "end")} for stage in job["route"]],
            "method": job["method"],
            "consensus": job["consensus"],
            "selection": job["selection"],
            "replays": job["replays"],
            **({"trace": job["trace"]} if job.get("trace") else {}),
        }


class ApiClient:
    """Client of one node. Every error is a CommandError."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url = url
        self._http = http
        self._document = _document_type(url)

    async def is_there(self) -> bool:
        """Return whether a server answers at the URL."""
        try:
            await self._http.get("/health")
        except httpx.TransportError:
            return False
        return True

    async def status(self) -> NodeStatus:
        """Return the node's status."""
        return cast("NodeStatus", await self.request("GET", "/swarm/status"))

    async def models(self) -> list[ModelDocument]:
        """Return the models that the node knows."""
        return cast("list[ModelDocument]", (await self.request("GET", "/swarm/models"))["models"])

    async def explain(self, task: Mapping[str, str | int | float]) -> Explanation:
        """Return which method a task would be served with, and why."""
        return cast("Explanation", await self.request("POST", "/swarm/explain", json=dict(task)))

    async def complete(
        self,
        body: dict[str, Any],
        show: Callable[[str], None] = lambda text: None,
        show_reasoning: Callable[[str], None] | None = None,
        completion: Completion | None = None,
    ) -> Completion:
        """Submit a job, a chat if the body has messages; `show` gets the text as it is streamed.

        `completion`: what the answer is added to, for a caller that wants what came of one that was stopped.
        """
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        body = {"metaswarm": {}, **body, "stream": True, "stream_options": {"include_usage": True}}
        completion = completion or Completion()
        timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        request = self._build("POST", path, json=body, timeout=timeout)
        with _faults(self.url):
            async with aclosing(await self._http.send(request, stream=True)) as response:
                await _raise_for_error(response, self.url)
                async for line in _lines(response):
                    data = line.removeprefix("data: ")
                    if data != line and data != "[DONE]":  # other lines are keep-alive comments
                        text, reasoning = completion.take(json.loads(data, object_hook=self._document))
                        if show_reasoning is not None:
                            show_reasoning(reasoning)
                        show(text)
        if completion.error is not None:
            raise completion.error
        if not completion.metaswarm:
            raise CommandError(f"the answer of the node at {self.url} is incomplete: try again")
        return completion

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the whole answer to a request, without a timeout."""
        return cast("dict[str, Any]", await self.request("POST", path, json=body, timeout=UNLIMITED))

    async def respond(self, path: str, body: dict[str, Any]) -> BatchResponse:
        """Return the whole answer to a request with what is around it, without a timeout."""
        request = self._build("POST", path, json=body, timeout=UNLIMITED)
        with _faults(self.url):
            response = await self._http.send(request)
            await _raise_for_error(response, self.url)
            return _described(response, response.json())

    async def bench(self, body: dict[str, Any]) -> dict[str, Any]:
        """Measure methods, without a timeout; return the document."""
        return await self.post("/swarm/bench", body)

    async def request(self, method: str, path: str, **settings: Any) -> Any:
        """Return the JSON document that a page answers."""
        request = self._build(method, path, **settings)
        with _faults(self.url):
            response = await self._http.send(request)
            await _raise_for_error(response, self.url)
            return response.json(object_hook=self._document)

    def _build(self, method: str, path: str, **settings: Any) -> httpx.Request:
        """Return a request. What JSON cannot say is the caller's fault, and nothing about who answers at the URL."""
        try:
            return self._http.build_request(method, path, **settings)
        except ValueError as error:
            raise CommandError(f"the request is not valid JSON: {error}") from None


def _api_key() -> str | None:
    name = f"{ENVIRONMENT_PREFIX}API_KEY"
    try:
        return parse_api_key(os.environ[name]) if os.environ.get(name) else None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


@asynccontextmanager
async def open_client(url: str) -> AsyncIterator[ApiClient]:
    """Open a client for the block, with the API key of METASWARM_API_KEY if set. Raises ConfigError."""
    key = _api_key()
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    async with httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=timeout,
        limits=httpx.Limits(max_connections=None),
        trust_env=not is_loopback(urlsplit(url).hostname or ""),  # no proxy for loopback
    ) as http:
        yield ApiClient(url, http)


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the lines of a stream. httpx's own also end at U+2028 and the like, which JSON may have in texts."""
    rest = ""
    async for text in response.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line.removesuffix("\r")


@contextmanager
def _faults(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise NodeLostError(f"no node answers at {url}: start one with `metaswarm node`, or use --api URL") from None
    except httpx.TimeoutException:
        raise NodeLostError(f"the node at {url} is silent: see `metaswarm doctor`") from None
    except httpx.LocalProtocolError:  # whose text may have the API key
        raise CommandError(f"the request to {url} is not valid HTTP") from None
    except httpx.TransportError as error:
        raise NodeLostError(f"connection to the node at {url} lost: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandError(f"{url} does not look like a metaswarm API") from None


async def _raise_for_error(response: httpx.Response, url: str) -> None:
    if response.is_success:
        return
    if response.status_code == 401:
        if "Authorization" in response.request.headers:
            raise RefusedError(f"the node at {url} does not accept the API key in {ENVIRONMENT_PREFIX}API_KEY", None)
        raise RefusedError(f"the node at {url} requires an API key: set {ENVIRONMENT_PREFIX}API_KEY", None)
    body = json.loads(await response.aread())
    error, retry_after = body["error"], response.headers.get("Retry-After")
    retry_after_s = float(retry_after) if retry_after else None
    raise RefusedError(error["message"], error["code"], retry_after_s, _described(response, body))


def _described(response: httpx.Response, body: dict[str, Any]) -> BatchResponse:
    return {"status_code": response.status_code, "request_id": response.headers.get("X-Request-Id", ""), "body": body}
