"""Why a job gets no route: the refusals of stages, and the errors that its client gets."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from node.coordinator.job import Job, share_of
from node.coordinator.method_choice import OverBudget
from node.coordinator.submission import USUAL_TOKENS, JobError, JobErrorCode
from node.swarm.directory import UNREPORTED_LOAD
from protocol.identity import PeerId
from protocol.measurements import TaskKind
from protocol.messages import Load, RefusalReason
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
    where the job needs more; else 0. `load`: of its span, where that has no KV memory for the job now.
    """

    peer: PeerId
    reason: RefusalReason | None
    message: str
    lagged: bool = False
    outdated: bool = False
    most_positions: int = 0
    load: Load = UNREPORTED_LOAD

    @property
    def lacks_memory(self) -> bool:
        """Whether the peer has no memory for the job now: another limit, as of sessions, is reported without a load."""
        return self.reason is RefusalReason.FULL and not self.most_positions and self.load != UNREPORTED_LOAD


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
    """Have a text need less memory where stages had none for it; return whether to ask them again.

    It takes a share, or its limit becomes what those hold that are too small for it, or a share of what is free at full
    ones. A limit of the user's is lowered only before the text begins, where no peer may hold it once it is back. What
    is measured stays as long as it is.
    """
    before, begun = job.sampling.max_tokens, len(job.output.tokens)
    # Of some the limit was low enough before: they have refused nothing since.
    held = (each.most_positions - len(job.prompt) for each in refusals)
    most = max((tokens for tokens in held if begun < tokens < before), default=0)
    may_hold_it = [each for each in refusals if not each.most_positions and each.reason not in _NEVER]
    full = [each.load.free_positions for each in may_hold_it if each.lacks_memory]
    is_bound = not job.takes_share and (job.output.routed_s or len(full) < len(may_hold_it))
    if _is_measured(job) or is_bound:
        return False
    if not job.takes_share:
        job.takes_share = _should_take_share(job, full, most)
        if job.takes_share or full:
            return job.takes_share
    if most:
        job.limit(most)
    elif full:
        share = share_of(min(full))
        job.limit(begun + (share if share < job.tokens_left else USUAL_TOKENS))
    return job.tokens_left > 0 and job.sampling.max_tokens < before


def _should_take_share(job: Job, full: Collection[int], most: int) -> bool:
    """Return whether a text with a limit takes a share as one without: such limits are often the most a client knows.

    So it is where stages are full, or hold half of the limit at most; not of a short text, nor of one that asks for a
    certain length. `full`: what is free at stages that are full. `most`: tokens of text that too small ones hold.
    """
    is_certain = job.request.ignore_eos or job.request.min_tokens > 0
    is_far_off = bool(full) or 0 < 2 * most <= (job.request.max_tokens or 0)
    return is_far_off and job.sampling.max_tokens > USUAL_TOKENS and not is_certain


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
