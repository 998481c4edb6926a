"""Request bodies of the OpenAI API's `/v1/responses`."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.endpoint import AnswerWriter
from node.api.fields import (
    Field,
    Fields,
    ObjectForm,
    check_depth,
    form,
    list_of,
    one_of,
    parse_json,
    parse_limit,
    parse_name,
    parse_object,
    parse_text,
    refuse,
)
from node.api.generation import Generation
from node.api.openai.messages import ARGUMENTS, MAX_MESSAGES, NAME, join_turns
from node.api.openai.response_events import ResponseWriter
from node.api.openai.response_tools import TOOL_CHOICE, TOOLS, FunctionName, ResponseTool
from node.api.schemas import ANY_OBJECT, parse_schema
from node.api.shared_fields import (
    BUDGET,
    CACHE_FIELDS,
    EFFORT,
    EXTENSIONS,
    IGNORE_EOS,
    METASWARM,
    METHOD,
    MODEL,
    OBJECTIVE,
    PARALLEL_TOOL_CALLS,
    QUALITY,
    STREAM,
    TEMPERATURE,
    TOP_P,
    TRACE,
    asks_details,
    text_or_parts,
)
from node.api.tool_choice import ToolChoice, choose_tools
from node.coordinator.chat import ChatMessage, MessageToolCall
from node.coordinator.submission import JobRequest
from protocol.measurements import Objective, QualityBound

IGNORED: Final = CACHE_FIELDS | {
    "metadata", "store", "user", "service_tier", "safety_identifier", "stream_options", "client_metadata",
}  # fmt: skip
"""The last one is Codex's."""
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt", "max_tool_calls", "context_management"), ()),
    **dict.fromkeys(("moderation", "background_options", "image", "access_programs"), ()),
    "background": (False,),
    "include": ([], ["reasoning.encrypted_content"]),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_FORMAT_TYPE: Final = Field("type", one_of("text", "json_object", "json_schema"))
_FORMAT_SCHEMA: Final = Field("schema", parse_schema)
_FORMAT: Final = Field(
    "format",
    ObjectForm(_FORMAT_TYPE, _FORMAT_SCHEMA, required=[_FORMAT_TYPE], ignored=["name", "description", "strict"]).form,
)
_TEXT_OPTIONS: Final = ObjectForm(_FORMAT, neutral={"verbosity": ("medium",)})


@form(_TEXT_OPTIONS.schema)
def _parse_text_options(param: str, value: Any) -> str:
    """Return the JSON Schema that a format means; empty for any text."""
    found = _TEXT_OPTIONS.parse(param, value).get(_FORMAT)
    kind = found.require(_FORMAT_TYPE) if found else "text"
    schema = found.get(_FORMAT_SCHEMA) if found else None
    if kind != "json_schema":
        return ANY_OBJECT if kind == "json_object" else ""
    return schema or refuse(f"{param}.format.schema", "is missing")


_parse_content: Final = text_or_parts("input_text", "output_text", "text")

_ROLE: Final = Field("role", one_of(*_ROLES))
_CONTENT: Final = Field("content", _parse_content)
_CALL_ID: Final = Field("call_id", parse_text)
_OUTPUT: Final = Field("output", _parse_content)
_NAMESPACE: Final = Field("namespace", parse_name)
_ITEMS: Final = {
    "message": ObjectForm(_ROLE, _CONTENT, required=[_ROLE, _CONTENT], is_open=True),
    "function_call": ObjectForm(_CALL_ID, NAME, _NAMESPACE, ARGUMENTS, required=[NAME], is_open=True),
    "function_call_output": ObjectForm(_CALL_ID, _OUTPUT, is_open=True),
    "reasoning": ObjectForm(is_open=True),
}


def _item_schema(kind: str) -> dict[str, Any]:
    """Return the schema of an item of a type, which is `message` where it is left out."""
    schema = dict(_ITEMS[kind].schema)
    types: list[str | None] = [kind, None] if kind == "message" else [kind]
    required = [*schema.get("required", []), *([] if kind == "message" else ["type"])]
    return schema | {"properties": {**schema["properties"], "type": {"enum": types}}, "required": required}


@form({"anyOf": [_item_schema(kind) for kind in _ITEMS]})
def _parse_item(param: str, value: Any) -> ChatMessage | None:
    """Return the turn that an item makes; reasoning of earlier turns makes none."""
    kind = parse_object(param, value).get("type")
    kind = "message" if kind is None else kind
    if kind == "item_reference":
        refuse(f"{param}.type", "item_reference is not supported, as no response is stored: send the items")
    if not isinstance(kind, str) or kind not in _ITEMS:
        refuse(f"{param}.type", f"must be one of {', '.join(_ITEMS)}")
    item = _ITEMS[kind].parse(param, value)
    match kind:
        case "message":
            role = item.require(_ROLE)
            return ChatMessage(role=_ROLES[role], content=item.require(_CONTENT))
        case "function_call":
            call = MessageToolCall(
                id=item.get(_CALL_ID) or f"call_{secrets.token_hex(12)}",
                name=FunctionName(item.require(NAME), item.get(_NAMESPACE)).for_model,
                arguments=item.get(ARGUMENTS) or {},
            )
            return ChatMessage(role="assistant", content="", tool_calls=(call,))
        case "function_call_output":
            return ChatMessage(role="tool", content=item.get(_OUTPUT) or "", tool_call_id=item.get(_CALL_ID) or "")
    return None


