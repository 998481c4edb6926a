"""Conversations and tools in the bodies of the OpenAI API."""

import json
from collections.abc import Mapping
from typing import Any, Final

from node.api.fields import Fields, check_depth, parse_boolean, parse_object, parse_text, refuse
from node.api.tool_choice import ToolChoice, choose_tools
from node.coordinator.submission import ChatMessage, MessageToolCall

MAX_MESSAGES: Final = 4096
MAX_TOOLS: Final = 128

NEUTRAL_IN_MESSAGE: Final[Mapping[str, tuple[Any, ...]]] = {
    "annotations": ([],),
    **dict.fromkeys(("function_call", "audio"), ()),
    "refusal": ("",),
}
MESSAGE_FIELDS: Final = frozenset({
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning",
})  # fmt: skip

# Chat templates know the older name of the role that instructs the model.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def parse_tools(fields: Fields, schema: str = "", param: str = "response_format") -> ToolChoice:
    """Return what a body says of tools, beside the JSON Schema of the answer, from the field `param`."""
    tools = fields.get("tools", _parse_tools) or ()
    choice = fields.get("tool_choice", _parse_choice) or "auto"
    single = fields.get("parallel_tool_calls", parse_boolean) is False
    return choose_tools(tools, choice, single=single, schema=schema, param=param)


def _parse_choice(param: str, value: Any) -> str:
    """Return `none`, `auto`, `required`, or the name of a tool."""
    if isinstance(value, dict):
        fields = Fields(value, f"{param}.")
        fields.refuse_unless_known({"type", "function"})
        function = Fields(fields.get("function", parse_object) or {}, f"{param}.function.")
        name = function.get("name", parse_text)
        if fields.get("type", parse_text) != "function" or not name:
            refuse(param, 'must be {"type": "function", "function": {"name": …}}')
        return name
    if not isinstance(value, str) or value not in {"none", "auto", "required"}:
        refuse(param, "must be none, auto, required, or a function")
    return value


def _parse_tools(param: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        refuse(param, f"must be a list of at most {MAX_TOOLS} tools")
    check_depth(param, value)
    return tuple(_parse_tool(f"{param}[{index}]", each) for index, each in enumerate(value))


def _parse_tool(param: str, value: Any) -> Mapping[str, Any]:
    fields = Fields(parse_object(param, value), f"{param}.")
    if fields.get("type", parse_text) != "function":
        refuse(f"{param}.type", "must be function: no other type is supported")
    fields.refuse_unless_known({"type", "function"})
    function = Fields(fields.get("function", parse_object) or {}, f"{param}.function.")
    function.refuse_unless_known({"name", "description", "parameters", "strict"})
    if not function.get("name", parse_text):
        refuse(f"{param}.function.name", "is missing")
    function.get("description", parse_text)
    function.get("parameters", parse_object)
    return {"type": "function", "function": {k: v for k, v in value["function"].items() if k != "strict"}}


def parse_messages(param: str, value: Any) -> tuple[ChatMessage, ...]:
    """Return the turns of a conversation."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        refuse(param, f"must be a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_parse_message(f"{param}[{index}]", each) for index, each in enumerate(value))


def _parse_message(param: str, value: Any) -> ChatMessage:
    fields = Fields(parse_object(param, value), f"{param}.")
    role = fields.get("role", parse_text)
    if role not in _ROLES:
        refuse(f"{param}.role", f"must be one of {', '.join(_ROLES)}")
    fields.refuse_misspelt({*MESSAGE_FIELDS, *NEUTRAL_IN_MESSAGE})
    fields.refuse_unless_neutral(NEUTRAL_IN_MESSAGE)
    calls = fields.get("tool_calls", parse_tool_calls) or ()
    if calls and role != "assistant":
        refuse(f"{param}.tool_calls", "belongs to the assistant's turns")
    content = fields.get("content", parse_content)
    if content is None and role == "assistant":  # a turn that only called a tool
        content = ""
    if content is None:
        refuse(f"{param}.content", "is missing")
    is_tool = role == "tool"
    return ChatMessage(
        role=_ROLES[role],
        content=content,
        tool_calls=calls,
        tool_call_id=(fields.get("tool_call_id", parse_text) or "") if is_tool else "",
        name=(fields.get("name", parse_text) or "") if is_tool else "",
        reasoning=fields.get("reasoning_content", parse_text) or fields.get("reasoning", parse_text) or "",
    )


def parse_tool_calls(param: str, value: Any) -> tuple[MessageToolCall, ...]:
    """Return the tool calls of an earlier turn."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        refuse(param, f"must be a list of at most {MAX_TOOLS} tool calls")
    check_depth(param, value)
    return tuple(_parse_call(f"{param}[{index}]", each) for index, each in enumerate(value))


def _parse_call(param: str, value: Any) -> MessageToolCall:
    fields = Fields(parse_object(param, value), f"{param}.")
    fields.refuse_unless_known({"id", "type", "function", "index"})
    function = Fields(fields.get("function", parse_object) or {}, f"{param}.function.")
    name = function.get("name", parse_text)
    if not name:
        refuse(f"{param}.function.name", "is missing")
    return MessageToolCall(
        id=fields.get("id", parse_text) or "", name=name, arguments=function.get("arguments", parse_arguments) or {}
    )


def parse_arguments(param: str, value: Any) -> dict[str, Any]:
    """Return the arguments of a tool call: an object, or one as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            refuse(param, "must be a JSON object, as text")
    check_depth(param, value)
    return parse_object(param, value)


def parse_content(param: str, value: Any) -> str:
    """Return the text of a turn: a text, or parts of type `text`."""
    if not isinstance(value, list):
        return parse_text(param, value)
    texts = []
    for index, part in enumerate(value):
        fields = Fields(parse_object(f"{param}[{index}]", part), f"{param}[{index}].")
        fields.refuse_misspelt({"type", "text", "image_url", "input_audio", "file", "refusal", "cache_control"})
        text = fields.get("text", parse_text)
        if fields.get("type", parse_text) != "text" or text is None:
            refuse(f"{param}[{index}]", "must be of type text: no other type is supported")
        texts.append(text)
    return "".join(texts)
