import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from node.cli import run
from node.evaluation import compare, parallel_fit
from node.evaluation.csv_dataset import read_folder
from selector.dataset import FloatArray
from selector.estimator import Selector
from selector.evaluation.baselines import BASELINES, GradientBoosting, NearestNeighbours, RandomForest
from selector.evaluation.measures import split
from selector.evaluation.text_embedding import HashedNgrams
from selector.metamodel import MetaModel
from tests.unit.selector.measurements import made_up, write, write_folder

NAMES = [
    "metaswarm", "random", "single_best", "lookup", "nearest_neighbours", "isac", "alors", "random_forest",
    "gradient_boosting", "joint_boosting", "text_embedding", "virtual_best",
]  # fmt: skip
MEASURES = {"accuracy", "accuracy_within_5_percent", "mean_speedup", "ratio_to_virtual_best", "closed_gap", "f1"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models: what the verb does is tested here, not how good they are. No sentence encoder, installed or not."""
    for name, baseline in (("random_forest", RandomForest), ("gradient_boosting", GradientBoosting)):
        monkeypatch.setitem(BASELINES, name, partial(baseline, min_rows=1000))
    monkeypatch.setattr(compare, "MetaModel", lambda group, **_: MetaModel(group, boosting_rounds=20))
    monkeypatch.setattr("node.engine.sentence_encoder.PACKAGE", "no_such_package")


@pytest.fixture(name="folder", scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measurements")
    write_folder(folder, made_up(contexts=40))
    return folder


def test_prints_every_selector_and_measure_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(folder), "--group", "model", "--probes", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["dataset"], document["group"], document["probes"]) == (folder.name, "model", 2)
    assert [row["selector"] for row in document["rows"]] == NAMES
    assert set(document["left_out"]) == {"rule"} == set(BASELINES) - set(NAMES)
    for row in document["rows"]:
        assert row.keys() >= MEASURES | {"seconds", "more_than_n"}
        assert row["more_than_n"].keys() >= MEASURES
    assert document["rows"][-1]["accuracy"] == 1.0
    certainty, *others = (row["certainty"] for row in document["rows"])
    assert 0.5 < certainty["interval_coverage"] <= 1
    assert 0 < certainty["answered"] <= 1
    assert others == [None] * len(others)


def test_parallel_fit_equals_serial_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate() -> Any:
        assert run(["evaluate", str(folder), "--group", "hardware", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        return [{name: value for name, value in row.items() if name != "seconds"} for row in document["rows"]]

    alone = evaluate()
    monkeypatch.setattr(compare, "MIN_ROWS_OF_PROCESSES", 0)
    monkeypatch.setattr("node.cli.evaluate.os.cpu_count", lambda: 2)
    assert evaluate() == alone


def test_dead_process_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "MIN_ROWS_OF_PROCESSES", 0)
    monkeypatch.setattr("node.cli.evaluate.os.cpu_count", lambda: 2)
    monkeypatch.setattr(parallel_fit, "COMMAND", "raise SystemExit")
    assert run(["evaluate", str(folder)]) == 1
    assert "use --sample with fewer contexts" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("processes", [1, 2])
def test_baseline_that_fails_is_left_out_with_its_error(
    processes: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = partial(NearestNeighbours, n_neighbors=0)
    for name in set(BASELINES) - {"virtual_best", "text_embedding"}:
        monkeypatch.setitem(BASELINES, name, failing if name == "lookup" else BASELINES["random"])
    monkeypatch.setattr(compare, "MetaModel", lambda *_, **__: BASELINES["single_best"]())
    monkeypatch.setattr(compare, "MIN_ROWS_OF_PROCESSES", 0)
    monkeypatch.setattr("node.cli.evaluate.os.cpu_count", lambda: processes)
    assert run(["evaluate", str(folder), "--json"]) == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]
    assert left_out.keys() == {"lookup"}
    assert "it failed with InvalidParameterError" in left_out["lookup"]
    monkeypatch.setattr(compare, "MetaModel", lambda *_, **__: failing())
    assert run(["evaluate", str(folder), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "cannot fit metaswarm: it failed with InvalidParameterError" in printed.err.splitlines()[-1]


def test_memory_that_runs_out_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> NoReturn:
        raise MemoryError("no 9 GiB")

    monkeypatch.setattr(parallel_fit, "checked", run_out)
    dataset = read_folder(folder)
    (found,) = parallel_fit.fit_all(
        dataset, tuple(split(dataset, "random")), [parallel_fit.FitTask("lookup", BASELINES["lookup"](), 0)], 1
    )
    assert found.inapplicable.endswith("MemoryError: no 9 GiB; if memory ran out, use --sample with fewer contexts")


def test_missing_figure_of_the_roofline_leaves_the_rule_with_a_note(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(BASELINES) - {"virtual_best", "rule"}:
        monkeypatch.setitem(BASELINES, name, BASELINES["random"])
    monkeypatch.setattr(compare, "MetaModel", lambda *_, **__: BASELINES["single_best"]())
    rows = [[f"c{i}", i % 8, "" if i < 2 else 40, 49, 80, 0.01] for i in range(40)]
    write(tmp_path / "contexts.csv", ["cid", "l_params", "l_bw", "l_bf", "memgb", "kvgb"], rows)
    shutil.copy(folder / "observations.csv", tmp_path)
    assert run(["evaluate", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "rule" in {row["selector"] for row in document["rows"]}
    assert any("single best in 2 contexts" in note for note in document["notes"])


def test_group_is_a_column_and_names_take_any_case(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(BASELINES) - {"virtual_best"}:
        monkeypatch.setitem(BASELINES, name, BASELINES["random"])
    groups: list[str | None] = []

    def made(group: str | None, **_options: object) -> Selector:
        groups.append(group)
        return BASELINES["single_best"]()

    monkeypatch.setattr(compare, "MetaModel", made)
    for group, resolved, folds in (("HardWare", "hardware", 3), ("budget", "budget", 2), ("l_isl", "l_isl", 10)):
        assert run(["evaluate", str(folder), "--group", group, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["group"], document["folds"], groups[-1]) == (resolved, folds, resolved)
    assert run(["evaluate", str(folder), "--group", "workload"]) == 1
    assert capsys.readouterr().err.rstrip().endswith("one of model, hardware, budget, l_isl, l_osl, l_bs, l_params")


def test_costs_that_are_no_logarithms_have_a_note_and_are_valid_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(BASELINES) - {"virtual_best"}:
        monkeypatch.setitem(BASELINES, name, BASELINES["random"])
    monkeypatch.setattr(compare, "MetaModel", lambda *_, **__: BASELINES["single_best"]())
    write(tmp_path / "contexts.csv", ["cid", "l_isl"], [[i, i % 7] for i in range(12)])
    rows = [[i, method, cost] for i in range(12) for method, cost in (("a", 3000 + i), ("b", 10), ("c", 20))]
    write(tmp_path / "observations.csv", ["cid", "method", "y"], rows)
    assert run(["evaluate", str(tmp_path), "--default", "a", "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["rows"][-1]["mean_speedup"] is None
    assert "in 12 contexts values of y differ by more than 50: is y the natural logarithm" in document["notes"][0]


@pytest.mark.parametrize("sample", [[], ["--sample", "2"]])
def test_default_without_a_measurement_that_counts_is_refused(
    tmp_path: Path, sample: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `ghost` no cost is finite; `rare` was measured in one of three contexts, which the sample lacks."""
    write(tmp_path / "contexts.csv", ["cid", "l_isl"], [[i, i] for i in range(3)])
    rows = [[i, method, cost] for i in range(3) for method, cost in (("a", 1), ("b", 2), ("ghost", "nan"))]
    sampled = set(np.random.default_rng(0).choice(np.arange(3), size=2, replace=False).tolist())
    rows.append([({0, 1, 2} - sampled).pop(), "rare", 1])
    write(tmp_path / "observations.csv", ["cid", "method", "y"], rows)
    assert run(["evaluate", str(tmp_path), "--default", "rare" if sample else "ghost", *sample]) == 1
    printed = capsys.readouterr().err
    assert "was not measured" in printed
    assert "ghost, " not in printed


def test_encodes_each_text_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def encode(texts: Sequence[str]) -> FloatArray:
        read.extend(texts)
        return HashedNgrams()(texts)

    monkeypatch.setattr("node.engine.sentence_encoder.find_sentence_encoder", lambda: encode)
    assert run(["evaluate", str(folder)]) == 0
    assert read
    assert len(read) == len(set(read))


def test_prints_a_table_and_draws_a_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    assert run(["evaluate", str(folder), "--sample", "20", "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "20 contexts" in printed
    assert "metaswarm" in printed
    assert "intervals cover" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--default", "no such method"], "was not measured"),
        (["--plot", "plot.txt"], "its name must end in .png"),
        (["--plot", "no/such/folder/plot.png"], "there is no folder"),
    ],
)
def test_invalid_arguments_fail_early_in_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(folder), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_single_method_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "contexts.csv", ["cid", "l_isl"], [[i, i % 7] for i in range(12)])
    write(tmp_path / "observations.csv", ["cid", "method", "y"], [[i, "only", 1.0] for i in range(12)])
    assert run(["evaluate", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["contexts"] == 0
    assert all((row["accuracy"], row["closed_gap"], row["certainty"]) == (None, None, None) for row in document["rows"])
    assert any("12 contexts in which a single method was measured" in note for note in document["notes"])
    assert run(["evaluate", str(tmp_path), "--group", "model"]) == 1
    assert "no column 'model'" in capsys.readouterr().err
