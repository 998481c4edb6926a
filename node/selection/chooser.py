"""Chooses and votes by what this node learned, within what its own trials confirmed.

Votes rank the methods. A method that is new to a task bucket is adopted only after a trial against the one in use; now
and then a job explores a promising method. What exploration and trials cost stays within a share of the served time.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import trio

from node.coordinator.method_choice import Choice, SelectionRequest, Votes, WeighVotes
from node.coordinator.submission import JobOutcome, PredictedCost, Selection
from node.selection.cost_prediction import Calibration, PredictedCompute, predict_compute, shortened
from node.selection.prediction_cache import Prediction, PredictionCache
from node.selection.trial_scheduler import TrialRequest, TrialScheduler, switches_in_effect
from node.stages.voter import StageVote, TableVersion
from node.storage.adoption_store import AdoptionStore
from protocol.identity import ModelId
from protocol.measurements import Objective, TaskKind
from selector.adoption import MARGIN, MAX_CANDIDATES, MAX_LOSS, Adoption, Candidates, ExplorationAllowance
from selector.heuristic import CostEstimate, predicted_cost, preference
from selector.task import Method, TaskContext, portfolio
from selector.task_buckets import simplest_first, task_bucket
from selector.voting import scores
from selector.workloads import likest_workload

DEFAULT_SHARE: Final = 0.1
"""Share of the served time that trying methods may cost."""

INITIAL_ALLOWANCE_S: Final = 120.0
"""What it may cost before anything was served: about five trials of the demo model on two cores."""

MAX_DECISIONS: Final = 1000


@dataclass(slots=True, eq=False)
class LearnedChoice:
    """A choice in the making; see `node.coordinator.method_choice.Choice`."""

    request: SelectionRequest
    prediction: Prediction
    compute: PredictedCompute
    bucket: str
    default: str
    in_use: str
    adoption: Adoption
    order: Sequence[Method]
    usual: str = ""
    """The heuristic's choice."""
    agreed_better: frozenset[str] = frozenset()
    """Methods that are better by what the swarm agreed, where no trial here was run yet."""
    explored: str | None = None
    accepted: frozenset[str] = frozenset()
    offered: frozenset[str] = frozenset()
    """Methods that all stages offer."""
    voted: Mapping[str, float] = field(default_factory=dict)
    """What all votes together say of their logarithms of cost."""

    @property
    def learned_from(self) -> TableVersion | None:
        """The agreed table that the prediction was learned from, if any."""
        return self.prediction.learned_from

    @property
    def log_costs(self) -> dict[str, float]:
        """Predicted natural logarithms of cost by method, in order of preference."""
        return {method.name: self.prediction.table[method.name].log_cost for method in self.order}

    def predicted_cost(self, method: str) -> float | None:
        """Return the predicted cost of the whole job; see Choice."""
        return self.compute.cost(method) if method in self.compute.log_s else None

    def ballot(self, votes: Votes, weigh: WeighVotes) -> Mapping[str, float]:
        """Return our scores of the accepted methods; see Choice."""
        own = self.log_costs
        offered = self.offered = frozenset(own).intersection(*votes)
        ballots = (*votes, own)
        self.voted = scores(list(own), [[each.get(name) for name in own] for each in ballots], weigh(ballots))
        if self.explored not in offered:
            self.explored = None
        if self.explored is not None:
            self.accepted = frozenset({self.explored})
        elif self.request.is_free:
            admitted = [method.name for method in self.request.admitted]
            self.accepted = self.agreed_better & offered or self.adoption.accepted(
                self.bucket, admitted, offered, self.default
            )
        else:
            self.accepted = offered
        return {name: own[name] for name in self.accepted}


