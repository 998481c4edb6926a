"""A GGUF model becomes a package whose files are GGUF files with the very tensors of the source."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.engine.interface import source_from_package
from node.models import sources
from node.models.errors import ModelError
from node.models.gguf_file import GgufError, GgufModel, read_gguf
from node.models.gguf_package import arrange_package
from node.models.importer import import_model
from node.models.manifest import parse_manifest
from node.models.store import ModelStore, Package
from protocol.identity import BlockRange
from tests.unit.models.gguf_files import (
    BLOCKS,
    HIDDEN,
    VOCABULARY,
    metadata,
    tensors,
    without,
    write_gguf,
    write_large,
    write_split,
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    """A store, and no child processes: those that import starts have tests of their own."""
    monkeypatch.setattr(sources, "find_granularity", lambda *_: 1)
    monkeypatch.setattr(sources, "make_gguf_tokenizer", lambda _source, folder, _progress: folder.mkdir())
    return ModelStore(tmp_path / "cache")


def bytes_of(model: GgufModel) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for name, tensor in model.tensors.items():
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            found[name] = (tensor.type, tensor.shape, file.read(tensor.size_bytes))
    return found


def tensors_of(package: Package) -> dict[str, list[str]]:
    """The tensors of each file, as another reader than ours finds them."""
    return {
        file.name: [tensor.name for tensor in gguf.GGUFReader(package.path_of(file)).tensors]
        for file in package.manifest.weight_files
    }


def test_every_tensor_is_in_the_file_of_its_part_with_its_bytes_and_type(tmp_path: Path, store: ModelStore) -> None:
    factors = {"rope_freqs.weight": np.ones(4, np.float32)}
    source = write_gguf(tmp_path / "tiny.gguf", weights=tensors() | factors, quantised="attn")
    package = import_model(str(source), store)
    found = tensors_of(package)
    assert found["common.gguf"] == ["rope_freqs.weight"]
    assert found["embed.gguf"] == ["token_embd.weight"]
    assert found["head.gguf"] == ["output.weight", "output_norm.weight"]
    assert set(found["block-001.gguf"]) == {name for name in tensors() if name.startswith("blk.1.")}
    copied: dict[str, tuple[object, ...]] = {}
    for file in package.manifest.weight_files:
        model = read_gguf(package.path_of(file))
        assert model.architecture == "llama"
        copied |= bytes_of(model)
    assert copied == bytes_of(read_gguf(source))
    assert {kind for kind, *_ in copied.values()} == {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0}
    assert package.manifest.format == "gguf"
    assert parse_manifest(package.manifest.data) == package.manifest
    assert store.verify(package.model_id).corrupt == ()


def test_common_has_the_metadata_of_the_model_in_their_types(tmp_path: Path, store: ModelStore) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    package = import_model(str(source), store)
    assert package.manifest.common is not None
    before, after = read_gguf(source), read_gguf(package.path_of(package.manifest.common))
    kept = {key for key in before.metadata if key.startswith("llama.")} | {"general.architecture"}
    assert {key: (after.metadata[key], after.types[key]) for key in after.metadata} == {
        key: (before.metadata[key], before.types[key]) for key in kept
    }


def test_the_id_is_that_of_the_weights_and_not_of_the_file(tmp_path: Path, store: ModelStore) -> None:
    described = {"general.name": "Tiny", "general.quantized_by": "somebody", "general.url": "https://example.com/x"}
    noted = {"quantize.imatrix.file": "/home/me/imatrix.dat", "general.alignment": 64}
    model = import_model(str(write_gguf(tmp_path / "tiny.gguf")), store).model_id
    keys = dict(reversed((metadata() | described | noted).items()))
    weights = dict(reversed(tensors().items()))
    assert import_model(str(write_gguf(tmp_path / "again.gguf", keys, weights)), store).model_id == model
    assert import_model(str(write_split(tmp_path / "parts", count=3)[1]), store).model_id == model
    other = write_gguf(tmp_path / "other.gguf", metadata(rope__freq_base=500000.0))
    assert import_model(str(other), store).model_id != model
    assert import_model(str(write_gguf(tmp_path / "third.gguf", weights=tensors(seed=1))), store).model_id != model


def test_config_has_the_names_of_transformers(tmp_path: Path, store: ModelStore) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", metadata("qwen3moe"), tensors("qwen3moe", output=False))
    manifest = import_model(str(source), store).manifest
    assert manifest.config == {
        "head_dim": 8,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": BLOCKS,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": len(VOCABULARY),
        "weight_type": "F32",
    }
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (1, (2,))


def test_tokens_beyond_the_vocabulary_are_none(tmp_path: Path, store: ModelStore) -> None:
    none = {"tokenizer.ggml.bos_token_id": 0xFFFFFFFF, "tokenizer.ggml.eot_token_id": 0xFFFFFFFF}
    manifest = import_model(str(write_gguf(tmp_path / "tiny.gguf", metadata() | none)), store).manifest
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (None, (2,))


def test_an_architecture_that_transformers_does_not_know_is_imported(tmp_path: Path, store: ModelStore) -> None:
    keys = metadata("plamo9000", attention__head_count_kv=[2, 1], feed_forward_length=[64, 32])
    package = import_model(str(write_gguf(tmp_path / "new.gguf", keys)), store)
    assert package.manifest.model_type == "plamo9000"
    assert package.manifest.config["num_key_value_heads"] == 2
    assert package.manifest.config["intermediate_size"] == 64


def test_long_frequencies_reach_as_far_as_the_context(tmp_path: Path, store: ModelStore) -> None:
    factors = {f"rope_factors_{kind}.weight": np.ones(4, np.float32) for kind in ("long", "short")}
    keys = metadata("phi3", context_length=4096, rope__scaling__original_context_length=32)
    package = import_model(str(write_gguf(tmp_path / "phi.gguf", keys, tensors("phi3") | factors)), store)
    assert package.manifest.max_positions == 4096
    assert tensors_of(package)["common.gguf"] == ["rope_factors_long.weight", "rope_factors_short.weight"]


@pytest.mark.parametrize(
    ("tied", "start", "end", "names"),
    [
        (True, 0, 1, {"common", "embed", "block-000"}),
        (True, 1, 2, {"common", "embed", "block-001", "head"}),
        (False, 1, 2, {"common", "block-001", "head"}),
    ],
)
def test_every_span_has_the_common_file(
    tmp_path: Path, store: ModelStore, tied: bool, start: int, end: int, names: set[str]
) -> None:
    package = import_model(str(write_gguf(tmp_path / "tiny.gguf", weights=tensors(output=not tied))), store)
    assert {file.name for file in package.manifest.files_for(BlockRange(start, end))} == {f"{n}.gguf" for n in names}
    source = source_from_package(package, BlockRange(start, end))
    assert (source.format, source.common_file) == ("gguf", package.path / "common.gguf")
    assert (source.embed_file is None, source.head_file is None) == ("embed" not in names, "head" not in names)
    (package.path / "common.gguf").unlink()
    assert [file.name for file in package.missing(BlockRange(1, 2))] == ["common.gguf"]


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def twice(path: Path) -> None:
    """Give the second tensor the first one's name, which has as many letters."""
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.weight"))


