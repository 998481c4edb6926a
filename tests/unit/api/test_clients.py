"""The unmodified clients of the protocols that are spoken here, against a node without a swarm."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC
from functools import partial
from typing import Any, TypeVar, cast

import anthropic
import httpx
import ollama
import openai
import pydantic
import pytest
import trio

from node.api.access import Access
from node.config import ApiKey, hash_api_key
from node.coordinator.chat import ChatFormat, ToolFormat
from node.coordinator.submission import JobError, JobErrorCode
from protocol.limits import MAX_POSITIONS
from tests.unit.api.fakes import MODEL, FakeNode, serve_node

T = TypeVar("T")
THINKING = ChatFormat(tools=ToolFormat.HERMES, reasons=True)
ARGUMENTS = {"city": "Köln"}
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS})
SAYS_ALL = ("<think>hm", "</think>", "Look: ", f"<tool_call>{CALL}</tool_call>")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
USER: list[Any] = [{"role": "user", "content": "Hi"}]


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
UNFINISHED = [*USER, {"role": "assistant", "content": "Once upon"}]
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


async def test_openai_streams_usage_in_every_chunk(node: FakeNode, url: str, of_openai: Client) -> None:
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    call: dict[str, Any] = {"model": "tiny", "messages": USER, "stream": True, "stream_options": wanted}
    chunks = await ask(lambda: list(of_openai(url).chat.completions.create(**call)))
    assert [chunk.usage.completion_tokens for chunk in chunks] == [0, 1, 2, 3, 3, 3]
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {5}
    del wanted["continuous_usage_stats"]
    chunks = await ask(lambda: list(of_openai(url).chat.completions.create(**call)))
    assert [chunk.usage is not None for chunk in chunks] == [False] * 5 + [True]


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


async def test_openai_streams_tool_calls_as_deltas(node: FakeNode, url: str, of_openai: Client) -> None:
    calls = [json.dumps({"name": "weather", "arguments": {"city": city}}) for city in ("Köln", "Łódź")]
    node.submitter.words = tuple(f"<tool_call>{call}</tool_call>" for call in calls)
    node.submitter.chat_format = THINKING
    call = dict(model="tiny", messages=USER, tools=[TOOL])  # noqa: C408 - as the call is written

    def chunks() -> list[Any]:
        return list(of_openai(url).chat.completions.create(**call, stream=True))

    first, *deltas, last = (chunk.choices[0] for chunk in await ask(chunks))
    assert (first.delta.role, first.delta.tool_calls) == ("assistant", None)
    found = [each for delta in deltas for each in delta.delta.tool_calls or ()]
    assert [each.index for each in found] == [0, 1]
    assert len({each.id for each in found}) == 2
    assert [(each.type, each.function.name) for each in found] == [("function", "weather")] * 2
    assert [json.loads(each.function.arguments)["city"] for each in found] == ["Köln", "Łódź"]
    assert (last.finish_reason, last.delta.tool_calls) == ("tool_calls", None)

    def events() -> list[Any]:
        with of_openai(url).chat.completions.stream(**call) as stream:
            return list(stream)

    done = [event for event in await ask(events) if event.type == "tool_calls.function.arguments.done"]
    assert [(event.index, event.name, json.loads(event.arguments)["city"]) for event in done] == [
        (0, "weather", "Köln"), (1, "weather", "Łódź")
    ]  # fmt: skip


async def test_openai_tool_choice(node: FakeNode, url: str, of_openai: Client) -> None:
    node.submitter.words = (CALL,)
    create = of_openai(url).chat.completions.create
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = await ask(partial(create, model="tiny", messages=USER, tools=[TOOL], tool_choice=choice))
        [call] = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == ARGUMENTS
        assert json.loads(node.submitter.requests[-1].json_schema)["properties"]["name"] == {"const": "weather"}
    node.submitter.words = ("No.",)
    answer = await ask(lambda: create(model="tiny", messages=USER, tools=[TOOL], tool_choice="none"))
    assert (answer.choices[0].message.content, node.submitter.requests[-1].tools) == ("No.", ())


class Place(pydantic.BaseModel):
    city: str


async def test_openai_structured_texts(node: FakeNode, url: str, of_openai: Client) -> None:
    node.submitter.words = ('{"city": ', '"Köln"}')
    client = of_openai(url)
    parsed = await ask(lambda: client.chat.completions.parse(model="tiny", messages=USER, response_format=Place))
    assert parsed.choices[0].message.parsed == Place(city="Köln")
    assert json.loads(node.submitter.requests[-1].json_schema)["required"] == ["city"]
    response = await ask(lambda: client.responses.parse(model="tiny", input="Hi", text_format=Place))
    assert response.output_parsed == Place(city="Köln")
    form = {"type": "json_object"}
    await ask(lambda: client.chat.completions.create(model="tiny", messages=USER, response_format=form))
    assert json.loads(node.submitter.requests[-1].json_schema) == {"type": "object"}


async def test_openai_continues_a_turn_on_request(node: FakeNode, url: str, of_openai: Client) -> None:
    create = of_openai(url).chat.completions.create
    continues = {"continue_final_message": True, "add_generation_prompt": False}
    await ask(lambda: create(model="tiny", messages=UNFINISHED, extra_body=continues))
    await ask(lambda: create(model="tiny", messages=UNFINISHED))
    assert [job.continue_final_message for job in node.submitter.requests] == [True, False]


async def test_openai_sampling_and_extensions(node: FakeNode, url: str, of_openai: Client) -> None:
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["x"], "max_completion_tokens": 9,
        "frequency_penalty": 0.1, "presence_penalty": 0.2, "logit_bias": {"5": -100},
    }  # fmt: skip
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "metaswarm": {"method": "baseline"}}
    create = of_openai(url).chat.completions.create
    answer = await ask(lambda: create(model="tiny", messages=USER, **sampling, extra_body=extra))
    assert (answer.model_extra or {})["metaswarm"]["route"][1]["start"] == 4
    [job] = node.submitter.requests
    assert (job.temperature, job.top_p, job.seed, job.stop, job.max_tokens) == (0.5, 0.9, 7, ("x",), 9)
    assert (job.top_k, job.min_p, job.repetition_penalty, job.method) == (5, 0.1, 1.1, "baseline")
    assert (job.frequency_penalty, job.presence_penalty, job.logit_bias) == (0.1, 0.2, ((5, -100.0),))


async def test_openai_embeddings(node: FakeNode, url: str, of_openai: Client) -> None:
    create = of_openai(url).embeddings.create
    answer = await ask(lambda: create(model="tiny", input=["a" * 12, "b"]))  # the package asks for base64
    assert answer.data[0].embedding == pytest.approx([3 / 13, 4 / 13, 0, 12 / 13])
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (10, 10)
    as_floats = await ask(lambda: create(model="tiny", input="a" * 12, encoding_format="float"))
    assert as_floats.data[0].embedding == pytest.approx(answer.data[0].embedding)
    with pytest.raises(openai.BadRequestError, match="dimensions is not supported"):
        await ask(lambda: create(model="tiny", input="a", dimensions=2))


async def test_openai_asynchronous_client(node: FakeNode, url: str) -> None:
    async def stream() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused") as client:
            chunks: Any = await client.chat.completions.create(model="tiny", messages=USER, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert await ask(lambda: asyncio.run(stream())) == "Hello, wörld"


async def test_openai_keys_and_limits(node: FakeNode) -> None:
    key = ApiKey(name="ci", sha256=hash_api_key("right"), requests_per_minute=1)
    async with serve_node(node, access=Access(keys=(key,))) as url:

        def create(key: str, retries: int) -> Any:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries) as client:
                return client.chat.completions.create(model="tiny", messages=USER)

        with pytest.raises(openai.AuthenticationError):
            await ask(lambda: create("wrong", 0))
        await ask(lambda: create("right", 0))
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(lambda: create("right", 0))
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) > 1


async def test_openai_retries_while_peers_are_full(node: FakeNode, url: str) -> None:
    node.submitter.refuse, node.submitter.refusals = JobError(JobErrorCode.FULL, "No room.", retry_after_s=0.01), 1

    def create() -> Any:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=1) as client:
            return client.chat.completions.create(model="tiny", messages=USER)

    assert (await ask(create)).choices[0].message.content == "Hello, wörld"
    assert len(node.submitter.requests) == 2


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


async def test_openai_scores_prompts(node: FakeNode, url: str, of_openai: Client) -> None:
    client = of_openai(url)
    job: dict[str, Any] = {"model": "tiny", "prompt": ["a b", "c d e"], "echo": True, "logprobs": 1}
    answer = await ask(lambda: client.completions.create(**job, max_tokens=0))
    found = [choice.logprobs.token_logprobs for choice in answer.choices if choice.logprobs]
    assert found == [[None, -0.75], [None, -0.75, -0.75]]
    assert [choice.text for choice in answer.choices] == ["a b", "c d e"]
    node.submitter.words = ("!",)
    answer = await ask(lambda: client.completions.create(**job, max_tokens=1, temperature=0, seed=1))
    found = [choice.logprobs.token_logprobs[:-1] for choice in answer.choices if choice.logprobs]
    assert found == [[None, -0.75], [None, -0.75, -0.75]], "as lm-evaluation-harness reads it"


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
    answer = await ask(lambda: of_openai(url).responses.create(**call, reasoning={"effort": "low"}))
    assert (answer.status, answer.output_text, answer.reasoning.effort) == ("completed", "Look:", "low")
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


async def test_openai_responses_calls_functions_of_a_namespace(node: FakeNode, url: str, of_openai: Client) -> None:
    """The model, whose template knows no namespaces, has one name for a function of one."""
    wanted = json.dumps({"name": "sky__weather", "arguments": ARGUMENTS})
    node.submitter.words, node.submitter.chat_format = (f"<tool_call>{wanted}</tool_call>",), THINKING
    function = {"type": "function", **FUNCTION}
    tools = [function, {"type": "namespace", "name": "sky", "description": "Of the sky.", "tools": [function]}]
    call: dict[str, Any] = {"model": "tiny", "tools": tools}
    answer = await ask(lambda: of_openai(url).responses.create(**call, input="Hi"))
    (made,) = answer.output
    assert (made.namespace, made.name, json.loads(made.arguments)) == ("sky", "weather", ARGUMENTS)

    def stream() -> Any:
        with of_openai(url).responses.stream(**call, input="Hi") as events:
            return events.get_final_response()

    assert [(each.namespace, each.name) for each in (await ask(stream)).output] == [("sky", "weather")]
    items = [made.model_dump(), {"type": "function_call_output", "call_id": made.call_id, "output": "rain"}]
    await ask(lambda: of_openai(url).responses.create(**call, input=items))
    job = node.submitter.requests[-1]
    assert [tool["function"]["name"] for tool in job.tools] == ["weather", "sky__weather"]
    assert [each.name for turn in job.messages or () for each in turn.tool_calls] == ["sky__weather"]
    taken = [*tools, {**function, "name": "sky__weather"}]
    with pytest.raises(openai.BadRequestError, match="two functions that the model would call sky__weather"):
        await ask(lambda: of_openai(url).responses.create(model="tiny", tools=taken, input="Hi"))


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


async def test_anthropic_continues_a_turn(node: FakeNode, url: str, of_anthropic: Client) -> None:
    create = of_anthropic(url).messages.create
    answer = await ask(lambda: create(model="tiny", max_tokens=9, messages=UNFINISHED))
    assert answer.content[0].text == "Hello, wörld", "without what was there"
    assert node.submitter.requests[0].continue_final_message


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


async def test_anthropic_tool_choice_thinking_and_structured_texts(
    node: FakeNode, url: str, of_anthropic: Client
) -> None:
    create = of_anthropic(url).messages.create
    call: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": USER}
    node.submitter.words = (CALL,)
    tool = {"name": "weather", "input_schema": SCHEMA}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        answer = await ask(partial(create, **call, tools=[tool], tool_choice=choice))
        assert answer.content[0].input == ARGUMENTS
    node.submitter.words = ('{"city": "Köln"}',)
    form = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
    answer = await ask(lambda: create(**call, output_config=form, thinking={"type": "disabled"}, stop_sequences=["x"]))
    assert json.loads(answer.content[0].text) == {"city": "Köln"}
    job = node.submitter.requests[-1]
    assert (json.loads(job.json_schema), job.stop) == (SCHEMA, ("x",))
    assert job.template_options == {"enable_thinking": False, "reasoning_effort": "low"}


async def test_anthropic_counts_tokens(node: FakeNode, url: str, of_anthropic: Client) -> None:
    count = of_anthropic(url).messages.count_tokens
    tool = {"name": "weather", "input_schema": SCHEMA}
    answer = await ask(lambda: count(model="tiny", messages=USER, system="Be very brief.", tools=[tool]))
    (job,) = node.submitter.requests
    assert [message.role for message in job.messages or ()] == ["system", "user"]
    assert [each["function"]["name"] for each in job.tools] == ["weather"]
    assert answer.input_tokens == sum(len(message.content.split()) for message in job.messages or ())
    node.submitter.refuse = JobError(JobErrorCode.MODEL_NOT_FOUND, "No such model.")
    with pytest.raises(anthropic.NotFoundError, match="No such model"):
        await ask(lambda: count(model="tiny", messages=USER))


async def test_anthropic_models(node: FakeNode, url: str, of_anthropic: Client) -> None:
    client = of_anthropic(url)
    (model,) = await ask(lambda: list(client.models.list()))
    assert (model.id, model.type, model.display_name, model.created_at.tzinfo) == ("tiny", "model", "tiny", UTC)
    page = await ask(client.models.list)
    assert (page.has_more, page.first_id, page.last_id) == (False, "tiny", "tiny")
    assert await ask(lambda: client.models.retrieve("tiny")) == model
    with pytest.raises(anthropic.NotFoundError, match="no complete model") as caught:
        await ask(lambda: client.models.retrieve("other"))
    assert cast("Any", caught.value.body)["error"]["type"] == "not_found_error"


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


async def test_ollama_continues_a_turn(node: FakeNode, url: str, of_ollama: Client) -> None:
    answer = await ask(lambda: of_ollama(url).chat(model="tiny", messages=UNFINISHED))
    assert answer.message.content == "Hello, wörld"
    assert node.submitter.requests[0].continue_final_message


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
    for keep_alive in (0, "0s"):
        unloaded = await ask(partial(client.generate, model="tiny", keep_alive=keep_alive))
        assert (unloaded.done, unloaded.done_reason) == (True, "unload")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"options": {"num_predict": -1}}, None),
        ({"options": {"num_predict": 0}}, None),
        ({"options": {"num_predict": -2}}, None),
        ({"num_predict": -1}, None),
        ({"num_predict": 1000}, 1000),
        ({"num_predict": 1000, "options": {"num_predict": 7}}, 7),
        ({"num_predict": 1000, "options": {"num_predict": -1}}, None),
        ({"options": {"num_predict": 1 << 40}}, MAX_POSITIONS),
    ],
)
async def test_ollama_limits(node: FakeNode, url: str, limits: dict[str, Any], expected: int | None) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/api/chat", json={"model": "tiny", "messages": USER, **limits})).status_code == 200
    assert node.submitter.requests[0].max_tokens == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repeat_penalty": 1.5}, (1.5, 0.0, 64)),
        ({"repeat_penalty": 1.5, "repeat_last_n": 7, "presence_penalty": 1}, (1.5, 1.0, 7)),
        ({"frequency_penalty": 0.5, "presence_penalty": 0.5, "repeat_last_n": -1}, (1.0, 0.5, 0)),
        ({"repeat_penalty": 1.5, "repeat_last_n": 0}, (1.0, 0.0, 0)),
        ({"repeat_last_n": 64}, (1.0, 0.0, 0)),
    ],
)
async def test_ollama_penalties_cover_a_window(
    node: FakeNode, url: str, of_ollama: Client, options: dict[str, float], expected: tuple[float, float, int]
) -> None:
    await ask(lambda: of_ollama(url).chat(model="tiny", messages=USER, options=options))
    (job,) = node.submitter.requests
    assert (job.repetition_penalty, job.presence_penalty, job.penalty_window) == expected


async def test_ollama_structured_texts_and_log_probabilities(node: FakeNode, url: str, of_ollama: Client) -> None:
    client = of_ollama(url)
    answer = await ask(lambda: client.chat(model="tiny", messages=USER, format=SCHEMA, logprobs=True, top_logprobs=2))
    assert json.loads(node.submitter.requests[0].json_schema) == SCHEMA
    assert [token.token for token in answer.logprobs] == ["Hello", ",", " wörld"]
    await ask(lambda: client.generate(model="tiny", prompt="a", format="json"))
    assert json.loads(node.submitter.requests[1].json_schema) == {"type": "object"}


async def test_ollama_embeddings(node: FakeNode, url: str, of_ollama: Client) -> None:
    client = of_ollama(url)
    answer = await ask(lambda: client.embed(model="tiny", input=["a" * 12, "b"], truncate=False))
    assert answer.embeddings[0] == pytest.approx([3 / 13, 4 / 13, 0, 12 / 13])
    assert answer.prompt_eval_count == 10
    assert not node.submitter.requests[0].truncate
    older = await ask(lambda: client.embeddings(model="tiny", prompt="a" * 12))
    assert older.embedding == pytest.approx([3, 4, 0, 12])


async def test_ollama_models(node: FakeNode, url: str, of_ollama: Client) -> None:
    client = of_ollama(url)
    (model,) = (await ask(client.list)).models
    assert (model.model, model.digest, model.size) == ("tiny", MODEL, 90 << 20)
    assert model.details.model_dump(include={"format", "family", "quantization_level"}) == {
        "format": "gguf", "family": "llama", "quantization_level": "Q4_K"
    }  # fmt: skip
    (running,) = (await ask(client.ps)).models
    assert (running.model, running.digest, running.context_length) == ("tiny", MODEL, 8192)
    assert (running.size, running.size_vram) == (1 << 20, 0)
    shown = await ask(lambda: client.show("tiny"))
    facts = shown.modelinfo or {}
    assert (facts["metaswarm.block_count"], facts["llama.block_count"], facts["llama.context_length"]) == (8, 8, 8192)
    assert shown.capabilities == ["completion", "embedding"]
    node.submitter.chat_format, node.submitter.chat_template = THINKING, "{% for tool in tools %}…"
    shown = await ask(lambda: client.show("tiny"))
    assert shown.capabilities == ["completion", "embedding", "tools", "thinking"]
    assert shown.template == node.submitter.chat_template, "LiteLLM looks for tools there"
    node.submitter.refuse = JobError(JobErrorCode.FAILED, "Nobody has the tokenizer.")
    assert (await ask(lambda: client.show("tiny"))).capabilities == ["completion", "embedding"]
    with pytest.raises(ollama.ResponseError) as caught:
        await ask(lambda: client.show("other"))
    assert caught.value.status_code == 404


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/responses", "input"),
        ("/v1/messages", "messages"),
        ("/api/chat", "messages"),
    ],
)
async def test_streamed_lines_are_lines_for_every_reader(node: FakeNode, url: str, path: str, field: str) -> None:
    """`iter_lines` of httpx, by which the Ollama client reads, ends lines at Unicode's line ends, too."""
    node.submitter.words = ("one\u2028two", "\u2029three\x85four")
    body: dict[str, Any] = {"model": "tiny", "stream": True} | ({"max_tokens": 9} if path == "/v1/messages" else {})
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(path, json={**body, field: USER if field == "messages" else "Hi"})
    assert answer.status_code == 200, answer.text
    assert "one\\u2028two" in answer.text
    assert answer.text.splitlines() == answer.text.removesuffix("\n").split("\n")


async def test_ollama_errors(node: FakeNode, url: str, of_ollama: Client) -> None:
    client = of_ollama(url)
    with pytest.raises(ollama.ResponseError, match="mirostat"):
        await ask(lambda: client.chat(model="tiny", messages=USER, options={"mirostat": 2}))
    node.submitter.fail = JobError(JobErrorCode.FAILED, "A stage is lost.")
    with pytest.raises(ollama.ResponseError, match="A stage is lost"):
        await ask(lambda: list(client.chat(model="tiny", messages=USER, stream=True)))
