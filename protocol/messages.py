"""The messages of the job stream. `protocol.connection` says who may send which when, and turns them into bytes.

One stream runs from an *initiator* to a *responder*. A coordinator opens sessions on it and sends prompts; a stage
sends its output to the next stage on it; the last stage sends tokens to the first stage and to the coordinator on it.
Whoever opened the stream sends work, the other end answers with admission, credit and failures.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from protocol.identity import BlockRange, ModelId, PeerId, SessionId
from protocol.tensors import Tensor

LATEST_MINOR: Final = 1
"""The latest version of the job protocol is 1.LATEST_MINOR; what it adds to 1.0 says so below."""


class RefusalReason(enum.StrEnum):
    """Why a stage refuses to open a session; the coordinator's next move depends on it."""

    FULL = "full"
    """No KV memory or no slot now: try another peer, come back later."""
    NOT_SERVED = "not_served"
    """These blocks of this model are not (or no longer) served here: the directory was stale."""
    NOT_READY = "not_ready"
    """None of the methods asked for can be offered here now: ask for others, or come back when they are built."""
    UNABLE = "unable"
    """None of the methods asked for can be had here, now or later: ask for others."""
    LEAVING = "leaving"
    """The peer drains before it leaves: avoid it from now on."""
    UNREACHABLE = "unreachable"
    """The stage cannot reach the peer it would have to send its output to; `message` names it: try another pair."""
    INVALID = "invalid"
    """The request makes no sense to this peer: a defect or a version apart, do not retry."""


class FailureReason(enum.StrEnum):
    """Why a session ended on a stage without being closed by its coordinator."""

    ENGINE = "engine"
    """The engine failed or its worker process died."""
    TALLY = "tally"
    """The Begin does not follow from the votes, or from the vote that was given here."""
    DOWNSTREAM = "downstream"
    """The next stage cannot be reached or refused the rows; `peer` names it."""
    UNKNOWN_SESSION = "unknown_session"
    """Rows came for a session that this peer does not have, or from a peer that may not send them."""
    EXPIRED = "expired"
    """The session did not begin in time, or nothing was heard of it for longer than its idle limit."""
    LEAVING = "leaving"
    """The peer leaves now."""


