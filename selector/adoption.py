"""Adoption: a peer serves its own jobs only with methods that its own trials confirmed, against any prediction or vote.

A method that is new to a task bucket stays a candidate until a trial here compared it with the method in use. What
trials and exploration may cost is bounded by an allowance.
"""

import math
import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from cachetools import FIFOCache

from selector.confidence import MIN_CONFIDENCE, chance_better, confidence
from selector.heuristic import CostEstimate, CostTable
from selector.task import baseline_of

MARGIN: Final = 0.03
"""Natural logarithm of cost: smaller differences count as a tie."""

ROUNDS_WITH_LOOKS: Final[Mapping[int, float]] = MappingProxyType({3: 4.5, 5: 2.88, 8: 2.42})
"""Rounds after which a trial is looked at, and the standard errors by which a candidate must then be ahead to win.

A group-sequential t test with Pocock's bounds: a candidate that is no better is adopted in at most 5 % of its trials;
each candidate of a trial is tested by itself. One that is 10 % worse is in 1 %, with noise of 20 %, where the best of
three rounds would adopt it in 25 %.
"""

MAX_ROUNDS: Final = max(ROUNDS_WITH_LOOKS)

_BEYOND_TIE: Final = MARGIN + 1e-6

BELIEVED: Final = math.log(2)
"""Natural logarithm: so much better for a candidate than their times here may be what stages state of their computing,
and so much worse for the method in use.
"""

MAX_LOSS: Final = 0.7
"""Natural logarithm: no job explores a method that is expected to cost more than twice as much."""

RETRY_S: Final = 6 * 3600.0
"""Time before a method that lost a trial is tried again."""

UNAVAILABLE_RETRY_S: Final = 1800.0
"""Time before a method that was unavailable in a trial is tried again."""

MAX_CANDIDATES: Final = 2
"""Methods in one trial beside the baseline and the one in use."""

MAX_BUCKETS: Final = 512
"""Task buckets remembered; the longest untried are evicted."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """Result of a method's last trial: the natural logarithm of its cost over the baseline's, and when.

    `effect`: its effective switches for the task of that trial; None where unknown.
    """

    log_ratio: float
    tried_s: float
    effect: Hashable = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Methods worth a trial. `confidence`: in the method in use, against what was not tried here a short time ago.

    None where the method in use has no prediction, as the route does not offer it.
    """

    confidence: float | None
    names: tuple[str, ...] = ()


def is_better(differences: Sequence[float]) -> bool | None:
    """Return whether a candidate is better than the method in use; None while that takes more rounds to say.

    `differences`: of the natural logarithms of their costs, by round. A candidate that is not ahead by more than a
    standard error and the margin is given up.
    """
    count = len(differences)
    looks = [rounds for rounds in ROUNDS_WITH_LOOKS if rounds <= count]
    if not looks:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count)
    if mean + ROUNDS_WITH_LOOKS[looks[-1]] * error < 0:
        return mean < -MARGIN
    return False if mean - error > -MARGIN or count >= MAX_ROUNDS else None


def believed(stated: Sequence[float], measured: Sequence[float], *, is_used: bool) -> list[float]:
    """Return the ratios of computing that a trial believes, within a factor of two of what this node's clock says.

    `stated`, `measured`: by round, the logarithms of a method's computing over the baseline's, as the stages state it,
    and of its time. Of these the median counts, as a job beside it may slow a run down. A stage can make a method look
    good only by making a candidate cheap, or the one in use dear (`is_used`); the other way the time need not show what
    is true: speculation that computes more saves round trips.
    """
    bound = statistics.median(measured) + (BELIEVED if is_used else -BELIEVED)
    return [min(each, bound) if is_used else max(each, bound) for each in stated]


def is_decided(used: str, log_ratios: Mapping[str, Sequence[float]]) -> bool:
    """Return whether a trial needs no more rounds. `log_ratios`: as of `Adoption.record_trial`."""
    rounds = log_ratios.get(used) or [0.0] * max(map(len, log_ratios.values()), default=0)
    if len(rounds) not in ROUNDS_WITH_LOOKS:
        return len(rounds) >= MAX_ROUNDS
    candidates = [ratios for name, ratios in log_ratios.items() if name != used]
    return all(is_better(_differences(ratios, rounds)) is not None for ratios in candidates)


def _differences(ratios: Sequence[float], others: Sequence[float]) -> list[float]:
    return [own - other for own, other in zip(ratios, others, strict=True)]


