"""Paired trials: methods measured against the baseline on the same route, alternately, by real jobs.

Absolute times of different machines and hours cannot be compared, ratios can. So a trial runs rounds; in each round
every method and the baseline do the same workload once, in random order, and the result is the logarithm of a method's
cost over the baseline's within a round. `metaswarm bench`, trials before a method is adopted, and measurements that the
swarm assigns are trials that differ in their kind.
"""

import math
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import trio

from node.coordinator.coordinator import Coordinator
from node.coordinator.observation import Recorder, ServedJob, weight_type
from node.coordinator.prompt import prompt_tokens
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.coordinator.trial import MethodTrial, Run, Trial, TrialSpec
from node.coordinator.trial_prompts import make_prompts, piece, shared_tokens
from node.models.manifest import Manifest
from node.models.sample import sample_text
from node.stages.scheduler import BACKGROUND_SHARE
from node.util.backoff import backoff_s
from protocol.identity import Stage
from protocol.measurements import Measurements, Objective, Observation, ObservationKind, TaskKind
from protocol.tensors import Pooling
from selector.task import Method, MethodError, baseline_of, parse_method, portfolio
from selector.workloads import TrialWorkload

READY_TIMEOUT_S: Final = 900.0
"""How long a method may take to become ready (its quality measured, built on all stages) before it is unavailable."""

BUSY_TIMEOUT_S: Final = 120.0
"""How long a run of a background measurement is repeated where it is in the way of jobs, here or at other peers."""

LOST_TIMEOUT_S: Final = 30.0
"""How long a run is repeated while no peer serves some blocks; then the whole trial ends, to be asked for again."""

RETRY_S: Final = (1.0, 15.0)
"""First and longest pause before another attempt after a refusal: each asks all stages anew, which those that serve
others would feel, and is one more failed job."""

GIVE_WAY_S: Final = 0.05
"""Interval at which a background measurement looks whether it is in the way of a user's job."""

GAP_S: Final = 0.3
"""Time without a job of this node that counts as a gap: not the moment between two jobs of one client."""

MAX_WAIT_S: Final = 10.0
"""Maximum wait of each run of an adoption trial for a gap.

After that it goes on beside the jobs, at the share of the time that the stages' schedulers give it: a node whose jobs
leave no gap would otherwise never finish a trial.
"""

MAX_CUTS: Final = 2
"""How often a run that began in a gap ends for a job that comes; then it goes on beside the jobs, too."""

MAX_INVALID: Final = 3
"""Rounds that may be invalid, by a changed route or a stage that is lost or silent, before the trial gives up."""

WARM_UP_TOKENS: Final = 2


class BenchmarkRunner:
    """Runs trials with jobs of this node's coordinator. Concurrent trials alternate run by run."""

    def __init__(self, coordinator: Coordinator, recorder: Recorder) -> None:
        self._coordinator = coordinator
        self.recorder = recorder
        self._lock = trio.Lock()

    async def run(self, spec: TrialSpec, record: Callable[[Observation], Awaitable[bool]] | None = None) -> Trial:
        """Measure methods against the baseline and publish the observations, or pass them to `record` instead.

        Takes rounds x (methods + 1) runs, and as many short ones before to build and warm what is needed. An
        unavailable method is reported with the reason. Raises JobError where the baseline itself is unavailable, or
        where stages keep changing.
        """
        workload = spec.workload
        rng = random.Random(secrets.randbits(64) if spec.seed is None else spec.seed)
        model = await self._coordinator.model(spec.model)
        if workload.prompt_tokens + workload.max_tokens > model.max_positions:
            raise JobError(
                JobErrorCode.CONTEXT_LENGTH,
                f"{workload.prompt_tokens} tokens of prompt and {workload.max_tokens} new ones do not fit into the "
                f"{model.max_positions} of the model's context: use fewer",
            )
        methods = _methods_of(spec, model.manifest)
        spec.on_jobs_known(len(methods) * (spec.rounds * workload.concurrency + 1))  # each is warmed up by one
        text = await prompt_tokens(JobRequest(model=spec.model, prompt=sample_text()), model)
        # Jobs that run one at a time share their prefix with those before; the warm-up computes it.
        common = piece(text, shared_tokens(workload), rng) if workload.concurrency == 1 else None
        runs = _TrialRuns(self._coordinator, self._lock, spec, text, common, rng, spec.stages)
        errors = await runs.warm_up(methods.values())
        rounds = await runs.rounds([method for name, method in methods.items() if name not in errors])
        observations = await self._record(spec, rounds, record or self.recorder.publish)

        def tried(method: Method) -> MethodTrial:
            if method.name in errors:
                return MethodTrial(method=method, error=errors[method.name])
            return MethodTrial(method=method, runs=[runs[method.name] for runs in rounds])

        baseline, *others = map(tried, methods.values())
        return Trial(baseline=baseline, methods=others, observations=observations)

    async def _record(
        self, spec: TrialSpec, rounds: Sequence[Mapping[str, Run]], record: Callable[[Observation], Awaitable[bool]]
    ) -> int:
        """Record an observation for each run and objective; return how many there were."""
        count = 0
        for runs in rounds:
            [plain] = (run for name, run in runs.items() if name == baseline_of(name).name)
            for run in runs.values():
                for objective in spec.objectives:
                    ratio = math.log(run.cost_s(objective) / plain.cost_s(objective))
                    count += await record(self._observation(spec, run, objective, ratio))
        return count

    def _observation(self, spec: TrialSpec, run: Run, objective: Objective, log_ratio: float) -> Observation:
        """Return the observation of a run: its times are the jobs' means, the stages' statistics a typical job's."""
        mean_s = run.cost_s(Objective.LATENCY)
        typical = min(run.jobs, key=lambda job: abs(job.result.timing.total_s - mean_s))
        served = self.recorder.observation(typical)
        return replace(
            served,
            kind=spec.kind,
            workload=replace(
                served.workload,
                concurrency=max(spec.workload.concurrency, served.workload.concurrency),
                shared_prefix_share=spec.workload.shared_prefix_share,
                objective=objective,
            ),
            measurements=Measurements(
                ttft_s=run.ttft_s,
                tpot_s=run.tpot_s,
                total_s=mean_s,
                tokens_per_s=run.tokens_per_s,
                log_ratio_to_baseline=log_ratio,
            ),
        )


