"""Feeds texts to the parsers of models' outputs."""

from node.api.channel_parser import ChannelParser
from node.api.output_parser import OutputParser, ParsedReasoning, ParsedText
from node.api.tool_calls import ToolCall


def parse(parser: OutputParser | ChannelParser, text: str, size: int) -> tuple[str, str, list[tuple[str, str]]]:
    """Return answer, reasoning and tool calls of a text that comes in pieces of a size."""
    parsed = [each for start in range(0, len(text), size) for each in parser.feed(text[start : start + size])]
    parsed += parser.finish()
    answer = "".join(each.text for each in parsed if isinstance(each, ParsedText))
    reasoning = "".join(each.text for each in parsed if isinstance(each, ParsedReasoning))
    calls = [(each.name, each.arguments) for each in parsed if isinstance(each, ToolCall)]
    assert parser.has_calls == bool(calls)
    return answer, reasoning, calls
