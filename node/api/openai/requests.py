"""Request bodies of the OpenAI API's chat completions and completions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.endpoint import AnswerWriter, wants_details
from node.api.fields import (
    Fields,
    check_depth,
    count_between,
    number_between,
    parse_boolean,
    parse_json,
    parse_limit,
    parse_method,
    parse_object,
    parse_quality,
    parse_stop,
    parse_text,
    parse_top_p,
    refuse,
)
from node.api.generation import MAX_CHOICES, Generation, several
from node.api.openai.answers import CompletionWriter
from node.api.openai.messages import parse_messages, parse_tools
from node.api.output_parser import ParserRules
from node.api.schemas import ANY_OBJECT, schema_text
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
from protocol.measurements import QualityBound

MIN_SEED: Final = -(2**63)
MAX_SEED: Final = 2**63 - 1
DEFAULT_TEMPERATURE: Final = 1.0
DEFAULT_COMPLETION_TOKENS: Final = 16
"""The OpenAI API's own default for `/v1/completions`; a chat goes on until the model ends it."""

IMPLEMENTED: Final = frozenset({
    "model", "stream", "stream_options", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
    "ignore_eos", "metaswarm", "n", "logprobs", "response_format",
})  # fmt: skip
IMPLEMENTED_FOR_CHAT: Final = IMPLEMENTED | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
    "chat_template_kwargs", "reasoning_effort",
}  # fmt: skip
IMPLEMENTED_FOR_COMPLETION: Final = IMPLEMENTED | {"prompt", "echo"}

IGNORED: Final = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip
"""Fields that cannot change the answer, whatever their value."""

REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh")

EXTENSIONS: Final = frozenset({"quality", "method", "ignore_eos"})
"""Fields of `metaswarm`."""

STREAM_OPTIONS: Final = frozenset({"include_usage", "include_obfuscation"})

# Fields and the values, besides null, at which they do nothing.
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), ()),
    **dict.fromkeys(("bad_words", "logits_processors"), ([],)),
    "priority": (0,),
}
NEUTRAL_FOR_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    **NEUTRAL,
    **dict.fromkeys(("functions", "documents"), ([],)),
    **dict.fromkeys(("function_call",), ("none", "auto")),
    **dict.fromkeys(("audio", "prediction", "web_search_options", "chat_template"), ()),
    **dict.fromkeys(("continue_final_message", "add_special_tokens", "echo"), (False,)),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
}
NEUTRAL_FOR_COMPLETION: Final[Mapping[str, tuple[Any, ...]]] = {
    **NEUTRAL, "best_of": (1,), "suffix": ("",), "add_special_tokens": (True,)
}  # fmt: skip


