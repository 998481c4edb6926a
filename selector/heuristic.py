"""Heuristic cost model: the expected cost of a method from a few facts about the task and one table of measured speeds.

A peer without a history chooses by it, and it is a baseline that the learned selector must beat. The table was measured
with a small Llama on two cores with AVX-512. The figures of onnxruntime's int8 follow from its ratios to fp32 measured
with AVX2: 1.67 for a prompt, 0.48 and 1.08 for 1 and 8 sessions, 1.33 for 32 (products alone); those of a GGUF package
in onnxruntime from its ratios to llama.cpp, whose own are estimates. Only ratios matter.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from selector.task import SWITCHES, Method, TaskContext

HEURISTIC_DEVIATION: Final = 0.4
"""Standard deviation of the heuristic's error in natural logarithms: a factor of about 1.5 either way."""

MIN_SAMPLES: Final = 5
"""Measurements below which no model is trained."""


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Expected natural logarithm of a method's cost in seconds, and its standard deviation in a comparison."""

    log_cost: float
    deviation: float


CostTable = Mapping[str, CostEstimate]
"""Cost estimates by method name."""


class _Speed(NamedTuple):
    """Milliseconds per row of a prompt, and per decode step of 1, 8 and 32 sessions."""

    row: float
    decode: tuple[float, float, float]


_SPEEDS: Final = {
    ("eager", "fp32"): _Speed(2.0, (54.8, 72.7, 124.0)),
    ("fused", "fp32"): _Speed(1.5, (27.0, 45.0, 95.0)),
    ("fused", "bf16"): _Speed(0.8, (26.0, 35.0, 59.0)),
    ("fused", "int8"): _Speed(1.7, (15.2, 37.0, 98.0)),
    ("fused", "w8a8"): _Speed(0.75, (17.5, 31.0, 60.0)),
    ("onnxruntime", "fp32"): _Speed(1.4, (22.0, 36.0, 75.0)),
    ("onnxruntime", "int8"): _Speed(2.3, (10.6, 38.8, 100.0)),
    ("onnxruntime", "int4"): _Speed(2.3, (7.5, 38.8, 100.0)),
    ("llamacpp", "native"): _Speed(2.9, (8.2, 26.0, 94.0)),
    ("onnxruntime", "native"): _Speed(1.9, (13.0, 22.0, 75.0)),
}
_NARROW_KV: Final = 1.05
"""Time of a pass with narrower keys and values relative to the engine's own. An estimate: they are packed and unpacked
in every pass, and save reads of memory only behind long texts."""

_ACTIVATIONS: Final = {"fp32": 1.0, "bf16": 0.5, "int8": 0.27}

_CODEC_S: Final = 0.0002
"""Cost of a narrower wire codec per round and link. Jobs on loopback showed 0 to 0.5 ms; conversion takes 0.02 ms."""

_CHUNK_OVERHEAD: Final = 0.02
"""Overhead of chunked prefill as a share of its time, per chunk up to ten."""

_MIN_HIT_RATE: Final = 0.3
"""Repetitiveness below which prompt-lookup drafts cost more than they save."""

_DRAFT_STEP: Final = 0.4
"""Step time of a draft model relative to its target model."""

_DRAFT_HIT_RATE: Final = 0.8
"""Assumed acceptance rate of a draft model's tokens."""


def predicted_cost(context: TaskContext, method: Method) -> float:
    """Return the natural logarithm of a job's expected cost with a method, in seconds: of its time, or of computing."""
    speed = _SPEEDS[method.engine, method.arithmetic]
    prefill_s = _prefill_s(context, method, speed)
    step_s = _decode_ms(speed, context.concurrency) / 1000
    if method.kv != SWITCHES["kv"].baseline:
        prefill_s, step_s = prefill_s * _NARROW_KV, step_s * _NARROW_KV
    round_s = step_s + _link_s(context) * _on_the_wire(method)
    if method.activations != "fp32":
        round_s += (context.stage_count - 1) * _CODEC_S
    if method.drafter == "draft" and context.max_tokens > 1:
        round_s += method.draft_tokens * _DRAFT_STEP * step_s
    return math.log(prefill_s + round_s * context.max_tokens / _tokens_per_round(context, method))


def heuristic_table(context: TaskContext, methods: Iterable[Method]) -> CostTable:
    """Return the heuristic's estimates."""
    return {each.name: CostEstimate(predicted_cost(context, each), HEURISTIC_DEVIATION) for each in methods}


def preference(context: TaskContext, methods: Iterable[Method]) -> list[Method]:
    """Return the methods in ascending order of expected cost."""
    return sorted(methods, key=lambda method: (predicted_cost(context, method), method.name))


def _prefill_s(context: TaskContext, method: Method, speed: _Speed) -> float:
    cached = context.shared_prefix_share if method.prefix_cache else 0.0
    rows = max(1.0, context.prompt_tokens * (1 - cached))
    prefill_s = rows * speed.row / 1000
    chunk = method.prefill_chunk
    if chunk is not None:
        chunks = math.ceil(rows / chunk)
        # Stages work on successive chunks in a pipeline.
        pipelined = (context.stage_count + chunks - 1) / (context.stage_count * chunks)
        # Other sessions go on decoding meanwhile.
        relief = 0.9 if context.concurrency > 1 and chunks > 1 else 1.0
        prefill_s *= max(pipelined, 0.5) * (1 + _CHUNK_OVERHEAD * min(chunks, 10)) * relief
    # The prompt's own pages must be hashed and copied, too.
    return prefill_s * (1.005 if method.prefix_cache else 1.0) + _link_s(context) * _on_the_wire(method)


def _link_s(context: TaskContext) -> float:
    """Return the time on the links where it counts: other objectives than latency are about computing."""
    return context.link_s if context.objective == "latency" else 0.0


def _decode_ms(speed: _Speed, concurrency: int) -> float:
    """Return the time of a decode step, interpolated over the logarithm of the number of sessions."""
    one, eight, many = speed.decode
    place = math.log(max(1, concurrency)) / math.log(8)
    if place <= 1:
        return one + (eight - one) * place
    return eight + (many - eight) * (place - 1) * math.log(8) / math.log(4)


def _on_the_wire(method: Method) -> float:
    """Return the remaining share of the link time: a tenth depends on the bytes, the rest is latency."""
    return 0.9 + 0.1 * _ACTIVATIONS[method.activations]


def _tokens_per_round(context: TaskContext, method: Method) -> float:
    """Return the expected tokens per round through all stages, less the overhead of speculative decoding."""
    if method.drafter == "off" or context.max_tokens <= 1:
        return 1.0
    hit = _DRAFT_HIT_RATE if method.drafter == "draft" else context.repetitiveness
    if hit < _MIN_HIT_RATE:
        return 0.97
    accepted = sum(hit**count for count in range(1, method.draft_tokens + 1))
    # Draft rows are computed, too: cheap for one session, expensive where the batch is full.
    return (1 + accepted) / (1 + 0.04 * method.draft_tokens * min(context.concurrency, 8))
