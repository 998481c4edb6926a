"""Request bodies of Ollama's `/api/chat`, `/api/generate` and `/api/show`."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.endpoint import AnswerWriter, wants_details
from node.api.fields import (
    Field,
    Fields,
    ObjectForm,
    count_between,
    form,
    list_of,
    number_between,
    one_of,
    parse_boolean,
    parse_json,
    parse_text,
    refuse,
    whole_number,
)
from node.api.generation import Generation
from node.api.ollama.answers import OllamaWriter
from node.api.openai.messages import MAX_MESSAGES, TOOL_CALLS, TOOLS, continues_final_message
from node.api.output_parser import PLAIN_TEXT
from node.api.schemas import ANY_OBJECT, parse_schema
from node.api.shared_fields import (
    FREQUENCY_PENALTY,
    MAX_SEED,
    MIN_P,
    MODEL,
    PRESENCE_PENALTY,
    SEED,
    STOP,
    STREAM,
    TOP_LOGPROBS,
    TOP_P,
)
from node.api.tool_choice import CHAT_TEXT, ToolChoice, choose_tools
from node.coordinator.chat import ChatMessage
from node.coordinator.submission import JobRequest
from protocol.limits import MAX_PENALTY, MAX_POSITIONS

IGNORED: Final = frozenset({"keep_alive"})
"""Of embeddings; also of texts, but for what an unloaded model's answer says."""
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("suffix", "template"), ("",)),
    **dict.fromkeys(("images", "context"), ([],)),
    **dict.fromkeys(("width", "height", "steps"), ()),  # of images
}
"""Of `/api/generate`."""
NEUTRAL_FOR_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {"tool_choice": ("auto",)}

IGNORED_FOR_TEXTS: Final = frozenset({"truncate", "shift"})
"""What Ollama does where a text outgrows the context. Here it ends, and a prompt that is too long is refused."""

IGNORED_OPTIONS: Final = frozenset({
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram", "f16_kv", "use_mmap",
    "use_mlock", "useMLock", "num_gqa", "mirostat_tau", "mirostat_eta",
})  # fmt: skip
"""How a server holds a model, which is up to the swarm; one of them also as AnythingLLM spells it."""
NEUTRAL_OPTIONS: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("typical_p", "tfs_z"), (1,)),
    **dict.fromkeys(("logits_all", "vocab_only", "embedding_only"), (False,)),
    "mirostat": (0,),
    "penalize_newline": (True,),
}

DEFAULT_TEMPERATURE: Final = 0.8
DEFAULT_TOP_K: Final = 40
DEFAULT_TOP_P: Final = 0.9
DEFAULT_PENALTY_WINDOW: Final = 64
_EFFORTS: Final = ("low", "medium", "high")


@form({"type": "integer", "minimum": -2})
def _parse_num_predict(param: str, value: Any) -> int | None:
    """Return a limit of tokens, capped at the largest context; None for none."""
    if (limit := whole_number(value)) is None or limit < -2:
        refuse(param, "must be an integer of at least 1, or 0, -1 or -2 for no limit")
    return min(limit, MAX_POSITIONS) if limit > 0 else None


_penalty: Final = number_between(1 / MAX_PENALTY, MAX_PENALTY)


@form({"anyOf": [{"const": 0}, _penalty.schema]})
def _parse_repeat_penalty(param: str, value: Any) -> float:
    """Return the divisor of repeated tokens' logits: 1 for 0, by which LiteLLM means that there is none."""
    is_off = value == 0 and not isinstance(value, bool)
    return 1.0 if is_off else _penalty(param, value)


_NUM_PREDICT: Final = Field("num_predict", _parse_num_predict)
_REPEAT_LAST_N: Final = Field("repeat_last_n", count_between(-1, MAX_SEED))
_TOP_K: Final = Field("top_k", count_between(-1, MAX_SEED))
_TEMPERATURE: Final = Field("temperature", number_between(0, 100))
_REPEAT_PENALTY: Final = Field("repeat_penalty", _parse_repeat_penalty)
OPTIONS: Final = ObjectForm(
    SEED, _NUM_PREDICT, _TOP_K, TOP_P, MIN_P, _TEMPERATURE, _REPEAT_PENALTY, _REPEAT_LAST_N, PRESENCE_PENALTY,
    FREQUENCY_PENALTY, STOP, ignored=IGNORED_OPTIONS, neutral=NEUTRAL_OPTIONS,
)  # fmt: skip


