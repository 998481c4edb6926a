"""What a library fetches, and by whose will."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from node.models import eviction, library
from node.models.blobs import BlobServer
from node.models.catalogue import CATALOGUE, CatalogueEntry
from node.models.errors import ModelError
from node.models.importer import import_model
from node.models.library import MANIFEST_POLL_S, Library
from node.models.parts import Selection
from node.models.store import ModelStore, Package
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.blobs import PROTOCOL_ID
from protocol.identity import BlockRange, ModelId, PeerId, peer_id_from_public_key
from tests.support.hub_server import HubServer, status
from tests.unit.models.checkpoints import write_checkpoint
from tests.unit.models.vocabularies import byte_level


@dataclass
class Served:
    """A swarm in which one peer serves some models."""

    peer: PeerId
    models: list[ModelId] = field(default_factory=list)

    def served_models(self) -> tuple[ModelId, ...]:
        return tuple(self.models)

    async def providers(self, model: ModelId) -> tuple[PeerId, ...]:
        return (self.peer,) if model in self.models else ()

    async def holders(self, sha256: str) -> tuple[PeerId, ...]:
        return ()


@pytest.fixture
def theirs(tmp_path: Path) -> Package:
    """A package that a peer made up and serves."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder)
    (folder / "tokenizer.json").write_text(byte_level())
    return import_model(str(folder), ModelStore(tmp_path / "theirs"))


@asynccontextmanager
async def joined(tmp_path: Path, theirs: Package) -> AsyncIterator[tuple[Library, ModelStore, Served]]:
    """Run a library whose only peer serves the package."""
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.0))
    mine, other = (hub.network(peer_id_from_public_key(bytes([number]) * 32)) for number in (1, 2))
    other.set_stream_handler(PROTOCOL_ID, BlobServer(ModelStore(tmp_path / "theirs")).handle)
    swarm = Served(other.peer_id, [theirs.model_id])
    store = ModelStore(tmp_path / "mine")
    async with mine.running(), other.running(), trio.open_nursery() as nursery:
        await mine.connect(other.multiaddrs[0])
        found = Library(store, mine, swarm)
        nursery.start_soon(found.run)
        yield found, store, swarm
        nursery.cancel_scope.cancel()


async def test_unnamed_models_of_peers_are_not_fetched(
    tmp_path: Path, theirs: Package, virtual_clock: MockClock
) -> None:
    async with joined(tmp_path, theirs) as (found, store, _):
        await trio.sleep(20 * MANIFEST_POLL_S)
        assert store.list() == ()
        assert not found.transfers().received_bytes
        assert not (tmp_path / "mine" / "models").exists()


