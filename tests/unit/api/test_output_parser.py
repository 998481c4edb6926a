"""Tool calls and reasoning are read from a text, however it is cut into pieces."""

import json

import pytest

from node.api.output_parser import OutputParser, ParsedReasoning, ParsedText, ParserRules, ToolCall
from node.coordinator.submission import ChatFormat, ToolFormat

RULES = ParserRules(reasoning=True, tools=True)
CALL = '{"name": "add", "arguments": {"a": 1, "b": "<x>"}}'


def read(
    text: str, chat_format: ChatFormat, size: int, rules: ParserRules = RULES
) -> tuple[str, str, list[tuple[str, str]]]:
    """Return text, reasoning and tool calls of a text that comes in pieces of a size."""
    parser = OutputParser(rules, chat_format)
    parsed = [each for start in range(0, len(text), size) for each in parser.feed(text[start : start + size])]
    parsed += parser.finish()
    answer = "".join(each.text for each in parsed if isinstance(each, ParsedText))
    reasoning = "".join(each.text for each in parsed if isinstance(each, ParsedReasoning))
    calls = [(each.name, each.arguments) for each in parsed if isinstance(each, ToolCall)]
    assert parser.has_calls == bool(calls)
    return answer, reasoning, calls


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


def test_forced_call_is_the_whole_text() -> None:
    rules = ParserRules(tools=True, forced=True, single=True)
    assert read(CALL, ChatFormat(reasons=True, reasoning_began=True), 3, rules) == ("", "", [ADD])
    cut = CALL[:20]
    assert read(cut, ChatFormat(), 3, rules) == (cut, "", [])


def test_single_keeps_the_first_call() -> None:
    rules = ParserRules(tools=True, single=True)
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