def parse_chat_request(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /v1/chat/completions` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(IMPLEMENTED_FOR_CHAT | IGNORED | NEUTRAL_FOR_CHAT.keys())
    fields.refuse_unless_neutral(NEUTRAL_FOR_CHAT)
    messages = fields.get("messages", parse_messages)
    if messages is None:
        refuse("messages", "is missing")
    choice = parse_tools(fields, fields.get("response_format", _parse_response_format) or "")
    max_tokens = fields.get("max_tokens", parse_limit)
    job = replace(
        _parse_job(fields, fields.get("max_completion_tokens", parse_limit) or max_tokens),
        messages=messages,
        template_options=_template_options(fields),
        top_logprobs=_parse_chat_logprobs(fields),
    )
    return _parse_form(fields, headers, [choice.apply(job)], choice.rules)


def parse_completion_request(body: bytes, headers: Headers) -> tuple[Generation, AnswerWriter]:
    """Return the body of `POST /v1/completions` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(IMPLEMENTED_FOR_COMPLETION | IGNORED | NEUTRAL_FOR_COMPLETION.keys())
    fields.refuse_unless_neutral(NEUTRAL_FOR_COMPLETION)
    prompts = fields.get("prompt", _parse_prompts)
    if prompts is None:
        refuse("prompt", "is missing")
    job = _parse_job(fields, fields.get("max_tokens", parse_limit) or DEFAULT_COMPLETION_TOKENS)
    job = replace(
        job,
        echo=fields.get("echo", parse_boolean) or False,
        top_logprobs=_parse_logprobs(fields),
        json_schema=fields.get("response_format", _parse_response_format) or "",
    )
    if job.echo and job.top_logprobs is not None:
        refuse("logprobs", "cannot be combined with echo: the prompt's log probabilities are not available")
    jobs = [
        replace(job, prompt=prompt) if isinstance(prompt, str) else replace(job, prompt_tokens=prompt)
        for prompt in prompts
    ]
    return _parse_form(fields, headers, jobs)


def _template_options(fields: Fields) -> dict[str, Any]:
    """Return variables for the chat template."""
    options = fields.get("chat_template_kwargs", parse_object) or {}
    check_depth("chat_template_kwargs", options)
    effort = fields.get("reasoning_effort", parse_text)
    if effort is not None and effort not in REASONING_EFFORTS:
        refuse("reasoning_effort", f"must be one of {', '.join(REASONING_EFFORTS)}")
    if effort is None:
        return options
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **options}


def _parse_response_format(param: str, value: Any) -> str:
    """Return the JSON Schema that a format means; empty for any text."""
    form = Fields(parse_object(param, value), f"{param}.")
    form.refuse_unless_known({"type", "json_schema"})
    match form.get("type", parse_text):
        case "text":
            return ""
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            inner = Fields(form.get("json_schema", parse_object) or {}, f"{param}.json_schema.")
            inner.refuse_unless_known({"name", "description", "schema", "strict"})
            return inner.get("schema", schema_text) or refuse(f"{param}.json_schema.schema", "is missing")
    return refuse(f"{param}.type", "must be text, json_object or json_schema")


def _parse_chat_logprobs(fields: Fields) -> int | None:
    """Return how many likeliest tokens a chat wants to see; None for no log probabilities at all."""
    count = fields.get("top_logprobs", count_between(0, MAX_LOGPROBS - 1))
    if fields.get("logprobs", parse_boolean):
        return count or 0
    if count:
        refuse("top_logprobs", "requires logprobs: true")
    return None


def _parse_logprobs(fields: Fields) -> int | None:
    """Return the same for a completion, whose `logprobs` is a number."""
    return fields.get("logprobs", lambda param, value: None if value is False else _parse_top(param, value))


def _parse_form(
    fields: Fields, headers: Headers, jobs: Sequence[JobRequest], rules: ParserRules | None = None
) -> tuple[Generation, CompletionWriter]:
    """Return the request of one job for each prompt, and what writes its answer. `rules`: of a chat."""
    stream = fields.get("stream", parse_boolean) or False
    stream_options = fields.get("stream_options", parse_object)
    if stream_options is not None and not stream:
        refuse("stream_options", "requires stream: true")
    options = Fields(stream_options or {}, "stream_options.")
    options.refuse_unless_known(STREAM_OPTIONS)
    count = fields.get("n", count_between(1, MAX_CHOICES)) or 1
    if count * len(jobs) > MAX_CHOICES:
        refuse("n", f"times the {len(jobs)} prompts must be at most {MAX_CHOICES}")
    generation = Generation(
        jobs=tuple(each for job in jobs for each in several(job, count)),
        choices_per_prompt=count,
        stream=stream,
        rules=rules or ParserRules(),
        details=fields.get("metaswarm", parse_object) is not None or wants_details(headers),
    )
    include_usage = options.get("include_usage", parse_boolean) or False
    return generation, CompletionWriter(generation, is_chat=rules is not None, include_usage=include_usage)


def _parse_job(fields: Fields, max_tokens: int | None) -> JobRequest:
    """Return the job that the fields common to both endpoints describe, without a prompt."""
    model = fields.get("model", parse_text)
    if not model:
        refuse("model", "is missing")
    extras = Fields(fields.get("metaswarm", parse_object) or {}, "metaswarm.")
    extras.refuse_unless_known(EXTENSIONS)
    temperature = fields.get("temperature", number_between(0, 2))
    repetition_penalty = fields.get("repetition_penalty", number_between(1 / MAX_PENALTY, MAX_PENALTY))
    min_tokens = fields.get("min_tokens", count_between(0, MAX_POSITIONS)) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        refuse("min_tokens", f"must not exceed the {max_tokens} tokens of max_tokens")
    return JobRequest(
        model=model,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_p=fields.get("top_p", parse_top_p) or 1.0,
        top_k=max(0, fields.get("top_k", count_between(-1, MAX_SEED)) or 0),
        min_p=fields.get("min_p", number_between(0, 1)) or 0.0,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        frequency_penalty=fields.get("frequency_penalty", number_between(-2, 2)) or 0.0,
        presence_penalty=fields.get("presence_penalty", number_between(-2, 2)) or 0.0,
        logit_bias=fields.get("logit_bias", _parse_logit_bias) or (),
        seed=fields.get("seed", count_between(MIN_SEED, MAX_SEED)),
        stop=fields.get("stop", parse_stop) or (),
        stop_token_ids=fields.get("stop_token_ids", _parse_stop_token_ids) or (),
        ignore_eos=fields.get("ignore_eos", parse_boolean) or extras.get("ignore_eos", parse_boolean) or False,
        quality=extras.get("quality", parse_quality) or QualityBound.EXACT,
        method=extras.get("method", parse_method) or "auto",
    )


_parse_top: Final = count_between(0, MAX_LOGPROBS - 1)


def _parse_stop_token_ids(param: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKENS:
        refuse(param, f"must be a list of at most {MAX_STOP_TOKENS} token ids")
    return tuple(dict.fromkeys(count_between(0, MAX_VOCABULARY - 1)(param, each) for each in value))


def _parse_logit_bias(param: str, value: Any) -> tuple[tuple[int, float], ...]:
    biases = parse_object(param, value)
    if len(biases) > MAX_LOGIT_BIASES:
        refuse(param, f"may have at most {MAX_LOGIT_BIASES} entries")
    parsed: dict[int, float] = {}
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9 and int(token) < MAX_VOCABULARY):
            refuse(param, f"must have token ids as keys, not {token[:32]!r}")
        parsed[int(token)] = number_between(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)(f"{param}[{int(token)}]", bias)
    return tuple((token, parsed[token]) for token in sorted(parsed) if parsed[token])


def _parse_prompts(param: str, value: Any) -> list[str | tuple[int, ...]]:
    """Return prompts: a text, token ids, or a list of these."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
        return [_parse_prompt(param, value)]
    if len(value) > MAX_CHOICES:
        refuse(param, f"must hold at most {MAX_CHOICES} prompts")
    return [_parse_prompt(f"{param}[{index}]" if len(value) > 1 else param, each) for index, each in enumerate(value)]


def _parse_prompt(param: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return parse_text(param, value)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_POSITIONS:
        refuse(param, "must be a string or a non-empty list of token ids")
    if any(type(token) is not int or not 0 <= token < MAX_VOCABULARY for token in value):
        refuse(param, f"token ids must be integers from 0 to {MAX_VOCABULARY - 1}")
    return tuple(value)
