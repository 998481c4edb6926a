"""Reads a text in OpenAI's harmony format, as gpt-oss writes it: several messages, each with its channel.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`: analysis is reasoning, `final`
is the answer, `commentary` says what the model is about to do, or calls a tool if it has a recipient
(`to=functions.NAME`, on either side of the channel).
"""

import json
import re
from collections.abc import Iterator
from typing import Final

from node.api.output_parser import Parsed, ParsedReasoning, ParsedText, ParserRules, overlap
from node.api.tool_calls import MAX_CALLS, ToolCall, new_id, parse_calls
from node.coordinator.chat import ChatFormat, ToolFormat

_MESSAGE: Final = "<|message|>"
_BEGINS_OF_HEADER: Final = ("<|start|>", "<|channel|>", "to=", _MESSAGE)
_ENDS_OF_MESSAGE: Final = ("<|end|>", "<|start|>", "<|channel|>")
_MAX_HEADER_CHARACTERS: Final = 512
_LEADING_MARK: Final = re.compile(r"\s*<\|(?:start|channel)\|>")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s{0,16}(\w{1,64})")
_RECIPIENT: Final = re.compile(r"\bto=([\w.-]{1,300})")
_FUNCTIONS: Final = "functions."


class ChannelParser:
    """Reads the text of one choice, in pieces, as OutputParser does."""

    def __init__(self, rules: ParserRules, chat_format: ChatFormat | None) -> None:
        self._rules = rules
        self._channel = chat_format.channel if chat_format else None
        """Of the message that comes; empty while its header does."""
        self._recipient = ""
        self._held = ""
        """A header, a tool call, or what may begin the end of a message."""
        self._calls = 0

    @property
    def has_calls(self) -> bool:
        """Whether a tool call was read."""
        return self._calls > 0

    def feed(self, text: str) -> list[Parsed]:
        """Add a piece of text; return what is certain with it."""
        self._held += text
        return list(self._read(last=False))

    def finish(self) -> list[Parsed]:
        """Return the rest, when no more text comes."""
        return list(self._read(last=True))

    def _read(self, *, last: bool) -> Iterator[Parsed]:
        while True:
            before = self._held, self._channel
            if self._channel:
                yield from self._read_message(last=last)
            else:
                self._read_header(last=last)
            if before == (self._held, self._channel):
                return

    def _read_header(self, *, last: bool) -> None:
        header, mark, rest = self._held.partition(_MESSAGE)
        text = header.lstrip()
        length = len(header) if mark else len(header) - overlap(header, _MESSAGE)
        if not any(text.startswith(begin[: len(text)]) for begin in _BEGINS_OF_HEADER):
            self._channel, self._recipient = "final", ""  # a model that was trained to write otherwise
        elif length > _MAX_HEADER_CHARACTERS:
            self._channel, self._recipient = "final", ""
            leading = _LEADING_MARK.match(self._held)
            self._held = self._held[leading.end() if leading else 0 :]  # it would end this message, and begin it again
        elif mark:
            channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
            self._channel, self._recipient = channel[1] if channel else "final", recipient[1] if recipient else ""
            self._held = rest
        elif last:
            self._held = ""

    def _read_message(self, *, last: bool) -> Iterator[Parsed]:
        name = self._recipient.removeprefix(_FUNCTIONS) if self._recipient.startswith(_FUNCTIONS) else ""
        places = [(place, mark) for mark in _ENDS_OF_MESSAGE if (place := self._held.find(mark)) >= 0]
        end, mark = min(places) if places else (len(self._held), "")
        if not mark and not last:
            if name and self._rules.tools:
                return
            end -= max(overlap(self._held, each) for each in _ENDS_OF_MESSAGE)
        text, self._held = self._held[:end], self._held[end:].removeprefix("<|end|>")
        if name and self._rules.tools:
            yield from self._call(name, text)
        elif text:
            answers = self._channel != "analysis" and not self._recipient
            yield ParsedText(text) if answers else ParsedReasoning(text)
        if mark or last:
            self._channel = ""

    def _call(self, name: str, arguments: str) -> Iterator[Parsed]:
        if self._rules.single and self._calls:
            return
        call = f'{{"name": {json.dumps(name)}, "arguments": {arguments.strip() or "{}"}}}'
        read = parse_calls(call, ToolFormat.HARMONY, self._rules.tools)
        if len(read) == 1 and self._calls < MAX_CALLS:
            self._calls += 1
            yield ToolCall(new_id(ToolFormat.HARMONY), *read[0])
        elif arguments:
            yield ParsedText(arguments)
