import json
from typing import Any

import llguidance
import numpy as np
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel, Field
from starlette.datastructures import Headers

from node.api.anthropic.requests import parse_message_request
from node.api.errors import ApiError
from node.api.generation import MAX_CHOICES, Generation
from node.api.ollama.requests import parse_chat as parse_ollama_chat
from node.api.openai import requests
from node.api.openai.requests import IGNORED
from node.api.openai.requests import parse_chat_request as parse_chat
from node.api.openai.responses import parse_response_request
from node.api.output_parser import ParserRules
from node.api.shared_fields import MAX_SEED, MIN_SEED
from node.coordinator.chat import ChatMessage
from node.coordinator.submission import JobRequest
from node.engine.sampling import draw
from node.models.json_schema import make_matcher
from protocol.limits import MAX_LOGIT_BIASES, MAX_POSITIONS, MAX_STOP_TOKENS, MAX_VOCABULARY
from protocol.measurements import TaskKind
from protocol.messages import Sampling


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "Hi", **fields}).encode()


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
DEEP: dict[str, Any] = {}
for _ in range(100):
    DEEP = {"a": DEEP}
SCHEMA = "response_format.json_schema.schema"
NAMELESS = "messages[0].tool_calls[0].function"


def generation_of_chat(body: bytes) -> Generation:
    return requests.parse_chat_request(body, Headers())[0]


def generation_of_completion(body: bytes) -> Generation:
    return requests.parse_completion_request(body, Headers())[0]


def parse_chat_request(body: bytes) -> JobRequest:
    (job,) = generation_of_chat(body).jobs
    return job


def parse_completion_request(body: bytes) -> JobRequest:
    (job,) = generation_of_completion(body).jobs
    return job


def test_defaults_equal_openai() -> None:
    job = parse_chat_request(chat())
    assert (job.temperature, job.top_p, job.seed, job.max_tokens, job.stop) == (1.0, 1.0, None, None, ())
    assert parse_completion_request(completion()).max_tokens == 16


def test_temperature_zero_is_not_default() -> None:
    assert parse_chat_request(chat(temperature=0)).temperature == 0.0


def test_null_equals_absent() -> None:
    names = (
        "temperature",
        "top_p",
        "seed",
        "stop",
        "max_tokens",
        "n",
        "tools",
        "stream",
        "stream_options",
        "metaswarm",
    )
    assert parse_chat_request(chat(**dict.fromkeys(names))) == parse_chat_request(chat())


@pytest.mark.parametrize("name", sorted(IGNORED))
@pytest.mark.parametrize("value", ["x", True, {"a": "b"}])
def test_ignored_fields_do_not_change_job(name: str, value: Any) -> None:
    assert parse_chat_request(chat(**{name: value})) == parse_chat_request(chat())
    assert parse_completion_request(completion(**{name: value})) == parse_completion_request(completion())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("max_token", "max_tokens"),
        ("repetition_penality", "repetition_penalty"),
        ("stop_tokens_ids", "stop_token_ids"),
        ("Temperature", "temperature"),
        ("mirostat_eta", None),
        ("x" * 10_000, None),
    ],
)
def test_unknown_field_suggests_closest_name(name: str, meant: str | None) -> None:
    for parse, make in ((parse_chat_request, chat), (parse_completion_request, completion)):
        with pytest.raises(ApiError) as caught:
            parse(make(**{name: 1}))
        suggestion = f"; did you mean {meant!r}?" if meant else ""
        assert caught.value.message == f"unknown field {name[:64]!r}{suggestion}"
        assert (caught.value.status, caught.value.param) == (400, name[:256])


