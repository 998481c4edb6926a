"""The number of threads of a pass, on machines whose times are given."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from node.engine.llamacpp.thread_tuner import LONGEST_INTERVAL, MOST_ROWS, ThreadTuner

Machine = Callable[[int, int], float]
"""Seconds that a pass of so many rows takes with so many threads."""


def alone(rows: int, threads: int) -> float:
    """Each thread helps."""
    return (rows + 4) / threads


def shared(rows: int, threads: int) -> float:
    """Each thread more waits for a core that others have."""
    return (rows + 4) * threads


def best_with_four(rows: int, threads: int) -> float:
    return (rows + 4) / threads + threads / 3


def run(tuner: ThreadTuner, machine: Machine, passes: int, rows: int = 1) -> Counter[int]:
    """Compute passes; return how many had each number of threads."""
    used: Counter[int] = Counter()
    for _ in range(passes):
        used[threads := tuner.threads(rows)] += 1
        tuner.record(rows, machine(rows, threads))
    return used


@pytest.mark.parametrize(("machine", "best"), [(alone, 16), (shared, 1), (best_with_four, 4)])
def test_the_fastest_number_is_found_and_kept(machine: Machine, best: int) -> None:
    tuner = ThreadTuner(16)
    run(tuner, machine, 200)
    used = run(tuner, machine, 20 * LONGEST_INTERVAL)
    assert used[best] > 0.95 * used.total()


@pytest.mark.parametrize("deviation", [0.2, 0.5])
@pytest.mark.parametrize("limit", [2, 16])
def test_noise_hardly_matters(limit: int, deviation: float) -> None:
    noise = random.Random(0)
    tuner = ThreadTuner(limit)
    used = run(tuner, lambda rows, threads: alone(rows, threads) * noise.lognormvariate(0, deviation), 5000)
    assert used[limit] > 0.9 * used.total()


def test_passes_of_two_kinds_are_told_apart() -> None:
    tuner = ThreadTuner(2)
    used: Counter[int] = Counter()
    for number in range(4000):
        kind = "short" if number % 11 < 4 else "long"
        used[threads := tuner.threads(1, kind)] += 1
        tuner.record(1, alone(1, threads) * (1 if kind == "short" else 3), kind)
    assert used[2] > 0.93 * used.total()


def test_a_limit_that_is_no_power_of_two_is_used() -> None:
    assert run(ThreadTuner(6), alone, 1000).most_common(1)[0][0] == 6


def test_other_processes_are_noticed_within_few_passes_and_their_end_too() -> None:
    tuner = ThreadTuner(2)
    run(tuner, alone, 1000)
    assert run(tuner, shared, 40)[1] > 20
    run(tuner, shared, 1000)
    run(tuner, alone, LONGEST_INTERVAL + 20)
    assert run(tuner, alone, 100)[2] > 80


def test_single_interruptions_change_nothing() -> None:
    tuner = ThreadTuner(2)
    run(tuner, alone, 100)
    for _ in range(20):
        run(tuner, lambda rows, threads: 50 * alone(rows, threads), 1)
        assert run(tuner, alone, 50)[2] >= 40


def test_each_number_of_rows_is_tuned_by_itself_and_begins_with_what_is_known() -> None:
    tuner = ThreadTuner(8)
    run(tuner, shared, 100, rows=1)
    assert tuner.threads(2) == 1
    run(tuner, alone, 300, rows=2)
    assert run(tuner, alone, 100, rows=2).most_common(1)[0][0] == 8
    assert run(tuner, shared, 100, rows=1).most_common(1)[0][0] == 1


def test_passes_of_many_rows_take_all_threads() -> None:
    tuner = ThreadTuner(8)
    run(tuner, shared, 100)
    assert run(tuner, shared, 100, rows=MOST_ROWS + 1) == {8: 100}


def test_one_thread_is_never_left() -> None:
    assert run(ThreadTuner(1), shared, 100) == {1: 100}
