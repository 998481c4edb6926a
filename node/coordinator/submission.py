"""The interface for submitting jobs: request, events, result and errors."""

import enum
from array import array
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from node.coordinator.chat import ChatFormat, ChatMessage
from protocol.identity import BlockRange, JobId, ModelId, PeerId, Stage
from protocol.measurements import MethodInForce, Objective, QualityBound, StageObservation, TaskKind
from protocol.messages import FinishReason
from protocol.tensors import Pooling

USUAL_TOKENS: Final = 512  # expected where a request sets no limit, and what one may have in any case

AUTO: Final = "auto"
"""In place of a method: the swarm selects one."""


class JobErrorCode(enum.StrEnum):
    """Why a job failed. The HTTP API maps each to a status, the command line to one line."""

    INVALID = "invalid_request"
    """The request is invalid: 400."""
    MODEL_NOT_FOUND = "model_not_found"
    """The model is unknown in the swarm, or its name is ambiguous: 404."""
    CONTEXT_LENGTH = "context_length_exceeded"
    """Prompt and output exceed the limits of the model or of the serving peers: 400."""
    UNCOVERED = "blocks_not_served"
    """No peer serves some of the model's blocks, which the message names: 503, retry later."""
    FULL = "peers_full"
    """The peers that serve the model are full: 503, retry later."""
    NOT_READY = "method_not_ready"
    """The method is being built by the peers that serve the model: 503, retry later."""
    MEASURING = "quality_being_measured"
    """The method's quality with this model is being measured: 503, retry later."""
    FAILED = "job_failed"
    """A stage failed and could not be replaced: 502."""
    OVER_BUDGET = "over_budget"
    """Every route and method is predicted to cost more than the budget: 400."""
    LEAVING = "node_leaving"
    """This node is shutting down and takes no new jobs: 503."""


CLIENT_MISTAKES = frozenset(
    {JobErrorCode.INVALID, JobErrorCode.MODEL_NOT_FOUND, JobErrorCode.CONTEXT_LENGTH, JobErrorCode.OVER_BUDGET}
)
"""Codes of jobs that are rejected, which do not count as failed."""


