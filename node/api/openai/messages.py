"""Conversations and tools in the bodies of the OpenAI API."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, Final

from node.api.fields import (
    Field,
    Fields,
    ObjectForm,
    check_depth,
    form,
    list_of,
    one_of,
    parse_name,
    parse_object,
    parse_text,
    refuse,
)
from node.api.shared_fields import CACHE_MARKS, PARALLEL_TOOL_CALLS, join_texts, text_or_parts, tool_choice
from node.api.tool_calls import decode_arguments
from node.api.tool_choice import ToolChoice, choose_tools
from node.coordinator.chat import ChatMessage, MessageToolCall

MAX_MESSAGES: Final = 4096
MAX_TOOLS: Final = 128

NEUTRAL_IN_MESSAGE: Final[Mapping[str, tuple[Any, ...]]] = {
    "annotations": ([],),
    **dict.fromkeys(("function_call", "audio"), ()),
    "refusal": ("",),
    "type": ("message", "text"),  # of the Responses API, and what lm-evaluation-harness makes of a turn
}

IGNORED_IN_MESSAGE: Final = ("cot_id", "cot_summary", "provider_specific_fields", "thinking_blocks")
"""What Copilot and LiteLLM add to the answers that they send back: LiteLLM's is also in `reasoning_content`."""

# Chat templates know the older name of the role that instructs the model.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def continues_final_message(param: str, turns: Sequence[ChatMessage]) -> bool:
    """Return whether a conversation ends with a turn of the assistant, which the answer is to continue (prefill)."""
    if not turns or turns[-1].role != "assistant":
        return False
    if turns[-1].tool_calls:
        refuse(param, "ends with tool calls: add a turn with the result of each")
    return True


def join_turns(turns: Iterable[ChatMessage], roles: Collection[str]) -> tuple[ChatMessage, ...]:
    """Return turns; those of one of some roles that follow each other are one."""
    joined: list[ChatMessage] = []
    for role, group in groupby(turns, key=attrgetter("role")):
        same = list(group)
        if role in roles:
            content, reasoning = (join_texts(map(attrgetter(name), same)) for name in ("content", "reasoning"))
            calls = tuple(call for turn in same for call in turn.tool_calls)
            same = [ChatMessage(role=role, content=content, tool_calls=calls, reasoning=reasoning)]
        joined += same
    return tuple(joined)


def parse_tools(fields: Fields, schema: str = "") -> ToolChoice:
    """Return what a body says of tools, beside the JSON Schema of the answer."""
    tools = fields.get(TOOLS) or ()
    choice = fields.get(TOOL_CHOICE) or "auto"
    return choose_tools(tools, choice, single=fields.get(PARALLEL_TOOL_CALLS) is False, schema=schema)


NAME: Final = Field("name", parse_name)
DESCRIPTION: Final = Field("description", parse_text)
PARAMETERS: Final = Field("parameters", parse_object)
IS_FUNCTION: Final = Field("type", one_of("function"))

_NAMED_FUNCTION: Final = Field("function", ObjectForm(NAME, required=[NAME]).form)
_CHOICE: Final = ObjectForm(IS_FUNCTION, _NAMED_FUNCTION, required=[IS_FUNCTION, _NAMED_FUNCTION])


def _chosen_name(fields: Fields) -> str:
    fields.require(IS_FUNCTION)
    return fields.require(_NAMED_FUNCTION).require(NAME)


_parse_choice: Final = tool_choice(_CHOICE, _chosen_name)

_FUNCTION: Final = Field(
    "function", ObjectForm(NAME, DESCRIPTION, PARAMETERS, required=[NAME], ignored=["strict"]).form
)
_TOOL: Final = ObjectForm(IS_FUNCTION, _FUNCTION, required=[IS_FUNCTION, _FUNCTION])


@form(_TOOL.schema)
def _parse_tool(param: str, value: Any) -> Mapping[str, Any]:
    check_depth(param, value)
    fields = _TOOL.parse(param, value)
    fields.require(IS_FUNCTION)
    function = fields.require(_FUNCTION)
    return described_tool(function.require(NAME), function.get(DESCRIPTION), function.get(PARAMETERS))


def described_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a tool as chat templates take it."""
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


@form({})
def parse_arguments(param: str, value: Any) -> dict[str, Any]:
    """Return the arguments of a tool call: an object, or one as JSON.

    Models of other servers write other things, too, and their calls are sent back with the conversation: what is no
    object becomes one, as chat templates need it.
    """
    if isinstance(value, str):
        decoded = decode_arguments(parse_text(param, value))
        return {"arguments": value} if decoded is None else decoded
    check_depth(param, value)
    return value if isinstance(value, dict) else {"arguments": value}


ID: Final = Field("id", parse_text)
ARGUMENTS: Final = Field("arguments", parse_arguments)
_CALLED: Final = Field("function", ObjectForm(NAME, ARGUMENTS, required=[NAME], is_open=True).form)
_CALL: Final = ObjectForm(ID, _CALLED, required=[_CALLED], ignored=["type", "index", "provider_specific_fields"])


@form(_CALL.schema)
def _parse_call(param: str, value: Any) -> MessageToolCall:
    fields = _CALL.parse(param, value)
    function = fields.require(_CALLED)
    return MessageToolCall(
        id=fields.get(ID) or "", name=function.require(NAME), arguments=function.get(ARGUMENTS) or {}
    )


parse_content: Final = text_or_parts("text", ignored=CACHE_MARKS)

_ROLE: Final = Field("role", one_of(*_ROLES))
_CONTENT: Final = Field("content", parse_content)
TOOL_CALLS: Final = Field("tool_calls", list_of(_parse_call, "tool calls", MAX_TOOLS))
_TOOL_CALL_ID: Final = Field("tool_call_id", parse_text)
_AUTHOR: Final = Field("name", parse_text)
_REASONING_CONTENT: Final = Field("reasoning_content", parse_text)
_REASONING: Final = Field("reasoning", parse_text)
MESSAGE: Final = ObjectForm(
    _ROLE, _CONTENT, TOOL_CALLS, _TOOL_CALL_ID, _AUTHOR, _REASONING_CONTENT, _REASONING,
    required=[_ROLE], ignored=IGNORED_IN_MESSAGE, neutral=NEUTRAL_IN_MESSAGE,
)  # fmt: skip


@form(MESSAGE.schema)
def _parse_message(param: str, value: Any) -> ChatMessage:
    fields = MESSAGE.parse(param, value)
    role = fields.require(_ROLE)
    calls = fields.get(TOOL_CALLS) or ()
    if calls and role != "assistant":
        refuse(f"{param}.tool_calls", "belongs to the assistant's turns")
    content = fields.get(_CONTENT)
    if content is None and role == "assistant":  # a turn that only called a tool
        content = ""
    if content is None:
        refuse(f"{param}.content", "is missing")
    call_id, author = fields.get(_TOOL_CALL_ID) or "", fields.get(_AUTHOR) or ""
    is_tool = role == "tool"
    return ChatMessage(
        role=_ROLES[role],
        content=content,
        tool_calls=calls,
        tool_call_id=call_id if is_tool else "",
        name=author if is_tool else "",
        reasoning=fields.get(_REASONING_CONTENT) or fields.get(_REASONING) or "",
    )


MESSAGES: Final = Field("messages", list_of(_parse_message, "messages", MAX_MESSAGES, least=1))
TOOLS: Final = Field("tools", list_of(_parse_tool, "tools", MAX_TOOLS))
TOOL_CHOICE: Final = Field("tool_choice", _parse_choice)