class LearnedChooser:
    """Implements Chooser, and records the outcomes of its choices."""

    def __init__(
        self,
        predictions: PredictionCache,
        rng: random.Random,
        *,
        share: float = DEFAULT_SHARE,
        allowance_s: float = INITIAL_ALLOWANCE_S,
        store: AdoptionStore | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`share`: of the served time that trying methods may cost; 0 for no exploration."""
        self.predictions = predictions
        self.adoption = Adoption()
        self.allowance = ExplorationAllowance(share, allowance_s if share > 0 else 0.0)
        self.trials = TrialScheduler(self.adoption, self.allowance, store=store, wall_clock=wall_clock)
        self.decisions: deque[tuple[JobOutcome, Selection]] = deque(maxlen=MAX_DECISIONS)
        """Past outcomes, and how their choices looked, without the predictions for each method."""
        self._rng = rng
        self._calibration = Calibration()
        self._offered: set[str] = set()
        """Methods that some route has offered; no job explores others."""

    async def choose(self, request: SelectionRequest) -> Choice:
        """Return the choice; see Chooser."""
        compute = await predict_compute(request, self._usual(request), self.predictions, self._calibration)
        request = compute.within(request)
        context, admitted = request.context, request.admitted
        prediction = await self.predictions.predict(context, admitted, request.model)
        bucket, usual = task_bucket(context), _default(context, admitted)
        tried = self.adoption.trials(bucket)
        is_agreed_on = not tried and context.task_kind == TaskKind.GENERATE  # cells are of no other kind
        better = {} if not is_agreed_on else _agreed_better(prediction, usual, admitted, context)
        default = min(better, key=better.__getitem__, default=usual)
        choice = LearnedChoice(
            request=request,
            prediction=prediction,
            compute=compute,
            bucket=bucket,
            default=default,
            in_use=self.adoption.in_use(bucket, [method.name for method in admitted], default),
            adoption=self.adoption,
            usual=usual,
            agreed_better=frozenset(better),
            order=sorted(admitted, key=lambda method: (prediction.table[method.name].log_cost, method.name)),
        )
        if request.is_free and self.allowance.may_explore:
            choice.explored = self._method_to_explore(choice)
        return choice

    def _usual(self, request: SelectionRequest) -> Method:
        """Return the method in use for tasks like this one where the user leaves it open."""
        methods, context = request.admitted, request.context
        if not request.is_free:
            offered = portfolio(methods[0].package_format, context.weight_type, TaskKind(context.task_kind))
            methods = [method for method in offered if method.exact]
        names = {method.name: method for method in methods}
        return names[self.adoption.in_use(task_bucket(context), list(names), _default(context, methods))]

    def _method_to_explore(self, choice: LearnedChoice) -> str | None:
        """Return a method for this job to explore, or None; never one that is expected to be bad."""
        if self._rng.random() >= 2 * self.allowance.share:
            return None
        costs = choice.log_costs
        offered = {name: cost for name, cost in costs.items() if name in self._offered or name == choice.in_use}
        for name in self._candidates(choice, offered).names:
            if costs[name] - costs[choice.in_use] < MAX_LOSS:
                return name
        return None

    def _candidates(self, choice: LearnedChoice, expected: Mapping[str, float]) -> Candidates:
        """Return the methods worth a trial, given expected logarithms of cost."""
        admitted, table = choice.request.admitted, choice.prediction.table
        return self.adoption.candidates(
            choice.bucket,
            [method.name for method in simplest_first(admitted)],
            choice.default,
            {name: CostEstimate(cost, table[name].deviation) for name, cost in expected.items()},
            trio.current_time(),
            switches_in_effect(choice.request.context, admitted),
        )

    def _worth_a_trial(self, choice: LearnedChoice) -> Candidates:
        """Return the methods worth a trial: first the best by all votes, then the best by our own prediction.

        Of the votes alone a single one could rule out any method; by ours alone the swarm would have no say in what is
        used here. A method that we expect to cost more than twice as much is not tried for others' votes.
        """
        costs = {name: cost for name, cost in choice.log_costs.items() if name in choice.offered}
        own = self._candidates(choice, costs)
        if choice.in_use not in costs:
            return own
        most = costs[choice.in_use] + MAX_LOSS
        voted = self._candidates(choice, {name: cost for name, cost in choice.voted.items() if costs[name] <= most})
        names = dict.fromkeys((*voted.names[:1], *own.names[:1], *voted.names, *own.names))
        return Candidates(own.confidence, tuple(names)[:MAX_CANDIDATES])

    def served(self, choice: Choice, outcome: JobOutcome) -> Selection | None:
        """Record the outcome of a job, request trials, and return how the choice looked; see Chooser."""
        if not isinstance(choice, LearnedChoice):
            raise TypeError("a choice of another chooser")
        self._offered |= choice.offered
        context = choice.request.context
        # A text may end early: the prediction is scaled to the tokens that were generated.
        tokens = outcome.completion_tokens
        expected = {name: cost + shortened(context, name, tokens) for name, cost in choice.log_costs.items()}
        if outcome.method not in expected:  # it lost its draft model, which was not predicted
            return None
        selection = replace(
            self._selection(choice, expected, outcome.method),
            predicted_cost=choice.compute.cost(outcome.method, tokens),
        )
        if not outcome.is_replayed:
            self._calibrate(choice, outcome, expected[outcome.method])
            if choice.request.is_free:
                self._record(choice, outcome, selection)
                self._request_trial(choice, selection.probes)
        return selection

    def describe(self, choice: LearnedChoice, method: str) -> Selection:
        """Return how a choice looks before the job has run."""
        return self._selection(choice, choice.log_costs, method)

    def _selection(self, choice: LearnedChoice, expected: Mapping[str, float], method: str) -> Selection:
        context = choice.request.context
        offset = self._offset(choice, method)
        candidates = self._worth_a_trial(choice)
        plain = choice.order[0].baseline
        baseline = expected.get(plain.name, predicted_cost(context, plain))
        predictions = {
            name: PredictedCost(
                cost_s=math.exp(cost + offset),
                speedup=math.exp(baseline - cost),
                deviation=choice.prediction.table[name].deviation,
            )
            for name, cost in sorted(expected.items(), key=lambda item: item[1])
            if name in choice.offered or name == method  # others cannot run, and so are never the best
        }
        return Selection(
            basis=choice.prediction.basis,
            experiences=choice.prediction.sample_count,
            predictions=predictions,
            accepted=tuple(sorted(choice.accepted)),
            explored=choice.explored is not None,
            confidence=candidates.confidence,
            probes=candidates.names,
            predicted_s=predictions[method].cost_s,
            predicted_speedup=predictions[method].speedup,
            regret_s=predictions[method].cost_s - min(each.cost_s for each in predictions.values()),
            predicted_cost=choice.compute.cost(method),
        )

    def _offset(self, choice: LearnedChoice, method: str) -> float:
        """Return what turns predicted logarithms of cost into those of seconds here."""
        if choice.request.context.objective == Objective.LATENCY:
            return self._calibration.of(choice.request.context)
        compute = choice.compute  # its level is the planner's, which the calibration is beside
        return compute.log_s[method] + compute.offset - choice.prediction.table[method].log_cost

    def _calibrate(self, choice: LearnedChoice, outcome: JobOutcome, expected: float) -> None:
        """Learn by how much predictions were wrong. `expected`: logarithm of the cost, for the tokens that came."""
        compute, context = choice.compute, choice.request.context
        if outcome.compute_s > 0:
            saved = shortened(compute.context, outcome.method, outcome.completion_tokens)
            error = math.log(outcome.compute_s) - compute.log_s[outcome.method] - saved
            self._calibration.update(compute.context, error)
        if context.objective == Objective.LATENCY:
            self._calibration.update(context, math.log(outcome.total_s) - expected)

    def _record(self, choice: LearnedChoice, outcome: JobOutcome, selection: Selection) -> None:
        allowance = self.allowance
        allowance.jobs += 1
        allowance.served_s += outcome.total_s
        if selection.explored:
            allowance.explored_jobs += 1
            in_use = selection.predictions.get(choice.in_use)
            regret_s = selection.regret_s if in_use is None else selection.predicted_s - in_use.cost_s
            allowance.regret_s += max(0.0, regret_s)
        if choice.request.context.objective != Objective.LATENCY:  # what was predicted is computing
            if not outcome.compute_s:
                return
            outcome = replace(outcome, total_s=outcome.compute_s)
        self.decisions.append((outcome, replace(selection, predictions={})))

    def _request_trial(self, choice: LearnedChoice, probes: Sequence[str]) -> None:
        """Request a trial of the probes against the method in use.

        What is in use because the swarm agreed on it gets one in any case.
        """
        if choice.agreed_better and not probes:
            probes = (choice.usual,)
        if probes:
            names = {choice.in_use, *probes}
            methods = [method for method in choice.request.admitted if method.name in names]
            request = TrialRequest(
                model=choice.request.model,
                context=choice.request.context,
                methods=methods,
                in_use=choice.in_use,
                stages=choice.request.stages,
            )
            self.trials.request(choice.bucket, request)


class LearnedVoter:
    """Implements Voter by this node's predictions."""

    def __init__(self, predictions: PredictionCache) -> None:
        self._predictions = predictions

    async def vote(self, model: ModelId, context: TaskContext, methods: Sequence[Method]) -> StageVote:
        """Return the predicted logarithms of cost; see Voter."""
        prediction = await self._predictions.predict(context, methods, model)
        scores = {name: estimate.log_cost for name, estimate in prediction.table.items()}
        return StageVote(scores, prediction.learned_from)


def _default(context: TaskContext, admitted: Sequence[Method]) -> str:
    """Return the heuristic's choice among methods without a draft model, which few swarms have."""
    return preference(context, [each for each in admitted if each.drafter != "draft"] or admitted)[0].name


def _agreed_better(
    prediction: Prediction, usual: str, admitted: Sequence[Method], context: TaskContext
) -> dict[str, float]:
    """Return the methods that the swarm agreed to be better than the heuristic's choice: they are used without a trial.

    Firm cells of every hardware class of the route must have them ahead under the workload that is most like the task;
    and the prediction, which knows how the task differs from it, must not say otherwise. By name, with the expected
    logarithm of cost.
    """
    if prediction.agreed is None:
        return {}
    classes, default, workload = context.hardware.split("+"), prediction.table[usual], likest_workload(context)
    found = {method.name: prediction.table[method.name] for method in admitted if method.drafter != "draft"}
    return {
        name: each.log_cost
        for name, each in found.items()
        if default.log_cost - each.log_cost > MARGIN
        and all(prediction.agreed.is_ahead(name, usual, each_class, workload) for each_class in classes)
    }
