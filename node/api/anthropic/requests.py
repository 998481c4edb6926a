"""Request bodies of the Anthropic API's `/v1/messages`."""

from collections.abc import Mapping
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.anthropic.answers import MessageWriter
from node.api.endpoint import AnswerWriter, wants_details
from node.api.fields import (
    Fields,
    check_depth,
    count_between,
    number_between,
    parse_boolean,
    parse_json,
    parse_limit,
    parse_object,
    parse_stop,
    parse_text,
    parse_top_p,
    refuse,
)
from node.api.generation import Generation
from node.api.openai.messages import MAX_MESSAGES, MAX_TOOLS, parse_arguments
from node.api.openai.requests import MAX_SEED
from node.api.schemas import schema_text
from node.api.tool_choice import ToolChoice, choose_tools
from node.coordinator.submission import ChatMessage, JobRequest, MessageToolCall

IMPLEMENTED: Final = frozenset({
    "model", "messages", "max_tokens", "system", "stop_sequences", "stream", "temperature", "top_p", "top_k", "tools",
    "tool_choice", "thinking", "output_config",
})  # fmt: skip
IGNORED: Final = frozenset({"metadata", "service_tier", "cache_control", "user_profile_id", "inference_geo", "speed"})
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("container", "context_management", "diagnostics", "prefill", "workspace_id"), ()),
    "mcp_servers": ([],),
}
_EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")


