"""What a node sees to before it starts: who may read what it keeps, and whether the memory it is promised is there."""

import os
import socket
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from node import start_checks
from node.capabilities.probe import total_memory
from node.config import NodeConfig, NodeReady, ServeSpec, StartError
from node.doctor.local_checks import check_files
from node.doctor.report import Fault
from node.engine.device import Device
from node.models.catalogue import CATALOGUE, DEMO_MODEL
from node.models.eviction import in_use
from node.models.files import MIN_FREE_BYTES
from node.models.importer import import_model
from node.models.store import ModelStore
from node.storage.database import open_database
from protocol.capabilities import Accelerator, AcceleratorKind
from protocol.identity import BlockRange, peer_id_from_public_key
from tests.unit.models.checkpoints import write_checkpoint

CPU = Device("cpu", 1 << 30)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def config_in(folder: Path, memory_bytes: int | None = None) -> NodeConfig:
    return NodeConfig(data_dir=folder / "data", cache_dir=folder / "cache", memory_bytes=memory_bytes)


@pytest.fixture(autouse=True)
def open_umask() -> object:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("exists", [False, True])
async def test_data_directory_is_private(tmp_path: Path, exists: bool) -> None:
    config = config_in(tmp_path)
    database = config.data_dir / "metaswarm.sqlite3"
    if exists:  # as an earlier version left it
        config.data_dir.mkdir(mode=0o755)
        async with open_database(database):
            for file in config.data_dir.iterdir():
                file.chmod(0o644)
            (config.data_dir / "metaswarm.sqlite3.damaged-1").touch(mode=0o644)
    with start_checks.own_data_dir(config):
        async with open_database(database):
            ready = NodeReady(peer_id=peer_id_from_public_key(bytes(32)), multiaddrs=(), api_url="", pid=1)
            ready.write(config.data_dir)
            kept = {file.name: mode(file) for file in config.data_dir.iterdir() if file.name != "node.lock"}
            assert {"metaswarm.sqlite3", "metaswarm.sqlite3-wal", "metaswarm.sqlite3-shm", "node.json"} <= kept.keys()
            assert set(kept.values()) == {0o600}
            assert mode(config.data_dir) == 0o700


def test_leaves_mode_of_shared_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    start_checks.keep_private(tmp_path)
    assert mode(tmp_path) == 0o1777


@pytest.mark.parametrize("memory_bytes", [99_999 << 40, total_memory() + 1, 1, 4096])
def test_refuses_memory_limit_out_of_range(tmp_path: Path, memory_bytes: int) -> None:
    fault = start_checks.memory_fault(config_in(tmp_path, memory_bytes), CPU)
    assert fault is not None
    assert fault.startswith("--memory: ")
    assert "\n" not in fault


@pytest.mark.parametrize(("package_format", "refused"), [("gguf", False), ("safetensors", True)])
async def test_memory_of_a_gpu_does_not_limit_what_the_cpu_computes(
    package_format: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_gpu = Device("cuda:0", 1 << 20, Accelerator(kind=AcceleratorKind.CUDA, name="a GPU", memory_bytes=1 << 20))

    async def found(_wanted: str) -> tuple[Device, ...]:
        return (small_gpu,)

    package = SimpleNamespace(manifest=SimpleNamespace(format=package_format), missing=lambda _blocks: ())
    monkeypatch.setattr(start_checks, "find_devices", found)
    monkeypatch.setattr(start_checks, "llamacpp_has_gpu", lambda: False)
    monkeypatch.setattr(ModelStore, "resolve", lambda _store, name: name)
    monkeypatch.setattr(ModelStore, "find", lambda _store, _id: package)
    config = replace(config_in(tmp_path, 1 << 24), listen=(), api_port=0, serve=(ServeSpec("tiny"),))
    if refused:
        with pytest.raises(StartError, match="16 MiB is more than a GPU has, 1 MiB"):
            await start_checks.check_start(config)
    else:
        assert await start_checks.check_start(config) == (small_gpu,)


@pytest.mark.parametrize("memory_bytes", [None, 1 << 20, total_memory()])
def test_accepts_memory_limit(tmp_path: Path, memory_bytes: int | None) -> None:
    assert start_checks.memory_fault(config_in(tmp_path, memory_bytes), CPU) is None


def test_full_disk_at_node_json_is_start_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    ready = NodeReady(peer_id=peer_id_from_public_key(bytes(32)), multiaddrs=(), api_url="", pid=1)
    with pytest.raises(StartError, match=r"cannot write .*node\.json: No space left"):
        ready.write(tmp_path)
    assert not list(tmp_path.iterdir())


async def test_tells_all_that_is_in_the_way_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listen, socket.create_server(("127.0.0.1", 0)) as api:
        port, api_port = listen.getsockname()[1], api.getsockname()[1]
        config = replace(
            config_in(tmp_path, 99_999 << 40),
            listen=(f"/ip4/127.0.0.1/tcp/{port}",),
            api_host="127.0.0.1",
            api_port=api_port,
            serve=(ServeSpec("no-such-model"), ServeSpec("smollm2-135m-instruct")),
            no_catalogue=True,
        )
        with start_checks.own_data_dir(config), pytest.raises(StartError) as caught:
            await start_checks.check_start(config)
    said = str(caught.value)
    for fact in (
        f"port {port} on",
        f"port {api_port} on",
        f"another node uses {config.data_dir}",
        "--memory: ",
        "there is no model 'no-such-model'",
        "cannot serve smollm2-135m-instruct: it is not in",
        "data-2",
    ):
        assert fact in said
    assert "\n" not in said


async def test_names_a_free_value_for_the_one_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as api:
        port = api.getsockname()[1]
        config = replace(config_in(tmp_path), listen=("/ip4/127.0.0.1/tcp/0",), api_port=port)
        with pytest.raises(StartError) as caught:
            await start_checks.check_start(config)
    assert f"port {port} on 127.0.0.1 is taken (--api); free are --api 127.0.0.1:" in str(caught.value)
    assert "--data-dir" not in str(caught.value)


@pytest.mark.parametrize("served", ["tiny", "0123456789abcdef"])
async def test_cache_that_cannot_be_read_is_a_fault(tmp_path: Path, served: str) -> None:
    (tmp_path / "cache").touch()
    config = replace(config_in(tmp_path), listen=("/ip4/127.0.0.1/tcp/0",), api_port=0, device="cpu")
    with pytest.raises(StartError, match=rf"cannot serve {served}: cannot .*cache.*: Not a directory"):
        await start_checks.check_start(replace(config, serve=(ServeSpec(served),)))


async def test_catalogue_model_by_id_has_a_source(tmp_path: Path) -> None:
    config = replace(config_in(tmp_path), listen=("/ip4/127.0.0.1/tcp/0",), api_port=0, device="cpu")
    served = (ServeSpec(CATALOGUE[DEMO_MODEL].model_id[:12]),)
    assert await start_checks.check_start(replace(config, serve=served))
    with pytest.raises(StartError, match="neither peers nor a catalogue"):
        await start_checks.check_start(replace(config, serve=served, no_catalogue=True))


async def test_file_to_serve_must_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    config = replace(config_in(tmp_path), listen=("/ip4/127.0.0.1/tcp/0",), api_port=0, device="cpu")
    with pytest.raises(StartError, match=r"cannot serve m.gguf: .*`metaswarm model import m.gguf`"):
        await start_checks.check_start(replace(config, serve=(ServeSpec("m.gguf"),)))


async def test_cache_must_be_writable_only_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config_in(tmp_path), listen=("/ip4/127.0.0.1/tcp/0",), api_port=0, device="cpu")
    package = import_model(str(write_checkpoint(tmp_path / "tiny")), ModelStore(config.cache_dir))
    package.path_of(package.manifest.blocks[2]).unlink()
    access = os.access  # by its mode, to others than root
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (path == config.cache_dir and mode & os.W_OK)
    )
    assert await start_checks.check_start(replace(config, serve=(ServeSpec("tiny", BlockRange(0, 2)),)))
    for served in (ServeSpec("tiny"), ServeSpec("tiny", BlockRange(1, 3)), ServeSpec("smollm2-135m-instruct")):
        with pytest.raises(StartError, match=r"cache is not writable: no model can be fetched; choose another --cache"):
            await start_checks.check_start(replace(config, serve=(served,)))


