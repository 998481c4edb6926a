import json
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from node.api.endpoint import GenerationEndpoint
from node.api.errors import ApiError
from node.api.generation import ChoiceStarted, ChoiceText, Outcome
from node.api.openai.logprobs import completion_logprobs
from node.api.openai.requests import parse_completion_request
from node.coordinator.chat import ChatMessage
from node.coordinator.submission import JobError, JobErrorCode, JobStarted, TokenLogprob
from protocol.measurements import QualityBound
from tests.unit.api.fakes import JOB, MODEL, PEERS, FakeNode, chat_body, send_request, serve_node

COST = {"objective": "latency", "budget": None, "predicted": 0.4, "actual": 0.3}
METASWARM = {
    "job_id": JOB,
    "route": [
        {"peer": PEERS[0], "start": 0, "end": 4, "compute_s": 0.1, "queue_s": 0.01},
        {"peer": PEERS[1], "start": 4, "end": 8, "compute_s": 0.2, "queue_s": 0.02},
    ],
    "method": {
        "name": "arithmetic=fp32",
        "switches": {"arithmetic": "fp32"},
        "stage_policy": {"batching": "continuous"},
    },
    "consensus": {
        "votes": [{"peer": PEERS[0], "scores": {"arithmetic=fp32": -1.5}, "table_digest": None}],
        "agreed": "arithmetic=fp32",
        "epoch": None,
        "table_digest": None,
        "weighed": False,
    },
    "timing": {"ttft_s": 0.25, "tpot_s": 0.03, "total_s": 0.5},
    "cost": COST,
    "selection": None,
    "replays": 1,
    "token_ids": [0, 1, 2],
    "trace": None,
}
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"accepted_prediction_tokens": 1, "reasoning_tokens": 0},
}


def completion_body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "Hi", **fields}


def events_of(response: httpx.Response) -> list[Any]:
    """The documents of a stream of server-sent events, the closing [DONE] as text."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.text.split("\n\n")
    assert end == ""
    data = [event.removeprefix("data: ") for event in events]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


async def test_chat_without_stream(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=chat_body(metaswarm={}))
    assert response.status_code == 200
    assert response.json() == {
        "id": f"chatcmpl-{JOB}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello, wörld", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "metaswarm": METASWARM,
    }


async def test_completion_without_stream(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=completion_body(metaswarm={}))
    assert response.json() == {
        "id": f"cmpl-{JOB}",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [{"index": 0, "text": "Hello, wörld", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "metaswarm": METASWARM,
    }


async def test_streams_chat(client: httpx.AsyncClient) -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True}, metaswarm={})
    *chunks, done = events_of(await client.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    *texts, usage = chunks
    for chunk in chunks:
        assert (chunk["id"], chunk["object"]) == (f"chatcmpl-{JOB}", "chat.completion.chunk")
    deltas = [chunk["choices"][0]["delta"] for chunk in texts]
    words = [{"content": word} for word in ("Hello", ",", " wörld")]
    assert deltas == [{"role": "assistant", "content": ""}, *words, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in texts] == [None] * 4 + ["stop"]
    assert (usage["choices"], usage["usage"], usage["metaswarm"]) == ([], USAGE, METASWARM)


async def test_streams_completion_with_metaswarm_in_last_chunk(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=completion_body(stream=True), headers={"X-Metaswarm": "1"})
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hello", ",", " wörld", ""]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk.get("metaswarm") for chunk in chunks] == [None] * 3 + [METASWARM]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [True, False])
async def test_answer_has_metaswarm_only_on_request(client: httpx.AsyncClient, stream: bool) -> None:
    for path, body in (("chat/completions", chat_body(stream=stream)), ("completions", completion_body(stream=stream))):
        assert "metaswarm" not in (await client.post(f"/v1/{path}", json=body)).text
        assert "metaswarm" not in (await client.post(f"/v1/{path}", json=body, headers={"X-Metaswarm": "0"})).text
        assert "metaswarm" in (await client.post(f"/v1/{path}", json=body, headers={"X-Metaswarm": "true"})).text


async def test_scores_prompts_as_evaluation_harnesses_ask_for_it(node: FakeNode, client: httpx.AsyncClient) -> None:
    """`echo` with `logprobs`: the prompt's tokens have theirs, but the first; `max_tokens` is 0 or 1."""
    body = completion_body(prompt=["one two", "a b c"], echo=True, logprobs=1, max_tokens=0)
    answer = (await client.post("/v1/completions", json=body)).json()
    first, second = answer["choices"]
    assert (first["text"], first["finish_reason"], answer["usage"]["completion_tokens"]) == ("one two", "stop", 0)
    assert first["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [None, -0.75],
        "top_logprobs": [None, {"x": -0.5}],
        "text_offset": [0, 3],
    }
    assert second["logprobs"]["token_logprobs"] == [None, -0.75, -0.75]
    assert [job.max_tokens for job in node.submitter.requests] == [0, 0]
    node.submitter.words = ("!",)
    answer = (await client.post("/v1/completions", json={**body, "max_tokens": 1, "prompt": "one two"})).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "one two!"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.75, -0.25]
    chunks = events_of(await client.post("/v1/completions", json={**body, "prompt": "one two", "stream": True}))
    first, second, *_ = [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]"]
    assert (first["text"], first["logprobs"]["token_logprobs"]) == ("one two", [None])
    assert (second["text"], second["logprobs"]["token_logprobs"]) == ("", [-0.75]), "long ones come in pieces"
    assert second["logprobs"]["text_offset"] == [3]


