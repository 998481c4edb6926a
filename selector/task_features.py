"""The features of a task: one table from what is signed in an observation to the columns of the meta-model's matrix.

Every number of an observation that a task context has stands here once, by the name of its column. The names are those
of dataset folders (`docs/selection.md`), so that the roofline estimates of `selector.features` are computed alike from
both. No column is the name of a model or of a machine.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from protocol.measurements import Objective, TaskKind
from protocol.stage_facts import DeviceKind, StageFacts
from selector.dataset import Contexts
from selector.routing import UNKNOWN_BYTES_PER_S
from selector.task import TaskContext
from selector.task_buckets import task_bucket
from selector.weight_types import bits_per_weight

BILLION: Final = float(1 << 30)
"""The unit of parameters in dataset folders, near enough, and of bytes."""

LINK_FLOOR_S: Final = 1e-4
"""Added to times of links before their logarithm: shorter ones are alike."""

NO_TEXT: Final = 2.0**-8
"""In place of no new tokens, which have no logarithm: decoding so little costs nothing."""

MAX_NAME: Final = 128
"""Characters of a name in a table, where all names take the width of the longest; longer ones are hashed."""

_F32_BYTES: Final = 4

Rate = Callable[[StageFacts], float | None]


def log2(value: float | None) -> float:
    """Return the logarithm; NaN where the value is not known, or 0."""
    return math.log2(value) if value and value > 0 else math.nan


def transfer_s(context: TaskContext) -> float:
    """Return the time that the links' bandwidth adds to a job: of all its rows in fp32, from stage to stage.

    A link that was not measured is taken for a usual one, as the planner does.
    """
    byte_count = (context.prompt_tokens + context.max_tokens) * context.hidden_size * _F32_BYTES
    rates = [each.link_bytes_per_s for each in context.stage_facts[:-1]]
    return sum(byte_count / (rate or UNKNOWN_BYTES_PER_S) for rate in rates)


def _known_transfer_s(context: TaskContext) -> float:
    """Return the same; NaN where a link was not measured."""
    rates = [each.link_bytes_per_s for each in context.stage_facts[:-1]]
    return transfer_s(context) if all(rates) else math.nan


def _known_link_s(context: TaskContext) -> float:
    """Return the time per token that the links' latency adds; NaN where it rests on a guess."""
    return math.nan if any(each.round_trip_s is None for each in context.stage_facts) else context.link_s


def _over_route(context: TaskContext, rate: Rate) -> float:
    """Return the rate at which the whole route works off its blocks, one stage after another; NaN where unknown."""
    facts, seconds = context.stage_facts, 0.0
    for each in facts:
        if not (found := rate(each)):
            return math.nan
        seconds += each.blocks / found
    return sum(each.blocks for each in facts) / seconds if facts else math.nan


def _least(context: TaskContext, rate: Rate) -> float:
    """Return the lowest figure of any stage, the bottleneck; NaN where not all are known."""
    found = [rate(each) for each in context.stage_facts]
    known = [value for value in found if value is not None]
    return min(known) if known and len(known) == len(found) else math.nan


def _share(context: TaskContext, has: Callable[[StageFacts], bool]) -> float:
    """Return the share of the blocks on stages of a kind; NaN without facts."""
    facts = context.stage_facts
    blocks = sum(each.blocks for each in facts)
    return sum(each.blocks for each in facts if has(each)) / blocks if blocks else math.nan


def _read(facts: StageFacts) -> float | None:
    return facts.memory_read_bytes_per_s


def _bf16(facts: StageFacts) -> float | None:
    """Return the rate of products in bf16; where the device has none, in fp32, as engines compute there."""
    return facts.bf16_flop_per_s or facts.fp32_flop_per_s


def _fp32(facts: StageFacts) -> float | None:
    return facts.fp32_flop_per_s or facts.bf16_flop_per_s


def _int8(facts: StageFacts) -> float | None:
    return facts.int8_op_per_s or _bf16(facts)


def _memory_of_a_model(context: TaskContext) -> float:
    """Return the memory that there would be for all blocks, were it as scarce everywhere as on the fullest stage."""
    return _least(context, lambda each: each.memory_bytes * context.block_count / each.blocks)


def _new_rows(context: TaskContext) -> float:
    return context.prompt_tokens * (1 - context.shared_prefix_share)


def _scored_rows(context: TaskContext) -> float:
    """Return how many rows of the prompt the head is computed for, beside those behind which a token is drawn."""
    return context.prompt_tokens if context.task_kind == TaskKind.SCORE else 0.0


def _kv_gigabytes(context: TaskContext) -> float:
    if context.kv_bytes_per_token is None:
        return math.nan
    tokens = (context.prompt_tokens + context.max_tokens) * context.concurrency
    return context.kv_bytes_per_token * tokens / BILLION


def _narrowest_link(context: TaskContext) -> float:
    return _least(context, lambda each: each.link_bytes_per_s)


def _slowest_round_trip_s(context: TaskContext) -> float:
    times_s = [math.nan if each.round_trip_s is None else each.round_trip_s for each in context.stage_facts]
    return math.nan if any(map(math.isnan, times_s)) else max(times_s, default=math.nan)


