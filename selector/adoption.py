"""Which methods a peer accepts for its own jobs: those that its own trials confirmed, whatever anybody says.

A prediction may err and votes may lie. So a method that is new to a kind of task is only a candidate until it was
tried here, in turn with the one in use; what that costs, and what trying methods on jobs costs, comes out of a budget.
"""

import statistics
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from selector.task import BASELINE

MARGIN: Final = 0.03
"""Natural logarithm: who is less than that better is not better."""

WORTH_A_TRIAL: Final = 0.1
"""What a method may be hoped to save, in natural logarithms of the cost, to be worth a trial."""

HOPE: Final = 0.5
"""Standard deviations that a method is hoped to be better than expected."""

MAX_LOSS: Final = 0.7
"""Natural logarithm: a job is never tried on a method that is expected to cost more than twice as much."""

RETRY_S: Final = 6 * 3600.0
"""A method that lost a trial is not tried again for so long."""

MISSED_RETRY_S: Final = 1800.0
"""A method that a trial could not have is not tried again for so long."""

CANDIDATES: Final = 2
"""Methods in one trial beside the baseline and the one in use."""

MAX_KINDS: Final = 512
"""Kinds of tasks that are remembered."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What trials said of a method: the logarithm of its cost over the baseline's, and when. Less is better.

    `effect`: what it did to the task that it was tried on; None where that is not known any more.
    """

    log_ratio: float
    tried_s: float
    effect: Hashable = None


