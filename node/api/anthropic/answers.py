"""Answers of the Anthropic API's `/v1/messages`: one message, or the events of its stream."""

from dataclasses import dataclass, field
from typing import Any

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
from node.api.openai.answers import EVENT_STREAM
from node.api.tool_calls import ToolCall
from node.coordinator.submission import JobResult, JobStarted
from node.util.json_line import json_line


@dataclass(slots=True)
class MessageWriter:
    """Writes one message; implements `AnswerWriter`. In a stream, one content block is open at a time.

    `thinks`: whether reasoning was asked for; clients that did not ask know no block of it.
    """

    generation: Generation
    thinks: bool = False
    media_type: str = EVENT_STREAM
    _open: str = field(default="", init=False)
    """Type of the open block."""
    _blocks: int = field(default=0, init=False)
    """Blocks that were opened."""

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """Return the answer in one document."""
        choice = outcome.choices[0]
        content: list[dict[str, Any]] = []
        if choice.reasoning and self.thinks:
            content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
        if choice.text:
            content.append({"type": "text", "text": choice.text})
        content += [_tool_use(call) | {"input": call.argument_object} for call in choice.tool_calls]
        message = _message(choice.started) | {"content": content} | _stop(choice)
        message["usage"] = _usage(choice.done)
        return message | ({"metaswarm": describe_job(choice.done)} if self.generation.details else {})

    def chunks(self, event: GenerationEvent) -> bytes:
        """Return the events that an event makes."""
        match event:
            case ChoiceStarted(job=job):
                return _event("message_start", message=_message(job))
            case ChoiceText(text=text) if text:
                return self._delta("text", {"type": "text", "text": ""}, {"type": "text_delta", "text": text})
            case ChoiceReasoning(text=text) if self.thinks:
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                return self._delta("thinking", empty, {"type": "thinking_delta", "thinking": text})
            case ChoiceToolCall(call=call):
                delta = {"type": "input_json_delta", "partial_json": call.arguments}
                return self._close() + self._delta("tool_use", _tool_use(call) | {"input": {}}, delta) + self._close()
            case ChoiceFinished():
                return self._close()
            case _:
                return b""

    def _delta(self, kind: str, empty: dict[str, Any], delta: dict[str, Any]) -> bytes:
        """Return a piece of a block, which is opened if another one is."""
        events = b""
        if self._open != kind:
            events = self._close() + _event("content_block_start", index=self._blocks, content_block=empty)
            self._open = kind
            self._blocks += 1
        return events + _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open = ""
        return _event("content_block_stop", index=self._blocks - 1)

    def end(self, outcome: Outcome) -> bytes:
        """Return the reason of the end, and the usage."""
        choice = outcome.choices[0]
        details = {"metaswarm": describe_job(choice.done)} if self.generation.details else {}
        delta = _event("message_delta", delta=_stop(choice), usage=_usage(choice.done), **details)
        return delta + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        """Return the error as the last event."""
        return _event("error", **error.document("/v1/messages"))

    def keep_alive(self) -> bytes:
        """Return a ping."""
        return _event("ping")


def _message(job: JobStarted) -> dict[str, Any]:
    """Return a message without content."""
    return {
        "id": f"msg_{job.job_id}",
        "type": "message",
        "role": "assistant",
        "model": job.model_name or job.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": job.prompt_tokens, "output_tokens": 0},
    }


def _stop(choice: Choice) -> dict[str, Any]:
    stop_string = choice.done.stop_string
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    reason = reasons.get(choice.finish_reason, "end_turn" if stop_string is None else "stop_sequence")
    return {"stop_reason": reason, "stop_sequence": stop_string if reason == "stop_sequence" else None}


def _usage(result: JobResult) -> dict[str, Any]:
    usage = result.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _event(kind: str, /, **values: Any) -> bytes:
    document = json_line({"type": kind} | values)
    return f"event: {kind}\ndata: {document}\n\n".encode()
