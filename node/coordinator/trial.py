"""Trials: what is to be compared, what it may take, and what came of it."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from node.coordinator.observation import ServedJob
from node.coordinator.submission import JobError, JobErrorCode
from protocol.identity import Stage
from protocol.measurements import MIN_TOTAL_S, Objective, ObservationKind, QualityBound
from selector.task import Method
from selector.workloads import TrialWorkload


@dataclass(slots=True)
class Spending:
    """What a trial takes: `spent_s` are the seconds that its jobs take, without what they wait for others.

    `processor_s`: computing on all stages times `threads`, those of the widest stage so far. Of jobs that did not end,
    which report nothing, the time that they ran counts as computing. `limit_s`, `processor_limit_s`: the most of each.
    `needed_s`: of a trial that was given up for that, at least how many seconds it would have taken.
    """

    limit_s: float = math.inf
    processor_limit_s: float = math.inf
    spent_s: float = 0.0
    processor_s: float = 0.0
    threads: int = 1
    needed_s: float | None = None

    @property
    def left_s(self) -> float:
        """The seconds that jobs may still take."""
        return max(0.0, min(self.limit_s - self.spent_s, (self.processor_limit_s - self.processor_s) / self.threads))

    def exceeded(self, more_s: float = 0.0) -> JobError:
        """Return the error of a trial that has taken too long, or would with `more_s`, and record what it needs."""
        limit_s = min(self.limit_s, self.processor_limit_s / self.threads)
        self.needed_s = max(limit_s, self.spent_s + more_s)
        return JobError(JobErrorCode.FAILED, f"the trial would take longer than the {limit_s:.0f} s that it may")

    def charge(self, seconds: float, run: "Run", *, is_done: bool) -> None:
        """Add a run that took so many seconds; `run` has those of its jobs that ended, `is_done` says whether all."""
        facts = (each for job in run.jobs for each in job.context.stage_facts)
        self.threads = max(self.threads, *(each.busy_threads for each in facts), 1)
        is_stated = is_done and run.is_stated
        self.spent_s += min(seconds, run.compute_s) if is_stated else seconds
        self.processor_s += self.threads * (run.compute_s if is_stated else max(seconds, run.compute_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """A trial to run. `quality`: the bound under which lossy methods are admitted.

    `is_decided`: whether the rounds so far suffice; asked from `rounds` on. None: they do.

    `model`, `methods`: as a user names them; no methods: all that there are for the model. `objectives`: the costs that
    are recorded, each in an observation of its own. `stages`: the route, if it is given; else the best for the
    objective `route_for` at first, and then the same for all runs. Where a stage of it is lost, a probe goes on with
    the best that is left. `route_fault`: why a trial over the route that a job took would say nothing, if it would not.

    `on_jobs_known`: receives how many jobs are to run, before the first, and may raise to run none.
    """

    model: str
    methods: Sequence[str]
    workload: TrialWorkload
    rounds: int = 3
    is_decided: Callable[[Sequence[Mapping[str, "Run"]]], bool] | None = None
    spending: Spending = field(default_factory=Spending)
    objectives: Sequence[Objective] = (Objective.LATENCY,)
    kind: ObservationKind = ObservationKind.BENCH
    quality: QualityBound = QualityBound.EXACT
    seed: int | None = None
    stages: tuple[Stage, ...] = ()
    route_for: Objective = Objective.LATENCY
    route_fault: Callable[[ServedJob], str | None] = lambda job: None
    on_jobs_known: Callable[[int], None] = lambda jobs: None

    @property
    def is_background(self) -> bool:
        """Whether its jobs give way to others: nobody waits for the result."""
        return self.kind in {ObservationKind.ASSIGNED, ObservationKind.PROBE}


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodTrial:
    """The runs of a method, one for each round. `error`: why it was unavailable; then there are no runs."""

    method: Method
    runs: Sequence["Run"] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The result of a trial. `observations`: how many were added to the history."""

    baseline: MethodTrial
    methods: Sequence[MethodTrial]
    observations: int

    def log_ratios(self, tried: MethodTrial, objective: Objective) -> list[float]:
        """Return the logarithm of a method's cost over the baseline's, for each round."""
        pairs = zip(tried.runs, self.baseline.runs, strict=bool(tried.runs))
        return [math.log(run.cost_s(objective) / plain.cost_s(objective)) for run, plain in pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One method doing the workload once, in jobs that were submitted together."""

    jobs: Sequence[ServedJob]

    @property
    def makespan_s(self) -> float:
        """Seconds from the start to the last token of all jobs."""
        return max(job.result.timing.total_s for job in self.jobs)

    def cost_s(self, objective: Objective) -> float:
        """Return the jobs' mean time for latency, and for every other objective their computing."""
        if objective is Objective.LATENCY:
            return statistics.fmean(job.result.timing.total_s for job in self.jobs)
        return max(MIN_TOTAL_S, self.compute_s)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of all jobs together; tokens of the prompts where there is no output."""
        return sum(job.result.usage.counted_tokens for job in self.jobs) / self.makespan_s

    @property
    def ttft_s(self) -> float:
        """The mean time to the first token."""
        return statistics.fmean(job.result.timing.ttft_s for job in self.jobs)

    @property
    def tpot_s(self) -> float:
        """The mean time per output token after it."""
        return statistics.fmean(job.result.timing.tpot_s for job in self.jobs)

    @property
    def compute_s(self) -> float:
        """The computing of all jobs, on all stages."""
        return sum(stage.statistics.compute_s for job in self.jobs for stage in job.result.route)

    @property
    def is_stated(self) -> bool:
        """Whether every stage has stated what it computed for every job."""
        return all(job.result.is_stated for job in self.jobs)

    @property
    def route(self) -> frozenset[Stage]:
        """The stages that served any of the jobs."""
        stages = (stage for job in self.jobs for stage in job.result.route)
        return frozenset(Stage(stage.peer, stage.blocks) for stage in stages)

    @property
    def is_invalid(self) -> bool:
        """Whether a stage was lost or did not state its cost, or the jobs took routes that may differ in speed."""
        is_whole = self.is_stated and not any(job.result.is_replayed for job in self.jobs)
        return not is_whole or len({tuple(stage.peer for stage in job.result.route) for job in self.jobs}) > 1
