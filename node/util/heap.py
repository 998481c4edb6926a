"""Memory of the C library's heap."""

import ctypes
from contextlib import suppress


def trim_heap() -> None:
    """Give freed memory back to the operating system, where the C library can; packing leaves holes in the heap."""
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
