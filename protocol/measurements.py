"""The values of performance observations: one measurement of one method in one context, each field with its bounds.

`protocol.observations` signs them and reads them back.
"""

import enum
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final

from protocol import fields
from protocol.errors import RemoteProtocolError
from protocol.forms import Counter, Hardware, Name, Seconds, Share, Signature
from protocol.identity import BlockRange, JobId, ModelId, PeerId
from protocol.limits import (
    MAX_BLOCKS,
    MAX_LOG_RATIO,
    MAX_NAME_BYTES,
    MAX_PARALLEL_JOBS,
    MAX_POSITIONS,
    MAX_ROWS_PER_TOKEN,
    MAX_SECONDS,
    MAX_SOFTWARE,
    MAX_STAGE_FACTS,
    MAX_STAGES,
    MAX_SWITCH_BYTES,
    MAX_SWITCHES,
    MAX_TOKENS_PER_S,
    MAX_VOCABULARY,
    MAX_WIDTH,
)
from protocol.messages import SessionStatistics
from protocol.schema import ARRAY, OMIT_DEFAULT, Count, Form, Key, Nullable, Range, name
from protocol.stage_facts import StageFacts

OBSERVATION_VERSION: Final = 2
"""Version 1 has no `stage_facts`, and of the model neither the block's sizes nor the KV cache's."""

MIN_TOTAL_S: Final = 1e-6
"""Lower bound of a job's time, and of its computing, so that the logarithm of its cost exists."""

RELATIVE_TOLERANCE: Final = 0.01
ABSOLUTE_TOLERANCE_S: Final = 0.001
"""Allowed difference between times that must add up."""

CLOSING_S: Final = 1.0
"""Allowed excess of a stage's times over the job's: a stage may still compute a step when the job has ended."""

_SWITCH: Final = re.compile(r"[a-z0-9_.+-]+")


def _switch(value: object, what: str) -> str:
    """Return the name or the value of a switch."""
    if type(value) is not str or len(value) > MAX_SWITCH_BYTES or _SWITCH.fullmatch(value) is None:
        raise RemoteProtocolError(f"{what}: a name or value is not 1 to {MAX_SWITCH_BYTES} of a-z 0-9 _ . + -")
    return value


Size = Annotated[int, Range(1, MAX_VOCABULARY)]
"""A dimension of a model."""

Switches = Annotated[Mapping[Annotated[str, Form(_switch)], Annotated[str, Form(_switch)]], Count(MAX_SWITCHES)]
"""Values by name, both of lower-case letters, digits and `_ . + -`."""

_Version = Annotated[str, name(MAX_SWITCH_BYTES)]


class ObservationKind(enum.StrEnum):
    """How an observation was made, which decides what it can be compared with."""

    SERVED = "served"
    """A user's job, alone."""
    PROBE = "probe"
    """A short trial of a method, alternating with the baseline on the same route, before the method is adopted."""
    ASSIGNED = "assigned"
    """A measurement that the swarm assigned to this peer."""
    BENCH = "bench"
    """A benchmark requested by the peer's owner."""


class TaskKind(enum.StrEnum):
    """What a job wants of its prompt."""

    GENERATE = "generate"
    """Text that continues it."""
    EMBED = "embed"
    """Its embedding: nothing is decoded, and no logits are computed."""
    SCORE = "score"
    """The log probability of each of its tokens: logits of every row; then as much text as was asked for, maybe none.
    """

    @property
    def needs_every_row(self) -> bool:
        """Whether each row of the prompt has to be computed, also one that a prefix cache has."""
        return self is not TaskKind.GENERATE


class Objective(enum.StrEnum):
    """The cost that a job minimises."""

    LATENCY = "latency"
    """The time of this job."""
    THROUGHPUT = "throughput"
    """The computing per token, which limits how many jobs the swarm serves."""
    COST = "cost"
    """The computing on each stage, at the price of its peer."""