@form({"anyOf": [{"enum": ["", "json"]}, parse_schema.schema]})
def _parse_format(param: str, value: Any) -> str:
    """Return the JSON Schema that a format means."""
    if isinstance(value, str):
        if value not in {"", "json"}:
            refuse(param, "must be json or a JSON Schema")
        return ANY_OBJECT if value else ""
    return parse_schema(param, value)


@form({"enum": [True, False, *_EFFORTS]})
def _parse_think(param: str, value: Any) -> dict[str, Any]:
    """Return the template's variables that a wish for reasoning means: true, false, or an effort."""
    if isinstance(value, bool):
        return {"enable_thinking": value}
    if value not in _EFFORTS:
        refuse(param, "must be true, false, low, medium or high")
    return {"enable_thinking": True, "reasoning_effort": value}


_REASONING_ROLE: Final = "thinking"
"""Of Continue's turns with the reasoning before an answer."""

_ROLE: Final = Field("role", one_of("system", "user", "assistant", "tool", _REASONING_ROLE))
_CONTENT: Final = Field("content", parse_text)
_MESSAGE_THINKING: Final = Field("thinking", parse_text)
_TOOL_NAME: Final = Field("tool_name", parse_text)
_TOOL_CALL_ID: Final = Field("tool_call_id", parse_text)
_MESSAGE: Final = ObjectForm(
    _ROLE, _CONTENT, _MESSAGE_THINKING, _TOOL_NAME, _TOOL_CALL_ID, TOOL_CALLS,
    required=[_ROLE], neutral={"images": ([],)},
)  # fmt: skip


@form(_MESSAGE.schema)
def _parse_message(param: str, value: Any) -> ChatMessage:
    fields = _MESSAGE.parse(param, value)
    return ChatMessage(
        role=fields.require(_ROLE),
        content=fields.get(_CONTENT) or "",
        reasoning=fields.get(_MESSAGE_THINKING) or "",
        name=fields.get(_TOOL_NAME) or "",
        tool_call_id=fields.get(_TOOL_CALL_ID) or "",
        tool_calls=fields.get(TOOL_CALLS) or (),
    )


