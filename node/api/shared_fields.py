"""Fields that bodies of several protocols have."""

from typing import Final

from starlette.datastructures import Headers

from node.api.endpoint import wants_details
from node.api.fields import (
    Field,
    Fields,
    ObjectForm,
    count_between,
    number_between,
    one_of,
    parse_boolean,
    parse_limit,
    parse_method,
    parse_name,
    parse_quality,
    parse_stop,
    parse_top_p,
)
from protocol.limits import MAX_LOGPROBS

MIN_SEED: Final = -(2**63)
MAX_SEED: Final = 2**63 - 1

REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh")

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
TRACE: Final = Field("trace", parse_boolean)

EXTENSIONS: Final = ObjectForm(QUALITY, METHOD, IGNORE_EOS, TRACE)
METASWARM: Final = Field("metaswarm", EXTENSIONS.form)
"""Extensions of the OpenAI API; its presence also asks how the swarm ran the job."""


def asks_details(fields: Fields, headers: Headers) -> bool:
    """Return whether a body's field or a header asks how the swarm ran the job."""
    return fields.has(METASWARM.name) or wants_details(headers)