@dataclass(slots=True)
class _TrialRuns:
    """The runs of one trial. `text`: token ids that prompts are made of; `common`: the prefix of all runs, if any.

    `stages`: the route that all runs take; none where the best is to be found.
    """

    coordinator: Coordinator
    lock: trio.Lock
    spec: TrialSpec
    text: Sequence[int]
    common: Sequence[int] | None
    rng: random.Random
    stages: tuple[Stage, ...]

    async def warm_up(self, methods: Iterable[Method]) -> dict[str, str]:
        """Wait until each method is ready and run one short job; return why some are unavailable, by name."""
        workload = self.spec.workload
        short = replace(workload, concurrency=1, max_tokens=min(WARM_UP_TOKENS, workload.max_tokens))
        errors: dict[str, str] = {}
        for method in methods:
            try:
                await self._run_with_retry(short, method)
            except JobError as error:
                is_lost = error.code is JobErrorCode.UNCOVERED
                if method == method.baseline or is_lost or not self.spec.spending.left_s:
                    raise
                errors[method.name] = error.message
        return errors

    async def rounds(self, methods: Sequence[Method]) -> list[dict[str, Run]]:
        """Return the run of each method for every round, all of them over the same stages."""
        rounds: list[dict[str, Run]] = []
        invalid, is_decided, spending = 0, self.spec.is_decided, self.spec.spending
        while len(rounds) < self.spec.rounds or not (is_decided is None or is_decided(rounds)):
            runs: dict[str, Run] = {}
            before_s = spending.spent_s
            for method in self.rng.sample(methods, len(methods)):
                runs[method.name] = await self._run_with_retry(self.spec.workload, method)
            routes = {run.route for run in runs.values()}
            is_valid = len(routes) == 1 and not any(run.is_invalid for run in runs.values())
            if is_valid and (not rounds or routes <= {run.route for run in rounds[0].values()}):
                rounds.append(runs)
                missing = self.spec.rounds - len(rounds)
                more_s = missing * (spending.spent_s - before_s)
                if missing > 0 and more_s >= spending.left_s:
                    raise spending.exceeded(more_s)  # what cannot be finished is given up at once
                continue
            rounds, invalid = [runs] if is_valid else rounds, invalid + 1  # another route: the comparison begins anew
            if invalid > MAX_INVALID:
                message = f"stages changed or did not state their cost in {invalid} rounds: methods cannot be compared"
                raise JobError(JobErrorCode.FAILED, f"{message}: try again later")
        return rounds

    async def _run_with_retry(self, workload: TrialWorkload, method: Method) -> Run:
        """Run a method once it is ready and the peers have room: peers build a variant when it is asked for."""
        began_s, cuts, refusals = trio.current_time(), 0, 0
        lost_s: float | None = None  # since when no peer serves some blocks
        is_trial = self.spec.kind is ObservationKind.PROBE
        while True:
            until_s = trio.current_time() + MAX_WAIT_S if is_trial else began_s + BUSY_TIMEOUT_S
            gives_way = self.spec.is_background and cuts < MAX_CUTS and await self._finds_gap(until_s)
            if self.spec.is_background and not (gives_way or is_trial):
                raise JobError(JobErrorCode.FULL, "users' jobs leave no gap")
            try:
                return await self._run(workload, method, gives_way=gives_way)
            except _CutOff:
                cuts += 1
            except JobError as error:
                is_in_the_way = self.spec.is_background and error.code is JobErrorCode.FULL
                now_s = trio.current_time()
                lost_s = (lost_s or now_s) if error.code is JobErrorCode.UNCOVERED else None
                ends_s = began_s + (BUSY_TIMEOUT_S if is_in_the_way else READY_TIMEOUT_S)
                if error.retry_after_s is None or now_s > (ends_s if lost_s is None else lost_s + LOST_TIMEOUT_S):
                    raise
                if error.code is not JobErrorCode.FULL:
                    # A stage may be gone: the round is invalid then, and begun anew elsewhere.
                    self.stages = () if is_trial else self.spec.stages
                refusals += 1
                await trio.sleep(backoff_s(refusals, RETRY_S, self.rng))

    async def _finds_gap(self, until_s: float) -> bool:
        """Wait for a gap between this node's jobs, until a time; return whether there was one."""
        idle_s = 0.0
        while idle_s < GAP_S and trio.current_time() < until_s:
            await trio.sleep(GIVE_WAY_S)
            idle_s = 0.0 if self._is_in_the_way() else idle_s + GIVE_WAY_S
        return idle_s >= GAP_S

    def _is_in_the_way(self) -> bool:
        statistics = self.coordinator.statistics
        return statistics.running > statistics.trials_running

    def _request(self, workload: TrialWorkload, method: Method, prompt: tuple[int, ...]) -> JobRequest:
        return JobRequest(
            model=self.spec.model,
            prompt_tokens=prompt,
            max_tokens=workload.max_tokens,
            prompt_logprobs=workload.task_kind is TaskKind.SCORE,
            pooling=Pooling.MEAN if workload.task_kind is TaskKind.EMBED else None,
            ignore_eos=True,
            quality=self.spec.quality,
            method=method.name,
            objective=self.spec.route_for,
            background=self.spec.is_background,
            stages=self.stages,
        )

    async def _run(self, workload: TrialWorkload, method: Method, *, gives_way: bool) -> Run:
        """Have a method do a workload once, with new prompts. `gives_way`: to a job of this node, by _CutOff."""
        done: list[ServedJob] = []
        errors: list[JobError | _CutOff] = []
        spending, left_s, used_s, seen_s = self.spec.spending, self.spec.spending.left_s, 0.0, 0.0

        def count() -> None:
            """Count the time that the run used: beside jobs of this node it gets a share."""
            nonlocal used_s, seen_s
            now_s = trio.current_time()
            is_paced = self.spec.is_background and self._is_in_the_way()
            used_s += (now_s - seen_s) * (BACKGROUND_SHARE if is_paced else 1.0)
            seen_s = now_s

        async def watch() -> None:
            while used_s < left_s and not (gives_way and self._is_in_the_way()):
                await trio.sleep(GIVE_WAY_S)
                count()
            errors.append(_CutOff() if used_s < left_s else spending.exceeded())
            nursery.cancel_scope.cancel()

        async def run_job(prompt: tuple[int, ...]) -> None:
            try:
                async with self.coordinator.submit(self._request(workload, method, prompt), done.append) as events:
                    async for _ in events:
                        pass
            except JobError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        prompts = make_prompts(self.text, workload, self.rng, self.common)
        async with self.lock:
            seen_s = trio.current_time()
            try:
                async with trio.open_nursery() as watching:
                    if gives_way or math.isfinite(left_s):
                        watching.start_soon(watch)
                    async with trio.open_nursery() as nursery:
                        for prompt in prompts:
                            nursery.start_soon(run_job, prompt)
                    watching.cancel_scope.cancel()
            finally:
                count()
                spending.charge(used_s, Run(jobs=done), is_done=len(done) == len(prompts))
        if errors:
            raise errors[0]
        if fault := self.spec.route_fault(done[0]):
            raise JobError(JobErrorCode.FAILED, fault)
        self.stages = tuple(Stage(stage.peer, stage.blocks) for stage in done[0].result.route)
        return Run(jobs=done)


class _CutOff(Exception):
    """A run has ended for a job of this node."""


def _methods_of(spec: TrialSpec, manifest: Manifest) -> dict[str, Method]:
    """Return the methods to measure by name, the baseline first. Raises JobError for one that is not valid."""
    try:
        methods = [parse_method(name, manifest.format) for name in spec.methods]
    except MethodError as error:
        raise JobError(JobErrorCode.INVALID, str(error)) from None
    offered = methods or portfolio(manifest.format, weight_type(manifest), spec.workload.task_kind)
    return {method.name: method for method in (offered[0].baseline, *offered)}
