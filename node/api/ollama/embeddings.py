"""Ollama's `/api/embed`, and the older `/api/embeddings`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.embeddings import EmbeddingWriter, as_json, embedding_of, normalised
from node.api.endpoint import wants_details
from node.api.fields import Field, ObjectForm, form, list_of, parse_boolean, parse_json, parse_text, refuse
from node.api.generation import Generation
from node.api.job_document import describe_job
from node.api.ollama.answers import nanoseconds
from node.api.ollama.requests import IGNORED, OPTIONS, PROMPT, model_name
from node.api.shared_fields import MAX_INPUTS, MODEL
from node.coordinator.submission import JobRequest, JobResult
from protocol.tensors import Pooling


@form({"type": "string", "minLength": 1})
def _parse_element(param: str, value: Any) -> str:
    """Return a text of several: if an empty one were left out, vectors would belong to other texts."""
    return parse_text(param, value) or refuse(param, "is an empty text: leave it out")


_texts: Final = list_of(_parse_element, "texts", MAX_INPUTS)


@form({"anyOf": [parse_text.schema, _texts.schema]})
def _parse_input(param: str, value: Any) -> tuple[str, ...]:
    """Return the texts: none for a single empty one, as in Ollama."""
    if isinstance(value, str):
        return (parse_text(param, value),) if value else ()
    return _texts(param, value)


_INPUT: Final = Field("input", _parse_input)
_TRUNCATE: Final = Field("truncate", parse_boolean)
# Nothing is sampled: options have nothing to change.
_OPTIONS: Final = Field("options", ObjectForm(ignored=OPTIONS.names).form)
EMBED: Final = ObjectForm(
    MODEL, _INPUT, _TRUNCATE, _OPTIONS, required=[MODEL], ignored=IGNORED, neutral={"dimensions": ()}
)
EMBEDDINGS: Final = ObjectForm(MODEL, PROMPT, _OPTIONS, required=[MODEL], ignored=IGNORED)


def parse_embed(body: bytes, headers: Headers) -> tuple[Generation, EmbeddingWriter]:
    """Return the body of `POST /api/embed` as a request. Raises ApiError."""
    fields = EMBED.read(parse_json(body))
    fields.get(_OPTIONS)
    model, truncate = model_name(fields), fields.get(_TRUNCATE) is not False
    generation = _generation(model, fields.get(_INPUT) or (), truncate=truncate)
    return generation, OllamaEmbeddings(model, details=wants_details(headers))


def parse_embeddings(body: bytes, headers: Headers) -> tuple[Generation, EmbeddingWriter]:
    """Return the body of `POST /api/embeddings` as a request: one job, or none for an empty prompt. Raises ApiError."""
    fields = EMBEDDINGS.read(parse_json(body))
    fields.get(_OPTIONS)
    prompt = fields.get(PROMPT)
    generation = _generation(model_name(fields), [prompt] if prompt else [], truncate=True)
    return generation, OllamaEmbedding(details=wants_details(headers))


def _generation(model: str, texts: Sequence[str], *, truncate: bool) -> Generation:
    job = JobRequest(model=model, pooling=Pooling.MEAN, max_tokens=1, truncate=truncate)
    return Generation(jobs=tuple(replace(job, prompt=text) for text in texts), model=model)


@dataclass(frozen=True, slots=True)
class OllamaEmbeddings:
    """Writes an answer of `/api/embed`, whose vectors have length 1; implements `EmbeddingWriter`."""

    model: str
    details: bool

    def pieces(self, results: Sequence[JobResult]) -> Iterator[bytes]:
        """Yield the answer in pieces."""
        yield b'{"embeddings":['
        for index, result in enumerate(results):
            yield (("," if index else "") + as_json(normalised(embedding_of(result)))).encode()
        document: dict[str, Any] = {
            "model": self.model,
            "total_duration": nanoseconds(max((result.timing.total_s for result in results), default=0.0)),
            "load_duration": 0,
            "prompt_eval_count": sum(result.usage.prompt_tokens for result in results),
        }
        if self.details:
            described = {"pooling": Pooling.MEAN.value, "normalised": True, "jobs": [describe_job(r) for r in results]}
            document["metaswarm"] = described
        yield f"],{json.dumps(document)[1:]}".encode()


@dataclass(frozen=True, slots=True)
class OllamaEmbedding:
    """Writes an answer of `/api/embeddings`, whose vector is as the model gives it; implements `EmbeddingWriter`."""

    details: bool

    def pieces(self, results: Sequence[JobResult]) -> Iterator[bytes]:
        """Yield the answer."""
        vector = as_json(embedding_of(results[0])) if results else "[]"
        described = [{"pooling": Pooling.MEAN.value, "normalised": False, **describe_job(each)} for each in results]
        rest = f',"metaswarm":{json.dumps(described[0])}' if described and self.details else ""
        yield f'{{"embedding":{vector}{rest}}}'.encode()
