"""The end of a node, its API keys, and what it forgets while it runs."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import httpx
import pytest
import trio
import trio.testing
from starlette.types import Message
from trio.testing import MockClock

from node.api.access import Access
from node.api.application import make_app
from node.app import (
    DRAIN_LIMIT_S,
    END_LIMIT_S,
    READY_INTERVAL_S,
    RETENTION_INTERVAL_S,
    Node,
    _keys,
    _on_signals,
    _ready_file,
    _reload_keys,
    _retention_loop,
)
from node.config import READY_FILE, NodeConfig, NodeReady, hash_api_key, read_api_keys
from node.storage.database import open_database
from node.storage.history import HistoryStore
from protocol.identity import peer_id_from_public_key
from protocol.limits import MAX_OBSERVATION_AGE_S
from tests.support.job_peers import open_swarm
from tests.support.observations import NOW_S, signed
from tests.unit.api.fakes import FakeNode, serve_node


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


async def test_join_commands_and_ready_file_follow_the_addresses(tmp_path: Path, virtual_clock: MockClock) -> None:
    peer = peer_id_from_public_key(bytes(32))
    network = SimpleNamespace(peer_id=peer, multiaddrs=(f"/ip4/192.168.1.5/tcp/4001/p2p/{peer}",))
    node = object.__new__(Node)
    vars(node).update(
        _config=NodeConfig(data_dir=tmp_path, cache_dir=tmp_path),
        _parts=SimpleNamespace(network=SimpleNamespace(network=network)),
        _view=SimpleNamespace(api_url="http://127.0.0.1:8642"),
        _is_ready=True,
    )
    async with _ready_file(node.ready, tmp_path):
        assert NodeReady.read(tmp_path) == node.ready()
        network.multiaddrs = (f"/ip4/10.7.7.7/tcp/4001/p2p/{peer}",)
        await trio.sleep(2 * READY_INTERVAL_S)
        found = NodeReady.read(tmp_path)
        assert found is not None
        assert found.multiaddrs == network.multiaddrs
        commands = node._join_commands(None)
        assert network.multiaddrs[0] in str(commands["here"])
        assert network.multiaddrs[0] in str(commands["elsewhere"])
    assert not (tmp_path / READY_FILE).exists()


async def test_sighup_revokes_and_admits_api_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {name: f"{name} {hash_api_key(name)}\n" for name in ("saffron", "cumin")}
    file = tmp_path / "api.keys"
    file.write_text(lines["saffron"])
    config = NodeConfig(
        data_dir=tmp_path, cache_dir=tmp_path, api_key="sesame", api_keys=read_api_keys(file), api_keys_file=file
    )
    access = Access(keys=_keys(config))
    ended = trio.Event(), trio.Event()
    async with (
        serve_node(FakeNode(), access=access) as url,
        httpx.AsyncClient(base_url=url) as client,
        trio.open_nursery() as nursery,
    ):

        async def statuses() -> list[int]:
            answers = [
                await client.get("/swarm/status", headers={"Authorization": f"Bearer {key}"})
                for key in ("sesame", "saffron", "cumin")
            ]
            return [answer.status_code for answer in answers]

        await nursery.start(_on_signals, *ended, partial(_reload_keys, config, access), nursery.cancel_scope)
        assert await statuses() == [200, 200, 401]
        file.write_text(lines["cumin"])
        os.kill(os.getpid(), signal.SIGHUP)
        with trio.fail_after(5):
            while await statuses() != [200, 401, 200]:
                await trio.testing.wait_all_tasks_blocked()
        for text in ("nonsense\n", "# none\n", lines["cumin"] * 2):
            file.write_text(text)
            await _reload_keys(config, access)
            assert await statuses() == [200, 401, 200]
        file.unlink()
        await _reload_keys(config, access)
        assert await statuses() == [200, 401, 200]
        assert not ended[0].is_set()
        nursery.cancel_scope.cancel()
    log = capsys.readouterr().out
    assert log.count("API keys not reloaded") == 4
    assert "line 1: expected NAME SHA256" in log


@pytest.mark.parametrize("ends_with_terminal", [True, False])
async def test_sighup_drains_a_node_in_a_terminal_only(
    ends_with_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.app._ends_with_terminal", lambda: ends_with_terminal)
    config = NodeConfig(data_dir=tmp_path, cache_dir=tmp_path)
    asked, is_ready = trio.Event(), trio.Event()
    is_ready.set()
    hangups = 0

    async def reload() -> None:
        nonlocal hangups
        await _reload_keys(config, Access())
        hangups += 1

    async with trio.open_nursery() as nursery:
        await nursery.start(_on_signals, asked, is_ready, reload, nursery.cancel_scope)
        for count in (1, 2):  # a terminal that hangs up may send several
            os.kill(os.getpid(), signal.SIGHUP)
            with trio.fail_after(5):
                while not asked.is_set() and hangups < count:
                    await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert asked.is_set() == ends_with_terminal
        assert not nursery.cancel_scope.cancel_called, "it drains, and does not exit at once"
        nursery.cancel_scope.cancel()
