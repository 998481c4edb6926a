"""Request bodies of the Anthropic API's `/v1/messages` and `/v1/messages/count_tokens`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.anthropic.answers import MessageWriter
from node.api.endpoint import AnswerWriter, wants_details
from node.api.fields import (
    Field,
    Fields,
    ObjectForm,
    check_depth,
    count_between,
    form,
    list_of,
    number_between,
    one_of,
    parse_boolean,
    parse_json,
    parse_object,
    parse_stop,
    parse_text,
    refuse,
)
from node.api.generation import Generation
from node.api.openai.messages import (
    DESCRIPTION,
    MAX_MESSAGES,
    MAX_TOOLS,
    NAME,
    continues_final_message,
    described_tool,
    join_turns,
    parse_arguments,
)
from node.api.schemas import parse_schema
from node.api.shared_fields import MAX_SEED, MAX_TOKENS, MODEL, STREAM, TOP_P, join_texts, text_or_parts
from node.api.tool_choice import ToolChoice, choose_tools
from node.coordinator.chat import ChatMessage, MessageToolCall
from node.coordinator.submission import JobRequest

IGNORED: Final = frozenset({"metadata", "service_tier", "cache_control", "user_profile_id", "inference_geo", "speed"})
_KEEP_THINKING: Final = {"type": "clear_thinking_20251015", "keep": "all"}
"""What Claude Code sends: all thinking blocks stay, as they do anyhow."""

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("container", "diagnostics", "prefill", "workspace_id"), ()),
    "context_management": ({"edits": []}, {"edits": [_KEEP_THINKING]}),
    "mcp_servers": ([],),
}
IGNORED_IN_TOOL: Final = ("cache_control", "strict", "eager_input_streaming", "input_examples")
NEUTRAL_IN_TOOL: Final[Mapping[str, tuple[Any, ...]]] = {"defer_loading": (False,), "allowed_callers": (["direct"],)}

_TEXT: Final = Field("text", parse_text)
_parse_text_blocks: Final = text_or_parts("text")

_ID: Final = Field("id", parse_text)
_INPUT: Final = Field("input", parse_arguments)
_THINKING_TEXT: Final = Field("thinking", parse_text)
_TOOL_USE_ID: Final = Field("tool_use_id", parse_text)
_RESULT: Final = Field("content", _parse_text_blocks)
_BLOCKS: Final = {
    "text": ObjectForm(_TEXT, is_open=True),
    "thinking": ObjectForm(_THINKING_TEXT, is_open=True),
    "tool_use": ObjectForm(_ID, NAME, _INPUT, required=[NAME], is_open=True),
    "tool_result": ObjectForm(_TOOL_USE_ID, _RESULT, is_open=True),
}


def _block_schema(kind: str) -> dict[str, Any]:
    schema = dict(_BLOCKS[kind].schema)
    properties = {**schema["properties"], "type": {"const": kind}}
    return schema | {"properties": properties, "required": [*schema.get("required", []), "type"]}


@form({"anyOf": [_block_schema(kind) for kind in _BLOCKS]})
def _parse_block(param: str, value: Any) -> str | MessageToolCall | ChatMessage | tuple[str]:
    """Return the text, the tool call, the turn of a tool's result, or the reasoning (in a tuple) of a block."""
    kind = parse_object(param, value).get("type")
    if not isinstance(kind, str) or kind not in _BLOCKS:
        refuse(param, f"must be of type {', '.join(_BLOCKS)}: no other type is supported")
    block = _BLOCKS[kind].parse(param, value)
    match kind:
        case "text":
            return block.get(_TEXT) or ""
        case "thinking":
            return (block.get(_THINKING_TEXT) or "",)
        case "tool_use":
            name = block.require(NAME)
            return MessageToolCall(id=block.get(_ID) or "", name=name, arguments=block.get(_INPUT) or {})
    content = block.get(_RESULT) or ""
    return ChatMessage(role="tool", content=content, tool_call_id=block.get(_TOOL_USE_ID) or "")


