"""Options of jobs, and the bodies of requests that they become."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypedDict

from metaswarm_client.errors import NotFoundError, SwarmError
from metaswarm_client.swarm_documents import Model

OWN_FIELDS: Final = frozenset({"n", "stream", "stream_options"})
"""Fields of a request that the client sets: an `Answer` is one text, from a stream."""

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"

_EXTENSIONS: Final = ("quality", "method", "objective", "budget", "trace")
"""Fields of `metaswarm` in the body."""

Message: TypeAlias = Mapping[str, Any]
"""A turn of a conversation as the OpenAI API has it: `{"role": "user", "content": "…"}`."""

Quality: TypeAlias = Literal["exact", "near", "any"]
"""Bound on lossy methods; `exact`: the greedy tokens of the model's reference."""


Objective: TypeAlias = Literal["latency", "throughput", "cost"]
"""What route and method are chosen for: the time of this job, the computing, or its cost."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters`: a JSON Schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]


class ScoreOptions(TypedDict, total=False):
    """Options of a job that scores a text; what is not given is the node's default. docs/http-api.md has their values.

    `model`: default: the client's, else the only one that is complete in the swarm. `method`: `auto` (the swarm votes),
    `baseline`, or switches. `budget`: a job that is predicted to cost more is refused. `trace`: `job.trace` of the
    answer tells where the time of each token went. `logprobs`: report the log probability of each token, and of so many
    likeliest ones. `extra`: further fields of the request, as they are, but OWN_FIELDS; those in its `metaswarm` are
    added to the options above.
    """

    model: str
    quality: Quality
    method: str
    objective: Objective
    budget: float
    trace: bool
    logprobs: int
    extra: Mapping[str, Any]


class JobOptions(ScoreOptions, total=False):
    """Options of a job that makes a text. `schema`: a JSON Schema that the text follows."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    schema: Mapping[str, Any]


class ChatOptions(JobOptions, total=False):
    """Options of a chat. `tool_choice`: `auto`, `none`, `required`, or the name of a tool.

    `continue_final_message`: the answer goes on where the last message, one of the assistant, ends.
    """

    tools: Sequence[Tool]
    tool_choice: str
    continue_final_message: bool
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class TaskOptions(TypedDict, total=False):
    """A task for `explain`; see docs/http-api.md."""

    model: str
    task: Literal["generate", "embed", "score"]
    quality: Quality
    objective: Objective
    budget: float
    prompt_tokens: int
    max_tokens: int
    shared_prefix_share: float
    repetitiveness: float
    concurrency: int


def chat_body(messages: str | Sequence[Message], options: ChatOptions) -> dict[str, Any]:
    """Return the body of a chat; a text is one turn of the user. Raises as `_job_body`."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(turn) for turn in messages]
    body = _job_body(dict(options), ChatOptions) | {"messages": turns}
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    if "tools" in body:
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
            }
            for tool in body["tools"]
        ]
    if body.get("tool_choice", "auto") not in {"auto", "none", "required"}:
        body["tool_choice"] = {"type": "function", "function": {"name": body["tool_choice"]}}
    return _with_extra(body, options)


def completion_body(prompt: str | Sequence[int], options: ScoreOptions) -> dict[str, Any]:
    """Return the body of a completion. Raises as `_job_body`."""
    body = _job_body(dict(options), JobOptions) | {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    return _with_extra(body, options)


def score_body(text: str | Sequence[int], options: ScoreOptions) -> dict[str, Any]:
    """Return the body of a completion that is the log probabilities of its prompt, and no text behind it."""
    return completion_body(text, {"logprobs": 0, **options}) | {"max_tokens": 0, "echo": True}


def _with_extra(body: dict[str, Any], options: ScoreOptions) -> dict[str, Any]:
    extra = dict(options.get("extra", {}))
    if refused := OWN_FIELDS & extra.keys():
        raise ValueError(f"extra cannot set {', '.join(sorted(refused))}: a request streams one answer")
    if isinstance(extensions := extra.get("metaswarm"), Mapping):
        extra["metaswarm"] = body["metaswarm"] | dict(extensions)
    return body | extra


def _job_body(options: dict[str, Any], kind: type[ScoreOptions]) -> dict[str, Any]:
    """Return what both kinds of job share. They are streamed: keep-alives tell a slow node from a dead one.

    Raises TypeError for unknown options: an `n` that was sent would mix the texts of two answers.
    """
    if unknown := sorted(options.keys() - kind.__annotations__.keys()):
        raise TypeError(f"no such option: {', '.join(unknown)}; further fields of the request go into extra={{…}}")
    extensions = {name: options.pop(name) for name in _EXTENSIONS if name in options}
    options.pop("extra", None)
    schema = options.pop("schema", None)
    if schema is not None:
        options["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
    return options | {"metaswarm": extensions, "stream": True, "stream_options": {"include_usage": True}}


def choose_model(models: Iterable[Model]) -> str:
    """Return the only model that is complete. Raises SwarmError."""
    complete = [model.name or model.model for model in models if model.complete]
    if not complete:
        raise NotFoundError("no model is complete in this swarm: serve one with `metaswarm node --serve MODEL`")
    if len(complete) > 1:
        raise SwarmError(f"several models are complete in this swarm: choose one with model=…: {', '.join(complete)}")
    return complete[0]


def embedding_body(texts: str | Sequence[str], model: str | None) -> dict[str, Any]:
    """Return the body of a request for embeddings."""
    return {"model": model, "input": [texts] if isinstance(texts, str) else list(texts)}
