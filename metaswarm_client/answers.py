"""Answers of jobs: texts, and how the swarm did the job. Durations are in seconds; docs/http-api.md has the fields."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metaswarm_client.decoding import decode
from metaswarm_client.errors import SwarmError, UnexpectedAnswerError, error_in_stream


@dataclass(frozen=True, slots=True)
class Stage:
    """One peer's part of a route: blocks `start` to `end`, exclusive. Costs are None where it stated none."""

    peer: str
    start: int
    end: int
    compute_s: float | None = None
    queue_s: float | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """The acceleration method in force: the session's switches, and the stages' policy."""

    name: str
    switches: Mapping[str, str]
    stage_policy: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Vote:
    """How a peer voted: natural log of the predicted seconds of each method, lower is better.

    `table_digest`: of the agreed table that it was learned from.
    """

    peer: str
    scores: Mapping[str, float]
    table_digest: str | None


@dataclass(frozen=True, slots=True)
class Consensus:
    """The votes, the method that they agreed on, and the agreed table behind it."""

    votes: tuple[Vote, ...]
    agreed: str
    weighed: bool
    epoch: int | None
    table_digest: str | None


@dataclass(frozen=True, slots=True)
class Timing:
    """Time to the first token, time per token after it, total."""

    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class PredictedCost:
    """A method's predicted cost and speed-up over the baseline; `deviation`: of the log of the speed-up."""

    cost_s: float
    speedup: float
    deviation: float


