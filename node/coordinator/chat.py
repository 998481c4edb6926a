"""Conversations as chat templates take them, and what a template says of how its model writes."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ToolFormat(enum.StrEnum):
    """How a model writes tool calls."""

    HARMONY = "harmony"
    """A message of the channel `commentary` to `functions.NAME`: gpt-oss."""
    HERMES = "hermes"
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen."""
    LLAMA3 = "llama3"
    """The whole text is `{"name": …, "parameters": …}`."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS]` and a list of `{"name": …, "arguments": …}`, or `name{…}`."""
    JSON = "json"
    """The whole text, or all behind its reasoning, is `{"name": …, "arguments": …}`, which a JSON Schema makes sure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How a model writes tool calls and reasoning, by its chat template.

    `tools`: None where it knows none. `reasons`: whether it may write reasoning. `reasoning_began`: whether the prompt
    ends within `<think>`. `channel`: of a model that writes in channels, the one in which the prompt ends: empty where
    the model names the first one itself, None of other models.
    """

    tools: ToolFormat | None = None
    reasons: bool = False
    reasoning_began: bool = False
    channel: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageToolCall:
    """A tool call in an earlier turn of the assistant."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation. `tool_call_id` and `name`: of the tool call that a turn of role `tool` answers."""

    role: str
    content: str
    tool_calls: tuple[MessageToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    reasoning: str = ""

    def for_template(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.tool_calls
            ]
        optional = {"tool_call_id": self.tool_call_id, "name": self.name, "reasoning_content": self.reasoning}
        if self.tool_calls and not self.content:  # gpt-oss's template takes both only apart, and by another name
            optional["thinking"] = self.reasoning
        return turn | {name: value for name, value in optional.items() if value}
