"""The end of a node, and what it forgets while it runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
import trio
from starlette.types import Message
from trio.testing import MockClock

from node.api.access import Access
from node.api.application import make_app
from node.app import DRAIN_LIMIT_S, END_LIMIT_S, RETENTION_INTERVAL_S, Node, _retention_loop
from node.storage.database import open_database
from node.storage.history import HistoryStore
from protocol.limits import MAX_OBSERVATION_AGE_S
from tests.support.job_peers import open_swarm
from tests.support.observations import NOW_S, signed
from tests.unit.api.fakes import FakeNode


async def test_stream_that_outlives_the_drain_ends_with_an_error(virtual_clock: MockClock) -> None:
    sent: list[Message] = []
    body = {"model": "fake", "prompt": "3 1 4", "max_tokens": 500, "stream": True}
    messages: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    begun = trio.Event()

    async def receive() -> Message:
        if not messages:
            await trio.sleep_forever()
        return messages.pop()

    async def send(message: Message) -> None:
        sent.append(message)
        begun.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=1.0)
        await swarm.settle()
        swarm_parts = SimpleNamespace(membership=peer.membership, announcer=AsyncMock(), replicator=AsyncMock())
        parts = SimpleNamespace(
            client=SimpleNamespace(coordinator=peer.coordinator),
            serving=SimpleNamespace(stages=peer.stages),
            swarm=swarm_parts,
        )
        app = make_app(FakeNode(submitter=cast("Any", peer.coordinator)), Access())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app, scope, receive, send)
            await begun.wait()
            with trio.fail_after(DRAIN_LIMIT_S + END_LIMIT_S):
                await Node.drain(cast("Any", SimpleNamespace(_parts=parts)))
    *_, last, end = (message["body"] for message in sent if message["type"] == "http.response.body")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "node_leaving"
    assert end == b"", "the answer is whole"
    assert peer.held()[0] == 0, "its session was closed"


async def test_clock_that_no_peer_confirms_does_not_prune_the_history_by_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, virtual_clock: MockClock
) -> None:
    monkeypatch.setattr("node.app.time.time", lambda: NOW_S + MAX_OBSERVATION_AGE_S + 86_400.0)
    confirmed = False
    async with open_database(tmp_path / "history") as database, trio.open_nursery() as nursery:
        history = HistoryStore(database)
        await history.add_many([signed(number) for number in range(3)])
        nursery.start_soon(_retention_loop, history, lambda: confirmed)
        await trio.sleep(10 * RETENTION_INTERVAL_S)
        assert (await history.digest()).count == 3
        confirmed = True
        await trio.sleep(2 * RETENTION_INTERVAL_S)
        assert (await history.digest()).count == 0
        nursery.cancel_scope.cancel()
