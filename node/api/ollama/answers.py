"""Answers of Ollama's `/api/chat` and `/api/generate`: one JSON document, or one a line."""

from dataclasses import dataclass
from datetime import UTC, datetime
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
from node.api.openai.logprobs import describe_logprobs
from node.api.tool_calls import ToolCall
from node.coordinator.submission import JobResult
from node.util.json_line import json_line

JSON_LINES: Final = "application/x-ndjson"


@dataclass(slots=True)
class OllamaWriter:
    """Writes one answer; implements `AnswerWriter`. Without a job it says what Ollama does: that the model is loaded.

    `unloads`: it says that it is unloaded, as the request asks; nothing is.
    """

    generation: Generation
    model: str
    is_chat: bool
    unloads: bool = False
    media_type: str = JSON_LINES

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """Return the answer in one document."""
        if not outcome.choices:
            return self._piece("") | {"done": True, "done_reason": "unload" if self.unloads else "load"}
        choice = outcome.choices[0]
        document = self._piece(choice.text, choice.reasoning, *choice.tool_calls)
        if choice.logprobs:
            document["logprobs"] = describe_logprobs(choice.logprobs)
        return document | self._end(choice)

    def chunks(self, event: GenerationEvent) -> bytes:
        """Return an event's line."""
        match event:
            case ChoiceText(text=text, logprobs=logprobs):
                described = {"logprobs": describe_logprobs(logprobs)} if logprobs else {}
                return _line(self._piece(text) | {"done": False} | described)
            case ChoiceReasoning(text=text):
                return _line(self._piece("", text) | {"done": False})
            case ChoiceToolCall(call=call):
                return _line(self._piece("", "", call) | {"done": False})
            case ChoiceStarted() | ChoiceFinished():
                pass
        return b""

    def end(self, outcome: Outcome) -> bytes:
        """Return the last line, which has the counts."""
        if not outcome.choices:
            return _line(self.whole(outcome))
        return _line(self._piece("") | self._end(outcome.choices[0]))

    def failure(self, error: ApiError) -> bytes:
        """Return the error as the last line."""
        return _line({"error": error.message})

    def keep_alive(self) -> bytes:
        """Return a line with an empty piece of text."""
        return _line(self._piece("") | {"done": False})

    def _piece(self, text: str, reasoning: str = "", *calls: ToolCall) -> dict[str, Any]:
        created_at = datetime.now(UTC).isoformat().replace("+00:00", "Z")  # of this piece, as in Ollama
        document: dict[str, Any] = {"model": self.model, "created_at": created_at}
        thinking = {"thinking": reasoning} if reasoning else {}
        if not self.is_chat:
            return document | {"response": text} | thinking
        message: dict[str, Any] = {"role": "assistant", "content": text} | thinking
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": call.argument_object}} for call in calls
            ]
        return document | {"message": message}

    def _end(self, choice: Choice) -> dict[str, Any]:
        result = choice.done
        document: dict[str, Any] = {
            "done": True,
            "done_reason": "length" if choice.finish_reason == "length" else "stop",
            **_counts(result),
        }
        return document | ({"metaswarm": describe_job(result)} if self.generation.details else {})


def _counts(result: JobResult) -> dict[str, Any]:
    timing = result.timing
    return {
        "total_duration": nanoseconds(timing.total_s),
        "load_duration": 0,
        "prompt_eval_count": result.usage.prompt_tokens,
        "prompt_eval_duration": nanoseconds(timing.ttft_s),
        "eval_count": result.usage.completion_tokens,
        "eval_duration": nanoseconds(max(0.0, timing.total_s - timing.ttft_s)),
    }


def nanoseconds(seconds: float) -> int:
    """Return a duration as Ollama has it."""
    return round(seconds * 1e9)


def _line(document: dict[str, Any]) -> bytes:
    return f"{json_line(document)}\n".encode()
