"""The Python client against the real HTTP server, with a node that plays its jobs."""

import asyncio
import gc
import json
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import httpx
import pytest
import trio

from metaswarm_client import (
    AccessDeniedError,
    AsyncSwarm,
    InvalidRequestError,
    JobFailedError,
    NodeUnreachableError,
    NotFoundError,
    Score,
    Swarm,
    SwarmError,
    Tool,
    UnavailableError,
    UnexpectedAnswerError,
)
from node.api.interface import ModelDocument
from node.coordinator.chat import ChatFormat, ToolFormat
from node.coordinator.submission import JobError, JobErrorCode
from protocol.measurements import QualityBound
from tests.unit.api.fakes import FASTER, JOB, MODEL, PEERS, FakeNode, serve_node

T = TypeVar("T")
FULL = JobError(JobErrorCode.FULL, "the peers that serve tiny are full", retry_after_s=0.01)
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
ADD = Tool("add", "Add one.", {"type": "object"})


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


async def ask(url: str, work: Callable[[Swarm], T], **settings: Any) -> T:
    """Run the client that blocks, in a thread."""

    def run() -> T:
        with Swarm(url, **settings) as swarm:
            return work(swarm)

    with trio.fail_after(10):
        return await trio.to_thread.run_sync(run)


async def test_answer_tells_text_and_how_the_swarm_did_it(node: FakeNode) -> None:
    async with serve_node(node) as url:
        answer = await ask(url, lambda swarm: swarm.chat("Hi", model="tiny", logprobs=2))
    assert (str(answer), answer.model, answer.finish_reason) == ("Hello, wörld", "tiny", "stop")
    assert answer.message == {"role": "assistant", "content": "Hello, wörld"}
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens, answer.usage.accepted_draft_tokens) == (5, 2, 1)
    assert (answer.job.job_id, answer.job.replays, answer.job.token_ids) == (JOB, 1, (0, 1, 2))
    assert [(stage.peer, stage.start, stage.end) for stage in answer.job.route] == [(PEERS[0], 0, 4), (PEERS[1], 4, 8)]
    assert answer.job.route[1].compute_s == 0.2
    assert answer.job.method.switches == {"arithmetic": "fp32"}
    assert answer.job.consensus.votes[0].scores == {"arithmetic=fp32": -1.5}
    assert [(token.token, token.logprob) for token in answer.logprobs] == [
        ("Hello", -0.25), (",", -0.25), (" wörld", -0.25)
    ]  # fmt: skip
    assert answer.request_id


async def test_options_reach_the_job(node: FakeNode) -> None:
    async with serve_node(node) as url:
        await ask(
            url,
            lambda swarm: swarm.complete(
                (1, 2), model="tiny", method="baseline", quality="near", max_tokens=7, temperature=0.5, seed=3,
                logit_bias={4: -1.0}, schema={"type": "object"}, extra={"top_k": 5},
            ),
        )  # fmt: skip
    (request,) = node.submitter.requests
    assert request.prompt_tokens == (1, 2)
    assert (request.method, request.quality) == ("baseline", QualityBound.NEAR)
    assert (request.max_tokens, request.temperature, request.seed, request.top_k) == (7, 0.5, 3, 5)
    assert request.logit_bias == ((4, -1.0),)
    assert request.json_schema == '{"type":"object"}'


@pytest.mark.parametrize("asked", [{"trace": True}, {"extra": {"metaswarm": {"trace": True}}}])
async def test_trace_is_asked_for_beside_the_other_options(node: FakeNode, asked: dict[str, Any]) -> None:
    async with serve_node(node) as url:
        await ask(url, lambda swarm: swarm.chat("Hi", model="tiny", quality="near", budget=5.0, **asked))
        await ask(url, lambda swarm: swarm.complete("Hi", model="tiny", quality="near", budget=5.0, **asked))
    for request in node.submitter.requests:
        assert (request.trace, request.quality, request.budget) == (True, QualityBound.NEAR, 5.0)


