"""The hand-written rule: what a method is expected to cost, from a few facts about the task and one table.

It is what a peer without a history goes by, and one of the baselines that the learned selector has to beat. The table
was measured with a small Llama on two cores with AVX-512. onnxruntime's int8 follows from its ratios to fp32, measured
with AVX2: 1.67 for a prompt, 0.48 and 1.08 for 1 and 8 sessions, 1.33 for 32 (products alone). Only ratios matter.
"""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from selector.task import Method, TaskContext


class _Speed(NamedTuple):
    """Milliseconds: of one row of a prompt; of a decode step of 1, 8 and 32 sessions."""

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
}
_ACTIVATIONS: Final = {"fp32": 1.0, "bf16": 0.5, "int8": 0.27}

_CODEC_S: Final = 0.0002
"""What a narrower codec costs a round at each crossing: not worth it on short links.

Between what whole jobs on loopback showed, none to half a millisecond; the conversion alone takes 0.02 ms.
"""

_CHUNK_OVERHEAD: Final = 0.02
"""What cutting a prompt costs, as a part of its time, for each chunk up to ten."""

_WORTH_GUESSING: Final = 0.3
"""With less repetition than this the guesses of prompt lookup cost more than they save."""

_DRAFT_STEP: Final = 0.4
"""A draft model's step, as a part of the step of the model that it guesses for."""

_DRAFT_HIT: Final = 0.8
"""How often a draft model is taken to be right."""


def predicted_cost(context: TaskContext, method: Method) -> float:
    """Return the natural logarithm of what a job is expected to cost with a method, seconds."""
    speed = _SPEEDS[method.engine, method.arithmetic]
    prefill_s = _prefill_s(context, method, speed)
    step_s = _decode_ms(speed, context.concurrency) / 1000
    round_s = step_s + context.link_s * _on_the_wire(method)
    if method.activations != "fp32":
        round_s += (context.stage_count - 1) * _CODEC_S
    if method.drafter == "draft" and context.max_tokens > 1:
        round_s += method.draft_tokens * _DRAFT_STEP * step_s
    return math.log(prefill_s + round_s * context.max_tokens / _tokens_per_round(context, method))


def preference(context: TaskContext, methods: Iterable[Method]) -> list[Method]:
    """Return the methods with the most promising first."""
    return sorted(methods, key=lambda method: (predicted_cost(context, method), method.name))


def _prefill_s(context: TaskContext, method: Method, speed: _Speed) -> float:
    cached = context.shared_prefix_share if method.prefix_cache else 0.0
    rows = max(1.0, context.prompt_tokens * (1 - cached))
    prefill_s = rows * speed.row / 1000
    chunk = method.prefill_chunk
    if chunk is not None:
        chunks = math.ceil(rows / chunk)
        # While one stage works on a chunk, the one before it works on the next.
        pipelined = (context.stage_count + chunks - 1) / (context.stage_count * chunks)
        # And others go on decoding meanwhile, which is felt where there are others.
        relief = 0.9 if context.concurrency > 1 and chunks > 1 else 1.0
        prefill_s *= max(pipelined, 0.5) * (1 + _CHUNK_OVERHEAD * min(chunks, 10)) * relief
    # One's own pages are to be hashed, copied and kept, too.
    return prefill_s * (1.005 if method.prefix_cache else 1.0) + context.link_s * _on_the_wire(method)


def _decode_ms(speed: _Speed, concurrency: int) -> float:
    """Return the time of a step of so many sessions, interpolated over the logarithm of their number."""
    one, eight, many = speed.decode
    place = math.log(max(1, concurrency)) / math.log(8)
    if place <= 1:
        return one + (eight - one) * place
    return eight + (many - eight) * (place - 1) * math.log(8) / math.log(4)


def _on_the_wire(method: Method) -> float:
    """Return how much of the links' time is left: part of it is the bytes', part is distance."""
    return 0.9 + 0.1 * _ACTIVATIONS[method.activations]


def _tokens_per_round(context: TaskContext, method: Method) -> float:
    """Return how many tokens a round through all stages is expected to bring, less what guessing costs."""
    if method.drafter == "off" or context.max_tokens <= 1:
        return 1.0
    hit = _DRAFT_HIT if method.drafter == "draft" else context.repetitiveness
    if hit < _WORTH_GUESSING:
        return 0.97
    accepted = sum(hit**count for count in range(1, method.draft_tokens + 1))
    # Rows of guesses are computed, too: cheap for one session, dear where the batch is full already.
    return (1 + accepted) / (1 + 0.04 * method.draft_tokens * min(context.concurrency, 8))
