"""What a stage reports of a session while it runs, as its coordinator asks: how far it is, where its time goes."""

from dataclasses import dataclass
from typing import Annotated

from protocol.forms import Counter, Position, PositionCount, Seconds
from protocol.identity import SessionId
from protocol.limits import MAX_TIMED_STEPS
from protocol.schema import ARRAY, Count


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRequest:
    """The coordinator requests the progress of a session. Since version 1.1."""

    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The progress of a session on this stage, in answer to a ProgressRequest. Since version 1.1.

    The first positions not yet `received`, `computed`, and `sent` to the next stage, or, by a last stage, as tokens to
    the coordinator. A replay makes them smaller.
    """

    session: SessionId
    received: PositionCount
    computed: PositionCount
    sent: PositionCount


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingsRequest:
    """The coordinator requests the timing of a session's steps, which is recorded from the first request on.

    Since version 1.2.
    """

    session: SessionId


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Where the time of one step went for a session, in seconds.

    `position` and `rows`: of its slice. `received_s`: when the rows had arrived, by the stage's clock. `queue_s`: from
    then until their step began. `compute_s`: the forward pass of all rows of the step. `serialise_s`: the rest of the
    step, until its outputs were handed to the next stage's link: to the engine and back, and encoding them.
    """

    position: Position
    rows: PositionCount
    received_s: Seconds
    queue_s: Seconds
    compute_s: Seconds
    serialise_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """The session's steps since the last request, oldest first, in answer to a TimingsRequest. Since version 1.2.

    `clock_s`: the stage's clock, which starts anywhere. `dropped`: steps that were not retained until this request.
    """

    session: SessionId
    clock_s: Seconds
    steps: Annotated[tuple[Annotated[StepTiming, ARRAY], ...], Count(MAX_TIMED_STEPS)] = ()
    dropped: Counter = 0