def with_keys(**own: Any) -> Callable[[Path], None]:
    return lambda path: (write_gguf(path, metadata(**own)), None)[1]


def with_tensors(**extra: np.ndarray) -> Callable[[Path], None]:
    named = {name.replace("__", "."): tensor for name, tensor in extra.items()}
    return lambda path: (write_gguf(path, weights=tensors() | named), None)[1]


ROW = np.ones(8, np.float32)
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another file": (lambda path: path.write_bytes(b"PK\x03\x04"), "is not a GGUF file"),
    "cut short in the header": (cut(0.05), "cut short"),
    "cut short in the tensors": (cut(0.7), "is cut short: it has .* and its header describes"),
    "a tensor twice": (twice, "has the tensor 'blk.1.attn_k.weight' twice"),
    "an encoder": (with_tensors(enc__output_norm__weight=ROW), "has enc.output_norm.weight, whose use in a llama"),
    "a block too many": (
        with_tensors(blk__2__attn_q__weight=ROW),
        r"has tensors of block 2 .*model of 2 blocks is unk",
    ),
    "a state": (with_tensors(blk__0__ssm_conv1d__weight=ROW), "blk.0.ssm_conv1d.weight: a model with a state beside"),
    "a block too few": (
        lambda path: write_gguf(path, weights=without(tensors(), ["blk.1."])),
        r"lacks tensors of block 1 .*: it is not the whole model",
    ),
    "no embedding": (
        lambda path: write_gguf(path, weights=without(tensors(), ["token_embd"])),
        "lacks token_embd.weight: it is not the whole model",
    ),
    "an adapter": (lambda path: write_gguf(path, metadata() | {"general.type": "adapter"}), "is not a model"),
    "no blocks": (with_keys(block_count=0), "lacks the key llama.block_count"),
    "blocks in words": (with_keys(block_count="two"), "is damaged: its llama.block_count is 'two'"),
    "blocks beyond counting": (with_keys(block_count=4_000_000_000), "its llama.block_count is 4000000000"),
    "no heads": (with_keys(attention__head_count=None), "lacks the key llama.attention.head_count"),
    "another width": (with_keys(embedding_length=64), r"token_embd.weight has shape \[97, 32\], and llama.embedding_l"),
    "more tokens than rows": (
        lambda path: write_gguf(path, metadata() | {"tokenizer.ggml.tokens": ["a"] * 500}),
        "has 500 tokens, and token_embd.weight 97 rows",
    ),
    "a token that is a text": (
        lambda path: write_gguf(path, metadata() | {"tokenizer.ggml.eos_token_id": "</s>"}),
        "its special tokens are not token ids",
    ),
    "a name of an architecture that is none": (
        lambda path: write_gguf(path, metadata() | {"general.architecture": ""}),
        "does not name its architecture",
    ),
    "an architecture of two lines": (
        lambda path: write_gguf(path, metadata("llama\nrm -rf /")),
        r"general.architecture is 'llama\\nrm -rf /'",
    ),
    "a tensor of two lines": (with_tensors(**{"a\nb": ROW}), "has a b, whose use in a llama model of 2 blocks"),
}


