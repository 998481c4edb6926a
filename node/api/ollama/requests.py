"""Request bodies of Ollama's `/api/chat` and `/api/generate`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.endpoint import AnswerWriter, wants_details
from node.api.fields import (
    Fields,
    count_between,
    number_between,
    parse_boolean,
    parse_json,
    parse_object,
    parse_stop,
    parse_text,
    parse_top_p,
    refuse,
)
from node.api.generation import Generation
from node.api.ollama.answers import OllamaWriter
from node.api.openai.messages import parse_tool_calls, parse_tools
from node.api.openai.requests import MAX_SEED, MIN_SEED
from node.api.output_parser import PLAIN_TEXT
from node.api.schemas import ANY_OBJECT, schema_text
from node.api.tool_choice import CHAT_TEXT, ToolChoice
from node.coordinator.submission import ChatMessage, JobRequest
from protocol.limits import MAX_LOGPROBS, MAX_PENALTY, MAX_POSITIONS

COMMON: Final = frozenset({"model", "stream", "options", "format", "think", "logprobs", "top_logprobs"})
CHAT_FIELDS: Final = COMMON | {"messages", "tools"}
GENERATE_FIELDS: Final = COMMON | {"prompt", "system", "raw"}
IGNORED: Final = frozenset({"keep_alive"})
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("suffix", "template"), ("",)),
    **dict.fromkeys(("images", "context"), ([],)),
}
"""Of `/api/generate`."""

OPTIONS: Final = frozenset({
    "seed", "num_predict", "top_k", "top_p", "min_p", "temperature", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "stop",
})  # fmt: skip
IGNORED_OPTIONS: Final = frozenset({
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram", "f16_kv", "use_mmap",
    "use_mlock", "mirostat_tau", "mirostat_eta",
})  # fmt: skip
"""How a server holds a model, which is up to the swarm."""
NEUTRAL_OPTIONS: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("typical_p", "tfs_z"), (1,)),
    **dict.fromkeys(("logits_all", "vocab_only", "embedding_only"), (False,)),
    "mirostat": (0,),
    "repeat_last_n": (-1, 64),  # 64 is the default, which clients send along
    "penalize_newline": (True,),
}

DEFAULT_TEMPERATURE: Final = 0.8
DEFAULT_TOP_K: Final = 40
DEFAULT_TOP_P: Final = 0.9
_MAX_TURNS: Final = 4096
_ROLES: Final = ("system", "user", "assistant", "tool")


def parse_chat(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /api/chat` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(CHAT_FIELDS | IGNORED)
    messages = fields.get("messages", _parse_messages) or ()
    choice = parse_tools(fields, fields.get("format", _parse_format) or "", "format")
    job = choice.apply(replace(_parse_job(fields), messages=messages))
    generation = Generation(
        jobs=(job,) if messages else (), stream=_streams(fields), rules=choice.rules, details=wants_details(headers)
    )
    return generation, OllamaWriter(generation, job.model, is_chat=True)


def parse_generate(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /api/generate` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(GENERATE_FIELDS | IGNORED | NEUTRAL.keys())
    fields.refuse_unless_neutral(NEUTRAL)
    prompt = fields.get("prompt", parse_text) or ""
    system = fields.get("system", parse_text) or ""
    is_raw = fields.get("raw", parse_boolean) or False
    if is_raw and system:
        refuse("system", "cannot be combined with raw: true")
    job = ToolChoice(schema=fields.get("format", _parse_format) or "", param="format").apply(_parse_job(fields))
    if is_raw:
        job = replace(job, prompt=prompt, template_options={})
    else:
        turns = [ChatMessage(role="system", content=system)] if system else []
        job = replace(job, messages=(*turns, ChatMessage(role="user", content=prompt)))
    generation = Generation(
        jobs=(job,) if prompt else (),
        stream=_streams(fields),
        rules=PLAIN_TEXT if is_raw else CHAT_TEXT,
        details=wants_details(headers),
    )
    return generation, OllamaWriter(generation, job.model, is_chat=False)


def model_name(fields: Fields) -> str:
    """Return the model that a body names; `:latest` means nothing here."""
    model = fields.get("model", parse_text)
    if not model:
        refuse("model", "is missing")
    return model.removesuffix(":latest")


def _streams(fields: Fields) -> bool:
    return fields.get("stream", parse_boolean) is not False


def _parse_job(fields: Fields) -> JobRequest:
    """Return the job that the fields common to both endpoints describe, without a prompt."""
    options = Fields(fields.get("options", parse_object) or {}, "options.")
    options.refuse_misspelt(OPTIONS | IGNORED_OPTIONS | NEUTRAL_OPTIONS.keys())
    options.refuse_unless_neutral(NEUTRAL_OPTIONS)
    temperature = options.get("temperature", number_between(0, 100))
    top_k = options.get("top_k", count_between(-1, MAX_SEED))
    limit = options.get("num_predict", _parse_num_predict)
    wants_logprobs = fields.get("logprobs", parse_boolean) or False
    likeliest = fields.get("top_logprobs", count_between(0, MAX_LOGPROBS - 1)) or 0
    return JobRequest(
        model=model_name(fields),
        max_tokens=limit,
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_k=DEFAULT_TOP_K if top_k is None else max(0, top_k),
        top_p=options.get("top_p", parse_top_p) or DEFAULT_TOP_P,
        min_p=options.get("min_p", number_between(0, 1)) or 0.0,
        repetition_penalty=options.get("repeat_penalty", number_between(1 / MAX_PENALTY, MAX_PENALTY)) or 1.0,
        presence_penalty=options.get("presence_penalty", number_between(-2, 2)) or 0.0,
        frequency_penalty=options.get("frequency_penalty", number_between(-2, 2)) or 0.0,
        seed=options.get("seed", count_between(MIN_SEED, MAX_SEED)),
        stop=options.get("stop", parse_stop) or (),
        top_logprobs=likeliest if wants_logprobs else None,
        template_options=fields.get("think", _parse_think) or {},
    )


def _parse_num_predict(param: str, value: Any) -> int | None:
    """Return a limit of tokens, capped at the largest context; None for none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < -2 or not value:
        refuse(param, "must be an integer of at least 1, or -1 or -2 for no limit")
    return min(value, MAX_POSITIONS) if value > 0 else None


