"""Request bodies of the OpenAI API's `/v1/responses`."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.endpoint import AnswerWriter, wants_details
from node.api.fields import (
    Fields,
    check_depth,
    number_between,
    parse_boolean,
    parse_json,
    parse_limit,
    parse_method,
    parse_object,
    parse_quality,
    parse_text,
    parse_top_p,
    refuse,
)
from node.api.generation import Generation
from node.api.openai.messages import MAX_MESSAGES, MAX_TOOLS, parse_arguments
from node.api.openai.requests import EXTENSIONS, REASONING_EFFORTS
from node.api.openai.response_events import ResponseWriter
from node.api.schemas import ANY_OBJECT, schema_text
from node.api.tool_choice import ToolChoice, choose_tools
from node.coordinator.submission import ChatMessage, JobRequest, MessageToolCall
from protocol.measurements import QualityBound

IMPLEMENTED: Final = frozenset({
    "model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "stream", "tools", "tool_choice",
    "parallel_tool_calls", "text", "reasoning", "metaswarm",
})  # fmt: skip
IGNORED: Final = frozenset({
    "metadata", "store", "user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "stream_options",
})  # fmt: skip
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt", "max_tool_calls", "context_management"), ()),
    "background": (False,),
    "include": ([], ["reasoning.encrypted_content"]),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def parse_response_request(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /v1/responses` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(IMPLEMENTED | IGNORED | NEUTRAL.keys())
    fields.refuse_unless_neutral(NEUTRAL)
    model = fields.get("model", parse_text)
    turns = fields.get("input", _parse_input)
    if not model:
        refuse("model", "is missing")
    if not turns:
        refuse("input", "is missing")
    instructions = fields.get("instructions", parse_text)
    if instructions:
        turns = (ChatMessage(role="system", content=instructions), *turns)
    extras = Fields(fields.get("metaswarm", parse_object) or {}, "metaswarm.")
    extras.refuse_unless_known(EXTENSIONS)
    temperature = fields.get("temperature", number_between(0, 2))
    choice = _parse_tools(fields)
    reasoning = Fields(fields.get("reasoning", parse_object) or {}, "reasoning.")
    reasoning.refuse_unless_known({"effort", "summary", "generate_summary"})
    effort = reasoning.get("effort", parse_text)
    if effort is not None and effort not in REASONING_EFFORTS:
        refuse("reasoning.effort", f"must be one of {', '.join(REASONING_EFFORTS)}")
    job = JobRequest(
        model=model,
        messages=turns,
        max_tokens=fields.get("max_output_tokens", parse_limit),
        temperature=1.0 if temperature is None else temperature,
        top_p=fields.get("top_p", parse_top_p) or 1.0,
        ignore_eos=extras.get("ignore_eos", parse_boolean) or False,
        quality=extras.get("quality", parse_quality) or QualityBound.EXACT,
        method=extras.get("method", parse_method) or "auto",
        template_options={} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"},
    )
    generation = Generation(
        jobs=(choice.apply(job),),
        stream=fields.get("stream", parse_boolean) or False,
        rules=choice.rules,
        details=fields.get("metaswarm", parse_object) is not None or wants_details(headers),
    )
    echoed = fields.echo(_ECHOED)
    for name in ("metadata", "user"):
        check_depth(name, echoed[name])
    return generation, ResponseWriter(generation, instructions, echoed)


_ECHOED: Final[Mapping[str, Any]] = {
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "user": None,
}
"""Fields of the request that the answer repeats, and their defaults."""


def _parse_text_format(param: str, value: Any) -> str:
    """Return the JSON Schema that a format means."""
    text = Fields(parse_object(param, value), f"{param}.")
    text.refuse_unless_known({"format", "verbosity"})
    text.refuse_unless_neutral({"verbosity": ("medium",)})
    form = Fields(text.get("format", parse_object) or {"type": "text"}, f"{param}.format.")
    form.refuse_unless_known({"type", "name", "description", "schema", "strict"})
    match form.get("type", parse_text):
        case "text":
            return ""
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            return form.get("schema", schema_text) or refuse(f"{param}.format.schema", "is missing")
    return refuse(f"{param}.format.type", "must be text, json_object or json_schema")


def _parse_tools(fields: Fields) -> ToolChoice:
    tools = fields.get("tools", _parse_tool_list) or ()
    choice = fields.get("tool_choice", _parse_choice) or "auto"
    single = fields.get("parallel_tool_calls", parse_boolean) is False
    schema = fields.get("text", _parse_text_format) or ""
    return choose_tools(tools, choice, single=single, schema=schema, param="text")


def _parse_choice(param: str, value: Any) -> str:
    """Return `none`, `auto`, `required`, or the name of a tool."""
    if isinstance(value, dict):
        choice = Fields(value, f"{param}.")
        choice.refuse_unless_known({"type", "name"})
        name = choice.get("name", parse_text)
        if choice.get("type", parse_text) != "function" or not name:
            refuse(param, 'must be {"type": "function", "name": …}')
        return name
    if not isinstance(value, str) or value not in {"none", "auto", "required"}:
        refuse(param, "must be none, auto, required, or a function")
    return value


def _parse_tool_list(param: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return tools as chat templates take them."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        refuse(param, f"must be a list of at most {MAX_TOOLS} tools")
    check_depth(param, value)
    tools = []
    for index, each in enumerate(value):
        tool = Fields(parse_object(f"{param}[{index}]", each), f"{param}[{index}].")
        if tool.get("type", parse_text) != "function":
            refuse(f"{param}[{index}].type", "must be function: no other type is supported")
        tool.refuse_unless_known({"type", "name", "description", "parameters", "strict"})
        name = tool.get("name", parse_text)
        if not name:
            refuse(f"{param}[{index}].name", "is missing")
        function: dict[str, Any] = {"name": name, "parameters": tool.get("parameters", parse_object) or {}}
        if (description := tool.get("description", parse_text)) is not None:
            function["description"] = description
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _parse_input(param: str, value: Any) -> tuple[ChatMessage, ...]:
    if isinstance(value, str):
        return (ChatMessage(role="user", content=parse_text(param, value)),)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        refuse(param, f"must be a text or a list of 1 to {MAX_MESSAGES} items")
    turns = (_parse_item(f"{param}[{index}]", each) for index, each in enumerate(value))
    return _merge_assistant_turns(turn for turn in turns if turn is not None)


def _merge_assistant_turns(turns: Iterable[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return turns with those of the assistant that follow each other as one: here each call is an item of its own."""
    merged: list[ChatMessage] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role == "assistant":
            before = merged.pop()
            calls = (*before.tool_calls, *turn.tool_calls)
            turn = replace(before, content=before.content + turn.content, tool_calls=calls)
        merged.append(turn)
    return tuple(merged)


