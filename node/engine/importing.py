"""Imports that only some variants need: one that fails costs these, and not the worker with all its sessions."""

from collections.abc import Iterator
from contextlib import contextmanager

from node.engine.interface import EngineError
from node.util.text import one_line


@contextmanager
def importing(what: str) -> Iterator[None]:
    """Raise EngineError where an import fails inside of the block of code: of what is missing, damaged or refused."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise EngineError(f"{what} cannot be imported: {one_line(error)}") from error
