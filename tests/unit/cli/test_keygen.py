import json
from pathlib import Path

import pytest

from node.cli import run
from node.cli.options import read_config


def test_key_is_valid_and_private(tmp_path: Path) -> None:
    file = tmp_path / "swarm.key"
    assert run(["keygen", str(file)]) == 0
    assert file.stat().st_mode & 0o777 == 0o600
    key = read_config(f"--swarm-key={file}").swarm_key
    assert key is not None
    assert key == file.read_text().strip()
    assert len(key) == 64


def test_keys_are_random_and_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keygen", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"swarm_key": str(tmp_path / "a")}
    assert run(["keygen", str(tmp_path / "b")]) == 0
    key = (tmp_path / "a").read_text()
    assert key != (tmp_path / "b").read_text()
    assert run(["keygen", str(tmp_path / "a")]) == 1
    assert (tmp_path / "a").read_text() == key