@pytest.mark.parametrize(
    ("echo", "tokens", "offsets"),
    [
        ("The sky", ("<s>*", "The", " sky"), [0, 0, 3]),
        ("The sky", ("<s>*", " The", " sky"), [0, 0, 3]),
        ("<s> The", ("<s>*", " The", "</s>*"), [0, 3, 7]),
        ("a\u00fc!", ("a", b"\xc3", b"\xbc", "!", "</s>*"), [0, 1, 2, 2, 3]),
        ("", (" sky", "."), [0, 4]),
    ],
)
def test_offsets_point_into_the_text(echo: str, tokens: tuple[str | bytes, ...], offsets: list[int]) -> None:
    """Special tokens (here with a star) that the prompt does not spell have no place in it."""
    given = [
        TokenLogprob(
            0,
            token if isinstance(token, bytes) else token.rstrip("*").encode(),
            -1.0,
            is_special=isinstance(token, str) and token.endswith("*"),
        )
        for token in tokens
    ]
    whole, end = completion_logprobs(given, 0, echo)
    assert whole["text_offset"] == offsets
    first, middle = completion_logprobs(given[:1], 0, echo)
    rest, last = completion_logprobs(given[1:], middle, echo)
    assert (first["text_offset"] + rest["text_offset"], last) == (offsets, end)


