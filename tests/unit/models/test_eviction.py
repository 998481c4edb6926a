"""What the files from peers may take on the disk, and which go first."""

import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from node.models import eviction
from node.models.errors import ModelError
from node.models.eviction import RECENT_S, evict_for, evict_packages, in_use, mark_used
from node.models.files import is_unused, part_of, try_lock
from node.models.importer import import_model
from node.models.store import FETCHED_MARK, ModelStore, Package
from protocol.identity import BlockRange
from tests.unit.models.checkpoints import write_checkpoint

FIRST, SECOND, LAST = BlockRange(0, 1), BlockRange(1, 2), BlockRange(2, 3)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


@pytest.fixture
def package(tmp_path: Path, store: ModelStore) -> Package:
    """A package as if its blocks 0 and 1 had come from peers, block 0 last."""
    imported = import_model(str(write_checkpoint(tmp_path / "tiny")), ModelStore(tmp_path / "importer"))
    package = store.add_manifest(imported.manifest)
    for age_s, file in enumerate(package.manifest.blocks[:2]):
        path = package.path_of(file)
        path.write_bytes(imported.path_of(file).read_bytes())
        os.utime(path, (1_000_000 - age_s, 1_000_000 - age_s))
    return package


def files(package: Package, *names: str) -> list[Path]:
    return [package.path / f"{name}.safetensors" for name in names]


def test_eviction_is_least_recently_used_first(store: ModelStore, package: Package) -> None:
    block = package.manifest.blocks[2]
    assert evict_for(store, package, [block], 3 * block.size_bytes) == ()
    assert list(evict_for(store, package, [block], 2 * block.size_bytes)) == files(package, "block-001")
    assert package.has(package.manifest.blocks[0])


def test_files_in_use_or_wanted_are_never_evicted(store: ModelStore, package: Package) -> None:
    _, second, last = package.manifest.blocks[:3]
    with in_use(package, [second]):
        assert list(evict_for(store, package, [last], 2 * last.size_bytes)) == files(package, "block-000")
        with pytest.raises(ModelError, match="raise --cache-limit, or serve fewer blocks"):
            evict_for(store, package, [last], last.size_bytes)
    assert evict_for(store, package, [second], second.size_bytes) == ()
    assert package.has(second)


def test_eviction_deletes_nothing_if_room_is_impossible(store: ModelStore, package: Package) -> None:
    _, second, last = package.manifest.blocks[:3]
    with in_use(package, [second]), pytest.raises(ModelError, match="raise --cache-limit"):
        evict_for(store, package, [last], last.size_bytes)
    assert all(path.exists() for path in files(package, "block-000", "block-001"))


def test_use_of_a_file_updates_its_lru_order(store: ModelStore, package: Package) -> None:
    _, second, last = package.manifest.blocks[:3]
    with in_use(package, [second]):
        pass
    assert list(evict_for(store, package, [last], 2 * last.size_bytes)) == files(package, "block-000")


@pytest.mark.parametrize("is_evicted", [False, True], ids=["looked at", "evicted"])
def test_file_that_another_process_has_locked_for_a_moment_can_be_used_unless_it_is_gone(
    package: Package, monkeypatch: pytest.MonkeyPatch, *, is_evicted: bool
) -> None:
    block = package.manifest.blocks[0]
    path = package.path_of(block)
    handle = os.open(path, os.O_RDONLY)
    assert try_lock(handle)

    def unlock(_: float) -> None:
        if is_evicted:
            path.unlink()
        os.close(handle)

    monkeypatch.setattr(time, "sleep", unlock)
    expected = pytest.raises(ModelError, match="evicted") if is_evicted else nullcontext()
    with expected, in_use(package, [block]):
        assert not is_unused(path)


def test_abandoned_part_file_is_evicted(store: ModelStore, package: Package) -> None:
    block = package.manifest.blocks[2]
    beginning = part_of(package.path_of(package.manifest.embed))
    beginning.write_bytes(bytes(block.size_bytes))
    os.utime(beginning, (1, 1))
    assert evict_for(store, package, [block], 3 * block.size_bytes) == (beginning,)


def test_packages_of_which_nothing_but_text_was_fetched_are_bounded(
    tmp_path: Path, store: ModelStore, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "MAX_WITHOUT_WEIGHTS", 3)
    fetched = []
    for number in range(4):
        checkpoint = write_checkpoint(tmp_path / str(number), config={"rope_theta": 10_000.0 + number})
        imported = import_model(str(checkpoint), ModelStore(tmp_path / f"peer {number}"))
        fetched.append(store.add_manifest(imported.manifest).model_id)
        long_ago_s = time.time() - 2 * RECENT_S - number
        os.utime(store.get(fetched[-1]).path / FETCHED_MARK, (long_ago_s, long_ago_s))
    store.set_name("named", fetched[3])
    imported_here = import_model(str(write_checkpoint(tmp_path / "own", config={"rope_theta": 5.0})), store).model_id
    assert evict_packages(store, kept=(), room=0) == ()
    assert evict_packages(store, kept=fetched[2:3], room=2) == (fetched[1],), "two others count: 0 and 1"
    mark_used(store, fetched[0])
    assert evict_packages(store, kept=(), room=2) == (fetched[2],)
    with pytest.raises(ModelError, match="1 models of peers were asked for within minutes"):
        evict_packages(store, kept=(), room=3)
    left = {each.model_id for each in store.list()}
    assert left == {fetched[0], fetched[3], package.model_id, imported_here}


def test_package_that_another_process_evicts_meanwhile_is_passed_over(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, package: Package
) -> None:
    for block in package.manifest.blocks:
        package.path_of(block).unlink(missing_ok=True)
    stat = Path.stat

    def evicted(self: Path, **options: bool) -> os.stat_result:
        """What is looked at is evicted once its mark was seen."""
        found = stat(self, **options)
        if self.name == FETCHED_MARK:
            self.unlink()
        return found

    monkeypatch.setattr(Path, "stat", evicted)
    assert evict_packages(store, kept=(), room=1) == ()


def test_imported_models_are_never_evicted(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "cache")
    imported = import_model(str(write_checkpoint(tmp_path / "tiny")), store)
    assert evict_for(store, imported, imported.manifest.weight_files, 0) == ()
    assert not imported.missing()
