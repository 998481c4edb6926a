"""Request bodies of the OpenAI API's chat completions and completions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.endpoint import AnswerWriter
from node.api.fields import (
    Field,
    Fields,
    Form,
    ObjectForm,
    check_depth,
    count_between,
    form,
    number_between,
    one_of,
    parse_boolean,
    parse_json,
    parse_limit,
    parse_limit_or_none,
    parse_object,
    parse_text,
    refuse,
)
from node.api.generation import MAX_CHOICES, Generation, several
from node.api.openai.answers import CompletionWriter
from node.api.openai.messages import MESSAGES, TOOL_CHOICE, TOOLS, continues_final_message, parse_tools
from node.api.output_parser import ParserRules
from node.api.schemas import ANY_OBJECT, parse_schema
from node.api.shared_fields import (
    BUDGET,
    CACHE_FIELDS,
    EXTENSIONS,
    FREQUENCY_PENALTY,
    IGNORE_EOS,
    MAX_SEED,
    MAX_TOKENS,
    METASWARM,
    METHOD,
    MIN_P,
    MODEL,
    OBJECTIVE,
    PARALLEL_TOOL_CALLS,
    PRESENCE_PENALTY,
    QUALITY,
    REASONING_EFFORTS,
    SEED,
    STOP,
    STREAM,
    TEMPERATURE,
    TOP_LOGPROBS,
    TOP_P,
    TRACE,
    asks_details,
)
from node.coordinator.chat import ChatMessage
from node.coordinator.submission import JobRequest
from protocol.limits import (
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_POSITIONS,
    MAX_STOP_TOKENS,
    MAX_VOCABULARY,
)
from protocol.measurements import Objective, QualityBound

DEFAULT_TEMPERATURE: Final = 1.0
DEFAULT_COMPLETION_TOKENS: Final = 16
"""The OpenAI API's own default for `/v1/completions`; a chat goes on until the model ends it."""

IGNORED: Final = CACHE_FIELDS | {"user", "metadata", "store", "service_tier", "safety_identifier"}
"""Fields that cannot change the answer, whatever their value."""

INSTEAD: Final[Mapping[str, str]] = dict.fromkeys(
    ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    "response_format with a JSON Schema",
)
"""What does what a field of vLLM's would: patterns and choices are `pattern` and `enum` of a schema."""

# Fields and the values, besides null, at which they do nothing.
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids"), ()),
    **dict.fromkeys(INSTEAD, ()),
    **dict.fromkeys(("bad_words", "logits_processors"), ([],)),
    "priority": (0,),
}
NEUTRAL_FOR_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    **NEUTRAL,
    **dict.fromkeys(("functions", "documents"), ([],)),
    **dict.fromkeys(("function_call",), ("none", "auto")),
    **dict.fromkeys(("audio", "prediction", "web_search_options", "moderation", "chat_template"), ()),
    **dict.fromkeys(("add_special_tokens", "echo"), (False,)),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
NEUTRAL_FOR_COMPLETION: Final[Mapping[str, tuple[Any, ...]]] = {
    **NEUTRAL, "best_of": (1,), "suffix": ("",), "add_special_tokens": (True,)
}  # fmt: skip

_FORMAT_TYPE: Final = Field("type", one_of("text", "json_object", "json_schema"))
_FORMAT_SCHEMA: Final = Field("schema", parse_schema)
_NAMED_SCHEMA: Final = ObjectForm(_FORMAT_SCHEMA, required=[_FORMAT_SCHEMA], ignored={"name", "description", "strict"})


@form(_NAMED_SCHEMA.schema)
def _parse_named_schema(param: str, value: Any) -> str:
    return _NAMED_SCHEMA.parse(param, value).require(_FORMAT_SCHEMA)


_JSON_SCHEMA: Final = Field("json_schema", _parse_named_schema)
_FORMAT: Final = ObjectForm(_FORMAT_TYPE, _JSON_SCHEMA, required=[_FORMAT_TYPE])


