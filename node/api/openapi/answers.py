"""JSON Schemas of the answers of other APIs, as far as this node gives them."""

from collections.abc import Mapping
from typing import Any, Final

from node.api.fields import Schema, nullable
from node.api.openapi.types import TypeSchemas
from node.coordinator.submission import Consensus, Cost, Selection, Timing

STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
BOOLEAN: Final[Schema] = {"type": "boolean"}
NULL: Final[Schema] = {"type": "null"}
ANY: Final[Schema] = {}


def record(optional: Mapping[str, Schema] | None = None, /, **fields: Schema) -> dict[str, Any]:
    """Return the schema of an object that has all of some fields, and perhaps others."""
    return {
        "type": "object",
        "properties": {**fields, **(optional or {})},
        "required": list(fields),
        "additionalProperties": False,
    }


def array(items: Schema) -> dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def const(value: Any) -> dict[str, Any]:
    """Return the schema of one value."""
    return {"const": value}


def job_schema(types: TypeSchemas) -> dict[str, Any]:
    """Return the schema of what `metaswarm` tells of a job; see `node.api.job_document`."""
    texts = {"type": "object", "additionalProperties": STRING}
    return record(
        job_id=STRING,
        route=array(
            record(peer=STRING, start=INTEGER, end=INTEGER, compute_s=nullable(NUMBER), queue_s=nullable(NUMBER))
        ),
        method=record(name=STRING, switches=texts, stage_policy=texts),
        consensus=types.of(Consensus),
        timing=types.of(Timing),
        cost=nullable(types.of(Cost)),
        selection=nullable(types.of(Selection)),
        replays=INTEGER,
        token_ids=array(INTEGER),
        trace=nullable({"type": "object"}),
    )


_FINISH_REASON: Final = {"enum": ["stop", "length", "tool_calls"]}
_JOB: Final = {"$ref": "#/components/schemas/Job"}
_DETAILS: Final[Mapping[str, Schema]] = {"metaswarm": _JOB}

# OpenAI

_USAGE: Final = record(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=record(cached_tokens=INTEGER),
    completion_tokens_details=record(accepted_prediction_tokens=INTEGER, reasoning_tokens=INTEGER),
)
_TOKEN: Final[Mapping[str, Schema]] = {"token": STRING, "logprob": NUMBER, "bytes": array(INTEGER)}
_TOKENS: Final = array(record(**_TOKEN, top_logprobs=array(record(**_TOKEN))))
_CHAT_LOGPROBS: Final = record(content=_TOKENS, refusal=NULL)
_COMPLETION_LOGPROBS: Final = record(
    tokens=array(STRING),
    token_logprobs=array(nullable(NUMBER)),
    top_logprobs=array(nullable({"type": "object", "additionalProperties": NUMBER})),
    text_offset=array(INTEGER),
)
_TOOL_CALL: Final = record(id=STRING, type=const("function"), function=record(name=STRING, arguments=STRING))
_MESSAGE: Final = record(
    {"reasoning_content": STRING, "tool_calls": array(_TOOL_CALL)},
    role=const("assistant"),
    content=nullable(STRING),
    refusal=NULL,
)


def _completion(kind: str, **choice: Schema) -> dict[str, Any]:
    choices = array(record(_DETAILS, index=INTEGER, finish_reason=_FINISH_REASON, **choice))
    return record(_DETAILS, id=STRING, object=const(kind), created=INTEGER, model=STRING, choices=choices, usage=_USAGE)


CHAT_COMPLETION: Final = _completion("chat.completion", message=_MESSAGE, logprobs=nullable(_CHAT_LOGPROBS))
TEXT_COMPLETION: Final = _completion("text_completion", text=STRING, logprobs=nullable(_COMPLETION_LOGPROBS))

_PARTS: Final = array({
    "anyOf": [
        record(type=const("output_text"), text=STRING, annotations=array(ANY), logprobs=array(ANY)),
        record(type=const("reasoning_text"), text=STRING),
    ]
})  # fmt: skip
_CALLED: Final = {"call_id": STRING, "name": STRING, "arguments": STRING}
_CALL: Final = record({"namespace": STRING}, type=const("function_call"), id=STRING, status=STRING, **_CALLED)
_ITEM: Final = {
    "anyOf": [
        record(type=const("message"), id=STRING, status=STRING, role=const("assistant"), content=_PARTS),
        record(type=const("reasoning"), id=STRING, status=STRING, summary=array(ANY), content=_PARTS),
        _CALL,
    ]
}
RESPONSE: Final = record(
    _DETAILS,
    id=STRING,
    object=const("response"),
    created_at=INTEGER,
    status={"enum": ["completed", "incomplete"]},
    error=NULL,
    incomplete_details=nullable(record(reason=const("max_output_tokens"))),
    instructions=nullable(STRING),
    model=STRING,
    output=array(_ITEM),
    previous_response_id=NULL,
    reasoning=record(effort=nullable(STRING), summary=NULL),
    store=const(False),
    truncation=const("disabled"),
    usage=record(
        input_tokens=INTEGER,
        input_tokens_details=record(cached_tokens=INTEGER, cache_write_tokens=INTEGER),
        output_tokens=INTEGER,
        output_tokens_details=record(reasoning_tokens=INTEGER),
        total_tokens=INTEGER,
    ),
    **dict.fromkeys(
        ("max_output_tokens", "metadata", "parallel_tool_calls", "temperature", "text", "tool_choice", "tools",
         "top_p", "user"),
        ANY,
    ),
)  # fmt: skip

