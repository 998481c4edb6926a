import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from node.models import importer, sources
from node.models.byte_source import LocalFile
from node.models.catalogue import CATALOGUE, CatalogueEntry
from node.models.errors import ModelError
from node.models.importer import import_model
from node.models.layout import OuterNames
from node.models.safetensors_file import read_header
from node.models.store import ModelStore
from protocol.identity import ModelId
from tests.unit.models.checkpoints import llama_tensors, write_checkpoint
from tests.unit.models.gguf_files import write_gguf


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


def test_every_tensor_of_a_folder_ends_in_the_file_of_its_part(tmp_path: Path, store: ModelStore) -> None:
    tensors = llama_tensors()
    package = import_model(str(write_checkpoint(tmp_path / "model", tensors)), store)
    assert not package.missing()
    assert package.manifest.block_count == 3
    assert not package.manifest.tied
    assert (package.manifest.bos_token_id, package.manifest.eos_token_ids) == (1, (2,))
    found: dict[str, np.ndarray] = {}
    for file in package.manifest.files:
        part = load_file(package.path_of(file))
        found |= part
        for stored in read_header(LocalFile.of(package.path_of(file))).values():
            assert stored.offset % {"F32": 4, "F16": 2, "I8": 1}[stored.dtype] == 0
        if file.name == "block-001.safetensors":
            assert set(part) == {name for name in tensors if name.startswith("model.layers.1.")}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_model_id_does_not_depend_on_sharding_or_writer(tmp_path: Path) -> None:
    ids = set()
    for number, shards in enumerate((1, 2, 5)):
        config = {"transformers_version": f"4.{number}", "_name_or_path": f"/tmp/{number}"}
        tensors = dict(sorted(llama_tensors().items(), reverse=bool(number)))
        folder = write_checkpoint(tmp_path / str(number), tensors, shards=shards, config=config)
        ids.add(import_model(str(folder), ModelStore(tmp_path / f"cache{number}")).model_id)
    assert len(ids) == 1
    other = write_checkpoint(tmp_path / "other", llama_tensors(seed=1))
    assert import_model(str(other), ModelStore(tmp_path / "cache")).model_id not in ids


@pytest.mark.parametrize(
    ("said", "stored", "tied"),
    [
        ({"tie_word_embeddings": True}, "nothing", True),
        ({"tie_word_embeddings": True}, "a copy", True),
        ({"tie_word_embeddings": True}, "another matrix", False),
        ({"tie_word_embeddings": False}, "a copy", False),
        ({"tie_word_embeddings": False}, "another matrix", False),
        ({}, "nothing", True),
        ({}, "a copy", True),
        ({}, "another matrix", False),
    ],
)
def test_tied_embeddings_are_stored_once(
    tmp_path: Path, store: ModelStore, said: dict[str, object], stored: str, tied: bool
) -> None:
    tensors = llama_tensors(output=stored == "another matrix")
    if stored == "a copy":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    package = import_model(str(write_checkpoint(tmp_path / "model", tensors, config=said)), store)
    assert package.manifest.tied is tied
    assert package.manifest.config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(package.path_of(package.manifest.head))) is not tied


def test_generation_facts_and_tokenizer_come_along_in_one_form(tmp_path: Path, store: ModelStore) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 7], "bos_token_id": 3}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "</s>", "name_or_path": "/x", "chat_template": [{"name": "tool_use", "template": "t"},'
        ' {"name": "default", "template": "hello"}]}'
    )
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "other"}')
    package = import_model(str(folder), store)
    assert (package.manifest.bos_token_id, package.manifest.eos_token_ids) == (3, (2, 7))
    assert [file.name for file in package.manifest.tokenizer_files] == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (package.path / "chat_template.jinja").read_text() == "hello"
    assert json.loads((package.path / "tokenizer_config.json").read_text()) == {"bos_token": "<s>", "eos_token": "</s>"}


SCALES = np.ones((8, 1), np.float32)
PACKED = np.ones((8, 8), np.uint32)
ENTRY = b'"a.weight":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}'


def file_with(entries: bytes) -> bytes:
    """A safetensors file of eight bytes of data."""
    return (len(entries) + 2).to_bytes(8, "little") + b"{" + entries + b"}" + bytes(8)


FP8_FILE = file_with(ENTRY)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