@form(_FORMAT.schema)
def parse_response_format(param: str, value: Any) -> str:
    """Return the JSON Schema that a format means; empty for any text."""
    fields = _FORMAT.parse(param, value)
    kind, schema = fields.require(_FORMAT_TYPE), fields.get(_JSON_SCHEMA)
    if kind != "json_schema":
        return ANY_OBJECT if kind == "json_object" else ""
    return schema or refuse(f"{param}.json_schema.schema", "is missing")


_TOKEN_ID: Final = count_between(0, MAX_VOCABULARY - 1)


@form({"type": "array", "items": _TOKEN_ID.schema, "maxItems": MAX_STOP_TOKENS})
def _parse_stop_token_ids(param: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKENS:
        refuse(param, f"must be a list of at most {MAX_STOP_TOKENS} token ids")
    return tuple(dict.fromkeys(_TOKEN_ID(param, each) for each in value))


_BIAS: Final = number_between(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)


@form({
    "type": "object",
    "additionalProperties": _BIAS.schema,
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "maxProperties": MAX_LOGIT_BIASES,
})  # fmt: skip
def _parse_logit_bias(param: str, value: Any) -> tuple[tuple[int, float], ...]:
    biases = parse_object(param, value)
    if len(biases) > MAX_LOGIT_BIASES:
        refuse(param, f"may have at most {MAX_LOGIT_BIASES} entries")
    parsed: dict[int, float] = {}
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9 and int(token) < MAX_VOCABULARY):
            refuse(param, f"must have token ids as keys, not {token[:32]!r}")
        parsed[int(token)] = _BIAS(f"{param}[{int(token)}]", bias)
    return tuple((token, parsed[token]) for token in sorted(parsed) if parsed[token])


_PROMPT: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": _TOKEN_ID.schema, "minItems": 1, "maxItems": MAX_POSITIONS},
    ]
}


