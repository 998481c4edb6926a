"""What a node knows of the swarm: the documents of its `/swarm/…` pages.

Their fields are those of docs/http-api.md; `Swarm.get` returns the documents as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metaswarm_client.answers import Stage
from metaswarm_client.decoding import decode


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks of a model, `start` to `end`, exclusive."""

    model: str
    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Gap(Span):
    """Blocks that no peer serves. `serve`: argument of `metaswarm node --serve` that would."""

    memory_bytes: int | None
    serve: str


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Jobs submitted at the node since its start, by outcome."""

    running: int
    done: int
    failed: int
    cancelled: int
    rejected: int


@dataclass(frozen=True, slots=True)
class SelectionStatus:
    """How the node learns which method to use, and what exploring has cost."""

    basis: str
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


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The asked node."""

    peer_id: str
    agent: str
    multiaddrs: tuple[str, ...]
    api_url: str
    state: str
    uptime_s: float
    connected_peers: int
    serve: tuple[str, ...]
    spans: tuple[Span, ...]
    jobs: JobCounts
    selection: SelectionStatus
    uncovered: tuple[Gap, ...]


@dataclass(frozen=True, slots=True)
class Ban:
    """Nothing from the peer is processed."""

    left_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class PeerJobs:
    """How a peer served the asked node's own jobs."""

    served: int
    failed: int
    lagged: int
    trust: float
    avoided_s: float
    block_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that the asked node knows."""

    peer_id: str
    addresses: tuple[str, ...]
    agent: str
    connected: bool
    reached: bool
    leaving: bool
    rtt_s: float | None
    last_seen_s: float | None
    spans: tuple[Span, ...]
    banned: Ban | None
    jobs: PeerJobs | None


@dataclass(frozen=True, slots=True)
class LineageQuality:
    """Effect of a lossy variant on a model's output."""

    greedy_agreement: float | None
    mean_kl: float
    perplexity_change: float


@dataclass(frozen=True, slots=True)
class Model:
    """A model in the swarm. `coverage`: for each block the number of peers that serve it."""

    model: str
    name: str
    block_count: int
    coverage: tuple[int, ...]
    uncovered: tuple[tuple[int, int], ...]
    complete: bool
    local: bool
    quality: Mapping[str, LineageQuality | None]


@dataclass(frozen=True, slots=True)
class ExplainedMethod:
    """A method that the task admits. `votes`: by peer, natural log of the predicted cost."""

    name: str
    predicted_s: float
    predicted_speedup: float
    speedup_low: float
    speedup_high: float
    votes: Mapping[str, float]
    accepted: bool
    trial_speedup: float | None


@dataclass(frozen=True, slots=True)
class PastDecision:
    """An earlier choice and its outcome."""

    job_id: str
    method: str
    basis: str
    explored: bool
    predicted_s: float
    actual_s: float
    regret_s: float


@dataclass(frozen=True, slots=True)
class PastDecisions:
    """Earlier choices of the asked node, and how well they were predicted."""

    jobs: int
    typical_error: float | None
    mean_regret_s: float
    recent: tuple[PastDecision, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which method a task would be served with, and why; the most promising method first.

    `confidence`: that no method is clearly better than the one in use, None where the route does not offer that one;
    where it is too low, the `probes` get a trial.
    """

    model: str
    task: Mapping[str, Any]
    route: tuple[Stage, ...]
    selection: SelectionStatus
    methods: tuple[ExplainedMethod, ...]
    not_offered: tuple[str, ...]
    agreed: str
    reason: str
    confidence: float | None
    probes: tuple[str, ...]
    table_digest: str | None
    past: PastDecisions


@dataclass(frozen=True, slots=True)
class _Peers:
    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class _Models:
    models: tuple[Model, ...]


@dataclass(frozen=True, slots=True)
class _Embedding:
    embedding: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Embeddings:
    data: tuple[_Embedding, ...]


def decode_peers(document: Any) -> tuple[Peer, ...]:
    """Return the peers of `/swarm/peers`."""
    return decode(_Peers, document).peers


def decode_models(document: Any) -> tuple[Model, ...]:
    """Return the models of `/swarm/models`."""
    return decode(_Models, document).models


def decode_embeddings(document: Any) -> tuple[tuple[float, ...], ...]:
    """Return the vectors of `/v1/embeddings`."""
    return tuple(each.embedding for each in decode(_Embeddings, document).data)
