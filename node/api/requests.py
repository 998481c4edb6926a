"""Request bodies of the OpenAI API: validation and conversion to jobs.

A field is implemented, or ignored as it cannot change the answer, or accepted only with its neutral value; every other
field is refused by name: a wrong answer is worse than none. `docs/http-api.md` lists all of them.
"""

import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from node.api.errors import ApiError
from node.coordinator.submission import ChatMessage, JobRequest
from node.util.suggestions import LONGEST_NAME, did_you_mean
from protocol.limits import (
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_NAME_BYTES,
    MAX_PENALTY,
    MAX_POSITIONS,
    MAX_STOP_TOKENS,
    MAX_VOCABULARY,
)
from protocol.measurements import QualityBound

MAX_MESSAGES: Final = 4096
MAX_STOPS: Final = 4
MAX_STOP_CHARACTERS: Final = 256
MIN_SEED: Final = -(2**63)
MAX_SEED: Final = 2**63 - 1
DEFAULT_TEMPERATURE: Final = 1.0
DEFAULT_COMPLETION_TOKENS: Final = 16
"""The OpenAI API's own default for `/v1/completions`; a chat goes on until the model ends it."""

IMPLEMENTED: Final = frozenset({
    "model", "stream", "stream_options", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
    "ignore_eos", "metaswarm",
})  # fmt: skip
IMPLEMENTED_FOR_CHAT: Final = IMPLEMENTED | {"messages", "max_completion_tokens"}
IMPLEMENTED_FOR_COMPLETION: Final = IMPLEMENTED | {"prompt"}

IGNORED: Final = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
})  # fmt: skip
"""Fields that cannot change the answer, whatever their value."""

EXTENSIONS: Final = frozenset({"quality", "method", "ignore_eos"})
"""Fields of `metaswarm`."""

STREAM_OPTIONS: Final = frozenset({"include_usage", "include_obfuscation"})

# Fields and the values, besides null, at which they do nothing.
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("n", "length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("logprobs", "echo", "use_beam_search", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), ()),
    **dict.fromkeys(("bad_words", "logits_processors"), ([],)),
    "response_format": ({"type": "text"},),
    "priority": (0,),
}
NEUTRAL_FOR_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    **NEUTRAL,
    **dict.fromkeys(("tools", "functions", "documents"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("audio", "prediction", "web_search_options", "reasoning_effort", "chat_template"), ()),
    **dict.fromkeys(("continue_final_message", "add_special_tokens"), (False,)),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
}
NEUTRAL_FOR_COMPLETION: Final[Mapping[str, tuple[Any, ...]]] = {
    **NEUTRAL, "best_of": (1,), "suffix": ("",), "add_special_tokens": (True,)
}  # fmt: skip
NEUTRAL_IN_MESSAGE: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("tool_calls", "annotations"), ([],)),
    **dict.fromkeys(("function_call", "audio"), ()),
    **dict.fromkeys(("refusal", "reasoning_content", "reasoning"), ("",)),
}
# Chat templates know the older name of the role that instructs the model.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A job and the form of its answer."""

    job: JobRequest
    chat: bool
    stream: bool
    include_usage: bool
    """Whether the last chunk of a stream contains the usage."""


