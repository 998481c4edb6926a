"""What is taken to be alike: tasks for which the same method is best, and methods that do the same to a task."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from selector.task import BASELINE, Method, TaskContext

SHORT_LINK_S: Final = 2**-6.5
"""Links that add less than these 11 ms to a token are hardly felt: three peers on one machine have 5 to 10 ms."""

SHORT_TRANSFER_S: Final = 0.1
"""Nothing is to be saved where all rows of a job take less time than that from stage to stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewpoint:
    """For whom experiences are weighed: a peer, its class of hardware and its software, at an hour.

    `trust`: how far the word of others is believed, 0 to 1, as the swarm has agreed; `trust_in_strangers`: of everybody
    who is not among them.
    """

    peer: str
    hardware: str
    software: str
    hour: int
    trust: Mapping[str, float] = field(default_factory=dict)
    trust_in_strangers: float = 1.0


def representative(context: TaskContext) -> TaskContext:
    """Return the context that stands for all that are much like it: predictions are made for it, once, and kept.

    Sizes are rounded to powers of √2, shares to tenths, times to powers of two. What changes from moment to moment and
    is in no observation is left out.
    """
    return replace(
        context,
        prompt_tokens=_rounded(context.prompt_tokens),
        max_tokens=_rounded(context.max_tokens),
        concurrency=_rounded(context.concurrency),
        shared_prefix_share=round(context.shared_prefix_share, 1),
        repetitiveness=round(context.repetitiveness, 1),
        link_s=0.0 if context.link_s < 1e-4 else 2.0 ** round(math.log2(context.link_s)),
        transfer_s=0.0,
        quality="exact",
    )


def kind_of(context: TaskContext) -> str:
    """Return the name of a kind of task, in which the same method is taken to be best: what is adopted holds for it.

    Sizes count by factors of four, shares by thirds, links by factors of eight. Bounds lie between powers of two, about
    which sizes crowd: 32 and 64 are alike, and what is about as long. A task is of the kind of its representative.
    """
    context = representative(context)
    counts = (context.prompt_tokens, context.max_tokens, context.concurrency)
    sizes = (4 ** math.ceil(_half_octaves(count) / 4) for count in counts)
    shares = (min(2, int(3 * share)) for share in (context.shared_prefix_share, context.repetitiveness))
    link = 0 if context.link_s < SHORT_LINK_S else 1 + int(math.log(context.link_s / SHORT_LINK_S, 8))
    model = (context.architecture, context.block_count, context.hidden_size, context.weight_bytes)
    parts = (*model, *sizes, *shares, link, context.stage_count, context.hardware, context.objective)
    return "/".join(map(str, parts))


def effect_of(method: Method, context: TaskContext) -> frozenset[tuple[str, str]]:
    """Return the settings in which a method differs from the baseline and that can do anything to a task.

    A cache does nothing where prompts have nothing in common, a chunk as long as the prompt, a wire codec where
    links are wide, and guesses where one token is wanted.
    """
    idle = set()
    if round(context.shared_prefix_share, 1) == 0:
        idle.add("prefix_cache")
    if method.prefill_chunk is not None and method.prefill_chunk >= context.prompt_tokens:
        idle.add("prefill_chunk")
    if context.stage_count <= 1 or context.transfer_s < SHORT_TRANSFER_S:
        idle.add("activations")
    if context.max_tokens <= 1:
        idle.add("speculation")
    return frozenset(
        (switch, value)
        for switch, value in method.switches.items()
        if switch not in idle and value != BASELINE.switches[switch]
    )


def plainest_first(methods: Iterable[Method]) -> list[Method]:
    """Return methods in the order in which they stand for those that do the same: exact ones, with little to them."""

    def trappings(method: Method) -> int:
        return sum(value != BASELINE.switches[switch] for switch, value in method.switches.items())

    return sorted(methods, key=lambda method: (not method.exact, trappings(method), method.name))


def _rounded(count: int) -> int:
    return int(0.5 + 2.0 ** (_half_octaves(count) / 2))


def _half_octaves(count: int) -> int:
    """Return the power of √2 that is nearest."""
    return round(2 * math.log2(max(1, count)))
