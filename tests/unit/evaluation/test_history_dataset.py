import json
from pathlib import Path

import pytest

from node.evaluation.history_dataset import read_history
from node.storage.dataset import to_row
from selector.dataset import DatasetError
from tests.support.observations import signed


@pytest.mark.parametrize("content", [b"cid,model\n1,m\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_other_files_are_refused_with_what_is_expected(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=r"JSON lines from .*, or a folder with contexts.csv"):
        read_history(file)


def test_history_without_trials_says_what_was_left_out(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text(json.dumps(to_row(signed(1))) + "\nnot an observation\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"has no trials or benchmarks.*left out 1 lines .*left out 1 served jobs"):
        read_history(file)
