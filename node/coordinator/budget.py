"""Budget and objective of a job: the routes that are compared for it, and what it cost."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from node.coordinator.planner import ONLY_COMPUTING, RouteNeed
from node.coordinator.submission import JobRequest
from protocol.measurements import Objective, StageObservation

_WEIGHTS: Final = (0.1, 1.0, 10.0, ONLY_COMPUTING)
"""Weights of the routes between the fastest and the cheapest."""


def needs_of(request: JobRequest, need: RouteNeed) -> Sequence[RouteNeed]:
    """Return what is asked of the routes that come into question, the one that serves the objective best first.

    Without a budget there is one. With a budget others follow that cost less, at last over peers that seem to be full:
    it is for them to say that there is no room now. `need`: of the job, for its objective.
    """
    if request.budget is None:
        return [need]
    weights = _WEIGHTS if request.objective is Objective.LATENCY else _WEIGHTS[-1:]
    cheaper = [replace(need, objective=Objective.COST, compute_weight=weight) for weight in weights]
    return [need, *cheaper, replace(cheaper[-1], last_resort=True)]


def cost_of(route: Sequence[StageObservation], prices: Sequence[float]) -> float:
    """Return what a job cost: the seconds of computing on each stage times the price of its peer."""
    return sum(stage.statistics.compute_s * price for stage, price in zip(route, prices, strict=True))
