"""The protocols of the API, by their unmodified clients, against three real peers with a third of the model each."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, TypeVar

import anthropic
import httpx
import numpy as np
import numpy.typing as npt
import ollama
import openai
import pytest
import torch
import trio

from node.models.store import Package
from node.selection.samples import read_samples
from protocol.measurements import TaskKind
from tests.process.client_features import failures
from tests.process.daemons import MODEL, THIRDS, Daemon, StartDaemon, complete_swarm
from tests.process.test_parity import whole_model
from tests.support.tokenizers import load_tokenizer

T = TypeVar("T")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
METHODS = ("speculation=ngram-8", "prefix_cache=on", "prefix_cache=on|speculation=ngram-8")
USER: list[Any] = [{"role": "user", "content": "Describe a person."}]


async def ask(work: Callable[[], T]) -> T:
    """Run a client that blocks, in a thread."""
    with trio.fail_after(60):
        return await trio.to_thread.run_sync(work)


async def test_clients_of_all_protocols(start_daemon: StartDaemon, package: Package, dequantised: Package) -> None:
    daemons = await complete_swarm(start_daemon, *THIRDS)
    assert not await trio.to_thread.run_sync(failures, daemons[0].api_url)
    await check_openai(daemons[0])
    await check_structured_texts(daemons[1])
    with anthropic.Anthropic(base_url=daemons[2].api_url, api_key="unused") as claude:
        create = claude.messages.create
        message = await ask(lambda: create(model=MODEL, max_tokens=8, messages=USER, extra_body={"temperature": 0}))
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 8)
    client = ollama.Client(host=daemons[1].api_url)
    with closing(client._client):
        options = {"num_predict": 8, "temperature": 0}
        answer = await ask(lambda: client.chat(model=MODEL, messages=USER, options=options))
        assert answer.message.content == "".join(getattr(block, "text", "") for block in message.content)
        parts = await ask(lambda: list(client.generate(MODEL, "Once", raw=True, options=options, stream=True)))
        assert parts[-1].eval_count == 8
        [model] = (await ask(client.list)).models
        assert (model.model, model.size) == (MODEL, package.manifest.size_bytes)
    alone = await trio.to_thread.run_sync(Alone.load, dequantised)
    await check_embeddings(daemons[0], alone)
    await check_scores(daemons[0], alone)
    await check_kinds(daemons[0])


async def check_openai(daemon: Daemon) -> None:
    with openai.OpenAI(base_url=f"{daemon.api_url}/v1", api_key="unused") as client:
        create = client.completions.create
        job: dict[str, Any] = {"model": MODEL, "prompt": ["One two three", "Once upon a time"], "max_tokens": 6}
        answer = await ask(lambda: create(**job, temperature=0, logprobs=2, n=2))
        assert [choice.text for choice in answer.choices[::2]] == [choice.text for choice in answer.choices[1::2]]
        for choice in answer.choices:
            assert choice.logprobs is not None
            assert "".join(choice.logprobs.tokens or ()) == choice.text
            for token, logprob, likeliest in zip(
                choice.logprobs.tokens or (), choice.logprobs.token_logprobs or (), choice.logprobs.top_logprobs or (),
                strict=True,
            ):  # fmt: skip
                assert likeliest[token] == logprob == max(likeliest.values()), "greedy draws the likeliest"
        seeded = [await ask(lambda: create(**job, temperature=1, seed=5, n=2)) for _ in range(2)]
        assert [choice.text for choice in seeded[0].choices] == [choice.text for choice in seeded[1].choices]
        response = await ask(lambda: client.responses.create(model=MODEL, input="Hi", max_output_tokens=5))
        assert (response.status, response.usage and response.usage.output_tokens) == ("incomplete", 5)


async def check_embeddings(daemon: Daemon, alone: "Alone") -> None:
    """Vectors of three stages are those of transformers over the same weights, but for llama.cpp's rounding."""
    texts = ["The cat sat on the mat.", "Stocks fell sharply on Monday.", "A kitten lay on the rug. " * 10]
    states = await trio.to_thread.run_sync(alone.last_states, texts)
    with openai.OpenAI(base_url=f"{daemon.api_url}/v1", api_key="unused") as client:
        create = client.embeddings.create
        for pooling in ("mean", "last"):
            extra = {"metaswarm": {"pooling": pooling}}
            answer: Any = await ask(partial(create, model=MODEL, input=texts, extra_body=extra))
            found = np.array([item.embedding for item in answer.data])
            assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
            wanted = np.array([each.mean(axis=0) if pooling == "mean" else each[-1] for each in states])
            assert ((found * wanted).sum(axis=1) / np.linalg.norm(wanted, axis=1)).min() > 0.999
            assert answer.metaswarm == {"pooling": pooling, "normalised": True}
            assert [len(item.metaswarm["route"]) for item in answer.data] == [3, 3, 3]
            if pooling == "mean":
                assert found[0] @ found[2] > found[0] @ found[1], "cats are nearer to cats than to stocks"


