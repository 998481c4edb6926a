"""A job: what was asked for, fixed once it was prepared, and the tokens that came so far."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from node.coordinator.chat import ChatFormat
from node.coordinator.observation import ServedJob
from node.coordinator.planner import ONLY_COMPUTING, RouteNeed
from node.coordinator.prefix_sharing import PrefixClaim
from node.coordinator.submission import USUAL_TOKENS, JobRequest, JobResult
from node.engine.interface import parts_of
from node.models.library import KnownModel
from protocol.identity import JobId
from protocol.measurements import Objective, TaskKind
from protocol.messages import Load, Sampling
from selector.cuts import Parts
from selector.routing import Demand
from selector.task import Method

UNSTATED_SHARE: Final = 4
"""A text that takes a share may take one part in so many of the KV memory that is free on its route."""


def share_of(free_positions: int) -> int:
    """Return the limit of a text that takes a share: a usual one in any case."""
    return max(USUAL_TOKENS, free_positions // UNSTATED_SHARE)


@dataclass(slots=True)
class JobOutput:
    """What has come of a job so far, and when."""

    scored: int = 0
    """Tokens of the prompt that are scored, of those from the second on, where that is wanted."""
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


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A prepared job. Only its limit changes.

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
    takes_share: bool = field(init=False)
    """Whether the text may take but a share of the memory: the user set no limit, or one that there was no room for."""
    _asked_tokens: int = field(init=False)
    """The limit that the user and the model set,"""
    _share_tokens: int = field(init=False)
    """that of a share of the memory that is free on the route,"""
    _held_tokens: int = field(init=False)
    """and that of what stages hold that refused more: of these the lowest counts."""

    def __post_init__(self) -> None:
        self.takes_share = self.request.max_tokens is None
        self._asked_tokens = self._share_tokens = self._held_tokens = self.sampling.max_tokens

    @property
    def request_id(self) -> str:
        """What the logs of all peers name the job by: the id of the API request, else its own."""
        return self.request.origin.request_id or self.id

    @property
    def tokens(self) -> list[int]:
        """The prompt and the output so far: what a new route is fed."""
        return [*self.prompt, *self.output.tokens]

    @property
    def kind(self) -> TaskKind:
        """What is wanted of the prompt."""
        return self.request.task_kind

    @property
    def tokens_left(self) -> int:
        """How many tokens of text may still come."""
        return 0 if self.kind is TaskKind.EMBED else self.sampling.max_tokens - len(self.output.tokens)

    @property
    def expected_tokens(self) -> int:
        """How many tokens of text predictions are about: of a text that takes a share, a usual number."""
        return min(self.tokens_left, USUAL_TOKENS) if self.takes_share else self.tokens_left

    def limit(self, max_tokens: int) -> None:
        """Lower the limit of the text. Memory for all of it is reserved, so that the route decides what is possible."""
        self._held_tokens = min(self._held_tokens, max_tokens)
        self._set_limit()

    def restore_limit(self) -> bool:
        """Undo what `limit` did to a text that takes a share; return whether it did anything.

        Another's limit is not lowered once the text has begun: what it was lowered to before must stay possible.
        """
        before = self.sampling.max_tokens
        if self.takes_share:
            self._held_tokens = self._asked_tokens
        self._set_limit()
        return self.sampling.max_tokens > before

    def limit_to_share(self, loads: Iterable[Load]) -> None:
        """Limit a text that takes a share to a quarter of the KV memory that is free on a route.

        So it may be long where there is memory, and others still find some. Another route's limit is its own. `loads`:
        of the stages, 0 where unknown.
        """
        if self.takes_share:
            self._share_tokens = share_of(min((load.free_positions for load in loads), default=0))
            self._set_limit()

    def _set_limit(self) -> None:
        most = min(self._asked_tokens, self._share_tokens, self._held_tokens)
        self.sampling = replace(self.sampling, max_tokens=most)

    @property
    def scores_left(self) -> int:
        """How many tokens of the prompt are still to be scored."""
        return len(self.prompt) - 1 - self.output.scored if self.kind is TaskKind.SCORE else 0

    @property
    def is_resumable(self) -> bool:
        """Whether a new route may go on where the last one was: not while what the last stage makes needs every row."""
        return self.kind is not TaskKind.EMBED and not self.scores_left

    def next_sampling(self) -> Sampling:
        """Return what the next route is asked to sample."""
        if self.kind is TaskKind.EMBED:
            return self.sampling
        is_scored = self.kind is TaskKind.SCORE and (self.scores_left > 0 or not self.tokens_left)
        return replace(self.sampling, max_tokens=self.tokens_left, prompt_logprobs=is_scored)

    def scoring_factor(self, blocks: int) -> float:
        """Return how much longer a last stage of so many blocks takes for rows that it scores.

        Each passes the output layer, too, which is as large as the embedding: that of many blocks in a small model.
        """
        return 1 + self.model.manifest.embed.size_bytes / max(1, self._block_bytes * blocks)

    @property
    def _block_bytes(self) -> int:
        return max((file.size_bytes for file in self.model.manifest.blocks), default=0)

    def need(self) -> RouteNeed:
        """Return what the rest of the job needs of a route."""
        demand = Demand(
            block_count=self.model.block_count,
            prompt_rows=len(self.prompt) + len(self.output.tokens),
            new_tokens=self.expected_tokens,
            row_bytes=4 * self.model.hidden_size,
            granularity=self.model.manifest.granularity,
        )
        return RouteNeed(
            model=self.model.id,
            demand=demand,
            block_bytes=self._block_bytes,
            parts=max((parts_of(method.engine) for method in self.admitted), default=Parts.ANY),
            objective=self.request.objective,
            compute_weight=0.0 if self.request.objective is Objective.LATENCY else ONLY_COMPUTING,
        )
