"""What the HTTP API requires of the node, and the JSON documents of the `/swarm/…` pages.

The typed dictionaries are the documents themselves: the node fills them, the command line reads them, and
docs/http-api.md lists their fields.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypedDict

from node.coordinator.submission import JobRequest, Submitter
from node.coordinator.trial_runner import Trial, TrialSpec


class SpanDocument(TypedDict):
    """A span that this node serves."""

    model: str
    """Id of the model."""
    name: str
    """Name of the model; empty if it has none."""
    start: int
    end: int
    """Exclusive."""
    block_count: int
    """Blocks of the whole model."""
    sessions: int
    reserved_positions: int
    kv_positions: int
    """Capacity: positions that all sessions together may reserve."""
    weight_bytes: int
    worker_pid: int | None
    steps: int
    compute_s: float


class TrialCounts(TypedDict):
    """Jobs that measure methods: for `metaswarm bench`, for this node's learning and for the consensus."""

    running: int
    done: int
    failed: int
    """Including those that could not begin or were preempted by jobs of users."""


class JobCounts(TypedDict):
    """Jobs submitted at this node since its start, by outcome; `trials` are in no other count."""

    running: int
    done: int
    failed: int
    """Failed in the swarm."""
    cancelled: int
    rejected: int
    """Client errors: a wrong field, an unknown model, a prompt that is too long."""
    trials: TrialCounts


class TransfersDocument(TypedDict):
    """Bytes of model files exchanged with peers since the start."""

    received_bytes: dict[str, int]
    """By peer."""
    served_bytes: int
    """To all peers."""


class BootstrapStatus(TypedDict):
    """One bootstrap address."""

    multiaddr: str
    peer_id: str | None
    error: str | None
    """Error of the last dial; null if it succeeded."""


class HistoryStatus(TypedDict):
    """The observations in this node's history."""

    count: int
    digest: str
    """Of all observations, hexadecimal; equal at nodes with the same history."""
    new_by_gossip: int
    """Received by gossip since the start."""
    new_by_sync: int
    """Received by anti-entropy since the start."""
    last_equal_s: float | None
    """Age of the last sync that found a neighbour's history equal; null before the first."""


class ChainStatus(TypedDict):
    """Head of a model's chain, as far as this node has verified it."""

    model: str
    """Id of the model."""
    name: str
    """Name of the model; empty if it has none."""
    epoch: int | None
    """Of the head; null before the first statement."""
    statement: str | None
    """Hash of the head, hexadecimal; `--checkpoint` takes it."""
    table_digest: str | None
    """Of the agreed table, hexadecimal; equal at nodes with the same table."""
    members: int
    cells: int
    """Cells of the agreed table: methods in contexts that were measured."""
    firm_cells: int
    """Cells with a quorum of measurements."""
    weight: float | None
    """Reputation of this node, natural log odds; null if it is not a member."""
    measured: int
    """Cells that this node has measured since its start."""


class GapDocument(TypedDict):
    """Blocks of a partly served model that no peer serves, and how to fill the gap."""

    model: str
    name: str
    start: int
    end: int
    memory_bytes: int | None
    """Memory that a node needs to serve them, KV cache included; null while the manifest is missing."""
    serve: str
    """Argument of `--serve` for that node."""


class SelectionStatus(TypedDict):
    """How this node learns which method to use, and the cost of exploration since its start."""

    basis: Literal["rule", "model"]
    """What choices and votes are based on."""
    model_version: int
    """Trainings since the start; 0 before the first."""
    experiences: int
    """Observations in the training set."""
    training_s: float | None
    trained_ago_s: float | None
    jobs: int
    """Jobs with method `auto`."""
    explored_jobs: int
    """Of those, jobs with a method that might turn out better."""
    regret_s: float
    """Predicted extra time of explored jobs."""
    trials: int
    trial_s: float
    """Duration of all trials."""
    budget_left_s: float
    """What may still be spent on exploration and trials."""


class ExplainedMethod(TypedDict):
    """A method that the task admits."""

    name: str
    predicted_s: float
    predicted_speedup: float
    """Over the baseline."""
    speedup_low: float
    """Lower bound of the predicted speed-up (one standard deviation)."""
    speedup_high: float
    """Upper bound."""
    votes: dict[str, float]
    """By peer: natural logarithm of the predicted cost, lower is better; peers without the method are missing."""
    accepted: bool
    """Whether the votes decide about it."""
    trial_speedup: float | None
    """Measured over the baseline for tasks of this bucket; null without a trial."""


class PastDecision(TypedDict):
    """An earlier choice and its outcome."""

    job_id: str
    method: str
    basis: str
    explored: bool
    predicted_s: float
    actual_s: float
    regret_s: float
    """Predicted cost minus that of the best method."""


class PastDecisions(TypedDict):
    """Earlier choices and how well they were predicted."""

    jobs: int
    typical_error: float | None
    """Median factor between prediction and duration, minus 1."""
    mean_regret_s: float
    recent: list[PastDecision]


