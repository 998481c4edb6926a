"""Paired trials: methods measured against the baseline on the same route, in turn, by real jobs.

Absolute times of different machines and hours cannot be compared, ratios can. So a trial runs rounds; in each round
every method and the baseline do the same workload once, in an order drawn anew, and what counts is the logarithm of a
method's cost over the baseline's within a round. `metaswarm bench`, probes before a method is adopted, and measurements
that the swarm assigns are trials that differ in their kind.
"""

import math
import random
import secrets
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import trio

from node.coordinator.coordinator import Coordinator
from node.coordinator.observation import ServedJob
from node.coordinator.prompt import prompt_tokens
from node.coordinator.recorder import Recorder
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, JobResult
from node.models.sample import sample_text
from protocol.measurements import Measurements, Objective, Observation, ObservationKind, QualityBound
from selector.task import BASELINE, Method

READY_TIMEOUT_S: Final = 900.0
"""How long a method may take to be ready, its quality measured and built on all stages, before it is not to be had."""

RETRY_S: Final = 1.0
"""Between two looks whether a method is ready, or the peers have room;"""

BACKGROUND_RETRY_S: Final = 10.0
"""and where nobody waits for what is measured, which makes way for jobs."""

MAX_SPOILT: Final = 3
"""Rounds that may be spoilt, by a route that changed or a stage that was lost, before the trial gives up."""