def _with_reasoning(turns: Iterable[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return turns without those of reasoning, which belongs to the turn of the assistant that follows, if one does."""
    kept: list[ChatMessage] = []
    reasoning = ""
    for turn in turns:
        if turn.role == _REASONING_ROLE:
            reasoning += turn.content
            continue
        if turn.role == "assistant" and not turn.reasoning:
            turn = replace(turn, reasoning=reasoning)
        kept.append(turn)
        reasoning = ""
    return tuple(kept)


@form({})
def _parse_keep_alive(param: str, value: Any) -> bool:
    """Return whether a model is to be kept in memory, which is up to the swarm: 0 and "0s" ask to unload it."""
    return isinstance(value, bool) or value not in (0, "0", "0s", "0m", "0h")


_OPTIONS: Final = Field("options", OPTIONS.form)
_KEEP_ALIVE: Final = Field("keep_alive", _parse_keep_alive)
_FORMAT: Final = Field("format", _parse_format)
_THINK: Final = Field("think", _parse_think)
_LOGPROBS: Final = Field("logprobs", parse_boolean)
_MESSAGES: Final = Field("messages", list_of(_parse_message, "messages", MAX_MESSAGES))
PROMPT: Final = Field("prompt", parse_text)
_SYSTEM: Final = Field("system", parse_text)
_RAW: Final = Field("raw", parse_boolean)

_COMMON: Final = (
    MODEL, STREAM, _OPTIONS, _NUM_PREDICT, _FORMAT, _THINK, _LOGPROBS, TOP_LOGPROBS, _KEEP_ALIVE,
)  # fmt: skip
CHAT: Final = ObjectForm(
    *_COMMON, _MESSAGES, TOOLS, required=[MODEL], ignored=IGNORED_FOR_TEXTS, neutral=NEUTRAL_FOR_CHAT
)
GENERATE: Final = ObjectForm(
    *_COMMON, PROMPT, _SYSTEM, _RAW, required=[MODEL], ignored=IGNORED_FOR_TEXTS, neutral=NEUTRAL
)
# Programs in Go send every field of these bodies, and the older name beside the new one: "" is absent.
_MODEL: Final = Field("model", parse_text)
_NAME: Final = Field("name", parse_text)
SHOW: Final = ObjectForm(
    _MODEL, _NAME, ignored=["verbose", "options"], neutral=dict.fromkeys(("system", "template"), ("",))
)
PULL: Final = ObjectForm(_MODEL, _NAME, STREAM, ignored=["insecure", "username", "password"])


def parse_chat(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /api/chat` as a request. Raises ApiError."""
    fields = CHAT.read(parse_json(body))
    messages = _with_reasoning(fields.get(_MESSAGES) or ())
    continues = continues_final_message(_MESSAGES.name, messages)
    choice = choose_tools(fields.get(TOOLS) or (), "auto", schema=fields.get(_FORMAT) or "", param="format")
    job = choice.apply(replace(_parse_job(fields), messages=messages, continue_final_message=continues))
    generation = Generation(
        jobs=(job,) if messages else (),
        model=job.model,
        stream=_streams(fields),
        rules=choice.rules,
        details=wants_details(headers),
    )
    return generation, OllamaWriter(generation, job.model, is_chat=True, unloads=fields.get(_KEEP_ALIVE) is False)


def parse_generate(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /api/generate` as a request. Raises ApiError."""
    fields = GENERATE.read(parse_json(body))
    prompt = fields.get(PROMPT) or ""
    system = fields.get(_SYSTEM) or ""
    is_raw = fields.get(_RAW) or False
    if is_raw and system:
        refuse("system", "cannot be combined with raw: true")
    job = ToolChoice(schema=fields.get(_FORMAT) or "", param="format").apply(_parse_job(fields))
    if is_raw:
        job = replace(job, prompt=prompt, template_options={})
    else:
        turns = [ChatMessage(role="system", content=system)] if system else []
        job = replace(job, messages=(*turns, ChatMessage(role="user", content=prompt)))
    generation = Generation(
        jobs=(job,) if prompt else (),
        model=job.model,
        stream=_streams(fields),
        rules=PLAIN_TEXT if is_raw else CHAT_TEXT,
        details=wants_details(headers),
    )
    return generation, OllamaWriter(generation, job.model, is_chat=False, unloads=fields.get(_KEEP_ALIVE) is False)


def shown_name(body: bytes) -> str:
    """Return the model that the body of `POST /api/show` names, in the field `name` of earlier versions, too."""
    return _named(SHOW.read(parse_json(body)))


def parse_pull(body: bytes) -> tuple[str, bool]:
    """Return the model that the body of `POST /api/pull` names, and whether the answer is streamed."""
    fields = PULL.read(parse_json(body))
    return _named(fields), _streams(fields)


def _named(fields: Fields) -> str:
    return _without_tag(fields.get(_MODEL) or fields.get(_NAME) or refuse(_MODEL.name, "is missing"))


def model_name(fields: Fields) -> str:
    """Return the model that a body names."""
    return _without_tag(fields.require(MODEL))


def _without_tag(name: str) -> str:
    """Return a name without the `:latest` that clients append, which means nothing here."""
    return name.removesuffix(":latest")


def _streams(fields: Fields) -> bool:
    return fields.get(STREAM) is not False


def _parse_job(fields: Fields) -> JobRequest:
    """Return the job that the fields common to both endpoints describe, without a prompt."""
    options = fields.get(_OPTIONS) or OPTIONS.read({})
    temperature, top_k = options.get(_TEMPERATURE), options.get(_TOP_K)
    limits = options if options.has(_NUM_PREDICT.name) else fields  # Open WebUI sends that of its tasks beside options
    wants_logprobs = fields.get(_LOGPROBS) or False
    likeliest = fields.get(TOP_LOGPROBS) or 0
    return JobRequest(
        model=model_name(fields),
        max_tokens=limits.get(_NUM_PREDICT),
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_k=DEFAULT_TOP_K if top_k is None else max(0, top_k),
        top_p=options.get(TOP_P) or DEFAULT_TOP_P,
        min_p=options.get(MIN_P) or 0.0,
        **_penalties(options),
        seed=options.get(SEED),
        stop=options.get(STOP) or (),
        top_logprobs=likeliest if wants_logprobs else None,
        template_options=fields.get(_THINK) or {},
    )


def _penalties(options: Fields) -> dict[str, Any]:
    """Return the penalties of a job, and how many of the last tokens they are about: 0 here means all."""
    last = options.get(_REPEAT_LAST_N)
    window = DEFAULT_PENALTY_WINDOW if last is None else min(last, MAX_POSITIONS)
    penalties = {
        "repetition_penalty": options.get(_REPEAT_PENALTY) or 1.0,
        "presence_penalty": options.get(PRESENCE_PENALTY) or 0.0,
        "frequency_penalty": options.get(FREQUENCY_PENALTY) or 0.0,
    }
    if window == 0 or list(penalties.values()) == [1.0, 0.0, 0.0]:
        return {}
    return penalties | {"penalty_window": max(0, window)}
