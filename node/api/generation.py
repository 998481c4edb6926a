"""What every protocol of the API is an adapter over: one kind of request, and one stream of events.

An adapter turns a body into a `Generation` and events into its own answer. It knows nothing of jobs, and this module
knows nothing of HTTP.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import trio

from node.api.channel_parser import ChannelParser
from node.api.output_parser import PLAIN_TEXT, OutputParser, Parsed, ParsedReasoning, ParsedText, ParserRules
from node.api.tool_calls import ToolCall
from node.coordinator.submission import (
    USUAL_TOKENS,
    JobError,
    JobErrorCode,
    JobEvent,
    JobRequest,
    JobResult,
    JobStarted,
    PromptScored,
    RequestOrigin,
    Submitter,
    TextDelta,
    TokenLogprob,
)
from protocol.messages import FinishReason

MAX_CHOICES: Final = 64
"""Choices of one answer: prompts times `n`."""

PARALLEL_CHOICES: Final = 8
"""Jobs of one request that run at a time."""

MAX_LOGPROBS_IN_ANSWER: Final = 1 << 18
"""Log probabilities that an answer may have that is not streamed: they are held until it is complete. Of prompts a
streamed one may not have more, either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a client asks for: a job for each choice of the answer, those of one prompt next to each other.

    `model`: the one that is looked up where there are no jobs. `rules`: what is told apart in the text. `details`:
    whether the answer tells how the swarm ran the jobs (the field `metaswarm`).
    """

    jobs: tuple[JobRequest, ...]
    model: str = ""
    choices_per_prompt: int = 1
    stream: bool = False
    details: bool = False
    rules: ParserRules = PLAIN_TEXT

    def logprob_count(self) -> int:
        """Return how many log probabilities its answer may have, those of prompts apart."""
        return sum(
            (USUAL_TOKENS if job.max_tokens is None else job.max_tokens) * (job.top_logprobs + 1)
            for job in self.jobs
            if job.top_logprobs is not None
        )

    def held_whole(self) -> "Generation":
        """Return the same for an answer that is not streamed: log probabilities without a limit are of a usual text."""
        jobs = (
            replace(job, max_tokens=USUAL_TOKENS) if job.max_tokens is None and job.top_logprobs is not None else job
            for job in self.jobs
        )
        return replace(self, jobs=tuple(jobs))

    def from_request(self, origin: RequestOrigin) -> "Generation":
        """Return the same, with the request that it comes from."""
        return replace(self, jobs=tuple(replace(job, origin=origin) for job in self.jobs))


@dataclass(frozen=True, slots=True)
class ChoiceStarted:
    """The job of a choice was accepted: its first event."""

    choice: int
    job: JobStarted


@dataclass(frozen=True, slots=True)
class ChoiceText:
    """More text of a choice, and how many tokens came with it; text may wait until it is certain."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens that it comes from, where they are wanted."""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChoiceReasoning:
    """More reasoning of a choice, and how many tokens it comes from."""

    choice: int
    text: str
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChoiceToolCall:
    """A tool call of a choice, complete. `number` counts the calls of the choice."""

    choice: int
    number: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """A choice is complete: its last event. `finish_reason` is one of the OpenAI API's."""

    choice: int
    result: JobResult
    finish_reason: str


GenerationEvent = ChoiceStarted | ChoiceText | ChoiceReasoning | ChoiceToolCall | ChoiceFinished


@dataclass(slots=True)
class Choice:
    """What has come of one choice."""

    index: int
    started: JobStarted
    text: str = ""
    reasoning: str = ""
    reasoning_tokens: int = 0
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    result: JobResult | None = None

    @property
    def done(self) -> JobResult:
        """The result of a complete choice."""
        if self.result is None:
            raise AssertionError("the choice is not complete")
        return self.result


@dataclass(slots=True)
class Outcome:
    """The choices of an answer, as far as they have come, by index."""

    choices: dict[int, Choice] = field(default_factory=dict)
    keeps_logprobs: bool = True
    """Whether log probabilities are collected for the whole answer: they can be a hundred times its text."""

    def take(self, event: GenerationEvent) -> Choice:
        """Add an event; return its choice."""
        match event:
            case ChoiceStarted(choice=index, job=job):
                self.choices[index] = Choice(index, job)
            case ChoiceText(choice=index, text=text, logprobs=logprobs):
                self.choices[index].text += text
                self.choices[index].logprobs += logprobs if self.keeps_logprobs else ()
            case ChoiceReasoning(choice=index, text=text, tokens=tokens):
                self.choices[index].reasoning += text
                self.choices[index].reasoning_tokens += tokens
            case ChoiceToolCall(choice=index, call=call):
                self.choices[index].tool_calls.append(call)
            case ChoiceFinished(choice=index, result=result, finish_reason=reason):
                self.choices[index].result, self.choices[index].finish_reason = result, reason
        return self.choices[event.choice]

    def ordered(self) -> list[Choice]:
        """Return the choices in the order of their indices."""
        return [choice for _, choice in sorted(self.choices.items())]


def count_logprobs(tokens: Iterable[TokenLogprob]) -> int:
    """Return how many log probabilities there are of some tokens."""
    return sum(1 + len(token.likeliest) for token in tokens)


def several(job: JobRequest, count: int) -> tuple[JobRequest, ...]:
    """Return the jobs of `count` choices of one prompt: a given seed makes a different one for each."""
    if job.seed is None:
        return (job,) * count
    return tuple(replace(job, seed=job.seed + number) for number in range(count))


