"""The messages of the job stream, each field with its bounds. `protocol.states` defines who may send which when.

A job stream runs from an *initiator* to a *responder*. The coordinator sends Open and prompts on it, a stage sends its
output to the next stage, and the last stage sends tokens to the first stage and to the coordinator. The initiator sends
work; the responder answers with admission, credit and failures.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Final, TypeAlias

from protocol.errors import RemoteProtocolError
from protocol.forms import (
    ContextValue,
    Counter,
    Digest,
    Explanation,
    Hardware,
    LogitBias,
    Name,
    Nonce,
    PackedTokens,
    Penalty,
    Position,
    PositionCount,
    PrefixHashes,
    RequestId,
    Score,
    Seconds,
    Share,
    Signature,
    Switch,
    TokenId,
    TraceParent,
)
from protocol.identity import BlockRange, ModelId, PeerId, SessionId
from protocol.limits import (
    MAX_BALLOTS,
    MAX_CONTEXT,
    MAX_JSON_SCHEMA_BYTES,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_POSITIONS,
    MAX_STAGE_FACTS,
    MAX_STAGES,
    MAX_STOP_TOKENS,
    MAX_SWITCHES,
    MAX_TEMPERATURE,
    MAX_VOCABULARY,
    MAX_VOTES,
    MAX_WINDOW_BYTES,
)
from protocol.reports import Progress, ProgressRequest, Timings, TimingsRequest
from protocol.schema import ARRAY, OMIT_DEFAULT, Count, Range, text
from protocol.stage_facts import StageFacts
from protocol.tensors import Pooling, Tensor

LATEST_MINOR: Final = 2
"""The latest version of the job protocol is 1.LATEST_MINOR; "since version 1.1" marks additions to 1.0."""


class RefusalReason(enum.StrEnum):
    """Why a stage refuses to open a session, on which the coordinator's reaction depends."""

    FULL = "full"  # no KV memory or no free slot: try another peer, or retry later
    NOT_SERVED = "not_served"
    """These blocks of this model are not, or no longer, served here: the directory was stale."""
    NOT_READY = "not_ready"
    """None of the requested methods is available yet: request others, or retry when they are built."""
    UNABLE = "unable"
    """None of the requested methods will be available: request others."""
    LEAVING = "leaving"
    """The peer drains before it leaves: avoid it."""
    UNREACHABLE = "unreachable"
    """The stage cannot reach the peer of the next stage, which `message` names: try another pair."""
    INVALID = "invalid"
    """The request is invalid for this peer, by a defect or another version: do not retry."""


class FailureReason(enum.StrEnum):
    """Why a session ended on a stage that its coordinator had not closed."""

    ENGINE = "engine"
    """The engine failed or its worker process died."""
    TALLY = "tally"
    """The Begin does not follow from the votes, or misquotes the vote of this stage."""
    DOWNSTREAM = "downstream"
    """The next stage, which `peer` names, is unreachable or refused the rows."""
    UNKNOWN_SESSION = "unknown_session"
    """Rows arrived for an unknown session, or from a peer that may not send them."""
    EXPIRED = "expired"
    """The session did not begin in time, or was idle for longer than its limit."""
    LEAVING = "leaving"
    """The peer shuts down."""
    REQUEST = "request"
    """What the job asks for cannot be done, here or elsewhere: its JSON Schema admits no text, or costs too much."""


