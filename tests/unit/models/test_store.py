import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from node.models.catalogue import CATALOGUE
from node.models.errors import ModelError
from node.models.files import lock_file
from node.models.importer import import_model
from node.models.manifest import parse_manifest
from node.models.store import (
    FETCHED_MARK,
    GRAPHS_FOLDER,
    QUALITY_FOLDER,
    AmbiguousModelError,
    ModelStore,
    Package,
    UnknownModelError,
)
from node.util.disk_cache import FolderCache, folder_bytes
from protocol.identity import BlockRange, ModelId
from tests.unit.models.checkpoints import llama_tensors, write_checkpoint

DEMO = CATALOGUE["smollm2-135m-instruct"]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


@pytest.fixture
def package(tmp_path: Path, store: ModelStore) -> Package:
    return import_model(str(write_checkpoint(tmp_path / "tiny")), store)


def test_a_model_is_found_by_id_prefix_name_and_catalogue_name(store: ModelStore, package: Package) -> None:
    for text in (package.model_id, package.model_id[:8], "tiny"):
        assert store.resolve(text) == package.model_id
    for text in (DEMO.name, DEMO.model_id[:8], DEMO.model_id):
        assert store.resolve(text) == DEMO.model_id
    assert store.name_of(package.model_id) == "tiny"
    assert store.name_of(DEMO.model_id) == DEMO.name


def test_a_model_that_only_peers_have_is_found_by_its_prefix(store: ModelStore) -> None:
    remote = ModelId("ab12cd34" + "0" * 56)
    assert store.resolve("ab12cd3400000000", known=[remote]) == remote
    with pytest.raises(UnknownModelError, match=r"only peers have .* \(ab12cd3400000000\): give 16 digits"):
        store.resolve("ab12cd34", known=[remote])
    other = ModelId("ab12cd34" + "0" * 55 + "1")
    with pytest.raises(AmbiguousModelError, match="matches several"):
        store.resolve("ab12cd3400000000", known=[remote, other])
    assert store.resolve(remote) == remote


def test_ambiguous_id_prefix_is_refused(store: ModelStore, package: Package) -> None:
    twin = ModelId(package.model_id[:10] + "0" * 54)
    store.set_name("twin", twin)
    with pytest.raises(AmbiguousModelError, match="give more digits"):
        store.resolve(package.model_id[:8])
    assert store.resolve(package.model_id[:12]) == package.model_id


def test_peers_ids_make_no_prefix_of_another_model_ambiguous(store: ModelStore, package: Package) -> None:
    for model in (package.model_id, DEMO.model_id):
        twin = ModelId(model[:16] + "0" * 48)
        assert store.resolve(model[:8], known=[twin]) == model
        assert store.resolve(model[:16], known=[twin]) == model
        assert store.resolve(twin[:20], known=[twin]) == twin


@pytest.mark.parametrize("text", ["tin", "../tiny"])
def test_misspelt_model_is_told_the_name_that_was_meant(store: ModelStore, package: Package, text: str) -> None:
    with pytest.raises(UnknownModelError, match=f"there is no model '{text}'; did you mean 'tiny'"):
        store.resolve(text)


@pytest.mark.parametrize("text", ["", "nobody", "abcdef1", "0" * 63, "ABCDEF12"])
def test_unknown_model_error_lists_known_names_and_names_import(store: ModelStore, package: Package, text: str) -> None:
    known = "smollm2-135m-instruct, tiny; `metaswarm model import OWNER/NAME` imports others"
    with pytest.raises(UnknownModelError, match=known):
        store.resolve(text)


def test_names_survive_and_go_with_their_model(store: ModelStore, package: Package) -> None:
    store.set_name("other", package.model_id)
    assert ModelStore(store.cache_dir).resolve("other") == package.model_id
    store.remove(package.model_id)
    assert store.names() == {}
    assert store.list() == ()
    with pytest.raises(UnknownModelError):
        store.get(package.model_id)
    with pytest.raises(UnknownModelError):
        store.remove(package.model_id)


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "../x", "deadbeef", "x" * 65, ".hidden", "smollm2-135m-instruct"])
def test_a_name_that_could_be_mistaken_is_refused(store: ModelStore, package: Package, name: str) -> None:
    with pytest.raises(ModelError):
        store.set_name(name, package.model_id)


