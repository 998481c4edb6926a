import base64
import math
import struct
from typing import Any

import httpx
import pytest

from node.coordinator.submission import JobError, JobErrorCode
from protocol.measurements import QualityBound
from protocol.tensors import Pooling
from tests.unit.api.fakes import FakeNode


async def embed(client: httpx.AsyncClient, path: str = "/v1/embeddings", **fields: Any) -> Any:
    answer = await client.post(path, json={"model": "tiny", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_vectors_have_length_one_in_both_encodings(node: FakeNode, client: httpx.AsyncClient) -> None:
    answer = await embed(client, input="12 letters x")
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert "metaswarm" not in answer
    [item] = answer["data"]
    assert (item["object"], item["index"]) == ("embedding", 0)
    assert item["embedding"] == pytest.approx([3 / 13, 4 / 13, 0, 12 / 13])
    encoded = (await embed(client, input="12 letters x", encoding_format="base64"))["data"][0]["embedding"]
    assert list(struct.unpack("<4f", base64.b64decode(encoded))) == pytest.approx(item["embedding"], abs=1e-7)


async def test_texts_and_token_ids_keep_their_order(node: FakeNode, client: httpx.AsyncClient) -> None:
    answer = await embed(client, input=["a" * length for length in range(1, 30)])
    lengths = [item["embedding"][3] / item["embedding"][0] * 3 for item in answer["data"]]
    assert [round(length) for length in lengths] == list(range(1, 30))
    assert [item["index"] for item in answer["data"]] == list(range(29))
    assert answer["usage"]["total_tokens"] == 29 * 5
    await embed(client, input=[[1, 2, 3], [4]])
    assert {job.prompt_tokens for job in node.submitter.requests[-2:]} == {(1, 2, 3), (4,)}


async def test_says_how_it_was_pooled_where_that_is_asked(node: FakeNode, client: httpx.AsyncClient) -> None:
    extensions = {"pooling": "last", "quality": "near", "method": "baseline"}
    answer = await embed(client, input="a", metaswarm=extensions)
    assert (answer["metaswarm"]["pooling"], answer["metaswarm"]["normalised"]) == ("last", True)
    assert answer["metaswarm"]["replays"] == 1
    [job] = node.submitter.requests
    assert (job.pooling, job.quality, job.method) == (Pooling.LAST, QualityBound.NEAR, "baseline")
    answer = await embed(client, input=["a", "b"], metaswarm={})
    assert answer["metaswarm"] == {"pooling": "mean", "normalised": True}
    assert [item["metaswarm"]["replays"] for item in answer["data"]] == [1, 1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "a", "dimensions": 256}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": []}, "input"),
        ({}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "metaswarm": {"pooling": "max"}}, "metaswarm.pooling"),
        ({"input": "a", "temperature": 0}, "temperature"),
    ],
)
async def test_refuses_by_name(node: FakeNode, client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await client.post("/v1/embeddings", json={"model": "tiny", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_one_failure_is_that_of_the_answer(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.submitter.refuse = JobError(JobErrorCode.FULL, "no room")
    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "b"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "peers_full")
    assert node.submitter.running == 0


async def test_ollama_embeds_as_ollama_does(node: FakeNode, client: httpx.AsyncClient) -> None:
    answer = await embed(client, "/api/embed", input=["aa", "bbb"], truncate=False, options={"num_ctx": 512})
    assert answer["model"] == "tiny"
    assert [math.hypot(*vector) for vector in answer["embeddings"]] == pytest.approx([1, 1])
    assert answer["prompt_eval_count"] == 10
    assert [job.truncate for job in node.submitter.requests] == [False, False]
    answer = await embed(client, "/api/embeddings", prompt="aa")
    assert answer == {"embedding": [3, 4, 0, 2]}, "the older one does not normalise"
    assert node.submitter.requests[-1].truncate
    assert await embed(client, "/api/embeddings", prompt="") == {"embedding": []}
    assert (await embed(client, "/api/embed", input=""))["embeddings"] == []
    refused = await client.post("/api/embed", json={"model": "tiny", "input": "a", "dimensions": 64})
    assert refused.status_code == 400
    assert "dimensions" in refused.json()["error"]


async def test_ollama_input_has_vector_for_each_text(client: httpx.AsyncClient) -> None:
    refused = await client.post("/api/embed", json={"model": "tiny", "input": ["a", "", "b"]})
    assert (refused.status_code, refused.json()) == (400, {"error": "input[1] is an empty text: leave it out"})