async def test_bounds_the_log_probabilities_of_prompts(
    node: FakeNode, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.api.endpoint.MAX_LOGPROBS_IN_ANSWER", 2 * 5 * 2)
    body = completion_body(prompt=["a b", "c d"], echo=True, logprobs=1, max_tokens=0)
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    answer = await client.post("/v1/completions", json={**body, "prompt": ["a b", "c d", "e f"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_logprobs")
    assert node.submitter.running == 0
    assert (await client.post("/v1/completions", json={**body, "stream": True})).text.endswith("data: [DONE]\n\n")
    streamed = await client.post("/v1/completions", json={**body, "prompt": ["a b", "c d", "e f"], "stream": True})
    assert "top_logprobs" in streamed.text
    assert "[DONE]" not in streamed.text
    assert node.submitter.running == 0
    monkeypatch.setattr("node.api.endpoint.MAX_LOGPROBS_IN_ANSWER", 9)
    streamed = await client.post("/v1/completions", json={**body, "prompt": "a b", "stream": True})
    assert streamed.status_code == 400, "before anything was sent"


async def test_log_probabilities_without_a_limit_are_of_a_usual_text_unless_streamed(
    node: FakeNode, client: httpx.AsyncClient
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    for fields in ({"logprobs": True}, {"logprobs": True, "stream": True}, {}, {"logprobs": True, "max_tokens": 600}):
        assert (await client.post("/v1/chat/completions", json={**body, **fields})).status_code == 200
    assert [job.max_tokens for job in node.submitter.requests] == [512, None, None, 600]


async def test_answers_several_prompts_and_choices(node: FakeNode, client: httpx.AsyncClient) -> None:
    body = completion_body(prompt=["one: ", "two: "], n=2, echo=True, metaswarm={})
    answer = (await client.post("/v1/completions", json=body)).json()
    texts = [f"{prompt}Hello, wörld" for prompt in ("one: ", "one: ", "two: ", "two: ")]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["metaswarm"] for choice in answer["choices"]] == [METASWARM] * 4
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (10, 12)
    response = await client.post("/v1/completions", json={**body, "stream": True})
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    streamed = dict.fromkeys(range(4), "")
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert list(streamed.values()) == texts
    assert sum("metaswarm" in chunk["choices"][0] for chunk in chunks) == 4


async def test_chat_has_log_probabilities(client: httpx.AsyncClient) -> None:
    body = chat_body(logprobs=True, top_logprobs=1)
    likeliest = [{"token": "x", "logprob": -0.5, "bytes": [120]}]
    expected = [
        {"token": word, "logprob": -0.25, "bytes": list(word.encode()), "top_logprobs": likeliest}
        for word in ("Hello", ",", " wörld")
    ]
    (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    assert choice["logprobs"] == {"content": expected, "refusal": None}
    *chunks, _ = events_of(await client.post("/v1/chat/completions", json={**body, "stream": True}))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [each["content"] for each in streamed if each] == [[token] for token in expected]


async def test_completion_has_log_probabilities(client: httpx.AsyncClient) -> None:
    body = completion_body(logprobs=1)
    (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["Hello", ",", " wörld"],
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": [{"x": -0.5}] * 3,
        "text_offset": [0, 5, 6],
    }
    *chunks, _ = events_of(await client.post("/v1/completions", json={**body, "stream": True}))
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:-1]]
    assert offsets == [[0], [5], [6]]


async def test_error_of_one_choice_ends_the_others(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.submitter.refuse = JobError(JobErrorCode.FULL, "No room.")
    response = await client.post("/v1/chat/completions", json=chat_body(n=20))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "peers_full")
    assert len(node.submitter.requests) < 20


async def test_choices_wait_for_room(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.submitter.refuse = JobError(JobErrorCode.FULL, "full")
    node.submitter.room = 2
    answer = await client.post("/v1/completions", json=completion_body(n=7))
    assert answer.status_code == 200
    assert [choice["text"] for choice in answer.json()["choices"]] == ["Hello, wörld"] * 7
    assert len(node.submitter.requests) > 7, "some were refused"
    node.submitter.room = 0
    assert (await client.post("/v1/completions", json=completion_body(n=7))).status_code == 503


async def test_whole_answer_has_bounded_log_probabilities(node: FakeNode, client: httpx.AsyncClient) -> None:
    body = completion_body(n=64, max_tokens=8000, logprobs=19)
    refused = await client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")
    assert not node.submitter.requests
    streamed = await client.post("/v1/completions", json=body | {"stream": True})
    assert streamed.status_code == 200
    kept = Outcome(keeps_logprobs=False)
    kept.take(ChoiceStarted(0, JobStarted(job_id=JOB, model=MODEL, model_name="", prompt_tokens=1, created_s=0)))
    assert kept.take(ChoiceText(0, "a", (TokenLogprob(1, b"a", -1.0),))).logprobs == []


async def test_disconnect_cancels_every_choice(node: FakeNode) -> None:
    node.submitter.hang = True
    async with serve_node(node) as url:
        connection = await send_request(url, "/v1/chat/completions", json.dumps(chat_body(n=3)).encode())
        while len(node.submitter.requests) < 3:
            await trio.testing.wait_all_tasks_blocked(0.01)
        await connection.aclose()
        with trio.fail_after(1):
            while node.submitter.running:
                await trio.testing.wait_all_tasks_blocked(0.01)


async def test_streams_text_while_job_runs(node: FakeNode) -> None:
    node.submitter.hang = True
    with trio.fail_after(5):
        async with serve_node(node) as url:
            body = json.dumps(completion_body(stream=True)).encode()
            async with await send_request(url, "/v1/completions", body) as stream:
                received = b""
                while "wörld".encode() not in received:
                    received += await stream.receive_some()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_cancels_job(node: FakeNode, path: str, stream: bool) -> None:
    node.submitter.hang = True
    body = chat_body(stream=stream) if "chat" in path else completion_body(stream=stream)
    async with serve_node(node) as url:
        connection = await send_request(url, path, json.dumps(body).encode())
        await node.submitter.entered.wait()
        await connection.aclose()
        with trio.fail_after(1):
            await node.submitter.left.wait()


async def test_request_fields_reach_job(node: FakeNode, client: httpx.AsyncClient) -> None:
    fields = {
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 11,
        "stop": ["END", "\n"],
        "metaswarm": {"quality": "near", "method": "arithmetic=bf16", "ignore_eos": True},
    }
    await client.post("/v1/chat/completions", json=chat_body(**fields))
    (job,) = node.submitter.requests
    assert (job.model, job.messages) == ("tiny", (ChatMessage(role="user", content="Hi"),))
    assert (job.max_tokens, job.temperature, job.top_p, job.seed, job.stop) == (7, 0.5, 0.9, 11, ("END", "\n"))
    assert (job.quality, job.method, job.ignore_eos) == (QualityBound.NEAR, "arithmetic=bf16", True)


REFUSALS = [
    (JobErrorCode.INVALID, 400, "invalid_request_error", None),
    (JobErrorCode.CONTEXT_LENGTH, 400, "invalid_request_error", None),
    (JobErrorCode.MODEL_NOT_FOUND, 404, "invalid_request_error", None),
    (JobErrorCode.FAILED, 502, "server_error", None),
    (JobErrorCode.UNCOVERED, 503, "server_error", "10"),
    (JobErrorCode.FULL, 503, "server_error", "2"),
    (JobErrorCode.NOT_READY, 503, "server_error", "10"),
    (JobErrorCode.MEASURING, 503, "server_error", "10"),
    (JobErrorCode.LEAVING, 503, "server_error", "10"),
]


@pytest.mark.parametrize(("code", "status", "kind", "retry_after"), REFUSALS)
@pytest.mark.parametrize("stream", [True, False])
async def test_job_error_maps_to_status(
    node: FakeNode,
    client: httpx.AsyncClient,
    code: JobErrorCode,
    status: int,
    kind: str,
    retry_after: str | None,
    stream: bool,
) -> None:
    node.submitter.refuse = JobError(code, "No.")
    response = await client.post("/v1/completions", json=completion_body(stream=stream))
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["message"], error["type"], error["code"]) == ("No.", kind, code.value)
    assert response.headers.get("retry-after") == retry_after


async def test_retry_after_of_job_error(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.submitter.refuse = JobError(JobErrorCode.FULL, "No.", retry_after_s=4.2)
    response = await client.post("/v1/completions", json=completion_body())
    assert response.headers["retry-after"] == "5"


async def test_error_before_first_token_is_status_when_streaming(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.submitter.words = ()
    node.submitter.fail = JobError(JobErrorCode.FULL, "No room.")
    response = await client.post("/v1/chat/completions", json=chat_body(stream=True))
    assert response.status_code == 503


async def test_error_after_first_token_ends_stream(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.submitter.fail = JobError(JobErrorCode.FAILED, "A stage is lost.")
    response = await client.post("/v1/chat/completions", json=chat_body(stream=True))
    *_, last = events_of(response)
    assert last["error"]["message"] == "A stage is lost."
    assert last["error"]["code"] == "job_failed"


async def test_error_after_first_token_is_status_without_stream(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.submitter.fail = JobError(JobErrorCode.FAILED, "A stage is lost.")
    response = await client.post("/v1/chat/completions", json=chat_body())
    assert (response.status_code, response.json()["error"]["message"]) == (502, "A stage is lost.")


async def run_asgi(node: FakeNode, body: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Answer one streaming completion under a virtual clock; return what was sent, and when."""
    sent: list[tuple[float, dict[str, Any]]] = []
    received = False

    async def receive() -> dict[str, Any]:
        nonlocal received
        if received:
            await trio.sleep_forever()
        received = True
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append((trio.current_time(), message))

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    scope["state"] = {"request_id": "req_1"}
    await GenerationEndpoint(node.submitter, parse_completion_request)(scope, receive, send)
    return sent


@pytest.mark.parametrize("where", ["prompt", "text"])
async def test_sends_keep_alive_while_idle(virtual_clock: MockClock, node: FakeNode, where: str) -> None:
    node.submitter.pauses = {0 if where == "prompt" else 2: 31.0}
    sent = await run_asgi(node, completion_body(stream=True))
    assert sent[0][1]["status"] == 200
    bodies = [(at_s, message["body"]) for at_s, message in sent[1:]]
    comments = [at_s for at_s, body in bodies if body.startswith(b":")]
    assert len(comments) == 6
    assert all(body.endswith(b"\n\n") for _, body in bodies[:-1])
    moments = [sent[0][0], *(at_s for at_s, _ in bodies)]
    assert max(b - a for a, b in pairwise(moments)) <= 5.1
    assert b"".join(body for _, body in bodies).endswith(b"data: [DONE]\n\n")


async def test_error_is_status_before_keep_alive_and_event_after(virtual_clock: MockClock, node: FakeNode) -> None:
    node.submitter.words = ()
    node.submitter.fail = JobError(JobErrorCode.UNCOVERED, "Nobody serves it.", retry_after_s=2)
    node.submitter.pauses = {0: 7.0}
    *_, (_, last), (_, end) = await run_asgi(node, completion_body(stream=True))
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "blocks_not_served"
    assert end == {"type": "http.response.body", "body": b"", "more_body": False}
    node.submitter.pauses = {0: 4.0}
    with pytest.raises(ApiError) as caught:
        await run_asgi(node, completion_body(stream=True))
    assert caught.value.status == 503
    assert caught.value.headers == {"Retry-After": "2"}


async def test_refusal_before_route_opens_is_status(virtual_clock: MockClock, node: FakeNode) -> None:
    node.submitter.refuse = JobError(JobErrorCode.FULL, "No room.", retry_after_s=2)
    node.submitter.ponders_s = 8.0
    with pytest.raises(ApiError) as caught:
        await run_asgi(node, completion_body(stream=True))
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "2"})


@pytest.mark.parametrize("ponders_s", [6.0, 30.0])
async def test_sends_keep_alive_before_late_route(virtual_clock: MockClock, node: FakeNode, ponders_s: float) -> None:
    node.submitter.ponders_s, node.submitter.pauses = ponders_s, {0: 20.0}
    began_s = trio.current_time()
    moments = [began_s, *(at_s for at_s, _ in await run_asgi(node, completion_body(stream=True)))]
    assert max(b - a for a, b in pairwise(moments)) < 10


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": []}),
        ("/api/generate", {}),
        ("/api/generate", {"stream": False, "keep_alive": 0}),
        ("/api/embed", {"input": ""}),
        ("/api/embed", {"input": []}),
        ("/api/embeddings", {"prompt": ""}),
    ],
)
async def test_model_of_a_request_without_a_text_is_looked_up(
    node: FakeNode, client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    assert (await client.post(path, json={"model": "tiny", **body})).status_code == 200
    node.submitter.refuse = JobError(JobErrorCode.MODEL_NOT_FOUND, "no peer knows the model 'nosuch'")
    response = await client.post(path, json={"model": "nosuch", **body})
    assert (response.status_code, response.json()) == (404, {"error": "no peer knows the model 'nosuch'"})
    assert node.submitter.requests == []


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_each_line_of_ollama_has_its_own_time(node: FakeNode, client: httpx.AsyncClient, path: str) -> None:
    before = datetime.now(UTC)
    node.submitter.pauses = {1: 0.01, 2: 0.01}
    response = await client.post(path, json=chat_body() if path == "/api/chat" else {"model": "tiny", "prompt": "Hi"})
    times = [datetime.fromisoformat(json.loads(line)["created_at"]) for line in response.text.splitlines()]
    assert len(set(times)) == len(times) > 2
    assert times == sorted(times)
    assert before <= times[0] < times[-1] <= datetime.now(UTC)
