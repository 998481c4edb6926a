"""Whatever a model writes, its answer is taken back with the conversation, in every protocol."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from node.coordinator.chat import ChatFormat, ChatMessage, ToolFormat
from tests.unit.api.fakes import FakeNode

Document = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How a protocol asks, and how its answer and the result of a tool are sent back."""

    path: str
    body: Document
    turns: str
    answer: Callable[[Document], list[Document]]
    result: Callable[[Document], list[Document]]


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
PROTOCOLS = {
    "chat": Protocol(
        "/v1/chat/completions",
        {"tools": [{"type": "function", "function": FUNCTION}]},
        "messages",
        lambda answer: [answer["choices"][0]["message"]],
        lambda answer: [
            {"role": "tool", "tool_call_id": call["id"], "content": "7"}
            for call in answer["choices"][0]["message"].get("tool_calls") or []
        ],
    ),
    "responses": Protocol(
        "/v1/responses",
        {"tools": [{"type": "function", **FUNCTION}]},
        "input",
        lambda answer: answer["output"],
        lambda answer: [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "7"}
            for item in answer["output"]
            if item["type"] == "function_call"
        ],
    ),
    "messages": Protocol(
        "/v1/messages",
        {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "max_tokens": 9},
        "messages",
        lambda answer: [{"role": "assistant", "content": answer["content"]}],
        lambda answer: [
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": "7"}]}
            for block in answer["content"]
            if block["type"] == "tool_use"
        ],
    ),
    "ollama": Protocol(
        "/api/chat",
        {"tools": [{"type": "function", "function": FUNCTION}], "stream": False},
        "messages",
        lambda answer: [answer["message"]],
        lambda answer: [
            {"role": "tool", "tool_name": call["function"]["name"], "content": "7"}
            for call in answer["message"].get("tool_calls", [])
        ],
    ),
}

CALLS: dict[str, Document | None] = {
    '{"a": {"b": [1, null, "x"]}}': {"a": {"b": [1, None, "x"]}},
    r'"{\"a\": 1}"': {"a": 1},
    "null": {},
    '""': {},
    f'{{"a": {"[" * 60 + "]" * 60}}}': {"a": json.loads("[" * 60 + "]" * 60)},
    '"oops"': None,
    r'"{\"a\": 1"': None,
    "[1]": None,
    "7": None,
    '{"a": 123456789012345678901234567890}': None,
    f'{{"a": {"[" * 64 + "]" * 64}}}': None,
}
"""Arguments as a model writes them, and those of the call; None where it stays text."""


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("written", CALLS)
async def test_call_comes_back_as_it_went_out(
    node: FakeNode, client: httpx.AsyncClient, protocol: Protocol, written: str
) -> None:
    expected = CALLS[written]
    text = f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>'
    node.submitter.chat_format = ChatFormat(tools=ToolFormat.HERMES)
    node.submitter.words = (text,)
    question: Document = {"role": "user", "content": "Hi"}
    answer = await client.post(protocol.path, json={"model": "tiny", **protocol.body, protocol.turns: [question]})
    assert answer.status_code == 200
    turns = [question, *protocol.answer(answer.json()), *protocol.result(answer.json()), question]
    again = await client.post(protocol.path, json={"model": "tiny", **protocol.body, protocol.turns: turns})
    assert (again.status_code, again.json().get("error")) == (200, None)
    messages = node.submitter.requests[-1].messages or ()
    (turn,) = [each for each in messages if each.role == "assistant"]
    calls = [(call.name, call.arguments) for call in turn.tool_calls]
    assert (turn.content, calls) == ((text, []) if expected is None else ("", [("f", expected)]))
    assert len([each for each in messages if each.role == "tool"]) == len(calls)


@pytest.mark.parametrize("arguments", ["oops", "[1]", [1], 7, '{"a": NaN}', "1" * 30])
async def test_arguments_of_other_servers_are_taken(node: FakeNode, client: httpx.AsyncClient, arguments: Any) -> None:
    """A conversation that began elsewhere goes on here."""
    turns: dict[str, list[Document]] = {
        "chat": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}],
        "responses": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments}],
        "messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": arguments}]}
        ],
        "ollama": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}],
    }
    question: Document = {"role": "user", "content": "Hi"}
    for name, protocol in PROTOCOLS.items():
        body = {"model": "tiny", **protocol.body, protocol.turns: [question, *turns[name], question]}
        assert (await client.post(protocol.path, json=body)).status_code == 200
        messages: tuple[ChatMessage, ...] = node.submitter.requests[-1].messages or ()
        (call,) = messages[1].tool_calls
        assert call.arguments == {"arguments": arguments}
