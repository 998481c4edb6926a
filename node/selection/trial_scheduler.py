"""Runs adoption trials: short comparisons of candidate methods with the one in use, while no job is under way."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
import trio
from cachetools import TTLCache

from node.coordinator.submission import JobError
from node.coordinator.trial import Spending
from node.storage.adoption_store import AdoptionStore
from node.storage.database import StorageError
from protocol.identity import ModelId, Stage
from selector.adoption import MAX_BUCKETS, RETRY_S, Adoption, ExplorationAllowance, TrialRecord
from selector.task import Method, TaskContext, baseline_of
from selector.task_buckets import effective_switches

IDLE_S: Final = 0.3
"""Time without jobs after which a trial starts,"""

MAX_OVERDRAFT_S: Final = 30.0
"""A trial that takes this much longer than the allowance that is left is given up."""

IDLE_LIMIT_S: Final = 30.0
"""or after this long in any case: it finds the gaps between jobs, if there are any."""

FAILED_RETRY_S: Final = 1800.0
"""Time before another trial for a bucket whose last one failed, as on a node that is never idle."""

MAX_QUEUED: Final = 16
_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """Methods to compare on tasks like this one. `in_use`: the one of them that the others have to beat.

    `stages`: the route of the job that asked for it.
    """

    model: ModelId
    context: TaskContext
    methods: Sequence[Method]
    in_use: str
    stages: tuple[Stage, ...] = ()


class TrialRunner(Protocol):
    """Runs trials; `node.selection.adoption_trials` has the implementation."""

    async def run(self, request: TrialRequest, spending: Spending) -> Mapping[str, Sequence[float]]:
        """Return, for each available method and round, the logarithm of its cost over the baseline's.

        Raises JobError, also for a trial that takes longer than it may.
        """


class TrialScheduler:
    """Queue of requested trials. Their results go to `adoption`, and to a store that outlives the process."""

    def __init__(
        self,
        adoption: Adoption,
        allowance: ExplorationAllowance,
        *,
        store: AdoptionStore | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._adoption = adoption
        self._allowance = allowance
        self._store = store
        self._wall_clock = wall_clock
        self._pending: set[str] = set()
        self._failed: TTLCache[str, None] = TTLCache(MAX_BUCKETS, FAILED_RETRY_S, timer=trio.current_time)
        """Buckets whose last trial failed a short time ago."""
        self._needed_s: TTLCache[str, float] = TTLCache(MAX_BUCKETS, RETRY_S, timer=trio.current_time)
        """What the last trial of a bucket would have taken, where it was given up for that."""
        self._requests_in, self._requests = trio.open_memory_channel[tuple[str, TrialRequest]](MAX_QUEUED)

    def request(self, bucket: str, request: TrialRequest) -> None:
        """Queue a trial, unless the bucket has one pending or one that failed, or allowance or queue are exhausted.

        One that was given up as too long waits until the allowance covers it, or for long.
        """
        if self._allowance.left_s <= 0 or bucket in self._pending or bucket in self._failed:
            return
        if self._allowance.left_s + MAX_OVERDRAFT_S <= self._needed_s.get(bucket, 0.0):
            return
        try:
            self._requests_in.send_nowait((bucket, request))
        except trio.WouldBlock:
            _logger.debug("trial queue full", bucket=bucket)
        else:
            self._pending.add(bucket)

    async def run(self, runner: TrialRunner, busy: Callable[[], bool]) -> None:
        """Run the requested trials one at a time until cancelled. `busy`: whether jobs are under way."""
        await self._restore()
        async for bucket, request in self._requests:
            await _wait_until_idle(busy)
            if self._allowance.left_s > 0:  # else spent by trials before it
                await self._run_trial(runner, bucket, request)
            self._pending.discard(bucket)

    async def _run_trial(self, runner: TrialRunner, bucket: str, request: TrialRequest) -> None:
        in_use, spending = request.in_use, Spending(self._allowance.left_s + MAX_OVERDRAFT_S)
        names = {method.name for method in request.methods} - {in_use, baseline_of(in_use).name}
        try:
            log_ratios = await runner.run(request, spending)
        except JobError as error:
            _logger.info("trial failed", bucket=bucket, reason=error.message)
            self._failed[bucket] = None
            if spending.needed_s is not None:
                self._needed_s[bucket] = spending.needed_s
                self._adoption.record_unavailable(bucket, names, trio.current_time())
            return
        finally:
            # A failed trial is charged, too.
            self._allowance.trial_s += spending.spent_s
        self._allowance.trials += 1
        now_s = trio.current_time()
        missing = {method.name for method in request.methods} - {*log_ratios, baseline_of(in_use).name}
        self._adoption.record_unavailable(bucket, missing, now_s)
        effects = switches_in_effect(request.context, request.methods)
        adopted = self._adoption.record_trial(bucket, in_use, log_ratios, now_s, effects)
        await self._save(bucket)
        _logger.info(
            "trial finished",
            bucket=bucket,
            before=in_use,
            now=adopted,
            log_ratios={name: round(statistics.fmean(ratios), 3) for name, ratios in log_ratios.items() if ratios},
            seconds=round(spending.spent_s, 2),
        )

    def _start_of_clock(self) -> float:
        """Return the Unix time at which trio's clock was 0."""
        return self._wall_clock() - trio.current_time()

    async def _restore(self) -> None:
        """Restore the trial results of an earlier process."""
        if self._store is None:
            return
        try:
            stored = await self._store.load()
        except StorageError as error:
            _logger.warning("could not load trial results", reason=str(error))
            return
        start_s, now_s = self._start_of_clock(), trio.current_time()
        for bucket, trials in stored.items():
            # A clock that was ahead must not keep what lost from being tried again until it is that late.
            records = {name: TrialRecord(ratio, min(at_s - start_s, now_s)) for name, (ratio, at_s) in trials.items()}
            self._adoption.restore(bucket, records)

    async def _save(self, bucket: str) -> None:
        if self._store is None:
            return
        start_s = self._start_of_clock()
        trials = {
            name: (trial.log_ratio, int(start_s + trial.tried_s))
            for name, trial in self._adoption.trials(bucket).items()
        }
        try:
            await self._store.save(bucket, trials)
        except StorageError as error:
            _logger.warning("could not save trial results", bucket=bucket, reason=str(error))


async def _wait_until_idle(busy: Callable[[], bool]) -> None:
    with trio.move_on_after(IDLE_LIMIT_S):
        idle_s = 0.0
        while idle_s < IDLE_S:
            await trio.sleep(0.1)
            idle_s = 0.0 if busy() else idle_s + 0.1


def switches_in_effect(context: TaskContext, methods: Sequence[Method]) -> dict[str, Hashable]:
    """Return the effective switches of the methods and their baseline by name."""
    baselines = (method.baseline for method in methods)
    return {method.name: effective_switches(method, context) for method in (*baselines, *methods)}
