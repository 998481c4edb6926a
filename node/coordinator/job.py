"""A job under way: what was asked, the tokens so far, and the routes it has taken."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from node.coordinator.method_choice import Choice
from node.coordinator.planner import RouteNeed
from node.coordinator.prefix_sharing import Turn
from node.coordinator.recorder import ServedJob
from node.coordinator.route import OpenRoute, StageRefusal
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.coordinator.token_timeout import AdaptiveTimeout
from node.models.library import KnownModel
from protocol.identity import JobId, PeerId, SessionId, Stage
from protocol.messages import RefusalReason, Sampling
from selector.routing import Demand, NoRouteError
from selector.task import Method, TaskContext

RETRY_AFTER_S = 2.0
"""What a client is told to wait where blocks are not served or peers are full."""


@dataclass(slots=True)
class Job:
    """A job under way, and the routes it has taken."""

    id: JobId
    request: JobRequest
    model: KnownModel
    prompt: tuple[int, ...]
    sampling: Sampling
    admitted: list[Method]
    began_s: float
    on_served: Callable[[ServedJob], None] | None = None
    """Who is told instead of the recorder when the job is done."""
    prefix: bytes = b""
    turn: Turn = field(default_factory=lambda: Turn((), None))
    shared_prefix_share: float = 0.0
    context: TaskContext = field(default_factory=TaskContext)
    """As described for the first route that opened; and what was chosen from for it."""
    choice: Choice | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    """Of the context, what is taken as told and not as it is."""
    method: Method | None = None
    """What the votes came to; kept on every later route that can."""
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    replays: int = 0
    fruitless: int = 0
    """Routes that were lost since the last token."""
    rounds: int = 0
    """Rounds of the routes before this one."""
    avoided: dict[PeerId, StageRefusal] = field(default_factory=dict)
    unavailable: set[PeerId] = field(default_factory=set)
    """Peers of which the log says already that they could not take a stage."""
    disputed: set[PeerId] = field(default_factory=set)
    """Peers that said to have sent what never arrived at the next stage, which was replaced for it."""
    outdated: dict[PeerId, StageRefusal] = field(default_factory=dict)
    """Peers that may serve any stage but the last."""
    bound: set[PeerId] = field(default_factory=set)
    """Peers that would like to go, and were asked for."""
    stages: Sequence[Stage] = ()
    """Of the last route that was open, also of one that was lost."""
    route: OpenRoute | None = None
    former: list[OpenRoute] = field(default_factory=list)
    """Routes before this one, not closed yet: what their stages hold may be continued."""
    held: dict[Stage, SessionId] = field(default_factory=dict)
    """The newest session of the job at each stage that is thought to hold one."""
    accepted: bool = False
    """A route was open once."""
    patience: AdaptiveTimeout = field(default_factory=AdaptiveTimeout)
    searched_s: float = -math.inf
    """When others were last looked for who could take the place of a stage that lags."""

    def need(self) -> RouteNeed:
        """Return what is needed of a route for what is left of the job."""
        rows = len(self.prompt) + len(self.tokens)
        new_tokens = self.sampling.max_tokens - len(self.tokens)
        demand = Demand(
            block_count=self.model.block_count,
            prompt_rows=rows,
            new_tokens=new_tokens,
            row_bytes=4 * self.model.hidden_size,
        )
        return RouteNeed(
            model=self.model.id,
            demand=demand,
            block_bytes=max((file.size_bytes for file in self.model.manifest.blocks), default=0),
            not_last=frozenset(self.outdated),
        )

    def set_aside(self) -> None:
        """Take the route for a former one, whose stages are to be continued as far as they are there."""
        if self.route is None:
            return
        holding = self.route.held()
        for stage, answer in zip(self.route.stages, self.route.answers, strict=True):
            if stage in holding:
                self.held[stage] = holding[stage]
            elif answer is not None:
                self.held.pop(stage, None)
        self.rounds += self.route.rounds
        self.former.append(self.route)
        self.route = None

    async def close_former(self) -> None:
        """Close the routes before the one in force; what has been continued of them is over already."""
        former, self.former = self.former, []
        async with trio.open_nursery() as nursery:
            for route in former:
                nursery.start_soon(route.close)

    def no_route(self, error: NoRouteError) -> JobError:
        """Say why no route was found: blocks that nobody serves, or peers that would not or could not take it."""
        if self.outdated and not self.avoided:
            reasons = "; ".join(f"{r.peer} {r.message}" for r in self.outdated.values())
            message = (
                f"no peer that draws the tokens of {self.model.name} can apply what the job asks for ({reasons}): "
                "leave out top_k, min_p, penalties, logit_bias and min_tokens, or wait for a peer of a later version"
            )
            return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)
        if self.avoided:
            reasons = "; ".join(f"{r.peer}: {r.message}" for r in self.avoided.values())
            if any(rejection.reason is RefusalReason.FULL for rejection in self.avoided.values()):
                message = f"the peers that serve {self.model.name} have no room now ({reasons}); try again later"
                return JobError(JobErrorCode.FULL, message, retry_after_s=RETRY_AFTER_S)
            if any(rejection.reason is RefusalReason.NOT_READY for rejection in self.avoided.values()):
                names = " or ".join(method.name for method in self.admitted)
                message = f"{names} is not ready on the peers that serve {self.model.name} ({reasons}); try again later"
                return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)
            if all(rejection.reason is RefusalReason.UNABLE for rejection in self.avoided.values()):
                names = " or ".join(method.name for method in self.admitted)
                message = (
                    f"{names} cannot be had on the peers that serve {self.model.name} ({reasons}); ask for another"
                )
                return JobError(JobErrorCode.INVALID, message)
            missing = _ranges(error) or "some blocks"
            message = f"no peer is left to serve {missing} of {self.model.name} ({reasons})"
            return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)
        message = f"no peer serves {_ranges(error)} of {self.model.name}; a node started with --serve would"
        return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)


def _ranges(error: NoRouteError) -> str:
    if not error.missing:
        return ""
    return "blocks " + ", ".join(map(str, error.missing))
