"""A mapped file's memory can be given back, and is read again when it is used."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from node.util.mapped_pages import drop_mapped_pages, drop_pages


def resident_bytes(path: Path) -> int:
    total, is_it = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == "Rss":
            total += 1024 * int(value.split()[0]) if is_it else 0
        elif "-" in field.split(" ")[0]:
            is_it = line.endswith(f" {path}")
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is mapped")
def test_pages_of_a_mapping_are_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a file.gguf"
    path.write_bytes(b"weights." * 32768)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert len(bytes(mapped)) == resident_bytes(path)
        drop_mapped_pages(tmp_path / "another")
        assert resident_bytes(path) > 0
        drop_mapped_pages(path)
        assert resident_bytes(path) == 0
        assert mapped[:8] == b"weights."


def test_unknown_file_is_no_error(tmp_path: Path) -> None:
    drop_mapped_pages(tmp_path / "nothing")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives pages back at once")
def test_only_whole_pages_of_a_range_are_given_back() -> None:
    size = 4 * mmap.PAGESIZE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        mapped.write(b"x" * size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        drop_pages(start + 10, 2 * mmap.PAGESIZE)
        kept = bytes(mapped)
    assert kept == b"x" * mmap.PAGESIZE + bytes(mmap.PAGESIZE) + b"x" * 2 * mmap.PAGESIZE
