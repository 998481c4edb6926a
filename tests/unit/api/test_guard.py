import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from starlette.types import Message

from node.api import guard
from node.api.access import MAX_READERS, Access, KeyRing, RequestUse
from node.api.application import make_app
from node.api.errors import ApiError
from node.config import ApiKey, hash_api_key
from tests.unit.api.fakes import FASTER, FakeNode, FakeSubmitter, chat_body, send_request, serve_node


@pytest.fixture
async def guarded_client(node: FakeNode) -> AsyncIterator[httpx.AsyncClient]:
    async with serve_node(node, api_key="sesame") as url, httpx.AsyncClient(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    "authorization", [None, "sesame", "Bearer", "Bearer wrong", "Basic sesame", "Bearer s\u00e9same"]
)
async def test_refuses_missing_or_wrong_api_key(
    node: FakeNode, guarded_client: httpx.AsyncClient, authorization: str | None
) -> None:
    headers = httpx.Headers([] if authorization is None else [(b"Authorization", authorization.encode())])
    for path in ("/swarm/status", "/v1/models", "/nowhere"):
        response = await guarded_client.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    response = await guarded_client.post("/v1/chat/completions", json=chat_body(), headers=headers)
    assert response.status_code == 401
    assert node.submitter.requests == []


async def test_accepts_api_key(guarded_client: httpx.AsyncClient) -> None:
    headers = {"Authorization": "Bearer sesame", "Host": "swarm.example.org", "Origin": "https://chat.example.org"}
    assert (await guarded_client.get("/swarm/status", headers=headers)).status_code == 200
    assert (await guarded_client.get("/health")).status_code == 200


async def test_large_request_without_key_frees_connection(guarded_client: httpx.AsyncClient) -> None:
    with trio.fail_after(4):
        for _ in range(2):
            response = await guarded_client.post("/v1/completions", content=b"x" * (4 << 20))
            assert response.status_code == 401


