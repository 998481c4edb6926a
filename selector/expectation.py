"""What methods are expected to cost, as the rule says before anything was learned."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from selector.heuristic import predicted_cost
from selector.task import Method, TaskContext

RULE_DEVIATION: Final = 0.4
"""Standard deviation that the rule is expected to be off by, about a factor of 1.5 either way."""

MIN_EXPERIENCES: Final = 5
"""With fewer there is no model."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a method is expected to cost: natural logarithm of seconds, and the standard deviation of a comparison."""

    log_cost: float
    deviation: float


Table = Mapping[str, Expectation]
"""Expectations by the methods' names."""


def rule_table(context: TaskContext, methods: Iterable[Method]) -> Table:
    """Return what the rule expects."""
    return {each.name: Expectation(predicted_cost(context, each), RULE_DEVIATION) for each in methods}