def parse_chat_request(body: bytes) -> CompletionRequest:
    """Return the body of `POST /v1/chat/completions` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(IMPLEMENTED_FOR_CHAT | IGNORED | NEUTRAL_FOR_CHAT.keys())
    fields.refuse_unless_neutral(NEUTRAL_FOR_CHAT)
    messages = fields.get("messages", _parse_messages)
    if messages is None:
        refuse("messages", "is missing")
    max_tokens = fields.get("max_tokens", _parse_limit)
    return _parse_common(
        fields, chat=True, messages=messages, max_tokens=fields.get("max_completion_tokens", _parse_limit) or max_tokens
    )


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Return the body of `POST /v1/completions` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_misspelt(IMPLEMENTED_FOR_COMPLETION | IGNORED | NEUTRAL_FOR_COMPLETION.keys())
    fields.refuse_unless_neutral(NEUTRAL_FOR_COMPLETION)
    prompt = fields.get("prompt", _parse_prompt)
    if prompt is None:
        refuse("prompt", "is missing")
    return _parse_common(
        fields,
        chat=False,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_tokens=prompt if isinstance(prompt, tuple) else None,
        max_tokens=fields.get("max_tokens", _parse_limit) or DEFAULT_COMPLETION_TOKENS,
    )


def _parse_common(
    fields: "Fields",
    *,
    chat: bool,
    max_tokens: int | None,
    prompt: str | None = None,
    prompt_tokens: tuple[int, ...] | None = None,
    messages: tuple[ChatMessage, ...] | None = None,
) -> CompletionRequest:
    model = fields.get("model", parse_text)
    if not model:
        refuse("model", "is missing")
    extras = Fields(fields.get("metaswarm", parse_object) or {}, "metaswarm.")
    extras.refuse_unless_known(EXTENSIONS)
    stream = fields.get("stream", _parse_boolean) or False
    stream_options = fields.get("stream_options", parse_object)
    if stream_options is not None and not stream:
        refuse("stream_options", "requires stream: true")
    options = Fields(stream_options or {}, "stream_options.")
    options.refuse_unless_known(STREAM_OPTIONS)
    temperature = fields.get("temperature", number_between(0, 2))
    top_p = fields.get("top_p", number_between(0, 1))
    if top_p == 0:
        refuse("top_p", "must be above 0 and at most 1")
    repetition_penalty = fields.get("repetition_penalty", number_between(1 / MAX_PENALTY, MAX_PENALTY))
    min_tokens = fields.get("min_tokens", count_between(0, MAX_POSITIONS)) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        refuse("min_tokens", f"must not exceed the {max_tokens} tokens of max_tokens")
    job = JobRequest(
        model=model,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        messages=messages,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(0, fields.get("top_k", count_between(-1, MAX_SEED)) or 0),
        min_p=fields.get("min_p", number_between(0, 1)) or 0.0,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        frequency_penalty=fields.get("frequency_penalty", number_between(-2, 2)) or 0.0,
        presence_penalty=fields.get("presence_penalty", number_between(-2, 2)) or 0.0,
        logit_bias=fields.get("logit_bias", _parse_logit_bias) or (),
        seed=fields.get("seed", count_between(MIN_SEED, MAX_SEED)),
        stop=fields.get("stop", _parse_stop) or (),
        stop_token_ids=fields.get("stop_token_ids", _parse_stop_token_ids) or (),
        ignore_eos=fields.get("ignore_eos", _parse_boolean) or extras.get("ignore_eos", _parse_boolean) or False,
        quality=extras.get("quality", parse_quality) or QualityBound.EXACT,
        method=extras.get("method", parse_method) or "auto",
    )
    include_usage = options.get("include_usage", _parse_boolean) or False
    return CompletionRequest(job=job, chat=chat, stream=stream, include_usage=include_usage)


class Fields:
    """A JSON object whose fields are validated; null equals absent, as in the OpenAI API."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, name: str, parse: Callable[[str, Any], T]) -> T | None:
        """Return a parsed field, or None if it is absent."""
        value = self._values.get(name)
        return None if value is None else parse(self._prefix + name, value)

    def refuse_unless_neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse fields with other than their neutral values."""
        for name, values in neutral.items():
            value = self._values.get(name)
            # JSON tells 0 from false and 1 from true, Python's == does not.
            if value is not None and not any(
                value == other and isinstance(value, bool) == isinstance(other, bool) for other in values
            ):
                allowed = ", ".join(json.dumps(other) for other in (None, *values))
                why = f"is not supported; accepted values: {allowed}"
                refuse(self._prefix + name, why)

    def refuse_misspelt(self, names: Set[str]) -> None:
        """Refuse unknown fields, suggesting the closest name; for objects with many fields."""
        for name in self._values:
            if name not in names:
                param = self._prefix + name[:MAX_NAME_BYTES]
                where = f" in {self._prefix.removesuffix('.')}" if self._prefix else ""
                message = f"unknown field {name[:LONGEST_NAME]!r}{where}{did_you_mean(name, names)}"
                raise ApiError(400, message, param=param)

    def refuse_unless_known(self, names: Set[str]) -> None:
        """Refuse unknown fields, listing the known ones; for objects with few fields."""
        unknown = self._values.keys() - names
        if unknown:
            refuse(self._prefix + min(unknown)[:MAX_NAME_BYTES], f"is unknown; expected {', '.join(sorted(names))}")


def refuse(param: str, fault: str) -> NoReturn:
    """Raise the ApiError for a field."""
    raise ApiError(400, f"{param} {fault}", param=param)


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises ApiError."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_text(param: str, value: Any) -> str:
    """Return a string that is valid Unicode."""
    if not isinstance(value, str):
        refuse(param, "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can encode a lone surrogate
        refuse(param, "is not valid Unicode text")
    return value


def parse_object(param: str, value: Any) -> dict[str, Any]:
    """Return a JSON object."""
    if not isinstance(value, dict):
        refuse(param, "must be an object")
    return value


def _parse_boolean(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        refuse(param, "must be true or false")
    return value


def _parse_limit(param: str, value: Any) -> int:
    """Return a limit of tokens, capped at the largest context."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        refuse(param, "must be an integer of at least 1")
    return min(value, MAX_POSITIONS)