class Adoption:
    """What trials have shown, by kind of task."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, dict[str, Standing]] = OrderedDict()
        self._missed: OrderedDict[str, dict[str, float]] = OrderedDict()
        """When methods were last found not to be had."""

    def standings(self, kind: str) -> Mapping[str, Standing]:
        """Return what trials said of methods; of none before the first."""
        return self._kinds.get(kind, {})

    def in_use(self, kind: str, admitted: Collection[str], default: str) -> str:
        """Return the best method that was confirmed, of those that a job admits; the default before any trial."""
        tried = {name: of.log_ratio for name, of in self.standings(kind).items() if name in admitted}
        return min(tried, key=lambda name: (tried[name], name), default=default)

    def accepted(self, kind: str, admitted: Collection[str], offered: Collection[str], default: str) -> frozenset[str]:
        """Return the methods that are accepted, of those that all stages offer: never none where any is offered.

        Those are the one in use and what trials found no worse. Where those are not on offer: what was found better
        than the baseline, else the baseline, else whatever there is.
        """
        tried = {name: of.log_ratio for name, of in self.standings(kind).items() if name in admitted}
        used = self.in_use(kind, admitted, default)
        alike = {name for name, ratio in tried.items() if ratio <= tried.get(used, -MARGIN) + MARGIN} | {used}
        better = {name for name, ratio in tried.items() if ratio < 0}
        best = sorted(better & set(offered), key=lambda name: (tried[name], name))[:1]
        for acceptable in (alike, best, {BASELINE.name}, admitted):
            if usable := frozenset(acceptable) & frozenset(offered):
                return usable
        return frozenset()

    def candidates(
        self,
        kind: str,
        admitted: Collection[str],
        default: str,
        expected: Mapping[str, float],
        deviations: Mapping[str, float],
        now_s: float,
        effects: Mapping[str, Hashable] | None = None,
    ) -> list[str]:
        """Return the methods that are worth a trial, the most promising first.

        `admitted`: those that a job admits, the plainest first. `expected`: natural logarithms of the cost, by name, of
        those on offer; `deviations`: how far they may be off; `effects`: what they do to such a task
        (`selector.task_buckets.effect_of`): of those that do the same the plainest is tried. Without, all are unlike.
        """
        used = self.in_use(kind, admitted, default)
        if used not in expected:
            return []  # there is nothing to compare with just now
        of = {name: name for name in admitted} if effects is None else effects
        recent = {name: each for name, each in self.standings(kind).items() if now_s - each.tried_s < RETRY_S}
        missed = {name for name, at_s in self._missed.get(kind, {}).items() if now_s - at_s < MISSED_RETRY_S}
        known = {of.get(used), of.get(BASELINE.name), *(each.effect for each in recent.values())}
        hopes: dict[Hashable, float] = {}
        plainest: dict[Hashable, str] = {}
        for name in admitted:
            if name in {used, BASELINE.name, *recent, *missed} or name not in expected or of[name] in known:
                continue
            hope = expected[used] - expected[name] + HOPE * deviations[name]
            if hope > WORTH_A_TRIAL:
                effect = of[name]
                hopes[effect] = max(hope, hopes.get(effect, hope))
                plainest.setdefault(effect, name)
        promising = sorted(hopes, key=lambda effect: (-hopes[effect], plainest[effect]))
        return [plainest[effect] for effect in promising[:CANDIDATES]]

    def recall(self, kind: str, standings: Mapping[str, Standing]) -> None:
        """Take note of what trials said before this process began, unless there have been some since."""
        self._kinds.setdefault(kind, dict(standings))
        while len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)

    def miss(self, kind: str, names: Collection[str], now_s: float) -> None:
        """Take note of methods that could not be had for a trial: else they were candidates again at the next job."""
        if names:
            self._missed[kind] = {**self._missed.get(kind, {}), **dict.fromkeys(names, now_s)}
            self._missed.move_to_end(kind)
            while len(self._missed) > MAX_KINDS:
                self._missed.popitem(last=False)

    def settle(
        self,
        kind: str,
        used: str,
        log_ratios: Mapping[str, Sequence[float]],
        now_s: float,
        effects: Mapping[str, Hashable] | None = None,
    ) -> str:
        """Take note of a trial and return the method that is in use from now on, of those tried.

        `log_ratios`: for each method, of each round the logarithm of its cost over the baseline's. A candidate takes
        the place of the one in use only if it was better in two rounds of three, and in the median by a margin. What
        was tried before keeps its distance to the one in use, with which it was compared: the baseline's cost goes up
        and down from trial to trial, and must not bring back what had lost. `effects`: what the methods do to the task
        that they were tried on.
        """
        of = effects or {}
        standings = dict(self.standings(kind))
        standings[BASELINE.name] = Standing(0.0, now_s, of.get(BASELINE.name))
        rounds = log_ratios.get(used, [0.0] * max(map(len, log_ratios.values()), default=0))
        base = statistics.median(rounds) if rounds else 0.0
        if used in standings:
            shift = base - standings[used].log_ratio
            for name in standings.keys() - log_ratios.keys() - {used, BASELINE.name}:
                standings[name] = replace(standings[name], log_ratio=standings[name].log_ratio + shift)
        standings[used] = Standing(base, now_s, of.get(used))
        for name, ratios in log_ratios.items():
            if name == used or not ratios:
                continue
            differences = [own - other for own, other in zip(ratios, rounds, strict=True)]
            won = sum(difference < 0 for difference in differences) * 3 >= 2 * len(differences)
            own_ratio = base + statistics.median(differences)
            beaten = won and own_ratio < base - MARGIN
            standings[name] = Standing(own_ratio if beaten else max(own_ratio, base + 1e-6), now_s, of.get(name))
        self._kinds[kind] = standings
        self._kinds.move_to_end(kind)
        while len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        return self.in_use(kind, {*log_ratios, used, BASELINE.name}, used)


@dataclass(slots=True)
class Budget:
    """What trying methods may cost: a share of the time that jobs take, and something to begin with. Seconds.

    `trial_s`: that trials took. `regret_s`: that jobs were expected to take longer because methods were tried on them.
    """

    share: float
    allowance_s: float
    served_s: float = field(default=0.0)
    trial_s: float = field(default=0.0)
    regret_s: float = field(default=0.0)
    jobs: int = field(default=0)
    explored_jobs: int = field(default=0)
    trials: int = field(default=0)

    @property
    def left_s(self) -> float:
        """What is left of it; a trial may overdraw it once."""
        if self.share <= 0:
            return 0.0
        return self.allowance_s + self.share * self.served_s - self.trial_s - self.regret_s

    @property
    def may_explore(self) -> bool:
        """Whether the next job may be tried on a method: so few were that it stays within the share of jobs."""
        return self.left_s > 0 and self.explored_jobs + 1 <= self.share * (self.jobs + 1)