def test_a_damaged_names_file_is_one_clear_line(store: ModelStore, package: Package) -> None:
    for content in (b"{", b"[]", b'{"a": "b"}'):
        (store.cache_dir / "names.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"names.json is damaged: delete it"):
            store.resolve("tiny")


def test_partial_package_lists_missing_files(tmp_path: Path, package: Package) -> None:
    partial = ModelStore(tmp_path / "other").add_manifest(parse_manifest(package.manifest.data))
    middle = BlockRange(1, 2)
    assert [file.name for file in partial.missing(middle)] == ["block-001.safetensors"]
    assert len(partial.missing()) == len(package.manifest.files)
    (partial.path / "block-001.safetensors").write_bytes((package.path / "block-001.safetensors").read_bytes())
    assert partial.missing(middle) == ()
    (partial.path / "block-001.safetensors").write_bytes(b"too short")
    assert [file.name for file in partial.missing(middle)] == ["block-001.safetensors"]


def test_files_are_found_by_their_content(tmp_path: Path, store: ModelStore, package: Package) -> None:
    other_process = ModelStore(store.cache_dir)
    for file in package.manifest.files:
        found = other_process.path_by_sha256(file.sha256)
        assert found is not None
        assert found.name == file.name
    assert other_process.path_by_sha256(package.model_id) == package.path / "manifest.json"
    assert other_process.path_by_sha256("0" * 64) is None
    later = import_model(str(write_checkpoint(tmp_path / "later", llama_tensors(seed=1))), store)
    assert other_process.path_by_sha256(later.manifest.head.sha256) == later.path / "head.safetensors"
    store.remove(later.model_id)
    assert other_process.path_by_sha256(later.manifest.head.sha256) is None


def test_content_that_two_packages_share_outlives_one_of_them(tmp_path: Path, store: ModelStore) -> None:
    tensors = llama_tensors()
    one = import_model(str(write_checkpoint(tmp_path / "one", tensors)), store)
    two = import_model(str(write_checkpoint(tmp_path / "two", tensors, config={"rope_theta": 5})), store)
    shared = one.manifest.embed.sha256
    assert shared == two.manifest.embed.sha256
    assert store.path_by_sha256(shared) is not None
    store.remove(one.model_id)
    assert store.path_by_sha256(shared) == two.path / "embed.safetensors"


def test_verify_tells_the_damaged_from_the_missing(store: ModelStore, package: Package) -> None:
    reports: list[tuple[str, int, int]] = []
    assert store.verify(package.model_id, progress=lambda *report: reports.append(report)).corrupt == ()
    assert reports[-1][1] == reports[-1][2] == package.manifest.size_bytes
    path = package.path / "block-002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (package.path / "head.safetensors").unlink()
    found = store.verify(package.model_id)
    assert (found.missing, found.corrupt) == (("head.safetensors",), ("block-002.safetensors",))
    assert store.verify(package.model_id, BlockRange(0, 2)).corrupt == ()
    store.discard(package.model_id, "block-002.safetensors")
    assert store.verify(package.model_id).missing == ("block-002.safetensors", "head.safetensors")


def test_damaged_manifest_is_repaired_by_a_fetch_or_an_import(
    tmp_path: Path, store: ModelStore, package: Package
) -> None:
    for repair in (
        lambda fresh: fresh.add_manifest(package.manifest),
        lambda fresh: import_model(str(tmp_path / "tiny"), fresh),
    ):
        (package.path / "manifest.json").write_bytes(b"{}")
        repair(ModelStore(store.cache_dir))
        repaired = ModelStore(store.cache_dir).get(package.model_id)
        assert not repaired.missing()
        assert not (repaired.path / FETCHED_MARK).exists(), "an imported package is not evicted"


def test_a_damaged_manifest_hides_its_package_and_can_be_removed(store: ModelStore, package: Package) -> None:
    (package.path / "manifest.json").write_bytes(b"{}")
    fresh = ModelStore(store.cache_dir)
    assert fresh.list() == ()
    with pytest.raises(ModelError, match="is damaged: remove the model"):
        fresh.get(package.model_id)
    assert fresh.path_by_sha256(package.manifest.head.sha256) is None
    fresh.remove(package.model_id)
    assert not package.path.exists()


def test_a_cache_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot write to"):
        import_model(str(write_checkpoint(tmp_path / "tiny")), ModelStore(tmp_path / "file" / "cache"))


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASWARM_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert ModelStore().cache_dir == tmp_path / "elsewhere"


def test_lock_is_exclusive_and_waiting_can_be_cancelled(tmp_path: Path) -> None:
    class GivenUp(Exception):
        pass

    def give_up() -> None:
        raise GivenUp

    with lock_file(tmp_path / "lock"), pytest.raises(GivenUp), lock_file(tmp_path / "lock", give_up):
        pytest.fail("two hold the lock")
    with lock_file(tmp_path / "lock", give_up):
        pass


def test_an_import_waits_for_the_one_under_way(tmp_path: Path, store: ModelStore) -> None:
    waiting = threading.Event()
    imported: list[Package] = []

    def second() -> None:
        def progress(stage: str, done: int, total: int) -> None:
            if "waiting" in stage:
                waiting.set()

        imported.append(import_model(str(write_checkpoint(tmp_path / "tiny")), store, progress=progress))

    thread = threading.Thread(target=second)
    with store.staging() as folder:
        thread.start()
        assert waiting.wait(10)
        assert folder.is_dir()
        assert imported == []
    thread.join(10)
    assert len(imported) == 1


def test_every_user_may_read_packages(store: ModelStore, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        package = import_model(str(write_checkpoint(tmp_path / "tiny")), store)
    finally:
        os.umask(before)
    names = ("names.json", "sources.json")
    paths = [path for path in package.path.iterdir() if path.is_file()] + [store.cache_dir / name for name in names]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) & 0o644 for path in paths} == {
        path.name: 0o644 for path in paths
    }


