"""Throughput of the CPU and each accelerator: reads of memory far larger than the caches, and matrix products.

Every part is bounded in time. A node often starts while others compute on the same cores, so each thread works on
matrices of its own with short operations, and interrupted ones are left out as outliers.
"""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch

from node.engine.device_probe import accelerators, free_bytes, synchronize
from node.util.text import one_line
from protocol.capabilities import Accelerator, Throughput

PART_S = 0.25
"""Time for one figure, preparation apart."""

MEMORY_BYTES = 256 << 20
MEMORY_BYTES_PER_THREAD = 64 << 20
"""What is read on the CPU: the larger of the two, which no last-level cache holds."""

WINDOW_BYTES = 8 << 20
"""What one operation reads on the CPU: about a third of a millisecond."""

WINDOWS = 8
"""Operations per thread over which a rate of reading is taken."""

CPU_MATRIX = 384
"""Rows and columns. Full speed on the CPUs seen, at about a millisecond for a product in fp32 on one core."""

ACCELERATOR_MATRICES = (1024, 2048, 4096, 8192)
ACCELERATOR_OPERATION_S = 0.004
"""Larger matrices are tried until a product takes this long: then the launch does not count any more."""

ACCELERATOR_READ_BYTES = 1 << 30

Operation = Callable[[], object]
Gaps = list[str]
"""Failed measurements, one line each."""


def measure_cpu(threads: int, available_bytes: int, gaps: Gaps) -> Throughput:
    """Return what `threads` cores sustain together, using at most an eighth of the available memory."""
    # One thread in each operation: a product that waits at a barrier for an interrupted thread measures the scheduler.
    torch.set_num_threads(1)
    read_bytes = min(max(MEMORY_BYTES // threads, MEMORY_BYTES_PER_THREAD), available_bytes // 8 // threads)

    def read() -> float:
        return WINDOW_BYTES * _joint_rate(_repeat_in_threads(threads, partial(_reader, read_bytes)))

    def multiply(dtype: torch.dtype) -> float:
        prepare = partial(_product, CPU_MATRIX, dtype, torch.device("cpu"))
        return 2 * CPU_MATRIX**3 * _summed_rate(_repeat_in_threads(threads, prepare))

    return _throughput("the CPU", read, multiply, gaps)


def measure_accelerators(gaps: Gaps) -> tuple[Accelerator, ...]:
    """Return every accelerator that torch can use, measured; of several alike only the first is."""
    measured: dict[Accelerator, Accelerator] = {}
    found = []
    for accelerator, device in accelerators():
        if accelerator not in measured:
            try:
                free = free_bytes(device)
            except RuntimeError as error:  # taken by others, or broken
                gaps.append(f"{accelerator.name}: {one_line(error, 200)}")
                measured[accelerator] = accelerator
            else:
                throughput = _measure_accelerator(accelerator.name, device, free, gaps)
                measured[accelerator] = replace(accelerator, throughput=throughput)
        found.append(measured[accelerator])
    return tuple(found)


def _measure_accelerator(name: str, device: torch.device, free: int, gaps: Gaps) -> Throughput:
    def read() -> float:
        size = min(ACCELERATOR_READ_BYTES, free // 4)
        source = torch.ones(size // 4, dtype=torch.float32, device=device)
        return source.nbytes * _summed_rate([_repeat(_completing(device, partial(torch.sum, source)))])

    return _throughput(name, read, partial(_multiply_on, device, free), gaps)


def _throughput(
    name: str, read: Callable[[], float], multiply: Callable[[torch.dtype], float], gaps: Gaps
) -> Throughput:
    return Throughput(
        memory_read_bytes_per_s=_attempt(f"memory of {name}", read, gaps),
        fp32_flop_per_s=_attempt(f"fp32 on {name}", partial(multiply, torch.float32), gaps),
        bf16_flop_per_s=_attempt(f"bf16 on {name}", partial(multiply, torch.bfloat16), gaps),
        int8_op_per_s=_attempt(f"int8 on {name}", partial(multiply, torch.int8), gaps),
    )


def _multiply_on(device: torch.device, free: int, dtype: torch.dtype) -> float:
    # Two factors and a product, of which int8 has one of int32; half of what is free is left alone.
    sizes = [size for size in ACCELERATOR_MATRICES if 3 * 4 * size**2 <= free // 2]
    if not sizes:
        raise MemoryError("not enough memory is free")
    for size in sizes:
        multiply = _completing(device, _product(size, dtype, device))
        started = time.perf_counter()
        multiply()
        if time.perf_counter() - started > ACCELERATOR_OPERATION_S:
            break
    return 2 * size**3 * _summed_rate([_repeat(multiply)])


def _completing(device: torch.device, operation: Operation) -> Operation:
    """Return the operation with the wait for its end: a device works asynchronously. Runs it once, to warm up."""

    def complete() -> None:
        operation()
        synchronize(device)

    complete()
    return complete


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Operation:
    # Zeros would draw less power, and so reach higher clocks, than real data.
    left, right = (torch.randn(size, size, device=device).mul_(20).to(dtype) for _ in range(2))
    if dtype is torch.int8:
        # The second factor stands column by column: cuBLAS multiplies int8 no other way.
        return partial(torch._int_mm, left, right.t())  # noqa: SLF001  # torch has no public product of int8
    return partial(torch.mm, left, right)


def _reader(size: int) -> Operation:
    """Return an operation that reads the next window of a buffer of its own."""
    windows = torch.ones(max(size, WINDOW_BYTES) // 4, dtype=torch.float32).split(WINDOW_BYTES // 4)
    whole = [window for window in windows if window.nbytes == WINDOW_BYTES]
    position = 0

    def read() -> None:
        nonlocal position
        torch.sum(whole[position])
        position = (position + 1) % len(whole)

    return read


def _repeat_in_threads(threads: int, prepare: Callable[[], Operation]) -> list[list[float]]:
    """Return for each thread when its operations ended; the first entry is when it began."""
    start = threading.Barrier(threads)

    def run(operation: Operation) -> list[float]:
        start.wait()
        return _repeat(operation)

    def prepared(_: int) -> Operation:
        operation = prepare()
        operation()
        return operation

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, list(pool.map(prepared, range(threads)))))


def _repeat(operation: Operation) -> list[float]:
    ends = [time.perf_counter()]
    while ends[-1] - ends[0] < PART_S:
        operation()
        ends.append(time.perf_counter())
    return ends


def _summed_rate(runs: Sequence[Sequence[float]]) -> float:
    """Return operations a second of all threads together, where they share nothing: the sum of their typical rates.

    A minority of interrupted operations does not count, however long they took.
    """
    return sum(1 / statistics.median(end - start for start, end in pairwise(run)) for run in runs)


def _joint_rate(runs: Sequence[Sequence[float]]) -> float:
    """Return operations a second of all threads together, where they share the memory.

    Every stretch of a few operations that ended one after another has a rate. Where one thread is interrupted, the
    stretch is slow; the faster quarter of them shows the joint rate.
    """
    ends = sorted(end for run in runs for end in run[1:])
    count = WINDOWS * len(runs)
    if len(ends) <= count:
        return len(ends) / (ends[-1] - min(run[0] for run in runs))
    stretches = sorted(end - start for start, end in zip(ends, ends[count:], strict=False))
    return count / stretches[len(stretches) // 4]


def _attempt(what: str, measure: Callable[[], float], gaps: Gaps) -> float | None:
    try:
        return measure()
    except Exception as error:  # noqa: BLE001  # unsupported by the device: every driver raises another error
        gaps.append(f"{what}: {one_line(error)}")
        return None
