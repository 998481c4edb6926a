"""The unmodified clients of the protocols that are spoken here, against a node without a swarm."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import anthropic
import ollama
import openai
import pytest
import trio

from node.coordinator.submission import ChatFormat, JobError, JobErrorCode, ToolFormat
from tests.unit.api.fakes import MODEL, FakeNode, serve_node

T = TypeVar("T")
THINKING = ChatFormat(tools=ToolFormat.HERMES, reasons=True)
ARGUMENTS = {"city": "Köln"}
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS})
SAYS_ALL = ("<think>hm", "</think>", "Look: ", f"<tool_call>{CALL}</tool_call>")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def url(node: FakeNode) -> AsyncIterator[str]:
    async with serve_node(node) as url:
        yield url


async def ask(work: Callable[[], T]) -> T:
    """Run a client that blocks, in a thread."""
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(work)


@pytest.fixture
def of_openai() -> Iterator[Callable[[str], Any]]:
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0))


@pytest.fixture
def of_anthropic() -> Iterator[Callable[[str], Any]]:
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0))


@pytest.fixture
def of_ollama() -> Iterator[Callable[[str], ollama.Client]]:
    with ExitStack() as stack:

        def client(url: str) -> ollama.Client:
            client = ollama.Client(host=url)
            stack.callback(client._client.close)
            return client

        yield client


Client = Callable[[str], Any]
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA}
TOOL: Any = {"type": "function", "function": FUNCTION}


# OpenAI


async def test_openai_chat(node: FakeNode, url: str, of_openai: Client) -> None:
    answer = await ask(lambda: of_openai(url).chat.completions.create(model="tiny", messages=USER, n=2, seed=1))
    assert [choice.message.content for choice in answer.choices] == ["Hello, wörld"] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)
    assert not (answer.model_extra or {}).get("metaswarm")


async def test_openai_chat_streams_usage_and_log_probabilities(node: FakeNode, url: str, of_openai: Client) -> None:
    def work() -> list[Any]:
        return list(
            of_openai(url).chat.completions.create(
                model="tiny",
                messages=USER,
                stream=True,
                stream_options={"include_usage": True},
                logprobs=True,
                top_logprobs=2,
                extra_headers={"X-Metaswarm": "1"},
            )
        )

    *chunks, last = await ask(work)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello, wörld"
    logprobs = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in logprobs] == ["Hello", ",", " wörld"]
    assert [len(token.top_logprobs) for token in logprobs] == [2, 2, 2]
    assert last.usage.total_tokens == 8
    assert last.model_extra["metaswarm"]["replays"] == 1


async def test_openai_tools_and_reasoning(node: FakeNode, url: str, of_openai: Client) -> None:
    node.submitter.words, node.submitter.chat_format = SAYS_ALL, THINKING
    call = dict(model="tiny", messages=USER, tools=[TOOL])  # noqa: C408 - as the call is written
    answer = await ask(lambda: of_openai(url).chat.completions.create(**call))
    (choice,) = answer.choices
    (tool_call,) = choice.message.tool_calls
    assert (choice.message.content, choice.message.reasoning_content) == ("Look:", "hm")
    assert (tool_call.function.name, json.loads(tool_call.function.arguments)) == ("weather", ARGUMENTS)
    assert choice.finish_reason == "tool_calls"
    assert node.submitter.requests[0].tools == (TOOL,)

    def stream() -> Any:
        with of_openai(url).chat.completions.stream(**call) as events:
            for _ in events:
                pass
            return events.get_final_completion()

    (streamed,) = (await ask(stream)).choices
    assert streamed.message.tool_calls[0].function.arguments == tool_call.function.arguments
    assert (streamed.message.content, streamed.finish_reason) == ("Look:", "tool_calls")


async def test_openai_completions_and_models(node: FakeNode, url: str, of_openai: Client) -> None:
    client = of_openai(url)
    answer = await ask(lambda: client.completions.create(model="tiny", prompt=["a", "b"], echo=True))
    assert [choice.text for choice in answer.choices] == ["aHello, wörld", "bHello, wörld"]
    answer = await ask(lambda: client.completions.create(model="tiny", prompt="a", logprobs=1))
    assert answer.choices[0].logprobs.tokens == ["Hello", ",", " wörld"]
    assert [model.id for model in await ask(lambda: list(client.models.list()))] == ["tiny"]
    assert (await ask(lambda: client.models.retrieve("tiny"))).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await ask(lambda: client.models.retrieve("other"))


async def test_openai_errors(node: FakeNode, url: str, of_openai: Client) -> None:
    client = of_openai(url)
    node.submitter.refuse = JobError(JobErrorCode.FULL, "No room.")
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(lambda: client.chat.completions.create(model="tiny", messages=USER))
    assert (caught.value.status_code, caught.value.code, caught.value.response.headers["retry-after"]) == (
        503, "peers_full", "2"
    )  # fmt: skip
    assert str(caught.value.request_id).startswith("req_")
    with pytest.raises(openai.BadRequestError, match="temprature"):
        await ask(lambda: client.chat.completions.create(model="tiny", messages=USER, extra_body={"temprature": 1}))


async def test_openai_responses(node: FakeNode, url: str, of_openai: Client) -> None:
    node.submitter.words, node.submitter.chat_format = SAYS_ALL, THINKING
    tool = {"type": "function", **FUNCTION}
    call: dict[str, Any] = {"model": "tiny", "input": "Hi", "instructions": "Be brief.", "tools": [tool]}
    answer = await ask(lambda: of_openai(url).responses.create(**call))
    assert (answer.status, answer.output_text) == ("completed", "Look:")
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert (answer.output[2].name, json.loads(answer.output[2].arguments)) == ("weather", ARGUMENTS)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 4)
    assert [message.role for message in node.submitter.requests[0].messages or ()] == ["system", "user"]

    def stream() -> Any:
        kinds = []
        with of_openai(url).responses.stream(**call) as events:
            for event in events:
                kinds.append(event.type)
            return kinds, events.get_final_response()

    kinds, final = await ask(stream)
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert {"response.reasoning_text.delta", "response.output_text.delta"} <= set(kinds)
    assert {"response.function_call_arguments.done", "response.output_item.done"} <= set(kinds)
    assert kinds[-1] == "response.completed"
    assert final.output_text == answer.output_text
    assert [item.id for item in final.output] == [item.id for item in answer.output]


async def test_openai_responses_goes_on_after_a_tool(node: FakeNode, url: str, of_openai: Client) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": json.dumps(ARGUMENTS)},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    await ask(lambda: of_openai(url).responses.create(model="tiny", input=items))
    turns = [message.for_template() for message in node.submitter.requests[0].messages or ()]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"]
    assert turns[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert (turns[2]["tool_call_id"], turns[2]["content"]) == ("c1", "rain")


# Anthropic


async def test_anthropic_messages(node: FakeNode, url: str, of_anthropic: Client) -> None:
    create = of_anthropic(url).messages.create
    extra = {"top_k": 5}
    answer = await ask(lambda: create(model="tiny", max_tokens=9, messages=USER, system="Be brief.", extra_body=extra))
    assert [(block.type, block.text) for block in answer.content] == [("text", "Hello, wörld")]
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == ("end_turn", 3, 2)
    (job,) = node.submitter.requests
    assert [message.role for message in job.messages or ()] == ["system", "user"]
    assert (job.max_tokens, job.top_k, job.temperature) == (9, 5, 1.0)


async def test_anthropic_streams_blocks(node: FakeNode, url: str, of_anthropic: Client) -> None:
    node.submitter.words, node.submitter.chat_format = SAYS_ALL, THINKING
    tool = {"name": "weather", "description": "d", "input_schema": SCHEMA}

    def stream() -> Any:
        body: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": USER, "tools": [tool]}
        with of_anthropic(url).messages.stream(**body, thinking=thinks) as events:
            return [event.type for event in events], events.get_final_message()

    thinks: Any = {"type": "disabled"}
    _, message = await ask(stream)
    assert [block.type for block in message.content] == ["text", "tool_use"], "reasoning was not asked for"
    assert node.submitter.requests.pop().template_options == {"enable_thinking": False}
    thinks = {"type": "enabled", "budget_tokens": 1024}
    kinds, message = await ask(stream)
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    thinking, text, call = message.content
    assert (thinking.thinking, text.text, call.name, call.input) == ("hm", "Look:", "weather", ARGUMENTS)
    assert (message.stop_reason, message.usage.output_tokens) == ("tool_use", 4)
    assert node.submitter.requests[0].tools == (TOOL,)


async def test_anthropic_goes_on_after_a_tool(node: FakeNode, url: str, of_anthropic: Client) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    await ask(lambda: of_anthropic(url).messages.create(model="tiny", max_tokens=9, messages=turns))
    seen = [message.for_template() for message in node.submitter.requests[0].messages or ()]
    assert [turn["role"] for turn in seen] == ["user", "assistant", "tool", "user"]
    assert (seen[2]["tool_call_id"], seen[2]["content"], seen[3]["content"]) == ("c1", "rain", "And now?")


async def test_anthropic_errors(node: FakeNode, url: str, of_anthropic: Client) -> None:
    create = of_anthropic(url).messages.create
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await ask(lambda: create(model="tiny", max_tokens=0, messages=USER))
    node.submitter.refuse = JobError(JobErrorCode.MODEL_NOT_FOUND, "No such model.")
    with pytest.raises(anthropic.NotFoundError, match="No such model"):
        await ask(lambda: create(model="tiny", max_tokens=1, messages=USER))


# Ollama


async def test_ollama_chat(node: FakeNode, url: str, of_ollama: Client) -> None:
    client = of_ollama(url)
    options = {"temperature": 0, "num_predict": 7, "stop": ["x"] * 9, "seed": 3, "num_ctx": 4096, "repeat_last_n": 64}
    answer = await ask(lambda: client.chat(model="tiny:latest", messages=USER, options=options, keep_alive="5m"))
    assert (answer.message.content, answer.done, answer.done_reason) == ("Hello, wörld", True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count, answer.total_duration) == (5, 3, 500_000_000)
    (job,) = node.submitter.requests
    assert (job.model, job.temperature, job.max_tokens, job.stop, job.seed) == ("tiny", 0.0, 7, ("x",) * 9, 3)


async def test_ollama_streams_tools_and_thinking(node: FakeNode, url: str, of_ollama: Client) -> None:
    node.submitter.words, node.submitter.chat_format = SAYS_ALL, THINKING
    client = of_ollama(url)

    def stream() -> list[ollama.ChatResponse]:
        parts: Iterator[ollama.ChatResponse] = client.chat(
            model="tiny", messages=USER, tools=[TOOL], think=True, stream=True
        )
        return list(parts)

    parts = await ask(stream)
    assert "".join(part.message.content or "" for part in parts) == "Look:"
    assert "".join(part.message.thinking or "" for part in parts) == "hm"
    (call,) = (call for part in parts for call in part.message.tool_calls or ())
    assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert node.submitter.requests[0].template_options == {"enable_thinking": True}


async def test_ollama_generates(node: FakeNode, url: str, of_ollama: Client) -> None:
    client = of_ollama(url)
    assert (await ask(lambda: client.generate(model="tiny", prompt="a", system="b"))).response == "Hello, wörld"
    assert (await ask(lambda: client.generate(model="tiny", prompt="a", raw=True))).response == "Hello, wörld"
    chat, raw = node.submitter.requests
    assert [message.content for message in chat.messages or ()] == ["b", "a"]
    assert (raw.prompt, raw.messages) == ("a", None)
    streamed = await ask(lambda: list(client.generate(model="tiny", prompt="a", stream=True)))
    assert "".join(part.response or "" for part in streamed) == "Hello, wörld"
    loaded = await ask(lambda: client.generate(model="tiny"))
    assert (loaded.done, loaded.done_reason) == (True, "load")


async def test_ollama_models(node: FakeNode, url: str, of_ollama: Client) -> None:
    client = of_ollama(url)
    (model,) = (await ask(client.list)).models
    assert (model.model, model.digest) == ("tiny", MODEL)
    shown = await ask(lambda: client.show("tiny"))
    assert (shown.modelinfo or {})["metaswarm.block_count"] == 8
    with pytest.raises(ollama.ResponseError) as caught:
        await ask(lambda: client.show("other"))
    assert caught.value.status_code == 404


async def test_ollama_errors(node: FakeNode, url: str, of_ollama: Client) -> None:
    client = of_ollama(url)
    with pytest.raises(ollama.ResponseError, match="mirostat"):
        await ask(lambda: client.chat(model="tiny", messages=USER, options={"mirostat": 2}))
    node.submitter.fail = JobError(JobErrorCode.FAILED, "A stage is lost.")
    with pytest.raises(ollama.ResponseError, match="A stage is lost"):
        await ask(lambda: list(client.chat(model="tiny", messages=USER, stream=True)))
