"""Lets a process end with the one that started it, also where that is killed and can end nothing itself."""

import os
import select
import threading
from typing import NoReturn


def end_with_parent() -> None:
    """Exit as soon as the parent process is gone; where the system cannot tell (Linux can), run on to the end."""
    if not hasattr(os, "pidfd_open"):
        return
    try:
        descriptor = os.pidfd_open(os.getppid())
    except OSError:  # forbidden here
        return
    threading.Thread(target=_exit_after, args=[descriptor], daemon=True).start()


def _exit_after(descriptor: int) -> NoReturn:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os._exit(1)