async def check_scores(daemon: Daemon, alone: "Alone") -> None:
    """Scores of several prompts over three stages are transformers' log probabilities, but for llama.cpp's rounding."""
    texts = ["The capital of France is Paris.", "The capital of France is a banana.", "One two three four. " * 12]
    wanted = await trio.to_thread.run_sync(alone.logprobs, texts)
    with openai.OpenAI(base_url=f"{daemon.api_url}/v1", api_key="unused") as client:
        job: dict[str, Any] = {"model": MODEL, "prompt": texts, "echo": True, "logprobs": 1, "temperature": 0}
        found: list[list[float]] = []
        for max_tokens in (0, 1):
            answer = await ask(partial(client.completions.create, **job, max_tokens=max_tokens))
            assert answer.usage is not None
            assert answer.usage.completion_tokens == max_tokens * len(texts)
            for choice, text, expected in zip(answer.choices, texts, wanted, strict=True):
                assert choice.text.startswith(text)
                assert choice.logprobs is not None
                scores = list(choice.logprobs.token_logprobs or ())
                assert scores.pop(0) is None
                assert "".join(choice.logprobs.tokens or ()) == choice.text
                assert np.abs(np.array(scores[: len(expected)]) - expected).mean() < 0.1
                assert len(scores) == len(expected) + max_tokens
                found.append(scores[: len(expected)])
        assert found[: len(texts)] == found[len(texts) :], "the same, whatever follows"
        assert sum(found[0]) > sum(found[1]), "France is known for Paris"


async def check_kinds(daemon: Daemon) -> None:
    """Each kind of job left its own observations, and has its own methods."""
    samples = await trio.to_thread.run_sync(lambda: list(read_samples(daemon.data_dir / "metaswarm.sqlite3")))
    lengths = {
        kind: {each.context.max_tokens for each in samples if each.context.task_kind == kind} for kind in TaskKind
    }
    assert (lengths[TaskKind.EMBED], lengths[TaskKind.SCORE]) == ({0}, {0, 1})
    assert min(lengths[TaskKind.GENERATE]) > 0
    async with httpx.AsyncClient(base_url=daemon.api_url, timeout=60) as client:
        for task in ("generate", "embed", "score"):
            body = {"model": MODEL, "task": task, "prompt_tokens": 200}
            answer = (await client.post("/swarm/explain", json=body)).raise_for_status().json()
            assert answer["task"]["task_kind"] == task
            names = [method["name"] for method in answer["methods"]]
            assert any("prefix_cache=on" in name for name in names) == (task == "generate")
            assert all(method["votes"] for method in answer["methods"] if method["name"] == answer["agreed"])


@dataclass(frozen=True)
class Alone:
    """The whole model in transformers."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, package: Package) -> "Alone":
        return cls(whole_model(package.path, dict(package.manifest.config)), load_tokenizer(package))

    def last_states(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        """Return the last hidden states of each text."""
        with torch.inference_mode():
            return [self.model.model(self._ids(text)).last_hidden_state[0].numpy() for text in texts]

    def logprobs(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        """Return the log probability of each token of a text but the first."""
        with torch.inference_mode():
            return [self._logprobs(self._ids(text)).numpy() for text in texts]

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer.encode(text)])

    def _logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]


async def check_structured_texts(daemon: Daemon) -> None:
    """Texts that follow a schema are valid, and the same by all exact methods beside others; a bad one is refused."""
    body: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 80, "temperature": 1.0}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    async with httpx.AsyncClient(base_url=daemon.api_url, timeout=120) as client:

        async def text_of(seed: int, method: str) -> str:
            extras = {"method": method}
            answer = await client.post("/v1/chat/completions", json={**body, "seed": seed, "metaswarm": extras})
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            assert choice["finish_reason"] == "stop"
            cached[method] = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return str(choice["message"]["content"])

        async def keep(seed: int, method: str) -> None:
            beside[seed, method] = await text_of(seed, method)

        cached: dict[str, int] = {}
        alone = {seed: await text_of(seed, "baseline") for seed in range(3)}
        for value in map(json.loads, alone.values()):
            assert value.keys() == {"name", "age", "tags"}
            assert 0 <= value["age"] <= 120
        for seed, method in enumerate(METHODS):
            assert await text_of(seed, method) == alone[seed]
        assert cached[METHODS[-1]] > cached["baseline"] == 0
        beside: dict[tuple[int, str], str] = {}
        async with trio.open_nursery() as nursery:
            for seed, method in product(alone, METHODS):
                nursery.start_soon(keep, seed, method)
        assert beside == {(seed, method): alone[seed] for seed, method in product(alone, METHODS)}
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
        answer = await client.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
