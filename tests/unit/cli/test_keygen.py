import json
from pathlib import Path

import pytest

from node.cli import run
from node.cli.option_types import API_KEYS
from node.cli.options import read_config
from node.config import ApiKey, hash_api_key


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


def test_api_keys_are_hashed_and_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "api.keys"
    printed = []
    for arguments in (["--api-key-name", "one", "--concurrency", "3"], ["--api-key-name", "two"]):
        assert run(["keygen", *arguments, str(file)]) == 0
        printed.append(capsys.readouterr().out.strip())
    assert file.stat().st_mode & 0o777 == 0o600
    assert not any(key in file.read_text() for key in printed)
    (one, two), _ = API_KEYS.convert(str(file), None, None)
    assert one == ApiKey(name="one", sha256=hash_api_key(printed[0]), concurrency=3)
    assert two == ApiKey(name="two", sha256=hash_api_key(printed[1]))
    assert run(["keygen", "--concurrency", "3", str(tmp_path / "other")]) == 2
    assert run(["keygen", "--api-key-name", "a b", str(file)]) == 2
    assert run(["keygen", "--api-key", "sk-secret", str(file)]) == 2, "`metaswarm node` takes a key by this name"
    assert "sk-secret" not in file.read_text()


def test_api_key_begins_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "api.keys"
    file.write_text("# ours")
    assert run(["keygen", "--api-key-name", "one", str(file)]) == 0
    (key,), _ = API_KEYS.convert(str(file), None, None)
    assert key.name == "one"