def prompts_of(most: int) -> Form[Sequence[str | tuple[int, ...]]]:
    """Return the form of a text, of token ids, or of a list of up to so many of these."""

    @form({"anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT, "minItems": 1, "maxItems": most}]})
    def parse(param: str, value: Any) -> Sequence[str | tuple[int, ...]]:
        if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
            return [_parse_prompt(param, value)]
        if len(value) > most:
            refuse(param, f"must hold at most {most} prompts")
        several = len(value) > 1
        return [_parse_prompt(f"{param}[{index}]" if several else param, each) for index, each in enumerate(value)]

    return parse


def _parse_prompt(param: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return parse_text(param, value)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_POSITIONS:
        refuse(param, "must be a string or a non-empty list of token ids")
    if any(type(token) is not int or not 0 <= token < MAX_VOCABULARY for token in value):
        refuse(param, f"token ids must be integers from 0 to {MAX_VOCABULARY - 1}")
    return tuple(value)


_parse_top: Final = count_between(0, MAX_LOGPROBS - 1)


@form({"anyOf": [_parse_top.schema, {"const": False}]})
def _parse_logprobs(param: str, value: Any) -> int | None:
    """Return how many likeliest tokens a completion wants to see; None for no log probabilities at all."""
    return None if value is False else _parse_top(param, value)


@form({"type": "object"})
def _parse_template_options(param: str, value: Any) -> dict[str, Any]:
    options = parse_object(param, value)
    check_depth(param, options)
    return options


_INCLUDE_USAGE: Final = Field("include_usage", parse_boolean)
_CONTINUOUS_USAGE: Final = Field("continuous_usage_stats", parse_boolean)
STREAM_OPTIONS: Final = ObjectForm(_INCLUDE_USAGE, _CONTINUOUS_USAGE, ignored={"include_obfuscation"})

_STREAM_OPTIONS: Final = Field("stream_options", STREAM_OPTIONS.form)
_MIN_TOKENS: Final = Field("min_tokens", count_between(0, MAX_POSITIONS))
_TOP_K: Final = Field("top_k", count_between(-1, MAX_SEED))
_REPETITION_PENALTY: Final = Field("repetition_penalty", number_between(1 / MAX_PENALTY, MAX_PENALTY))
_LOGIT_BIAS: Final = Field("logit_bias", _parse_logit_bias)
_STOP_TOKEN_IDS: Final = Field("stop_token_ids", _parse_stop_token_ids)
_N: Final = Field("n", count_between(1, MAX_CHOICES))
_RESPONSE_FORMAT: Final = Field("response_format", parse_response_format)

_MAX_COMPLETION_TOKENS: Final = Field("max_completion_tokens", parse_limit)
_CHAT_LOGPROBS: Final = Field("logprobs", parse_boolean)
_TEMPLATE_OPTIONS: Final = Field("chat_template_kwargs", _parse_template_options)
_REASONING_EFFORT: Final = Field("reasoning_effort", one_of(*REASONING_EFFORTS))
_CONTINUES: Final = Field("continue_final_message", parse_boolean)
_ADDS_GENERATION_PROMPT: Final = Field("add_generation_prompt", parse_boolean)

_PROMPTS: Final = Field("prompt", prompts_of(MAX_CHOICES))
_COMPLETION_TOKENS: Final = Field("max_tokens", parse_limit_or_none)
_LOGPROBS: Final = Field("logprobs", _parse_logprobs)
_ECHO: Final = Field("echo", parse_boolean)

_COMMON: Final = (
    MODEL, STREAM, _STREAM_OPTIONS, _MIN_TOKENS, TEMPERATURE, TOP_P, _TOP_K, MIN_P, _REPETITION_PENALTY,
    FREQUENCY_PENALTY, PRESENCE_PENALTY, _LOGIT_BIAS, SEED, STOP, _STOP_TOKEN_IDS, IGNORE_EOS, METASWARM, _N,
    _RESPONSE_FORMAT,
)  # fmt: skip
CHAT: Final = ObjectForm(
    *_COMMON, MESSAGES, MAX_TOKENS, _MAX_COMPLETION_TOKENS, _CHAT_LOGPROBS, TOP_LOGPROBS, TOOLS, TOOL_CHOICE,
    PARALLEL_TOOL_CALLS, _TEMPLATE_OPTIONS, _REASONING_EFFORT, _CONTINUES, _ADDS_GENERATION_PROMPT,
    required=[MODEL, MESSAGES], ignored=IGNORED, neutral=NEUTRAL_FOR_CHAT, instead=INSTEAD,
)  # fmt: skip
COMPLETION: Final = ObjectForm(
    *_COMMON, _PROMPTS, _COMPLETION_TOKENS, _LOGPROBS, _ECHO,
    required=[MODEL, _PROMPTS], ignored=IGNORED, neutral=NEUTRAL_FOR_COMPLETION, instead=INSTEAD,
)  # fmt: skip


def parse_chat_request(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /v1/chat/completions` as a request. Raises ApiError."""
    fields = CHAT.read(parse_json(body))
    messages = fields.require(MESSAGES)
    choice = parse_tools(fields, fields.get(_RESPONSE_FORMAT) or "")
    max_tokens = fields.get(MAX_TOKENS)
    job = replace(
        _parse_job(fields, fields.get(_MAX_COMPLETION_TOKENS) or max_tokens),
        messages=messages,
        template_options=_template_options(fields),
        continue_final_message=_continues(fields, messages),
        top_logprobs=_chat_logprobs(fields),
    )
    return _parse_form(fields, headers, [choice.apply(job)], choice.rules)


def parse_completion_request(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /v1/completions` as a request. Raises ApiError.

    With `echo` the prompt is part of the text, and so of its `logprobs`.
    """
    fields = COMPLETION.read(parse_json(body))
    prompts = fields.require(_PROMPTS)
    max_tokens, echo, top_logprobs = fields.get(_COMPLETION_TOKENS), fields.get(_ECHO) or False, fields.get(_LOGPROBS)
    job = replace(
        _parse_job(fields, DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens),
        echo=echo,
        top_logprobs=top_logprobs,
        prompt_logprobs=echo and top_logprobs is not None,
        json_schema=fields.get(_RESPONSE_FORMAT) or "",
    )
    if not job.max_tokens and not job.prompt_logprobs:
        refuse("max_tokens", "may be 0 only with echo and logprobs, for the log probabilities of the prompt")
    return _parse_form(fields, headers, [with_prompt(job, prompt) for prompt in prompts])


def with_prompt(job: JobRequest, prompt: str | tuple[int, ...]) -> JobRequest:
    """Return a job with a prompt."""
    return replace(job, prompt=prompt) if isinstance(prompt, str) else replace(job, prompt_tokens=prompt)


def _template_options(fields: Fields) -> dict[str, Any]:
    """Return variables for the chat template."""
    options = fields.get(_TEMPLATE_OPTIONS) or {}
    effort = fields.get(_REASONING_EFFORT)
    if effort is None:
        return options
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **options}


def _continues(fields: Fields, messages: Sequence[ChatMessage]) -> bool:
    """Return whether the answer continues the last message: in this API only where that is asked for, as in vLLM."""
    continues = fields.get(_CONTINUES) or False
    adds = fields.get(_ADDS_GENERATION_PROMPT)
    if adds is not None and adds == continues:
        refuse("add_generation_prompt", f"must be {str(not adds).lower()} or absent")
    if continues and not continues_final_message(MESSAGES.name, messages):
        refuse("continue_final_message", "requires a last message of the assistant")
    return continues


def _chat_logprobs(fields: Fields) -> int | None:
    """Return how many likeliest tokens a chat wants to see; None for no log probabilities at all."""
    count = fields.get(TOP_LOGPROBS)
    if fields.get(_CHAT_LOGPROBS):
        return count or 0
    if count:
        refuse("top_logprobs", "requires logprobs: true")
    return None


def _parse_form(
    fields: Fields, headers: Headers, jobs: Sequence[JobRequest], rules: ParserRules | None = None
) -> tuple[Generation, CompletionWriter]:
    """Return the request of one job for each prompt, and what writes its answer. `rules`: of a chat."""
    stream = fields.get(STREAM) or False
    options = fields.get(_STREAM_OPTIONS)
    if options is not None and not stream:
        refuse("stream_options", "requires stream: true")
    count = fields.get(_N) or 1
    if count * len(jobs) > MAX_CHOICES:
        refuse("n", f"times the {len(jobs)} prompts must be at most {MAX_CHOICES}")
    generation = Generation(
        jobs=tuple(each for job in jobs for each in several(job, count)),
        choices_per_prompt=count,
        stream=stream,
        rules=rules or ParserRules(),
        details=asks_details(fields, headers),
    )
    include_usage = options is not None and options.get(_INCLUDE_USAGE) is True
    continuous = include_usage and options is not None and options.get(_CONTINUOUS_USAGE) is True
    return generation, CompletionWriter(
        generation, is_chat=rules is not None, include_usage=include_usage, continuous_usage=continuous
    )


def _parse_job(fields: Fields, max_tokens: int | None) -> JobRequest:
    """Return the job that the fields common to both endpoints describe, without a prompt."""
    model = fields.require(MODEL)
    extras = fields.get(METASWARM) or EXTENSIONS.read({})
    temperature = fields.get(TEMPERATURE)
    repetition_penalty = fields.get(_REPETITION_PENALTY)
    min_tokens = fields.get(_MIN_TOKENS) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        refuse("min_tokens", f"must not exceed the {max_tokens} tokens of max_tokens")
    return JobRequest(
        model=model,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_p=fields.get(TOP_P) or 1.0,
        top_k=max(0, fields.get(_TOP_K) or 0),
        min_p=fields.get(MIN_P) or 0.0,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        frequency_penalty=fields.get(FREQUENCY_PENALTY) or 0.0,
        presence_penalty=fields.get(PRESENCE_PENALTY) or 0.0,
        logit_bias=fields.get(_LOGIT_BIAS) or (),
        seed=fields.get(SEED),
        stop=fields.get(STOP) or (),
        stop_token_ids=fields.get(_STOP_TOKEN_IDS) or (),
        ignore_eos=fields.get(IGNORE_EOS) or extras.get(IGNORE_EOS) or False,
        quality=extras.get(QUALITY) or QualityBound.EXACT,
        objective=extras.get(OBJECTIVE) or Objective.LATENCY,
        budget=extras.get(BUDGET),
        method=extras.get(METHOD) or "auto",
        trace=extras.get(TRACE) or False,
    )