def tool(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize("value", ["\ud800", 10**20, -(10**20), {"\ud800": 1}, [{"x": "\udfff"}]], ids=ascii)
def test_refuses_what_no_other_process_could_be_told(value: Any) -> None:
    call = {"function": {"name": "f", "arguments": {"a": value}}}
    schema = {"type": "json_schema", "json_schema": {"schema": {"const": value}}}
    bodies: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"a": value}},
        {"response_format": schema},
        {"tools": [tool(maximum=value)]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": {"description": value}}}}]},
        {"messages": [{"role": "assistant", "tool_calls": [call]}]},
    ]
    for fields in bodies:
        with pytest.raises(ApiError) as caught:
            parse_chat_request(chat(**fields))
        assert caught.value.status == 400
        assert caught.value.message.isascii()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("structured_outputs", {"choice": ["a"]}),
        ("typical_p", 0.5),
        ("length_penalty", 0.5),
        ("use_beam_search", True),
        ("bad_words", ["a"]),
        ("allowed_token_ids", [1]),
        ("logits_processors", ["a"]),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("prompt_logprobs", 0),
        ("truncate_prompt_tokens", 5),
    ],
)
@pytest.mark.parametrize("chatting", [True, False])
def test_refuses_non_neutral_value(name: str, value: Any, chatting: bool) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(chat(**{name: value})) if chatting else parse_completion_request(completion(**{name: value}))
    assert (caught.value.status, caught.value.param) == (400, name)
    assert caught.value.message.startswith(f"{name} is not supported")
    assert ("response_format" in caught.value.message) is name.startswith(("guided_", "structured_"))


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ messages }}"},
        {"echo": True},
        {"add_generation_prompt": False},
        {"documents": [{"text": "a"}]},
        {"verbosity": "low"},
        {"stream": True, "stream_options": {"include_everything": True}},
        {"messages": [{"role": "assistant", "content": "a", "prefix": True}]},
        {"messages": [{"role": "assistant", "content": "a", "audio": {"id": "b"}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txt": "b"}]}]},
    ],
)
def test_refuses_non_neutral_value_in_chat(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(chat(**fields))
    assert caught.value.status == 400
    assert caught.value.param is not None


@pytest.mark.parametrize("chatting", [True, False])
def test_sampling_fields_reach_job(chatting: bool) -> None:
    fields = {
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": 2,
        "presence_penalty": -2,
        "logit_bias": {"20": 1, "3": -100, "7": 0},
        "min_tokens": 5,
        "max_tokens": 9,
        "stop_token_ids": [4, 2, 4],
        "ignore_eos": True,
    }
    job = parse_chat_request(chat(**fields)) if chatting else parse_completion_request(completion(**fields))
    assert (job.top_k, job.min_p, job.repetition_penalty) == (40, 0.05, 1.1)
    assert (job.frequency_penalty, job.presence_penalty) == (2.0, -2.0)
    assert job.logit_bias == ((3, -100.0), (20, 1.0))
    assert (job.min_tokens, job.max_tokens, job.stop_token_ids, job.ignore_eos) == (5, 9, (4, 2), True)


def test_log_probabilities_reach_job() -> None:
    assert parse_chat_request(chat(logprobs=True)).top_logprobs == 0
    assert parse_chat_request(chat(logprobs=True, top_logprobs=20)).top_logprobs == 20
    assert parse_chat_request(chat(logprobs=False, top_logprobs=0)).top_logprobs is None
    assert parse_completion_request(completion(logprobs=5)).top_logprobs == 5
    assert parse_completion_request(completion(logprobs=0)).top_logprobs == 0
    assert parse_completion_request(completion(logprobs=False)).top_logprobs is None
    for fields in ({"logprobs": 21}, {"logprobs": True}):
        with pytest.raises(ApiError) as caught:
            parse_completion_request(completion(**fields))
        assert caught.value.param == "logprobs"


def test_prompt_is_scored_where_it_is_part_of_the_text_with_log_probabilities() -> None:
    for limit, expected in ((None, 16), (1, 1), (0, 0)):
        job = parse_completion_request(completion(logprobs=1, echo=True, max_tokens=limit))
        assert (job.task_kind, job.top_logprobs, job.max_tokens) == (TaskKind.SCORE, 1, expected)
    assert parse_completion_request(completion(echo=True)).task_kind is TaskKind.GENERATE
    for fields in ({}, {"echo": True}, {"logprobs": 1}):
        with pytest.raises(ApiError, match="only with echo and logprobs") as caught:
            parse_completion_request(completion(max_tokens=0, **fields))
        assert caught.value.param == "max_tokens"
    with pytest.raises(ApiError):
        parse_chat_request(chat(max_tokens=0))


def test_tools_reach_job() -> None:
    generation = generation_of_chat(chat(tools=[TOOL], parallel_tool_calls=False))
    (job,) = generation.jobs
    assert (job.tools, job.json_schema) == ((TOOL,), "")
    assert generation.rules == ParserRules(reasoning=True, tools={"f": {"type": "object"}}, single=True)
    generation = generation_of_chat(chat(tools=[TOOL], tool_choice="none"))
    assert (generation.jobs[0].tools, generation.rules.tools) == ((), {})
    named = {"type": "function", "function": {"name": "f"}}
    for choice in ("required", named):
        generation = generation_of_chat(chat(tools=[TOOL], tool_choice=choice))
        assert generation.rules.forced
        schema = json.loads(generation.jobs[0].json_schema)
        assert schema["properties"] == {"name": {"const": "f"}, "arguments": {"$ref": "#/$defs/0"}}
        assert generation.jobs[0].json_schema_param == "tools"


class City(BaseModel):
    name: str = Field(description="d" * 9000)
    twin: "City | None" = None


class Trip(BaseModel):
    description: str
    cities: list[City]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Trip"}}])
def test_references_of_a_tool_stay_its_own(choice: Any) -> None:
    tools = [pydantic_function_tool(Trip), pydantic_function_tool(City)]
    schema = generation_of_chat(chat(tools=tools, tool_choice=choice)).jobs[0].json_schema
    assert "ddd" not in schema, "descriptions bind no text"
    assert json.loads(schema)["$defs"]["0"]["properties"].keys() == {"description", "cities"}
    call = {"name": "Trip", "arguments": {"description": "x", "cities": [{"name": "Bonn", "twin": None}]}}
    assert admits(schema, call)
    assert not admits(schema, {"name": "Trip", "arguments": {"description": "x", "cities": [{"twin": None}]}})
    assert not admits(schema, {"name": "Trip", "arguments": {"cities": 1}})


def test_schema_that_tools_make_is_bounded() -> None:
    enum = [f"value {number}" for number in range(1500)]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"enum": enum}}}]
    assert generation_of_chat(chat(tools=tools)).jobs[0].tools
    with pytest.raises(ApiError, match=r"tools make a JSON Schema of [0-9]+ bytes") as caught:
        generation_of_chat(chat(tools=tools, tool_choice="required"))
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_answer_in_a_format_leaves_tools_possible() -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/A", "$defs": {"A": {"enum": [7]}}}}}
    generation = generation_of_chat(chat(tools=[TOOL], response_format=form))
    (job,) = generation.jobs
    assert generation.rules.forced
    assert admits(job.json_schema, 7)
    assert admits(job.json_schema, {"name": "f", "arguments": {}})
    assert not admits(job.json_schema, 8)
    assert job.json_schema_param == "response_format"
    assert job.template_options == {}, "a format leaves reasoning as it is"


