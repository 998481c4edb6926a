"""Method selection for a job: the methods that it admits, and the interfaces of the chooser and of the quality store.

The coordinator orders the admitted methods by preference, every stage votes, and the tally decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from node.coordinator.observation import weight_type
from node.coordinator.submission import AUTO, JobError, JobErrorCode, JobOutcome, JobRequest, Selection
from node.models.library import KnownModel
from node.stages.voter import TableVersion
from protocol.figures import USUAL_PRICE
from protocol.identity import ModelId, Stage
from protocol.limits import MAX_VOTES
from protocol.measurements import QualityBound, TaskKind
from selector.quality import MeasuredQuality, admits
from selector.task import Method, MethodError, TaskContext, parse_method, portfolio

MEASURING_RETRY_S = 10.0
"""When a client should retry a method whose quality is being measured."""


Votes: TypeAlias = Sequence[Mapping[str, float]]
"""The log cost of the methods that each peer of a route offers, by name."""

WeighVotes: TypeAlias = Callable[[Votes], Sequence[int] | None]
"""Returns the weights of the votes of all stages and of the coordinator, the last; None where they weigh the same."""


class QualityStore(Protocol):
    """Knows the measured quality of lossy methods."""

    def request(self, model: KnownModel) -> bool:
        """Request the measurement of a model unless it was measured; return whether it is queued or running."""

    def quality(self, model: ModelId, method: Method) -> MeasuredQuality | None:
        """Return the measured quality; None if it was not measured."""

    def failure(self, model: ModelId) -> str | None:
        """Return why the last measurement of a model failed, if it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRequest:
    """A request to select one of the methods that a job admits.

    `is_free`: whether the user left the method open, and no text has begun that must go on as it began. `budget`: the
    highest predicted cost, None for any. `stage_compute_s`: of the job on each stage of its route, as the planner
    expects it; empty where it does not. `prices`: of these stages. `stages`: the route.
    """

    model: ModelId
    context: TaskContext
    admitted: Sequence[Method]
    is_free: bool = True
    budget: float | None = None
    stage_compute_s: Sequence[float] = ()
    prices: Sequence[float] = ()
    stages: tuple[Stage, ...] = ()

    @property
    def compute_s(self) -> float:
        """The expected seconds of computing on all stages; 0 where they are not known."""
        return sum(self.stage_compute_s)

    @property
    def price(self) -> float:
        """The mean price of these seconds."""
        cost = sum(seconds * price for seconds, price in zip(self.stage_compute_s, self.prices, strict=True))
        return cost / self.compute_s if self.compute_s else USUAL_PRICE


class OverBudget(Exception):
    """All admitted methods are predicted to cost more than the budget on a route. `method`: the cheapest of them."""

    def __init__(self, cost: float, method: Method) -> None:
        super().__init__(f"the cheapest method, {method.name}, is predicted to cost {cost:.4g}")
        self.cost = cost
        self.method = method


class Choice(Protocol):
    """The selection of one job's method, before and after the vote."""

    @property
    def order(self) -> Sequence[Method]:
        """The admitted methods in order of preference, which breaks ties between equal scores."""

    @property
    def learned_from(self) -> TableVersion | None:
        """The agreed table that the coordinator's own scores were learned from, if any."""

    def predicted_cost(self, method: str) -> float | None:
        """Return what the whole job was predicted to cost with a method, as its budget was compared; None: unknown."""

    def ballot(self, votes: Votes, weigh: WeighVotes) -> Mapping[str, float]:
        """Return the coordinator's own scores, given those of the stages.

        Methods that are left out are not accepted; of methods that all stages offer, at least one is accepted.
        """


class Chooser(Protocol):
    """The coordinator's side of the selection, which sees the prediction, the votes and the outcome."""

    async def choose(self, request: SelectionRequest) -> Choice:
        """Return the choice, without waiting for predictions that are missing. Raises OverBudget."""

    def served(self, choice: Choice, outcome: JobOutcome) -> Selection | None:
        """Learn from a job's outcome; return an assessment of its selection, None where nothing was predicted."""


def admitted_methods(request: JobRequest, model: KnownModel, store: QualityStore) -> list[Method]:
    """Return the methods that a job may be served with: the one that it names, else all for its kind within its bound.

    The measurement of a model is requested where needed; until it is done lossy methods are not admitted.
    Raises JobError for a method that does not exist for the model, or that the kind or the bound does not admit.
    """
    bound, package_format, kind = request.quality, model.manifest.format, request.task_kind
    is_pending = bound is not QualityBound.EXACT and store.request(model)
    if request.method == AUTO:
        offered = portfolio(package_format, weight_type(model.manifest), kind)
        return [each for each in offered if admits(bound, each, store.quality(model.id, each))][:MAX_VOTES]
    try:
        named = parse_method(request.method, package_format)
    except MethodError as error:
        raise JobError(JobErrorCode.INVALID, f"{error}; or use auto") from None
    if not named.suits(kind):
        what = "embeddings" if kind is TaskKind.EMBED else "log probabilities of the prompt"
        message = f"{named.name} is not for {what}, which need every row: use prefix_cache=off|speculation=off"
        raise JobError(JobErrorCode.INVALID, message)
    quality = store.quality(model.id, named)
    if not admits(bound, named, quality):
        if quality is None and is_pending:
            message = f"the quality of {named.name} with {model.name} is being measured: try again in a few minutes"
            raise JobError(JobErrorCode.MEASURING, message, retry_after_s=MEASURING_RETRY_S)
        raise JobError(JobErrorCode.INVALID, _why_not(named, bound, quality, store.failure(model.id)))
    return [named]


def _why_not(method: Method, bound: QualityBound, quality: MeasuredQuality | None, failure: str | None) -> str:
    if quality is None and bound is not QualityBound.EXACT:
        reason = f" ({failure}; it is tried again after half an hour)" if failure else ""
        return f"the quality of {method.name} with this model was not measured{reason}: use another method"
    wider = [each for each in QualityBound if admits(each, method, quality)]
    if wider:
        return f"{method.name} is not exact: use --quality {wider[0]}"
    if quality is None:
        return f"{method.name} is not exact: use --quality near or any"
    change = f"{quality.perplexity_change:+.1%}"
    return f"{method.name} changes this model's perplexity by {change}, beyond any quality bound: use another method"
