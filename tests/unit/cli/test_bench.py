import json
from pathlib import Path
from typing import Any

import pytest

from node.cli import run
from node.cli.bench import WORKLOADS, grid
from node.cli.client import ApiClient
from node.cli.output import CommandError
from selector.task import portfolio
from tests.unit.api.fakes import FakeNode
from tests.unit.cli.conftest import ServeNode


def test_grid_is_product_of_axes(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node = FakeNode()
    axes = ["--concurrency", "1", "--concurrency", "8", "--prompt-tokens", "16", "--prompt-tokens", "32"]
    assert run(["bench", "--api", serve(node), *axes, "--rounds", "2"]) == 0
    assert [(spec.workload.concurrency, spec.workload.prompt_tokens) for spec in node.benched] == [
        (1, 16), (1, 32), (8, 16), (8, 32),
    ]  # fmt: skip
    assert not node.benched[0].methods, "all that there are for the model"
    shown = capsys.readouterr().out
    for fact in ("1 job, 16 in, 32 out", "engine=fused", "1.91", "not ready", "baseline"):
        assert fact in shown
    assert grid({}) == list(WORKLOADS)


def test_methods_beyond_the_bound_are_one_line(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    lossy = [each for each in portfolio("safetensors") if not each.exact]
    command = ["bench", "--api", serve(FakeNode()), "--concurrency", "1", "--concurrency", "4"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "not exact" not in shown
    assert shown.splitlines()[-1] == f"{len(lossy)} others need --quality near or any"
    assert run([*command, "--method", lossy[0].name]) == 0
    assert "not exact" in capsys.readouterr().out, "it was asked for"


def test_resumes_interrupted_bench(serve: ServeNode, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    node = FakeNode()
    kept = tmp_path / "bench.jsonl"
    command = ["bench", "--api", serve(node), "--method", "engine=fused", "--output", str(kept), "--json"]
    assert run([*command, "--concurrency", "1"]) == 0
    with kept.open("a") as file:
        file.write('{"cell": {"mod')  # a kill in the middle of a line
    assert run([*command, "--concurrency", "1", "--concurrency", "4"]) == 0
    assert [spec.workload.concurrency for spec in node.benched] == [1, 4]
    assert run([*command, "--concurrency", "1", "--concurrency", "4"]) == 0
    assert len(node.benched) == 2
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(document["cells"]) for document in documents] == [1, 2, 2]
    assert documents[1] == documents[2]


@pytest.mark.parametrize(
    "text", ["notes of a year", '{"model": "tiny"}', '{"model": "tiny"}\n', "[1]\n", '{"cell": 1}\n']
)
def test_refuses_foreign_output_file(
    serve: ServeNode, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    file = tmp_path / "notes"
    file.write_text(text)
    node = FakeNode()
    command = ["bench", "--api", serve(node), "--method", "engine=fused", "--concurrency", "1", "--output", str(file)]
    assert run(command) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "choose another file" in line
    assert file.read_text() == text
    assert not node.benched


def test_output_that_cannot_be_written_is_said_before_any_run(
    serve: ServeNode, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    node = FakeNode()
    output = tmp_path / "none" / "bench.jsonl"
    assert run(["bench", "--api", serve(node), "--output", str(output)]) == 1
    assert capsys.readouterr().err == f"metaswarm: cannot write {output}: No such file or directory\n"
    assert not node.benched


def test_unknown_model_is_said_once(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node = FakeNode()
    assert run(["bench", "--api", serve(node), "--model", "tinny"]) == 1
    assert capsys.readouterr().err == "metaswarm: no model 'tinny' in the swarm; did you mean 'tiny'?\n"
    assert not node.benched


def test_measurement_error_is_one_line(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--api", serve(FakeNode()), "--method", "engine=steam"]) == 1
    assert "expected one of eager" in capsys.readouterr().err
    assert run(["bench", "--concurrency", "1000"]) == 2


def test_failed_workload_is_in_the_document_and_exit_code(
    serve: ServeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ApiClient.bench

    async def fail_once(client: ApiClient, cell: dict[str, Any]) -> Any:
        if cell["workload"]["concurrency"] == 4:
            raise CommandError("all peers are full")
        return await measure(client, cell)

    monkeypatch.setattr(ApiClient, "bench", fail_once)
    command = ["bench", "--api", serve(FakeNode()), "--method", "engine=fused", "--concurrency", "1"]
    assert run([*command, "--concurrency", "4", "--json"]) == 1
    output = capsys.readouterr()
    measured, failed = json.loads(output.out)["cells"]
    assert "result" in measured
    assert (failed["cell"]["workload"]["concurrency"], failed["error"]) == (4, "all peers are full")
    assert output.err.endswith("metaswarm: 1 of 2 workloads could not be measured\n")


def test_one_round_has_no_interval(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--api", serve(FakeNode()), "--method", "engine=fused", "--concurrency", "1", "--rounds"]
    assert run([*command, "1"]) == 0
    single = capsys.readouterr().out
    assert "inf" not in single
    assert " to " not in single
    assert run([*command, "3"]) == 0
    assert " to " in capsys.readouterr().out