def admits(schema: str, value: Any) -> bool:
    """Return whether the library that masks tokens admits a value as the whole text."""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = make_matcher(tokenizer, schema)
    assert not matcher.is_error(), matcher.get_error()
    text = json.dumps(value)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())


@pytest.mark.parametrize("value", [[1], {}, {"type": []}, 7, True])
def test_choice_of_an_odd_type_is_refused(value: Any) -> None:
    for parse, body in ((parse_chat, chat), (parse_response_request, response)):
        with pytest.raises(ApiError) as caught:
            parse(body(tools=[TOOL] if body is chat else [], tool_choice=value), Headers())
        assert caught.value.status == 400


@pytest.mark.parametrize("value", [[1], {}, 7])
def test_odd_wish_for_reasoning_is_refused(value: Any) -> None:
    with pytest.raises(ApiError, match="think must be"):
        parse_ollama_chat(json.dumps({"model": "tiny", "messages": [], "think": value}).encode(), Headers())


def test_what_an_answer_repeats_can_be_sent() -> None:
    for fields in ({"metadata": {"a": "\ud800"}}, {"user": "\ud800"}):
        with pytest.raises(ApiError):
            parse_response_request(response(**fields), Headers())


def response(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "input": "Hi", **fields}).encode()


ENDS_WITH_ASSISTANT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]
CONTINUES = {"continue_final_message": True, "add_generation_prompt": False}
ANY = {"tools": [{"name": "f"}], "tool_choice": {"type": "any"}}
CONTINUING: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (parse_message_request, {"max_tokens": 5}, ANY),
    (parse_ollama_chat, {}, {"format": "json"}),
    (parse_chat, CONTINUES, {"response_format": {"type": "json_object"}}),
]
"""Parsers of bodies, what makes them continue a turn, and what makes a text follow a JSON Schema."""


