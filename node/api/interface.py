"""What the HTTP API requires of the node, and the JSON documents of the `/swarm/…` pages.

The typed dictionaries are the documents themselves: the node fills them, the command line reads them. What their
fields mean is in docs/http-api.md, which a test compares with them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import trio

from node.config import ServeSpec
from node.coordinator.submission import JobRequest, Submitter
from node.coordinator.trial import Trial, TrialSpec
from protocol.identity import JobId
from selector.consensus.clock import Phase

if TYPE_CHECKING:  # the command line needs the documents, and not the libraries of telemetry
    from node.telemetry.observer import Telemetry


class SpanSummary(TypedDict):
    """A span as its peer announces it."""

    model: str
    name: str
    start: int
    end: int


class PeerSpan(SpanSummary):
    """A span of a peer, with its load as of the last heartbeat."""

    sessions: int
    queued_rows: int
    free_positions: int
    step_s: float


class SpanDocument(SpanSummary):
    """A span that this node serves."""

    block_count: int
    sessions: int
    queued_rows: int
    step_s: float
    device: str
    engine: str | None
    reserved_positions: int
    cached_positions: int
    kv_positions: int
    weight_bytes: int
    worker_pid: int | None
    steps: int
    compute_s: float


class TrialCounts(TypedDict):
    """Jobs that measure methods: for `metaswarm bench`, for this node's learning and for the consensus."""

    running: int
    done: int
    failed: int
    cancelled: int
    rejected: int


class JobCounts(TypedDict):
    """Jobs submitted at this node since its start, by outcome; `trials` are in no other count."""

    running: int
    done: int
    failed: int
    cancelled: int
    rejected: int
    trials: TrialCounts


class TransfersDocument(TypedDict):
    """Bytes of model files exchanged with peers since the start."""

    received_bytes: dict[str, int]
    served_bytes: int


class BootstrapStatus(TypedDict):
    """One bootstrap address."""

    multiaddr: str
    peer_id: str | None
    error: str | None


class HistoryStatus(TypedDict):
    """The observations in this node's history."""

    count: int
    digest: str
    new_by_gossip: int
    new_by_sync: int
    last_equal_s: float | None


class StatementDocument(TypedDict):
    """An agreed statement of a chain."""

    epoch: int
    statement: str
    proposer: str
    committee: int
    signatures: int
    members: int
    joined: int
    left: int
    expelled: int
    commits: int


class ChainStatus(TypedDict):
    """Head of a model's chain, as far as this node has verified it."""

    model: str
    name: str
    epoch: int | None
    statement: str | None
    table_digest: str | None
    members: int
    cells: int
    firm_cells: int
    weight: float | None
    measured: int
    current_epoch: int
    epoch_s: float
    phase: Phase
    phase_ends_s: dict[Phase, float]
    statements: list[StatementDocument]


class GapDocument(SpanSummary):
    """Blocks of a partly served model that no peer serves, and how to fill the gap."""

    memory_bytes: int | None
    serve: str


class SelectionStatus(TypedDict):
    """How this node learns which method to use, and the cost of exploration since its start."""

    basis: Literal["rule", "model"]
    model_version: int
    experiences: int
    training_s: float | None
    trained_ago_s: float | None
    jobs: int
    explored_jobs: int
    regret_s: float
    trials: int
    trial_s: float
    budget_left_s: float


class ExplainedMethod(TypedDict):
    """A method that the task admits."""

    name: str
    predicted_s: float
    predicted_speedup: float
    speedup_low: float
    speedup_high: float
    votes: dict[str, float]
    accepted: bool
    trial_speedup: float | None


class PastDecision(TypedDict):
    """An earlier choice and its outcome."""

    job_id: str
    method: str
    basis: str
    explored: bool
    predicted_s: float
    actual_s: float
    regret_s: float


class PastDecisions(TypedDict):
    """Earlier choices and how well they were predicted."""

    jobs: int
    typical_error: float | None
    mean_regret_s: float
    recent: list[PastDecision]


class Explanation(TypedDict):
    """Which method a task would be served with, and why."""

    model: str
    task: dict[str, str | float]
    route: list[dict[str, Any]]
    selection: SelectionStatus
    methods: list[ExplainedMethod]
    not_offered: list[str]
    agreed: str
    reason: str
    confidence: float | None
    probes: list[str]
    table_digest: str | None
    past: PastDecisions


class PeerCounts(TypedDict):
    """The other peers, and the sessions that they opened here since the start."""

    known: int
    reached: int
    banned: int
    sessions_opened: int
    sessions_refused: int
    sessions_failed: int
    sessions_held: int
    held_bytes: int


class ReachabilityDocument(TypedDict):
    """How this node can be reached, as far as it is known."""

    verdict: Literal["public", "private", "unknown"]
    observed: list[str]
    endpoint_dependent: bool
    port_mapped: bool
    relays: list[str]
    relay_bytes_per_s: float


class TrafficDocument(TypedDict):
    """Job streams to peers and from them; bytes that all connections with peers have carried since the start."""

    outbound_links: int
    inbound_links: int
    sent_bytes: int
    received_bytes: int


