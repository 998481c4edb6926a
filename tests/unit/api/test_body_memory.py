"""Bodies fill no memory, and those of one client leave room for those of the others."""

import json
import tracemalloc
from dataclasses import dataclass, field

import pytest
import trio
from starlette.types import ASGIApp, Message

from node.api import guard
from node.api.access import Access
from node.api.application import make_app
from node.config import ApiKey, hash_api_key
from tests.unit.api.fakes import FakeNode, FakeSubmitter, chat_body

NAMES = ("ann", "ben", "cyd", "dan", "eve")
KEYS = tuple(ApiKey(name=name, sha256=hash_api_key(name), concurrency=1) for name in NAMES)
LARGE = 200 << 10
"""Of a body: one is within a client's share, two are not."""


@pytest.fixture
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 256 << 10)
    monkeypatch.setattr(guard, "MAX_ALL_BODY_BYTES", 4 * LARGE)


@dataclass
class Upload:
    """A request whose body arrives in two parts, the second when `finish` is set."""

    app: ASGIApp
    key: str | None
    size: int
    finish: trio.Event = field(default_factory=trio.Event)
    began: trio.Event = field(default_factory=trio.Event)
    """The application waits for the second part, which is one byte."""
    sent: list[Message] = field(default_factory=list)
    _parts: list[bytes] = field(default_factory=list)

    async def run(self) -> None:
        headers = [] if self.key is None else [(b"authorization", f"Bearer {self.key}".encode())]
        path = "/v1/chat/completions"
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        body = json.dumps(chat_body(user="x" * self.size)).encode()
        self._parts = [body[-1:], body[:-1]]
        del body
        await self.app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if len(self._parts) == 1:
            self.began.set()
            await self.finish.wait()
        elif not self._parts:
            await trio.sleep_forever()
        part = self._parts.pop()
        return {"type": "http.request", "body": part, "more_body": bool(self._parts)}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def outcome(self) -> tuple[int, str | None]:
        """The status of the answer, and the code of an error."""
        document = json.loads(b"".join(message.get("body", b"") for message in self.sent))
        return self.sent[0]["status"], document.get("error", {}).get("code")


async def ask(app: ASGIApp, key: str | None, size: int) -> tuple[int, str | None]:
    upload = Upload(app, key, size)
    upload.finish.set()
    await upload.run()
    return upload.outcome


REFUSED = (503, "too_many_bytes")
DONE = (200, None)


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize("key", [None, "ann"])
async def test_unfinished_bodies_of_one_client_leave_room_for_others(key: str | None) -> None:
    app = make_app(FakeNode(), Access(keys=KEYS if key else ()))
    unfinished = Upload(app, key, LARGE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(unfinished.run)
        await unfinished.began.wait()
        assert await ask(app, key, LARGE) == REFUSED
        assert await ask(app, key, 2) == DONE
        if key is not None:
            assert await ask(app, "ben", LARGE) == DONE
        unfinished.finish.set()
    assert unfinished.outcome == DONE
    assert await ask(app, key, LARGE) == DONE


@pytest.mark.usefixtures("_small_limits")
async def test_bodies_of_all_clients_are_bounded_and_small_ones_admitted() -> None:
    app = make_app(FakeNode(), Access(keys=KEYS))
    unfinished = [Upload(app, name, LARGE - 1000) for name in NAMES[:4]]
    async with trio.open_nursery() as nursery:
        for upload in unfinished:
            nursery.start_soon(upload.run)
            await upload.began.wait()
        assert await ask(app, "eve", LARGE) == REFUSED
        assert await ask(app, "eve", guard.SMALL_BODY_BYTES // 2) == DONE
        for upload in unfinished:
            upload.finish.set()
    assert [upload.outcome for upload in unfinished] == [DONE] * 4
    assert await ask(app, "eve", LARGE) == DONE


@pytest.mark.usefixtures("_small_limits")
async def test_parsed_body_is_counted_no_longer() -> None:
    node = FakeNode(submitter=FakeSubmitter(hang=True))
    app = make_app(node, Access())
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            node.submitter.entered = trio.Event()
            nursery.start_soon(ask, app, None, LARGE)
            with trio.fail_after(5):
                await node.submitter.entered.wait()
        nursery.cancel_scope.cancel()


async def test_parsed_body_is_out_of_memory() -> None:
    node = FakeNode(submitter=FakeSubmitter(hang=True))
    size = 4 << 20
    tracemalloc.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, make_app(node, Access()), None, size)
            await node.submitter.entered.wait()
            in_memory, _ = tracemalloc.get_traced_memory()
            nursery.cancel_scope.cancel()
    finally:
        tracemalloc.stop()
    assert in_memory < size / 2
