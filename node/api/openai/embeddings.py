"""The OpenAI API's `/v1/embeddings`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.embeddings import EmbeddingWriter, as_base64, as_json, embedding_of, normalised
from node.api.fields import Field, Form, ObjectForm, one_of, parse_json
from node.api.generation import Generation
from node.api.job_document import describe_job
from node.api.openai.requests import IGNORED, prompts_of, with_prompt
from node.api.shared_fields import BUDGET, MAX_INPUTS, METHOD, MODEL, OBJECTIVE, QUALITY, asks_details
from node.coordinator.submission import JobRequest, JobResult
from protocol.measurements import Objective, QualityBound
from protocol.tensors import Pooling

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("dimensions", "truncate_prompt_tokens"), ()),
    "add_special_tokens": (True,),
    "priority": (0,),
}

_pooling: Final = one_of(*Pooling)
POOLING: Final = Field("pooling", Form(lambda param, value: Pooling(_pooling(param, value)), _pooling.schema))
EXTENSIONS: Final = ObjectForm(QUALITY, METHOD, OBJECTIVE, BUDGET, POOLING)
_METASWARM: Final = Field("metaswarm", EXTENSIONS.form)
_INPUT: Final = Field("input", prompts_of(MAX_INPUTS))
_ENCODING: Final = Field("encoding_format", one_of("float", "base64"))
EMBEDDING: Final = ObjectForm(
    MODEL, _INPUT, _ENCODING, _METASWARM, required=[MODEL, _INPUT], ignored=IGNORED, neutral=NEUTRAL
)


def parse_embedding_request(body: bytes, headers: Headers) -> tuple[Generation, EmbeddingWriter]:
    """Return the body of `POST /v1/embeddings` as a request. Raises ApiError."""
    fields = EMBEDDING.read(parse_json(body))
    extras = fields.get(_METASWARM) or EXTENSIONS.read({})
    pooling = extras.get(POOLING) or Pooling.MEAN
    job = JobRequest(
        model=fields.require(MODEL),
        pooling=pooling,
        max_tokens=1,
        quality=extras.get(QUALITY) or QualityBound.EXACT,
        objective=extras.get(OBJECTIVE) or Objective.LATENCY,
        budget=extras.get(BUDGET),
        method=extras.get(METHOD) or "auto",
    )
    jobs = tuple(with_prompt(job, prompt) for prompt in fields.require(_INPUT))
    is_base64 = fields.get(_ENCODING) == "base64"
    return Generation(jobs=jobs), OpenAIEmbeddings(pooling, is_base64=is_base64, details=asks_details(fields, headers))


@dataclass(frozen=True, slots=True)
class OpenAIEmbeddings:
    """Writes one answer; implements `EmbeddingWriter`."""

    pooling: Pooling
    is_base64: bool
    details: bool

    def pieces(self, results: Sequence[JobResult]) -> Iterator[bytes]:
        """Yield the answer in pieces."""
        before = b'{"object":"list","data":['
        for index, result in enumerate(results):
            vector = normalised(embedding_of(result))
            shown = f'"{as_base64(vector)}"' if self.is_base64 else as_json(vector)
            rest = {"metaswarm": describe_job(result)} if self.details and len(results) > 1 else {}
            more = f",{json.dumps(rest)[1:-1]}" if rest else ""
            yield before + f'{{"object":"embedding","index":{index},"embedding":{shown}{more}}}'.encode()
            before = b","
        tokens = sum(result.usage.prompt_tokens for result in results)
        document: dict[str, Any] = {
            "model": results[0].model_name or results[0].model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        if self.details:
            job = describe_job(results[0]) if len(results) == 1 else {}
            document["metaswarm"] = {"pooling": self.pooling.value, "normalised": True, **job}
        yield f"],{json.dumps(document)[1:]}".encode()
