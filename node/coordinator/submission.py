"""A job as its submitter sees it: the request, the text as it comes, the result, and what can go wrong."""

import enum
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from protocol.identity import JobId, ModelId, PeerId
from protocol.measurements import QualityBound, StageObservation
from protocol.messages import FinishReason

AUTO: Final = "auto"
"""In place of a method: the swarm chooses."""


class JobErrorCode(enum.StrEnum):
    """Why a job was not done. The HTTP API maps each to a status, the command line to its one line."""

    INVALID = "invalid_request"
    """The request itself is wrong: 400."""
    MODEL_NOT_FOUND = "model_not_found"
    """Nobody in the swarm knows the model, or its name is ambiguous: 404."""
    CONTEXT_LENGTH = "context_length_exceeded"
    """Prompt and output exceed what the model or the serving peers allow: 400."""
    UNCOVERED = "blocks_not_served"
    """No peer serves some of the model's blocks, which the message names: 503, worth a retry."""
    FULL = "peers_full"
    """The peers that serve the model have no room now: 503, worth a retry."""
    MEASURING = "quality_being_measured"
    """What the method does to the model's answers is being measured here: 503, worth a retry."""
    FAILED = "job_failed"
    """A stage failed and could not be replaced: 502."""
    LEAVING = "node_leaving"
    """This node is about to leave and takes no new jobs: 503."""


CLIENT_MISTAKES = frozenset({JobErrorCode.INVALID, JobErrorCode.MODEL_NOT_FOUND, JobErrorCode.CONTEXT_LENGTH})
"""What no peer can help with: such a job is rejected, it has not failed."""


class JobError(Exception):
    """A job cannot be done. The message is one line for the user: what is wrong and what to do."""

    def __init__(
        self, code: JobErrorCode, message: str, *, retry_after_s: float | None = None, param: str | None = None
    ) -> None:
        """`param`: the field of the request that is wrong, where it is one."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What a user asks for. Exactly one of `prompt`, `prompt_tokens` and `messages` is given.

    `model` is what the user typed: a prefix of an id, a catalogue name, a local name. `messages` are rendered by the
    model's chat template. `max_tokens` None means as many as the model's context allows, up to the node's default; a
    larger one than the context allows is cut. `seed` None means that the coordinator draws one, any other is taken
    modulo 2**64. `method` is `auto`, or a method by its switches. How tokens are drawn: `node.engine.sampling`.
    """

    model: str
    prompt: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    """No stop token is drawn before there are so many, and no stop string is looked for in their text."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added to their logits."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's own end-of-text tokens."""
    ignore_eos: bool = False
    """Go on past the model's end-of-text tokens; for benchmarks and comparisons."""
    quality: QualityBound = QualityBound.EXACT
    method: str = AUTO
    background: bool = False
    """Nobody waits for it: it makes way for the jobs of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted:
    """The job was accepted: the first event. `created_s` is Unix time."""

    job_id: JobId
    model: ModelId
    model_name: str
    prompt_tokens: int
    created_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """More text. `text` may be empty while a character is incomplete or a stop string might be under way."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of the job.

    `cached_tokens` of the prompt came from a prefix cache; `accepted_draft_tokens` of the text were guessed right.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds as the coordinator saw them: time to first token, time per output token after it, total."""

    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodChoice:
    """The acceleration method in force: the session's switches and the policy of the stages."""

    name: str
    switches: dict[str, str]
    stage_policy: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One stage's scores of the admitted methods: log cost, lower is better."""

    peer: PeerId
    scores: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """What the stages voted and agreed; `epoch` and `table_digest` name the agreed history behind it, if any.

    `weighed`: whether the votes counted by the reputation of who gave them, because all stages stand by that history.
    """

    votes: tuple[Vote, ...]
    agreed: str
    weighed: bool
    epoch: int | None
    table_digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedCost:
    """What a method was expected to cost this job, seconds, and over the baseline.

    `deviation`: the standard deviation that the logarithm of the speed-up is expected to be off by.
    """

    cost_s: float
    speedup: float
    deviation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How this node saw the choice of the method, for as many tokens as came.

    `basis`: `rule` or `model`. `experiences`: measurements that the model was trained on. `accepted`: the methods that
    the votes were about to decide between; `explored`: whether that was one to try out. `regret_s`: what the method
    was expected to cost more than the best one.
    """

    basis: str
    experiences: int
    predictions: dict[str, PredictedCost]
    accepted: tuple[str, ...]
    explored: bool
    predicted_s: float
    predicted_speedup: float
    regret_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """What a job took in the end. `replays`: stages lost and replaced on the way."""

    job_id: JobId
    method: str
    completion_tokens: int
    total_s: float
    replays: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """The last event of a job that was done."""

    job_id: JobId
    model: ModelId
    model_name: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    route: tuple[StageObservation, ...]
    method: MethodChoice
    consensus: Consensus
    replays: int
    selection: Selection | None = None


JobEvent = JobStarted | TextDelta | JobResult


class Submitter(Protocol):
    """Takes jobs. The coordinator is one; so is a fake."""

    def submit(self, request: JobRequest) -> AbstractAsyncContextManager[AsyncIterator[JobEvent]]:
        """Run a job inside the block: JobStarted, TextDelta…, JobResult. Leaving early cancels it on every stage.

        Raises JobError on entering the block or while iterating.
        """
        ...