def _parse_item(param: str, value: Any) -> ChatMessage | None:
    """Return the turn that an item makes; reasoning of earlier turns makes none."""
    item = Fields(parse_object(param, value), f"{param}.")
    match item.get("type", parse_text) or "message":
        case "message":
            role = item.get("role", parse_text)
            if role not in _ROLES:
                refuse(f"{param}.role", f"must be one of {', '.join(_ROLES)}")
            content = item.get("content", _parse_content)
            if content is None:
                refuse(f"{param}.content", "is missing")
            return ChatMessage(role=_ROLES[role], content=content)
        case "function_call":
            call = MessageToolCall(
                id=item.get("call_id", parse_text) or f"call_{secrets.token_hex(12)}",
                name=item.get("name", parse_text) or refuse(f"{param}.name", "is missing"),
                arguments=item.get("arguments", parse_arguments) or {},
            )
            return ChatMessage(role="assistant", content="", tool_calls=(call,))
        case "function_call_output":
            output = item.get("output", _parse_content) or ""
            return ChatMessage(role="tool", content=output, tool_call_id=item.get("call_id", parse_text) or "")
        case "reasoning":
            return None
        case "item_reference":
            refuse(f"{param}.type", "item_reference is not supported, as no response is stored: send the items")
    return refuse(f"{param}.type", "must be message, function_call, function_call_output or reasoning")


def _parse_content(param: str, value: Any) -> str:
    if not isinstance(value, list):
        return parse_text(param, value)
    texts = []
    for index, each in enumerate(value):
        part = Fields(parse_object(f"{param}[{index}]", each), f"{param}[{index}].")
        text = part.get("text", parse_text)
        if part.get("type", parse_text) not in {"input_text", "output_text", "text"} or text is None:
            refuse(f"{param}[{index}]", "must be of type input_text or output_text: no other type is supported")
        texts.append(text)
    return "".join(texts)