def parse_message_request(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /v1/messages` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(IMPLEMENTED | IGNORED | NEUTRAL.keys())
    fields.refuse_unless_neutral(NEUTRAL)
    model = fields.get("model", parse_text)
    turns = fields.get("messages", _parse_messages)
    max_tokens = fields.get("max_tokens", parse_limit)
    for name, value in (("model", model), ("messages", turns), ("max_tokens", max_tokens)):
        if not value:
            refuse(name, "is missing")
    system = fields.get("system", _parse_text_blocks)
    if system:
        turns = (ChatMessage(role="system", content=system), *(turns or ()))
    temperature = fields.get("temperature", number_between(0, 1))
    options, schema = _parse_output(fields)
    choice = _parse_tools(fields, schema)
    job = JobRequest(
        model=model or "",
        messages=turns,
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=fields.get("top_p", parse_top_p) or 1.0,
        top_k=fields.get("top_k", count_between(0, MAX_SEED)) or 0,
        stop=fields.get("stop_sequences", parse_stop) or (),
        template_options=options,
    )
    generation = Generation(
        jobs=(choice.apply(job),),
        stream=fields.get("stream", parse_boolean) or False,
        rules=choice.rules,
        details=wants_details(headers),
    )
    return generation, MessageWriter(generation, thinks=options["enable_thinking"])


def _parse_output(fields: Fields) -> tuple[dict[str, Any], str]:
    """Return the template's variables for reasoning, and the JSON Schema of the text, if there is one."""
    thinking = Fields(fields.get("thinking", parse_object) or {}, "thinking.")
    thinking.refuse_unless_known({"type", "budget_tokens", "display"})
    kind = thinking.get("type", parse_text)
    if kind not in {None, "enabled", "disabled", "adaptive"}:
        refuse("thinking.type", "must be enabled, disabled or adaptive")
    options: dict[str, Any] = {"enable_thinking": kind in {"enabled", "adaptive"}}
    config = Fields(fields.get("output_config", parse_object) or {}, "output_config.")
    config.refuse_unless_known({"effort", "format"})
    effort = config.get("effort", parse_text)
    if effort is not None:
        if effort not in _EFFORTS:
            refuse("output_config.effort", f"must be one of {', '.join(_EFFORTS)}")
        options["reasoning_effort"] = effort
    output = Fields(config.get("format", parse_object) or {}, "output_config.format.")
    output.refuse_unless_known({"type", "schema"})
    output_kind = output.get("type", parse_text)
    if output_kind is None:
        return options, ""
    if output_kind != "json_schema":
        refuse("output_config.format.type", "must be json_schema")
    schema = output.get("schema", schema_text)
    if schema is None:
        refuse("output_config.format.schema", "is missing")
    return options, schema


def _parse_tools(fields: Fields, schema: str) -> ToolChoice:
    tools = fields.get("tools", _parse_tool_list) or ()
    choice = Fields(fields.get("tool_choice", parse_object) or {"type": "auto"}, "tool_choice.")
    choice.refuse_unless_known({"type", "name", "disable_parallel_tool_use"})
    kind = choice.get("type", parse_text)
    if kind not in {"auto", "any", "tool", "none"}:
        refuse("tool_choice.type", "must be auto, any, tool or none")
    meant = "required" if kind == "any" else kind
    if kind == "tool":
        meant = choice.get("name", parse_text) or refuse("tool_choice.name", "is missing")
    single = choice.get("disable_parallel_tool_use", parse_boolean) or False
    return choose_tools(tools, meant, single=single, schema=schema, param="output_config.format")


def _parse_tool_list(param: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return tools as chat templates take them."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        refuse(param, f"must be a list of at most {MAX_TOOLS} tools")
    check_depth(param, value)
    tools = []
    for index, each in enumerate(value):
        tool = Fields(parse_object(f"{param}[{index}]", each), f"{param}[{index}].")
        tool.refuse_unless_known({"type", "name", "description", "input_schema", "cache_control", "strict"})
        if (tool.get("type", parse_text) or "custom") != "custom":
            refuse(f"{param}[{index}].type", "must be custom: no other type is supported")
        name = tool.get("name", parse_text)
        if not name:
            refuse(f"{param}[{index}].name", "is missing")
        function: dict[str, Any] = {"name": name, "parameters": tool.get("input_schema", parse_object) or {}}
        if (description := tool.get("description", parse_text)) is not None:
            function["description"] = description
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _parse_messages(param: str, value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        refuse(param, f"must be a list of 1 to {MAX_MESSAGES} messages")
    return tuple(turn for index, each in enumerate(value) for turn in _parse_message(f"{param}[{index}]", each))


def _parse_message(param: str, value: Any) -> list[ChatMessage]:
    """Return the turns that a message makes: one for each result of a tool, and one for the rest."""
    fields = Fields(parse_object(param, value), f"{param}.")
    fields.refuse_unless_known({"role", "content"})
    role = fields.get("role", parse_text)
    if role not in {"user", "assistant", "system"}:
        refuse(f"{param}.role", "must be user, assistant or system")
    content = fields.get("content", lambda _, found: found)
    if content is None:
        refuse(f"{param}.content", "is missing")
    if isinstance(content, str):
        return [ChatMessage(role=role, content=parse_text(f"{param}.content", content))]
    if not isinstance(content, list):
        refuse(f"{param}.content", "must be a text or a list of blocks")
    results: list[ChatMessage] = []
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[MessageToolCall] = []
    for index, each in enumerate(content):
        where = f"{param}.content[{index}]"
        block = Fields(parse_object(where, each), f"{where}.")
        match block.get("type", parse_text):
            case "text":
                texts.append(block.get("text", parse_text) or "")
            case "thinking":
                reasoning.append(block.get("thinking", parse_text) or "")
            case "tool_use" if role == "assistant":
                calls.append(_parse_tool_use(where, block))
            case "tool_result" if role == "user":
                results.append(_parse_tool_result(block))
            case _:
                refuse(where, "must be of type text, thinking, tool_use or tool_result: no other type is supported")
    if texts or calls or not results:
        turn = ChatMessage(role=role, content="".join(texts), tool_calls=tuple(calls), reasoning="".join(reasoning))
        results.append(turn)
    return results


def _parse_tool_use(param: str, block: Fields) -> MessageToolCall:
    name = block.get("name", parse_text)
    if not name:
        refuse(f"{param}.name", "is missing")
    return MessageToolCall(
        id=block.get("id", parse_text) or "", name=name, arguments=block.get("input", parse_arguments) or {}
    )


def _parse_tool_result(block: Fields) -> ChatMessage:
    content = block.get("content", _parse_text_blocks) or ""
    return ChatMessage(role="tool", content=content, tool_call_id=block.get("tool_use_id", parse_text) or "")


def _parse_text_blocks(param: str, value: Any) -> str:
    """Return the text of a text or of blocks of type `text`."""
    if not isinstance(value, list):
        return parse_text(param, value)
    texts = []
    for index, each in enumerate(value):
        block = Fields(parse_object(f"{param}[{index}]", each), f"{param}[{index}].")
        text = block.get("text", parse_text)
        if block.get("type", parse_text) != "text" or text is None:
            refuse(f"{param}[{index}]", "must be of type text: no other type is supported")
        texts.append(text)
    return "".join(texts)
