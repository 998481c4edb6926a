"""Imports of GGUF files from a hub, by their quantisation."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from node.models import sources
from node.models.byte_source import LocalFile
from node.models.errors import ModelError
from node.models.gguf_file import copy_header, read_gguf
from node.models.importer import import_model
from node.models.parts import Selection
from node.models.store import ModelStore
from protocol.identity import BlockRange
from tests.support.hub_server import HubServer, break_after
from tests.unit.models.checkpoints import write_checkpoint
from tests.unit.models.gguf_files import metadata, tensors, without, write_gguf, write_large, write_split

REPOSITORY = "Somebody/Tiny-GGUF"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    """A store, and no child processes: those that import starts have tests of their own."""
    monkeypatch.setattr(sources, "find_granularity", lambda *_: 1)
    monkeypatch.setattr(sources, "make_gguf_tokenizer", lambda _source, folder, _progress: folder.mkdir())
    return ModelStore(tmp_path / "cache")


def publish(hub: HubServer) -> Path:
    """Put a model into the hub in three quantisations, of which one is in parts, with files that are no models."""
    folder = hub.folder / REPOSITORY
    folder.mkdir(parents=True)
    write_gguf(folder / "Tiny-Q8_0.gguf", quantised="ffn")
    write_gguf(folder / "tiny.f16.gguf", weights=tensors(seed=1))
    for part in write_split(folder / "Q4_K_M", weights=tensors(seed=2), count=3):
        part.rename(part.with_name(part.name.replace("tiny", "Tiny-UD-Q4_K_M")))
    (folder / "mmproj-F16.gguf").write_bytes(b"GGUF")
    (folder / "README.md").write_text("Tiny")
    (folder / "model-00001-of-00002.bin").write_bytes(b"pickle")
    return folder


@pytest.mark.parametrize(
    ("quantisation", "file"),
    [
        ("Q8_0", "Tiny-Q8_0.gguf"),
        ("q8_0", "Tiny-Q8_0.gguf"),
        ("F16", "tiny.f16.gguf"),
        ("UD-Q4_K_M", "Q4_K_M/Tiny-UD-Q4_K_M-00001-of-00003.gguf"),
        ("q4_k_m", "Q4_K_M/Tiny-UD-Q4_K_M-00001-of-00003.gguf"),
        ("Tiny-Q8_0.gguf", "Tiny-Q8_0.gguf"),
    ],
)
def test_quantisation_chooses_files(
    hub: HubServer, store: ModelStore, tmp_path: Path, quantisation: str, file: str
) -> None:
    folder = publish(hub)
    package = import_model(f"{REPOSITORY}:{quantisation}@v1", store)
    assert package.model_id == import_model(str(folder / file), ModelStore(tmp_path / "other")).model_id
    assert store.verify(package.model_id).corrupt == ()
    assert not package.missing()
    chosen = {path.name for path in folder.rglob(file.partition("-00001-")[0].rpartition("/")[2] + "*")}
    assert {name for name, count in hub.sent.items() if count} == chosen
    assert store.resolve(min(chosen).partition("-0")[0].removesuffix(".gguf").lower()) == package.model_id


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            f"{REPOSITORY}:Q5_K_M",
            f"{REPOSITORY} has no quantisation Q5_K_M; available: Q8_0 (0.1 MB), f16 (0.1 MB), UD-Q4_K_M (0.1 MB)",
        ),
        (f"{REPOSITORY}:Q4_K", f"{REPOSITORY} has no quantisation Q4_K; available: Q8_0 (0.1 MB), "),
        (
            REPOSITORY,
            f"{REPOSITORY} has its weights in GGUF files only: say which, such as {REPOSITORY}:Q8_0; available: Q8_0 ",
        ),
        ("some/other:Q4_0", "some/other has no GGUF files: leave out :Q4_0"),
    ],
)
def test_wrong_quantisation_lists_available_ones(hub: HubServer, store: ModelStore, source: str, line: str) -> None:
    publish(hub)
    write_checkpoint(hub.folder / "some" / "other")
    with pytest.raises(ModelError) as error:
        import_model(source, store)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
    assert not hub.sent


def test_several_files_of_one_quantisation_are_listed_by_name(hub: HubServer, store: ModelStore) -> None:
    folder = publish(hub)
    shutil.copy(folder / "Tiny-Q8_0.gguf", folder / "Tiny-old-Q8_0.gguf")
    with pytest.raises(ModelError, match=r"several files for Q8_0: name one; available: Tiny-Q8_0 .*, Tiny-old-Q8_0"):
        import_model(f"{REPOSITORY}:Q8_0", store)
    assert not import_model(f"{REPOSITORY}:Tiny-old-Q8_0", store).missing()


def test_set_of_parts_that_lacks_one_is_not_offered(hub: HubServer, store: ModelStore) -> None:
    folder = publish(hub)
    (folder / "Q4_K_M" / "Tiny-UD-Q4_K_M-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match=r"has no quantisation Q4_K_M; available: Q8_0 \(0.1 MB\), f16 \(0.1 MB\)$"):
        import_model(f"{REPOSITORY}:Q4_K_M", store)


def test_reads_header_and_wanted_blocks_only(hub: HubServer, store: ModelStore, tmp_path: Path) -> None:
    folder = hub.folder / REPOSITORY
    folder.mkdir(parents=True)
    weights = without(tensors(), ["blk."])
    for block in range(6):
        weights |= {
            f"blk.{block}.{name}.weight": np.full((1 << 16, 32), block, np.float32) for name in ("attn_q", "ffn_up")
        }
    path = write_gguf(folder / "Large-F32.gguf", metadata(block_count=6), weights)
    block_bytes = 2 * (8 << 20)
    whole = import_model(str(path), ModelStore(tmp_path / "other"))
    hub.cdn_faults += [lambda _: False] * 3 + [break_after(3 << 20)] * 2
    wanted = Selection(blocks=BlockRange(0, 2), manifest=whole.manifest)
    package = import_model(f"{REPOSITORY}:f32", store, wanted=wanted)
    assert package.present() == {"common.gguf", "embed.gguf", "block-000.gguf", "block-001.gguf"}
    assert store.verify(package.model_id, BlockRange(0, 2)).corrupt == ()
    assert 2 * block_bytes < hub.sent[path.name] < 2 * block_bytes + (2 << 20)
    # Without the manifest, the rest is hashed.
    other = ModelStore(tmp_path / "third")
    notes: list[str] = []
    package = import_model(f"{REPOSITORY}:f32", other, wanted=Selection(blocks=BlockRange(1, 2), note=notes.append))
    assert package.model_id == whole.model_id
    assert package.present() == {"common.gguf", "block-001.gguf"}
    assert len(notes) == 1
    assert hub.connections < 10, "a connection serves many ranges"


def test_blocks_off_the_granularity_are_refused(
    hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub)
    monkeypatch.setattr(sources, "find_granularity", lambda *_: 2)
    with pytest.raises(ModelError, match=r"can only be served whole \(0-2\)"):
        import_model(f"{REPOSITORY}:Q8_0", store, wanted=Selection(blocks=BlockRange(0, 1)))


def test_header_of_several_ranges(hub: HubServer, store: ModelStore, tmp_path: Path) -> None:
    folder = hub.folder / REPOSITORY
    folder.mkdir(parents=True)
    tokens = [f"token {number} {'x' * 60}" for number in range(40_000)]
    keys = metadata() | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    weights = tensors() | {"token_embd.weight": np.zeros((len(tokens), 32), np.float32)}
    weights["output.weight"] = weights["token_embd.weight"]
    path = write_gguf(folder / "Tiny-F32.gguf", keys, weights)
    package = import_model(f"{REPOSITORY}:f32", store)
    assert package.model_id == import_model(str(path), ModelStore(tmp_path / "other")).model_id
    assert len([line for line in hub.content("Tiny-F32") if "bytes=" in line]) > 4


def test_header_of_remote_file_takes_no_more_disk_than_its_size(tmp_path: Path) -> None:
    path, copy = write_large(tmp_path / "large.gguf", 64 << 20), tmp_path / "header.gguf"
    copy_header(LocalFile.of(path), copy)
    original, header = read_gguf(path), read_gguf(copy)
    assert (header.metadata, header.types) == (original.metadata, original.types)
    assert {name: it.offset for name, it in header.tensors.items()} == {
        name: it.offset for name, it in original.tensors.items()
    }
    assert copy.stat().st_size == path.stat().st_size
    assert copy.stat().st_blocks * 512 < 2 << 20


def test_file_that_is_no_gguf_is_one_line(hub: HubServer, store: ModelStore) -> None:
    folder = publish(hub)
    (folder / "Tiny-Q4_0.gguf").write_bytes(b"<html>" * 100)
    with pytest.raises(ModelError, match=r"^Tiny-Q4_0.gguf is not a GGUF file: it starts with b'<htm'"):
        import_model(f"{REPOSITORY}:Q4_0", store)
    (folder / "Tiny-Q4_0.gguf").write_bytes((folder / "Tiny-Q8_0.gguf").read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"^Tiny-Q4_0.gguf is cut short"):
        import_model(f"{REPOSITORY}:Q4_0", store)