_parse_blocks: Final = list_of(_parse_block, "blocks", MAX_MESSAGES)
_Content = str | tuple[str | MessageToolCall | ChatMessage | tuple[str], ...]


@form({"anyOf": [{"type": "string"}, _parse_blocks.schema]})
def _parse_content(param: str, value: Any) -> _Content:
    if isinstance(value, str):
        return parse_text(param, value)
    if not isinstance(value, list):
        refuse(param, "must be a text or a list of blocks")
    return _parse_blocks(param, value)


_ROLE: Final = Field("role", one_of("user", "assistant", "system"))
_CONTENT: Final = Field("content", _parse_content)
_MESSAGE: Final = ObjectForm(_ROLE, _CONTENT, required=[_ROLE, _CONTENT])


@form(_MESSAGE.schema)
def _parse_message(param: str, value: Any) -> list[ChatMessage]:
    """Return the turns that a message makes: one for each result of a tool, and one for the rest."""
    fields = _MESSAGE.parse(param, value)
    role, content = fields.require(_ROLE), fields.require(_CONTENT)
    if isinstance(content, str):
        return [ChatMessage(role=role, content=content)]
    results = [each for each in content if isinstance(each, ChatMessage)]
    calls = tuple(each for each in content if isinstance(each, MessageToolCall))
    if results and role != "user":
        refuse(f"{param}.content", "may have tool_result blocks in the user's turns only")
    if calls and role != "assistant":
        refuse(f"{param}.content", "may have tool_use blocks in the assistant's turns only")
    texts = [each for each in content if isinstance(each, str)]
    reasoning = join_texts(each[0] for each in content if isinstance(each, tuple))
    if texts or calls or not results:
        results.append(ChatMessage(role=role, content=join_texts(texts), tool_calls=calls, reasoning=reasoning))
    return results


_TOOL_TYPE: Final = Field("type", one_of("custom"))
_INPUT_SCHEMA: Final = Field("input_schema", parse_object)
_TOOL: Final = ObjectForm(
    _TOOL_TYPE, NAME, DESCRIPTION, _INPUT_SCHEMA,
    required=[NAME], ignored=IGNORED_IN_TOOL, neutral=NEUTRAL_IN_TOOL,
)  # fmt: skip


@form(_TOOL.schema)
def _parse_tool(param: str, value: Any) -> Mapping[str, Any]:
    """Return a tool as chat templates take it."""
    check_depth(param, value)
    tool = _TOOL.parse(param, value)
    tool.get(_TOOL_TYPE)
    return described_tool(tool.require(NAME), tool.get(DESCRIPTION), tool.get(_INPUT_SCHEMA) or {})


_THINKING_TYPE: Final = Field("type", one_of("enabled", "disabled", "adaptive", "between_tools"))
_EFFORT: Final = Field("effort", one_of("low", "medium", "high", "xhigh", "max"))
_OUTPUT_TYPE: Final = Field("type", one_of("json_schema"))
_OUTPUT_SCHEMA: Final = Field("schema", parse_schema)
_OUTPUT_FORMAT: Final = Field(
    "format", ObjectForm(_OUTPUT_TYPE, _OUTPUT_SCHEMA, required=[_OUTPUT_TYPE, _OUTPUT_SCHEMA]).form
)
_CHOICE_TYPE: Final = Field("type", one_of("auto", "any", "tool", "none"))
_SINGLE: Final = Field("disable_parallel_tool_use", parse_boolean)

_MESSAGES: Final = Field("messages", list_of(_parse_message, "messages", MAX_MESSAGES, least=1))
_SYSTEM: Final = Field("system", _parse_text_blocks)
_STOP: Final = Field("stop_sequences", parse_stop)
_TEMPERATURE: Final = Field("temperature", number_between(0, 1))
_TOP_K: Final = Field("top_k", count_between(0, MAX_SEED))
_TOOLS: Final = Field("tools", list_of(_parse_tool, "tools", MAX_TOOLS))
_TOOL_CHOICE: Final = Field("tool_choice", ObjectForm(_CHOICE_TYPE, NAME, _SINGLE, required=[_CHOICE_TYPE]).form)
_THINKING: Final = Field("thinking", ObjectForm(_THINKING_TYPE, ignored=["budget_tokens", "display"]).form)
_OUTPUT_CONFIG: Final = Field("output_config", ObjectForm(_EFFORT, _OUTPUT_FORMAT).form)

