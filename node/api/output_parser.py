"""Reads a model's text: what is reasoning, what is a tool call, and what is the answer.

Models write all of it into one text, each family in its own way; `ChatFormat` tells the way of a model from its chat
template. Text goes on as soon as it cannot be the beginning of a mark any more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from node.api.tool_calls import MAX_CALLS, MISTRAL_BEGIN, ToolCall, Tools, may_become_call, new_id, parse_calls
from node.coordinator.chat import ChatFormat, ToolFormat

THINK_BEGIN: Final = "<think>"
THINK_END: Final = "</think>"
_HERMES_BEGIN: Final = "<tool_call>"
_HERMES_END: Final = "</tool_call>"
_LLAMA_TAG: Final = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class ParsedText:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ParsedReasoning:
    """More of the reasoning."""

    text: str


Parsed = ParsedText | ParsedReasoning | ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserRules:
    """What is read from a text.

    `reasoning`: whether it is told from the answer. `tools`: those that may be called; without any no call is read.
    `forced`: a JSON Schema has made sure that the text, but for reasoning, is a call, or else follows another schema.
    `single`: no more than one call.
    """

    reasoning: bool = False
    tools: Tools = field(default_factory=dict)
    forced: bool = False
    single: bool = False


PLAIN_TEXT: Final = ParserRules()
"""Nothing is told apart."""


class OutputParser:
    """Reads the text of one choice, in pieces."""

    def __init__(self, rules: ParserRules, chat_format: ChatFormat | None) -> None:
        self._rules = rules
        self._format = ToolFormat.JSON if rules.forced else chat_format.tools if chat_format and rules.tools else None
        self._may_reason = rules.reasoning and chat_format is not None and chat_format.reasons
        self._is_reasoning = self._may_reason and chat_format is not None and chat_format.reasoning_began
        self._held = ""
        """Text that may begin a mark, or belongs to a call that has not ended."""
        self._in_call = False
        self._space = ""
        """White space before text: it does not count where a tool call follows."""
        self._has_text = False
        self._after_reasoning = False
        self._calls = 0

    @property
    def has_calls(self) -> bool:
        """Whether a tool call was read."""
        return self._calls > 0

    def feed(self, text: str) -> list[Parsed]:
        """Add a piece of text; return what is certain with it."""
        if not self._may_reason and self._format is None:
            return [ParsedText(text)] if text else []
        self._held += text
        return list(self._read(last=False))

    def finish(self) -> list[Parsed]:
        """Return the rest, when no more text comes."""
        rest = list(self._read(last=True))
        if self._space and not self._calls:
            rest.append(ParsedText(self._space))
        return rest

    def _read(self, *, last: bool) -> Iterator[Parsed]:
        while True:
            before = (self._held, self._is_reasoning, self._in_call)
            if self._is_reasoning:
                yield from self._read_reasoning(last=last)
            elif self._in_call:
                yield from self._read_call(last=last)
            else:
                yield from self._read_answer(last=last)
            if before == (self._held, self._is_reasoning, self._in_call):
                return

    def _read_reasoning(self, *, last: bool) -> Iterator[Parsed]:
        text, found = self._take_until([THINK_END], last=last)
        if text:
            yield ParsedReasoning(text)
        if found:
            self._is_reasoning, self._after_reasoning = False, True

    def _read_answer(self, *, last: bool) -> Iterator[Parsed]:
        marks = [THINK_BEGIN] if self._may_reason and not self._has_text else []
        if self._format is not None:
            marks += {
                ToolFormat.HERMES: [_HERMES_BEGIN],
                ToolFormat.MISTRAL: [MISTRAL_BEGIN],
                ToolFormat.LLAMA3: [_LLAMA_TAG] if self._has_text else [_LLAMA_TAG, "{"],
                ToolFormat.JSON: [] if self._has_text else ["{"],
            }.get(self._format, [])
        text, found = self._take_until(marks, last=last)
        yield from self._answer(text)
        if found in {THINK_BEGIN, "{"} and self._has_text:  # they count at the beginning only
            yield from self._answer(found)
        elif found == THINK_BEGIN:
            self._is_reasoning = True
        elif found:
            self._in_call = True
            self._space = ""
            if found == "{":
                self._held = found + self._held

    def _read_call(self, *, last: bool) -> Iterator[Parsed]:
        begin, end = {ToolFormat.HERMES: (_HERMES_BEGIN, _HERMES_END), ToolFormat.MISTRAL: (MISTRAL_BEGIN, None)}.get(
            self._format or ToolFormat.JSON, ("", None)
        )
        position = self._held.find(end) if end else -1
        if self._format is ToolFormat.JSON and not may_become_call(self._held):
            self._format, self._in_call = None, False
            return
        if position < 0 and not last:
            return
        body = self._held if position < 0 else self._held[:position]
        self._held = "" if position < 0 else self._held[position + len(end or "") :]
        self._in_call = False
        calls = parse_calls(body, self._format, self._rules.tools)
        if not calls or self._calls + len(calls) > MAX_CALLS:
            if body:
                yield from self._answer(begin + body + (end or "" if position >= 0 else ""))
            return
        for call in calls:
            if not (self._rules.single and self._calls):
                self._calls += 1
                yield ToolCall(new_id(self._format), *call)

    def _answer(self, text: str) -> Iterator[Parsed]:
        """Yield text without the white space around it that belongs to marks."""
        if not self._has_text and (self._after_reasoning or self._calls):
            text = text.lstrip()
        text = self._space + text
        kept = text.rstrip() if self._format is not None else text
        self._space = text[len(kept) :]
        if kept:
            self._has_text = True
            yield ParsedText(kept)

    def _take_until(self, marks: list[str], *, last: bool) -> tuple[str, str]:
        """Take the held text up to the first mark, which is taken, too; or as far as no mark can begin there."""
        places = [(place, mark) for mark in marks if (place := self._held.find(mark)) >= 0]
        if places:
            place, mark = min(places)
            text, self._held = self._held[:place], self._held[place + len(mark) :]
            return text, mark
        kept = 0 if last else max((overlap(self._held, mark) for mark in marks), default=0)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text, ""


def overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text begin a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