async def test_disk_must_have_room_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config_in(tmp_path), listen=("/ip4/127.0.0.1/tcp/0",), api_port=0, device="cpu")
    package = import_model(str(write_checkpoint(tmp_path / "tiny")), ModelStore(config.cache_dir))
    for block in package.manifest.blocks[1:]:
        package.path_of(block).unlink()
    free = MIN_FREE_BYTES + package.manifest.blocks[1].size_bytes
    monkeypatch.setattr("node.models.files.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    for served in (ServeSpec("tiny"), ServeSpec("tiny", BlockRange(0, 1)), ServeSpec("tiny", BlockRange(1, 2))):
        assert await start_checks.check_start(replace(config, serve=(served,)))
    with pytest.raises(StartError, match=r"cannot fetch what is to be served: the package needs .* MiB are free"):
        await start_checks.check_start(replace(config, serve=(ServeSpec("tiny", BlockRange(0, 3)),)))


async def test_files_that_are_evicted_first_count_as_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that is full up to its limit is what eviction is for."""
    config = replace(config_in(tmp_path), listen=("/ip4/127.0.0.1/tcp/0",), api_port=0, device="cpu")
    imported = import_model(str(write_checkpoint(tmp_path / "tiny")), ModelStore(tmp_path / "importer"))
    package = ModelStore(config.cache_dir).add_manifest(imported.manifest)
    blocks = package.manifest.blocks
    for block in blocks[:2]:
        package.path_of(block).write_bytes(imported.path_of(block).read_bytes())
    monkeypatch.setattr("node.models.files.shutil.disk_usage", lambda _: SimpleNamespace(free=MIN_FREE_BYTES))
    config = replace(config, serve=(ServeSpec(package.model_id, BlockRange(1, 2)),))
    package.path_of(blocks[1]).unlink()
    for limit_bytes in (None, 2 * blocks[1].size_bytes + package.manifest.embed.size_bytes):
        with pytest.raises(StartError, match="cannot fetch what is to be served"):
            await start_checks.check_start(replace(config, cache_limit_bytes=limit_bytes))
    config = replace(config, cache_limit_bytes=blocks[1].size_bytes)
    devices = await start_checks.check_start(config)
    assert Fault.DISK_FULL not in {finding.fault for finding in check_files(config, devices, None)}
    with in_use(package, blocks[:1]), pytest.raises(StartError, match="cannot fetch what is to be served"):
        await start_checks.check_start(config)
    assert package.has(blocks[0]), "a check deletes nothing"


async def test_models_that_peers_may_have_are_no_fault(tmp_path: Path) -> None:
    config = replace(config_in(tmp_path), listen=("/ip4/127.0.0.1/tcp/0",), api_port=0, device="cpu")
    served = (ServeSpec("smollm2-135m-instruct"), ServeSpec("0123456789abcdef"))
    assert await start_checks.check_start(replace(config, serve=served))