WARM_UP_TOKENS: Final = 2
PHRASE_TOKENS: Final = 24
"""Length of the phrase that a repetitive prompt repeats."""
NONCE_TOKENS: Final = 12
"""Tokens at the start of a prompt that no other run's begins with, so that no run finds another's pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialWorkload:
    """What one run of a trial consists of: jobs that are submitted together.

    `shared_prefix_share`: part of the prompt, 0 to 1, that all of them begin with. `repetitiveness`: part of the
    prompt, 0 to 1, that is one phrase again and again, which the answer then goes on with.
    """

    concurrency: int = 1
    prompt_tokens: int = 64
    max_tokens: int = 32
    shared_prefix_share: float = 0.0
    repetitiveness: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """What is measured. `model`: as a user calls it. `quality`: the bound under which lossy methods are admitted."""

    model: str
    methods: Sequence[Method]
    workload: TrialWorkload
    rounds: int = 3
    kind: ObservationKind = ObservationKind.BENCH
    quality: QualityBound = QualityBound.EXACT
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodTrial:
    """How a method fared. `runs`: one for each round. `error`: why it could not be had; there are no runs then."""

    method: Method
    runs: Sequence["Run"] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a trial found. `observations`: how many were added to the history."""

    baseline: MethodTrial
    methods: Sequence[MethodTrial]
    observations: int

    def log_ratios(self, tried: MethodTrial, objective: Objective) -> list[float]:
        """Return, for each round, the logarithm of a method's cost over the baseline's."""
        pairs = zip(tried.runs, self.baseline.runs, strict=bool(tried.runs))
        return [math.log(run.cost_s(objective) / plain.cost_s(objective)) for run, plain in pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One method doing the workload once, by jobs that were submitted together."""

    jobs: Sequence[ServedJob]

    @property
    def makespan_s(self) -> float:
        """From the beginning to the last token of all."""
        return max(job.result.timing.total_s for job in self.jobs)

    def cost_s(self, objective: Objective) -> float:
        """Return the jobs' mean time for latency, the time for all of them together for throughput."""
        if objective is Objective.THROUGHPUT:
            return self.makespan_s
        return statistics.fmean(job.result.timing.total_s for job in self.jobs)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second of all jobs together."""
        return sum(job.result.usage.completion_tokens for job in self.jobs) / self.makespan_s

    @property
    def ttft_s(self) -> float:
        """The mean time to the first token."""
        return statistics.fmean(job.result.timing.ttft_s for job in self.jobs)

    @property
    def tpot_s(self) -> float:
        """The mean time for each token after it."""
        return statistics.fmean(job.result.timing.tpot_s for job in self.jobs)

    @property
    def route(self) -> frozenset[tuple[str, int, int]]:
        """The stages that served, of all jobs."""
        stages = (stage for job in self.jobs for stage in job.result.route)
        return frozenset((stage.peer, stage.blocks.start, stage.blocks.end) for stage in stages)

    @property
    def spoilt(self) -> bool:
        """Whether a stage was lost meanwhile, or the jobs took several routes, which may differ in speed."""
        replayed = any(job.result.replays for job in self.jobs)
        return replayed or len({tuple(stage.peer for stage in job.result.route) for job in self.jobs}) > 1


@dataclass(frozen=True, slots=True)
class _Source:
    """What prompts are made of: the sample text's token ids, and the prefix where all runs have the same."""

    text: Sequence[int]
    common: Sequence[int] | None


class Trials:
    """Runs trials at a node by jobs of its coordinator. Those of several take turns run by run."""

    def __init__(self, coordinator: Coordinator, recorder: Recorder) -> None:
        self._coordinator = coordinator
        self._recorder = recorder
        self._turn = trio.Lock()

    async def run(self, spec: TrialSpec, keep: Callable[[Observation], Awaitable[bool]] | None = None) -> Trial:
        """Measure methods against the baseline and add what was seen to the history, or give it to `keep` instead.

        Takes rounds x (methods + 1) runs, and as many short ones before to build and warm what is needed. A method
        that cannot be had is told with the reason. Raises JobError where the baseline itself cannot be had, or where
        stages keep changing.
        """
        rng = random.Random(secrets.randbits(64) if spec.seed is None else spec.seed)
        model = await self._coordinator.model(spec.model)
        if spec.workload.prompt_tokens + spec.workload.max_tokens > model.max_positions:
            raise JobError(
                JobErrorCode.CONTEXT_LENGTH,
                f"{spec.workload.prompt_tokens} tokens of prompt and {spec.workload.max_tokens} new ones do not "
                f"fit into the {model.max_positions} of the model's context",
            )
        text = await prompt_tokens(JobRequest(model=spec.model, prompt=sample_text()), model)
        # One job at a time has its prefix in common with those before it; the warm-up computes it.
        alone = spec.workload.concurrency == 1
        source = _Source(text, _piece(text, shared_tokens(spec.workload), rng) if alone else None)
        methods = {method.name: method for method in (BASELINE, *spec.methods)}
        errors: dict[str, str] = {}
        for method in methods.values():
            try:
                await self._warm_up(spec, method, source, rng)
            except JobError as error:
                if method == BASELINE:
                    raise
                errors[method.name] = error.message
        able = [method for name, method in methods.items() if name not in errors]
        rounds = await self._rounds(spec, able, source, rng)
        observations = await self._record(spec, rounds, keep or self._recorder.publish)

        def tried(method: Method) -> MethodTrial:
            if method.name in errors:
                return MethodTrial(method=method, error=errors[method.name])
            return MethodTrial(method=method, runs=[runs[method.name] for runs in rounds])

        others = [tried(method) for method in methods.values() if method != BASELINE]
        return Trial(baseline=tried(BASELINE), methods=others, observations=observations)

    async def _rounds(
        self, spec: TrialSpec, methods: Sequence[Method], source: "_Source", rng: random.Random
    ) -> list[dict[str, Run]]:
        """Return for every round the run of each method, all of them over the same stages."""
        rounds: list[dict[str, Run]] = []
        spoilt = 0
        while len(rounds) < spec.rounds:
            runs: dict[str, Run] = {}
            for method in rng.sample(methods, len(methods)):
                runs[method.name] = await self._patient_run(spec, spec.workload, method, source, rng)
            routes = {run.route for run in (*runs.values(), *(rounds[0].values() if rounds else ()))}
            if len(routes) == 1 and not any(run.spoilt for run in runs.values()):
                rounds.append(runs)
                continue
            spoilt += 1
            if spoilt > MAX_SPOILT:
                raise JobError(JobErrorCode.FAILED, "the stages of the route keep changing, so nothing can be compared")
        return rounds

    async def _warm_up(self, spec: TrialSpec, method: Method, source: "_Source", rng: random.Random) -> None:
        """Wait until a method is ready on all stages, and let it do one short job."""
        workload = replace(spec.workload, concurrency=1, max_tokens=min(WARM_UP_TOKENS, spec.workload.max_tokens))
        await self._patient_run(spec, workload, method, source, rng)

    async def _patient_run(
        self, spec: TrialSpec, workload: TrialWorkload, method: Method, source: "_Source", rng: random.Random
    ) -> Run:
        """Run a method once it is ready and the peers have room: they build what they lack once they are asked."""
        deadline_s = trio.current_time() + READY_TIMEOUT_S
        pause_s = BACKGROUND_RETRY_S if spec.kind is ObservationKind.ASSIGNED else RETRY_S
        while True:
            try:
                return await self._run(spec, workload, method, source, rng)
            except JobError as error:
                if error.retry_after_s is None or trio.current_time() > deadline_s:
                    raise
                await trio.sleep(pause_s * rng.uniform(0.5, 2))

    async def _run(
        self, spec: TrialSpec, workload: TrialWorkload, method: Method, source: "_Source", rng: random.Random
    ) -> Run:
        """Let a method do a workload once, with prompts that were never there before."""
        done: list[ServedJob] = []
        errors: list[JobError] = []

        async def one(request: JobRequest) -> None:
            try:
                done.append(await self._job(request))
            except JobError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        requests = [
            JobRequest(
                model=spec.model,
                prompt_tokens=prompt,
                max_tokens=workload.max_tokens,
                ignore_eos=True,
                quality=spec.quality,
                method=method.name,
                background=spec.kind is ObservationKind.ASSIGNED,
            )
            for prompt in make_prompts(source.text, workload, rng, source.common)
        ]
        async with self._turn, trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(one, request)
        if errors:
            raise errors[0]
        return Run(jobs=done)

    async def _job(self, request: JobRequest) -> ServedJob:
        served: list[ServedJob] = []
        async with self._coordinator.submit(request, served.append) as events:
            async for event in events:
                if isinstance(event, JobResult):
                    return served[0]
        raise AssertionError("a job ends with its result")

    async def _record(
        self, spec: TrialSpec, rounds: Sequence[Mapping[str, Run]], keep: Callable[[Observation], Awaitable[bool]]
    ) -> int:
        """Keep an observation for each run and objective; return how many there were."""
        objectives = [Objective.LATENCY, *([Objective.THROUGHPUT] if spec.workload.concurrency > 1 else [])]
        count = 0
        for runs in rounds:
            for run in runs.values():
                for objective in objectives:
                    ratio = math.log(run.cost_s(objective) / runs[BASELINE.name].cost_s(objective))
                    count += await keep(self._observation(spec, run, objective, ratio))
        return count

    def _observation(self, spec: TrialSpec, run: Run, objective: Objective, log_ratio: float) -> Observation:
        """Return what a run has shown: times are the jobs' means, the stages' figures those of a typical job."""
        mean_s = run.cost_s(Objective.LATENCY)
        typical = min(run.jobs, key=lambda job: abs(job.result.timing.total_s - mean_s))
        served = self._recorder.observation(typical)
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


def shared_tokens(workload: TrialWorkload) -> int:
    """Return the length of the prefix that jobs have in common."""
    return round(workload.shared_prefix_share * workload.prompt_tokens)


def make_prompts(
    text: Sequence[int], workload: TrialWorkload, rng: random.Random, common: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Return the prompts of one run: pieces of real text, none of which any other run begins with.

    `text`: the sample text's token ids. `common`: the prefix, where it is that of other runs, too.
    """
    common = _piece(text, shared_tokens(workload), rng) if common is None else common
    own = workload.prompt_tokens - len(common)
    return [(*common, *_own_part(text, workload, own, rng)) for _ in range(workload.concurrency)]


def _own_part(text: Sequence[int], workload: TrialWorkload, count: int, rng: random.Random) -> list[int]:
    """Return what of a prompt is one job's alone; its end is a phrase again and again, where that is asked for."""
    repeated = min(count, round(workload.repetitiveness * workload.prompt_tokens))
    phrase = _anywhere(text, PHRASE_TOKENS, rng)
    again = (phrase * (repeated // PHRASE_TOKENS + 1))[:repeated]
    return [*_piece(text, count - repeated, rng), *again]


def _piece(text: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """Return so much text from anywhere, begun with a few tokens drawn at random."""
    nonce = [rng.choice(text) for _ in range(min(count, NONCE_TOKENS))]
    return [*nonce, *_anywhere(text, count - len(nonce), rng)]


def _anywhere(text: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """Return so much text from anywhere; after its end it begins again."""
    start = rng.randrange(len(text))
    return [text[(start + offset) % len(text)] for offset in range(count)]
