"""What a stage has done for a session, for the log, metrics and traces: how long rows waited, and were computed."""

from dataclasses import dataclass, field
from typing import Protocol

from protocol.identity import BlockRange, JobId, ModelId, PeerId
from protocol.messages import FailureReason


@dataclass(slots=True)
class PhaseTotals:
    """The slices of one phase of a session: those of its prompt, or those that draw tokens. Times are trio's clock.

    `queue_s`: that they waited for the engine. `compute_s`: their shares of the steps that they were in. `first_s`:
    when the first one arrived; `last_s`: when the last one was computed.
    """

    steps: int = 0
    rows: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0

    def add(self, rows: int, compute_s: float, queue_s: float, arrived_s: float, now_s: float) -> None:
        """Add a slice that was computed just now."""
        self.steps += 1
        self.rows += rows
        self.queue_s += queue_s
        self.compute_s += compute_s
        self.first_s = self.first_s or arrived_s
        self.last_s = now_s


@dataclass(slots=True)
class SessionPhases:
    """The two phases of a session on a stage."""

    prefill: PhaseTotals = field(default_factory=PhaseTotals)
    decode: PhaseTotals = field(default_factory=PhaseTotals)

    @property
    def has_rows(self) -> bool:
        """Whether any rows were computed."""
        return bool(self.prefill.rows or self.decode.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionReport:
    """A session that has begun here and has ended. Times are trio's clock.

    `job`: its id on the wire, which differs from the coordinator's job id. `outcome`: `closed` by its coordinator,
    `continued` by a session on another route, `disconnected` with its coordinator, or `failed` with the `error`.
    `is_background`: it measured a method. `cached_rows`: that were computed before, for another session or another
    route.
    """

    job: JobId
    request_id: str
    trace_parent: str
    coordinator: PeerId
    model: ModelId
    blocks: BlockRange
    method: str
    outcome: str
    error: FailureReason | None
    is_background: bool
    opened_s: float
    ended_s: float
    cached_rows: int
    phases: SessionPhases
    bytes_in: int
    bytes_out: int


class StageObserver(Protocol):
    """Watches the stages of a node. `node.telemetry` has the real one."""

    def on_step(self, model: ModelId, compute_s: float) -> None:
        """Take how long a step of an engine took."""

    def on_slice(self, model: ModelId, phase: str, queue_s: float, step_s: float) -> None:
        """Take how long rows waited for the engine, and how long the step with them took."""

    def on_session_ended(self, report: SessionReport) -> None:
        """Take the report of a session that has ended."""


class NoStageObserver:
    """Watches nothing. Implements `StageObserver`."""

    def on_step(self, model: ModelId, compute_s: float) -> None:
        """Do nothing."""

    def on_slice(self, model: ModelId, phase: str, queue_s: float, step_s: float) -> None:
        """Do nothing."""

    def on_session_ended(self, report: SessionReport) -> None:
        """Do nothing."""