MESSAGE_REQUEST: Final = ObjectForm(
    MODEL, _MESSAGES, MAX_TOKENS, _SYSTEM, _STOP, STREAM, _TEMPERATURE, TOP_P, _TOP_K, _TOOLS, _TOOL_CHOICE, _THINKING,
    _OUTPUT_CONFIG, required=[MODEL, _MESSAGES, MAX_TOKENS], ignored=IGNORED, neutral=NEUTRAL,
)  # fmt: skip


COUNT_REQUEST: Final = ObjectForm(
    MODEL, _MESSAGES, _SYSTEM, _TOOLS, _TOOL_CHOICE, _THINKING, _OUTPUT_CONFIG,
    required=[MODEL, _MESSAGES], ignored=IGNORED, neutral=NEUTRAL,
)  # fmt: skip


def parse_message_request(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /v1/messages` as a request. Raises ApiError."""
    fields = MESSAGE_REQUEST.read(parse_json(body))
    max_tokens = fields.require(MAX_TOKENS)
    options, schema = _parse_output(fields)
    choice = _parse_tools(fields, schema)
    temperature = fields.get(_TEMPERATURE)
    job = replace(
        _parse_conversation(fields, options, choice),
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=fields.get(TOP_P) or 1.0,
        top_k=fields.get(_TOP_K) or 0,
        stop=fields.get(_STOP) or (),
    )
    generation = Generation(
        jobs=(job,), stream=fields.get(STREAM) or False, rules=choice.rules, details=wants_details(headers)
    )
    return generation, MessageWriter(generation, thinks=options["enable_thinking"])


def parse_count_request(body: bytes) -> JobRequest:
    """Return the body of `POST /v1/messages/count_tokens` as a job with that prompt. Raises ApiError."""
    fields = COUNT_REQUEST.read(parse_json(body))
    options, schema = _parse_output(fields)
    return _parse_conversation(fields, options, _parse_tools(fields, schema))


def _parse_conversation(fields: Fields, options: Mapping[str, Any], choice: ToolChoice) -> JobRequest:
    """Return a job with the prompt of a request, and all else as it is by default."""
    turns = join_turns((turn for turns in fields.require(_MESSAGES) for turn in turns), {"user", "assistant"})
    continues = continues_final_message(_MESSAGES.name, turns)
    if system := fields.get(_SYSTEM):
        turns = (ChatMessage(role="system", content=system), *turns)
    model = fields.require(MODEL)
    job = JobRequest(model=model, messages=turns, template_options=options, continue_final_message=continues)
    return choice.apply(job)


def _parse_output(fields: Fields) -> tuple[dict[str, Any], str]:
    """Return the template's variables for reasoning, and the JSON Schema of the text, if there is one."""
    thinking, config = fields.get(_THINKING), fields.get(_OUTPUT_CONFIG)
    kind = thinking.get(_THINKING_TYPE) if thinking else None
    options: dict[str, Any] = {"enable_thinking": kind in {"enabled", "adaptive"}}
    if config and (effort := config.get(_EFFORT)):
        options["reasoning_effort"] = effort
    output = config.get(_OUTPUT_FORMAT) if config else None
    if output is None:
        return options, ""
    output.require(_OUTPUT_TYPE)
    return options, output.require(_OUTPUT_SCHEMA)


def _parse_tools(fields: Fields, schema: str) -> ToolChoice:
    tools, choice = fields.get(_TOOLS) or (), fields.get(_TOOL_CHOICE)
    kind = choice.require(_CHOICE_TYPE) if choice else "auto"
    meant = "required" if kind == "any" else kind
    if choice and kind == "tool":
        meant = choice.require(NAME)
    single = bool(choice and choice.get(_SINGLE))
    return choose_tools(tools, meant, single=single, schema=schema, param="output_config.format")
