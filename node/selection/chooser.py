"""How this node chooses and votes: by what it learned, within what its own trials confirmed.

Votes rank the methods; a method that is new to a kind of task is adopted only after a short trial against the one in
use, run here while no job is under way. Now and then a job is tried on a method that may turn out better; what that
and the trials cost stays within a share of the time that jobs take.
"""

import math
import random
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import structlog
import trio

from node.coordinator.method_choice import Choice, SelectionRequest
from node.coordinator.submission import JobError, JobOutcome, PredictedCost, Selection
from node.selection.prediction_cache import Opinion, Predictions
from node.storage.adoption_store import Standings
from node.storage.database import StorageError
from protocol.identity import JobId, ModelId
from selector.adoption import MAX_LOSS, Adoption, Budget, Standing
from selector.heuristic import predicted_cost, preference
from selector.task import BASELINE, Method, TaskContext
from selector.task_buckets import effect_of, kind_of, plainest_first
from selector.voting import scores

DEFAULT_SHARE: Final = 0.1
"""Of the time that jobs take, what trying methods may cost."""

ALLOWANCE_S: Final = 120.0
"""What it may cost before anything was served: about five trials of the demo model on two cores."""

IDLE_S: Final = 0.3
"""A trial begins once no job has been under way for so long,"""

IDLE_LIMIT_S: Final = 30.0
"""or after this long in any case: a node that is never idle must learn, too."""

MAX_WAITING: Final = 16
MAX_DECISIONS: Final = 1000
LEVEL_SHARE: Final = 0.2
"""How fast the level follows what jobs take."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialNeed:
    """A trial that is wanted: methods that are to be compared on tasks like this one."""

    model: ModelId
    context: TaskContext
    methods: Sequence[Method]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """Of each method that could be had, for each round: the logarithm of its cost over the baseline's."""

    log_ratios: Mapping[str, Sequence[float]]


class Memory(Protocol):
    """Keeps what trials said; `node.storage.adoption_store` is the real one. Every method may raise StorageError."""

    async def keep(self, kind: str, standings: Standings) -> None:
        """Keep what trials said about a kind of task."""
        ...

    async def recall(self) -> Mapping[str, Standings]:
        """Return what was kept, by kind of task."""
        ...


class Prober(Protocol):
    """Runs trials; `node.selection.adoption_trials` is the real one."""

    async def probe(self, need: TrialNeed) -> TrialResult:
        """Compare methods with the baseline, in turn, on one route. Raises JobError where that cannot be done."""
        ...


