"""What the HTTP API asks of the node behind it, and the JSON that its `/swarm/…` pages answer with.

The typed dictionaries are the documents themselves: the node fills them, the command line reads them.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypedDict

from node.coordinator.submission import JobRequest, Submitter
from node.coordinator.trial_runner import Trial, TrialSpec


class SpanDocument(TypedDict):
    """A span that this node serves, and how it is doing. `end` is exclusive."""

    model: str
    """The model's id."""
    name: str
    """The model's name; empty where it has none."""
    start: int
    end: int
    block_count: int
    """Blocks of the whole model."""
    sessions: int
    reserved_positions: int
    kv_positions: int
    """Positions that all sessions together may reserve."""
    weight_bytes: int
    worker_pid: int | None
    steps: int
    compute_s: float


class JobCounts(TypedDict):
    """Jobs submitted at this node since it started, by how they ended; `trials` are in none of the other counts."""

    running: int
    done: int
    failed: int
    """That the swarm could not do."""
    cancelled: int
    rejected: int
    """That were the client's mistake: a wrong field, an unknown model, a prompt that is too long."""
    trials: "TrialCounts"


class TrialCounts(TypedDict):
    """Jobs by which this node measured methods: of `metaswarm bench`, of its own and of what the swarm assigned."""

    running: int
    done: int
    failed: int
    """Also those that could not begin or gave way to jobs of users."""


class TransfersDocument(TypedDict):
    """Bytes of model files that crossed the blob protocol since this node started."""

    received_bytes: dict[str, int]
    """From each peer."""
    served_bytes: int
    """To all peers."""


class BootstrapStatus(TypedDict):
    """How the dialling of one bootstrap address goes."""

    multiaddr: str
    peer_id: str | None
    error: str | None
    """Why it was not reached the last time; None where it was."""


class HistoryStatus(TypedDict):
    """The observations that this node holds."""

    count: int
    digest: str
    """Of them all, in hexadecimal: nodes with the same digest hold the same."""
    new_by_gossip: int
    """That came by gossip since this node started."""
    new_by_sync: int
    """That came by comparing histories with neighbours since this node started."""
    last_equal_s: float | None
    """How long ago a neighbour was found to hold the same; None if none was yet."""


class ChainStatus(TypedDict):
    """What the swarm has agreed about a model's methods, as far as this node has verified it."""

    model: str
    """The model's id."""
    name: str
    """The model's name; empty where it has none."""
    epoch: int | None
    """Of the statement that stands; None before the first."""
    statement: str | None
    """Its digest, in hexadecimal; `--checkpoint` takes it."""
    table_digest: str | None
    """Of the agreed table, in hexadecimal: nodes with the same digest go by the same."""
    members: int
    cells: int
    """Of the agreed table: methods in contexts that were measured."""
    firm_cells: int
    """Supported by enough members to be more than a hint."""
    weight: float | None
    """Of this node's word, in natural units of log odds; None for one that is no member."""
    measured: int
    """Cells that this node was drawn for and has measured since it started."""


class GapDocument(TypedDict):
    """Blocks of a model that nobody serves though others of it are served, and what would fill it."""

    model: str
    name: str
    start: int
    end: int
    memory_bytes: int | None
    """What a node needs that serves them, KV caches included; None while the manifest is not at hand."""
    serve: str
    """What that node is to be told with --serve."""


class SelectionStatus(TypedDict):
    """How this node learns which method to use, and what that has cost since it started."""

    basis: Literal["rule", "model"]
    """What choices and votes go by."""
    model_version: int
    """Of the trained model, counted since the start; 0 before the first."""
    experiences: int
    """Observations that it was trained on."""
    training_s: float | None
    trained_ago_s: float | None
    jobs: int
    """Whose method was left to us."""
    explored_jobs: int
    """Of those, that were tried on a method that might turn out better."""
    regret_s: float
    """What these were expected to take longer for that."""
    trials: int
    trial_s: float
    """What trials took."""
    budget_left_s: float
    """What may still be spent on both."""


class ExplainedMethod(TypedDict):
    """What is expected of a method, and what the stages say of it."""

    name: str
    predicted_s: float
    predicted_speedup: float
    """Over the baseline."""
    speedup_low: float
    speedup_high: float
    """The speed-up is expected between these in two of three cases."""
    votes: dict[str, float]
    """By peer: natural logarithm of the expected cost, less is better; nothing of who does not offer the method."""
    accepted: bool
    trial_speedup: float | None
    """Over the baseline, in trials of this node for tasks of this kind; None where it was not tried."""


class PastDecision(TypedDict):
    """A choice that was made. `regret_s`: what the method was expected to take more than the best one."""

    job_id: str
    method: str
    basis: str
    explored: bool
    predicted_s: float
    actual_s: float
    regret_s: float