class FinishReason(enum.StrEnum):
    """Why a job's text ended, as in the OpenAI API."""

    STOP = "stop"
    """A stop token or stop string."""
    LENGTH = "length"
    """The limit on new tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message of each side.

    `window_bytes`: how much of one session its sender holds unconsumed; there the other side pauses until `Credit`.
    """

    agent: Name
    window_bytes: Annotated[int, Range(1, MAX_WINDOW_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the last stage samples tokens; temperature 0 is greedy. Keyed by (seed, position): a replay draws the same.

    All but the first five fields exist since version 1.1, from `logprobs` on since 1.2. The penalties are those of the
    OpenAI API (presence and frequency, of the output) and of transformers (repetition, of prompt and output); they
    depend on the job's tokens, see `TokenHistory`. `logit_bias`: pairs of a token id, ascending, and the term added to
    its logit.
    """

    temperature: Annotated[float, Range(0.0, MAX_TEMPERATURE)] = 0.0
    top_p: Share = 1.0
    seed: Nonce = 0
    max_tokens: Annotated[int, Range(0, MAX_POSITIONS)]
    stop_tokens: Annotated[tuple[TokenId, ...], Count(MAX_STOP_TOKENS)] = ()
    top_k: Annotated[int, Range(1, MAX_VOCABULARY), OMIT_DEFAULT] = 0
    """Sample from this many of the likeliest tokens; 0 for all."""
    min_p: Annotated[Share, OMIT_DEFAULT] = 0.0
    """Sample from tokens with at least this fraction of the likeliest token's probability."""
    repetition_penalty: Annotated[float, Range(1 / MAX_PENALTY, MAX_PENALTY), OMIT_DEFAULT] = 1.0
    frequency_penalty: Annotated[Penalty, OMIT_DEFAULT] = 0.0
    presence_penalty: Annotated[Penalty, OMIT_DEFAULT] = 0.0
    logit_bias: Annotated[tuple[tuple[TokenId, LogitBias], ...], Count(MAX_LOGIT_BIASES), OMIT_DEFAULT] = ()
    min_length: Annotated[int, Range(1, MAX_POSITIONS), OMIT_DEFAULT] = 0
    """Stop tokens are masked at positions below this one, prompt included: a replay needs no other value."""
    prompt_length: Annotated[int, Range(1, MAX_POSITIONS), OMIT_DEFAULT] = 0
    logprobs: Annotated[int, Range(1, MAX_LOGPROBS), OMIT_DEFAULT] = 0
    """The coordinator gets the log probability of each token, and those of the likeliest `logprobs` - 1 tokens."""
    json_schema: Annotated[str, text(MAX_JSON_SCHEMA_BYTES), OMIT_DEFAULT] = ""
    """The output is JSON that follows this JSON Schema, itself JSON; empty for any output."""
    reasoning_end: Annotated[TokenId | None, OMIT_DEFAULT] = None
    """The JSON begins behind the first of this token: what is before is reasoning. None: with the first token."""
    reasoning_begin: Annotated[TokenId | None, OMIT_DEFAULT] = None
    """Only an output whose first token is this one has reasoning; None where the prompt ends within the reasoning."""
    pooling: Pooling | None = None
    """The coordinator gets an embedding of the prompt, and nothing is sampled."""
    prompt_logprobs: Annotated[bool, OMIT_DEFAULT] = False
    """The coordinator gets the log probabilities of the prompt's tokens, too; `prompt_length`, `logprobs` are set."""
    penalty_window: Annotated[int, Range(1, MAX_POSITIONS), OMIT_DEFAULT] = 0  # tokens that penalties count; 0 for all

    @property
    def draws_by_history(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        penalties = (self.repetition_penalty - 1.0, self.frequency_penalty, self.presence_penalty)
        return any(penalties) or bool(self.json_schema)

    @property
    def needs_history(self) -> bool:
        """Whether the last stage needs the tokens so far: draws depend on them, or the prompt's are scored."""
        return self.draws_by_history or self.prompt_logprobs

    def scored_rows(self, position: int, rows: int) -> int:
        """Return behind how many of the rows from a position on a token of the prompt follows that is to be scored."""
        return max(0, min(rows, self.prompt_length - 1 - position)) if self.prompt_logprobs else 0

    def check(self) -> None:
        """Raise RemoteProtocolError where nothing could be sampled, and for biases or fields that contradict."""
        if self.prompt_logprobs and not (self.prompt_length and self.logprobs and self.pooling is None):
            raise RemoteProtocolError("sampling prompt_logprobs: expected prompt_length and logprobs, and no pooling")
        if not (self.max_tokens or self.prompt_logprobs):
            raise RemoteProtocolError("sampling max_tokens is 0 without prompt_logprobs: nothing is asked for")
        if self.top_p == 0.0:
            raise RemoteProtocolError("sampling top_p is 0: nothing could be drawn")
        if any(first[0] >= second[0] for first, second in pairwise(self.logit_bias)):
            raise RemoteProtocolError("sampling logit_bias: token ids are not ascending")
        if (self.reasoning_end is not None and not self.json_schema) or (
            self.reasoning_begin is not None and self.reasoning_end is None
        ):
            raise RemoteProtocolError("sampling: reasoning_end belongs to a JSON Schema, and reasoning_begin to it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Request of the coordinator to open a session on a stage.

    `methods`: the names of the methods that the job admits, without duplicates, in the coordinator's order of
    preference, which breaks ties of the vote. `positions`: KV positions to reserve. `context`: the task context that
    the stages vote on, names and numbers. `prefix`: the chained hashes of the prompt's whole pages, PREFIX_HASH_BYTES
    each; empty where nothing may be cached. `upstream`: the peers that may send rows of this session besides the
    coordinator (for the first stage the last stage's peer, for others the stage before). `downstream`: the peer of the
    next stage; None for the last stage, which sends each token to the coordinator and to `feedback`, the first stage's
    peer. `sampling`: for the last stage only. `continues`: a session of the previous attempt at this job on the same
    stream; it ends, and this session takes over its KV cache. `background`: a measurement, which yields to users' jobs.
    `stage_facts` (since 1.2): of the route's stages, in order, part of the context; empty where not all are known.
    `request_id`, and `trace_parent` (W3C Trace Context), since version 1.2: for logs and traces.
    """

    session: SessionId
    model: ModelId
    blocks: BlockRange
    methods: Annotated[tuple[Name, ...], Count(MAX_VOTES, 1)]
    positions: Annotated[int, Range(1, MAX_POSITIONS)]
    context: Annotated[Mapping[Name, ContextValue], Count(MAX_CONTEXT)] = field(default_factory=dict)
    prefix: PrefixHashes = b""
    upstream: Annotated[tuple[PeerId, ...], Count(MAX_STAGES)] = ()
    downstream: PeerId | None = None
    feedback: PeerId | None = None
    sampling: Sampling | None = None
    continues: SessionId | None = None
    background: bool = False
    stage_facts: Annotated[tuple[Annotated[StageFacts, ARRAY], ...], Count(MAX_STAGE_FACTS), OMIT_DEFAULT] = ()
    request_id: Annotated[RequestId, OMIT_DEFAULT] = ""
    trace_parent: Annotated[TraceParent, OMIT_DEFAULT] = ""

    def check(self) -> None:
        """Raise RemoteProtocolError for a method named twice, and for fields that contradict each other."""
        if len(set(self.methods)) != len(self.methods):
            raise RemoteProtocolError("open methods: a method is named twice")
        if (self.sampling is None) == (self.downstream is None):
            raise RemoteProtocolError("open: expected sampling for the last stage and downstream for any other stage")
        if self.continues is not None and self.continues.job == self.session.job:
            raise RemoteProtocolError("open continues a session with the job id of this one: expected another attempt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load of a stage, reported with every admission and heartbeat."""

    sessions: Counter = 0
    queued_rows: Counter = 0
    free_positions: Counter = 0
    step_s: Seconds = 0.0  # recent median time of a decode step; 0 when unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenHistory:
    """The next tokens of the job, from the prompt's first on, for a last stage whose draws depend on them.

    As many as it needs are sent before Begin: the last of several stages receives hidden states only. Since 1.1.
    """

    session: SessionId
    tokens: PackedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The stage admits the session: KV memory is reserved.

    `votes`: the logarithm of the cost of each requested method that the stage can run now, lower is better; all equal
    where the stage cannot predict. `cached`: positions of the prompt in the stage's prefix cache, by KV key
    (`engine/arithmetic/activations`, `engine/arithmetic/kv/activations` where `kv` is not `auto`). `policy`: the
    stage's own switches. `held`: positions, from the first on, in the KV cache of a continued session. `kept_from`: the
    start of its replay buffer, which ends at `held`. `statement`: the swarm's statement on the model that the stage
    follows, whose members' reputation would weight the votes; None where it follows none. `table_digest`: of the agreed
    table that the votes were learned from; None where they were learned from none. Since version 1.2.
    """

    session: SessionId
    load: Load
    votes: Annotated[Mapping[Name, Score], Count(MAX_VOTES, 1)]
    cached: Annotated[Mapping[Name, PositionCount], Count(MAX_VOTES)] = field(default_factory=dict)
    policy: Annotated[Mapping[Switch, Switch], Count(MAX_SWITCHES)] = field(default_factory=dict)
    held: PositionCount = 0
    kept_from: PositionCount = 0
    statement: Digest | None = None
    table_digest: Digest | None = None

    def check(self) -> None:
        """Raise RemoteProtocolError where the replay buffer starts behind its end."""
        if self.kept_from > self.held:
            raise RemoteProtocolError(f"opened kept_from is {self.kept_from}: expected 0 to {self.held}")


@dataclass(frozen=True, slots=True)
class Ballot:
    """The vote of one stage, or of the coordinator, as it sends it to all: scores in the order of `Open.methods`.

    None stands for a method that the stage does not offer, or that the coordinator does not accept.
    """

    peer: PeerId
    scores: Annotated[tuple[Score | None, ...], Count(MAX_VOTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """The coordinator begins a session, once, when every stage is open: before it no rows may be computed.

    `method`: the result of the vote. `ballots`: of every stage of the route, in order, then the coordinator's own.
    `start`: the first position that this stage computes; it holds those before. `onward`: the first position whose
    output it sends to the next stage; outputs before `start` come from its replay buffer. `statement`: the statement
    whose members' reputation weighted the ballots; None where all weigh the same, because the stages follow different
    statements.
    """

    session: SessionId
    method: Name
    ballots: Annotated[tuple[Annotated[Ballot, ARRAY], ...], Count(MAX_BALLOTS)]
    start: Position = 0
    onward: Position = 0
    statement: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The stage does not admit the session and holds nothing for it."""

    session: SessionId
    reason: RefusalReason
    message: Explanation
    load: Load
    most_positions: Annotated[PositionCount, OMIT_DEFAULT] = 0
    """What the stage gives a session of this coordinator at most, where it asks for more. Since version 1.2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The rows of one session inside a step.

    `position`: absolute position of the first row. `rows`: their number. `draws`: the number of trailing rows after
    which the last stage draws a token (0 inside a prompt, 1 for decoding). `drafts`: draft tokens of speculative
    decoding, one for each trailing row but the first; the last stage continues to draw while its draws agree with them,
    so that `draws` is one more than their number. `finish_reason`: set on the last token to the coordinator.
    """

    session: SessionId
    position: int
    rows: int
    draws: int = 1
    drafts: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Rows of one or more sessions that go to the same peer; the tensor holds the slices' rows in order.

    Token ids, i32 (rows,), on the way to a first stage or a coordinator; hidden states (rows, hidden size) elsewhere.
    """

    slices: tuple[Slice, ...]
    tensor: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """The responder has consumed this much step payload of the session: the initiator may send as much again."""

    session: SessionId
    consumed_bytes: Annotated[int, Range(1, MAX_WINDOW_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The session is lost on this stage, which has freed it. `peer`: the peer at fault, if not the stage itself."""

    session: SessionId
    reason: FailureReason
    message: Explanation
    peer: PeerId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reroute:
    """The stage asks the coordinator to continue over another route, and serves the session until it does.

    `reason`: `downstream` where it cannot send its outputs, `leaving` where it drains. `peer`: as in `Failed`.
    """

    session: SessionId
    reason: FailureReason
    message: Explanation
    peer: PeerId | None = None

    def check(self) -> None:
        """Raise RemoteProtocolError for a reason that does not justify another route."""
        if self.reason not in {FailureReason.DOWNSTREAM, FailureReason.LEAVING}:
            raise RemoteProtocolError(f"reroute reason is {self.reason}: expected downstream or leaving")


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The coordinator ends the session, finished or cancelled: the stage frees it at once."""

    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatistics:
    """The cost of a session on its stage, for the job's observation. Times in seconds."""

    steps: Counter = 0
    rows: Counter = 0
    compute_s: Seconds = 0.0
    """Time inside the engine's forward passes."""
    queue_s: Seconds = 0.0
    """Time that rows waited for the engine."""
    bytes_in: Counter = 0
    bytes_out: Counter = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The stage has freed the session.

    `hardware`: the class of hardware it ran on. `countersignature`: the stage's signature of its statistics for the
    job's observation, see `protocol.observations`.
    """

    session: SessionId
    statistics: SessionStatistics
    hardware: Hardware = "unknown"
    countersignature: Signature | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Liveness probe; the Pong returns its `nonce`."""

    nonce: Nonce


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """Answer to a Ping."""

    nonce: Nonce


SessionMessage: TypeAlias = (
    Open | Opened | Refused | TokenHistory | Begin | Credit | ProgressRequest | Progress | TimingsRequest | Timings
    | Reroute | Failed | Close | Closed
)  # fmt: skip
"""A control message about one session."""

ControlMessage: TypeAlias = Hello | SessionMessage | Ping | Pong
Message: TypeAlias = ControlMessage | Step