_POOLED: Final[Mapping[str, Schema]] = {"pooling": {"enum": ["mean", "last"]}, "normalised": BOOLEAN}
_VECTOR: Final = array(NUMBER)
_POOLED_JOB: Final = {"type": "object", "properties": _POOLED, "required": list(_POOLED)}
EMBEDDINGS: Final = record(
    {"metaswarm": _POOLED_JOB},
    object=const("list"),
    data=array(
        record(_DETAILS, object=const("embedding"), index=INTEGER, embedding={"anyOf": [_VECTOR, {"type": "string"}]})
    ),
    model=STRING,
    usage=record(prompt_tokens=INTEGER, total_tokens=INTEGER),
)
MODEL: Final = record(
    id=STRING, object=const("model"), created=INTEGER, owned_by=STRING, max_model_len=nullable(INTEGER)
)
MODELS: Final = record(object=const("list"), data=array(MODEL))

# Anthropic

_ANTHROPIC_MODEL: Final = record(type=const("model"), id=STRING, display_name=STRING, created_at=STRING)
MODEL_OF_EITHER: Final = {"anyOf": [MODEL, _ANTHROPIC_MODEL]}
MODELS_OF_EITHER: Final = {
    "anyOf": [
        MODELS,
        record(
            data=array(_ANTHROPIC_MODEL), has_more=const(False), first_id=nullable(STRING), last_id=nullable(STRING)
        ),
    ]
}
"""What clients of the Anthropic API get, whom the header `anthropic-version` tells, beside that of OpenAI's."""

_CONTENT: Final = array({
    "anyOf": [
        record(type=const("text"), text=STRING),
        record(type=const("thinking"), thinking=STRING, signature=STRING),
        record(type=const("tool_use"), id=STRING, name=STRING, input=ANY),
    ]
})  # fmt: skip
MESSAGE: Final = record(
    _DETAILS,
    id=STRING,
    type=const("message"),
    role=const("assistant"),
    model=STRING,
    content=_CONTENT,
    stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
    stop_sequence=nullable(STRING),
    usage=record(
        input_tokens=INTEGER,
        output_tokens=INTEGER,
        cache_creation_input_tokens=INTEGER,
        cache_read_input_tokens=INTEGER,
    ),
)

# Ollama

_OLLAMA_MESSAGE: Final = record(
    {"thinking": STRING, "tool_calls": array(record(function=record(name=STRING, arguments={"type": "object"})))},
    role=const("assistant"),
    content=STRING,
)
_COUNTS: Final = (
    "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
)  # fmt: skip


def _ollama(optional: Mapping[str, Schema] | None = None, /, **piece: Schema) -> dict[str, Any]:
    counts = dict.fromkeys(_COUNTS, INTEGER)
    optional = {**_DETAILS, **counts, "logprobs": _TOKENS, **(optional or {})}
    reason = {"enum": ["stop", "length", "load", "unload"]}
    return record(optional, model=STRING, created_at=STRING, done=const(True), done_reason=reason, **piece)


OLLAMA_CHAT: Final = _ollama(message=_OLLAMA_MESSAGE)
OLLAMA_GENERATE: Final = _ollama({"thinking": STRING}, response=STRING)
OLLAMA_EMBED: Final = record(
    {"metaswarm": record(**_POOLED, jobs=array(_JOB))},
    model=STRING,
    embeddings=array(_VECTOR),
    total_duration=INTEGER,
    load_duration=INTEGER,
    prompt_eval_count=INTEGER,
)
OLLAMA_EMBEDDING: Final = record({"metaswarm": _POOLED_JOB}, embedding=_VECTOR)
_OLLAMA_DETAILS: Final = record(
    parent_model=STRING,
    format=STRING,
    family=STRING,
    families=array(STRING),
    parameter_size=STRING,
    quantization_level=STRING,
)
OLLAMA_TAGS: Final = record(
    models=array(
        record(name=STRING, model=STRING, modified_at=STRING, size=INTEGER, digest=STRING, details=_OLLAMA_DETAILS)
    )
)
OLLAMA_PS: Final = record(
    models=array(
        record(
            name=STRING,
            model=STRING,
            size=INTEGER,
            digest=STRING,
            details=_OLLAMA_DETAILS,
            expires_at=STRING,
            size_vram=INTEGER,
            context_length=INTEGER,
        )
    )
)
OLLAMA_SHOW: Final = record(
    modelfile=STRING,
    parameters=STRING,
    template=STRING,
    modified_at=STRING,
    details=_OLLAMA_DETAILS,
    model_info={"type": "object"},
    capabilities=array(STRING),
)
OLLAMA_PULL: Final = record(status=const("success"))
TOKEN_COUNT: Final = record(input_tokens=INTEGER)
OLLAMA_VERSION: Final = record(version=STRING, metaswarm=STRING)

# This program's own

HEALTH: Final = record({"problems": array(STRING)}, status=STRING)
_MEASURED: Final = record(
    method=STRING,
    error=nullable(STRING),
    log_ratios={"type": "object", "additionalProperties": array(NUMBER)},
    **dict.fromkeys(("ttft_s", "tpot_s", "tokens_per_s", "makespan_s"), nullable(NUMBER)),
)
BENCH: Final = record(baseline=_MEASURED, methods=array(_MEASURED), observations=INTEGER)

# Errors

OPENAI_ERROR: Final = record(
    error=record(
        message=STRING,
        type={"enum": ["invalid_request_error", "server_error"]},
        param=nullable(STRING),
        code=nullable(STRING),
    )
)
ANTHROPIC_ERROR: Final = record(type=const("error"), error=record(type=STRING, message=STRING))
OLLAMA_ERROR: Final = record(error=STRING)
