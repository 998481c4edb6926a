"""What happens when no more files can be opened: a connection or a sample less, never the end of the node."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from trio.testing import MockClock

from node.capabilities import probe
from node.capabilities.inventory import Inventory
from node.capabilities.traffic import TrafficMeter
from node.network.addresses import _interface_addresses, expand_wildcard, parse_address
from node.network.limits import NetworkLimits
from node.util.open_files import is_file_shortage, open_file_limit, raise_open_file_limit, retry_on_file_shortage

OPEN_FILES = Path("/proc/self/fd")


@contextmanager
def soft_limit(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def no_file_left() -> Iterator[None]:
    """Use up every file that may be open."""
    held: list[int] = []
    with soft_limit(max(int(file.name) for file in OPEN_FILES.iterdir()) + 32):
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            yield
        finally:
            for descriptor in held:
                os.close(descriptor)


def test_soft_open_file_limit_is_raised_to_hard_limit() -> None:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    expected = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    with soft_limit(min(before, 128)):
        assert raise_open_file_limit() == max(128, expected)
        assert open_file_limit() == max(128, expected)


async def test_task_restarts_after_file_shortage_but_not_after_other_errors(virtual_clock: MockClock) -> None:
    faults: list[Exception] = [
        ExceptionGroup("nursery", [OSError(errno.EMFILE, "too many"), OSError(errno.ENFILE, "too many")]),
        OSError(errno.EMFILE, "too many"),
    ]

    async def task() -> None:
        if faults:
            raise faults.pop()

    await retry_on_file_shortage(task)
    assert not faults
    faults.append(ExceptionGroup("nursery", [OSError(errno.EMFILE, "too many"), ValueError("a defect")]))
    with pytest.raises(ExceptionGroup):
        await retry_on_file_shortage(task)
    faults.append(OSError(errno.ENOSPC, "full"))
    assert not is_file_shortage(faults[0])
    with pytest.raises(OSError, match="full"):
        await retry_on_file_shortage(task)


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="files are counted in /proc")
async def test_last_reading_is_used_during_file_shortage() -> None:
    wildcard = parse_address("/ip4/0.0.0.0/tcp/4001")
    addresses = expand_wildcard(wildcard)
    inventory = Inventory(data_dir=Path(os.devnull), traffic=TrafficMeter(), connected=tuple)
    inventory._facts = probe.probe()
    before = inventory.capabilities()
    assert before is not None
    with no_file_left():
        with pytest.raises(OSError, match="Too many open files"):
            psutil.virtual_memory()
        _interface_addresses.cache_clear()
        assert expand_wildcard(wildcard) == addresses
        without = inventory.capabilities()
    assert without is not None
    assert without.memory.available_bytes == before.memory.available_bytes > 0


@pytest.mark.parametrize("open_files", [64, 256, 1024, 4096, 65_536])
def test_connection_limits_leave_open_files_for_the_rest(open_files: int) -> None:
    limits = NetworkLimits.within(open_files)
    assert limits.max_connections + limits.handshakes <= open_files / 2
    assert limits.inbound.per_range <= limits.inbound.per_origin <= limits.inbound.total < limits.max_connections
    if open_files >= 4096:
        assert limits == NetworkLimits()
