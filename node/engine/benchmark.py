"""Measures this machine's throughput: `python -m node.engine.benchmark [--threads N]`.

A process of its own, because only the engine may import torch, and because drivers crash. It runs at idle priority and
takes about five seconds. Prints one JSON document:

    {"cpu": throughput, "cpu_share": share, "accelerators": [accelerator], "gaps": [text]}

where throughput and accelerator are as in capability records; failed measurements are left out and named in `gaps`.
`cpu_share`: the share of the wanted processor time that the CPU's figures got; far below 1 they are too low.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from node.util.parent import end_with_parent
from node.util.priority import yield_to_others
from protocol.schema import to_map

MAX_CPU_S = 120
"""Processor time after which the kernel ends it: it takes ten seconds, more with many cores or accelerators."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the document, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.engine.benchmark")
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
        "gaps": gaps,
    }
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