_parse_items: Final = list_of(_parse_item, "items", MAX_MESSAGES, least=1)


@form({"anyOf": [{"type": "string"}, _parse_items.schema]})
def _parse_input(param: str, value: Any) -> tuple[ChatMessage, ...]:
    if isinstance(value, str):
        return (ChatMessage(role="user", content=parse_text(param, value)),)
    # Here each call is an item of its own.
    return join_turns((turn for turn in _parse_items(param, value) if turn is not None), {"assistant"})


def _merge_leading_instructions(turns: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    """Return turns with those of the system at their beginning as one: many chat templates take one only."""
    leading = tuple(takewhile(lambda turn: turn.role == "system", turns))
    if len(leading) < 2:
        return turns
    return (replace(leading[0], content="\n\n".join(turn.content for turn in leading)), *turns[len(leading) :])


_INPUT: Final = Field("input", _parse_input)
_INSTRUCTIONS: Final = Field("instructions", parse_text)
_MAX_OUTPUT_TOKENS: Final = Field("max_output_tokens", parse_limit)
_TEXT_FORMAT: Final = Field("text", _parse_text_options)
_REASONING_FORM: Final = ObjectForm(
    EFFORT, ignored=["summary", "generate_summary"],
    neutral={"context": ("auto", "current_turn"), "mode": ("standard",)},
)  # fmt: skip
_REASONING: Final = Field("reasoning", _REASONING_FORM.form)

RESPONSE: Final = ObjectForm(
    MODEL, _INPUT, _INSTRUCTIONS, _MAX_OUTPUT_TOKENS, TEMPERATURE, TOP_P, STREAM, TOOLS, TOOL_CHOICE,
    PARALLEL_TOOL_CALLS, _TEXT_FORMAT, _REASONING, METASWARM,
    required=[MODEL, _INPUT], ignored=IGNORED, neutral=NEUTRAL,
)  # fmt: skip


def parse_response_request(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /v1/responses` as a request. Raises ApiError."""
    fields = RESPONSE.read(parse_json(body))
    model = fields.require(MODEL)
    turns = fields.require(_INPUT) or refuse("input", "has no turn")
    instructions = fields.get(_INSTRUCTIONS)
    if instructions:
        turns = (ChatMessage(role="system", content=instructions), *turns)
    extras = fields.get(METASWARM) or EXTENSIONS.read({})
    temperature = fields.get(TEMPERATURE)
    tools = fields.get(TOOLS) or ()
    choice = _choose_tools(fields, tools)
    reasoning = fields.get(_REASONING)
    effort = reasoning.get(EFFORT) if reasoning else None
    job = JobRequest(
        model=model,
        messages=_merge_leading_instructions(turns),
        max_tokens=fields.get(_MAX_OUTPUT_TOKENS),
        temperature=1.0 if temperature is None else temperature,
        top_p=fields.get(TOP_P) or 1.0,
        ignore_eos=extras.get(IGNORE_EOS) or False,
        quality=extras.get(QUALITY) or QualityBound.EXACT,
        objective=extras.get(OBJECTIVE) or Objective.LATENCY,
        budget=extras.get(BUDGET),
        method=extras.get(METHOD) or "auto",
        trace=extras.get(TRACE) or False,
        template_options={} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"},
    )
    generation = Generation(
        jobs=(choice.apply(job),),
        stream=fields.get(STREAM) or False,
        rules=choice.rules,
        details=asks_details(fields, headers),
    )
    echoed = fields.echo(_ECHOED) | {"reasoning": {"effort": effort, "summary": None}}
    for name in ("metadata", "user"):
        check_depth(name, echoed[name])
    functions = {tool.name.for_model: tool.name for tool in tools}
    return generation, ResponseWriter(generation, instructions, echoed, functions)


def _choose_tools(fields: Fields, tools: Sequence[ResponseTool]) -> ToolChoice:
    choice = fields.get(TOOL_CHOICE) or "auto"
    single, schema = fields.get(PARALLEL_TOOL_CALLS) is False, fields.get(_TEXT_FORMAT) or ""
    return choose_tools(tuple(tool.described for tool in tools), choice, single=single, schema=schema, param="text")


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