@pytest.mark.parametrize("extra", [{"n": 2}, {"stream": False}, {"stream_options": {}}])
async def test_fields_of_the_client_are_not_set_by_extra(node: FakeNode, extra: dict[str, Any]) -> None:
    async with serve_node(node) as url:
        with pytest.raises(ValueError, match=f"extra cannot set {min(extra)}"):
            await ask(url, lambda swarm: swarm.chat("Hi", model="tiny", extra=extra))
        with pytest.raises(ValueError, match=f"extra cannot set {min(extra)}"):
            await ask(url, lambda swarm: swarm.complete("Hi", model="tiny", extra=extra))
    assert node.submitter.requests == []


@pytest.mark.parametrize("unknown", [{"n": 2}, {"max_token": 3}])
async def test_option_that_does_not_exist_is_not_sent(node: FakeNode, unknown: dict[str, Any]) -> None:
    async with serve_node(node) as url:
        with pytest.raises(TypeError, match=f"no such option: {min(unknown)}"):
            await ask(url, lambda swarm: swarm.chat("Hi", model="tiny", **unknown))
        with pytest.raises(TypeError, match=f"no such option: {min(unknown)}"):
            await ask(url, lambda swarm: swarm.complete("Hi", model="tiny", **unknown))
    assert node.submitter.requests == []


async def test_tool_calls_go_back_into_the_conversation(node: FakeNode) -> None:
    node.submitter.chat_format, node.submitter.words = ChatFormat(tools=ToolFormat.HERMES), (CALL,)
    async with serve_node(node) as url:
        answer = await ask(url, lambda swarm: swarm.chat("What is 1 + 1?", model="tiny", tools=[ADD]))
        (call,) = answer.tool_calls
        assert (call.name, call.parsed(), answer.finish_reason) == ("add", {"a": 1}, "tool_calls")
        turns = [{"role": "user", "content": "What is 1 + 1?"}, answer.message, call.result("2")]
        await ask(url, lambda swarm: swarm.chat(turns, model="tiny", tools=[ADD], tool_choice="add"))
    sent = node.submitter.requests[1].messages
    assert sent is not None
    assert (sent[1].tool_calls[0].name, sent[2].content, sent[2].tool_call_id) == ("add", "2", call.id)
    assert "add" in node.submitter.requests[1].json_schema, "the tool that was named is the only one"