@pytest.mark.parametrize(("parse", "fields", "form"), CONTINUING)
def test_last_turn_of_the_assistant_is_continued(parse: Any, fields: dict[str, Any], form: dict[str, Any]) -> None:
    def job(**more: Any) -> JobRequest:
        body = {"model": "tiny", "messages": ENDS_WITH_ASSISTANT, **fields, **more}
        generation, _ = parse(json.dumps(body).encode(), Headers())
        request: JobRequest = generation.jobs[0]
        return request

    assert job().continue_final_message
    assert [turn.content for turn in job().messages or ()] == ["Hi", "Once"]
    with pytest.raises(ApiError, match="takes a text from its beginning") as caught:
        job(**form)
    assert caught.value.param in form


def test_what_ollama_ignores_changes_no_job_of_its_api() -> None:
    def job(**fields: Any) -> JobRequest:
        request: JobRequest = parse_ollama_chat(chat(**fields), Headers())[0].jobs[0]
        return request

    options = {"useMLock": True, "use_mlock": True, "num_gqa": 8, "repeat_penalty": 0.0}
    assert job(options=options, tool_choice="auto", truncate=False, shift=False) == job()
    for refused in ({"options": {"repeat_penalty": False}}, {"options": {"usemlock": True}}, {"tool_choice": "none"}):
        with pytest.raises(ApiError) as caught:
            job(**refused)
        assert caught.value.status == 400


def test_reasoning_as_a_turn_of_ollama_belongs_to_the_answer_behind_it() -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "thinking", "content": "A "},
        {"role": "thinking", "content": "greeting."},
        {"role": "assistant", "content": "Hello."},
        {"role": "thinking", "content": "Stopped before it answered."},
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "Where"},
    ]
    (job,) = parse_ollama_chat(chat(messages=turns), Headers())[0].jobs
    assert [(turn.role, turn.content, turn.reasoning) for turn in job.messages or ()] == [
        ("user", "Hi", ""),
        ("assistant", "Hello.", "A greeting."),
        ("user", "Go on", ""),
        ("assistant", "Where", ""),
    ]


def test_turn_of_tool_calls_is_not_continued() -> None:
    turns = [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]
    with pytest.raises(ApiError, match="ends with tool calls"):
        parse_message_request(json.dumps({"model": "tiny", "max_tokens": 5, "messages": turns}).encode(), Headers())


def test_chat_completion_continues_a_turn_on_request_only() -> None:
    def parsed(**fields: Any) -> JobRequest:
        return generation_of_chat(chat(messages=ENDS_WITH_ASSISTANT, **fields)).jobs[0]

    assert not parsed().continue_final_message
    for fields in ({"add_generation_prompt": False}, {"continue_final_message": True, "add_generation_prompt": True}):
        with pytest.raises(ApiError, match="add_generation_prompt must be"):
            parsed(**fields)
    with pytest.raises(ApiError, match="requires a last message of the assistant"):
        generation_of_chat(chat(continue_final_message=True))


def test_items_of_one_turn_make_one_turn() -> None:
    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}

    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": "Wait."},
        call("a"),
        {"role": "assistant", "content": "And this."},
        call("b"),
        {"type": "function_call_output", "call_id": "a", "output": "1"},
    ]
    generation, _ = parse_response_request(response(input=items, include=["reasoning.encrypted_content"]), Headers())
    turns = generation.jobs[0].messages or ()
    assert [(turn.role, turn.content, len(turn.tool_calls)) for turn in turns] == [
        ("user", "Hi", 0), ("assistant", "Wait.\nAnd this.", 2), ("tool", "1", 0)
    ]  # fmt: skip
    with pytest.raises(ApiError, match="item_reference is not supported"):
        parse_response_request(response(input=[{"type": "item_reference", "id": "x"}]), Headers())


def test_instructions_are_one_turn_of_the_system_with_those_behind_them() -> None:
    items = [
        {"role": "developer", "content": "Ask before you write."},
        {"role": "user", "content": "Hi"},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Go on"},
    ]
    generation, _ = parse_response_request(response(instructions="Be kind.", input=items), Headers())
    assert [(turn.role, turn.content) for turn in generation.jobs[0].messages or ()] == [
        ("system", "Be kind.\n\nAsk before you write."), ("user", "Hi"), ("system", "Be brief."), ("user", "Go on")
    ]  # fmt: skip


def test_tool_that_openai_runs_is_refused_with_what_to_do() -> None:
    with pytest.raises(ApiError, match=r"'web_search' is not supported.*web_search = \"disabled\"") as caught:
        parse_response_request(response(tools=[{"type": "web_search", "external_web_access": False}]), Headers())
    assert (caught.value.status, caught.value.param) == (400, "tools[0].type")


