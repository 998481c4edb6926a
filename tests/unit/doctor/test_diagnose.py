"""Every fault of a diagnosis, staged with real sockets, real files and real hosts."""

import fcntl
import os
import random
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from node.config import LOCK_FILE, NodeConfig, ServeSpec
from node.doctor import local_checks, swarm_checks
from node.doctor.diagnose import diagnose
from node.doctor.report import Consequence, Diagnosis, Fault, RunningNode
from node.identity import Identity, load_or_create
from node.models.files import MIN_FREE_BYTES
from node.models.importer import import_model
from node.models.store import ModelStore
from node.network import probe_port
from node.network.host import Libp2pNetwork
from node.stages.memory_admission import span_bytes_for
from node.storage.database import DATABASE_FILE, open_database
from node.storage.history import HistoryStore
from node.swarm.dht_records import RecordKinds
from node.swarm.heartbeats import OwnServices
from node.swarm.membership import Membership
from protocol.announcements import ServedSpan
from protocol.identity import BlockRange, ModelId
from protocol.messages import Load
from protocol.sync import PROTOCOL_ID
from tests.support.observations import signed
from tests.unit.api.fakes import FakeNode
from tests.unit.models.checkpoints import write_checkpoint

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
MODEL = ModelId("5a" * 32)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on silent ports sooner than on a real network, and wait for no heartbeats after the first."""
    monkeypatch.setattr(probe_port, "PROBE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(swarm_checks, "AFTER_FIRST_S", 0.0)


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    (tmp_path / "data").mkdir()
    return NodeConfig(
        data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", listen=(LOOPBACK,), api_port=0, bootstrap=()
    )


@asynccontextmanager
async def peer(
    number: int,
    *,
    seed: bytes | None = None,
    swarm_key: str | None = None,
    spans: Sequence[tuple[int, int]] = (),
    agent: str = "metaswarm/0.1.0",
    speaks: str = PROTOCOL_ID,
) -> AsyncIterator[str]:
    """Run a host with a real membership; give its address."""
    identity = Identity(seed or number.to_bytes(32, "big"))
    network = Libp2pNetwork(identity.seed, listen=[LOOPBACK], swarm_key=swarm_key)

    async def serve(stream: Any) -> None:
        await stream.receive_some()

    network.set_stream_handler(speaks, serve)
    served = tuple(ServedSpan(model=MODEL, blocks=BlockRange(*span), load=Load()) for span in spans)
    membership = Membership(
        network=network,
        identity=identity,
        services=OwnServices(agent=agent, served_spans=lambda: served),
        bootstrap=(),
        records=RecordKinds(network),
        jitter=random.Random(number),
    )
    async with network.running(), trio.open_nursery() as nursery:
        nursery.start_soon(membership.run)
        yield network.multiaddrs[0]
        nursery.cancel_scope.cancel()


def closed_address() -> str:
    """Return an address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity(bytes(32)).peer_id}"


@asynccontextmanager
async def listener(serve: Callable[[trio.SocketStream], Any]) -> AsyncIterator[str]:
    """Run a TCP server; give its address, as if a node were there."""
    async with trio.open_nursery() as nursery:
        (served,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = served.socket.getsockname()[1]
        yield f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity(bytes(32)).peer_id}"
        nursery.cancel_scope.cancel()


def only(found: Diagnosis) -> tuple[Fault, Consequence]:
    """Return the one grave finding; its line names what to do."""
    (finding,) = [finding for finding in found.findings if finding.grave]
    assert "\n" not in str(finding)
    assert not found.healthy
    return finding.fault, finding.consequence


def running(**changes: Any) -> RunningNode:
    untried = {"reachability": {**FakeNode().status_document()["reachability"], "verdict": "unknown"}}
    return RunningNode({**FakeNode().status_document(), **untried, **changes}, ())  # type: ignore[typeddict-item]  # fields of the same document


async def test_healthy_node_has_no_findings(config: NodeConfig) -> None:
    async with peer(1, spans=[(0, 4)]) as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,)))
    assert found.findings == []
    assert len(found.peers) == 1