def test_package_of_another_user_is_not_called_damaged(
    store: ModelStore, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    fresh = ModelStore(store.cache_dir)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelError, match=r"cannot read model \w+: /.*manifest.json: Permission denied$"):
        fresh.get(package.model_id)
    with pytest.raises(ModelError, match=r"cannot read the names of models: /.*names.json: Permission denied$"):
        fresh.names()


def test_cache_folder_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = ModelStore(tmp_path / "file")
    for act in (store.list, store.names, lambda: store.resolve("tiny"), lambda: store.resolve("ab12cd34")):
        with pytest.raises(ModelError, match=r"file.*Not a directory"):
            act()


def test_what_was_built_of_a_model_goes_with_it(store: ModelStore, package: Package) -> None:
    def fill(folder: Path) -> None:
        (folder / "graph").write_bytes(bytes(1000))

    cache = FolderCache(store.cache_dir / GRAPHS_FOLDER)
    model, other = package.model_id, "ab" * 32
    for name in (f"{model}-0-3-native-1", f"{other}-0-3-native-1"):
        fill_in = store.cache_dir / GRAPHS_FOLDER / name
        fill_in.mkdir(parents=True)
        fill(fill_in)
    used = cache.folder(f"{model}-0-3-int8-1", fill)  # this process holds it
    (store.cache_dir / QUALITY_FOLDER).mkdir()
    for name in (model, other):
        (store.cache_dir / QUALITY_FOLDER / f"{name}.json").touch()
    size = folder_bytes(package.path)
    assert store.remove(model) == size + 1000
    assert {path.name for path in cache.directory.iterdir()} == {used.name, f"{other}-0-3-native-1"}
    assert [path.name for path in (store.cache_dir / QUALITY_FOLDER).iterdir()] == [f"{other}.json"]