class PastDecisions(TypedDict):
    """How choices turned out. `typical_error`: median of the factor between prediction and what it took, less 1."""

    jobs: int
    typical_error: float | None
    mean_regret_s: float
    recent: list[PastDecision]


class Explanation(TypedDict):
    """What a task would be served with, and why."""

    model: str
    task: dict[str, str | float]
    route: list[dict[str, Any]]
    selection: SelectionStatus
    methods: list[ExplainedMethod]
    """The admitted ones, the most promising first."""
    agreed: str
    past: PastDecisions


class PeerCounts(TypedDict):
    """Peers, and what became of the sessions that they opened here since this node started."""

    known: int
    """That heartbeats were heard of."""
    reached: int
    banned: int
    sessions_opened: int
    sessions_refused: int
    sessions_failed: int
    sessions_held: int
    held_bytes: int


class NodeStatus(TypedDict):
    """What this node is and does."""

    peer_id: str
    agent: str
    """Program and version, as told to other peers."""
    multiaddrs: list[str]
    api_url: str
    state: Literal["serving", "draining"]
    uptime_s: float
    connected_peers: int
    peers: PeerCounts
    bootstrap: list[BootstrapStatus]
    serve: list[str]
    """What the node was told to serve; where that is nothing, it serves no blocks."""
    spans: list[SpanDocument]
    jobs: JobCounts
    history: HistoryStatus | None
    """None where the database cannot be read."""
    consensus: list[ChainStatus]
    """Of each model whose chain this node follows."""
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
    """Why nothing of a peer is looked at now."""

    left_s: float
    reason: str


class PeerSessions(TypedDict):
    """What a peer has asked of the stages here since this node started, and what it holds now."""

    opened: int
    refused: dict[str, int]
    """Sessions, by reason."""
    failed: dict[str, int]
    """Sessions, by reason, whoever was at fault."""
    faults: int
    """Times that it sent what could not be taken."""
    held_sessions: int
    held_positions: int
    """Of KV memory."""
    held_bytes: int
    """Rows that wait."""


class PeerJobs(TypedDict):
    """How a peer served this node's own jobs."""

    served: int
    failed: int
    lagged: int
    """Jobs in which it made no progress."""
    trust: float
    """What its predicted cost is divided by: 1 for who never failed."""
    avoided_s: float
    """For how much longer it is used only where nobody else can be."""
    block_s: dict[str, float]
    """What a block was measured to take for a token, by model."""


class PeerStatus(TypedDict):
    """A peer that this node knows of."""

    peer_id: str
    addresses: list[str]
    agent: str
    connected: bool
    reached: bool
    """Whether it is connected, or was dialled with success: only then counts what it says it serves."""
    leaving: bool
    rtt_s: float | None
    """Round-trip time; None while it is unknown."""
    last_seen_s: float | None
    """How long ago the peer was last heard of; None if it never was."""
    spans: list[SpanSummary]
    banned: BanDocument | None
    sessions: PeerSessions | None
    """None where it opened none."""
    jobs: PeerJobs | None
    """None where it served none."""


class VariantQuality(TypedDict):
    """What a lossy way to calculate does to a model's answers; see `node.engine.quality`."""

    greedy_agreement: float | None
    mean_kl: float
    perplexity_change: float


class ModelDocument(TypedDict):
    """A model that somebody in the swarm serves, or that is at hand here."""

    model: str
    """The model's id."""
    name: str
    """The model's name; empty where it has none."""
    block_count: int
    coverage: list[int]
    """For each block, how many peers (this one included) serve it."""
    uncovered: list[tuple[int, int]]
    """Ranges of blocks that nobody serves, end exclusive."""
    complete: bool
    """Whether every block is served: the model can be used now."""
    local: bool
    """Whether this node holds the model's manifest."""
    quality: dict[str, VariantQuality | None]
    """By `engine/arithmetic/activations`, once measured here; None for what cannot be had for this model."""


class NodeView(Protocol):
    """The node as the HTTP API sees it. All but `explain` answer from what the node knows."""

    @property
    def submitter(self) -> Submitter:
        """Who takes jobs."""
        ...

    async def bench(self, spec: TrialSpec) -> Trial:
        """Measure methods against the baseline, by real jobs. Raises JobError."""
        ...

    async def status(self) -> NodeStatus:
        """Return what this node is and does."""
        ...

    def peers(self) -> list[PeerStatus]:
        """Return the known peers, without this one."""
        ...

    def models(self) -> list[ModelDocument]:
        """Return the known models."""
        ...

    async def explain(self, request: JobRequest, told: Mapping[str, Any]) -> Explanation:
        """Ask the stages what a job would be served with; `told`: what of its task is as told. Raises JobError."""
        ...