class NodeStatus(TypedDict):
    """`GET /swarm/status`."""

    peer_id: str
    agent: str
    multiaddrs: list[str]
    reachability: ReachabilityDocument
    api_url: str
    state: Literal["serving", "draining"]
    uptime_s: float
    connected_peers: int
    clock_ahead_s: float | None
    peers: PeerCounts
    bootstrap: list[BootstrapStatus]
    serve: list[str]
    spans: list[SpanDocument]
    loading: list[SpanSummary]
    jobs: JobCounts
    history: HistoryStatus | None
    consensus: list[ChainStatus]
    selection: SelectionStatus
    transfers: TransfersDocument
    problems: list[str]
    uncovered: list[GapDocument]
    traffic: TrafficDocument


class BanDocument(TypedDict):
    """A ban: nothing from the peer is processed."""

    left_s: float
    reason: str


class PeerSessions(TypedDict):
    """Sessions that a peer opened here since the start, and what it holds now."""

    opened: int
    refused: dict[str, int]
    failed: dict[str, int]
    faults: int
    held_sessions: int
    held_positions: int
    held_bytes: int


class PeerJobs(TypedDict):
    """How a peer served this node's own jobs."""

    served: int
    failed: int
    lagged: int
    trust: float
    avoided_s: float
    block_s: dict[str, float]


class PeerStatus(TypedDict):
    """A peer that this node knows."""

    peer_id: str
    addresses: list[str]
    agent: str
    connected: bool
    reached: bool
    way: Literal["direct", "punched", "relayed"] | None
    relay: str | None
    leaving: bool
    rtt_s: float | None
    neighbours: dict[str, float]
    hardware: str | None
    last_seen_s: float | None
    spans: list[PeerSpan]
    banned: BanDocument | None
    sessions: PeerSessions | None
    jobs: PeerJobs | None


class LineageQuality(TypedDict):
    """Effect of a lossy variant on a model's output; see `node.engine.quality`."""

    greedy_agreement: float | None
    mean_kl: float
    perplexity_change: float


class ModelDocument(TypedDict):
    """A model that a peer serves or whose package is in the local cache."""

    model: str
    name: str
    block_count: int
    coverage: list[int]
    uncovered: list[tuple[int, int]]
    apart: list[tuple[str, str]]
    complete: bool
    local: bool
    size_bytes: int | None
    format: str | None
    architecture: str | None
    weight_type: str | None
    max_positions: int | None
    quality: dict[str, LineageQuality | None]


class StageDocument(TypedDict):
    """One stage of a job."""

    peer: str
    start: int
    end: int


class JobDocument(TypedDict):
    """A job that was submitted at this node, without its texts."""

    job_id: str
    model: str
    name: str
    state: Literal["opening", "running", "done", "failed", "cancelled"]
    trial: bool
    task: Literal["generate", "embed", "score"]
    submitted_at: float
    prompt_tokens: int
    tokens: int
    route: list[StageDocument]
    method: str | None
    replays: int
    error: str | None
    details: dict[str, Any] | None


class Sample(TypedDict):
    """Figures of this node at one time."""

    at: float
    observations: int
    peers: int
    jobs: int
    regret_s: float


class LearningDocument(TypedDict):
    """How the history grew, and how past choices turned out."""

    samples: list[Sample]
    past: PastDecisions
    late_predictions: int


class JoinDocument(TypedDict):
    """Commands with which another node joins."""

    here: str | None
    elsewhere: str | None


class NodeView(Protocol):
    """The node as the HTTP API sees it. Only `bench` and `explain` ask other peers."""

    @property
    def stopping(self) -> trio.Event:
        """Set once the node stops: answers without an end end then."""

    @property
    def submitter(self) -> Submitter:
        """The coordinator."""

    async def bench(self, spec: TrialSpec) -> Trial:
        """Measure methods against the baseline, by real jobs. Raises JobError."""

    async def status(self) -> NodeStatus:
        """Return the status of this node."""

    @property
    def telemetry(self) -> "Telemetry":
        """What counts, logs and traces."""

    def faults(self) -> list[str]:
        """Return why the node is not ready: spans that are not served, a swarm that is not joined; empty if it is."""

    async def problems(self) -> list[str]:
        """Return what the node works in spite of, such as a full disk."""

    def peers(self) -> list[PeerStatus]:
        """Return the known peers, without this one."""

    def models(self) -> list[ModelDocument]:
        """Return the known models."""

    def jobs(self, after: int = 0) -> tuple[list[JobDocument], int]:
        """Return the recent jobs that changed after a revision, and the revision now."""

    def running_jobs(self) -> list[JobId]:
        """Return the jobs that have not ended."""

    def learning(self) -> LearningDocument:
        """Return how the history grew, and how past choices turned out."""

    def join(self, serve: ServeSpec | None) -> JoinDocument:
        """Return the commands with which another node joins. `serve`: what it serves; None for the same models."""

    async def explain(self, request: JobRequest, overrides: Mapping[str, Any]) -> Explanation:
        """Collect the stages' votes on a job without running it; `overrides` overrides its context. Raises JobError."""