@pytest.mark.parametrize(("damage", "line"), BROKEN.values(), ids=BROKEN)
def test_broken_file_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, store: ModelStore, damage: Callable[[Path], object], line: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    damage(path)
    with pytest.raises(ModelError, match=line) as error:
        import_model(str(path), store)
    assert "\n" not in str(error.value)
    assert "tiny.gguf" in str(error.value)
    assert list(store.cache_dir.rglob("*.gguf")) == []


def test_a_part_without_the_others_is_refused(tmp_path: Path, store: ModelStore) -> None:
    parts = write_split(tmp_path / "parts", count=3)
    parts[2].unlink()
    with pytest.raises(ModelError, match=r"tiny-00003-of-00003.gguf is not beside it: put all parts into one folder"):
        import_model(str(parts[0]), store)


def test_a_file_that_shrinks_while_it_is_copied_is_one_line(tmp_path: Path, store: ModelStore) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")

    def shrink(stage: str, done: int, total: int) -> None:
        if stage == "split":
            os.truncate(path, 2000)

    with pytest.raises(ModelError, match=r"tiny.gguf is cut short") as error:
        import_model(str(path), store, progress=shrink)
    assert "\n" not in str(error.value)
    assert store.list() == ()


def test_parts_can_be_hashed_without_being_written(tmp_path: Path) -> None:
    package = arrange_package(read_gguf(write_gguf(tmp_path / "tiny.gguf")))
    for name, part in package.parts.items():
        written = part.write(tmp_path / name, lambda _count: None)
        assert written.size_bytes == part.size_bytes == (tmp_path / name).stat().st_size
        assert part.write(None, lambda _count: None) == written


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("sound") / "tiny.gguf").read_bytes()


@given(data=st.data())
def test_no_change_of_bytes_raises_anything_else(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    header_bytes = min(tensor.offset for tensor in read_gguf(path_with(path, sound)).tensors.values())
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_bytes - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[position : position + len(new)] = new
    try:
        package = arrange_package(read_gguf(path_with(path, bytes(content))))
    except GgufError:
        return
    for part in package.parts.values():
        assert part.write(None, lambda _count: None).size_bytes == part.size_bytes


def path_with(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_hostile_number_of_tensors_is_one_line(tmp_path: Path, store: ModelStore) -> None:
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    with pytest.raises(ModelError, match="is cut short or damaged"):
        import_model(str(path), store)


MEASURED_IMPORT = """
import re, sys
from pathlib import Path
from node.models import sources
from node.models.importer import import_model
from node.models.store import ModelStore

sources.find_granularity = lambda *_: 1
sources.make_gguf_tokenizer = lambda _source, folder, _progress: folder.mkdir()

def peak_rss_kib():  # resource's ru_maxrss has that of the parent in it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak_rss_kib()
stored = []

def watch(stage, done, total):
    paths = Path(sys.argv[2]).rglob("*")
    stored.append(sum(path.stat().st_size for path in paths if path.is_file()) if len(stored) % 50 == 0 else 0)

import_model(sys.argv[1], ModelStore(Path(sys.argv[2])), progress=watch)
peak = peak_rss_kib()
print(max(stored), peak - before, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what is resident")
def test_import_takes_little_memory_and_the_disk_once(tmp_path: Path) -> None:
    size_bytes = 200 << 20
    source = write_large(tmp_path / "large.gguf", size_bytes)
    (tmp_path / "cache").mkdir()
    command = [sys.executable, "-c", MEASURED_IMPORT, str(source), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most_stored, added_kib, peak_kib = map(int, done.stdout.split())
    assert added_kib < 16 << 10, "the tensors pass through in pieces"
    assert peak_kib < 300 << 10
    [package] = ModelStore(tmp_path / "cache").list()
    assert package.missing() == ()
    assert most_stored <= package.manifest.size_bytes < 1.001 * source.stat().st_size