class QualityBound(enum.StrEnum):
    """How far a job lets the method deviate from fp32."""

    EXACT = "exact"
    """The same greedy tokens."""
    NEAR = "near"
    """Perplexity at most 1 % higher, mean KL divergence at most 0.02."""
    ANY = "any"
    """Perplexity at most 5 % higher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Model properties that affect speed. None: not in the model's configuration.

    `weight_bytes`: all weights as stored. `expert_count`: of one mixture-of-experts layer. `block_bytes`: mean size of
    a block as stored. `block_parameters`, `active_block_parameters`: of a block, and those that one token uses.
    `kv_bytes_per_token`: keys and values of all blocks, in 16 bits.
    """

    model: Annotated[ModelId, Key("id")]
    architecture: Name
    block_count: Annotated[int, Range(1, MAX_BLOCKS)]
    hidden_size: Annotated[int, Range(1, MAX_WIDTH)]
    vocabulary_size: Size
    max_positions: Annotated[int, Range(1, MAX_POSITIONS)]
    weight_bytes: Counter
    intermediate_size: Nullable[Size] = None
    head_count: Nullable[Size] = None
    kv_head_count: Nullable[Size] = None
    expert_count: Nullable[Size] = None
    active_expert_count: Nullable[Size] = None
    head_size: Size | None = None
    block_bytes: Counter | None = None
    block_parameters: Counter | None = None
    active_block_parameters: Counter | None = None
    kv_bytes_per_token: Counter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The job's size and objective, and the concurrency on its route.

    `cached_tokens`: of the prompt, from a prefix cache. `concurrency`: the most jobs on any stage of the route at
    admission, this one included. `shared_prefix_share`: the fraction of the prompt shared with other recent jobs.
    `repetitiveness`: the fraction of the prompt's tokens that an n-gram lookup predicts. `link_s`: the time per token
    that the route's links add. `task_kind`: absent in observations of before there were others than `generate`.
    """

    prompt_tokens: Annotated[int, Range(1, MAX_POSITIONS)]
    completion_tokens: Annotated[int, Range(0, MAX_POSITIONS)]
    cached_tokens: Annotated[int, Range(0, MAX_POSITIONS)] = 0
    concurrency: Annotated[int, Range(1, MAX_PARALLEL_JOBS)] = 1
    shared_prefix_share: Share = 0.0
    repetitiveness: Share = 0.0
    link_s: Seconds = 0.0
    objective: Objective = Objective.LATENCY
    quality: QualityBound = QualityBound.EXACT
    task_kind: Annotated[TaskKind, OMIT_DEFAULT] = TaskKind.GENERATE

    @property
    def counted_tokens(self) -> int:
        """The tokens that its throughput is about: of the text or, where a job wants none, of the prompt."""
        return self.completion_tokens or self.prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodInForce:
    """The method that served: the session's switches and the stages' policy."""

    switches: Switches
    stage_policy: Switches

    @property
    def name(self) -> str:
        """The canonical name: the session's sorted switches."""
        return "|".join(f"{switch}={value}" for switch, value in sorted(self.switches.items()))

    def check(self) -> None:
        """Raise RemoteProtocolError where the name is empty or too long."""
        fields.name(self.name, MAX_NAME_BYTES, "observation method name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The job's cost, as the observer measured it.

    `ttft_s`: time to first token; to the result where there is no text. `tpot_s`: time per further token; 0 without
    any. `tokens_per_s`: `counted_tokens` of all jobs that were measured together (of a served job: its own).
    `log_ratio_to_baseline`: natural logarithm of this method's cost divided by the baseline's. `replays`: stages that
    were lost and replaced, at least 1 where the job had to go on over another route.
    """

    ttft_s: Seconds
    tpot_s: Seconds
    total_s: Annotated[float, Range(MIN_TOTAL_S, MAX_SECONDS)]
    tokens_per_s: Annotated[float, Range(0.0, MAX_TOKENS_PER_S)]
    log_ratio_to_baseline: Nullable[Annotated[float, Range(-MAX_LOG_RATIO, MAX_LOG_RATIO)]] = None
    replays: Annotated[int, Range(0, MAX_STAGES)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageObservation:
    """One stage's part in the job, as the stage measured it.

    `hardware`: the class of machine, as the stage reports it; countersigned with the statistics. `round_trip_s`:
    between observer and stage, None where unknown. `countersignature`: None where the stage was lost before it could
    sign; its statistics then rest on the observer's signature alone. Those without a step: it has not stated its own.
    """

    peer: PeerId
    blocks: BlockRange
    hardware: Hardware
    statistics: Annotated[SessionStatistics, ARRAY]
    round_trip_s: Nullable[Seconds] = None
    countersignature: Nullable[Signature] = None

    @property
    def is_stated(self) -> bool:
        """Whether the stage has stated what it did: one that served has computed a step."""
        return self.statistics.steps > 0


def compute_s_of(route: Iterable[StageObservation]) -> float:
    """Return the seconds of computing on all stages of a job; 0 where one of them has not stated its own."""
    stated = [stage.statistics for stage in route]
    total_s = sum(each.compute_s for each in stated) if all(each.steps for each in stated) else 0.0
    return max(MIN_TOTAL_S, total_s) if total_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One measurement of one method in one context.

    `job`: the job id on the stages. `issued_at_s`: Unix time in whole seconds. `software`: versions by name.
    `stage_facts`: of the route's stages, in order, as the observer knew them when the job began; empty where it did
    not know all of them, and for routes of more than MAX_STAGE_FACTS stages.
    """

    version: Annotated[int, Range(1, OBSERVATION_VERSION)] = OBSERVATION_VERSION
    observer: PeerId
    job: JobId
    kind: ObservationKind
    issued_at_s: Counter
    model: ModelFacts
    workload: Workload
    method: MethodInForce
    measurements: Measurements
    route: Annotated[tuple[Annotated[StageObservation, ARRAY], ...], Count(MAX_STAGES)]
    software: Annotated[Mapping[_Version, _Version], Count(MAX_SOFTWARE)]
    stage_facts: Annotated[tuple[Annotated[StageFacts, ARRAY], ...], Count(MAX_STAGE_FACTS), OMIT_DEFAULT] = ()

    @property
    def is_countersigned(self) -> bool:
        """Whether every stage signed its statistics; the observer's signature covers its own."""
        return all(stage.countersignature or stage.peer == self.observer for stage in self.route)

    def check(self) -> None:
        """Raise RemoteProtocolError for values that no measurement can have, though each is within its bounds."""
        _check_workload(self)
        _check_times(self)
        _check_route(self)


def _check_workload(observation: Observation) -> None:
    workload, model = observation.workload, observation.model
    tokens = workload.prompt_tokens + workload.completion_tokens
    if tokens > model.max_positions:
        raise RemoteProtocolError(f"observation of {tokens} tokens: the model has {model.max_positions} positions")
    if workload.cached_tokens >= workload.prompt_tokens:
        raise RemoteProtocolError("observation: cached_tokens is not below prompt_tokens")
    if (completion := workload.completion_tokens) and workload.task_kind is TaskKind.EMBED:
        raise RemoteProtocolError(f"observation: {completion} completion_tokens of an embedding")
    if not completion and workload.task_kind is TaskKind.GENERATE:
        raise RemoteProtocolError("observation: no completion_tokens of a job that generates")
    if (model.active_expert_count or 0) > (model.expert_count or 0):
        raise RemoteProtocolError("observation: active_expert_count exceeds expert_count")
    compared = observation.measurements.log_ratio_to_baseline is not None
    if observation.kind is ObservationKind.SERVED and compared:
        raise RemoteProtocolError("observation of a served job has a log_ratio_to_baseline")
    if observation.kind in {ObservationKind.PROBE, ObservationKind.ASSIGNED} and not compared:
        raise RemoteProtocolError(f"observation of kind {observation.kind} lacks its log_ratio_to_baseline")


def _check_times(observation: Observation) -> None:
    measured, count = observation.measurements, observation.workload.completion_tokens
    if count <= 1 and measured.tpot_s != 0.0:
        raise RemoteProtocolError("observation: tpot_s is not 0 for at most a single token")
    sum_s = measured.ttft_s + measured.tpot_s * (count - 1)
    if abs(sum_s - measured.total_s) > RELATIVE_TOLERANCE * measured.total_s + ABSOLUTE_TOLERANCE_S:
        raise RemoteProtocolError(
            f"observation: total_s is {measured.total_s:.6g}, but ttft_s and tpot_s add up to {sum_s:.6g} s"
        )
    together, counted = measured.tokens_per_s * measured.total_s, observation.workload.counted_tokens
    most = counted * (1 + RELATIVE_TOLERANCE) if observation.kind is ObservationKind.SERVED else math.inf
    if not counted * (1 - RELATIVE_TOLERANCE) <= together <= most:
        raise RemoteProtocolError(f"observation: tokens_per_s makes {together:.6g} tokens of {counted}")


def _check_route(observation: Observation) -> None:
    route, block_count = observation.route, observation.model.block_count
    if not route:
        raise RemoteProtocolError("observation: the route has no stages")
    covered = [(before.blocks.end, after.blocks.start) for before, after in pairwise(route)]
    if any(end != start for end, start in covered) or route[-1].blocks.end > block_count:
        raise RemoteProtocolError("observation: the stages' blocks are not contiguous")
    # A benchmark may measure some of the blocks; a job needs all of them.
    whole = route[0].blocks.start == 0 and route[-1].blocks.end == block_count
    if observation.kind in {ObservationKind.SERVED, ObservationKind.PROBE} and not whole:
        raise RemoteProtocolError(f"observation: the stages do not cover all {block_count} blocks")
    for stage in route:
        _check_stage(stage, observation)
    facts = observation.stage_facts
    if facts and [each.blocks for each in facts] != [len(stage.blocks) for stage in route]:
        raise RemoteProtocolError("observation: stage_facts are not those of the route's stages")


def _check_stage(stage: StageObservation, observation: Observation) -> None:
    workload = observation.workload
    tokens = workload.prompt_tokens + workload.completion_tokens
    check_statistics(stage.statistics, observation.measurements.total_s, tokens)


def check_statistics(statistics: SessionStatistics, total_s: float, tokens: int) -> None:
    """Check a stage's statistics against its job, whose steps it takes one after another. Raises RemoteProtocolError.

    `total_s`: of the job. `tokens`: of its prompt and its text.
    """
    longest_s = 2 * total_s + CLOSING_S
    if statistics.compute_s > longest_s:
        raise RemoteProtocolError(f"observation: compute_s is {statistics.compute_s:.6g} in a job of at most half that")
    if statistics.queue_s > longest_s * (statistics.steps + 1):
        raise RemoteProtocolError(f"observation: queue_s {statistics.queue_s:.6g} exceeds the job")
    most_rows = MAX_ROWS_PER_TOKEN * tokens
    if not statistics.steps <= statistics.rows <= most_rows:
        raise RemoteProtocolError(f"observation: {statistics.rows} rows in {statistics.steps} steps are impossible")
    if statistics.steps == 0 and (statistics.rows or statistics.compute_s):
        raise RemoteProtocolError("observation: a stage reports rows or compute_s, but no step")
