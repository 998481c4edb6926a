"""What clients may ask for: bodies of the OpenAI API, checked, as jobs.

Fields that nobody here knows are ignored, as other servers do. Fields that would change the answer and that are not
implemented are refused unless they have the value at which they do nothing: a wrong answer is worse than none.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from node.api.errors import ApiError
from node.jobs.interface import ChatMessage, JobRequest, Objective, Quality
from protocol.limits import MAX_NAME_BYTES, MAX_POSITIONS, MAX_VOCABULARY

MAX_MESSAGES: Final = 4096
MAX_STOPS: Final = 4
MAX_STOP_CHARACTERS: Final = 256
MAX_SEED: Final = 2**63 - 1
DEFAULT_TEMPERATURE: Final = 1.0
DEFAULT_COMPLETION_TOKENS: Final = 16
"""The OpenAI API's own default for `/v1/completions`; a chat goes on until the model ends it."""

# A field and the values at which it does nothing.
_NEUTRAL_FOR_BOTH: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_NEUTRAL_FOR_CHAT: Mapping[str, tuple[Any, ...]] = _NEUTRAL_FOR_BOTH | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
_NEUTRAL_FOR_COMPLETION: Mapping[str, tuple[Any, ...]] = _NEUTRAL_FOR_BOTH | {
    "best_of": (1,),
    "logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
}
# Chat templates know the older name of the role that instructs the model.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A job, and how its answer is to be written."""

    job: JobRequest
    chat: bool
    stream: bool
    include_usage: bool
    """Whether a stream's last chunk tells the usage."""


def parse_chat_request(body: bytes) -> CompletionRequest:
    """Return the body of `POST /v1/chat/completions` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_unless_neutral(_NEUTRAL_FOR_CHAT)
    messages = fields.get("messages", _parse_messages)
    if messages is None:
        refuse("messages", "is missing")
    max_tokens = fields.get("max_completion_tokens", parse_count)
    if max_tokens is None:
        max_tokens = fields.get("max_tokens", parse_count)
    return _parse_common(fields, chat=True, messages=messages, max_tokens=max_tokens)


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Return the body of `POST /v1/completions` as a request. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_unless_neutral(_NEUTRAL_FOR_COMPLETION)
    prompt = fields.get("prompt", _parse_prompt)
    if prompt is None:
        refuse("prompt", "is missing")
    return _parse_common(
        fields,
        chat=False,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_tokens=prompt if isinstance(prompt, tuple) else None,
        max_tokens=fields.get("max_tokens", parse_count) or DEFAULT_COMPLETION_TOKENS,
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
    extras.refuse_unless_known({"objective", "budget", "quality", "method", "ignore_eos"})
    stream = fields.get("stream", _parse_boolean) or False
    stream_options = fields.get("stream_options", parse_object)
    if stream_options is not None and not stream:
        refuse("stream_options", "makes sense only together with stream: true")
    temperature = fields.get("temperature", number_between(0, 2))
    top_p = fields.get("top_p", number_between(0, 1))
    if top_p == 0:
        refuse("top_p", "must be above 0 and at most 1")
    job = JobRequest(
        model=model,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        messages=messages,
        max_tokens=max_tokens,
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=fields.get("seed", _parse_seed),
        stop=fields.get("stop", _parse_stop) or (),
        ignore_eos=extras.get("ignore_eos", _parse_boolean) or False,
        objective=extras.get("objective", _parse_objective) or Objective.LATENCY,
        budget=extras.get("budget", number_between(0, 1e18)),
        quality=extras.get("quality", parse_quality) or Quality.EXACT,
        method=extras.get("method", parse_method) or "auto",
    )
    include_usage = Fields(stream_options or {}, "stream_options.").get("include_usage", _parse_boolean) or False
    return CompletionRequest(job=job, chat=chat, stream=stream, include_usage=include_usage)


class Fields:
    """A JSON object being read; absent and null are the same, as in the OpenAI API."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, name: str, parse: Callable[[str, Any], T]) -> T | None:
        """Return a field, parsed, or None where it is absent."""
        value = self._values.get(name)
        return None if value is None else parse(self._prefix + name, value)

    def refuse_unless_neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse fields that would change something."""
        for name, values in neutral.items():
            value = self._values.get(name)
            # JSON tells 0 from false and 1 from true, Python's == does not.
            if value is not None and not any(
                value == other and isinstance(value, bool) == isinstance(other, bool) for other in values
            ):
                allowed = ", ".join(json.dumps(other) for other in (None, *values))
                refuse(name, f"is not supported here, except with a value that changes nothing: {allowed}")

    def refuse_unless_known(self, names: set[str]) -> None:
        """Refuse fields that nobody knows."""
        unknown = self._values.keys() - names
        if unknown:
            refuse(self._prefix + min(unknown), f"is unknown; there are {', '.join(sorted(names))}")


def refuse(param: str, fault: str) -> NoReturn:
    """Raise the ApiError that says what is wrong with a field."""
    raise ApiError(400, f"{param} {fault}", param=param)


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises ApiError."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is no valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def parse_text(param: str, value: Any) -> str:
    """Return a string that is valid Unicode."""
    if not isinstance(value, str):
        refuse(param, "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        refuse(param, "is no valid Unicode text")
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


def parse_count(param: str, value: Any) -> int:
    """Return a number of tokens, or of whatever there are no more of."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_POSITIONS:
        refuse(param, f"must be an integer from 1 to {MAX_POSITIONS}")
    return value


def _parse_seed(param: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        refuse(param, f"must be an integer from 0 to {MAX_SEED}")
    return value


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


def _parse_prompt(param: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            refuse(param, "may hold one prompt only: send a request for each")
        value = value[0]
    if isinstance(value, str):
        return parse_text(param, value)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_POSITIONS:
        refuse(param, "must be a string or a list of token ids that is not empty")
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
    for name in ("tool_calls", "function_call", "audio"):
        if value.get(name):
            refuse(f"{param}.{name}", "is not supported")
    content = fields.get("content", _parse_content)
    if content is None:
        refuse(f"{param}.content", "is missing")
    return ChatMessage(role=_ROLES[role], content=content)


def _parse_content(param: str, value: Any) -> str:
    if not isinstance(value, list):
        return parse_text(param, value)
    texts = []
    for index, part in enumerate(value):
        fields = Fields(parse_object(f"{param}[{index}]", part), f"{param}[{index}].")
        text = fields.get("text", parse_text)
        if fields.get("type", parse_text) != "text" or text is None:
            refuse(f"{param}[{index}]", "must be of type text: nothing else is supported")
        texts.append(text)
    return "".join(texts)


def _parse_objective(param: str, value: Any) -> Objective:
    try:
        return Objective(value)
    except ValueError:
        refuse(param, f"must be one of {', '.join(Objective)}")


def parse_quality(param: str, value: Any) -> Quality:
    """Return a quality bound."""
    try:
        return Quality(value)
    except ValueError:
        refuse(param, f"must be one of {', '.join(Quality)}")


def parse_method(param: str, value: Any) -> str:
    """Return the name of a method as it was written."""
    method = parse_text(param, value)
    if not 1 <= len(method.encode()) <= MAX_NAME_BYTES:
        refuse(param, f"must have 1 to {MAX_NAME_BYTES} bytes")
    return method