BROKEN: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json: not the folder of a Hugging Face model"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "no layers": (lambda f: (f / "config.json").write_text('{"model_type": "x"}'), "how many layers"),
    "too many layers": (
        lambda f: (f / "config.json").write_text('{"model_type": "x", "num_hidden_layers": 99999}'),
        "how many layers",
    ),
    "not finite": (
        lambda f: (f / "config.json").write_text('{"model_type": "x", "num_hidden_layers": 3, "a": NaN}'),
        "cannot become a package",
    ),
    "quantised": (lambda f: (f / "config.json").write_text('{"quantization_config": {}}'), "quantised checkpoint"),
    "cut short": (lambda f: truncate(f / "model.safetensors"), "damaged or cut short"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02}q\x00."), "not a safetensors file"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 1000), "not a safetensors file"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only as pickles"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors files"),
    "a shard missing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "nowhere.safetensors"}}'),
        "names nowhere.safetensors",
    ),
    "a block missing": (
        lambda f: save_file(llama_tensors(blocks=2), f / "model.safetensors"),
        "no tensors of block 2, where 3 blocks are expected",
    ),
    "a shard outside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "names '../x.safetensors', which is not a file of that folder",
    ),
    "a numbered shard missing": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "it has model-00001-of-00002.safetensors, and lacks model-00002-of-00002.safetensors",
    ),
    "an old tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(b""),
        "has its tokenizer only as tokenizer.model, and no tokenizer.json: convert it",
    ),
    "a tekken tokenizer": (lambda f: (f / "tekken.json").write_text("{}"), "its tokenizer only as tekken.json"),
    "a tiktoken tokenizer": (lambda f: (f / "qwen.tiktoken").write_bytes(b""), "its tokenizer only as qwen.tiktoken"),
    "a tokenizer elsewhere": (
        lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "OwnTokenizer"}'),
        "its tokenizer only as the class OwnTokenizer",
    ),
    "MLX by its config": (
        lambda f: write_checkpoint(f, config={"quantization": {"group_size": 64, "bits": 4}}),
        r"is a quantised checkpoint \(quantization in its config.json, as MLX writes it\): import the original",
    ),
    "MLX by its tensors": (
        lambda f: write_checkpoint(f, llama_tensors() | {"model.layers.0.mlp.up_proj.scales": SCALES}),
        r"is a quantised checkpoint \(tensor 'model.layers.0.mlp.up_proj.scales' of type F32\), and its config.json",
    ),
    "scales of FP8": (
        lambda f: write_checkpoint(f, llama_tensors() | {"model.layers.0.mlp.up_proj.weight_scale_inv": SCALES}),
        "weight_scale_inv' .* does not say how",
    ),
    "packed weights": (
        lambda f: write_checkpoint(f, llama_tensors() | {"model.layers.0.mlp.up_proj.weight": PACKED}),
        "up_proj.weight' of type U32",
    ),
    "FP8": (lambda f: (f / "model.safetensors").write_bytes(FP8_FILE), "tensor 'a.weight' of type F8_E4M3"),
    "a tensor twice": (
        lambda f: (f / "model.safetensors").write_bytes(file_with(ENTRY + b"," + ENTRY)),
        "its header has 'a.weight' twice",
    ),
}


@pytest.mark.parametrize(("damage", "line"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoint_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, store: ModelStore, damage: Any, line: str
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=line) as error:
        import_model(str(folder), store)
    assert "\n" not in str(error.value)
    assert store.list() == ()
    assert files_in(store) == set()


def files_in(store: ModelStore) -> set[str]:
    return {path.name for path in store.cache_dir.rglob("*") if path.is_file()} - {".lock"}


@pytest.mark.parametrize("source", ["nonsense", "a/b/c", "/nowhere/at/all", "", "x" * 5000, "smollm2-135m"])
def test_a_source_that_is_nothing_is_refused(store: ModelStore, source: str) -> None:
    with pytest.raises(ModelError):
        import_model(source, store)


def test_a_full_disk_is_one_clear_line(tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "model")

    def full(handle: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ModelError, match="the disk is full; free some space, or set METASWARM_CACHE_DIR"):
            import_model(str(folder), store)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=100))
        with pytest.raises(ModelError, match="needs 0 MiB, and 0 MiB are free"):
            import_model(str(folder), store)
    assert files_in(store) == set()


