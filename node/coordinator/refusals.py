"""Why a job gets no route: the refusals of stages, and the errors that its client gets."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from node.coordinator.job import Job
from node.coordinator.method_choice import OverBudget
from node.coordinator.submission import USUAL_TOKENS, JobError, JobErrorCode
from protocol.identity import PeerId
from protocol.measurements import TaskKind
from protocol.messages import RefusalReason
from selector.routing import NoRouteError

RETRY_AFTER_S = 2.0
"""When a client should retry a job whose blocks are not served or whose peers are full."""

NAMED = 3
"""Peers, and methods, that an error names at most."""


_NEVER: Final = frozenset({RefusalReason.UNABLE, RefusalReason.NOT_SERVED, RefusalReason.INVALID})
"""Reasons that no room at the peer takes away."""


@dataclass(frozen=True, slots=True)
class StageRefusal:
    """Why a peer could not take its stage. `reason` is None where the peer could not be reached at all.

    `lagged`: it can be reached, but made no progress. `outdated`: its version lacks a sampling option of the job, so
    that it may serve any stage but the last. `most_positions`: the KV positions that it gives a session at most,
    where the job needs more; else 0.
    """

    peer: PeerId
    reason: RefusalReason | None
    message: str
    lagged: bool = False
    outdated: bool = False
    most_positions: int = 0


class RouteRejected(Exception):
    """Some stages did not open."""

    def __init__(self, refusals: Sequence[StageRefusal]) -> None:
        super().__init__("; ".join(f"{refusal.peer}: {refusal.message}" for refusal in refusals))
        self.refusals = tuple(refusals)


def no_route(
    job: Job,
    error: NoRouteError | None,
    avoided: Mapping[PeerId, StageRefusal],
    outdated: Mapping[PeerId, StageRefusal],
) -> JobError:
    """Return the error for a job without a route: no peer serves its blocks, or none could take its stages.

    `error`: None where a route was found, and its stages refused or were lost. `avoided`: why peers were not used.
    `outdated`: peers of older versions, which cannot be the last stage.
    """
    name, blocks = job.model.name, ", ".join(map(str, error.missing)) if error else ""
    reasons = "; ".join(f"{refusal.peer}: {refusal.message}" for refusal in (avoided or outdated).values())
    affordable = "" if job.request.budget is None else f" within the budget {job.request.budget:.4g}"
    peers, methods = f"the peers that serve {name}{affordable}", _named(job)
    kinds = {refusal.reason for refusal in avoided.values()}
    unplanned = None if avoided else error
    code = JobErrorCode.UNCOVERED
    if not avoided and outdated:
        options = "top_k, min_p, penalties, logit_bias and min_tokens"
        leave_out = "" if job.kind is TaskKind.EMBED else f"leave out {options}, or "
        message = (
            f"no peer that serves the last blocks of {name} supports what the job asks for ({reasons}): "
            f"{leave_out}wait for a peer of a later version"
        )
    elif unplanned and unplanned.apart:
        how = "one of each pair needs a forwarded port (--announce) or a relay; see `metaswarm doctor` there"
        message = f"{name}: {unplanned}; {how}"
    elif unplanned and unplanned.unreached:
        announced = ", ".join(unplanned.unreached[:NAMED])
        how = "one side needs a forwarded port (--announce) or a relay; see `metaswarm doctor` there"
        message = f"no peer that this node can reach serves blocks {blocks} of {name} (announced by {announced}): {how}"
    elif unplanned:
        if not blocks:
            unfit = f"the peers serve spans of {name} that do not meet, and {methods} runs them as a whole only"
            return JobError(JobErrorCode.INVALID, f"{unfit}: use another method")
        message = f"no peer serves blocks {blocks} of {name}: start a node with --serve"
    elif (
        avoided
        and not job.output.tokens
        and all(0 < refusal.most_positions < _least_positions(job) for refusal in avoided.values())
    ):
        return _too_long(job, peers, max(refusal.most_positions for refusal in avoided.values()))
    elif RefusalReason.FULL in kinds:
        code = JobErrorCode.FULL
        message = f"{peers} have no room now ({reasons}): try again later"
    elif RefusalReason.NOT_READY in kinds:
        code = JobErrorCode.NOT_READY
        message = f"{methods} is not ready on {peers} ({reasons}): try again later"
    elif kinds == {RefusalReason.UNABLE}:
        message = f"{methods} is not available on {peers} ({reasons}): use another method"
        return JobError(JobErrorCode.INVALID, message)
    else:
        missing = f"blocks {blocks}" if blocks else "some blocks"
        message = f"no peer is left to serve {missing} of {name}{affordable} ({reasons}): try again later"
    return JobError(code, message, retry_after_s=RETRY_AFTER_S)


def _too_long(job: Job, peers: str, most: int) -> JobError:
    answer = f" and the answer {job.tokens_left}" if _is_measured(job) and job.tokens_left else ""
    message = (
        f"the prompt has {len(job.prompt)} tokens{answer}, and {peers} hold at most {most} in their KV memory, "
        "answer included: shorten the prompt, or serve the model with more --memory"
    )
    return JobError(JobErrorCode.CONTEXT_LENGTH, message)


def _named(job: Job) -> str:
    """Return the names of a few of the methods that a job admits."""
    named = " or ".join(method.name for method in job.admitted[:NAMED])
    return f"{named} or one of {left} others" if (left := len(job.admitted) - NAMED) > 0 else named


def shorten(job: Job, refusals: Collection[StageRefusal]) -> bool:
    """Lower the limit of a text for which stages had no KV memory; return whether they may have enough now.

    It becomes what those can hold that are too small for it, or a usual one where they are full. A limit of the user's
    is lowered only before the text begins, where no peer may hold it once it is back. If stages are full, or hold half
    of it at most, the text takes a share, as one without a limit does: such limits are often the most a client knows.
    One that asks for a certain length takes none, and waits for full peers. What is measured stays as long as it is.
    """
    is_stated, before = job.request.max_tokens is not None, job.sampling.max_tokens
    is_full = any(each.reason is RefusalReason.FULL for each in refusals)
    may_hold_it = {each.reason for each in refusals if not each.most_positions} - _NEVER
    is_away = bool(may_hold_it - {RefusalReason.FULL})
    if _is_measured(job) or (is_stated and (job.output.routed_s or is_away)):
        return False
    # Of some the limit was low enough before: they have refused nothing since.
    held = (each.most_positions - len(job.prompt) for each in refusals)
    most = max((tokens for tokens in held if len(job.output.tokens) < tokens < before), default=0)
    is_far_off = bool(may_hold_it) or 0 < 2 * most <= (job.request.max_tokens or before)
    if not job.takes_share and is_full and is_far_off and _may_take_share(job):
        job.takes_share = True
        return True
    if not job.takes_share and may_hold_it:
        return False
    if most:
        job.limit(most)
    elif job.takes_share and RefusalReason.FULL in may_hold_it:
        job.limit(len(job.output.tokens) + USUAL_TOKENS)
    return job.tokens_left > 0 and job.sampling.max_tokens < before


def _may_take_share(job: Job) -> bool:
    """Return whether a text may end before the user's limit: a short one may not, nor one of a certain length."""
    is_certain = job.request.ignore_eos or job.request.min_tokens > 0
    return job.sampling.max_tokens > USUAL_TOKENS and not is_certain


def _least_positions(job: Job) -> int:
    """Return the KV positions without which the job cannot go on: of its tokens and one more, if it is to have text.

    What is measured needs those of all its text.
    """
    return len(job.tokens) + (job.tokens_left if _is_measured(job) else min(1, job.tokens_left))


def _is_measured(job: Job) -> bool:
    return job.request.background or job.on_served is not None


def over_budget(job: Job, cheapest: OverBudget) -> JobError:
    """Return the error for a job that every route and method is predicted to cost too much for."""
    return JobError(
        JobErrorCode.OVER_BUDGET,
        f"the budget {job.request.budget:.4g} is below the predicted cost of this job with {job.model.name}: the "
        f"cheapest is {cheapest.cost:.4g}, with {cheapest.method.name}; allow more, or ask for fewer tokens",
        param="budget",
    )