FEATURES: Final[Mapping[str, Callable[[TaskContext], float]]] = {
    # The model
    "l_weight_bytes": lambda task: log2(task.weight_bytes),
    "l_weight_bits": lambda task: log2(bits_per_weight(task.weight_type)),
    "l_block_bytes": lambda task: log2(task.block_bytes),
    "l_params": lambda task: log2((task.block_parameters or 0) * task.block_count / BILLION),
    "l_active": lambda task: log2((task.active_block_parameters or 0) * task.block_count / BILLION),
    "layers": lambda task: float(task.block_count or math.nan),
    "l_hidden": lambda task: log2(task.hidden_size),
    "l_vocabulary": lambda task: log2(task.vocabulary_size),
    "l_intermediate": lambda task: log2(task.intermediate_size),
    "l_heads": lambda task: log2(task.head_count),
    "l_gqa": lambda task: log2((task.head_count or 0) / (task.kv_head_count or 1)),
    "l_head_size": lambda task: log2(task.head_size),
    "l_experts": lambda task: log2(task.expert_count),
    "l_active_experts": lambda task: log2(task.active_expert_count),
    "l_kv_token": lambda task: log2(task.kv_bytes_per_token),
    # The job
    "l_isl": lambda task: log2(task.prompt_tokens),
    "l_osl": lambda task: log2(task.max_tokens or NO_TEXT),
    "l_bs": lambda task: log2(task.concurrency),
    "l_rows": lambda task: math.log2(1 + _new_rows(task)),
    "l_scored": lambda task: math.log2(1 + _scored_rows(task)),
    "embeds": lambda task: float(task.task_kind == TaskKind.EMBED),
    "l_prompt_over_new": lambda task: math.log2((1 + _new_rows(task)) / max(1, task.max_tokens)),
    "shared": lambda task: task.shared_prefix_share,
    "repetitiveness": lambda task: task.repetitiveness,
    "kvgb": _kv_gigabytes,
    # The machines: along the whole route, and of the stage that is the bottleneck
    "stages": lambda task: float(task.stage_count),
    "l_bw": lambda task: log2(_over_route(task, _read)),
    "l_bw_least": lambda task: log2(_least(task, _read)),
    "l_bf": lambda task: log2(_over_route(task, _bf16)),
    "l_bf_least": lambda task: log2(_least(task, _bf16)),
    "l_f32": lambda task: log2(_over_route(task, _fp32) / _over_route(task, _bf16)),
    "l_f8": lambda task: log2(_over_route(task, _int8) / _over_route(task, _bf16)),
    "l_mem": lambda task: log2(_memory_of_a_model(task)),
    "l_mem_least": lambda task: log2(_least(task, lambda each: each.memory_bytes)),
    "accelerated": lambda task: _share(task, lambda each: each.device is not DeviceKind.CPU),
    "l_threads_least": lambda task: log2(_least(task, lambda each: each.threads)),
    "l_vector_bits_least": lambda task: log2(_least(task, lambda each: each.vector_bits)),
    "bf16_products": lambda task: _share(task, lambda each: each.bf16),
    "int8_products": lambda task: _share(task, lambda each: each.int8),
    "matrix_unit": lambda task: _share(task, lambda each: each.matrix_unit),
    # The links
    "l_round_trip": lambda task: math.log2(LINK_FLOOR_S + _known_link_s(task)),
    "l_round_trip_most": lambda task: log2(LINK_FLOOR_S + _slowest_round_trip_s(task)),
    "l_link": lambda task: log2(_narrowest_link(task)),
    "l_transfer": lambda task: math.log2(LINK_FLOOR_S + _known_transfer_s(task)),
}
"""The columns of the matrix and how each follows from a task context; NaN: not known."""


def tabulate(contexts: Sequence[TaskContext]) -> Contexts:
    """Return contexts as a table, with the names of the groups that folds leave out.

    The objective is in none but `budget`: the two measurements of a run, of time and of computing, are in one group.
    """
    rows = [[of(context) for of in FEATURES.values()] for context in contexts]
    names = {
        "model": [brief(_model_name(context)) for context in contexts],
        "hardware": [brief(context.hardware) for context in contexts],
        "task": [brief(task_bucket(replace(context, objective=Objective.LATENCY.value))) for context in contexts],
        "budget": [context.objective for context in contexts],
    }
    return Contexts(
        tuple(map(str, range(len(contexts)))),
        {name: np.array(values, dtype=np.str_) for name, values in names.items()},
        tuple(FEATURES),
        np.array(rows, dtype=np.float64).reshape(len(contexts), len(FEATURES)),
    )


def _model_name(context: TaskContext) -> str:
    return f"{context.architecture}/{context.block_count}x{context.hidden_size}/{context.weight_type}"


def brief(name: str) -> str:
    """Return a name of bounded length: that of a route of many stages may be kilobytes long."""
    return name if len(name) <= MAX_NAME else hashlib.sha256(name.encode()).hexdigest()
