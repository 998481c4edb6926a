"""Equivalence: buckets of tasks that share their best method, and methods that act alike on a task."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from protocol.figures import USUAL_PRICE
from protocol.measurements import TaskKind
from selector.task import Method, TaskContext

SHORT_LINK_S: Final = 2**-6.5
"""Link time per token (11 ms) below which links count as local: three peers on one machine have 5 to 10 ms."""

SHORT_TRANSFER_S: Final = 0.1
"""Transfer time of all rows of a job below which a wire codec saves nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewpoint:
    """The peer for which samples are weighted: its hardware class and software, at an hour.

    `trust`: by model the weight of its members' reports, 0 to 1, as agreed on its chain; `default_trust`: of peers not
    among them. Without any chain every peer is trusted.
    """

    peer: str
    hardware: str
    software: str
    hour: int
    trust: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    default_trust: Mapping[str, float] = field(default_factory=dict)

    def trust_in(self, observer: str, model: str) -> float:
        """Return the weight of what a peer reports of a model.

        Only the model's own chain counts: any peers may found one, so that of another model gives no trust. What
        is reported of a model whose chain is not followed weighs as from peers that are members of none.
        """
        others = self.default_trust.get(model, min(self.default_trust.values(), default=1.0))
        return self.trust.get(model, {}).get(observer, others)

    def is_unknown(self, observer: str, model: str) -> bool:
        """Return whether there are members, and another peer is none of this model's chain."""
        return bool(self.trust) and observer != self.peer and observer not in self.trust.get(model, {})

    def members(self, model: str) -> frozenset[str]:
        """Return the peers whose reports of a model have weight by its chain."""
        return frozenset(peer for peer, weight in self.trust.get(model, {}).items() if weight > 0)


@lru_cache(maxsize=4096)
def canonicalise(context: TaskContext) -> TaskContext:
    """Return the canonical context of all similar ones, for which predictions are cached.

    Sizes are rounded to powers of √2, shares to tenths, times and rates of links to powers of two. The quality bound,
    which says which methods are admitted, is reset, as are the peers' prices, on which no prediction depends.
    """
    return replace(
        context,
        prompt_tokens=_rounded(context.prompt_tokens),
        max_tokens=_rounded(context.max_tokens) if context.max_tokens else 0,
        concurrency=_rounded(context.concurrency),
        shared_prefix_share=round(context.shared_prefix_share, 1),
        repetitiveness=round(context.repetitiveness, 1),
        link_s=_octave(context.link_s),
        transfer_s=_octave(context.transfer_s),
        quality="exact",
        # Prices are those of the peers, whatever the method: the cheapest one computes least.
        objective="latency" if context.objective == "latency" else "throughput",
        stage_facts=tuple(
            replace(
                facts,
                round_trip_s=None if facts.round_trip_s is None else _octave(facts.round_trip_s),
                link_bytes_per_s=facts.link_bytes_per_s and _octave(facts.link_bytes_per_s),
                price=USUAL_PRICE,
            )
            for facts in context.stage_facts
        ),
    )


def _octave(value: float) -> float:
    """Return the power of two that is nearest; 0 for less than a ten-thousandth."""
    return 0.0 if value < 1e-4 else 2.0 ** round(math.log2(value))


def task_bucket(context: TaskContext) -> str:
    """Return the name of the bucket of tasks for which one method is adopted.

    Sizes are bucketed by factors of four (bounds 19, 76, 304, …: not powers of two, around which sizes cluster), shares
    by thirds, links by factors of eight. A task and its canonical context share a bucket. The names of buckets of texts
    say no kind, as they did not before there were others: trials are kept under them.
    """
    context = canonicalise(context)
    counts = (context.prompt_tokens, context.max_tokens, context.concurrency)
    sizes = (4 ** math.ceil(_half_octaves(count) / 4) for count in counts)
    shares = (min(2, int(3 * share)) for share in (context.shared_prefix_share, context.repetitiveness))
    link = 0 if context.link_s < SHORT_LINK_S else 1 + int(math.log(context.link_s / SHORT_LINK_S, 8))
    model = (context.architecture, context.block_count, context.hidden_size, context.weight_bytes)
    kind = () if context.task_kind == TaskKind.GENERATE else (context.task_kind,)
    parts = (*model, *sizes, *shares, link, context.stage_count, context.hardware, context.objective, *kind)
    return "/".join(map(str, parts))


def are_alike(one: TaskContext, other: TaskContext) -> bool:
    """Return whether two tasks of any model and machine are so alike that methods do about the same for them.

    They are about as alike as two of one bucket: sizes within a factor of two, shares within a third.
    """
    if one.task_kind != other.task_kind:
        return False
    sizes = ((each.prompt_tokens, each.max_tokens, each.concurrency) for each in (one, other))
    shares = ((each.shared_prefix_share, each.repetitiveness) for each in (one, other))
    return all(abs(_half_octaves(a) - _half_octaves(b)) <= 2 for a, b in zip(*sizes, strict=True)) and all(
        abs(a - b) <= 1 / 3 for a, b in zip(*shares, strict=True)
    )


def effective_switches(method: Method, context: TaskContext) -> frozenset[tuple[str, str]]:
    """Return the settings that differ from the baseline's and can affect a task.

    A prefix cache has no effect without a shared prefix, nor a chunk as long as the prompt, a wire codec on wide links,
    or speculation for a single token.
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
    return frozenset((switch, value) for switch, value in _settings(method) if switch not in idle)


def simplest_first(methods: Iterable[Method]) -> list[Method]:
    """Return the methods in order of simplicity: exact ones first, then by number of switches set."""

    def complexity(method: Method) -> int:
        return len(_settings(method))

    return sorted(methods, key=lambda method: (not method.exact, complexity(method), method.name))


def _settings(method: Method) -> list[tuple[str, str]]:
    """Return the settings that are not the baseline's."""
    plain = method.baseline.switches
    return [(switch, value) for switch, value in method.switches.items() if value != plain.get(switch)]


def _rounded(count: int) -> int:
    return int(0.5 + 2.0 ** (_half_octaves(count) / 2))


def _half_octaves(count: int) -> int:
    """Return the power of √2 that is nearest."""
    return round(2 * math.log2(max(1, count)))
