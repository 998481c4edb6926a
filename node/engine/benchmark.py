"""Measures this machine's throughput: `python -m node.engine.benchmark --directory DIR [--threads N]`.

A process of its own, because only the engine may import torch, and because drivers crash. It runs at idle priority and
takes about five seconds. Prints one JSON document:

    {"cpu": throughput, "cpu_share": share, "accelerators": [accelerator], "disk_read_bytes_per_s": figure,
     "gaps": [text]}

where throughput and accelerator are as in capability records; failed measurements are left out and named in `gaps`.
`cpu_share`: the share of the wanted processor time that the CPU's figures got; far below 1 they are too low.
"""

import argparse
import fcntl
import json
import mmap
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from node.util.parent import end_with_parent
from node.util.priority import yield_to_others
from protocol.schema import to_map

DISK_BYTES = 64 << 20
DISK_WRITE_S = 0.5
DISK_READ_S = 0.5
PIECE_BYTES = 4 << 20

MAX_CPU_S = 120
"""Processor time after which the kernel ends it: it takes ten seconds, more with many cores or accelerators."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the document, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.engine.benchmark")
    parser.add_argument("--directory", type=Path, required=True, help="where the disk is measured")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    options = parser.parse_args(arguments)
    yield_to_others()
    end_with_parent()
    cores = psutil.cpu_count() or 1
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S * cores, resource.RLIM_INFINITY))
    if sys.platform == "linux":
        with suppress(OSError, psutil.Error):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)

    # Importing torch is most of the work on a slow machine: not before the priority is low.
    from node.engine.throughput import measure_accelerators, measure_cpu

    gaps: list[str] = []
    available_bytes = psutil.virtual_memory().available
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    cpu = measure_cpu(options.threads, available_bytes, gaps)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    document: dict[str, object] = {
        "cpu": to_map(cpu),
        "cpu_share": min(1.0, cpu_s / (wall_s * options.threads)),
        "accelerators": [to_map(accelerator) for accelerator in measure_accelerators(gaps)],
    }
    try:
        document["disk_read_bytes_per_s"] = measure_disk_read(options.directory)
    except OSError as error:
        gaps.append(f"disk: {error.strerror}")
    document["gaps"] = gaps
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def measure_disk_read(directory: Path) -> float:
    """Return the read rate of a new file in a directory, past the system's cache where possible. Raises OSError."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file, mmap.mmap(-1, PIECE_BYTES) as piece:
        descriptor = file.fileno()
        piece.write(os.urandom(PIECE_BYTES))  # incompressible
        size = 0
        started = time.perf_counter()
        while size < DISK_BYTES and time.perf_counter() - started < DISK_WRITE_S:
            size += os.pwrite(descriptor, piece, size)
            os.fsync(descriptor)  # each piece: one flush at the end may take any time
        if sys.platform == "darwin":
            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            with suppress(OSError):  # a file system without direct access has let go of its cache as far as it can
                fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)

        position = 0
        started = time.perf_counter()
        while position < size and time.perf_counter() - started < DISK_READ_S:
            position += os.preadv(descriptor, [piece], position)
        return position / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
