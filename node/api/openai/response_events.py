"""Answers of the OpenAI API's `/v1/responses`: one document, or the events of its stream."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from node.api.errors import ApiError
from node.api.generation import (
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
from node.api.openai.answers import EVENT_STREAM, describe_usage
from node.api.openai.response_tools import FunctionName
from node.api.tool_calls import ToolCall
from node.coordinator.submission import JobStarted
from node.util.json_line import json_line


@dataclass(slots=True)
class ResponseWriter:
    """Writes one response; implements `AnswerWriter`. The answer is a list of items, of which one is open at a time."""

    generation: Generation
    instructions: str | None
    echoed: Mapping[str, Any]
    """Fields of the request that the answer repeats."""
    functions: Mapping[str, FunctionName]
    """By the model's name for it, the client's."""
    media_type: str = EVENT_STREAM
    _started: JobStarted | None = field(default=None, init=False)
    _items: list[dict[str, Any]] = field(default_factory=list, init=False)
    _open: dict[str, Any] | None = field(default=None, init=False)
    _events: int = field(default=0, init=False)

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """Return the answer in one document."""
        choice = outcome.choices[0]
        if self._started is None:  # nothing was streamed
            self._started = choice.started
            for kind, text in (("reasoning", choice.reasoning), ("message", choice.text)):
                if text:
                    item = self._new_item(kind)
                    item["content"][0]["text"] = text
                    self._items.append(item | {"status": "completed"})
            self._items += [self._call_item(call, number) for number, call in enumerate(choice.tool_calls)]
        is_cut = choice.finish_reason == "length"
        usage = describe_usage(outcome, self.generation)
        response = self._response("incomplete" if is_cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
                "total_tokens": usage["total_tokens"],
            },
        }
        return response | ({"metaswarm": describe_job(choice.done)} if self.generation.details else {})

    def chunks(self, event: GenerationEvent) -> bytes:
        """Return the events that an event makes."""
        match event:
            case ChoiceStarted(job=job):
                self._started = job
                response = self._response("in_progress")
                return self._event("response.created", response=response) + self._event(
                    "response.in_progress", response=response
                )
            case ChoiceText(text=text) if text:
                return self._add_text("message", text)
            case ChoiceReasoning(text=text):
                return self._add_text("reasoning", text)
            case ChoiceToolCall(number=number, call=call):
                return self._close() + self._add_call(self._call_item(call, number))
            case ChoiceFinished():
                return self._close()
            case _:
                return b""

    def end(self, outcome: Outcome) -> bytes:
        """Return the whole answer once more."""
        response = self.whole(outcome)
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> bytes:
        """Return the error as the last event."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def keep_alive(self) -> bytes:
        """Return a comment."""
        return b": waiting\n\n"

    def _add_text(self, kind: str, text: str) -> bytes:
        events = b""
        if self._open is None or self._open["type"] != kind:
            events = self._close()
            item = self._open = self._new_item(kind)
            added = item | {"content": []}
            events += self._event("response.output_item.added", output_index=len(self._items), item=added)
            events += self._part_event("response.content_part.added", item, part=item["content"][0] | {"text": ""})
        self._open["content"][0]["text"] += text
        return events + self._part_event(f"response.{_text_name(self._open)}.delta", self._open, delta=text)

    def _add_call(self, item: dict[str, Any]) -> bytes:
        place = {"output_index": len(self._items), "item_id": item["id"]}
        index, arguments = {"output_index": len(self._items)}, item["arguments"]
        self._items.append(item)
        pending = item | {"arguments": "", "status": "in_progress"}
        return (
            self._event("response.output_item.added", item=pending, **index)
            + self._event("response.function_call_arguments.delta", delta=arguments, **place)
            + self._event("response.function_call_arguments.done", arguments=arguments, name=item["name"], **place)
            + self._event("response.output_item.done", item=item, **index)
        )

    def _close(self) -> bytes:
        """Return the end of the open item, if any."""
        if self._open is None:
            return b""
        item, self._open = self._open | {"status": "completed"}, None
        part = item["content"][0]
        events = self._part_event(f"response.{_text_name(item)}.done", item, text=part["text"])
        events += self._part_event("response.content_part.done", item, part=part)
        events += self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        return events

    def _part_event(self, kind: str, item: dict[str, Any], **values: Any) -> bytes:
        place = {"item_id": item["id"], "output_index": len(self._items), "content_index": 0}
        if "output_text" in kind:
            values["logprobs"] = []
        return self._event(kind, **place, **values)

    def _event(self, kind: str, /, **values: Any) -> bytes:
        document = {"type": kind, "sequence_number": self._events} | values
        self._events += 1
        return f"event: {kind}\ndata: {json_line(document)}\n\n".encode()

    def _new_item(self, kind: str) -> dict[str, Any]:
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            return item | {"id": self._id("rs", len(self._items)), "summary": [], "content": [part]}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return item | {"id": self._id("msg", len(self._items)), "role": "assistant", "content": [part]}

    def _call_item(self, call: ToolCall, number: int) -> dict[str, Any]:
        item = {"type": "function_call", "id": self._id("fc", number), "call_id": call.id}
        name = self.functions.get(call.name, FunctionName(call.name))
        named = {"name": name.name} | ({} if name.namespace is None else {"namespace": name.namespace})
        return item | named | {"arguments": call.arguments, "status": "completed"}

    def _id(self, prefix: str, number: int) -> str:
        if self._started is None:
            raise AssertionError("nothing is written before the job has started")
        return f"{prefix}_{self._started.job_id}_{number}"

    def _response(self, status: str) -> dict[str, Any]:
        if self._started is None:
            raise AssertionError("nothing is written before the job has started")
        return {
            "id": f"resp_{self._started.job_id}",
            "object": "response",
            "created_at": self._started.created_s,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "model": self._started.model_name or self._started.model,
            "output": list(self._items),
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **self.echoed,
        }


def _text_name(item: dict[str, Any]) -> str:
    return "reasoning_text" if item["type"] == "reasoning" else "output_text"
