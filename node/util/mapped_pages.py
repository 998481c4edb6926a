"""Pages of files that this process has mapped."""

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path


def drop_mapped_pages(path: Path) -> None:
    """Give the memory of a file's mappings back to the operating system; what is used after that is read again.

    For mappings of libraries, where only Linux tells where they are.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    with suppress(OSError, AttributeError, ValueError):
        advise = ctypes.CDLL(None).madvise
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, *_, name = line.split(maxsplit=5)
            if name == str(path):
                start, end = (int(each, 16) for each in addresses.split("-"))
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
