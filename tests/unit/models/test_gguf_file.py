"""The parts of a split are read as one model; what is damaged, cut short or foreign is one clear line."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from node.models.gguf_file import GgufError, read_gguf
from tests.unit.models.gguf_files import metadata, tensors, write_gguf, write_split


def test_reads_metadata_and_tensors_of_one_file(tmp_path: Path) -> None:
    model = read_gguf(write_gguf(tmp_path / "tiny.gguf"))
    weights = tensors()
    assert model.architecture == "llama"
    assert {key: model.metadata[key] for key in metadata() if "epsilon" not in key} == {
        key: value for key, value in metadata().items() if "epsilon" not in key
    }
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    for name, tensor in model.tensors.items():
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            np.testing.assert_array_equal(
                np.frombuffer(file.read(tensor.size_bytes), np.float32), weights[name].ravel()
            )


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_of_a_split_names_the_whole_model(tmp_path: Path, named: int) -> None:
    parts = write_split(tmp_path, count=3)
    model = read_gguf(parts[named])
    assert model.paths == tuple(parts)
    assert model.tensors.keys() == tensors().keys()
    assert model.metadata["llama.block_count"] == 2


def test_a_part_without_the_others_is_refused(tmp_path: Path) -> None:
    parts = write_split(tmp_path, count=3)
    parts[1].unlink()
    for number in (0, 2):
        line = rf"is part {number + 1} of 3 \(split.count = 3\), and tiny-00002-of-00003.gguf is not beside it"
        with pytest.raises(GgufError, match=line):
            read_gguf(parts[number])
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(GgufError, match=r"is part 1 of 3 .* not named NAME-00001-of-00003.gguf"):
        read_gguf(tmp_path / "renamed.gguf")


def test_a_part_of_another_split_is_refused(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "one")
    more = {**tensors(), "output.bias": np.zeros(3, np.float32)}
    others = write_split(tmp_path / "other", weights=more)
    others[1].replace(parts[1])
    with pytest.raises(
        GgufError, match=r"is not a part of the same split as .*: its split.tensors.count is 22, not 21"
    ):
        read_gguf(parts[0])
    write_split(tmp_path / "one")[0].replace(parts[1])
    write_split(tmp_path / "one")[1].replace(parts[1])
    split = {"split.no": 0, "split.count": 2, "split.tensors.count": 21}
    write_gguf(parts[1], {"general.architecture": "llama", **split}, tensors())
    with pytest.raises(GgufError, match=r"its split.no is 0, not 1"):
        read_gguf(parts[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    split = {"split.no": 1, "split.count": 2, "split.tensors.count": 21}
    write_gguf(parts[1], {"general.architecture": "llama", **split}, tensors())
    with pytest.raises(GgufError, match=r"tensor '.*' is in tiny-00001-of-00002.gguf and in tiny-00002-of-00002.gguf"):
        read_gguf(parts[0])


def test_parts_that_lack_tensors_of_the_split_are_refused(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    split = {"split.no": 1, "split.count": 2, "split.tensors.count": 21}
    write_gguf(parts[1], {"general.architecture": "llama", **split}, {"output_norm.weight": np.ones(32, np.float32)})
    with pytest.raises(GgufError, match=r"have 12 tensors, not 21 \(split.tensors.count\)"):
        read_gguf(parts[0])


def test_truncated_gguf_names_both_sizes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    whole = path.stat().st_size
    os.truncate(path, whole - 1000)
    with pytest.raises(
        GgufError, match=rf"is cut short: it has {whole - 1000} bytes, and its header describes {whole}"
    ):
        read_gguf(path)
    for length in (9, 40, 200, 1000, 2500):
        os.truncate(write_gguf(path), length)
        with pytest.raises(GgufError, match=rf"cut short.* {length} bytes"):
            read_gguf(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is not a GGUF file: it is empty"),
        (b"PK\x03\x04 a zip file", "is not a GGUF file: it starts with b'PK"),
        (b"GGUF", "is cut short: it has only 4 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 1, 1, 1), "is GGUF version 1, which is too old"),
        (b"GGUF" + struct.pack("<IQQ", 4, 1, 1), "is GGUF version 4, which is unknown here"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "is a big-endian GGUF file"),
        (b"tjgg" + struct.pack("<I", 3), r"is in a format older than GGUF \(ggjt\)"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "is cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "is cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(9), "metadata have a value of type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "does not name its architecture"),
        (b"GGUF\x03\0\0\0" + b"\xa5\x5a\x01" * 200, "cut short or damaged|damaged"),
    ],
)
def test_what_is_not_a_readable_gguf_file_is_one_line(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=line) as error:
        read_gguf(path)
    assert "\n" not in str(error.value)
    assert "model.gguf" in str(error.value)


def tensor_info(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    return struct.pack(f"<Q{len(name)}sI{len(shape)}QIQ", len(name), name, len(shape), *shape, kind, offset)


def key_value(key: bytes, value: bytes) -> bytes:
    return struct.pack(f"<Q{len(key)}sIQ{len(value)}s", len(key), key, 8, len(value), value)


@pytest.mark.parametrize(
    ("infos", "line"),
    [
        ([(b"a", [8], 0, 0), (b"a", [8], 0, 32)], "has the tensor 'a' twice"),
        ([(b"a", [8], 0, 0), (b"b", [16], 0, 0)], "tensors '.' and '.' overlap"),
        ([(b"a", [8], 0, 4)], r"tensor 'a' .* is damaged: shape \[8\] in F32 at offset 4"),
        ([(b"a", [2**62, 2**62], 0, 0)], "is cut short"),
        ([(b"a", [8], 999, 0)], "tensor 'a' .* is of type 999, which is unknown"),
        ([(b"a", [8], 8, 0)], r"shape \[8\] in Q8_0"),
        ([(b"a", [1] * 9, 0, 0)], "has 9 dimensions"),
        ([(b"a", [0], 0, 0)], "is damaged: shape"),
    ],
)
def test_tensors_that_do_not_fit_the_file_are_refused(
    tmp_path: Path, infos: list[tuple[bytes, list[int], int, int]], line: str
) -> None:
    keys = key_value(b"general.architecture", b"llama")
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), 1) + keys + b"".join(tensor_info(*info) for info in infos)
    path = tmp_path / "model.gguf"
    path.write_bytes(header + bytes(1000))
    with pytest.raises(GgufError, match=line):
        read_gguf(path)


def test_duplicate_gguf_key_is_refused(tmp_path: Path) -> None:
    keys = key_value(b"general.architecture", b"llama") + key_value(b"general.architecture", b"qwen2")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + keys)
    with pytest.raises(GgufError, match=r"has the key 'general.architecture' twice"):
        read_gguf(tmp_path / "model.gguf")