async def test_closed_port_of_bootstrap_peer(config: NodeConfig) -> None:
    found = await diagnose(replace(config, bootstrap=(closed_address(),)))
    assert only(found) == (Fault.CLOSED_PORT, Consequence.JOIN)


async def test_closed_port_of_this_node(config: NodeConfig) -> None:
    found = await diagnose(config, running(multiaddrs=[closed_address()], connected_peers=1))
    assert only(found) == (Fault.CLOSED_PORT, Consequence.REACH)


@pytest.mark.parametrize(("theirs", "ours"), [("ab" * 32, "cd" * 32), ("ab" * 32, None), (None, "cd" * 32)])
async def test_wrong_swarm_key(config: NodeConfig, theirs: str | None, ours: str | None) -> None:
    async with peer(1, swarm_key=theirs) as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,), swarm_key=ours))
    assert only(found) == (Fault.WRONG_SWARM_KEY, Consequence.JOIN)


async def test_right_swarm_key_is_healthy(config: NodeConfig) -> None:
    async with peer(1, swarm_key="ab" * 32) as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,), swarm_key="ab" * 32))
    assert found.findings == []


@pytest.mark.parametrize("ahead_s", [-600, 600])
async def test_clock_off(config: NodeConfig, ahead_s: float) -> None:
    async with peer(1) as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,)), wall_clock=lambda: time.time() + ahead_s)
    assert only(found) == (Fault.CLOCK_OFF, Consequence.JOIN)
    assert ("ahead" if ahead_s > 0 else "behind") in found.findings[0].message


async def test_missing_block(config: NodeConfig) -> None:
    async with peer(1, spans=[(0, 2), (3, 4)]) as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,)))
    assert only(found) == (Fault.MISSING_BLOCK, Consequence.MODEL)
    assert f"--serve {MODEL[:16]}:2-3" in found.findings[0].message


async def test_no_memory(config: NodeConfig, tmp_path: Path) -> None:
    package = import_model(str(write_checkpoint(tmp_path / "checkpoint")), ModelStore(config.cache_dir))
    spec = ServeSpec(package.model_id, BlockRange(0, 2))
    needed = span_bytes_for(package.manifest, BlockRange(0, 2))
    found = await diagnose(replace(config, serve=(spec,), memory_bytes=needed // 16))
    assert only(found) == (Fault.NO_MEMORY, Consequence.SERVE)
    assert f"give the node --memory {needed >> 20}MiB, or fewer blocks" in found.findings[0].message
    assert (await diagnose(replace(config, serve=(spec,), memory_bytes=needed))).healthy


async def test_blocks_beyond_model_are_one_finding(config: NodeConfig, tmp_path: Path) -> None:
    package = import_model(str(write_checkpoint(tmp_path / "checkpoint")), ModelStore(config.cache_dir))
    spec = ServeSpec(package.model_id, BlockRange(0, package.manifest.block_count + 1))
    found = await diagnose(replace(config, serve=(spec,), memory_bytes=1))
    assert only(found) == (Fault.MISSING_BLOCK, Consequence.START)


async def test_no_device(config: NodeConfig) -> None:
    found = await diagnose(replace(config, device="cuda:99"))
    assert only(found) == (Fault.NO_DEVICE, Consequence.START)
    assert "there is no cuda:99 device" in found.findings[0].message


async def test_build_of_llamacpp_is_told(config: NodeConfig) -> None:
    found = await diagnose(config)
    assert found.llamacpp is not None
    assert re.fullmatch(r"xllamacpp [\d.+a-z]+ for .*CPU \([A-Z0-9_, ]+\).*", found.llamacpp)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sys.exit('xllamacpp needs libgomp.so.1 of the operating system: install it')", "install it"),
        ("os.kill(os.getpid(), 11)", "pip install --force-reinstall xllamacpp"),
    ],
)
async def test_unusable_llamacpp_is_grave_where_it_may_serve(
    config: NodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str
) -> None:
    monkeypatch.setattr(local_checks, "LLAMACPP_BUILD", (sys.executable, "-c", f"import os, sys; {line}"))
    found = await diagnose(replace(config, serve=(ServeSpec(MODEL),)))
    [unusable] = [each for each in found.findings if each.fault is Fault.NO_LLAMACPP]
    assert unusable.grave
    assert expected in unusable.message
    assert found.llamacpp is None
    other = import_model(str(write_checkpoint(tmp_path / "checkpoint")), ModelStore(config.cache_dir))
    found = await diagnose(replace(config, serve=(ServeSpec(other.model_id),)))
    assert found.healthy
    assert Fault.NO_LLAMACPP in {each.fault for each in found.findings}


