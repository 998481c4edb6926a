"""Answers in the form of the OpenAI API's chat completions and completions: whole, or in chunks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from node.api.errors import ApiError
from node.api.generation import (
    Choice,
    ChoiceFinished,
    ChoiceReasoning,
    ChoiceStarted,
    ChoiceText,
    ChoiceToolCall,
    Generation,
    GenerationEvent,
    Outcome,
)
from node.api.job_document import describe_job
from node.api.openai.logprobs import chat_logprobs, completion_logprobs
from node.api.tool_calls import ToolCall
from node.coordinator.submission import JobResult, JobStarted, TokenLogprob
from node.util.json_line import json_line

EVENT_STREAM: Final = "text/event-stream; charset=utf-8"


def describe_usage(outcome: Outcome, generation: Generation) -> dict[str, Any]:
    """Return the field `usage` of an answer. A prompt counts once, however many choices it has."""
    results = [choice.done for choice in outcome.ordered()]
    prompts = results[:: generation.choices_per_prompt]
    prompt_tokens = sum(result.usage.prompt_tokens for result in prompts)
    completion_tokens = sum(result.usage.completion_tokens for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(result.usage.cached_tokens for result in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(result.usage.accepted_draft_tokens for result in results),
            "reasoning_tokens": sum(choice.reasoning_tokens for choice in outcome.ordered()),
        },
    }


def describe_call(call: ToolCall) -> dict[str, Any]:
    """Return a tool call as the OpenAI API has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _message(choice: Choice) -> dict[str, Any]:
    """Return the message of a chat's choice; one that only calls tools has no content."""
    content = choice.text or (None if choice.tool_calls else "")
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [describe_call(call) for call in choice.tool_calls]
    return message


def server_sent(*documents: dict[str, Any] | str) -> bytes:
    """Return server-sent events without a type, as the OpenAI API has them."""
    lines = (each if isinstance(each, str) else json_line(each) for each in documents)
    return "".join(f"data: {line}\n\n" for line in lines).encode()


@dataclass(slots=True)
class CompletionWriter:
    """Writes the answer to a chat completion or completion; implements `AnswerWriter`.

    `include_usage`: whether the last chunk of a stream has the usage. `continuous_usage`: every chunk has it, so far.
    """

    generation: Generation
    is_chat: bool
    include_usage: bool = False
    continuous_usage: bool = False
    media_type: str = EVENT_STREAM
    _first: JobStarted | None = field(default=None, init=False)
    """The job that names the answer."""
    _offsets: dict[int, int] = field(default_factory=dict, init=False)
    """Characters of each choice's tokens so far."""
    _echoes: dict[int, str] = field(default_factory=dict, init=False)
    """The prompt of each choice whose text begins with it."""
    _prompt_tokens: dict[int, int] = field(default_factory=dict, init=False)
    """By prompt, of those whose choices have started."""
    _tokens: Counter[int] = field(default_factory=Counter, init=False)
    """Of each choice so far."""

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """Return the answer in one document."""
        choices = outcome.ordered()
        self._first = choices[0].started
        kind = "chat.completion" if self.is_chat else "text_completion"
        document = self._envelope(kind) | {
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": describe_usage(outcome, self.generation),
        }
        return document | (self._details(choices[0].done) if len(choices) == 1 else {})

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        document: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
        self._echoes[choice.index] = choice.started.echo
        document["logprobs"] = self._logprobs(choice.index, choice.logprobs)
        if self.is_chat:
            document["message"] = _message(choice)
        else:
            document["text"] = choice.text
        return document | (self._details(choice.done) if len(self.generation.jobs) > 1 else {})

    def chunks(self, event: GenerationEvent) -> bytes:
        """Return an event's chunk. The last one is left to `end` where there is one choice only."""
        self._count(event)
        match event:
            case ChoiceStarted(choice=index, job=job):
                self._first = self._first or job
                self._echoes[index] = job.echo
                return self._chunk(index, {"role": "assistant", "content": ""}) if self.is_chat else b""
            case ChoiceText(choice=index, text=text, logprobs=logprobs):
                return self._chunk(index, {"content": text} if self.is_chat else {"text": text}, logprobs=logprobs)
            case ChoiceReasoning(choice=index, text=text):
                return self._chunk(index, {"reasoning_content": text})
            case ChoiceToolCall(choice=index, number=number, call=call):
                return self._chunk(index, {"tool_calls": [{"index": number} | describe_call(call)]})
            case ChoiceFinished(choice=index, result=result, finish_reason=reason):
                details = self._details(result)
                choice, rest = ({}, details) if len(self.generation.jobs) == 1 else (details, {})
                return self._chunk(
                    index, {} if self.is_chat else {"text": ""}, reason, choice, {} if self.include_usage else rest
                )

    def end(self, outcome: Outcome) -> bytes:
        """Return the usage, if it is wanted, and the mark of the end."""
        if not self.include_usage:
            return server_sent("[DONE]")
        details = self._details(outcome.choices[0].done) if len(self.generation.jobs) == 1 else {}
        usage = describe_usage(outcome, self.generation)
        return server_sent(self._envelope(self._chunk_kind) | {"choices": [], "usage": usage} | details, "[DONE]")

    def failure(self, error: ApiError) -> bytes:
        """Return the error as the last event."""
        return server_sent(error.document())

    def keep_alive(self) -> bytes:
        """Return a comment."""
        return b": waiting\n\n"

    def _count(self, event: GenerationEvent) -> None:
        match event:
            case ChoiceStarted(choice=index, job=job):
                self._prompt_tokens[index // self.generation.choices_per_prompt] = job.prompt_tokens
            case ChoiceText(choice=index, tokens=tokens) | ChoiceReasoning(choice=index, tokens=tokens):
                self._tokens[index] += tokens
            case ChoiceFinished(choice=index, result=result):
                self._tokens[index] = result.usage.completion_tokens

    def _usage_so_far(self) -> dict[str, Any]:
        if not self.continuous_usage:
            return {}
        prompts, tokens = sum(self._prompt_tokens.values()), self._tokens.total()
        usage = {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens}
        return {"usage": usage}

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.generation.jobs[index].top_logprobs is None:
            return None
        if self.is_chat:
            return chat_logprobs(tokens)
        begins, echo = self._offsets.get(index, 0), self._echoes.get(index, "")
        described, self._offsets[index] = completion_logprobs(tokens, begins, echo)
        return described

    def _details(self, result: JobResult) -> dict[str, Any]:
        return {"metaswarm": describe_job(result)} if self.generation.details else {}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _envelope(self, kind: str) -> dict[str, Any]:
        if self._first is None:
            raise AssertionError("nothing is written before a job has started")
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self._first.job_id}",
            "object": kind,
            "created": self._first.created_s,
            "model": self._first.model_name or self._first.model,
        }

    def _chunk(
        self,
        index: int,
        piece: dict[str, Any],
        finish_reason: str | None = None,
        choice_details: dict[str, Any] | None = None,
        details: dict[str, Any] | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason}
        choice["logprobs"] = self._logprobs(index, logprobs) if logprobs else None
        choice |= {"delta": piece} if self.is_chat else piece
        choice |= choice_details or {}
        chunk = self._envelope(self._chunk_kind) | {"choices": [choice]} | self._usage_so_far()
        return server_sent(chunk | (details or {}))
