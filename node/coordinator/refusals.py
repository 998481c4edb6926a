"""Why a job gets no route: the refusals of stages, and the errors that its client gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from node.coordinator.job import Job
from node.coordinator.method_choice import OverBudget
from node.coordinator.submission import JobError, JobErrorCode
from protocol.identity import PeerId
from protocol.measurements import TaskKind
from protocol.messages import RefusalReason
from selector.routing import NoRouteError

RETRY_AFTER_S = 2.0
"""When a client should retry a job whose blocks are not served or whose peers are full."""

NAMED_PEERS = 3
"""Peers that an error names at most."""


@dataclass(frozen=True, slots=True)
class StageRefusal:
    """Why a peer could not take its stage. `reason` is None where the peer could not be reached at all.

    `lagged`: it can be reached, but made no progress. `outdated`: its version lacks a sampling option of the job, so
    that it may serve any stage but the last.
    """

    peer: PeerId
    reason: RefusalReason | None
    message: str
    lagged: bool = False
    outdated: bool = False


class RouteRejected(Exception):
    """Some stages did not open."""

    def __init__(self, refusals: Sequence[StageRefusal]) -> None:
        super().__init__("; ".join(f"{refusal.peer}: {refusal.message}" for refusal in refusals))
        self.refusals = tuple(refusals)


def no_route(
    job: Job, error: NoRouteError, avoided: Mapping[PeerId, StageRefusal], outdated: Mapping[PeerId, StageRefusal]
) -> JobError:
    """Return the error for a job without a route: no peer serves its blocks, or none could take its stages.

    `avoided`: why peers were not used. `outdated`: peers of older versions, which cannot be the last stage.
    """
    name, blocks = job.model.name, ", ".join(map(str, error.missing))
    reasons = "; ".join(f"{refusal.peer}: {refusal.message}" for refusal in (avoided or outdated).values())
    peers, methods = f"the peers that serve {name}", " or ".join(method.name for method in job.admitted)
    kinds = {refusal.reason for refusal in avoided.values()}
    code = JobErrorCode.UNCOVERED
    if not avoided and outdated:
        options = "top_k, min_p, penalties, logit_bias and min_tokens"
        leave_out = "" if job.kind is TaskKind.EMBED else f"leave out {options}, or "
        message = (
            f"no peer that serves the last blocks of {name} supports what the job asks for ({reasons}): "
            f"{leave_out}wait for a peer of a later version"
        )
    elif not avoided and error.apart:
        how = "one of each pair needs a forwarded port (--announce) or a relay; see `metaswarm doctor` there"
        message = f"{name}: {error}; {how}"
    elif not avoided and error.unreached:
        announced = ", ".join(error.unreached[:NAMED_PEERS])
        how = "one side needs a forwarded port (--announce) or a relay; see `metaswarm doctor` there"
        message = f"no peer that this node can reach serves blocks {blocks} of {name} (announced by {announced}): {how}"
    elif not avoided:
        lacking = f"no peer serves blocks {blocks} of {name}"
        unfit = f"the peers serve spans of {name} that do not meet, and {methods} runs them as a whole only"
        message = f"{lacking}: start a node with --serve" if blocks else f"{unfit}: use another method"
    elif RefusalReason.FULL in kinds:
        code = JobErrorCode.FULL
        message = f"{peers} have no room now ({reasons}): try again later"
    elif RefusalReason.NOT_READY in kinds:
        message = f"{methods} is not ready on {peers} ({reasons}): try again later"
    elif kinds == {RefusalReason.UNABLE}:
        message = f"{methods} is not available on {peers} ({reasons}): use another method"
        return JobError(JobErrorCode.INVALID, message)
    else:
        missing = f"blocks {blocks}" if blocks else "some blocks"
        message = f"no peer is left to serve {missing} of {name} ({reasons}): try again later"
    return JobError(code, message, retry_after_s=RETRY_AFTER_S)


def over_budget(job: Job, cheapest: OverBudget) -> JobError:
    """Return the error for a job that every route and method is predicted to cost too much for."""
    return JobError(
        JobErrorCode.OVER_BUDGET,
        f"the budget {job.request.budget:.4g} is below the predicted cost of this job with {job.model.name}: the "
        f"cheapest is {cheapest.cost:.4g}, with {cheapest.method.name}; allow more, or ask for fewer tokens",
        param="budget",
    )