async def test_the_only_complete_model_is_the_default(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve_node(node) as url:
        await ask(url, lambda swarm: swarm.complete("Hi"))
        await ask(url, lambda swarm: swarm.complete("Hi"), model="other")
        assert [request.model for request in node.submitter.requests] == ["tiny", "other"]
        documents = node.models()
        both: list[ModelDocument] = [{**documents[0], "name": name} for name in ("tiny", "small")]
        monkeypatch.setattr(node, "models", lambda: both)
        with pytest.raises(SwarmError, match="choose one with model=…: tiny, small"):
            await ask(url, lambda swarm: swarm.complete("Hi"))
        monkeypatch.setattr(node, "models", lambda: documents[1:])
        with pytest.raises(NotFoundError, match="no model is complete"):
            await ask(url, lambda swarm: swarm.complete("Hi"))


def check_score(score: Score) -> None:
    assert [(each.token, each.offset, each.logprob) for each in score.tokens] == [
        ("one", 0, None), (" two", 3, -0.75), (" three", 7, -0.75)
    ]  # fmt: skip
    assert [each.likeliest for each in score.tokens] == [{}, {"x": -0.5}, {"x": -0.5}]
    assert (score.logprob, score.usage.prompt_tokens, score.job.job_id) == (-1.5, 5, JOB)


async def test_score_tells_how_likely_a_text_is(node: FakeNode) -> None:
    async with serve_node(node) as url:
        check_score(await ask(url, lambda swarm: swarm.score("one two three", logprobs=1, quality="near")))
        async with AsyncSwarm(url) as swarm:
            check_score(await swarm.score("one two three", logprobs=1))
        plain = await ask(url, lambda swarm: swarm.score("one two three", model="tiny"))
        echoed = await ask(url, lambda swarm: swarm.complete("one two", logprobs=0, extra={"echo": True}))
    assert (plain.logprob, plain.tokens[1].likeliest) == (-1.5, {})
    request = node.submitter.requests[0]
    assert (request.prompt_logprobs, request.max_tokens, request.quality) == (True, 0, QualityBound.NEAR)
    assert [each.logprob for each in echoed.logprobs] == [-0.75, -0.25, -0.25, -0.25], "of the prompt but its first"


async def test_unicode_line_ends_in_a_text(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a node that sends them as they are, as JSON may."""
    monkeypatch.setattr("node.api.openai.answers.json_line", partial(json.dumps, ensure_ascii=False))
    node.submitter.words = ("one\u2028two", "\u2029three\x85four")
    async with serve_node(node) as url:
        answer = await ask(url, lambda swarm: swarm.chat("Hi", model="tiny"))
        async with AsyncSwarm(url) as swarm:
            awaited = await swarm.chat("Hi", model="tiny")
    assert answer.text == awaited.text == "one\u2028two\u2029three\x85four"


def read_part(swarm: Swarm) -> None:
    with swarm.stream_chat("Hi", model="tiny") as stream:
        assert next(stream).text == "Hello"
        with pytest.raises(UnexpectedAnswerError, match="read the stream to its end"):
            stream.answer  # noqa: B018


HALF = b'data: {"model": "tiny", "choices": [{"text": "half", "finish_reason": null}]}\n\n'
BEHIND_BLOCK = "iterate inside its `with` block"


async def test_stream_that_ends_early_or_is_left_has_no_normal_end() -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=HALF))
    swarm = Swarm("http://127.0.0.1", transport=transport)
    with swarm, swarm.stream_complete("Hi", model="tiny") as stream:
        assert next(stream).text == "half"
        with pytest.raises(UnexpectedAnswerError, match="ended before it was whole"):
            next(stream)
    with pytest.raises(SwarmError, match=BEHIND_BLOCK):
        next(stream)
    awaited = AsyncSwarm("http://127.0.0.1", transport=transport)
    async with awaited, awaited.stream_complete("Hi", model="tiny") as deltas:
        assert (await anext(deltas)).text == "half"
        with pytest.raises(UnexpectedAnswerError, match="ended before it was whole"):
            await anext(deltas)
    with pytest.raises(SwarmError, match=BEHIND_BLOCK):
        await anext(deltas)


def read_and_leave(swarm: Swarm) -> None:
    with swarm.stream_chat("Hi", model="tiny") as stream:
        assert len(list(stream)) == 3
    assert list(stream) == [], "all of it was read"


async def test_stream_that_was_read_to_its_end_stays_at_its_end(node: FakeNode) -> None:
    async with serve_node(node) as url:
        await ask(url, read_and_leave)


async def test_error_that_ends_a_stream_names_its_request(node: FakeNode) -> None:
    node.submitter.fail = JobError(JobErrorCode.FAILED, "a stage was lost")
    async with serve_node(node) as url:
        with pytest.raises(JobFailedError) as failed:
            await ask(url, lambda swarm: swarm.chat("Hi", model="tiny"))
    assert failed.value.request_id


async def test_leaving_a_stream_early_cancels_the_job(node: FakeNode) -> None:
    node.submitter.hang = True
    async with serve_node(node) as url:
        await ask(url, read_part)
        with trio.fail_after(5):
            await node.submitter.left.wait()


async def check_async(url: str) -> None:
    async with AsyncSwarm(url) as swarm:
        answer = await swarm.chat("Hi")
        assert (answer.text, answer.job.job_id) == ("Hello, wörld", JOB)
        assert (await swarm.complete("Hi")).text == "Hello, wörld"
        async with swarm.stream_chat("Hi") as stream:
            async for delta in stream:
                assert delta.text == "Hello"
                break
        del stream
        gc.collect()  # trio warns of generators that were left in the middle
        assert (await swarm.explain(prompt_tokens=9)).agreed == FASTER
        assert [model.name for model in await swarm.models()] == ["tiny", "broken"]
        assert [peer.peer_id for peer in await swarm.peers()] == [PEERS[1]]
        assert (await swarm.status()).peer_id == PEERS[0]
        with pytest.raises(NotFoundError):
            await swarm.get("/nowhere")


async def test_async_client_runs_under_trio(node: FakeNode) -> None:
    async with serve_node(node) as url:
        with trio.fail_after(10):
            await check_async(url)


async def test_async_client_runs_under_asyncio(node: FakeNode) -> None:
    async with serve_node(node) as url:
        with trio.fail_after(10):
            await trio.to_thread.run_sync(lambda: asyncio.run(check_async(url)))


async def test_async_client_cancels_a_job_that_its_task_leaves(node: FakeNode) -> None:
    node.submitter.hang = True
    async with serve_node(node) as url, AsyncSwarm(url) as swarm:
        with trio.move_on_after(5) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(swarm.chat, "Hi")
                await node.submitter.entered.wait()
                nursery.cancel_scope.cancel()
            await node.submitter.left.wait()
    assert not scope.cancelled_caught


async def test_documents_of_the_swarm(node: FakeNode) -> None:
    async with serve_node(node) as url:
        (peer,) = await ask(url, lambda swarm: swarm.peers())
        tiny, broken = await ask(url, lambda swarm: swarm.models())
        status = await ask(url, lambda swarm: swarm.status())
        explanation = await ask(url, lambda swarm: swarm.explain(model="tiny", concurrency=4, quality="any"))
    assert (peer.peer_id, peer.rtt_s, peer.spans[0].start) == (PEERS[1], 0.0012, 4)
    assert peer.banned is not None
    assert peer.banned.reason == "a bad signature"
    assert (tiny.model, tiny.complete, tiny.coverage[4]) == (MODEL, True, 2)
    assert broken.uncovered == ((1, 3),)
    assert (status.jobs.done, status.spans[0].end, status.uncovered[0].serve) == (2, 4, "broken:1-3")
    assert node.explained[0][1]["concurrency"] == 4
    assert (explanation.agreed, explanation.methods[0].predicted_speedup) == (FASTER, 1.8)
    assert explanation.route[0].compute_s is None, "nothing was run"
    node.confidence = None
    async with serve_node(node) as url:
        assert (await ask(url, lambda swarm: swarm.explain(model="tiny"))).confidence is None


async def test_retries_while_peers_are_full(node: FakeNode) -> None:
    node.submitter.refuse, node.submitter.refusals = FULL, 2
    async with serve_node(node) as url:
        answer = await ask(url, lambda swarm: swarm.complete("Hi", model="tiny"))
        assert (answer.text, len(node.submitter.requests)) == ("Hello, wörld", 3)


async def test_errors_say_what_failed(node: FakeNode) -> None:
    async with serve_node(node, api_key="secret") as url:
        with pytest.raises(AccessDeniedError, match="API key") as denied:
            await ask(url, lambda swarm: swarm.models())
        assert (denied.value.status, denied.value.code) == (401, "invalid_api_key")
        key = {"api_key": "secret", "retry_limit_s": 0.0}
        with pytest.raises(InvalidRequestError, match="temperature") as invalid:
            await ask(url, lambda swarm: swarm.chat("Hi", model="tiny", temperature=9), **key)
        assert invalid.value.param == "temperature"
        node.submitter.refuse = FULL
        with pytest.raises(UnavailableError, match="are full") as full:
            await ask(url, lambda swarm: swarm.chat("Hi", model="tiny"), **key)
        assert (full.value.code, full.value.retry_after_s) == ("peers_full", 1.0)
        node.submitter.refuse, node.submitter.fail = None, JobError(JobErrorCode.FAILED, "a stage was lost")
        with pytest.raises(JobFailedError, match="a stage was lost"):
            await ask(url, lambda swarm: swarm.chat("Hi", model="tiny"), **key)
    with pytest.raises(NodeUnreachableError, match="start one with `metaswarm node`"):
        await ask(url, lambda swarm: swarm.models())


async def test_silent_node_counts_as_dead(node: FakeNode) -> None:
    node.submitter.hang = True
    async with serve_node(node) as url:
        with pytest.raises(NodeUnreachableError, match="does not answer"):
            await ask(url, lambda swarm: swarm.chat("Hi", model="tiny"), silence_timeout_s=0.2)


async def test_key_and_url_from_the_environment(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve_node(node, api_key="secret") as url:
        monkeypatch.setenv("METASWARM_API", url.removeprefix("http://"))
        monkeypatch.setenv("METASWARM_API_KEY", "secret\n")  # as in a file that a secret is mounted from
        with Swarm() as swarm:
            assert len(await trio.to_thread.run_sync(swarm.models)) == 2
    with pytest.raises(ValueError, match="expected the URL"):
        Swarm("ftp://127.0.0.1")
    with Swarm("http://127.0.0.1:8642/v1/") as swarm:
        assert swarm.url == "http://127.0.0.1:8642", "as other clients of the OpenAI API want it"


@pytest.mark.parametrize("key", ["secret\nkey", "sécret"])
def test_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="METASWARM_API_KEY: expected visible ASCII") as refused:
        Swarm(api_key=key)
    assert key not in str(refused.value)


def test_headers_of_a_request_that_cannot_be_sent_are_not_shown() -> None:
    def refuse(_request: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError("Illegal header value b'Bearer secret'")

    transport = httpx.MockTransport(refuse)
    with Swarm("http://127.0.0.1", transport=transport) as swarm, pytest.raises(SwarmError) as refused:
        swarm.models()
    assert str(refused.value) == "the request to http://127.0.0.1 is not valid HTTP"


async def test_request_that_json_cannot_say_is_invalid() -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(500))
    with Swarm("http://127.0.0.1", transport=transport) as swarm, pytest.raises(InvalidRequestError, match="not valid"):
        swarm.chat("Hi", model="tiny", temperature=float("nan"))
    async with AsyncSwarm("http://127.0.0.1", transport=transport) as awaited:
        with pytest.raises(InvalidRequestError, match="not valid JSON"):
            await awaited.explain(model="tiny", budget=float("inf"))


@pytest.mark.parametrize("content", [b"<html>", b'{"models": 3}', b'{"models": [{"name": "tiny"}]}'])
def test_other_servers_are_told_apart(content: bytes) -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=content))
    with Swarm("http://127.0.0.1", transport=transport) as swarm, pytest.raises(UnexpectedAnswerError):
        swarm.models()


@pytest.mark.parametrize(("headers", "delays"), [({"Retry-After": "3"}, [3.0, 3.0, 3.0]), ({}, [0.5, 1.0, 2.0, 4.0])])
def test_retries_wait_as_told_and_within_the_limit(
    headers: dict[str, str], delays: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    transport = httpx.MockTransport(lambda _request: httpx.Response(503, headers=headers, text="busy"))
    swarm = Swarm("http://127.0.0.1", transport=transport, retry_limit_s=11.5)
    with swarm, pytest.raises(UnavailableError, match="503 Service Unavailable"):
        swarm.models()
    assert len(waited) == len(delays)
    assert all(delay <= each <= 1.25 * delay for delay, each in zip(delays, waited, strict=True))


def test_node_that_says_at_once_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    transport = httpx.MockTransport(lambda _request: httpx.Response(503, headers={"Retry-After": "0"}, text="busy"))
    with Swarm("http://127.0.0.1", transport=transport, retry_limit_s=1) as swarm, pytest.raises(UnavailableError):
        swarm.models()
    assert 5 <= len(waited) <= 10


async def test_embeddings_come_in_the_order_of_their_texts() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert b'"input":["a","b"]' in request.read()
        return httpx.Response(200, json={"data": [{"embedding": [1, 0.5]}, {"embedding": [0.0, 1.0]}]})

    with Swarm("http://127.0.0.1", transport=httpx.MockTransport(answer)) as swarm:
        assert swarm.embed(["a", "b"], model="tiny") == ((1.0, 0.5), (0.0, 1.0))
    async with AsyncSwarm("http://127.0.0.1", transport=httpx.MockTransport(answer)) as awaited:
        assert await awaited.embed(["a", "b"], model="tiny") == ((1.0, 0.5), (0.0, 1.0))