async def test_version_apart(config: NodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_checks, "OBSERVE_S", 1.0)  # a heartbeat that never comes
    async with listener_of_another_version() as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,)))
    assert only(found) == (Fault.VERSION_APART, Consequence.JOIN)


@asynccontextmanager
async def listener_of_another_version() -> AsyncIterator[str]:
    network = Libp2pNetwork(bytes(31) + b"\x01", listen=[LOOPBACK])
    async with network.running():
        yield network.multiaddrs[0]


async def test_other_release_is_a_note(config: NodeConfig) -> None:
    async with peer(1, agent="metaswarm/7.3.0") as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,)))
    assert [(finding.fault, finding.grave) for finding in found.findings] == [(Fault.VERSION_APART, False)]


async def test_bootstrap_dead(config: NodeConfig) -> None:
    async def say_nothing(stream: trio.SocketStream) -> None:
        async with stream:
            await trio.sleep_forever()

    async with listener(say_nothing) as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,)))
    assert only(found) == (Fault.BOOTSTRAP_DEAD, Consequence.JOIN)


async def test_one_dead_bootstrap_peer_of_two_is_a_note(config: NodeConfig) -> None:
    async with peer(1) as bootstrap:
        found = await diagnose(replace(config, bootstrap=(closed_address(), bootstrap)))
    assert found.healthy
    assert [finding.fault for finding in found.findings] == [Fault.CLOSED_PORT]


async def test_missing_bootstrap_peer_is_a_note(config: NodeConfig) -> None:
    found = await diagnose(config)
    assert found.healthy
    assert [finding.fault for finding in found.findings] == [Fault.NO_BOOTSTRAP]


async def test_wrong_peer_at_bootstrap_address(config: NodeConfig) -> None:
    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with listener(refuse) as bootstrap:
        found = await diagnose(replace(config, bootstrap=(bootstrap,)))
    assert only(found) == (Fault.WRONG_PEER, Consequence.JOIN)
    async with peer(1) as bootstrap:
        moved = f"{bootstrap.rpartition('/')[0]}/{Identity(bytes(32)).peer_id}"
        found = await diagnose(replace(config, bootstrap=(moved,)))
    assert only(found) == (Fault.WRONG_PEER, Consequence.JOIN)


async def test_corrupt_model_file(config: NodeConfig, tmp_path: Path) -> None:
    package = import_model(str(write_checkpoint(tmp_path / "checkpoint")), ModelStore(config.cache_dir))
    path = package.path_of(package.manifest.blocks[1])
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = await diagnose(replace(config, serve=(ServeSpec(package.model_id),)))
    assert only(found) == (Fault.CORRUPT_FILE, Consequence.SERVE)
    assert package.manifest.blocks[1].name in found.findings[0].message
    assert (await diagnose(replace(config, serve=(ServeSpec(package.model_id, BlockRange(0, 1)),)))).healthy


async def test_corrupt_database(config: NodeConfig) -> None:
    path = config.data_dir / DATABASE_FILE
    async with open_database(path) as database:
        await HistoryStore(database).add_many([signed(number) for number in range(50)])
    os.truncate(path, path.stat().st_size - 1000)
    assert only(await diagnose(config)) == (Fault.CORRUPT_FILE, Consequence.SERVE)


