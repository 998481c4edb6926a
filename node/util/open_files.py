"""The limit of open files, and recovery when it is reached.

Any peer can make a node reach its limit. That may cost a connection or a sample, never the node.
"""

import errno
import resource
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog
import trio

ENOUGH_FILES: Final = 65_536
"""The soft limit is raised to this at most: some programs that inherit it walk through all numbers below it."""

SHORTAGE_PAUSE_S: Final = 1.0

_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE})

_logger = structlog.get_logger(__name__)


def raise_open_file_limit() -> int:
    """Raise the soft limit of open files as far as this process may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit of its own that it does not report
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return open_file_limit()


def open_file_limit() -> int:
    """Return how many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft


def is_file_shortage(error: BaseException) -> bool:
    """Return whether an exception, or each in a group, means that no more files can be opened now."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_file_shortage(each) for each in error.exceptions)
    return isinstance(error, OSError) and error.errno in _SHORTAGES


async def retry_on_file_shortage(run: Callable[..., Awaitable[None]], *args: object) -> None:
    """Run a task of the node, and again when it ended because no file could be opened."""
    while True:
        try:
            await run(*args)
        except (OSError, ExceptionGroup) as error:
            if not is_file_shortage(error):
                raise
            task = getattr(run, "__qualname__", repr(run))
            _logger.warning("task restarted: too many open files", task=task, limit=open_file_limit())
        else:
            return
        await trio.sleep(SHORTAGE_PAUSE_S)
