"""A job: what was asked for, fixed once it was prepared, and the tokens that came so far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from node.coordinator.observation import ServedJob
from node.coordinator.planner import ONLY_COMPUTING, RouteNeed
from node.coordinator.prefix_sharing import PrefixClaim
from node.coordinator.submission import ChatFormat, JobRequest, JobResult
from node.engine.interface import parts_of
from node.models.library import KnownModel
from protocol.identity import JobId
from protocol.measurements import Objective
from protocol.messages import Sampling
from selector.cuts import Parts
from selector.routing import Demand
from selector.task import Method


@dataclass(slots=True)
class JobOutput:
    """What has come of a job so far, and when."""

    tokens: list[int] = field(default_factory=list)
    routed_s: float = 0.0
    """When its first route was open and had the prompt; 0 before."""
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    result: JobResult | None = None
    """Once it is done."""

    def add(self, token: int, now_s: float) -> None:
        """Append a token."""
        self.first_token_s = self.first_token_s or now_s
        self.last_token_s = now_s
        self.tokens.append(token)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A prepared job.

    `chat_format`: how the model writes, where the prompt is a conversation. `admitted`: the methods that it may be
    served with. `overrides`: context fields overridden by the caller.
    `on_served`: receives the served job in place of the recorder. `trace_parent`: the job's own span in a trace.
    """

    id: JobId
    request: JobRequest
    model: KnownModel
    prompt: tuple[int, ...]
    sampling: Sampling
    admitted: Sequence[Method]
    claim: PrefixClaim
    began_s: float
    chat_format: ChatFormat | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    on_served: Callable[[ServedJob], None] | None = None
    trace_parent: str = ""
    output: JobOutput = field(default_factory=JobOutput)

    @property
    def request_id(self) -> str:
        """What the logs of all peers name the job by: the id of the API request, else its own."""
        return self.request.origin.request_id or self.id

    @property
    def tokens(self) -> list[int]:
        """The prompt and the output so far: what a new route is fed."""
        return [*self.prompt, *self.output.tokens]

    @property
    def tokens_left(self) -> int:
        """How many tokens may still come."""
        return self.sampling.max_tokens - len(self.output.tokens)

    @property
    def is_embedding(self) -> bool:
        """Whether the prompt's embedding is wanted, and no text."""
        return self.sampling.pooling is not None

    def need(self) -> RouteNeed:
        """Return what the rest of the job needs of a route."""
        demand = Demand(
            block_count=self.model.block_count,
            prompt_rows=len(self.prompt) + len(self.output.tokens),
            new_tokens=self.tokens_left,
            row_bytes=4 * self.model.hidden_size,
            granularity=self.model.manifest.granularity,
        )
        return RouteNeed(
            model=self.model.id,
            demand=demand,
            block_bytes=max((file.size_bytes for file in self.model.manifest.blocks), default=0),
            parts=max((parts_of(method.engine) for method in self.admitted), default=Parts.ANY),
            objective=self.request.objective,
            compute_weight=0.0 if self.request.objective is Objective.LATENCY else ONLY_COMPUTING,
        )
