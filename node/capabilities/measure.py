"""Runs the benchmark of this machine in a child process, and caches the measurements across restarts."""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Self

import structlog

from node.models.files import write_atomically
from node.util.child_process import ChildError, run
from node.util.interpreter import python
from protocol.capabilities import MAX_ACCELERATORS, Accelerator, Throughput
from protocol.errors import RemoteProtocolError
from protocol.forms import Share
from protocol.schema import Count, Form, from_map, to_map

BENCHMARK: Final = python("-m", "node.engine.benchmark")

TIME_LIMIT_S: Final = 1800.0
"""A benchmark takes five seconds of an idle machine. At idle priority it takes as long as it must on a busy one;
`node.engine.benchmark` bounds its processor time."""

LOCK_FILE: Final = "measurements.lock"

MAX_GAPS: Final = 1024
MAX_GAP_CHARACTERS: Final = 500

_logger = structlog.get_logger(__name__)


class MeasurementError(Exception):
    """The benchmark failed. The message is one line."""


def _gap(value: object, _what: str) -> str:
    return str(value)[:MAX_GAP_CHARACTERS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Results of the benchmark. Fields of stored ones that are measured no longer are skipped."""

    extensible: ClassVar[bool] = True

    cpu: Throughput
    cpu_share: Share
    """The benchmark's fraction of the processor time that it asked for; if low, the CPU's figures are too low."""
    accelerators: Annotated[tuple[Accelerator, ...], Count(MAX_ACCELERATORS)]
    gaps: Annotated[tuple[Annotated[str, Form(_gap)], ...], Count(MAX_GAPS)] = ()
    """Measurements that failed, one line each."""

    @classmethod
    def parse(cls, document: bytes | str) -> Self:
        """Return the measurements in a document. Raises MeasurementError."""
        try:
            return from_map(cls, json.loads(document), "measurements")
        except (ValueError, RecursionError, RemoteProtocolError) as error:
            raise MeasurementError(f"malformed benchmark result: {error}") from None


async def run_benchmark(
    threads: int, *, command: Sequence[str] = BENCHMARK, time_limit_s: float = TIME_LIMIT_S
) -> Measurements:
    """Measure this machine with `threads` threads.

    Takes five seconds at idle priority in a child process, which is killed after `time_limit_s` and on cancellation.
    Raises MeasurementError.
    """
    arguments = [*command, "--threads", str(threads)]
    try:
        return Measurements.parse(await run(arguments, what="the benchmark", time_limit_s=time_limit_s))
    except ChildError as error:
        raise MeasurementError(str(error)) from None


@contextmanager
def measuring_alone(directory: Path) -> Iterator[bool]:
    """Lock this machine against benchmarks of other nodes, which would distort ours; yield whether that succeeded.

    `directory`: where the nodes store their measurements.
    """
    try:
        lock = (directory / LOCK_FILE).open("w")
    except OSError:
        yield True  # nothing can be stored here, so no other node locks it
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def load_measurements(directory: Path, fingerprint: str) -> Measurements | None:
    """Return the stored measurements of this hardware and software, if there are valid ones."""
    try:
        stored = json.loads(_cache_file(directory, fingerprint).read_text(encoding="utf-8"))
        if stored["fingerprint"] != fingerprint:
            return None
        return Measurements.parse(json.dumps(stored["measurements"]))
    except (OSError, ValueError, TypeError, KeyError, MeasurementError):
        return None


def save_measurements(directory: Path, fingerprint: str, measurements: Measurements) -> None:
    """Store measurements for the next start, atomically. An error of the disk is only logged."""
    document = {"fingerprint": fingerprint, "measurements": to_map(measurements)}
    try:
        write_atomically(_cache_file(directory, fingerprint), (json.dumps(document, indent=2) + "\n").encode())
    except OSError as error:
        _logger.warning("measurements not stored: the next start measures again", reason=error.strerror)


def _cache_file(directory: Path, fingerprint: str) -> Path:
    # One file each: nodes of one machine may differ in threads or visible accelerators.
    return directory / f"measurements-{fingerprint[:16]}.json"
