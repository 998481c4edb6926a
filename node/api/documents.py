"""Answers of jobs as JSON documents of the OpenAI API: whole, or in chunks."""

from dataclasses import asdict, dataclass
from typing import Any

from node.coordinator.submission import JobResult, JobStarted


def describe_job(result: JobResult) -> dict[str, Any]:
    """Return the field `metaswarm` of an answer: how the swarm ran the job. Times in seconds."""
    method = result.method
    return {
        "job_id": result.job_id,
        "route": [
            {"peer": stage.peer, "start": stage.blocks.start, "end": stage.blocks.end}
            | {"compute_s": stage.statistics.compute_s, "queue_s": stage.statistics.queue_s}
            for stage in result.route
        ],
        "method": {"name": method.name, "switches": dict(method.switches), "stage_policy": dict(method.stage_policy)},
        "consensus": asdict(result.consensus),
        "timing": asdict(result.timing),
        "selection": None if result.selection is None else asdict(result.selection),
        "replays": result.replays,
        "token_ids": list(result.token_ids),
    }


def describe_usage(result: JobResult) -> dict[str, Any]:
    """Return the field `usage` of an answer."""
    usage = result.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"accepted_prediction_tokens": usage.accepted_draft_tokens},
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a started job, as chat completion or text completion."""

    started: JobStarted
    chat: bool

    def whole(self, result: JobResult) -> dict[str, Any]:
        """Return the answer in one document."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": result.finish_reason.value}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
        else:
            choice["text"] = result.text
        kind = "chat.completion" if self.chat else "text_completion"
        usage = describe_usage(result)
        return self._envelope(kind) | {"choices": [choice], "usage": usage, "metaswarm": describe_job(result)}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks before any text: a chat's role."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def text_chunk(self, text: str) -> dict[str, Any]:
        """Return a chunk with more text."""
        return self._chunk({"content": text} if self.chat else text)

    def last_chunks(self, result: JobResult, *, include_usage: bool) -> list[dict[str, Any]]:
        """Return the chunks after the text; the very last one carries `metaswarm`."""
        chunks = [self._chunk({} if self.chat else "", result.finish_reason.value)]
        if include_usage:
            chunks.append(self._envelope(self._chunk_kind) | {"choices": [], "usage": describe_usage(result)})
        chunks[-1]["metaswarm"] = describe_job(result)
        return chunks

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.started.job_id}",
            "object": kind,
            "created": self.started.created_s,
            "model": self.started.model_name or self.started.model,
        }

    def _chunk(self, delta: dict[str, Any] | str, finish_reason: str | None = None) -> dict[str, Any]:
        piece = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        return self._envelope(self._chunk_kind) | {"choices": [choice | piece]}