def test_tool_calls_of_earlier_turns_reach_template() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    messages = parse_chat_request(chat(messages=turns, tools=[TOOL])).messages
    assert messages is not None
    function = {"name": "f", "arguments": {"x": 1}}
    assert [message.for_template() for message in messages] == [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            "reasoning_content": "hm",
            "thinking": "hm",  # gpt-oss's template
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
    ]


def test_response_format_reaches_job() -> None:
    for value, schema in (
        ({"type": "text"}, ""),
        ({"type": "json_object"}, '{"type": "object"}'),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"a": 1}}}, '{"a":1}'),
    ):
        assert parse_chat_request(chat(response_format=value)).json_schema == schema
        assert parse_completion_request(completion(response_format=value)).json_schema == schema


def test_template_options_reach_job() -> None:
    assert parse_chat_request(chat(chat_template_kwargs={"a": 1})).template_options == {"a": 1}
    options = parse_chat_request(chat(reasoning_effort="none")).template_options
    assert options == {"reasoning_effort": "none", "enable_thinking": False}


def test_top_k_off_values() -> None:
    for value in (-1, 0, None):
        assert parse_chat_request(chat(top_k=value)).top_k == 0


@pytest.mark.parametrize("seed", [MIN_SEED, -1, 0, MAX_SEED])
def test_seed_is_signed_64_bit(seed: int) -> None:
    assert parse_completion_request(completion(seed=seed)).seed == seed


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [MAX_POSITIONS + 1, 2**31 - 1, 10**30])
def test_caps_max_tokens(name: str, value: int) -> None:
    assert parse_chat_request(chat(**{name: value})).max_tokens == MAX_POSITIONS


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "min_p": 0, "top_k": -1},
        {"skip_special_tokens": True, "echo": False, "bad_words": [], "typical_p": 1.0},
        {"chat_template_kwargs": {}, "add_generation_prompt": True},
        {"guided_json": None, "reasoning_effort": None},
        {"logit_bias": {}},
        {"logprobs": False},
        {"tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
    ],
)
def test_accepts_neutral_values(fields: dict[str, Any]) -> None:
    assert parse_chat_request(chat(**fields)) == parse_chat_request(chat())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(MAX_STOP_TOKENS + 1))}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias[1]"),
        ({"logit_bias": {"1": True}}, "logit_bias[1]"),
        ({"logit_bias": {str(token): 1 for token in range(MAX_LOGIT_BIASES + 1)}}, "logit_bias"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, "tools[0]"),
        ({"tools": 7}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 7}}}, SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "x" * 20_000}}}}, SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, SCHEMA),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": MIN_SEED - 1}, "seed"),
        ({"seed": 1e300}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [7]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "function", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, NAMELESS),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"metaswarm": {"speed": 1}}, "metaswarm.speed"),
        ({"metaswarm": {"objective": "speed"}}, "metaswarm.objective"),
        ({"metaswarm": {"quality": ["exact"]}}, "metaswarm.quality"),
        ({"metaswarm": {"budget": 0}}, "metaswarm.budget"),
        ({"metaswarm": {"method": "x" * 257}}, "metaswarm.method"),
    ],
)
def test_error_names_wrong_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(chat(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith(param)
    assert "\n" not in caught.value.message


def test_joins_text_parts_and_maps_developer_role() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts, "name": "Ann"}]
    job = parse_chat_request(chat(messages=messages))
    assert job.messages == (
        ChatMessage(role="system", content="Be kind."),
        ChatMessage(role="user", content="Good day"),
    )


def test_text_parts_are_lines_where_nothing_is_between_them() -> None:
    parts = [{"type": "text", "text": text} for text in ("row1", "row2", "", "\nrow3", "row4 ", "end")]
    turns = [{"role": "user", "content": parts}]
    jobs = [
        parse_chat_request(chat(messages=turns)),
        parse_response_request(response(input=[{"role": "user", "content": parts}]), Headers())[0].jobs[0],
        message_job(system=parts, messages=turns),
        message_job(messages=[{"role": "user", "content": [{"type": "tool_result", "content": parts}]}]),
    ]
    for job in jobs:
        assert {turn.content for turn in job.messages or ()} == {"row1\nrow2\nrow3\nrow4 end"}


def message_job(**fields: Any) -> JobRequest:
    """Return the job of a request to `/v1/messages`."""
    body = {"model": "tiny", "max_tokens": 9, **fields}
    return parse_message_request(json.dumps(body).encode(), Headers())[0].jobs[0]


