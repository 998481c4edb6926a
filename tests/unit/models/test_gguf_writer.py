"""What is written again is what was read: values with their types, tensors byte for byte, however it is copied."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from node.models.gguf_file import read_gguf
from node.models.gguf_writer import U32, GgufData, GgufValue, assemble_gguf, typed_metadata, write_gguf
from tests.unit.models.gguf_files import tensors
from tests.unit.models.gguf_files import write_gguf as write_source


def every_type(path: Path) -> Path:
    """Write a file with a value of every type."""
    writer = GGUFWriter(path, "llama")
    for kind in GGUFValueType:
        if kind is GGUFValueType.ARRAY:
            writer.add_array("a.strings", ["one", "zwei", "三"])
            writer.add_key_value("a.numbers", [1, -2, 3], kind, GGUFValueType.INT32)
            writer.add_key_value("a.flags", [True, False], kind, GGUFValueType.BOOL)
            writer.add_key_value("a.floats", [0.1, 2.5], kind, GGUFValueType.FLOAT32)
        elif kind is GGUFValueType.STRING:
            writer.add_string("a.string", "naïve")
        else:
            writer.add_key_value(f"a.{kind.name}", 0.1 if "FLOAT" in kind.name else 1, kind)
    writer.add_tensor("small", np.arange(3, dtype=np.float32))
    writer.add_tensor("weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_rewritten_file_is_byte_for_byte_the_same(tmp_path: Path) -> None:
    source = every_type(tmp_path / "source.gguf")
    model = read_gguf(source)
    written = write_gguf(tmp_path / "again.gguf", typed_metadata(model), list(model.tensors.values()))
    assert (tmp_path / "again.gguf").read_bytes() == source.read_bytes()
    assert written == (source.stat().st_size, sha256(source.read_bytes()).hexdigest())
    assemble_gguf(tmp_path / "assembled.gguf", typed_metadata(model), list(model.tensors.values()))
    assert (tmp_path / "assembled.gguf").read_bytes() == source.read_bytes()


def test_types_of_values_are_read(tmp_path: Path) -> None:
    types = read_gguf(every_type(tmp_path / "source.gguf")).types
    assert types["a.numbers"] == (GGUFValueType.ARRAY, GGUFValueType.INT32)
    assert types["a.flags"] == (GGUFValueType.ARRAY, GGUFValueType.BOOL)
    assert types["a.UINT64"] == (GGUFValueType.UINT64,)


def test_other_readers_read_renamed_and_given_tensors(tmp_path: Path) -> None:
    model = read_gguf(write_source(tmp_path / "source.gguf", quantised="attn_q"))
    taken = replace(model.tensors["blk.1.attn_q.weight"], name="blk.0.attn_q.weight")
    zeros = GgufData("token_embd.weight", (4, 32), GGMLQuantizationType.F16, bytes(256))
    write_gguf(tmp_path / "part.gguf", {"llama.block_count": GgufValue(1, U32)}, [zeros, taken])
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "part.gguf").tensors}
    assert found["token_embd.weight"].data.shape == (4, 32)
    assert found["blk.0.attn_q.weight"].tensor_type is GGMLQuantizationType.Q8_0
    with (tmp_path / "source.gguf").open("rb") as file:
        file.seek(taken.offset)
        assert found["blk.0.attn_q.weight"].data.tobytes() == file.read(taken.size_bytes)
    assert len(tensors()) > 2


def test_alignment_of_the_source_is_kept(tmp_path: Path) -> None:
    metadata = {
        "general.alignment": GgufValue(64, U32),
        "general.architecture": GgufValue("llama", (GGUFValueType.STRING,)),
    }
    given = [GgufData(name, (3,), GGMLQuantizationType.F32, name.encode() * 12) for name in "ab"]
    write_gguf(tmp_path / "wide.gguf", metadata, given)
    found = read_gguf(tmp_path / "wide.gguf").tensors
    assert [tensor.offset % 64 for tensor in found.values()] == [0, 0]
    data = (tmp_path / "wide.gguf").read_bytes()
    assert data[found["b"].offset :][:12] == b"b" * 12


@pytest.mark.parametrize("write", [write_gguf, assemble_gguf])
def test_source_that_became_shorter_is_one_line(tmp_path: Path, write: object) -> None:
    model = read_gguf(write_source(tmp_path / "source.gguf"))
    (tmp_path / "source.gguf").write_bytes((tmp_path / "source.gguf").read_bytes()[:-100])
    assert callable(write)
    with pytest.raises(OSError, match=r"source.gguf is cut short: tensor '.*' ends at"):
        write(tmp_path / "copy.gguf", typed_metadata(model), list(model.tensors.values()))