@pytest.mark.parametrize(
    "headers",
    [{"Host": "attacker.example"}, {"Host": "[::1"}, {"Origin": "https://attacker.example"}, {"Origin": "null"}],
)
async def test_refuses_foreign_origin_and_host(
    node: FakeNode, client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    response = await client.post("/v1/chat/completions", json=chat_body(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "foreign_origin")
    assert node.submitter.requests == []


@pytest.mark.parametrize(
    ("headers", "remedy"),
    [
        ({"Origin": "app://obsidian.md"}, "--cors-origin app://obsidian.md"),
        ({"Origin": "http://tauri.localhost"}, "--cors-origin http://tauri.localhost"),
        ({"Origin": "file://"}, "--cors-origin file://"),
        ({"Origin": "null"}, "API key"),
        ({"Origin": "https://a.example;reboot"}, "API key"),
        ({"Host": "host.docker.internal:8642"}, "--api-key"),
    ],
)
async def test_refusal_names_what_is_foreign_and_the_remedy(
    client: httpx.AsyncClient, headers: dict[str, str], remedy: str
) -> None:
    message: str = (await client.get("/v1/models", headers=headers)).json()["error"]["message"]
    for expected in (*headers.values(), remedy):
        assert expected in message
    assert ("--cors-origin http" in message) is headers.get("Origin", "").startswith("http://")


@pytest.mark.parametrize(
    "headers", [{"Host": "localhost:9000"}, {"Host": "[::1]:1"}, {"Origin": "http://localhost:3000"}]
)
async def test_accepts_every_loopback_host(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await client.get("/swarm/status", headers=headers)).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", ["/swarm/status", "/swarm/peers", "/swarm/models", "/v1/models", "/nowhere"])
async def test_refuses_cross_site_get(client: httpx.AsyncClient, site: str, path: str) -> None:
    response = await client.get(path, headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "foreign_origin")
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"}, {}])
async def test_accepts_direct_and_same_origin_requests(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await client.get("/swarm/status", headers=headers)).status_code == 200


async def test_health_is_public(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health", headers={"Sec-Fetch-Site": "cross-site"})).status_code == 200


async def test_refuses_form_post(node: FakeNode, client: httpx.AsyncClient) -> None:
    body = json.dumps(chat_body()).encode()
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://localhost:3000"}):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            response = await client.post(
                "/v1/chat/completions", content=body, headers={**headers, "Content-Type": kind}
            )
            assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert node.submitter.requests == []
    # curl -d says nothing of where it comes from, and that it sends a form.
    kind = "application/x-www-form-urlencoded"
    response = await client.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
    assert response.status_code == 200
    for path in ("/swarm/explain", "//swarm/explain"):
        url = f"{str(client.base_url).rstrip('/')}{path}"
        assert (await client.post(url, content=body, headers={"Content-Type": kind})).status_code == 415


LOCAL_ORIGINS = ["http://localhost:5173", "http://127.0.0.1:3000", "http://[::1]:8080", "https://localhost"]
FOREIGN_ORIGINS = [
    "https://attacker.example",
    "http://localhost.attacker.example",
    "http://127.0.0.1.attacker.example:80",
    "http://attacker.example@evil.example",
    "http://192.168.0.7:5173",
    "null",
]
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.mark.parametrize("origin", LOCAL_ORIGINS)
@pytest.mark.parametrize("api_key", [None, "sesame"])
async def test_cors_allows_local_origin(origin: str, api_key: str | None) -> None:
    async with serve_node(FakeNode(), api_key) as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/v1/chat/completions", "/v1/models", "/swarm/explain"):
            response = await client.options(path, headers={"Origin": origin, **ASKS})
            assert response.status_code == 204
            assert response.headers["access-control-allow-origin"] == origin
            assert "POST" in response.headers["access-control-allow-methods"]
            assert response.headers["access-control-allow-headers"] == "authorization,content-type"
            assert response.headers["vary"] == "Origin"
        headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site", "Authorization": "Bearer sesame"}
        for stream in (False, True):
            response = await client.post("/v1/chat/completions", json=chat_body(stream=stream), headers=headers)
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, origin)
        for refused in (await client.get("/nowhere", headers=headers), await client.post("/v1/completions", json={})):
            assert refused.status_code in {400, 401, 404}
        assert (await client.get("/nowhere", headers=headers)).headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
@pytest.mark.parametrize("api_key", [None, "sesame"])
async def test_cors_omits_headers_for_foreign_origin(origin: str, api_key: str | None) -> None:
    async with serve_node(FakeNode(), api_key) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.options("/v1/chat/completions", headers={"Origin": origin, **ASKS})
        assert response.status_code == (401 if api_key else 403)
        assert not [name for name in response.headers if name.startswith("access-control-")]
        response = await client.get("/health", headers={"Origin": origin})
        assert "access-control-allow-origin" not in response.headers


async def test_preflight_without_headers(client: httpx.AsyncClient) -> None:
    asks = {"Origin": "http://localhost:1", "Access-Control-Request-Method": "GET"}
    for names in ("", "a b", "x" * 5000, "a,,b"):
        response = await client.options("/v1/models", headers={**asks, "Access-Control-Request-Headers": names})
        assert response.status_code == 204
        assert "access-control-allow-headers" not in response.headers


async def test_refuses_body_over_limit(
    node: FakeNode, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    response = await client.post("/v1/chat/completions", content=b"x" * (4 << 20))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/page/app.js"), ("OPTIONS", "/v1/models")])
async def test_takes_few_bytes_without_key(guarded_client: httpx.AsyncClient, method: str, path: str) -> None:
    headers = {"Origin": "http://localhost:3000", **ASKS} if method == "OPTIONS" else {}
    response = await guarded_client.request(method, path, content=b"x" * 5000, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


async def test_endless_body_frees_connection(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(guard, "DISCARD_TIMEOUT_S", 0.1)

    async def send_for_ever(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(b"x" * 65536)

    with trio.fail_after(5):
        async with serve_node(node) as url, await send_request(url, "/v1/completions", b"", length=1 << 40) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await send_for_ever(stream)


async def test_body_timeout(virtual_clock: object) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        await trio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await make_app(FakeNode(), Access())(scope, receive, send)
    assert sent[0]["status"] == 408


async def test_client_that_never_takes_end_of_answer_is_given_up(virtual_clock: object) -> None:
    disconnected = trio.Event()
    messages: list[Message] = [
        {"type": "http.request", "body": json.dumps(chat_body()).encode(), "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        if len(messages) == 1:
            await disconnected.wait()
        return messages.pop(0)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            disconnected.set()
            await trio.sleep_forever()

    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    with trio.fail_after(2 * guard.END_LIMIT_S):
        await make_app(FakeNode(), Access())(scope, receive, send)


KEYS = (
    ApiKey(name="busy", sha256=hash_api_key("sesame"), requests_per_minute=2),
    ApiKey(name="narrow", sha256=hash_api_key("saffron"), concurrency=1),
    ApiKey(name="free", sha256=hash_api_key("cumin")),
)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_each_key_has_its_rate() -> None:
    async with serve_node(FakeNode(), access=Access(keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as client:
        for left in (1, 0):
            response = await client.post("/v1/chat/completions", json=chat_body(), headers=bearer("sesame"))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        refused = await client.post("/api/chat", json=chat_body(stream=False), headers={"X-Api-Key": "sesame"})
        assert (refused.status_code, int(refused.headers["retry-after"])) == (429, 30)
        assert "2 requests a minute" in refused.json()["error"]
        for _ in range(4):
            assert (await client.get("/v1/models", headers=bearer("sesame"))).status_code == 200
            free = await client.post("/v1/chat/completions", json=chat_body(), headers=bearer("cumin"))
            assert free.status_code == 200
            assert "x-ratelimit-limit-requests" not in free.headers
        assert (await client.get("/v1/models", headers=bearer("pepper"))).status_code == 401
        refused = await client.get("/v1/models", headers={"x-api-key": "pepper", "anthropic-version": "2023-06-01"})
        assert refused.json()["error"]["type"] == "authentication_error", "in the form of the API that is spoken"


async def test_each_key_has_its_concurrency() -> None:
    node = FakeNode(submitter=FakeSubmitter(hang=True))
    async with serve_node(node, access=Access(keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as client:
        async with trio.open_nursery() as nursery:
            body: dict[str, Any] = {"json": chat_body(), "headers": bearer("saffron")}
            nursery.start_soon(partial(client.post, "/v1/chat/completions", **body))
            await node.submitter.entered.wait()
            refused = await client.post("/v1/chat/completions", **body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
            assert refused.headers["retry-after"] == "1"
            nursery.cancel_scope.cancel()
        node.submitter.hang = False
        with trio.fail_after(5):
            while (await client.post("/v1/chat/completions", **body)).status_code == 429:
                await trio.testing.wait_all_tasks_blocked(0.01)


async def test_job_names_the_key_that_asked_for_it() -> None:
    node = FakeNode()
    async with serve_node(node, access=Access(keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as client:
        for key in ("sesame", "cumin"):
            assert (await client.post("/v1/chat/completions", json=chat_body(), headers=bearer(key))).status_code == 200
            embedding = {"model": "tiny", "input": "x"}
            assert (await client.post("/v1/embeddings", json=embedding, headers=bearer(key))).status_code == 200
            counted = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
            await client.post("/v1/messages/count_tokens", json=counted, headers=bearer(key))
    keys = [request.origin.key_sha256 for request in node.submitter.requests]
    assert keys == [hash_api_key(key) for key in ("sesame",) * 2 + ("cumin",) * 3]
    node = FakeNode()
    async with serve_node(node) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200
    assert node.submitter.requests[0].origin.key_sha256 == ""


async def test_each_answer_counts_against_its_key() -> None:
    node = FakeNode()
    task = {"model": "tiny"}
    async with serve_node(node, access=Access(keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as client:
        for body in ({"n": 3}, {"prompt": ["a", "b", "c"]}):
            path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
            for key in ("sesame", "saffron"):
                refused = await client.post(path, json=chat_body(**body) if "n" in body else {**task, **body},
                                            headers=bearer(key))  # fmt: skip
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        assert not node.submitter.requests
    async with serve_node(node, access=Access(keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/swarm/explain", json=task, headers=bearer("sesame"))).status_code == 200
        assert (await client.post("/swarm/explain", json=task, headers=bearer("sesame"))).status_code == 200
        bench = {**task, "methods": [FASTER], "rounds": 1}
        prompt = {**task, "prompt": "x"}
        for path, asked in (("/swarm/explain", task), ("/swarm/bench", bench), ("/v1/completions", prompt)):
            refused = await client.post(path, json=asked, headers=bearer("sesame"))
            assert refused.status_code == 429
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"


async def test_measurement_counts_as_all_jobs_of_the_minute() -> None:
    key = ApiKey(name="some", sha256=hash_api_key("sesame"), requests_per_minute=8)
    node = FakeNode()
    async with serve_node(node, access=Access(keys=(key,))) as url, httpx.AsyncClient(base_url=url) as client:
        bench = {"model": "tiny", "methods": [FASTER], "rounds": 2}  # and the baseline, and a warm-up of both
        measured = await client.post("/swarm/bench", json=bench, headers=bearer("sesame"))
        assert (measured.status_code, measured.headers["x-ratelimit-remaining-requests"]) == (200, "2")
        refused = await client.post("/swarm/bench", json=bench, headers=bearer("sesame"))
        assert refused.status_code == 429
        for whole in ({"model": "tiny"}, {**bench, "rounds": 4}):
            node.benched.clear()
            access = Access(keys=(key,))
            async with serve_node(node, access=access) as fresh, httpx.AsyncClient(base_url=fresh) as other:
                never = await other.post("/swarm/bench", json=whole, headers=bearer("sesame"))
            assert (never.status_code, never.json()["error"]["param"]) == (400, "methods")
            assert "admits 8 a minute: name fewer methods or rounds" in never.text
            assert not node.benched


async def test_measurement_counts_as_the_jobs_that_it_runs_at_a_time() -> None:
    node = FakeNode()
    async with serve_node(node, access=Access(keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as client:
        for key, status in (("saffron", 400), ("cumin", 200)):
            task = {"model": "tiny", "workload": {"concurrency": 2}}
            response = await client.post("/swarm/bench", json=task, headers=bearer(key))
            assert response.status_code == status
            assert len(node.benched) == (status == 200)
            assert status == 200 or response.json()["error"]["param"] == "workload.concurrency"


async def test_each_key_has_few_readers_of_events() -> None:
    async with (
        serve_node(FakeNode(), access=Access(keys=KEYS)) as url,
        httpx.AsyncClient(base_url=url, timeout=5) as client,
    ):

        async def status_of_reader(key: str) -> int:
            response = await readers.enter_async_context(client.stream("GET", "/swarm/events", headers=bearer(key)))
            return response.status_code

        async with AsyncExitStack() as readers:
            assert [await status_of_reader("saffron") for _ in range(MAX_READERS + 1)] == [200] * MAX_READERS + [503]
            assert await status_of_reader("cumin") == 200
            answered = await client.post("/v1/chat/completions", json=chat_body(), headers=bearer("saffron"))
            assert answered.status_code == 200
        with trio.fail_after(5):
            async with AsyncExitStack() as readers:
                while await status_of_reader("saffron") == 503:
                    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_events_of_a_revoked_key_end() -> None:
    access = Access(keys=KEYS)
    async with serve_node(FakeNode(), access=access) as url, httpx.AsyncClient(base_url=url, timeout=5) as client:
        async with client.stream("GET", "/swarm/events", headers=bearer("saffron")) as events:
            access.keys.replace(key for key in KEYS if key.name != "narrow")
            with trio.fail_after(5):
                await events.aread()
        assert (await client.get("/swarm/status", headers=bearer("saffron"))).status_code == 401


async def test_limits_of_a_key_that_stays_are_replaced() -> None:
    access = Access(keys=[ApiKey(name="busy", sha256=hash_api_key("sesame"), concurrency=1)])
    use = access.keys.find("sesame")
    assert use is not None
    use.begin(1)
    with pytest.raises(ApiError):
        use.begin(1)
    access.keys.replace([ApiKey(name="busy", sha256=hash_api_key("sesame"), concurrency=2, requests_per_minute=1)])
    again = access.keys.find("sesame")
    assert again is not None
    again.begin(1)
    with pytest.raises(ApiError, match="at a time"):
        again.begin(1)
    use.end(1, 0)
    with pytest.raises(ApiError, match="requests a minute"):
        again.begin(1)


async def test_request_that_is_not_valid_counts_against_its_key() -> None:
    async with serve_node(FakeNode(), access=Access(keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/messages/count_tokens", "/swarm/explain"):
            assert (await client.post(path, json={}, headers=bearer("cumin"))).status_code == 400
        for status in (400, 400, 429):
            response = await client.post("/api/chat", json={}, headers=bearer("sesame"))
            assert response.status_code == status


async def test_retry_after_is_when_all_answers_of_a_request_fit(virtual_clock: object) -> None:
    use = KeyRing([ApiKey(name="busy", sha256=hash_api_key("sesame"), requests_per_minute=6)]).find("sesame")
    assert use is not None
    use.begin(6)
    request = RequestUse(use)
    await trio.sleep(10)
    request.begin(1)
    with pytest.raises(ApiError) as refused:
        request.begin(6)
    await trio.sleep(float((refused.value.headers or {})["Retry-After"]))
    request = RequestUse(use)
    request.begin(1)
    request.begin(6)


async def test_waiting_for_other_answers_uses_no_rate() -> None:
    key = ApiKey(name="both", sha256=hash_api_key("sesame"), requests_per_minute=6, concurrency=2)
    node = FakeNode(submitter=FakeSubmitter(hang=True))
    ask: dict[str, Any] = {"url": "/v1/chat/completions", "headers": bearer("sesame")}
    async with serve_node(node, access=Access(keys=(key,))) as url, httpx.AsyncClient(base_url=url) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(client.post, json=chat_body(), **ask))
            await node.submitter.entered.wait()
            for _ in range(9):
                refused = await client.post(json=chat_body(n=2), **ask)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
                assert refused.headers["retry-after"] == "1"
                assert refused.headers["x-ratelimit-remaining-requests"] == "5"
            nursery.cancel_scope.cancel()
        node.submitter.hang = False
        with trio.fail_after(5):
            while (answer := await client.post(json=chat_body(n=2), **ask)).status_code == 429:
                assert answer.json()["error"]["code"] == "too_many_requests"
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == "3"


async def test_either_header_may_have_the_key() -> None:
    async with serve_node(FakeNode(), access=Access(keys=KEYS)) as url, httpx.AsyncClient(base_url=url) as client:
        for headers in (bearer("cumin") | {"X-Api-Key": "unused"}, bearer("unused") | {"X-Api-Key": "cumin"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        both = bearer("unused") | {"X-Api-Key": "unused"}
        assert (await client.get("/v1/models", headers=both)).status_code == 401


@pytest.mark.parametrize("keys", [(), KEYS])
@pytest.mark.parametrize("ours", ["https://chat.example.org", "app://obsidian.md"])
async def test_pages_of_configured_origins_are_admitted(keys: tuple[ApiKey, ...], ours: str) -> None:
    foreign = "https://evil.example.org"
    access = Access(keys=keys, cors_origins=(ours,))
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with serve_node(FakeNode(), access=access) as url, httpx.AsyncClient(base_url=url) as client:
        preflight = await client.options("/v1/models", headers={"Origin": ours, **asks})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, ours)
        from_page = {"Origin": ours, "Sec-Fetch-Site": "cross-site", **bearer("cumin")}
        answer = await client.get("/v1/models", headers=from_page)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ours)
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        refused = await client.get("/v1/models", headers={"Origin": foreign, **bearer("cumin")})
        assert "access-control-allow-origin" not in refused.headers
        assert refused.status_code == (200 if keys else 403)