def test_exception_from_progress_cancels_import_and_cleans_up(tmp_path: Path, store: ModelStore) -> None:
    class Cancelled(BaseException):
        pass

    def progress(stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        import_model(str(write_checkpoint(tmp_path / "model")), store, progress=progress)
    assert files_in(store) == set()


def test_progress_goes_from_nothing_to_all(tmp_path: Path, store: ModelStore) -> None:
    reports: list[tuple[str, int, int]] = []
    folder = write_checkpoint(tmp_path / "model")
    import_model(str(folder), store, progress=lambda *report: reports.append(report))
    done = [done for stage, done, _ in reports if stage == "split"]
    assert done == sorted(done)
    assert {total for _, _, total in reports} == {done[-1]}


CRASH_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from node.models import sources
from node.models.importer import import_model
from node.models.store import ModelStore

sources.check_tensors = lambda *_: None

def die(stage, done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

import_model(sys.argv[1], ModelStore(Path(sys.argv[2])), progress=die)
"""


def test_killed_import_leaves_no_package_and_next_one_cleans_up(tmp_path: Path, store: ModelStore) -> None:
    folder = write_checkpoint(tmp_path / "model")
    crashed = subprocess.run([sys.executable, "-c", CRASH_IN_THE_MIDDLE, folder, store.cache_dir], check=False)
    assert crashed.returncode == -signal.SIGKILL
    assert any(name.startswith("embed") for name in files_in(store))
    assert store.list() == ()
    package = import_model(str(folder), store)
    assert files_in(store) == {path.name for path in package.path.iterdir()} | {"names.json", "sources.json"}
    assert [path.name for path in (store.cache_dir / "staging").iterdir()] == [".lock"]


def test_importing_again_repairs_a_package(tmp_path: Path, store: ModelStore) -> None:
    folder = write_checkpoint(tmp_path / "model")
    package = import_model(str(folder), store)
    path = package.path_of(package.manifest.blocks[1])
    path.write_bytes(b"x" * path.stat().st_size)
    package.path_of(package.manifest.embed).unlink()
    assert store.verify(package.model_id).corrupt == ("block-001.safetensors",)
    assert import_model(str(folder), store).model_id == package.model_id
    verification = store.verify(package.model_id)
    assert (verification.missing, verification.corrupt) == ((), ())


def test_a_model_is_named_after_its_source_unless_told_otherwise(tmp_path: Path, store: ModelStore) -> None:
    one = import_model(str(write_checkpoint(tmp_path / "Tiny-Llama", llama_tensors())), store)
    assert store.resolve("tiny-llama") == one.model_id
    other = write_checkpoint(tmp_path / "elsewhere" / "tiny-llama", llama_tensors(seed=1))
    two = import_model(str(other), store)
    assert store.resolve("tiny-llama") == one.model_id
    import_model(str(other), store, name="second")
    assert store.resolve("second") == two.model_id
    with pytest.raises(ModelError, match="already means model"):
        import_model(str(other), store, name="tiny-llama")
    with pytest.raises(ModelError, match="cannot be a model's name"):
        import_model(str(other), store, name="../escape")


def test_modules_go_where_the_architecture_runs_them(
    tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = llama_tensors()
    tensors["model.last.weight"] = tensors.pop("model.norm.weight")
    tensors["project.weight"] = tensors.pop("lm_head.weight")
    names = OuterNames(embed=frozenset({"embed_tokens"}), head=frozenset({"last", "project"}), output="project")
    monkeypatch.setattr(sources, "check_architecture", lambda *_: names)
    folder = write_checkpoint(tmp_path / "model", tensors, config={"model_type": "somewhat new"})
    package = import_model(str(folder), store)
    assert load_file(package.path / "head.safetensors").keys() == {"model.last.weight", "project.weight"}
    assert load_file(package.path / "embed.safetensors").keys() == {"model.embed_tokens.weight"}
    assert not package.manifest.tied


def catalogue_of(monkeypatch: pytest.MonkeyPatch, source: Path, **values: Any) -> None:
    """Make a catalogue of one model, whose GGUF file needs no download."""
    entry = replace(CATALOGUE["smollm2-135m-instruct"], name="tiny", **values)
    monkeypatch.setattr(importer, "CATALOGUE", {"tiny": entry})

    def fetch(_entry: object, folder: Path, _progress: object) -> Path:
        return Path(shutil.copy(source, folder / "model.gguf"))

    monkeypatch.setattr(sources, "fetch_from_wheel", fetch)


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import GGUF files without the processes that try the architecture out and convert the tokenizer."""
    monkeypatch.setattr(sources, "find_granularity", lambda *_: 1)
    monkeypatch.setattr(sources, "make_gguf_tokenizer", lambda _source, folder, _progress: folder.mkdir())


def test_a_catalogue_name_and_its_file_give_the_same_package(
    tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch, no_children: None
) -> None:
    source = write_gguf(tmp_path / "Tiny.Q4.gguf")
    expected = import_model(str(source), ModelStore(tmp_path / "other"))
    catalogue_of(monkeypatch, source, model_id=expected.model_id)
    package = import_model("tiny", store)
    assert (package.model_id, package.manifest.format) == (expected.model_id, "gguf")
    assert ModelStore(tmp_path / "other").resolve("tiny.q4")


def test_a_file_of_another_kind_is_refused(tmp_path: Path, store: ModelStore) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        import_model(str(tmp_path / "model.bin"), store)


def test_the_converters_complaint_reaches_the_user(tmp_path: Path, store: ModelStore) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no such thing")
    with pytest.raises(ModelError, match=r"^broken.gguf is not a GGUF file"):
        import_model(str(tmp_path / "broken.gguf"), store)


def test_a_catalogue_import_that_gives_another_model_fails(
    tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch, no_children: None
) -> None:
    catalogue_of(monkeypatch, write_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(ModelError, match=r"gave model [0-9a-f]{12} where the catalogue pins"):
        import_model("tiny", store)
    assert store.list() == ()


def test_concurrent_catalogue_import_waits_for_the_first(
    tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = import_model(str(write_checkpoint(tmp_path / "model")), store)
    entry = CATALOGUE["smollm2-135m-instruct"]
    pinned = SimpleNamespace(name=entry.name, model_id=package.model_id)
    monkeypatch.setattr(importer, "CATALOGUE", {entry.name: pinned})
    monkeypatch.setattr(sources, "fetch_from_wheel", lambda *_: pytest.fail("fetched again"))
    assert import_model(entry.name, store).model_id == package.model_id


def make_wheel(folder: Path) -> CatalogueEntry:
    """Make the smallest wheel that pip takes, with a file in it, and the catalogue entry that asks for it."""
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", b"GGUF and more")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return CatalogueEntry(
        name="tiny",
        title="Tiny",
        licence="Apache-2.0",
        requirement=str(wheel),
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        model_id=ModelId("0" * 64),
    )


def test_a_wheel_is_fetched_by_pip_checked_and_unpacked(tmp_path: Path) -> None:
    entry = make_wheel(tmp_path)
    for number, (wanted, line) in enumerate(
        [
            (entry, ""),
            (replace(entry, wheel_sha256="0" * 64), "is not the file that the catalogue pins"),
            (replace(entry, member="tiny_model/other"), "does not contain tiny_model/other"),
            (replace(entry, requirement=str(tmp_path / "nowhere-1.0-py3-none-any.whl")), "pip cannot download"),
        ]
    ):
        staging = tmp_path / str(number)
        staging.mkdir()
        if line:
            with pytest.raises(ModelError, match=line) as error:
                sources.fetch_from_wheel(wanted, staging, lambda *_: None)
            assert "\n" not in str(error.value)
        else:
            assert sources.fetch_from_wheel(wanted, staging, lambda *_: None).read_bytes() == b"GGUF and more"


def test_wheel_without_space_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = make_wheel(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2 * entry.wheel_bytes - 1))
        with pytest.raises(ModelError, match=f"needs 0 MiB, and 0 MiB are free in {tmp_path}"):
            sources.fetch_from_wheel(entry, tmp_path, lambda *_: None)
    pip = "raise SystemExit('ERROR: Could not install packages: [Errno 28] No space left on device')"
    monkeypatch.setattr(sources, "python", lambda *_: [sys.executable, "-c", pip])
    with pytest.raises(ModelError, match=f"cannot download {entry.requirement}: no space left in {tmp_path}: free"):
        sources.fetch_from_wheel(entry, tmp_path, lambda *_: None)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:\\x.safetensors"])
def test_an_index_names_no_file_outside_of_its_folder(tmp_path: Path, store: ModelStore, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model", llama_tensors(), shards=2)
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.norm.weight": name}}))
    with pytest.raises(ModelError, match="which is not a file of that folder: refused"):
        import_model(str(folder), store)
    assert not store.list()
