import gzip
from pathlib import Path

import numpy as np
import pytest

from node.evaluation.csv_dataset import read_folder
from selector.dataset import DatasetError
from selector.evaluation.measures import split
from tests.unit.selector.measurements import method_names

CONTEXTS = "cid,model,hardware,budget,l_isl,vendor\nx,m,h,1,7,amd\ny,m,h2,1,,intel\n"
OBSERVATIONS = "cid,method,y\nx,a|tp1,0.5\nx,b,1\ny,b,-2\n"


def write(folder: Path, contexts: str = CONTEXTS, observations: str = OBSERVATIONS) -> Path:
    (folder / "contexts.csv").write_text(contexts)
    (folder / "observations.csv").write_text(observations)
    return folder


def test_reads_names_features_and_costs(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path))
    contexts = dataset.pairs.contexts
    assert contexts.ids == ("x", "y")
    assert contexts.names["hardware"].tolist() == ["h", "h2"]
    assert contexts.columns == ("l_isl", "vendor=amd", "vendor=intel")
    np.testing.assert_array_equal(contexts.features, [[7, 1, 0], [np.nan, 0, 1]])
    assert method_names(dataset) == ["a|tp1", "b", "b"]
    assert dataset.cost.tolist() == [0.5, 1.0, -2.0]
    assert dataset.notes == ()


def test_reads_gzipped_files(tmp_path: Path) -> None:
    (tmp_path / "contexts.csv.gz").write_bytes(gzip.compress(CONTEXTS.encode()))
    (tmp_path / "observations.csv.gz").write_bytes(gzip.compress(OBSERVATIONS.encode()))
    assert len(read_folder(tmp_path)) == 3


@pytest.mark.parametrize("marker", ["", "NA", "n/a", "NaN", "None", "NULL", "-", "?", " na "])
def test_marker_of_a_missing_number_leaves_the_column_numeric(tmp_path: Path, marker: str) -> None:
    dataset = read_folder(write(tmp_path, contexts=f"cid,l_bw\nx,41.5\ny,{marker}\n"))
    assert dataset.pairs.contexts.columns == ("l_bw",)
    np.testing.assert_array_equal(dataset.pairs.contexts.features, [[41.5], [np.nan]])
    assert dataset.notes == ()


def test_word_among_numbers_is_a_missing_value_with_a_note(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path, contexts="cid,l_bw\nx,41.5\ny,unknown\nz,40\n"))
    assert dataset.pairs.contexts.columns == ("l_bw",)
    np.testing.assert_array_equal(dataset.pairs.contexts.features[:, 0], [41.5, np.nan, 40])
    (note,) = dataset.notes
    assert "'l_bw'" in note
    assert "'unknown'" in note


@pytest.mark.parametrize(("field", "unit"), [("{}B", "B"), ("{} ms/token", "ms/token"), ("{}.0 %", "%")])
def test_numbers_with_one_unit_are_numbers_with_a_note(tmp_path: Path, field: str, unit: str) -> None:
    rows = f"x,{field.format(7)}\ny,{field.format(70)}\nz,NA\nw,\n"
    dataset = read_folder(write(tmp_path, contexts=f"cid,size\n{rows}"))
    assert dataset.pairs.contexts.columns == ("size",)
    np.testing.assert_array_equal(dataset.pairs.contexts.features[:, 0], [7, 70, np.nan, np.nan])
    assert dataset.notes == (f"took the column 'size' for numbers of the unit {unit!r}",)


def test_numerals_that_are_words_have_a_note(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path, contexts='cid,size,cache\nx,7B,"1,024"\ny,500M,"2,048"\n'))
    assert dataset.pairs.contexts.columns == ("size=500M", "size=7B", "cache=1,024", "cache=2,048")
    assert dataset.notes == (
        "took the column 'size' for 2 words, such as '7B'",
        "took the column 'cache' for 2 words, such as '1,024'",
    )


def test_number_that_is_no_logarithm_has_a_note(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path, contexts="cid,l_isl,l_bw,memgb\nx,2048,41,8000\ny,,,\n"))
    (note,) = dataset.notes
    assert "'l_isl' has values over 200" in note


