"""Requests as known programs send them: `programs.json` has their bodies, as their sources write them."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.coordinator.chat import ChatFormat, ToolFormat
from tests.unit.api.fakes import MODEL, FakeNode

REQUESTS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("programs.json").read_text(encoding="utf-8"))
GO_SHOW: dict[str, Any] = {
    "model": "", "system": "", "template": "", "verbose": False, "options": None, "name": ""
}  # fmt: skip
GO_PULL: dict[str, Any] = {"model": "", "username": "", "password": "", "name": ""}
"""What the `ollama` command and other programs with Ollama's package for Go send for fields that are not set."""


@pytest.mark.parametrize("known", REQUESTS, ids=[f"{each['program']}: {each['request']}" for each in REQUESTS])
async def test_requests_of_known_programs_are_answered(
    client: httpx.AsyncClient, node: FakeNode, known: dict[str, Any]
) -> None:
    if "tools" in known:
        node.submitter.chat_format = ChatFormat(tools=ToolFormat.HERMES)
    answer = await client.post(known["path"], json=known["body"])
    assert answer.status_code == 200, answer.text
    assert "Hello" in answer.text
    assert "rld" in answer.text, "it is complete"
    (job,) = node.submitter.requests
    assert (job.model, job.max_tokens) == ("tiny", known.get("max_tokens"))
    assert bool(job.tools) is ("tools" in known)


async def test_model_is_described_as_editors_ask_for_it(client: httpx.AsyncClient) -> None:
    """Continue sends `name` alone; Copilot wants Ollama 0.6.4 at least, and asks by what the list calls `model`.

    Codex wants 0.13.4.
    """
    version = (await client.get("/api/version")).json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 13, 4)
    (listed,) = (await client.get("/api/tags")).json()["models"]
    names = ({"name": "tiny"}, {"name": "tiny:latest"}, {"model": listed["model"]}, {"model": MODEL[:8]})
    for body in (*names, *(GO_SHOW | each for each in names)):
        shown = await client.post("/api/show", json=body)
        assert shown.status_code == 200, shown.text
        facts = shown.json()["model_info"]
        assert facts[f"{facts['general.architecture']}.context_length"] == 8192
    for nameless in ({}, GO_SHOW):
        refused = await client.post("/api/show", json=nameless)
        assert (refused.status_code, refused.json()) == (400, {"error": "model is missing"})
    assert (await client.post("/api/show", json=GO_SHOW | {"model": "tiny", "system": "Be brief."})).status_code == 400


async def test_ollama_model_that_is_there_is_pulled(client: httpx.AsyncClient) -> None:
    """Open WebUI and others pull a model before they use it, and show what the answer's lines say."""
    for body in ({"model": "tiny"}, {"name": "tiny:latest", "stream": True}, GO_PULL | {"name": "tiny:latest"}):
        answer = await client.post("/api/pull", json=body)
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert json.loads(answer.text.splitlines()[-1]) == {"status": "success"}
    assert (await client.post("/api/pull", json={"model": "tiny", "stream": False})).json() == {"status": "success"}
    unknown = await client.post("/api/pull", json={"model": "llama3"})
    assert (unknown.status_code, "metaswarm model import llama3" in unknown.json()["error"]) == (404, True)
    incomplete = await client.post("/api/pull", json={"model": "broken"})
    assert (incomplete.status_code, "blocks 1-3" in incomplete.json()["error"]) == (404, True)


@pytest.mark.parametrize(
    ("method", "path", "instead"),
    [
        ("POST", "/api/create", "metaswarm model import"),
        ("POST", "/api/copy", "metaswarm model import"),
        ("POST", "/api/push", "metaswarm node --serve"),
        ("DELETE", "/api/delete", "metaswarm model remove"),
    ],
)
async def test_ollama_request_that_changes_models_is_told_what_to_do_instead(
    client: httpx.AsyncClient, method: str, path: str, instead: str
) -> None:
    answer = await client.request(method, path, json={"model": "tiny"})
    assert answer.status_code == 400
    assert instead in answer.json()["error"]


async def test_openai_model_is_found_by_name_or_id(client: httpx.AsyncClient) -> None:
    for name in ("tiny", MODEL, MODEL[:8]):
        found = (await client.get(f"/v1/models/{name}")).json()
        assert (found["id"], found["max_model_len"]) == ("tiny", 8192)
    for name in (MODEL[:7], "cd" * 32, "broken"):  # too short, and not complete
        assert (await client.get(f"/v1/models/{name}")).status_code == 404
