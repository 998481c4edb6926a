"""Another implementation of libp2p, with scripts written from docs/protocol.md alone, is a peer of the swarm."""

import hashlib
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from node.models.store import Package
from protocol.sync import PROTOCOL_ID as SYNC
from tests.process.daemons import Daemon, StartDaemon, until
from tests.process.test_history import observations

FOLDER = Path(__file__).parent
STEP_TIMEOUT_S = 75


class JsPeer:
    """The running script: what it finds out, step by step."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._read = b""

    async def step(self, name: str) -> dict[str, Any]:
        """Return what it tells of its next step, which is of this name."""
        assert self._process.stdout is not None
        with trio.fail_after(STEP_TIMEOUT_S):
            while b"\n" not in self._read:
                data = await self._process.stdout.receive_some()
                assert data, f"the js peer ended before it was {name}: its standard error says why"
                self._read += data
        line, _, self._read = self._read.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        assert told.pop("step") == name
        return told


@asynccontextmanager
async def js_peer(node_js: str, daemon: Daemon, model: str) -> AsyncIterator[JsPeer]:
    command = [node_js, str(FOLDER / "peer.mjs"), daemon.multiaddr, model]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    try:
        yield JsPeer(process)
        await process.stdin.aclose()
        with trio.fail_after(STEP_TIMEOUT_S):
            assert await process.wait() == 0
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.kill()
                await process.wait()
            await process.stdin.aclose()
            assert process.stdout is not None
            await process.stdout.aclose()


async def test_js_libp2p_is_a_peer_of_the_swarm(
    node_js: str, package: Package, start_swarm: Callable[..., Awaitable[list[Daemon]]], start_daemon: StartDaemon
) -> None:
    [daemon] = await start_swarm("0-30")
    neighbour = await start_daemon("--bootstrap", daemon.multiaddr)
    model = package.model_id
    for _ in range(2):
        await daemon.complete(prompt="Once", max_tokens=1)
    async with js_peer(node_js, daemon, model) as peer:
        own_id = (await peer.step("connected"))["peer_id"]
        assert SYNC in (await peer.step("identified"))["protocols"]

        # Its records in the DHT: verified, and decoded into what the daemon measured.
        capability = await peer.step("capability")
        assert capability["signer"] == daemon.peer_id
        assert capability["capabilities"]["processor"]["logical_cores"] >= 1
        assert capability["capabilities"]["processor"]["throughput"]["fp32_flop_per_s"] > 0
        history = await peer.step("history")
        assert history["signer"] == daemon.peer_id
        assert 0 <= (await peer.step("pinged"))["round_trip_ms"] < 1000 * STEP_TIMEOUT_S
        heartbeat = await peer.step("heartbeat")
        assert heartbeat["signer"] in {daemon.peer_id, neighbour.peer_id}

        # Its protocols.
        assert (await peer.step("greeted"))["agent"].startswith("metaswarm/")
        fetched = await peer.step("manifest")
        assert fetched["absent"]
        assert hashlib.sha256(fetched["manifest"].encode()).hexdigest() == model

        # What a job cost comes by gossip, countersigned by the stage.
        await peer.step("listening")
        await daemon.complete(prompt="Once upon", max_tokens=3, metaswarm={"ignore_eos": True})
        heard = await peer.step("observation")
        assert heard["observer"] == daemon.peer_id
        assert heard["model"] == model
        assert heard["workload"]["completion_tokens"] == 3
        assert heard["countersigned"]
        assert bytes.fromhex(heard["id"]) in observations(daemon)

        # It makes its history and the daemon's equal, and both hold what either had.
        synchronised = await peer.step("synchronised")
        assert synchronised["equal"]
        assert synchronised["taken"] == 1
        assert synchronised["received"] == 3
        assert {bytes.fromhex(one) for one in synchronised["ids"]} == observations(daemon)
        assert bytes.fromhex(synchronised["own"]) in observations(daemon)

        # What it publishes is taken by the daemon, and reaches a peer that it is not connected to.
        published = bytes.fromhex((await peer.step("published"))["own"])

        async def everybody_has_it() -> bool:
            return published in observations(daemon) & observations(neighbour)

        await until(everybody_has_it)

        # The daemon stores its record, and gives it back.
        assert (await peer.step("described"))["model"] == "in the DHT"
        assert own_id in {one["peer_id"] for one in (await daemon.get("/swarm/peers"))["peers"]}
