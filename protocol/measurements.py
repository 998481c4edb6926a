"""What an observation says: one measurement of one method in one context, and which values no measurement has.

`protocol.observations` turns these values into signed bytes and back.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from protocol.errors import RemoteProtocolError
from protocol.identity import BlockRange, JobId, ModelId, PeerId
from protocol.limits import MAX_ROWS_PER_TOKEN
from protocol.messages import SessionStatistics

MIN_TOTAL_S: Final = 1e-6
"""No job takes less; the cost's logarithm must exist."""

RELATIVE_TOLERANCE: Final = 0.01
ABSOLUTE_TOLERANCE_S: Final = 0.001
"""How far times that must add up may be apart."""

CLOSING_S: Final = 1.0
"""A stage may still be at one step when its job has ended: its figures may exceed the job's time by that much more."""


class ObservationKind(enum.StrEnum):
    """How an observation came about, which says what it can be compared with."""

    SERVED = "served"
    """A user's job: its own cost and nothing else."""
    PROBE = "probe"
    """A short trial against the baseline on the same route, taken alternately before a method is adopted."""
    ASSIGNED = "assigned"
    """A measurement that the swarm drew this peer to make."""
    BENCH = "bench"
    """A benchmark that the peer's owner asked for."""


class Objective(enum.StrEnum):
    """What the job wanted most."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


class QualityBound(enum.StrEnum):
    """How far a job lets its method stray from fp32."""

    EXACT = "exact"
    """The same greedy tokens."""
    NEAR = "near"
    """Perplexity at most 1 % higher, mean KL divergence at most 0.02."""
    ANY = "any"
    """Perplexity at most 5 % higher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What of a model decides its speed. None: the model's configuration does not say.

    `weight_bytes`: all its weights as stored. `expert_count`: of one mixture-of-experts layer.
    """

    model: ModelId
    architecture: str
    block_count: int
    hidden_size: int
    vocabulary_size: int
    max_positions: int
    weight_bytes: int
    intermediate_size: int | None = None
    head_count: int | None = None
    kv_head_count: int | None = None
    expert_count: int | None = None
    active_expert_count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What was asked for, and how busy the route was.

    `cached_tokens`: of the prompt, taken from a prefix cache. `concurrency`: the most jobs that any stage of the route
    served when this one was admitted, this one included. `shared_prefix_share`: the part of the prompt, from 0 to 1,
    that it has in common with other jobs of the time. `repetitiveness`: the part of its tokens, from 0 to 1, that
    looking up what followed the same few tokens before would have guessed. `link_s`: what the links of the route add to
    the time of a token.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    concurrency: int = 1
    shared_prefix_share: float = 0.0
    repetitiveness: float = 0.0
    link_s: float = 0.0
    objective: Objective = Objective.LATENCY
    quality: QualityBound = QualityBound.EXACT


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodInForce:
    """The method that served: the session's switches and the policy of the stages.

    Names and values consist of lower-case letters, digits and `_ . + -`.
    """

    switches: Mapping[str, str]
    stage_policy: Mapping[str, str]

    @property
    def name(self) -> str:
        """The canonical name: the session's sorted switches."""
        return "|".join(f"{switch}={value}" for switch, value in sorted(self.switches.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What it cost, as the observer saw it.

    `ttft_s`: until the first token. `tpot_s`: for each token after it; 0 where there is none. `tokens_per_s`: output
    tokens of all jobs that were measured together (of a served job: its own). `log_ratio_to_baseline`: natural
    logarithm of this method's cost divided by the baseline's. `replays`: stages lost and replaced on the way.
    """

    ttft_s: float
    tpot_s: float
    total_s: float
    tokens_per_s: float
    log_ratio_to_baseline: float | None = None
    replays: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageObservation:
    """One stage's part in the job, as the stage measured it.

    `hardware`: the class of machine, in the stage's own words, with the figures under its countersignature.
    `round_trip_s`: between observer and stage, None where unknown. A stage that left before it could countersign has
    no countersignature; its figures then are the observer's word alone.
    """

    peer: PeerId
    blocks: BlockRange
    hardware: str
    statistics: SessionStatistics
    round_trip_s: float | None = None
    countersignature: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One measurement of one method in one context.

    `job`: the job id that the stages knew. `issued_at_s`: Unix time in whole seconds. `software`: versions by name.
    """

    observer: PeerId
    job: JobId
    kind: ObservationKind
    issued_at_s: int
    model: ModelFacts
    workload: Workload
    method: MethodInForce
    measurements: Measurements
    route: tuple[StageObservation, ...]
    software: Mapping[str, str]

    @property
    def is_countersigned(self) -> bool:
        """Whether every stage vouches for its figures; the observer's signature does for its own."""
        return all(stage.countersignature or stage.peer == self.observer for stage in self.route)


def check(observation: Observation) -> None:
    """Raise RemoteProtocolError for values that no measurement has, each within its limits though it may be."""
    _check_workload(observation)
    _check_times(observation)
    _check_route(observation)


def _check_workload(observation: Observation) -> None:
    workload, model = observation.workload, observation.model
    tokens = workload.prompt_tokens + workload.completion_tokens
    if tokens > model.max_positions:
        raise RemoteProtocolError(f"observation of {tokens} tokens: the model has {model.max_positions} positions")
    if workload.cached_tokens >= workload.prompt_tokens:
        raise RemoteProtocolError("observation: the whole prompt, or more, came from a cache")
    if (model.active_expert_count or 0) > (model.expert_count or 0):
        raise RemoteProtocolError("observation: more experts are active than there are")
    compared = observation.measurements.log_ratio_to_baseline is not None
    if observation.kind is ObservationKind.SERVED and compared:
        raise RemoteProtocolError("observation of a served job has nothing to be compared with")
    if observation.kind in {ObservationKind.PROBE, ObservationKind.ASSIGNED} and not compared:
        raise RemoteProtocolError(f"observation of kind {observation.kind} lacks its ratio to the baseline")


def _check_times(observation: Observation) -> None:
    measured, count = observation.measurements, observation.workload.completion_tokens
    if count == 1 and measured.tpot_s != 0.0:
        raise RemoteProtocolError("observation: a single token has no time per further token")
    sum_s = measured.ttft_s + measured.tpot_s * (count - 1)
    if abs(sum_s - measured.total_s) > RELATIVE_TOLERANCE * measured.total_s + ABSOLUTE_TOLERANCE_S:
        raise RemoteProtocolError(f"observation: tokens took {sum_s:.6g} s, the whole job {measured.total_s:.6g} s")
    together = measured.tokens_per_s * measured.total_s
    if together < count * (1 - RELATIVE_TOLERANCE):
        raise RemoteProtocolError(f"observation: tokens_per_s says {together:.6g} tokens, {count} came")
    if observation.kind is ObservationKind.SERVED and together > count * (1 + RELATIVE_TOLERANCE):
        raise RemoteProtocolError(f"observation: tokens_per_s says {together:.6g} tokens, {count} came")


def _check_route(observation: Observation) -> None:
    route, block_count = observation.route, observation.model.block_count
    if not route:
        raise RemoteProtocolError("observation: the route has no stages")
    covered = [(before.blocks.end, after.blocks.start) for before, after in pairwise(route)]
    if any(end != start for end, start in covered) or route[-1].blocks.end > block_count:
        raise RemoteProtocolError("observation: the stages' blocks do not follow one another")
    # A benchmark may measure the blocks that its peer has; a job needs them all.
    whole = route[0].blocks.start == 0 and route[-1].blocks.end == block_count
    if observation.kind in {ObservationKind.SERVED, ObservationKind.PROBE} and not whole:
        raise RemoteProtocolError(f"observation: the stages do not cover all {block_count} blocks")
    for stage in route:
        _check_stage(stage, observation)


def _check_stage(stage: StageObservation, observation: Observation) -> None:
    """Check a stage's figures against the job. A stage takes its steps of one job one after another."""
    statistics, workload = stage.statistics, observation.workload
    longest_s = 2 * observation.measurements.total_s + CLOSING_S
    if statistics.compute_s > longest_s:
        raise RemoteProtocolError(f"observation: {statistics.compute_s:.6g} s computed in a job of half the time")
    if statistics.queue_s > longest_s * (statistics.steps + 1):
        raise RemoteProtocolError("observation: rows waited longer than the job took")
    if (
        not statistics.steps
        <= statistics.rows
        <= MAX_ROWS_PER_TOKEN * (workload.prompt_tokens + workload.completion_tokens)
    ):
        raise RemoteProtocolError(f"observation: {statistics.rows} rows in {statistics.steps} steps cannot be")
    if statistics.steps == 0 and (statistics.rows or statistics.compute_s):
        raise RemoteProtocolError("observation: a stage computed without a step")
