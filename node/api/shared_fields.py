"""Fields that bodies of several protocols have."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.endpoint import wants_details
from node.api.fields import (
    Field,
    Fields,
    Form,
    ObjectForm,
    count_between,
    form,
    number_between,
    one_of,
    parse_boolean,
    parse_budget,
    parse_limit,
    parse_method,
    parse_name,
    parse_object,
    parse_objective,
    parse_quality,
    parse_stop,
    parse_text,
    parse_top_p,
    refuse,
)
from protocol.limits import MAX_LOGPROBS

MIN_SEED: Final = -(2**63)
MAX_SEED: Final = 2**63 - 1

REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

MAX_INPUTS: Final = 2048
"""Texts of one request for embeddings."""
CACHE_FIELDS: Final = frozenset({"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"})
"""Of the OpenAI API: how long and for whom prompts are cached, which is up to the swarm."""
CACHE_MARKS: Final = ("cache_control", "prompt_cache_breakpoint")
"""The same in parts of messages, of the Anthropic and the OpenAI API."""

MODEL: Final = Field("model", parse_name)
STREAM: Final = Field("stream", parse_boolean)
MAX_TOKENS: Final = Field("max_tokens", parse_limit)
TEMPERATURE: Final = Field("temperature", number_between(0, 2))
TOP_P: Final = Field("top_p", parse_top_p)
MIN_P: Final = Field("min_p", number_between(0, 1))
FREQUENCY_PENALTY: Final = Field("frequency_penalty", number_between(-2, 2))
PRESENCE_PENALTY: Final = Field("presence_penalty", number_between(-2, 2))
SEED: Final = Field("seed", count_between(MIN_SEED, MAX_SEED))
STOP: Final = Field("stop", parse_stop)
TOP_LOGPROBS: Final = Field("top_logprobs", count_between(0, MAX_LOGPROBS - 1))
PARALLEL_TOOL_CALLS: Final = Field("parallel_tool_calls", parse_boolean)
EFFORT: Final = Field("effort", one_of(*REASONING_EFFORTS))
IGNORE_EOS: Final = Field("ignore_eos", parse_boolean)
QUALITY: Final = Field("quality", parse_quality)
METHOD: Final = Field("method", parse_method)
OBJECTIVE: Final = Field("objective", parse_objective)
BUDGET: Final = Field("budget", parse_budget)
TRACE: Final = Field("trace", parse_boolean)

EXTENSIONS: Final = ObjectForm(QUALITY, METHOD, OBJECTIVE, BUDGET, IGNORE_EOS, TRACE)
METASWARM: Final = Field("metaswarm", EXTENSIONS.form)
"""Extensions of the OpenAI API; its presence also asks how the swarm ran the job."""


def asks_details(fields: Fields, headers: Headers) -> bool:
    """Return whether a body's field or a header asks how the swarm ran the job."""
    return fields.has(METASWARM.name) or wants_details(headers)


def text_or_parts(*types: str, ignored: Collection[str] | None = None) -> Form[str]:
    """Return the form of a text, or of a list of parts of these types, each with a `text`.

    `ignored`: further fields of a part that have no effect; None for all.
    """
    is_text, text = Field("type", one_of(*types)), Field("text", parse_text)
    part = ObjectForm(is_text, text, required=[is_text, text], ignored=ignored or (), is_open=ignored is None)

    @form({"anyOf": [{"type": "string"}, {"type": "array", "items": part.schema}]})
    def parse(param: str, value: Any) -> str:
        if not isinstance(value, list):
            return parse_text(param, value)
        texts = []
        for index, each in enumerate(value):
            where = f"{param}[{index}]"
            if parse_object(where, each).get("type") not in types:
                refuse(where, f"must be of type {' or '.join(types)}: no other type is supported")
            texts.append(part.parse(where, each).require(text))
        return join_texts(texts)

    return parse


def join_texts(texts: Iterable[str]) -> str:
    """Return the parts of a text as one, each on a line of its own where no white space is between them."""
    joined: list[str] = []
    for text in filter(None, texts):
        if joined and not (joined[-1][-1].isspace() or text[0].isspace()):
            joined.append("\n")
        joined.append(text)
    return "".join(joined)


def tool_choice(chosen: ObjectForm, name_of: Callable[[Fields], str]) -> Form[str]:
    """Return the form of `none`, `auto`, `required`, or an object that names a tool."""
    modes = ("none", "auto", "required")

    @form({"anyOf": [{"enum": list(modes)}, chosen.schema]})
    def parse(param: str, value: Any) -> str:
        if isinstance(value, dict):
            return name_of(chosen.parse(param, value))
        if value not in modes:
            refuse(param, "must be none, auto, required, or a function")
        return str(value)

    return parse