def test_spaces_around_an_id_are_no_part_of_it(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path, contexts="cid\n 1\n2 \n", observations="cid,method,y\n1,a,1\n 2,a,2\n"))
    assert (dataset.pairs.contexts.ids, len(dataset), dataset.notes) == (("1", "2"), 2, ())


def test_spaces_around_names_are_no_part_of_them_and_their_columns_take_any_case(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path, contexts="CID, Model ,HARDWARE\nx,m,h \ny,m ,\th\n"))
    names = dataset.pairs.contexts.names
    assert (names["model"].tolist(), names["hardware"].tolist()) == (["m", "m"], ["h", "h"])
    assert dataset.pairs.contexts.columns == ()


def test_column_without_a_name_is_no_feature(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path, contexts=",cid,l_isl,\n0,x,7,\n1,y,8,\n"))
    assert dataset.pairs.contexts.columns == ("l_isl",)
    assert dataset.notes == ("left out 2 columns of contexts.csv without a name",)


def test_workloads_that_are_only_named_are_left_out_one_by_one(tmp_path: Path) -> None:
    """Four models and machines, forty workloads: more names than there are indicators for, each with two budgets."""
    rows = [(f"{i}-{budget}", f"m{i % 2}", f"h{i // 2 % 2}", f"work {i}", budget) for i in range(40) for budget in "ab"]
    contexts = "cid,model,hardware,workload,budget\n" + "".join(",".join(row) + "\n" for row in rows)
    observations = "cid,method,y\n" + "".join(f"{row[0]},{method},1\n" for row in rows for method in "pq")
    dataset = read_folder(write(tmp_path, contexts, observations))
    assert dataset.pairs.contexts.columns == ()
    assert len(set(dataset.pairs.contexts.siblings().tolist())) == 40
    assert [len(fold.test) for fold in split(dataset, "random")] == [32] * 5


def test_invalid_rows_are_left_out_with_a_note(tmp_path: Path) -> None:
    bad = OBSERVATIONS + "z,a,1\nx,,1\ny,a,nan\ny,c\nx,c,fast\n"
    dataset = read_folder(write(tmp_path, observations=bad))
    assert len(dataset) == 3
    assert len(dataset.notes) == 3


def test_only_key_columns_are_required(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path, contexts="cid\nx\ny\n"))
    assert dataset.pairs.contexts.columns == ()
    assert dataset.pairs.contexts.names == {}


@pytest.mark.parametrize(
    ("contexts", "observations", "message"),
    [
        ("id,model\nx,m\n", OBSERVATIONS, "contexts.csv lacks the column 'cid'"),
        (CONTEXTS, "cid,cost\nx,1\n", "observations.csv lacks the column 'method', 'y'"),
        ("cid,model\n", OBSERVATIONS, "contexts.csv has no rows"),
        (CONTEXTS, "cid,method,y\nx,a,nan\n", "no measurement is left; left out 1 rows whose cost is not finite"),
        ("cid\n1\n2\n", "cid,method,y\n1.0,a,1\n", "not in contexts.csv, such as '1.0'"),
        (CONTEXTS, "", "lacks the column 'cid'"),
        ("cid,l_bw,l_bw\nx,1,2\n", OBSERVATIONS, "contexts.csv has the column 'l_bw' more than once"),
        ("cid,model,Model\nx,1,2\n", OBSERVATIONS, "contexts.csv has the column 'model' more than once"),
        (CONTEXTS, "cid,method,y,y\nx,a,1,2\n", "observations.csv has the column 'y' more than once"),
    ],
)
def test_unreadable_dataset_is_a_one_line_error(tmp_path: Path, contexts: str, observations: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        read_folder(write(tmp_path, contexts, observations))
    assert "\n" not in str(caught.value)


def test_missing_or_broken_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not a dataset folder"):
        read_folder(tmp_path)
    (tmp_path / "contexts.csv.gz").write_bytes(gzip.compress(CONTEXTS.encode())[:-20])
    with pytest.raises(DatasetError, match="cannot read"):
        read_folder(tmp_path)
    (tmp_path / "contexts.csv.gz").write_bytes(b"\x00\xff")
    with pytest.raises(DatasetError, match="cannot read"):
        read_folder(tmp_path)
