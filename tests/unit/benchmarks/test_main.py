"""What `python -m benchmarks` runs is what the README cites."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks

ROOT = Path(__file__).parents[3]
CITED = re.compile(r"python -m benchmarks\.(\w+)")


def cited(file: str) -> set[str]:
    return set(CITED.findall((ROOT / file).read_text(encoding="utf-8")))


def test_cited_benchmarks_are_runnable_and_all_are_described() -> None:
    runnable = {*benchmarks.QUICK, *benchmarks.LONG}
    assert cited("README.md") <= runnable
    assert cited("benchmarks/README.md") == runnable | benchmarks.WITH_ARGUMENTS.keys()
    for name in runnable | benchmarks.WITH_ARGUMENTS.keys():
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()


def test_failing_benchmark_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, int(command[-1].endswith("ping")))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    assert benchmarks.main() == 1
    output = capsys.readouterr().out
    assert [name for name in benchmarks.QUICK if f"benchmarks.{name}\n" in output] == list(benchmarks.QUICK)
    assert output.endswith("failed: ping\n")


def test_list_names_all_benchmarks_and_runs_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks, "run", lambda names: pytest.fail("ran"))
    monkeypatch.setattr("sys.argv", ["benchmarks", "--list"])
    assert benchmarks.main() == 0
    assert CITED.findall(capsys.readouterr().out) == [
        *benchmarks.QUICK,
        *benchmarks.LONG,
        *benchmarks.WITH_ARGUMENTS,
    ]
