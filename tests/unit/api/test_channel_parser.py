"""Texts in gpt-oss's harmony format: what is shown as reasoning, as answer, and as a tool call."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.api.channel_parser import ChannelParser
from node.api.generation import Generation, Outcome, run_generation
from node.api.output_parser import ParsedReasoning, ParsedText, ParserRules
from node.api.tool_choice import CHAT_TEXT
from node.coordinator.chat import ChatFormat, ToolFormat
from node.coordinator.submission import JobRequest
from tests.unit.api.fakes import FakeSubmitter
from tests.unit.api.parsing import parse

TOOLS: dict[str, Any] = {"add": {"type": "object"}}
WITH_TOOLS = ParserRules(reasoning=True, tools=TOOLS)
HARMONY = ChatFormat(tools=ToolFormat.HARMONY, reasons=True, channel="")
THOUGHT = "<|channel|>analysis<|message|>Two < 3 <|e.<|end|>"
ANSWER = "<|start|>assistant<|channel|>final<|message|>Hello! a<b <|x"
CALL = '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
OTHER_ORDER = '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1}'
ADD = ("add", '{"a": 1}')


def read(
    text: str, size: int, rules: ParserRules = WITH_TOOLS, chat_format: ChatFormat = HARMONY
) -> tuple[str, str, list[tuple[str, str]]]:
    return parse(ChannelParser(rules, chat_format), text, size)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THOUGHT + ANSWER, ("Hello! a<b <|x", "Two < 3 <|e.", [])),
        (ANSWER.removeprefix("<|start|>assistant"), ("Hello! a<b <|x", "", [])),
        ("<|channel|>analysis<|message|>cut o", ("", "cut o", [])),
        (THOUGHT + CALL, ("", "Two < 3 <|e.", [ADD])),
        (THOUGHT + OTHER_ORDER, ("", "Two < 3 <|e.", [ADD])),
        (OTHER_ORDER.removeprefix("<|start|>assistant"), ("", "", [ADD])),
        ("<|channel|>commentary<|message|>I add.<|end|>" + CALL, ("I add.", "", [ADD])),
        ("<|channel|>analysis to=python code<|message|>print()<|end|>" + ANSWER, ("Hello! a<b <|x", "print()", [])),
        (CALL.replace('{"a": 1}', '{"a": '), ('{"a": ', "", [])),
        (CALL.replace('{"a": 1}', ""), ("", "", [("add", "{}")])),
        ("assistant of yours", ("assistant of yours", "", [])),
        ("No channels here.", ("No channels here.", "", [])),
        ('{"a": "<|"}', ('{"a": "<|"}', "", [])),
        ("x" * 2000, ("x" * 2000, "", [])),
        ("<|channel|>final", ("", "", [])),
        ("<|channel|>" + "x" * 600, ("x" * 600, "", [])),
        ("<|start|>" * 2 + "x" * 600 + "<|message|>y", ("x" * 600 + "<|message|>y", "", [])),
        (" <|start|>" + "x" * 600 + "<|end|>" + ANSWER, ("x" * 600 + "Hello! a<b <|x", "", [])),
    ],
)  # fmt: skip
def test_reads_channels(text: str, expected: tuple[str, str, list[tuple[str, str]]], size: int) -> None:
    assert read(text, size) == expected


PIECES = st.sampled_from(
    ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "final", "analysis", "x", " ", "x" * 300]
)


@given(st.lists(PIECES, max_size=12), st.lists(st.integers(1, 700), min_size=1, max_size=20))
def test_any_text_in_any_pieces_is_read_to_its_end(marks: list[str], sizes: list[int]) -> None:
    text = "".join(marks) + "<|message|>fox"
    parser, places = ChannelParser(WITH_TOOLS, HARMONY), [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    cut = [text[start:end] for start, end in zip(places, [*places[1:], len(text)], strict=True)]
    parsed = [each for piece in cut for each in parser.feed(piece)] + parser.finish()
    kinds = (ParsedText, ParsedReasoning)
    answer, reasoning = ("".join(each.text for each in parsed if isinstance(each, kind)) for kind in kinds)
    assert answer.endswith("fox") or reasoning.endswith("fox")
    assert (answer, reasoning, []) == read(text, len(text))


def test_text_goes_on_as_soon_as_it_is_certain() -> None:
    parser = ChannelParser(WITH_TOOLS, HARMONY)
    assert parser.feed("<|channel|>analysis<|message|>") == []
    assert parser.feed("Two") == [ParsedReasoning("Two")]
    assert parser.feed(" <|e") == [ParsedReasoning(" ")]


def test_call_without_tools_is_not_the_answer() -> None:
    assert read(CALL, 5, CHAT_TEXT) == ("", '{"a": 1}', [])


def test_single_keeps_the_first_call() -> None:
    rules = ParserRules(reasoning=True, tools=TOOLS, single=True)
    assert read(f"{CALL}<|end|>{CALL}", 4, rules) == ("", "", [ADD])


def test_continued_answer_is_the_answer() -> None:
    continued = ChatFormat(tools=ToolFormat.HARMONY, reasons=True, channel="final")
    assert read("fox jumps", 2, chat_format=continued) == ("fox jumps", "", [])


async def test_answer_of_a_job_has_the_final_channel_only() -> None:
    submitter = FakeSubmitter(words=(THOUGHT, CALL), chat_format=HARMONY)
    generation = Generation(jobs=(JobRequest(model="tiny", prompt="x"),), rules=WITH_TOOLS)
    outcome = Outcome()
    async with run_generation(submitter, generation) as events:
        async for event in events:
            outcome.take(event)
    (choice,) = outcome.ordered()
    assert (choice.text, choice.reasoning, choice.finish_reason) == ("", "Two < 3 <|e.", "tool_calls")
    assert [(call.name, call.arguments) for call in choice.tool_calls] == [ADD]
    assert choice.reasoning_tokens > 0
