"""Measures the cells assigned to this node by real jobs, alternating method and baseline, while it is idle."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio

from node.consensus.measuring_allowance import MeasuringAllowance
from node.coordinator.observation import ServedJob
from node.coordinator.submission import JobError, JobErrorCode
from node.coordinator.trial import Spending, TrialSpec
from node.coordinator.trial_runner import BenchmarkRunner
from protocol.consensus_values import Cell
from protocol.errors import RemoteProtocolError
from protocol.identity import ModelId, PeerId, Stage
from protocol.measurements import Objective, Observation, ObservationKind, QualityBound
from protocol.observations import SignedObservation, verify_observation
from selector.consensus.sortition import MeasurementPlan
from selector.quality import MeasuredQuality, admits
from selector.task import PORTFOLIO, UNKNOWN_WEIGHT_TYPE, Method, portfolio
from selector.workloads import WORKLOADS, TrialWorkload

ROUNDS: Final = 2
"""Pairs of runs of one cell, of whose ratios the median is the reading. Seven peers measure the same cell."""

MAX_WITHHELD: Final = 256
"""Observations withheld that could not be published."""

IDLE_ROUND_S: Final = 0.5
"""Interval of the check whether the node is idle."""

_logger = structlog.get_logger(__name__)


def measurement_plan(package_format: str, weight_type: str = UNKNOWN_WEIGHT_TYPE) -> MeasurementPlan:
    """Return the cells that the swarm measures of a model: every method of its portfolio under every workload.

    Methods with a draft model are left out: their effect depends on that model and on the links to the peer that runs
    it.
    """
    measured = (
        each for each in portfolio(package_format, weight_type) if each != each.baseline and each.drafter != "draft"
    )
    return MeasurementPlan(tuple(sorted(WORKLOADS)), tuple(sorted(each.name for each in measured)))


class MeasurementRunner:
    """Measures by trials at this node, one cell at a time. Implements `node.consensus.environment.Meter`."""

    def __init__(
        self,
        trials: BenchmarkRunner,
        model: ModelId,
        is_busy: Callable[[], bool],
        rng: random.Random,
        *,
        allowance: MeasuringAllowance,
        quality: Callable[[Method], MeasuredQuality | None],
        own_peer: PeerId,
        own_route: Callable[[], tuple[Stage, ...]] = tuple,
    ) -> None:
        """`is_busy`: returns whether this node has other jobs, which are not disturbed.

        `quality`: of a lossy method, as far as it was measured here for users' jobs; others are not measured.
        `own_peer`: this node, whose hardware the cells name. `own_route`: over it alone, if it serves the whole model;
        else it is a part of the route, or there is no reading.
        """
        self._trials = trials
        self._model = model
        self._is_busy = is_busy
        self._rng = rng
        self._allowance = allowance
        self._quality = quality
        self._own_peer = own_peer
        self._own_route = own_route
        self._takes_s: dict[str, float] = {}
        """Processor seconds that a cell of each workload took, or twice what did not suffice for it."""
        self._unrevealed: list[SignedObservation] = []

    async def measure(self, cell: Cell) -> float | None:
        """Return the natural logarithm of the method's cost over the baseline's; None if it cannot be measured now."""
        workload = WORKLOADS.get(cell.workload)
        method = PORTFOLIO.get(cell.method)
        if workload is None or method is None:
            return None
        bound = QualityBound.EXACT if method.exact else QualityBound.ANY
        if not admits(bound, method, self._quality(method)):
            return None
        async with self._allowance.lock:  # which all models share, as they do the machine
            return await self._measure(cell, workload, bound)

    async def _measure(self, cell: Cell, workload: TrialWorkload, bound: QualityBound) -> float | None:
        if not self._allowance.is_left:
            return None
        limit_s = self._allowance.limit_s
        if limit_s < self._takes_s.get(cell.workload, 0.0):  # what cannot be finished is not begun
            return None
        objective = Objective(workload.objective)
        # Members begin at the same time, often on one route: who is first goes on undisturbed, the others wait.
        await trio.sleep(2 * IDLE_ROUND_S * self._rng.random())
        while self._is_busy():  # noqa: ASYNC110  # other peers' sessions end without notice
            await trio.sleep(IDLE_ROUND_S * self._rng.uniform(0.5, 2))
        spending, is_done = Spending(processor_limit_s=limit_s), False
        spec = TrialSpec(
            model=self._model,
            methods=[cell.method],
            workload=workload,
            rounds=ROUNDS,
            objectives=[objective],
            kind=ObservationKind.ASSIGNED,
            quality=bound,
            spending=spending,
            stages=self._own_route(),
            route_for=objective,
            route_fault=self._route_fault,
        )
        try:
            trial = await self._trials.run(spec, self._withhold)
            is_done = True
        except JobError as error:
            _logger.info("cell not measured", method=cell.method, workload=cell.workload, reason=error.message)
            if error.code is JobErrorCode.FAILED and spending.processor_s > limit_s / 2:
                self._takes_s[cell.workload] = 2 * limit_s
            return None
        finally:
            # Whatever comes of it: one that always fails would otherwise be repeated for ever.
            self._allowance.spend(spending.processor_s, is_done=is_done)
        self._takes_s[cell.workload] = spending.processor_s
        [tried] = trial.methods
        if tried.error is not None:
            _logger.info("cell not measured", method=cell.method, workload=cell.workload, reason=tried.error)
            return None
        return statistics.median(trial.log_ratios(tried, objective))

    def _route_fault(self, job: ServedJob) -> str | None:
        """Return why a reading over the route of a job would be of other machines than the cell's, if it would."""
        is_there = any(stage.peer == self._own_peer for stage in job.result.route)
        return None if is_there else "the best route does not contain this node, of whose hardware the cell is"

    async def revealed(self) -> None:
        """Publish the observations, which other peers could copy until the readings were revealed."""
        observations, self._unrevealed = self._unrevealed, []
        failed = [each for each in observations if not await self._trials.recorder.publish_signed(each)]
        self._unrevealed = [*failed, *self._unrevealed][-MAX_WITHHELD:]

    def withheld(self) -> list[bytes]:
        """Return the envelopes of the observations that are not published yet."""
        return [each.envelope for each in self._unrevealed]

    def restore(self, envelopes: Sequence[bytes]) -> None:
        """Withhold the observations of an earlier process."""
        try:
            self._unrevealed += map(verify_observation, envelopes)
        except RemoteProtocolError as error:
            _logger.warning("saved observations behind readings are damaged", reason=str(error))

    async def _withhold(self, observation: Observation) -> bool:
        await trio.lowlevel.checkpoint()
        signed = self._trials.recorder.sign(observation)
        if signed is not None:
            self._unrevealed.append(signed)
        return signed is not None
