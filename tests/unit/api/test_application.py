import httpx
import pytest

from tests.unit.api.fakes import MODEL, PEERS, FakeNode


async def test_swarm_pages_return_documents(node: FakeNode, client: httpx.AsyncClient) -> None:
    assert (await client.get("/swarm/status")).json() == node.status_document()
    assert (await client.get("/swarm/peers")).json() == {"peers": node.peers()}
    models = (await client.get("/swarm/models")).json()["models"]
    assert [model["model"] for model in models] == [MODEL, "cd" * 32]
    assert models[1]["uncovered"] == [[1, 3]]


async def test_lists_complete_models_only(client: httpx.AsyncClient) -> None:
    listing = (await client.get("/v1/models")).json()
    assert listing["object"] == "list"
    (model,) = listing["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "metaswarm")
    assert isinstance(model["created"], int)
    assert (await client.get("/v1/models/tiny")).json() == model
    assert (await client.get("/v1/models/broken")).status_code == 404


async def test_health_is_503_while_draining(node: FakeNode, client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200
    node.draining = True
    assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)])
async def test_unknown_path_and_method_use_error_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_slashes_of_a_base_url_do_not_matter(client: httpx.AsyncClient) -> None:
    """`http://127.0.0.1:8642/` and `/api/tags` make two in a row; some clients put one at the end."""
    for path in ("/v1/models", "/api/tags", "/swarm/peers", "/"):
        plain = await client.get(path)
        assert plain.status_code == 200
        for meant in (f"/{path}", f"{path}/", f"/{path}//"):
            answer = await client.get(f"{str(client.base_url).rstrip('/')}{meant}")
            assert (answer.status_code, answer.content) == (200, plain.content)
    answer = await client.post("/v1/completions/", json={"model": "tiny", "prompt": "Hi"})
    assert answer.json()["choices"][0]["text"] == "Hello, wörld", "redirects are not followed with a body"


async def test_internal_error_reveals_nothing(
    node: FakeNode, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr(node, "status", fail)
    response = await client.get("/swarm/status")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    assert (await client.get("/swarm/peers", headers={"X-Peer": PEERS[0]})).status_code == 200


async def test_answer_returns_request_id(node: FakeNode, client: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/nowhere", "/health"):
        assert (await client.get(path, headers={"X-Request-Id": "mine-1"})).headers["x-request-id"] == "mine-1"
    drawn = {(await client.get("/v1/models")).headers["x-request-id"] for _ in range(2)}
    assert len(drawn) == 2
    forged = (await client.get("/v1/models", headers={"X-Request-Id": "a b" * 99})).headers["x-request-id"]
    assert forged.startswith("req_")
