"""Pages of memory that this process has mapped."""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
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


def drop_elements(start: int, element_bytes: int, elements: Sequence[int]) -> None:
    """Give the memory of an array's elements, in order, back: only where neighbours fill whole pages together."""
    for _, numbered in groupby(enumerate(elements), key=lambda pair: pair[1] - pair[0]):
        run = [element for _, element in numbered]
        drop_pages(start + run[0] * element_bytes, len(run) * element_bytes)


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