def _parse_format(param: str, value: Any) -> str:
    """Return the JSON Schema that a format means."""
    if isinstance(value, str):
        if value not in {"", "json"}:
            refuse(param, "must be json or a JSON Schema")
        return ANY_OBJECT if value else ""
    return schema_text(param, value)


def _parse_think(param: str, value: Any) -> dict[str, Any]:
    """Return the template's variables that a wish for reasoning means: true, false, or an effort."""
    if isinstance(value, bool):
        return {"enable_thinking": value}
    if not isinstance(value, str) or value not in {"low", "medium", "high"}:
        refuse(param, "must be true, false, low, medium or high")
    return {"enable_thinking": True, "reasoning_effort": value}


def _parse_messages(param: str, value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or len(value) > _MAX_TURNS:
        refuse(param, f"must be a list of at most {_MAX_TURNS} messages")
    return tuple(_parse_message(f"{param}[{index}]", each) for index, each in enumerate(value))


def _parse_message(param: str, value: Any) -> ChatMessage:
    fields = Fields(parse_object(param, value), f"{param}.")
    fields.refuse_misspelt({"role", "content", "thinking", "images", "tool_calls", "tool_name", "tool_call_id"})
    fields.refuse_unless_neutral({"images": ([],)})
    role = fields.get("role", parse_text)
    if role not in _ROLES:
        refuse(f"{param}.role", f"must be one of {', '.join(_ROLES)}")
    return ChatMessage(
        role=role,
        content=fields.get("content", parse_text) or "",
        reasoning=fields.get("thinking", parse_text) or "",
        name=fields.get("tool_name", parse_text) or "",
        tool_call_id=fields.get("tool_call_id", parse_text) or "",
        tool_calls=fields.get("tool_calls", parse_tool_calls) or (),
    )