class Adoption:
    """Trial results by task bucket, and the decisions that follow from them."""

    def __init__(self) -> None:
        self._trials: FIFOCache[str, dict[str, TrialRecord]] = FIFOCache(MAX_BUCKETS)
        self._unavailable: FIFOCache[str, dict[str, float]] = FIFOCache(MAX_BUCKETS)
        """When methods were last found to be unavailable."""

    def trials(self, bucket: str) -> Mapping[str, TrialRecord]:
        """Return the trial results of a bucket by method."""
        return self._trials.get(bucket, {})

    def in_use(self, bucket: str, admitted: Collection[str], default: str) -> str:
        """Return the best confirmed method among those admitted; the default before the first trial."""
        tried = {name: trial.log_ratio for name, trial in self.trials(bucket).items() if name in admitted}
        return min(tried, key=lambda name: (tried[name], name), default=default)

    def accepted(
        self, bucket: str, admitted: Collection[str], offered: Collection[str], default: str
    ) -> frozenset[str]:
        """Return the accepted methods among those that all stages offer; empty only if none is offered.

        Accepted are the method in use and what tied with it. Where none of these is offered: the best method that beat
        the baseline, else the baseline, else every admitted method.
        """
        tried = {name: trial.log_ratio for name, trial in self.trials(bucket).items() if name in admitted}
        used = self.in_use(bucket, admitted, default)
        tied = {name for name, ratio in tried.items() if ratio <= tried.get(used, -MARGIN) + MARGIN} | {used}
        better = {name for name, ratio in tried.items() if ratio < 0}
        best = sorted(better & set(offered), key=lambda name: (tried[name], name))[:1]
        for acceptable in (tied, best, {baseline_of(default).name}, admitted):
            if usable := frozenset(acceptable) & frozenset(offered):
                return usable
        return frozenset()

    def candidates(
        self,
        bucket: str,
        admitted: Collection[str],
        default: str,
        expected: CostTable,
        now_s: float,
        effects: Mapping[str, Hashable] | None = None,
    ) -> Candidates:
        """Return the methods worth a trial, the predicted best first.

        `admitted`: in order of simplicity. `expected`: predicted costs of the offered methods. `effects`: effective
        switches by method; of methods with equal ones only the simplest is tried. None: all differ.
        """
        used = self.in_use(bucket, admitted, default)
        if used not in expected:
            return Candidates(None)
        effect_of = {name: name for name in admitted} if effects is None else effects
        recent = {name: trial for name, trial in self.trials(bucket).items() if now_s - trial.tried_s < RETRY_S}
        missing = {
            name for name, at_s in self._unavailable.get(bucket, {}).items() if now_s - at_s < UNAVAILABLE_RETRY_S
        }
        plain = baseline_of(default).name
        known = {effect_of.get(used), effect_of.get(plain), *(trial.effect for trial in recent.values())}
        best: dict[Hashable, CostEstimate] = {}
        simplest: dict[Hashable, str] = {}
        for name in admitted:
            if name in {used, plain, *recent, *missing} or name not in expected or effect_of[name] in known:
                continue
            effect, estimate = effect_of[name], expected[name]
            best[effect] = min(estimate, best.get(effect, estimate), key=lambda each: each.log_cost)
            simplest.setdefault(effect, name)
        doubts = [effect for effect, each in best.items() if chance_better(expected[used], each) > 1 - MIN_CONFIDENCE]
        doubts.sort(key=lambda effect: (best[effect].log_cost, simplest[effect]))
        names = tuple(simplest[effect] for effect in doubts[:MAX_CANDIDATES])
        return Candidates(confidence(expected[used], best.values()), names)

    def restore(self, bucket: str, trials: Mapping[str, TrialRecord]) -> None:
        """Restore the results of an earlier process, unless there are newer ones."""
        self._trials.setdefault(bucket, dict(trials))

    def record_unavailable(self, bucket: str, names: Collection[str], now_s: float) -> None:
        """Record methods that were unavailable in a trial, so that the next job does not ask for them again."""
        if names:
            self._unavailable[bucket] = {**self._unavailable.get(bucket, {}), **dict.fromkeys(names, now_s)}

    def record_trial(
        self,
        bucket: str,
        used: str,
        log_ratios: Mapping[str, Sequence[float]],
        now_s: float,
        effects: Mapping[str, Hashable] | None = None,
    ) -> str:
        """Record a trial and return the method in use from now on, among those tried.

        `log_ratios`: of each method, by round, the logarithm of its cost over the baseline's. A candidate replaces the
        method in use only if `is_better`; otherwise it does not even tie with it, since a loser that few rounds seem to
        favour is no better confirmed than one never tried. Methods tried earlier keep their distance to the method in
        use, with which they were compared: the baseline's cost fluctuates from trial to trial and must not revive a
        method that lost. `effects`: effective switches by method.
        """
        effect_of = effects or {}
        trials = dict(self.trials(bucket))
        plain = baseline_of(used).name
        trials[plain] = TrialRecord(0.0, now_s, effect_of.get(plain))
        rounds = log_ratios.get(used, [0.0] * max(map(len, log_ratios.values()), default=0))
        base = statistics.median(rounds) if rounds else 0.0
        if used in trials:
            shift = base - trials[used].log_ratio
            for name in trials.keys() - log_ratios.keys() - {used, plain}:
                trials[name] = replace(trials[name], log_ratio=trials[name].log_ratio + shift)
        trials[used] = TrialRecord(base, now_s, effect_of.get(used))
        for name, ratios in log_ratios.items():
            if name == used or not ratios:
                continue
            differences = _differences(ratios, rounds)
            ratio = base + statistics.median(differences)
            ratio = min(ratio, base - MARGIN) if is_better(differences) else max(ratio, base + _BEYOND_TIE)
            trials[name] = TrialRecord(ratio, now_s, effect_of.get(name))
        self._trials[bucket] = trials
        return self.in_use(bucket, {*log_ratios, used, plain}, used)


@dataclass(slots=True)
class ExplorationAllowance:
    """Bound on what trying methods costs: a share of the served time plus an initial sum, in seconds.

    `trial_s`: spent on trials. `regret_s`: expected extra time of jobs that explored a method.
    """

    share: float
    initial_s: float
    served_s: float = 0.0
    trial_s: float = 0.0
    regret_s: float = 0.0
    jobs: int = 0
    explored_jobs: int = 0
    trials: int = 0

    @property
    def left_s(self) -> float:
        """Remaining seconds; negative once a trial overdrew them."""
        if self.share <= 0:
            return 0.0
        return self.initial_s + self.share * self.served_s - self.trial_s - self.regret_s

    @property
    def may_explore(self) -> bool:
        """Whether the next job may explore a method within the share of time and of jobs."""
        return self.left_s > 0 and self.explored_jobs + 1 <= self.share * (self.jobs + 1)
