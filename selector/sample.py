"""A sample: one observation as the meta-model sees it."""

from dataclasses import dataclass

from protocol.measurements import ObservationKind
from selector.task import TaskContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement of a method in a context.

    `model`: its id. `log_cost`: natural logarithm of the cost in seconds. `log_ratio`: of the cost over the
    baseline's, measured alternately on the same route; None for a served job. `route`, `software`: opaque names.
    `hour`: of issue, from any origin. `countersigned`: whether every stage signed its figures.
    """

    kind: ObservationKind
    model: str
    context: TaskContext
    method: str
    log_cost: float
    log_ratio: float | None
    observer: str
    route: str
    hour: int
    software: str
    countersigned: bool
