import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from node.capabilities.measure import (
    MeasurementError,
    Measurements,
    load_measurements,
    measuring_alone,
    run_benchmark,
    save_measurements,
)
from protocol.capabilities import Throughput
from tests.support.capabilities import EPYC, H100

MEASURED = Measurements(
    cpu=EPYC.processor.throughput, cpu_share=0.97, accelerators=(H100,), gaps=("int8 on the CPU: not implemented",)
)


def child(program: str) -> tuple[str, ...]:
    """Return the command of a benchmark that does something else."""
    return (sys.executable, "-c", program)


async def test_benchmark_of_this_machine_meets_its_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    measured = await run_benchmark(1, time_limit_s=300)
    cpu = measured.cpu
    assert measured.gaps == ()
    # Whatever the machine and however busy it is: between a slow board's and a fast core's.
    assert 1e8 < (cpu.memory_read_bytes_per_s or 0) < 1e12
    for rate in (cpu.fp32_flop_per_s, cpu.bf16_flop_per_s, cpu.int8_op_per_s):
        assert 1e8 < (rate or 0) < 1e14
    assert list(await trio.Path(tmp_path).iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('no such device')", "exited with 1: no such device"),
        ("import os; os.abort()", "was killed by SIGABRT"),
        ("print('surprise')", "malformed"),
        ("print('[' * 100000)", "malformed"),
        ("print('{\"cpu\": {}}')", "malformed"),
        ("", "malformed"),
        ("import time; time.sleep(60)", "took longer than 0.5 s"),
    ],
    ids=["fails", "crashes", "babbles", "nests", "is unfinished", "is silent", "hangs"],
)
async def test_benchmark_failure_is_a_one_line_error(program: str, reason: str) -> None:
    limit_s = 0.5 if "sleep" in program else 20.0
    with pytest.raises(MeasurementError, match=reason) as raised:
        await run_benchmark(1, command=child(program), time_limit_s=limit_s)
    assert "\n" not in str(raised.value)


async def test_benchmark_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot be started: No such file"):
        await run_benchmark(1, command=[str(tmp_path / "nothing")])


def test_measurements_survive_a_restart(tmp_path: Path) -> None:
    slower = replace(MEASURED, cpu=Throughput(fp32_flop_per_s=1e9))
    save_measurements(tmp_path, "this machine", MEASURED)
    assert load_measurements(tmp_path, "another machine") is None
    save_measurements(tmp_path, "another machine", slower)
    assert load_measurements(tmp_path, "this machine") == MEASURED
    assert load_measurements(tmp_path, "another machine") == slower
    assert len(list(tmp_path.iterdir())) == 2


def test_measurements_of_an_earlier_release_are_not_repeated(tmp_path: Path) -> None:
    save_measurements(tmp_path, "x", MEASURED)
    (path,) = tmp_path.iterdir()
    stored = json.loads(path.read_text())
    stored["measurements"]["disk_read_bytes_per_s"] = 1.5e9
    path.write_text(json.dumps(stored))
    assert load_measurements(tmp_path, "x") == MEASURED


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"fingerprint": "x"}', '{"fingerprint": "x", "measurements": 1}']
)
def test_damaged_measurements_are_ignored(tmp_path: Path, damage: str) -> None:
    save_measurements(tmp_path, "x", MEASURED)
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    assert load_measurements(tmp_path, "x") is None


@pytest.mark.parametrize("changed", [("fingerprint", "y"), ("measurements", {"cpu": {"fp32_flop_per_s": -1.0}})])
def test_impossible_measurements_are_ignored(tmp_path: Path, changed: tuple[str, object]) -> None:
    save_measurements(tmp_path, "x", MEASURED)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | dict([changed])))
    assert load_measurements(tmp_path, "x") is None


def test_benchmark_lock_admits_one_node(tmp_path: Path) -> None:
    with measuring_alone(tmp_path) as first, measuring_alone(tmp_path) as second:
        assert (first, second) == (True, False)
    with measuring_alone(tmp_path) as alone, measuring_alone(tmp_path / "missing") as elsewhere:
        assert alone
        assert elsewhere


def test_measurements_on_an_unwritable_disk_are_only_not_cached(tmp_path: Path) -> None:
    save_measurements(tmp_path / "missing", "x", MEASURED)
    assert load_measurements(tmp_path / "missing", "x") is None