class JobError(Exception):
    """A job cannot be done. The message is one line for the user: what failed, with which value, what to do."""

    def __init__(
        self,
        code: JobErrorCode,
        message: str,
        *,
        retry_after_s: float | None = None,
        param: str | None = None,
        may_quote: bool = False,
    ) -> None:
        """`param`: the invalid field of the request, if any. `may_quote`: the message may have text of the job."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param
        self.may_quote = may_quote or code in CLIENT_MISTAKES


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCapabilities:
    """What can be asked of a model: texts up to `max_positions` tokens; conversations, unless it has no chat format.

    `chat_template`: its text; empty where it has none.
    """

    max_positions: int
    chat_format: ChatFormat | None
    chat_template: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOrigin:
    """The API request that a job comes from: its id, its path, and its span as `traceparent`, for logs and traces.

    `key_sha256`: of its API key, empty without one: the prompts of different keys share no prefix cache.
    """

    request_id: str = ""
    endpoint: str = ""
    trace_parent: str = ""
    key_sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A user's request. Exactly one of `prompt`, `prompt_tokens` and `messages` is given.

    `model`: a prefix of an id, a catalogue name, or a local name. `messages`: rendered by the model's chat template.
    `max_tokens`: None where only the model ends the text; cut to the model's context and the stages' memory.
    `min_tokens`: tokens before which no stop token is sampled and no stop string applies. `top_k`: 0 keeps all.
    `penalty_window`: the last tokens that penalties are about, 0 for all. `logit_bias`: token ids, each once, and what
    is added to their logits. `seed`: None for a random one; taken modulo 2**64. `stop_token_ids`: besides the model's
    own end-of-text tokens. `ignore_eos`: do not end at the model's end-of-text tokens; for benchmarks. `method`:
    `auto`, or a method by its switches. `objective`: what route and method are chosen for. `budget`: the highest
    predicted cost, None for any. `background`: gives way to other jobs. `stages`: the only route to take; empty for the
    best one. `echo`: whether JobStarted has the prompt's text. `top_logprobs`: report the log probability of each
    token, and those of so many likeliest ones; None for neither. `tools`: that the model may call, as the OpenAI API
    describes them. `template_options`: for the chat template. `continue_final_message`: the text goes on where the last
    message, the assistant's, ends (prefill). `json_schema`: the text is JSON that follows this JSON Schema, itself
    JSON; empty for any text; it comes from the field `json_schema_param` of the user's request, which errors name.
    `prompt_logprobs`: the prompt is scored: JobStarted is followed by PromptScored, with `top_logprobs` likeliest
    tokens; `max_tokens` may be 0 then. `pooling`: the prompt becomes an embedding, and there is no text: JobStarted is
    followed by JobResult. `truncate`: cut the prompt to the model's context. `origin`: the API request that it comes
    from. `trace`: the stages report where the time of each step went. Sampling: `node.engine.sampling`.
    """

    model: str
    prompt: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    quality: QualityBound = QualityBound.EXACT
    method: str = AUTO
    objective: Objective = Objective.LATENCY
    budget: float | None = None
    background: bool = False
    stages: tuple[Stage, ...] = ()
    echo: bool = False
    top_logprobs: int | None = None
    json_schema: str = ""
    json_schema_param: str = "response_format"
    tools: tuple[Mapping[str, Any], ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    prompt_logprobs: bool = False
    continue_final_message: bool = False
    pooling: Pooling | None = None
    truncate: bool = False
    trace: bool = False
    origin: RequestOrigin = RequestOrigin()

    @property
    def task_kind(self) -> TaskKind:
        """What is wanted of the prompt."""
        if self.pooling is not None:
            return TaskKind.EMBED
        return TaskKind.SCORE if self.prompt_logprobs else TaskKind.GENERATE


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted:
    """The job was accepted: the first event. `created_s` is Unix time. `echo`: the prompt's text, if requested.

    `chat_format`: of the model, where the prompt is a conversation.
    """

    job_id: JobId
    model: ModelId
    model_name: str
    prompt_tokens: int
    created_s: int
    echo: str = ""
    chat_format: ChatFormat | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its bytes, and the natural logarithm of its probability; for one of a text also the likeliest tokens."""

    token: int
    text: bytes
    logprob: float | None
    """None for the first token of a prompt, before which there is nothing."""
    likeliest: "tuple[TokenLogprob, ...]" = ()
    is_special: bool = False
    """Whether it adds nothing to a text; its bytes are its name."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Some tokens of the prompt with their log probabilities; such events follow each other until all have come."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """More text. `text` may be empty while a character is incomplete or a stop string may have begun."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts. `cached_tokens`: of the prompt, from a prefix cache. `accepted_draft_tokens`: of the completion."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_draft_tokens: int = 0

    @property
    def counted_tokens(self) -> int:
        """The tokens that throughput is about; see `protocol.measurements.Workload`."""
        return self.completion_tokens or self.prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds at the coordinator: time to first token, time per output token after it, total."""

    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One stage's scores of the admitted methods: natural logarithms of cost in seconds, lower is better.

    `table_digest`: of the agreed table that they were learned from, None for none.
    """

    peer: PeerId
    scores: dict[str, float]
    table_digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """The stages' votes and the method agreed on.

    `epoch` and `table_digest` name the agreed table that all these votes and the coordinator's own were learned from;
    None where there was none, or not the same one. `weighed`: whether the votes were weighted by reputation, because
    all stages follow the same statement.
    """

    votes: tuple[Vote, ...]
    agreed: str
    weighed: bool
    epoch: int | None
    table_digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedCost:
    """A method's predicted cost and speed-up over the baseline; `deviation`: of the logarithm of the speed-up."""

    cost_s: float
    speedup: float
    deviation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """This node's assessment of a job's method selection, for the tokens that came.

    `basis`: `rule`, or `model` of `experiences`. `accepted`: for the vote. `confidence`: that no untried method is much
    better than that in use, None where the route does not offer that; if too low, `probes` get a trial. `regret_s`:
    predicted cost over that of the best method.
    """

    basis: str
    experiences: int
    predictions: dict[str, PredictedCost]
    accepted: tuple[str, ...]
    explored: bool
    confidence: float | None
    probes: tuple[str, ...]
    predicted_s: float
    predicted_speedup: float
    regret_s: float
    predicted_cost: float | None = None  # of the method in use: seconds of computing times the peers' prices


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """The cost of a job. `compute_s`: on all stages, 0 where unknown. `is_replayed`: see JobResult."""

    job_id: JobId
    method: str
    completion_tokens: int
    total_s: float
    is_replayed: bool
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of a job: the seconds of computing on each stage times the price of its peer.

    `predicted`: for all of its `max_tokens`, when it was admitted; None where nothing was. `budget`: as requested.
    `actual`: without the stages that were lost; None where a stage has not stated what it computed.
    """

    objective: Objective
    budget: float | None
    predicted: float | None
    actual: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStage:
    """A stage of a traced job. `clock_error_s`: by how much its links may be off; None where it reported nothing."""

    peer: PeerId
    blocks: BlockRange
    clock_error_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTiming:
    """Where the time of one round went on a stage, the number `stage` of the trace, in seconds; see `StepTiming`.

    `link_s`: the way of its input from the stage before, for the first one of the last token; None where the stage
    before reported nothing.
    """

    stage: int
    link_s: float | None
    queue_s: float
    compute_s: float
    serialise_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRound:
    """Tokens that were drawn in one step, the first at `position`, and came `arrived_s` after the job began.

    `has_prompt`: the first of a route, before which the stages computed the prompt or replayed the text.
    """

    position: int
    tokens: int
    arrived_s: float
    has_prompt: bool
    stages: tuple[StageTiming, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTrace:
    """Where the time of a job's tokens went. `dropped_steps`: too many to be retained by their stages."""

    stages: tuple[TracedStage, ...]
    rounds: tuple[TracedRound, ...]
    dropped_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """The last event of a completed job.

    `replays`: stages that were lost and replaced. `is_replayed`: whether it had to go on over another route, be it with
    the same stages: its times then say nothing of its method.
    """

    job_id: JobId
    model: ModelId
    model_name: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    route: tuple[StageObservation, ...]
    method: MethodInForce
    consensus: Consensus
    replays: int
    is_replayed: bool = False
    cost: Cost | None = None
    selection: Selection | None = None
    stop_string: str | None = None
    """The stop string that ended the text, if one did."""
    embedding: "array[float] | None" = None
    """Of the prompt, f32, not normalised, where it was asked for."""
    trace: JobTrace | None = None
    """Where the job asked for one."""

    @property
    def is_stated(self) -> bool:
        """Whether every stage has stated what the job cost there; if not, nothing is learned from it."""
        return all(stage.is_stated for stage in self.route)


JobEvent = JobStarted | PromptScored | TextDelta | JobResult


class Submitter(Protocol):
    """Takes jobs. The coordinator is one; so is a fake."""

    def submit(self, request: JobRequest) -> AbstractAsyncContextManager[AsyncIterator[JobEvent]]:
        """Run a job inside the block: JobStarted, PromptScored… where it is wanted, TextDelta…, JobResult.

        Leaving early cancels it on every stage. Raises JobError on entering the block or while iterating.
        """

    async def count_tokens(self, request: JobRequest) -> int:
        """Return how many tokens the prompt of a request has, without a job. Raises JobError."""

    async def capabilities_of(self, model: str) -> ModelCapabilities:
        """Return what can be asked of the model that a user means. Raises JobError."""