@asynccontextmanager
async def run_generation(
    submitter: Submitter, generation: Generation
) -> AsyncIterator[AsyncGenerator[GenerationEvent, None]]:
    """Run the jobs inside the block, and give their events as they come. Leaving early cancels them on every stage.

    Raises JobError on entering the block or while iterating; the other jobs are cancelled then.
    """
    if not generation.jobs:
        await submitter.capabilities_of(generation.model)
    if len(generation.jobs) == 1:
        async with (
            submitter.submit(generation.jobs[0]) as events,
            aclosing(_choice_events(0, generation, events)) as ours,
        ):
            yield ours
        return
    error: JobError | None = None
    sender, receiver = trio.open_memory_channel[GenerationEvent | JobError](0)
    choices = _Choices(submitter, generation)
    async with trio.open_nursery() as nursery, receiver:
        async with sender:
            for index in range(len(generation.jobs)):
                nursery.start_soon(choices.run, index, sender.clone())
        try:
            async with aclosing(_merged(receiver)) as merged:
                yield merged
        except JobError as caught:
            error = caught  # raised outside the nursery, which would wrap it in a group
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


class _Choices:
    """Runs the choices of one answer beside each other, as many at a time as the peers have room for."""

    def __init__(self, submitter: Submitter, generation: Generation) -> None:
        self._submitter = submitter
        self._generation = generation
        self._limiter = trio.CapacityLimiter(PARALLEL_CHOICES)
        self._trying = 0
        """Jobs that run, or have not been refused yet."""
        self._ended = trio.lowlevel.ParkingLot()

    async def run(self, index: int, sender: "trio.MemorySendChannel[GenerationEvent | JobError]") -> None:
        """Run one choice; where the peers are full, once more when another one has ended."""
        async with sender, self._limiter:
            while (error := await self._try(index, sender)) is not None:
                if error.code is not JobErrorCode.FULL or not self._trying:
                    await sender.send(error)
                    return
                await self._ended.park()

    async def _try(self, index: int, sender: "trio.MemorySendChannel[GenerationEvent | JobError]") -> JobError | None:
        """Run a choice; return why it could not begin. An error after that is sent."""
        began = False
        self._trying += 1
        try:
            async with (
                self._submitter.submit(self._generation.jobs[index]) as events,
                aclosing(_choice_events(index, self._generation, events)) as ours,
            ):
                async for event in ours:
                    began = True
                    await sender.send(event)
        except JobError as error:
            if not began:
                return error
            await sender.send(error)
        finally:
            self._trying -= 1
            if began:
                self._ended.unpark_all()
        return None


async def _merged(
    receiver: "trio.MemoryReceiveChannel[GenerationEvent | JobError]",
) -> AsyncGenerator[GenerationEvent, None]:
    async for event in receiver:
        if isinstance(event, JobError):
            raise event
        yield event


async def _choice_events(
    index: int, generation: Generation, events: AsyncIterator[JobEvent]
) -> AsyncGenerator[GenerationEvent, None]:
    """Yield the events of one job as those of a choice."""
    reader = _ChoiceReader(index, generation)
    async for event in events:
        for each in reader.read(event):
            yield each


class _ChoiceReader:
    """Turns the events of one job into those of a choice."""

    def __init__(self, index: int, generation: Generation) -> None:
        self._index = index
        self._rules = generation.rules
        self._is_scored = generation.jobs[index].prompt_logprobs
        self._echo = ""
        self._parser: OutputParser | ChannelParser = OutputParser(self._rules, None)
        self._calls = 0

    def read(self, event: JobEvent) -> Iterator[GenerationEvent]:
        """Yield the events that one of the job makes."""
        match event:
            case JobStarted():
                has_channels = event.chat_format is not None and event.chat_format.channel is not None
                reads_channels = has_channels and self._rules.reasoning and not self._rules.forced
                self._parser = (ChannelParser if reads_channels else OutputParser)(self._rules, event.chat_format)
                yield ChoiceStarted(self._index, event)
                self._echo = event.echo
                if event.echo and not self._is_scored:
                    yield ChoiceText(self._index, event.echo)
            case PromptScored(logprobs=logprobs):
                yield ChoiceText(self._index, self._echo, logprobs)
                self._echo = ""
            case TextDelta(text=text, token_ids=token_ids, logprobs=logprobs):
                tokens = len(token_ids)
                for parsed in self._parser.feed(text):
                    if isinstance(parsed, ParsedText):
                        yield ChoiceText(self._index, parsed.text, logprobs, tokens)
                        logprobs, tokens = (), 0
                    elif isinstance(parsed, ParsedReasoning):
                        yield ChoiceReasoning(self._index, parsed.text, tokens)
                        tokens = 0
                    else:
                        yield self._event(parsed)
                if logprobs:
                    yield ChoiceText(self._index, "", logprobs, tokens)
            case JobResult():
                yield from map(self._event, self._parser.finish())
                reason = event.finish_reason.value
                if self._parser.has_calls and reason == FinishReason.STOP.value:
                    reason = "tool_calls"
                yield ChoiceFinished(self._index, event, reason)

    def _event(self, parsed: Parsed) -> GenerationEvent:
        match parsed:
            case ParsedText(text=text):
                return ChoiceText(self._index, text)
            case ParsedReasoning(text=text):
                return ChoiceReasoning(self._index, text)
            case ToolCall():
                self._calls += 1
                return ChoiceToolCall(self._index, self._calls - 1, parsed)