def count_between(low: int, high: int) -> Callable[[str, Any], int]:
    """Return a parser of integers within bounds."""

    def parse(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(param, f"must be an integer from {low} to {high}")
        return value

    return parse


parse_count: Final = count_between(1, MAX_POSITIONS)
"""A number of tokens."""


def number_between(low: float, high: float) -> Callable[[str, Any], float]:
    """Return a parser of numbers within bounds."""

    def parse(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            refuse(param, f"must be a number from {low:g} to {high:g}")
        return float(value)

    return parse


def _parse_stop(param: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        refuse(param, f"must be a string or a list of at most {MAX_STOPS} strings")
    stops = tuple(parse_text(param, each) for each in values)
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        refuse(param, f"strings must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


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


def _parse_prompt(param: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            refuse(param, "must hold one prompt: send one request for each")
        value = value[0]
    if isinstance(value, str):
        return parse_text(param, value)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_POSITIONS:
        refuse(param, "must be a string or a non-empty list of token ids")
    if any(type(token) is not int or not 0 <= token < MAX_VOCABULARY for token in value):
        refuse(param, f"token ids must be integers from 0 to {MAX_VOCABULARY - 1}")
    return tuple(value)


def _parse_messages(param: str, value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        refuse(param, f"must be a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_parse_message(f"{param}[{index}]", each) for index, each in enumerate(value))


def _parse_message(param: str, value: Any) -> ChatMessage:
    fields = Fields(parse_object(param, value), f"{param}.")
    role = fields.get("role", parse_text)
    if role not in _ROLES:
        refuse(f"{param}.role", f"must be one of {', '.join(_ROLES)}; tools are not supported")
    fields.refuse_misspelt({"role", "content", "name", *NEUTRAL_IN_MESSAGE})
    fields.refuse_unless_neutral(NEUTRAL_IN_MESSAGE)
    content = fields.get("content", _parse_content)
    if content is None and role == "assistant":  # a turn that only called a tool
        content = ""
    if content is None:
        refuse(f"{param}.content", "is missing")
    return ChatMessage(role=_ROLES[role], content=content)


def _parse_content(param: str, value: Any) -> str:
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


def parse_quality(param: str, value: Any) -> QualityBound:
    """Return a quality bound."""
    try:
        return QualityBound(value)
    except ValueError:
        refuse(param, f"must be one of {', '.join(QualityBound)}")


def parse_method(param: str, value: Any) -> str:
    """Return the name of a method, not resolved."""
    method = parse_text(param, value)
    if not 1 <= len(method.encode()) <= MAX_NAME_BYTES:
        refuse(param, f"must have 1 to {MAX_NAME_BYTES} bytes")
    return method
