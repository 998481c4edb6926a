"""Why no route was found, for the user: blocks that no peer serves, or peers that could not take their stages."""

from collections.abc import Mapping
from types import MappingProxyType

from node.coordinator.job import Job
from node.coordinator.route import StageRefusal
from node.coordinator.submission import JobError, JobErrorCode
from protocol.identity import PeerId
from protocol.messages import RefusalReason
from selector.routing import NoRouteError

RETRY_AFTER_S = 2.0
"""When a client should retry a job whose blocks are not served or whose peers are full."""


_NO_REFUSALS: Mapping[PeerId, StageRefusal] = MappingProxyType({})


def no_route(
    job: Job,
    error: NoRouteError,
    avoided: Mapping[PeerId, StageRefusal] = _NO_REFUSALS,
    outdated: Mapping[PeerId, StageRefusal] = _NO_REFUSALS,
) -> JobError:
    """Return the error for a job without a route.

    `avoided`: why peers were not used. `outdated`: peers of older versions, which cannot be the last stage.
    """
    name, blocks = job.model.name, ", ".join(map(str, error.missing))
    if not avoided and outdated:
        message = (
            f"no peer that samples the tokens of {name} supports what the job asks for ({_reasons(outdated)}): "
            "leave out top_k, min_p, penalties, logit_bias and min_tokens, or wait for a peer of a later version"
        )
        return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)
    if not avoided:
        message = f"no peer serves blocks {blocks} of {name}: start a node with --serve"
        return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)
    methods = " or ".join(method.name for method in job.admitted)
    reasons = {refusal.reason for refusal in avoided.values()}
    code = JobErrorCode.UNCOVERED
    if RefusalReason.FULL in reasons:
        code = JobErrorCode.FULL
        message = f"the peers that serve {name} have no room now ({_reasons(avoided)}): try again later"
    elif RefusalReason.NOT_READY in reasons:
        message = f"{methods} is not ready on the peers that serve {name} ({_reasons(avoided)}): try again later"
    elif reasons == {RefusalReason.UNABLE}:
        message = f"{methods} is not available on the peers that serve {name} ({_reasons(avoided)}): use another method"
        return JobError(JobErrorCode.INVALID, message)
    else:
        missing = f"blocks {blocks}" if blocks else "some blocks"
        message = f"no peer is left to serve {missing} of {name} ({_reasons(avoided)}): try again later"
    return JobError(code, message, retry_after_s=RETRY_AFTER_S)


def _reasons(refusals: Mapping[PeerId, StageRefusal]) -> str:
    return "; ".join(f"{refusal.peer}: {refusal.message}" for refusal in refusals.values())
