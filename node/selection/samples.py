"""Reads observations as samples for training: what was signed, as task contexts with their measured costs."""

import math
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import quote

from node.coordinator.observation import WEIGHTS_SWITCH, software_name
from protocol.errors import RemoteProtocolError
from protocol.measurements import Objective, Observation, compute_s_of
from protocol.observations import bucket_of, decode_verified_observation
from selector.sample import Sample
from selector.task import UNKNOWN_WEIGHT_TYPE, TaskContext
from selector.task_features import transfer_s

MAX_SAMPLES: Final = 20_000
"""Observations that are learned from; half of them may be the node's own."""

MAX_SAMPLES_OF_PEER: Final = 1000
"""Of one other peer."""

ASSIGNED_TURN: Final = 10
"""Every tenth of a peer's places is for its newest assigned measurement that is left, however old."""

_IS_ASSIGNED: Final = "instr(envelope, CAST('assigned' AS BLOB)) > 0"
"""Whether an envelope may be of an assigned measurement. Who writes the word elsewhere disorders its own ones alone."""

_MODEL_KEY: Final = b"\xa2id\xc4\x20"
"""What stands in an envelope before a model's id, and, as it is no UTF-8, in no text that an observer may choose."""

_NO_MEMBERS: Final[Mapping[str, Collection[str]]] = MappingProxyType({})


def read_samples(
    database: Path, own: str = "", members: Mapping[str, Collection[str]] = _NO_MEMBERS, limit: int = MAX_SAMPLES
) -> Iterator[Sample]:
    """Yield samples of a history, without unreadable ones: our own first, then those of members, then of unknown peers.

    `members`: of each model's chain, who come first with what they say of that model. Of each peer the newest come
    first, at every tenth place an assigned one, and peers take turns: however much one reports, or however many unknown
    peers there are, the others' measurements are still learned from.
    """
    query = f"""
        WITH dated AS (
            SELECT number, observer, {_IS_ASSIGNED} AS assigned,
                row_number() OVER (PARTITION BY observer ORDER BY bucket DESC, id) AS age,
                row_number() OVER (PARTITION BY observer, {_IS_ASSIGNED} ORDER BY bucket DESC, id) AS age_of_kind
            FROM observations
        ), ranked AS (
            SELECT number, observer, row_number() OVER (
                PARTITION BY observer
                ORDER BY iif(assigned, min(age, :turn * (age_of_kind - 1) + 1), age), assigned DESC, age
            ) AS place
            FROM dated
        )
        SELECT envelope FROM ranked JOIN observations USING (number)
        WHERE place <= iif(ranked.observer = :own, :limit / 2, :of_peer)
        ORDER BY ranked.observer != :own, NOT is_member(ranked.observer, envelope), place, ranked.observer
        LIMIT :limit
    """  # noqa: S608  # no value in it is a peer's
    values = {"own": own, "limit": limit, "of_peer": MAX_SAMPLES_OF_PEER, "turn": ASSIGNED_TURN}
    of_peer: defaultdict[str, list[bytes]] = defaultdict(list)
    for model, peers in members.items():
        for peer in peers:
            of_peer[peer].append(_MODEL_KEY + bytes.fromhex(model))

    def is_member(observer: str, envelope: bytes) -> bool:
        return any(model in envelope for model in of_peer.get(observer, ()))

    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        connection.create_function("is_member", 2, is_member, deterministic=True)
        for (envelope,) in connection.execute(query, values):
            try:
                observation = decode_verified_observation(envelope).observation
            except RemoteProtocolError:
                continue
            if (sample := sample_of(observation)) is not None:
                yield sample


def sample_of(observation: Observation) -> Sample | None:
    """Return the sample of an observation; None for a replayed job, or a route that does not cover the model.

    Nor is there one of a job that is measured by its computing, where a stage has not stated its own.
    """
    workload, model, measured = observation.workload, observation.model, observation.measurements
    route = observation.route
    if measured.replays or route[0].blocks.start != 0 or route[-1].blocks.end != model.block_count:
        return None
    is_latency = workload.objective is Objective.LATENCY or measured.log_ratio_to_baseline is not None
    cost_s = measured.total_s if is_latency else compute_s_of(route)
    if not cost_s:
        return None
    context = TaskContext.from_parts(
        model,
        workload,
        weight_type=observation.method.stage_policy.get(WEIGHTS_SWITCH, UNKNOWN_WEIGHT_TYPE),
        max_tokens=workload.completion_tokens,
        stage_count=len(route),
        stage_facts=observation.stage_facts,
        hardware="+".join(stage.hardware for stage in route),
    )
    return Sample(
        kind=observation.kind,
        model=model.model,
        context=replace(context, transfer_s=transfer_s(context)),
        method=observation.method.name,
        log_cost=math.log(cost_s),
        log_ratio=measured.log_ratio_to_baseline,
        observer=observation.observer,
        route="/".join([model.model, *(f"{stage.peer}:{stage.blocks}" for stage in route)]),
        hour=bucket_of(observation.issued_at_s),
        software=software_name(observation.software),
        countersigned=observation.is_countersigned,
    )