@dataclass(slots=True, eq=False)
class LearnedChoice:
    """A choice in the making; see `node.coordinator.method_choice.Choice`."""

    question: SelectionRequest
    opinion: Opinion
    order: Sequence[Method]
    kind: str
    in_use: str
    accepts: Callable[[frozenset[str]], frozenset[str]]
    explored: str | None = None
    accepted: frozenset[str] = frozenset()
    votes: Mapping[str, float] = field(default_factory=dict)
    """What the stages' votes come to, with our own for all methods."""

    def ballot(self, votes: Sequence[Mapping[str, float]], weights: Sequence[int] | None = None) -> Mapping[str, float]:
        """Return our scores of the methods that we accept; see Choice."""
        own = {method.name: self.opinion.table[method.name].log_cost for method in self.order}
        names = tuple(own)
        self.votes = scores(names, [[vote.get(name) for name in names] for vote in (*votes, own)], weights)
        offered = frozenset(self.votes)
        if self.explored in offered and self.explored is not None:
            self.accepted = frozenset({self.explored})
        else:
            self.explored = None
            self.accepted = self.accepts(offered)
        return {name: own[name] for name in self.accepted}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A choice that was made, and what came of it. Costs in seconds, for as many tokens as came."""

    job: JobId
    kind: str
    method: str
    basis: str
    explored: bool
    predicted_s: float
    actual_s: float
    regret_s: float


class LearnedChooser:
    """Implements Chooser, and is the memory of what was chosen."""

    def __init__(
        self,
        opinions: Predictions,
        rng: random.Random,
        *,
        share: float = DEFAULT_SHARE,
        allowance_s: float = ALLOWANCE_S,
        memory: Memory | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin without experience but what `memory` has.

        `share`: of the time that jobs take, what trying methods may cost; 0 for none.
        """
        self.opinions = opinions
        self.adoption = Adoption()
        self.budget = Budget(share, allowance_s if share > 0 else 0.0)
        self.decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._rng = rng
        self._memory = memory
        self._wall_clock = wall_clock
        self._levels: OrderedDict[tuple[object, ...], float] = OrderedDict()
        self._offered: set[str] = set()
        """Methods that some route has offered: a job is not tried on what cannot be had."""
        self._wanted: set[str] = set()
        self._needs_in, self._needs = trio.open_memory_channel[tuple[str, str, TrialNeed]](MAX_WAITING)

    async def choose(self, question: SelectionRequest) -> Choice:
        """Return the choice; see Chooser."""
        context, admitted = question.context, question.admitted
        opinion = await self.opinions.of(context, admitted)
        names = [method.name for method in admitted]
        default = _default(context, admitted)
        kind = kind_of(context)
        in_use = self.adoption.in_use(kind, names, default)

        def accepts(offered: frozenset[str]) -> frozenset[str]:
            return self.adoption.accepted(kind, names, offered, default) if question.is_free else offered

        choice = LearnedChoice(
            question=question,
            opinion=opinion,
            order=sorted(admitted, key=lambda method: (opinion.table[method.name].log_cost, method.name)),
            kind=kind,
            in_use=in_use,
            accepts=accepts,
        )
        if question.is_free and self.budget.may_explore:
            choice.explored = self._to_explore(choice, default)
        return choice

    def _to_explore(self, choice: LearnedChoice, default: str) -> str | None:
        """Return a method to try this job on, or None: now and then, and never one that is expected to be bad."""
        if self._rng.random() >= 2 * self.budget.share:
            return None
        table = choice.opinion.table
        offered = {name: of.log_cost for name, of in table.items() if name in self._offered or name == choice.in_use}
        for name in self._candidates(choice, default, offered):
            if table[name].log_cost - table[choice.in_use].log_cost < MAX_LOSS:
                return name
        return None

    def _candidates(self, choice: LearnedChoice, default: str, expected: Mapping[str, float]) -> list[str]:
        effects = _effects(choice.question.context, choice.question.admitted)
        names = [method.name for method in plainest_first(choice.question.admitted)]
        deviations = {name: of.deviation for name, of in choice.opinion.table.items()}
        now_s = trio.current_time()
        return self.adoption.candidates(choice.kind, names, default, expected, deviations, now_s, effects)

    def served(self, choice: Choice, outcome: JobOutcome) -> Selection | None:
        """Take note of what a job took, see what is worth a trial, and say how the choice looked; see Chooser."""
        if not isinstance(choice, LearnedChoice):
            raise TypeError("a choice of another chooser")
        self._offered.update(choice.votes)
        context = choice.question.context
        # A text may end early: what was predicted is told for as many tokens as came.
        shorter = replace(context, max_tokens=outcome.completion_tokens)
        expected = {
            method.name: choice.opinion.table[method.name].log_cost
            + predicted_cost(shorter, method)
            - predicted_cost(context, method)
            for method in choice.order
        }
        if outcome.method not in expected:  # it had to go on without its guesses, which nobody has predicted
            return None
        level = self._level(context)
        predicted_s = math.exp(expected[outcome.method] + level)
        best = min(expected.values())
        regret_s = max(0.0, predicted_s - math.exp(best + level))
        if choice.question.is_free and not outcome.replays:
            self._account(choice, outcome, expected, predicted_s, regret_s)
        return self._selection(choice, expected, level, outcome.method, regret_s)

    def describe(self, choice: LearnedChoice, method: str) -> Selection:
        """Return how a choice looks before a job is run."""
        expected = {name: of.log_cost for name, of in choice.opinion.table.items()}
        level = self._level(choice.question.context)
        regret_s = math.exp(expected[method] + level) - math.exp(min(expected.values()) + level)
        return self._selection(choice, expected, level, method, regret_s)

    def _selection(
        self, choice: LearnedChoice, expected: Mapping[str, float], level: float, method: str, regret_s: float
    ) -> Selection:
        plain = expected.get(BASELINE.name, predicted_cost(choice.question.context, BASELINE))
        predictions = {
            name: PredictedCost(
                cost_s=math.exp(cost + level),
                speedup=math.exp(plain - cost),
                deviation=choice.opinion.table[name].deviation,
            )
            for name, cost in sorted(expected.items(), key=lambda item: item[1])
        }
        return Selection(
            basis=choice.opinion.basis,
            experiences=choice.opinion.experiences,
            predictions=predictions,
            accepted=tuple(sorted(choice.accepted)),
            explored=choice.explored is not None,
            predicted_s=predictions[method].cost_s,
            predicted_speedup=predictions[method].speedup,
            regret_s=regret_s,
        )

    def _account(
        self,
        choice: LearnedChoice,
        outcome: JobOutcome,
        expected: Mapping[str, float],
        predicted_s: float,
        regret_s: float,
    ) -> None:
        budget = self.budget
        budget.jobs += 1
        budget.served_s += outcome.total_s
        if choice.explored is not None:
            budget.explored_jobs += 1
            budget.regret_s += max(0.0, predicted_s - math.exp(expected[choice.in_use] + self._level_of(choice)))
        self._learn_level(choice.question.context, math.log(outcome.total_s) - expected[outcome.method])
        self.decisions.append(
            Decision(
                job=outcome.job_id,
                kind=choice.kind,
                method=outcome.method,
                basis=choice.opinion.basis,
                explored=choice.explored is not None,
                predicted_s=predicted_s,
                actual_s=outcome.total_s,
                regret_s=regret_s,
            )
        )
        self._want_trial(choice)

    def _want_trial(self, choice: LearnedChoice) -> None:
        """Have methods tried that the swarm's votes, or our own hope, put before the one in use."""
        admitted = choice.question.admitted
        default = _default(choice.question.context, admitted)
        candidates = self._candidates(choice, default, choice.votes)
        if not candidates or self.budget.left_s <= 0 or choice.kind in self._wanted:
            return
        methods = [method for method in admitted if method.name in {choice.in_use, *candidates}]
        need = TrialNeed(model=choice.question.model, context=choice.question.context, methods=methods)
        try:
            self._needs_in.send_nowait((choice.kind, choice.in_use, need))
        except trio.WouldBlock:
            _logger.debug("too many trials wait", kind=choice.kind)
        else:
            self._wanted.add(choice.kind)

    async def run(self, prober: Prober, busy: Callable[[], bool]) -> None:
        """Hold the trials that are wanted, one at a time, until cancelled. `busy`: whether jobs are under way."""
        await self._recall()
        async for kind, in_use, need in self._needs:
            with trio.move_on_after(IDLE_LIMIT_S):
                quiet_s = 0.0
                while quiet_s < IDLE_S:
                    await trio.sleep(0.1)
                    quiet_s = 0.0 if busy() else quiet_s + 0.1
            if self.budget.left_s <= 0:  # spent by those that waited before it
                self._wanted.discard(kind)
                continue
            began_s = trio.current_time()
            try:
                result = await prober.probe(need)
            except JobError as error:
                _logger.info("no trial could be held", kind=kind, reason=error.message)
                continue
            finally:
                # What it took is spent, whatever came of it: else a trial that always fails would be held for ever.
                took_s = trio.current_time() - began_s
                self.budget.trial_s += took_s
                self._wanted.discard(kind)
            self.budget.trials += 1
            missed = {method.name for method in need.methods} - {*result.log_ratios, BASELINE.name}
            self.adoption.miss(kind, missed, trio.current_time())
            effects = _effects(need.context, need.methods)
            adopted = self.adoption.settle(kind, in_use, result.log_ratios, trio.current_time(), effects)
            await self._keep(kind)
            means = {name: round(statistics.fmean(of), 3) for name, of in result.log_ratios.items() if of}
            _logger.info(
                "trial held", kind=kind, before=in_use, now=adopted, log_ratios=means, seconds=round(took_s, 2)
            )

    async def _recall(self) -> None:
        """Go on with what trials said before this process began."""
        if self._memory is None:
            return
        began_at_s = self._wall_clock() - trio.current_time()
        try:
            kept = await self._memory.recall()
        except StorageError as error:
            _logger.warning("what trials said before is not known", reason=str(error))
            return
        for kind, standings in kept.items():
            known = {name: Standing(ratio, at_s - began_at_s) for name, (ratio, at_s) in standings.items()}
            self.adoption.recall(kind, known)

    async def _keep(self, kind: str) -> None:
        if self._memory is None:
            return
        began_at_s = self._wall_clock() - trio.current_time()
        found = {
            name: (each.log_ratio, int(began_at_s + each.tried_s))
            for name, each in self.adoption.standings(kind).items()
        }
        try:
            await self._memory.keep(kind, found)
        except StorageError as error:
            _logger.warning("what a trial said is not kept", reason=str(error))

    # What a machine's seconds are to the rule's

    def _level_of(self, choice: LearnedChoice) -> float:
        return self._level(choice.question.context)

    def _level(self, context: TaskContext) -> float:
        return self._levels.get(_place(context), 0.0)

    def _learn_level(self, context: TaskContext, seen: float) -> None:
        place = _place(context)
        known = self._levels.get(place)
        self._levels[place] = seen if known is None else known + LEVEL_SHARE * (seen - known)
        self._levels.move_to_end(place)
        while len(self._levels) > MAX_DECISIONS:
            self._levels.popitem(last=False)


class LearnedVoter:
    """Implements Voter: votes as this node's model predicts, or the rule while there is none."""

    def __init__(self, opinions: Predictions) -> None:
        self._opinions = opinions

    async def vote(self, context: TaskContext, methods: Sequence[Method]) -> Mapping[str, float]:
        """Return what methods are expected to cost; see Voter."""
        opinion = await self._opinions.of(context, methods)
        return {name: of.log_cost for name, of in opinion.table.items()}


def _default(context: TaskContext, admitted: Sequence[Method]) -> str:
    """Return what the rule chooses, of what any swarm can offer: few have a draft model."""
    return preference(context, [each for each in admitted if each.drafter != "draft"] or admitted)[0].name


def _effects(context: TaskContext, methods: Sequence[Method]) -> dict[str, Hashable]:
    """Return what the baseline and methods do to a task, by name."""
    return {method.name: effect_of(method, context) for method in (BASELINE, *methods)}


def _place(context: TaskContext) -> tuple[object, ...]:
    """Return what has a level of its own."""
    return context.architecture, context.hidden_size, context.block_count, context.hardware, context.stage_count
