"""Files are hashed when they come and when they change, not at every start."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from node.models.eviction import in_use
from node.models.importer import import_model
from node.models.store import ModelStore, Package
from node.models.verification_record import RECORD_FILE
from tests.unit.models.checkpoints import write_checkpoint

NAME = "block-001.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


@pytest.fixture
def package(tmp_path: Path, store: ModelStore) -> Package:
    return import_model(str(write_checkpoint(tmp_path / "tiny")), store)


def check(package: Package, *, rehash: bool = False) -> tuple[int, tuple[str, ...]]:
    """Return how many bytes another process hashes, and which files it finds damaged."""
    hashed = [0]
    store = ModelStore(package.path.parents[1])
    found = store.verify(package.model_id, progress=lambda _stage, done, _total: hashed.append(done), rehash=rehash)
    assert len(found.checked) == len(package.manifest.files)
    return hashed[-1], found.corrupt


def damage(path: Path, *, restore_time: bool = False) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns if restore_time else status.st_mtime_ns + 1))


def test_start_hashes_no_file_that_import_wrote(package: Package) -> None:
    assert check(package) == (0, ())
    assert check(package, rehash=True) == (package.manifest.size_bytes, ())
    with in_use(package, package.manifest.weight_files):
        pass
    assert check(package) == (0, ())


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


@pytest.mark.parametrize("change", [damage, replace])
def test_start_hashes_changed_file_alone_and_finds_it_damaged(package: Package, change: Callable[[Path], None]) -> None:
    change(package.path / NAME)
    size = package.manifest.blocks[1].size_bytes
    assert check(package) == (size, (NAME,))
    assert check(package) == (size, (NAME,))


def test_only_full_verification_finds_damage_that_left_the_modification_time(package: Package) -> None:
    damage(package.path / NAME, restore_time=True)
    assert check(package) == (0, ())
    assert check(package, rehash=True)[1] == (NAME,)
    assert check(package)[1] == (NAME,)  # by any start from then on


def test_import_that_repairs_a_file_records_it(tmp_path: Path, store: ModelStore, package: Package) -> None:
    damage(package.path / NAME)
    assert check(package)[1] == (NAME,)
    import_model(str(tmp_path / "tiny"), store)
    assert check(package) == (0, ())


@pytest.mark.parametrize("spoil", [lambda data: data[:-30], lambda _data: b"\xff{[\n", lambda _data: b""])
def test_damaged_record_costs_hashing_and_nothing_else(package: Package, spoil: Callable[[bytes], bytes]) -> None:
    record = package.path / RECORD_FILE
    record.write_bytes(spoil(record.read_bytes()))
    hashed, corrupt = check(package)
    assert hashed > 0
    assert corrupt == ()
    assert check(package) == (0, ())


def test_verifying_again_does_not_grow_the_record(package: Package) -> None:
    size = (package.path / RECORD_FILE).stat().st_size
    check(package, rehash=True)
    assert (package.path / RECORD_FILE).stat().st_size == size