@pytest.mark.parametrize("by", ["local name", "catalogue"])
async def test_manifest_of_named_model_is_fetched_from_serving_peer(
    by: str, tmp_path: Path, theirs: Package, virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "local name":
        ModelStore(tmp_path / "mine").set_name("ours", theirs.model_id)
    else:
        entry = next(iter(CATALOGUE.values()))
        values = {name: getattr(entry, name) for name in CatalogueEntry.__slots__}
        monkeypatch.setattr(library, "CATALOGUE", {"ours": CatalogueEntry(**{**values, "model_id": theirs.model_id})})
    async with joined(tmp_path, theirs) as (_, store, _):
        while not store.list():
            await trio.sleep(MANIFEST_POLL_S)
        [package] = store.list()
        assert package.model_id == theirs.model_id
        assert set(package.missing()) == set(package.manifest.files), "only the manifest"


async def test_damaged_manifest_is_fetched_again(tmp_path: Path, theirs: Package) -> None:
    damaged = ModelStore(tmp_path / "mine").add_manifest(theirs.manifest)
    (damaged.path / "manifest.json").write_bytes(b"{}")
    async with joined(tmp_path, theirs) as (found, store, _):
        with trio.fail_after(60):
            assert await found.manifest(theirs.model_id, use_catalogue=False) == theirs.manifest
        assert (damaged.path / "manifest.json").read_bytes() == theirs.manifest.data
        assert store.get(theirs.model_id).manifest == theirs.manifest


async def test_requests_for_models_of_peers_fill_no_disk(
    tmp_path: Path, theirs: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with joined(tmp_path, theirs) as (found, store, _):
        monkeypatch.setattr(eviction, "MAX_WITHOUT_WEIGHTS", 0)
        with trio.fail_after(60):
            with pytest.raises(ModelError, match="0 models of peers were asked for within minutes: try again later"):
                await found.open(theirs.model_id)
            assert store.list() == ()
            monkeypatch.setattr(eviction, "MAX_WITHOUT_WEIGHTS", 1)
            assert (await found.open(theirs.model_id)).id == theirs.model_id


async def test_concurrent_opens_of_a_model_load_it_once(tmp_path: Path, theirs: Package) -> None:
    async with joined(tmp_path, theirs) as (found, store, _):
        names: list[str] = []

        async def ask() -> None:
            known = await found.open(theirs.model_id[:16])
            names.append(known.name)
            assert await known.tokenizer.encode("fox")

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask)
        assert len(names) == 5
        assert len(found._tokenizers.pids()) == 1
        assert {file.name for file in store.get(theirs.model_id).missing()}.isdisjoint({"tokenizer.json"})


async def test_open_model_that_another_process_evicts_is_fetched_again(tmp_path: Path, theirs: Package) -> None:
    async with joined(tmp_path, theirs) as (found, store, _):
        with trio.fail_after(60):
            await found.open(theirs.model_id)
            ModelStore(tmp_path / "mine").remove(theirs.model_id)
            known = await found.open(theirs.model_id)
            assert {file.name for file in store.get(known.id).missing()}.isdisjoint({"tokenizer.json"})
            assert await known.tokenizer.encode("fox")
            assert await found.open(theirs.model_id) is known


async def test_failed_open_fails_all_concurrent_callers(tmp_path: Path, theirs: Package) -> None:
    async with joined(tmp_path, theirs) as (found, _, swarm):
        swarm.models.clear()
        failed = 0

        async def ask() -> None:
            nonlocal failed
            with pytest.raises(ModelError, match="no peer has the manifest"):
                await found.open(theirs.model_id)
            failed += 1

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(ask)
        assert failed == 3


def publish(hub: HubServer) -> str:
    """Put the model that the peer serves into a hub, too; return the repository."""
    folder = write_checkpoint(hub.folder / "Somebody" / "Tiny")
    (folder / "tokenizer.json").write_text(byte_level())
    return "Somebody/Tiny"


async def test_blocks_that_no_peer_has_come_from_hub_of_the_import(
    hub: HubServer, tmp_path: Path, theirs: Package
) -> None:
    mine = import_model(publish(hub), ModelStore(tmp_path / "mine"), wanted=Selection(blocks=BlockRange(0, 1)))
    assert mine.model_id == theirs.model_id
    async with joined(tmp_path, theirs) as (found, store, swarm):
        swarm.models.clear()
        with pytest.raises(ModelError, match="no peer is known to have it"):
            await found.weights(mine.manifest, BlockRange(1, 2), use_catalogue=False)
        package = await found.weights(mine.manifest, BlockRange(1, 2), use_catalogue=True)
    assert package.missing(BlockRange(0, 2)) == ()
    assert package.manifest.blocks[2] in package.missing()
    assert store.verify(package.model_id).corrupt == ()


async def test_download_from_busy_hub_is_cancelled_at_once(hub: HubServer, tmp_path: Path, theirs: Package) -> None:
    mine = import_model(publish(hub), ModelStore(tmp_path / "mine"), wanted=Selection(blocks=BlockRange(0, 1)))
    hub.cdn_faults += [status(503, Retry_After="60")] * 100
    async with joined(tmp_path, theirs) as (found, _, swarm):
        swarm.models.clear()
        with trio.fail_after(30), trio.move_on_after(0.5) as cancelled:
            await found.weights(mine.manifest, BlockRange(1, 3), use_catalogue=True)
    assert cancelled.cancelled_caught
    assert 0 < len(hub.cdn_faults) < 100