@dataclass(frozen=True, slots=True)
class Selection:
    """The asked node's own view of the choice of the method.

    `confidence`: that no method is clearly better than the one in use, None where the route does not offer that one;
    where it is too low, the `probes` get a trial.
    """

    basis: str
    experiences: int
    predictions: Mapping[str, PredictedCost]
    accepted: tuple[str, ...]
    explored: bool
    confidence: float | None
    probes: tuple[str, ...]
    predicted_s: float
    predicted_speedup: float
    regret_s: float
    predicted_cost: float | None


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of computing on each stage times the price of its peer.

    `predicted`: for all of `max_tokens`, when the job was admitted, as its budget was compared; None where nothing was.
    `actual`: None where a stage has not stated what it computed.
    """

    objective: str
    budget: float | None
    predicted: float | None
    actual: float | None


@dataclass(frozen=True, slots=True)
class Job:
    """How the swarm did a job. `replays`: stages that were lost and replaced, not those that were reached again.

    `trace`: where the time of each step went, as docs/http-api.md describes it, if it was asked for.
    """

    job_id: str
    route: tuple[Stage, ...]
    method: Method
    consensus: Consensus
    timing: Timing
    cost: Cost | None
    selection: Selection | None
    replays: int
    token_ids: tuple[int, ...]
    trace: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `cached_tokens`: of the prompt. `accepted_draft_tokens`: of the completion."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    accepted_draft_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, the natural log of its probability, and those of the likeliest tokens."""

    token: str
    logprob: float
    likeliest: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a scored text. `offset`: the character of the text at which it begins.

    `logprob`: the natural log of its probability behind the tokens before it; None for the first.
    """

    token: str
    offset: int
    logprob: float | None
    likeliest: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. `arguments`: JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> Any:
        """Return the arguments as Python values."""
        return json.loads(self.arguments)

    def result(self, content: str) -> dict[str, Any]:
        """Return the turn of a conversation that tells the model what the tool returned."""
        return {"role": "tool", "tool_call_id": self.id, "content": content}


@dataclass(frozen=True, slots=True)
class Delta:
    """What came next of a streamed answer. `reasoning`: text of a thinking model that is not part of the answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer. `str(answer)` is its text."""

    text: str
    model: str
    finish_reason: str
    usage: Usage
    job: Job
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    request_id: str | None = None

    def __str__(self) -> str:
        return self.text

    def parsed(self) -> Any:
        """Return a text that follows a JSON Schema as Python values. Raises ValueError where `max_tokens` cut it."""
        return json.loads(self.text)

    @property
    def message(self) -> dict[str, Any]:
        """The turn of the assistant, with which a conversation goes on."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        return {"role": "assistant", "content": self.text} | ({"tool_calls": calls} if calls else {})


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is, token by token."""

    tokens: tuple[ScoredToken, ...]
    usage: Usage
    job: Job

    @property
    def logprob(self) -> float:
        """The natural log of the probability of the whole text behind its first token."""
        return sum(each.logprob for each in self.tokens if each.logprob is not None)


@dataclass(slots=True)
class AnswerBuilder:
    """Puts an answer together from the lines of its stream. `is_left`: so is the block in which that can be read."""

    url: str
    request_id: str | None = None
    is_left: bool = False
    _deltas: list[Delta] = field(default_factory=list)
    _scored: list[ScoredToken] = field(default_factory=list)
    _model: str = ""
    _finish_reason: str = ""
    _usage: Usage | None = None
    _job: Job | None = None
    _is_whole: bool = False

    def take(self, line: str) -> Delta | None:
        """Return what a line adds, if anything. Raises ApiError where it tells of one."""
        data = line.removeprefix("data: ")
        if data == line:
            return None  # a keep-alive
        if data == "[DONE]":
            self._is_whole = True
            return None
        try:
            return self._take_chunk(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UnexpectedAnswerError(f"{self.url} does not look like a metaswarm API: {data:.80}") from None

    def _take_chunk(self, chunk: dict[str, Any]) -> Delta | None:
        if "error" in chunk:
            raise error_in_stream(chunk["error"], self.request_id)
        self._model = chunk["model"]
        if chunk.get("usage"):
            self._usage = _usage(chunk["usage"])
        if "metaswarm" in chunk:
            self._job = decode(Job, chunk["metaswarm"], "metaswarm")
        for choice in chunk["choices"]:
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            piece = choice.get("delta", choice)
            self._scored += _scored(choice.get("logprobs"))
            delta = Delta(
                text=piece.get("content") or piece.get("text") or "",
                reasoning=piece.get("reasoning_content") or "",
                tool_calls=tuple(_tool_call(call) for call in piece.get("tool_calls") or ()),
                logprobs=_logprobs(choice.get("logprobs")),
            )
            if delta != Delta():
                self._deltas.append(delta)
                return delta
        return None

    def check_end(self) -> None:
        """Raise UnexpectedAnswerError where the stream ends too early, SwarmError where its block was left."""
        if self._is_whole:
            return
        if self.is_left:
            raise SwarmError(f"the stream of {self.url} was left: iterate inside its `with` block")
        raise UnexpectedAnswerError(f"the answer of {self.url} ended before it was whole: try again")

    def answer(self) -> Answer:
        """Return the answer. Raises UnexpectedAnswerError if it is not whole."""
        usage, job = self._whole()
        return Answer(
            text="".join(delta.text for delta in self._deltas),
            model=self._model,
            finish_reason=self._finish_reason,
            usage=usage,
            job=job,
            reasoning="".join(delta.reasoning for delta in self._deltas),
            tool_calls=tuple(call for delta in self._deltas for call in delta.tool_calls),
            logprobs=tuple(each for delta in self._deltas for each in delta.logprobs),
            request_id=self.request_id,
        )

    def score(self) -> Score:
        """Return the tokens of a completion with `echo`. Raises UnexpectedAnswerError if it is not whole."""
        usage, job = self._whole()
        return Score(tuple(self._scored), usage, job)

    def _whole(self) -> tuple[Usage, Job]:
        if not self._is_whole or self._usage is None or self._job is None:
            raise UnexpectedAnswerError(f"the answer of {self.url} is not whole: read the stream to its end")
        return self._usage, self._job


def _usage(document: Mapping[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=document["prompt_tokens"],
        completion_tokens=document["completion_tokens"],
        cached_tokens=document["prompt_tokens_details"]["cached_tokens"],
        accepted_draft_tokens=document["completion_tokens_details"]["accepted_prediction_tokens"],
    )


def _tool_call(document: Mapping[str, Any]) -> ToolCall:
    return ToolCall(document["id"], document["function"]["name"], document["function"]["arguments"])


def _logprobs(document: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    """Return the tokens of either form of the OpenAI API, but the first of an echoed prompt, which has none."""
    if document is None:
        return ()
    if "content" in document:
        return tuple(
            TokenLogprob(
                token["token"], token["logprob"], {each["token"]: each["logprob"] for each in token["top_logprobs"]}
            )
            for token in document["content"]
        )
    return tuple(
        TokenLogprob(each.token, each.logprob, each.likeliest) for each in _scored(document) if each.logprob is not None
    )


def _scored(document: Mapping[str, Any] | None) -> list[ScoredToken]:
    """Return the tokens of a completion with their places."""
    if document is None or "content" in document:  # that of a chat
        return []
    columns = (document[name] for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"))
    return [
        ScoredToken(token, offset, logprob, likeliest or {})
        for token, offset, logprob, likeliest in zip(*columns, strict=True)
    ]