class FinishReason(enum.StrEnum):
    """Why a job's text ended, as in the OpenAI API."""

    STOP = "stop"
    """A stop token or stop string."""
    LENGTH = "length"
    """The limit on new tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message of each side.

    `window_bytes`: the tensor payload of any one session that the sender of this Hello is willing to hold before it
    has consumed it; the other side stops there until `Credit` comes.
    """

    agent: str
    window_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the last stage draws tokens; temperature 0 is greedy. Keyed by (seed, position): a replay draws the same.

    All but the first five fields exist since version 1.1. The penalties are those of the OpenAI API (presence and
    frequency, of the output) and of transformers (repetition, of prompt and output); `logit_bias` is pairs of a token
    id and what is added to its logit. They need the tokens so far: see `TokenHistory`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int
    stop_tokens: tuple[int, ...] = ()
    top_k: int = 0
    """Draw among so many likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Draw among tokens at least so probable in relation to the likeliest."""
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_length: int = 0
    """No stop token is drawn for a position below this one, prompt included: a replay needs no other value."""
    prompt_length: int = 0
    """How many of the first positions are the prompt's."""

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens so far."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """The coordinator asks a stage for a session.

    `methods`: the names of the methods that the job admits, at least one, the coordinator's preference first: where the
    votes leave it open, the order decides. `context`: what the votes are about, names and numbers. `positions`: KV
    positions to reserve. `prefix`: the chained hashes of the prompt's whole pages, PREFIX_HASH_BYTES each; empty where
    nothing may be cached. `upstream`: the peers that may send rows of this session, besides the
    coordinator itself (for the first stage the last stage's peer, for others the stage before). `downstream`: the peer
    of the next stage; None for the last stage, which sends each token to the coordinator and to `feedback`, the
    first stage's peer. `sampling` is present for the last stage only. `continues`: a session that was opened over the
    same stream for a former attempt at the same job, and ends by this: what it holds is this one's from now on.
    `background`: nobody waits for the job, which is a measurement: it makes way for those of others.
    """

    session: SessionId
    model: ModelId
    blocks: BlockRange
    methods: tuple[str, ...]
    positions: int
    context: Mapping[str, str | float] = field(default_factory=dict)
    prefix: bytes = b""
    upstream: tuple[PeerId, ...] = ()
    downstream: PeerId | None = None
    feedback: PeerId | None = None
    sampling: Sampling | None = None
    continues: SessionId | None = None
    background: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a stage is, told with every admission and heartbeat."""

    sessions: int = 0
    queued_rows: int = 0
    free_positions: int = 0
    step_s: float = 0.0
    """Median time of a decode step of late, seconds; 0 when unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenHistory:
    """The next tokens of a job so far, from the prompt's first on, for a last stage whose draws depend on them.

    The coordinator sends as many of these as it takes before it begins the session: a last stage of a longer route
    sees hidden states only. Since version 1.1.
    """

    session: SessionId
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The stage admits the session: KV memory is reserved.

    `votes`: of each method asked for that the stage can carry out now, the logarithm of its cost: lower is better. A
    stage without an opinion gives them all the same. `cached`: positions of the prompt whose keys and values lie here
    already, by KV key (`engine/arithmetic/activations`). `policy`: the switches of the stage's own that are in force.
    `held`: positions, from the first on, whose keys and values a session that is continued holds. `kept_from`: its
    outputs from there to `held` can be sent again. `statement`: what the swarm agreed of the model as this stage has
    it, by whose members' reputation it would weigh the votes; None where it stands by nothing.
    """

    session: SessionId
    load: Load
    votes: Mapping[str, float]
    cached: Mapping[str, int] = field(default_factory=dict)
    policy: Mapping[str, str] = field(default_factory=dict)
    held: int = 0
    kept_from: int = 0
    statement: bytes | None = None


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one stage voted, or the coordinator itself, as it tells all: scores in the order of `Open.methods`.

    None stands for a method that the stage does not offer, or that the coordinator does not accept.
    """

    peer: PeerId
    scores: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """The coordinator begins a session, once, when every stage is open: before it no rows may be computed.

    `method`: what the ballots come to. `ballots`: of every stage of the route, in order, then the coordinator's own.
    `start`: the first position whose row this stage computes; it holds those before. `onward`: the first whose output
    it sends on, where the next stage starts; outputs before `start` are those that it has kept. `statement`: by whose
    members' reputation the ballots were weighed; None where all weigh the same, because not all stand by the same.
    """

    session: SessionId
    method: str
    ballots: tuple[Ballot, ...]
    start: int = 0
    onward: int = 0
    statement: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The stage does not admit the session; nothing is held for it."""

    session: SessionId
    reason: RefusalReason
    message: str
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The rows of one session inside a step.

    `position`: absolute position of the first row. `rows`: how many. `draws`: after how many trailing rows the last
    stage draws a token (0 for a part of a prompt, 1 for decoding). `drafts`: the tokens that the trailing rows but the
    first were made of, guessed by the first stage: the last stage goes on drawing while it draws what was guessed, so
    that `draws` is one more than they are. `finish_reason`: set on the last token's way to the coordinator.
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
    consumed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRequest:
    """The coordinator asks a stage how far it has come. Since version 1.1."""

    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a session has come on this stage, in answer to a ProgressRequest. Since version 1.1.

    Each is the first position that is not yet so: `received`, `computed`, and `sent` on to the next stage, which of a
    last stage are tokens sent to the coordinator. A replay makes them smaller.
    """

    session: SessionId
    received: int
    computed: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The session is lost on this stage, which holds nothing of it any more. `peer`: whom it blames, if not itself."""

    session: SessionId
    reason: FailureReason
    message: str
    peer: PeerId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reroute:
    """The stage asks the coordinator to go on over another route, and holds the session until it does.

    `reason` is `downstream` where it cannot send its outputs on, and `leaving` where it would like to go: then it
    serves the session as before meanwhile. `peer`: whom it blames, if not itself.
    """

    session: SessionId
    reason: FailureReason
    message: str
    peer: PeerId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The coordinator ends the session, done or cancelled: the stage frees it at once."""

    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatistics:
    """What a session cost its stage; the ground of the job's observation. Times in seconds."""

    steps: int = 0
    rows: int = 0
    compute_s: float = 0.0
    """Time inside the engine's forward passes."""
    queue_s: float = 0.0
    """Time that rows waited for the engine."""
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The stage has freed the session.

    `hardware`: the class of hardware it ran on. `countersignature`: the stage's signature of these figures, in the form
    of `protocol.observations`, for the job's observation; None where it gives none.
    """

    session: SessionId
    statistics: SessionStatistics
    hardware: str = "unknown"
    countersignature: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Is the other end alive? `nonce` comes back in the Pong."""

    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """It is."""

    nonce: int


Message = (
    Hello
    | Open
    | Opened
    | Refused
    | TokenHistory
    | Begin
    | Step
    | Credit
    | ProgressRequest
    | Progress
    | Reroute
    | Failed
    | Close
    | Closed
    | Ping
    | Pong
)
