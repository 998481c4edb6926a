import json
from dataclasses import replace
from pathlib import Path

import pytest

from node.evaluation.history_dataset import read_history
from node.storage.dataset import to_row
from protocol.observations import sign_observation
from selector.dataset import DatasetError
from tests.support.observations import key, observation, signed


@pytest.mark.parametrize("content", [b"cid,model\n1,m\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_other_files_are_refused_with_what_is_expected(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=r"JSON lines from .*, or a folder with contexts.csv"):
        read_history(file)


def test_history_without_trials_says_what_was_left_out(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    served = observation(2)
    replayed = sign_observation(replace(served, measurements=replace(served.measurements, replays=1)), key(0))
    lines = [json.dumps(to_row(signed(1))), "not an observation", json.dumps(to_row(replayed))]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    left_out = r"left out 1 lines .*left out 1 observations of replayed jobs.*left out 1 served jobs"
    with pytest.raises(DatasetError, match=rf"has no trials or benchmarks.*{left_out}"):
        read_history(file)