class Explanation(TypedDict):
    """Which method a task would be served with, and why."""

    model: str
    task: dict[str, str | float]
    """The task context that is decided by."""
    route: list[dict[str, Any]]
    """Stages: `peer`, `start`, `end`."""
    selection: SelectionStatus
    methods: list[ExplainedMethod]
    """The most promising first."""
    agreed: str
    """The method that the votes agree on."""
    past: PastDecisions


class PeerCounts(TypedDict):
    """Peers, and the sessions that they opened here since the start."""

    known: int
    """Peers with a live heartbeat."""
    reached: int
    banned: int
    sessions_opened: int
    sessions_refused: int
    sessions_failed: int
    sessions_held: int
    """Open now."""
    held_bytes: int
    """Rows of theirs that wait to be computed."""


class NodeStatus(TypedDict):
    """`GET /swarm/status`."""

    peer_id: str
    agent: str
    """Program and version, as announced to peers."""
    multiaddrs: list[str]
    api_url: str
    state: Literal["serving", "draining"]
    uptime_s: float
    connected_peers: int
    peers: PeerCounts
    bootstrap: list[BootstrapStatus]
    serve: list[str]
    """The `--serve` options."""
    spans: list[SpanDocument]
    jobs: JobCounts
    history: HistoryStatus | None
    """null if the database cannot be read."""
    consensus: list[ChainStatus]
    """One for each chain that is followed."""
    selection: SelectionStatus
    transfers: TransfersDocument
    uncovered: list[GapDocument]


class SpanSummary(TypedDict):
    """A span as its peer announces it."""

    model: str
    name: str
    start: int
    end: int


class BanDocument(TypedDict):
    """A ban: nothing from the peer is processed."""

    left_s: float
    reason: str


class PeerSessions(TypedDict):
    """Sessions that a peer opened here since the start, and what it holds now."""

    opened: int
    refused: dict[str, int]
    """Sessions by reason."""
    failed: dict[str, int]
    """Sessions by reason, whoever was at fault."""
    faults: int
    """Invalid messages or rows from the peer."""
    held_sessions: int
    held_positions: int
    """KV positions."""
    held_bytes: int
    """Rows that wait to be computed."""


class PeerJobs(TypedDict):
    """How a peer served this node's own jobs."""

    served: int
    failed: int
    lagged: int
    """Jobs in which it was a straggler."""
    trust: float
    """Divisor of its predicted cost: 1 for a peer that never failed."""
    avoided_s: float
    """Rest of the time in which it is used only if no other peer can be."""
    block_s: dict[str, float]
    """Measured seconds for one block and token, by model."""


class PeerStatus(TypedDict):
    """A peer that this node knows."""

    peer_id: str
    addresses: list[str]
    agent: str
    connected: bool
    reached: bool
    """Whether it is connected or was dialled successfully: only then its spans count."""
    leaving: bool
    rtt_s: float | None
    """Round-trip time; null while unknown."""
    last_seen_s: float | None
    """Age of the last heartbeat; null without any."""
    spans: list[SpanSummary]
    banned: BanDocument | None
    sessions: PeerSessions | None
    """null if it opened none."""
    jobs: PeerJobs | None
    """null if it served none."""


class LineageQuality(TypedDict):
    """Effect of a lossy variant on a model's output; see `node.engine.quality`."""

    greedy_agreement: float | None
    """Fraction of equal greedy tokens."""
    mean_kl: float
    perplexity_change: float


class ModelDocument(TypedDict):
    """A model that a peer serves or whose package is in the local cache."""

    model: str
    """Id of the model."""
    name: str
    """Name of the model; empty if it has none."""
    block_count: int
    coverage: list[int]
    """For each block, the number of peers that serve it, this one included."""
    uncovered: list[tuple[int, int]]
    """Ranges of blocks that no peer serves, end exclusive."""
    complete: bool
    """Whether every block is served, so that the model can be used."""
    local: bool
    """Whether this node holds the manifest."""
    quality: dict[str, LineageQuality | None]
    """By `engine/arithmetic/activations`, once measured here; null for a variant that the model does not support."""


class NodeView(Protocol):
    """The node as the HTTP API sees it. Only `bench` and `explain` ask other peers."""

    @property
    def submitter(self) -> Submitter:
        """The coordinator."""

    async def bench(self, spec: TrialSpec) -> Trial:
        """Measure methods against the baseline, by real jobs. Raises JobError."""

    async def status(self) -> NodeStatus:
        """Return the status of this node."""

    def peers(self) -> list[PeerStatus]:
        """Return the known peers, without this one."""

    def models(self) -> list[ModelDocument]:
        """Return the known models."""

    async def explain(self, request: JobRequest, overrides: Mapping[str, Any]) -> Explanation:
        """Collect the stages' votes on a job without running it; `overrides` overrides its context. Raises JobError."""