def test_turns_of_one_role_that_follow_each_other_are_joined_in_messages() -> None:
    call = {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "x"}
    job = message_job(messages=[
        {"role": "user", "content": "One."},
        {"role": "user", "content": [{"type": "text", "text": "Two."}]},
        {"role": "assistant", "content": "Wait."},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, {"type": "text", "text": "Three."}]},
        {"role": "user", "content": "Four."},
    ])  # fmt: skip
    assert [(turn.role, turn.content, len(turn.tool_calls)) for turn in job.messages or ()] == [
        ("user", "One.\nTwo.", 0), ("assistant", "Wait.", 1), ("tool", "x", 0), ("user", "Three.\nFour.", 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "turn", [{"content": None}, {}, {"content": None, "tool_calls": [], "refusal": None}, {"content": []}]
)
def test_assistant_content_may_be_null(turn: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **turn}, {"role": "user", "content": "b"}]
    job = parse_chat_request(chat(messages=messages))
    assert job.messages is not None
    assert job.messages[1] == ChatMessage(role="assistant", content="")


@pytest.mark.parametrize(
    ("prompt", "text", "tokens"),
    [("Hi", "Hi", None), (["Hi"], "Hi", None), ([1, 2], None, (1, 2)), ([[1, 2]], None, (1, 2))],
)
def test_prompt_is_text_or_token_ids(prompt: Any, text: str | None, tokens: tuple[int, ...] | None) -> None:
    job = parse_completion_request(completion(prompt=prompt))
    assert (job.prompt, job.prompt_tokens) == (text, tokens)


@pytest.mark.parametrize(
    "prompt",
    [["a", 2], [[1], []], ["a"] * (MAX_CHOICES + 1), [], [[]], [True], [-1], [MAX_VOCABULARY], [1, "a"], {}, 7],
)
def test_refuses_other_prompts(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion_request(completion(prompt=prompt))
    assert caught.value.status == 400
    assert caught.value.param in {"prompt", "prompt[1]"}


def test_each_prompt_and_choice_is_a_job() -> None:
    generation = generation_of_completion(completion(prompt=["a", "b"], n=2, seed=7, echo=True))
    assert [(job.prompt, job.seed, job.echo) for job in generation.jobs] == [
        ("a", 7, True), ("a", 8, True), ("b", 7, True), ("b", 8, True)
    ]  # fmt: skip
    assert generation.choices_per_prompt == 2
    assert [job.seed for job in generation_of_chat(chat(n=2)).jobs] == [None, None]
    with pytest.raises(ApiError) as caught:
        generation_of_completion(completion(prompt=["a", "b"], n=MAX_CHOICES))
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "Hi", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "Hi", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_refuses_body_that_is_not_json_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="JSON") as caught:
        parse_completion_request(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("parse", [parse_chat_request, parse_ollama_chat])
def test_unknown_fields_that_are_null_are_absent(parse: Any) -> None:
    body = json.loads(chat()) | {"foo": None}
    body["messages"][0]["foo"] = None
    if parse is parse_ollama_chat:
        body["options"] = {"foo": None}
        assert parse(json.dumps(body).encode(), Headers())[0].jobs
    else:
        assert parse(json.dumps(body).encode())


def test_integers_may_be_written_with_a_point() -> None:
    request = parse_chat_request(chat(top_k=40.0, seed=1.0, max_tokens=9.0))
    assert (request.top_k, request.seed, request.max_tokens) == (40, 1, 9)
    assert all(isinstance(each, int) for each in (request.top_k, request.seed, request.max_tokens))
    options = {"top_k": 40.0, "seed": -1.0, "num_predict": 7.0, "repeat_last_n": 8.0, "repeat_penalty": 2}
    (job,) = parse_ollama_chat(chat(options=options), Headers())[0].jobs
    assert (job.top_k, job.seed, job.max_tokens, job.penalty_window) == (40, -1, 7, 8)


def test_top_p_of_0_draws_the_likeliest_token() -> None:
    (of_ollama,) = parse_ollama_chat(chat(options={"top_p": 0}), Headers())[0].jobs
    for job in (parse_chat_request(chat(top_p=0)), of_ollama):
        sampling = Sampling(temperature=1.0, top_p=job.top_p, seed=7, max_tokens=1)
        logits = np.zeros(50_000, dtype=np.float32)
        logits[123] = 0.01
        assert draw(logits, sampling, 5) == 123
