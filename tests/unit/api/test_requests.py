import json
from typing import Any

import pytest

from node.api.errors import ApiError
from node.api.requests import MAX_SEED, parse_chat_request, parse_completion_request
from node.jobs.interface import ChatMessage
from protocol.limits import MAX_VOCABULARY


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "Hi", **fields}).encode()


def test_defaults_are_those_of_the_openai_api() -> None:
    job = parse_chat_request(chat()).job
    assert (job.temperature, job.top_p, job.seed, job.max_tokens, job.stop) == (1.0, 1.0, None, None, ())
    assert parse_completion_request(completion()).job.max_tokens == 16


def test_temperature_zero_is_greedy_and_not_the_default() -> None:
    assert parse_chat_request(chat(temperature=0)).job.temperature == 0.0


def test_null_is_as_good_as_absent() -> None:
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


def test_unknown_fields_are_ignored() -> None:
    assert parse_chat_request(chat(user="me", store=True, top_k=4)) == parse_chat_request(chat())


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"presence_penalty": 0, "frequency_penalty": 0.0},
        {"logit_bias": {}},
        {"logprobs": False},
        {"tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
    ],
)
def test_unsupported_fields_are_accepted_where_they_change_nothing(fields: dict[str, Any]) -> None:
    assert parse_chat_request(chat(**fields)) == parse_chat_request(chat())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1 << 21}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [7]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"metaswarm": {"speed": 1}}, "metaswarm.speed"),
        ({"metaswarm": {"objective": "cheap"}}, "metaswarm.objective"),
        ({"metaswarm": {"quality": ["exact"]}}, "metaswarm.quality"),
        ({"metaswarm": {"budget": -1}}, "metaswarm.budget"),
        ({"metaswarm": {"method": "x" * 257}}, "metaswarm.method"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(chat(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith(param)
    assert "\n" not in caught.value.message


def test_messages_may_come_in_parts_and_developers_are_heard() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts, "name": "Ann"}]
    job = parse_chat_request(chat(messages=messages)).job
    assert job.messages == (
        ChatMessage(role="system", content="Be kind."),
        ChatMessage(role="user", content="Good day"),
    )


@pytest.mark.parametrize(
    ("prompt", "text", "tokens"),
    [("Hi", "Hi", None), (["Hi"], "Hi", None), ([1, 2], None, (1, 2)), ([[1, 2]], None, (1, 2))],
)
def test_a_prompt_is_text_or_tokens(prompt: Any, text: str | None, tokens: tuple[int, ...] | None) -> None:
    job = parse_completion_request(completion(prompt=prompt)).job
    assert (job.prompt, job.prompt_tokens) == (text, tokens)


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [], [[]], [True], [-1], [MAX_VOCABULARY], [1, "a"], {}, 7])
def test_no_other_prompt_is_taken(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion_request(completion(prompt=prompt))
    assert (caught.value.status, caught.value.param) == (400, "prompt")


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
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="JSON") as caught:
        parse_completion_request(body)
    assert caught.value.status == 400
