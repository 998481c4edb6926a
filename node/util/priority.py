"""How processes that the node starts beside its work leave the processor to those who serve jobs."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_AUTOGROUP: Final = Path("/proc/self/autogroup")

LOWEST: Final = 19
"""The nicest that a process can be."""

SLEEPING_THREADS: Final[Mapping[str, str]] = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Environment in which OpenMP's threads sleep while they wait; spinning, they would take the cores from others."""

BRIEFLY_SPINNING_THREADS: Final[Mapping[str, str]] = {**SLEEPING_THREADS, "GOMP_SPINCOUNT": "1000"}
"""The same for who serves jobs: to sleep and be woken takes longer than most waits within a pass, so threads spin for
some 20 µs before. On two cores of its own llama.cpp decodes three times as fast by it."""


def yield_to_others() -> None:
    """Take only what others leave of the processor, from now on."""
    os.nice(LOWEST)
    if os.getsid(0) == os.getpid():
        set_session_nice(LOWEST)


def set_session_nice(nice: int) -> None:
    """Weigh this session against others: where Linux groups processes by session, priorities hold only within one."""
    for _ in range(3):
        try:
            _AUTOGROUP.write_text(str(nice))
        except BlockingIOError:
            time.sleep(0.15)  # the kernel allows it ten times a second
        except OSError:
            return
        else:
            return