async def test_corrupt_manifest(config: NodeConfig, tmp_path: Path) -> None:
    package = import_model(str(write_checkpoint(tmp_path / "tiny")), ModelStore(config.cache_dir))
    (package.path / "manifest.json").write_text("{}")
    found = await diagnose(replace(config, serve=(ServeSpec("tiny"),)))
    assert only(found) == (Fault.CORRUPT_FILE, Consequence.SERVE)


async def test_corrupt_key(config: NodeConfig) -> None:
    (config.data_dir / "peer.key").write_text("ab")
    (config.data_dir / "peer.key").chmod(0o600)
    assert only(await diagnose(config)) == (Fault.CORRUPT_FILE, Consequence.START)


async def test_relay_only(config: NodeConfig) -> None:
    relayed = f"{closed_address()}/p2p-circuit/p2p/{Identity(b'1' * 32).peer_id}"
    found = await diagnose(config, running(multiaddrs=[relayed], connected_peers=1))
    assert only(found) == (Fault.RELAY_ONLY, Consequence.REACH)


async def test_name_taken_directory(config: NodeConfig) -> None:
    with (config.data_dir / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = await diagnose(config)
    assert only(found) == (Fault.NAME_TAKEN, Consequence.START)


async def test_directory_that_cannot_be_made(config: NodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (config.data_dir / "file").touch()
    found = await diagnose(replace(config, data_dir=config.data_dir / "file" / "sub" / "data"))
    assert only(found) == (Fault.NAME_TAKEN, Consequence.START)
    assert f"{config.data_dir / 'file'} is not a folder" in found.findings[0].message
    closed, access = config.data_dir, os.access  # by its mode, to others than root
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (path == closed and mode & os.W_OK))
    found = await diagnose(replace(config, data_dir=closed / "sub" / "data"))
    assert only(found) == (Fault.NAME_TAKEN, Consequence.START)
    assert f"{closed} is not writable, so {closed / 'sub' / 'data'} cannot be made" in found.findings[0].message


async def test_cache_folder_that_cannot_be_made(config: NodeConfig) -> None:
    config.cache_dir.touch()
    found = await diagnose(replace(config, cache_dir=config.cache_dir / "sub"))
    (finding,) = [each for each in found.findings if each.fault is Fault.NAME_TAKEN]
    assert f"{config.cache_dir} is not a folder, so {config.cache_dir / 'sub'} cannot be made" in finding.message
    assert not finding.grave, "nothing is to be served"


async def test_disk_without_room_for_missing_blocks(
    config: NodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = import_model(str(write_checkpoint(tmp_path / "tiny")), ModelStore(config.cache_dir))
    package.path_of(package.manifest.head).unlink()
    monkeypatch.setattr("node.models.files.shutil.disk_usage", lambda _: SimpleNamespace(free=MIN_FREE_BYTES))
    found = await diagnose(replace(config, serve=(ServeSpec("tiny", BlockRange(0, 3)),)))
    assert only(found) == (Fault.DISK_FULL, Consequence.SERVE)


async def test_name_taken_port(config: NodeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = await diagnose(replace(config, listen=(f"/ip4/127.0.0.1/tcp/{port}",)))
        assert only(found) == (Fault.NAME_TAKEN, Consequence.START)
        found = await diagnose(replace(config, api_port=port))
        assert only(found) == (Fault.NAME_TAKEN, Consequence.START)


async def test_name_taken_identity(config: NodeConfig) -> None:
    copied = load_or_create(config.data_dir).seed
    async with peer(1, seed=copied) as elsewhere:
        found = await diagnose(replace(config, bootstrap=(elsewhere,)))
    assert only(found) == (Fault.NAME_TAKEN, Consequence.JOIN)


async def test_sorts_findings_by_consequence(config: NodeConfig) -> None:
    (config.data_dir / "peer.key").write_text("ab")
    (config.data_dir / "peer.key").chmod(0o600)
    found = await diagnose(replace(config, bootstrap=(closed_address(),)))
    assert [finding.consequence for finding in found.findings] == [Consequence.START, Consequence.JOIN]


async def test_changes_nothing(config: NodeConfig) -> None:
    await diagnose(config)
    assert list(config.data_dir.iterdir()) == []
