"""Pages of memory that this process has mapped."""

import ctypes
import mmap
import sys
from contextlib import suppress
from pathlib import Path


def drop_mapped_pages(path: Path) -> None:
    """Give the memory of a file's mappings back to the operating system; what is used after that is read again.

    For mappings of libraries, where only Linux tells where they are.
    """
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, *_, name = line.split(maxsplit=5)
            if name == str(path):
                start, end = (int(each, 16) for each in addresses.split("-"))
                drop_pages(start, end - start)


def drop_pages(start: int, size_bytes: int) -> None:
    """Give the memory of whole pages in a range of addresses back; what no file holds reads as zeros then.

    Only Linux does so at once and for certain.
    """
    if sys.platform != "linux":
        return
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
