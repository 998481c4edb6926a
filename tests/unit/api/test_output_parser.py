"""Tool calls and reasoning are read from a text, however it is cut into pieces."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from node.api.output_parser import OutputParser, ParsedText, ParserRules
from node.api.tool_calls import MAX_CALLS, ToolCall, parse_calls
from node.coordinator.chat import ChatFormat, ToolFormat
from tests.unit.api.parsing import parse

TOOLS: dict[str, Any] = {
    "add": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    "now": {"type": "object"},
}
RULES = ParserRules(reasoning=True, tools=TOOLS)
CALL = '{"name": "add", "arguments": {"a": 1, "b": "<x>"}}'


def read(
    text: str, chat_format: ChatFormat, size: int, rules: ParserRules = RULES
) -> tuple[str, str, list[tuple[str, str]]]:
    """Return text, reasoning and tool calls of a text that comes in pieces of a size."""
    return parse(OutputParser(rules, chat_format), text, size)


QWEN_CODER = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n<x>\n</parameter>\n</function>\n"
    "</tool_call>"
)
GLM = (
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value><x></arg_value>\n"
    "</tool_call>"
)
ADD = ("add", '{"a": 1, "b": "<x>"}')
HERMES, LLAMA3, MISTRAL = (
    ChatFormat(tools=each) for each in (ToolFormat.HERMES, ToolFormat.LLAMA3, ToolFormat.MISTRAL)
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("chat_format", "text", "expected"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", ("", [ADD])),
        (HERMES, f"Wait.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", ("Wait.", [ADD] * 2)),
        (HERMES, f"<tool_call>{CALL}", ("", [ADD])),
        (HERMES, "a < b <tool> <tool_cal", ("a < b <tool> <tool_cal", [])),
        (HERMES, "<tool_call>nonsense</tool_call> b", ("<tool_call>nonsense</tool_call> b", [])),
        (HERMES, "plain text \n", ("plain text \n", [])),
        (LLAMA3, CALL.replace("arguments", "parameters"), ("", [ADD])),
        (LLAMA3, f"<|python_tag|>{CALL}; {CALL}", ("", [ADD] * 2)),
        (LLAMA3, '{"a": 1} is JSON', ('{"a": 1} is JSON', [])),
        (LLAMA3, f"The JSON is {CALL}", (f"The JSON is {CALL}", [])),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}, {CALL}]", ("", [ADD] * 2)),
        (MISTRAL, f"[TOOL_CALLS]add[ARGS]{ADD[1]}[TOOL_CALLS]add{ADD[1]}", ("", [ADD] * 2)),
        (MISTRAL, "[TOOL", ("[TOOL", [])),
        (HERMES, QWEN_CODER, ("", [ADD])),
        (HERMES, QWEN_CODER.replace("add", "now").replace("<x>", "7"), ("", [("now", '{"a": 1, "b": 7}')])),
        (HERMES, GLM, ("", [ADD])),
        (HERMES, "<tool_call>now\n</tool_call>", ("", [("now", "{}")])),
        (HERMES, '<tool_call>{"name": "now", "arguments": null}</tool_call>', ("", [("now", "{}")])),
        (HERMES, f'<tool_call>{{"name": "add", "arguments": {json.dumps(ADD[1])}}}</tool_call>', ("", [ADD])),
        (HERMES, '<tool_call>{"name": "", "arguments": {}}', ('<tool_call>{"name": "", "arguments": {}}', [])),
        (HERMES, '<tool_call>{"name": "add"}</tool_call>', ('<tool_call>{"name": "add"}</tool_call>', [])),
        (LLAMA3, '{"name": "Ada", "age": 36}', ('{"name": "Ada", "age": 36}', [])),
        (LLAMA3, '{"name": "sub", "parameters": {}}', ('{"name": "sub", "parameters": {}}', [])),
    ],
)  # fmt: skip
def test_reads_tool_calls(
    chat_format: ChatFormat, text: str, expected: tuple[str, list[tuple[str, str]]], size: int
) -> None:
    answer, reasoning, calls = read(text, chat_format, size)
    assert ((answer, calls), reasoning) == (expected, "")
    unread = ParserRules(reasoning=True)
    assert read(text, chat_format, size, unread) == (text, "", [])


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_reads_reasoning(size: int) -> None:
    thinking = ChatFormat(tools=ToolFormat.HERMES, reasons=True)
    begun = ChatFormat(tools=ToolFormat.HERMES, reasons=True, reasoning_began=True)
    assert read("<think>a <b</think>\n\nc", thinking, size) == ("c", "a <b", [])
    assert read(f"a</think>\n\n<tool_call>{CALL}</tool_call>", begun, size) == ("", "a", [ADD])
    assert read("a, cut off", begun, size) == ("", "a, cut off", [])
    assert read("no <think>ing", ChatFormat(), size) == ("no <think>ing", "", [])
    assert read("text, then <think>", thinking, size) == ("text, then <think>", "", [])


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_forced_call_is_the_whole_text_but_for_reasoning(size: int) -> None:
    rules = ParserRules(reasoning=True, tools=TOOLS, forced=True, single=True)
    assert read(CALL, HERMES, size, rules) == ("", "", [ADD])
    thinking = ChatFormat(reasons=True)
    assert read(CALL, thinking, size, rules) == ("", "", [ADD])
    assert read(f"<think>{{a}}</think>{CALL}", thinking, size, rules) == ("", "{a}", [ADD])
    assert read(f"a</think>\n{CALL}", replace(thinking, reasoning_began=True), size, rules) == ("", "a", [ADD])
    assert read('<think>a</think>["{", 1]', thinking, size, rules) == ('["{", 1]', "a", [])
    cut = CALL[:20]
    assert read(cut, ChatFormat(), 3, rules) == (cut, "", [])


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_text_that_follows_another_schema_is_no_call(size: int) -> None:
    rules = ParserRules(tools=TOOLS, forced=True, single=True)
    for text in ('{"answer": 42}', '{"name": "Ada", "age": 36}', "[1, 2]", '"name"', '{"name'):
        assert read(text, HERMES, size, rules) == (text, "", [])
    parser = OutputParser(rules, HERMES)
    assert parser.feed('{"answ') == [ParsedText('{"answ')], "it is streamed as soon as it cannot be a call"


@pytest.mark.parametrize(
    "arguments",
    [
        r'{"a": "\ud83d"}', '{"a": 1e999}', '{"a": NaN}', '{"a": -Infinity}', r'{"\udfff": 1}', "[" * 5000,
        "[1]", "7", "false", '"nonsense"', r'"{\"a\": 1"', '"[1]"', '{"a": 123456789012345678901234567890}',
        f'{{"a": {"[" * 64 + "]" * 64}}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("chat_format", [HERMES, LLAMA3, MISTRAL])
def test_call_that_no_request_could_have_stays_text(chat_format: ChatFormat, arguments: str) -> None:
    body = f'{{"name": "add", "arguments": {arguments}}}'
    begin, end = {HERMES.tools: ("<tool_call>", "</tool_call>"), MISTRAL.tools: ("[TOOL_CALLS]", "")}.get(
        chat_format.tools, ("", "")
    )
    text = begin + body + end
    assert read(text, chat_format, 50) == (text, "", [])


@pytest.mark.parametrize(
    "text",
    [
        "[TOOL_CALLS]a" + " " * 100_000 + "b",
        "[TOOL_CALLS]" + "a{}" * 30_000,
        "<tool_call>" + "<function=a>" * 10_000 + "</tool_call>",
        "<tool_call>a" + "<arg_key>" * 10_000 + "</tool_call>",
        "<tool_call>" + "[]" * 150_000 + "</tool_call>",
        "[TOOL_CALLS]" + "[]; " * 100_000,
    ],
)
def test_hostile_text_is_read_in_time(text: str) -> None:
    began_s = time.process_time()
    for chat_format in (HERMES, MISTRAL):
        answer, _, calls = read(text, chat_format, 100_000)
        assert (answer, calls) == (text, [])
    assert time.process_time() - began_s < 1


@pytest.mark.parametrize("form", ["{}", "[{}]", "[{}]; []"])
def test_text_of_more_calls_than_an_answer_has_is_none(form: str) -> None:
    text = form.format(CALL)
    most = MAX_CALLS // (2 if text.endswith("[]") else 1)
    assert len(parse_calls("; ".join([text] * most), ToolFormat.HERMES, TOOLS)) == most
    assert parse_calls("; ".join([text] * (most + 1)), ToolFormat.HERMES, TOOLS) == []
    whole = f"[{', '.join([CALL] * (MAX_CALLS + 1))}]"
    assert parse_calls(whole, ToolFormat.HERMES, TOOLS) == []


def test_single_keeps_the_first_call() -> None:
    rules = ParserRules(tools=TOOLS, single=True)
    assert read(f"<tool_call>{CALL}</tool_call>" * 3, HERMES, 4, rules) == ("", "", [ADD])


def test_ids_fit_the_family() -> None:
    for chat_format, text, length in (
        (HERMES, f"<tool_call>{CALL}</tool_call>", 29),
        (MISTRAL, f"[TOOL_CALLS][{CALL}]", 9),
    ):
        parser = OutputParser(RULES, chat_format)
        (call,) = [*parser.feed(text), *parser.finish()]
        assert isinstance(call, ToolCall)
        assert len(call.id) == length
        assert json.loads(call.arguments) == {"a": 1, "b": "<x>"}
