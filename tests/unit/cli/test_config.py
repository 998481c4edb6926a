import dataclasses
import json
from pathlib import Path

import pytest

from node.cli import run
from node.cli.options import _FIELD_OF
from node.config import NodeConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text('# mine\nmemory = "4GiB"\nserve = ["tiny:0-4", "other"]\nlog_level = "warning"\n')
    return path


def test_show_says_where_each_value_is_from(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METASWARM_LOG_LEVEL", "debug")
    monkeypatch.setenv("METASWARM_API_KEY", "sesame")
    assert run(["config", "show", "--config", str(file), "--threads", "2", "--json"]) == 0
    out = capsys.readouterr().out
    assert "sesame" not in out
    settings = {each["option"]: (each["value"], each["source"]) for each in json.loads(out)["settings"]}
    assert settings["memory"] == ("4GiB", f"file {file}, line 2")
    assert settings["serve"] == ("tiny:0-4, other", f"file {file}, line 3")
    assert settings["log_level"] == ("debug", "environment METASWARM_LOG_LEVEL")
    assert settings["threads"] == ("2", "flag --threads")
    assert settings["api"] == ("127.0.0.1:8642", "default")
    assert settings["api_key"][1] == "environment METASWARM_API_KEY"


def test_show_has_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", "--json"]) == 0
    settings = {each["option"]: each["value"] for each in json.loads(capsys.readouterr().out)["settings"]}
    assert (settings["relay_rate"], settings["price"], settings["no_relay"]) == ("16MiB", "1", "no")
    fields = {field.name: field.default for field in dataclasses.fields(NodeConfig)}
    for option in (name for name, value in settings.items() if value == "none" and name != "config"):
        field = _FIELD_OF.get(option, option)
        assert field in fields, f"{option} is a flag or made of several fields: it has a default"
        assert fields[field] in (None, ()), option


def test_check_names_every_fault_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "node.toml"
    path.write_text('threads = "many"\n\nmemory = "lots"\nserv = ["x"]\nexplore = 1\n')
    monkeypatch.setenv("METASWARM_DEVICE", "abacus")
    monkeypatch.setenv("METASWARM_APY", "x")
    assert run(["config", "check", "--config", str(path), "--epoch", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    for fact in (
        f"{path}, line 4: unknown option 'serv'; did you mean 'serve'?",
        f"{path}, line 5: unknown option 'explore'",
        f"threads in {path}, line 1",
        f"memory in {path}, line 3",
        "--epoch",
        "METASWARM_DEVICE",
        "METASWARM_APY",
    ):
        assert sum(fact in line for line in lines) == 1, fact
    assert len(lines) == 6


def test_check_finds_what_only_shows_in_combination(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "check", "--api", "0.0.0.0:8642", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["valid"]
    assert "needs an API key" in found["faults"][0]


def test_check_finds_combinations_beside_faults_of_other_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "node.toml"
    path.write_text('api = "0.0.0.0:8642"\nlog_level = "verbose"\n')
    assert run(["config", "check", "--config", str(path)]) == 2
    level, key = capsys.readouterr().err.splitlines()
    assert "'verbose'" in level
    assert "needs an API key" in key
    path.write_text('api = "0.0.0.0:8642"\napi_key = "two words"\n')
    assert run(["config", "check", "--config", str(path)]) == 2
    assert "needs an API key" not in capsys.readouterr().err, "there is a key, though not a valid one"


def test_valid_configuration(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "check", "--config", str(file)]) == 0
    assert "the configuration is valid" in capsys.readouterr().out


def test_node_names_the_line_of_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "node.toml"
    path.write_text('# mine\nmemory = "lots"\n')
    assert run(["node", "--config", str(path)]) == 2
    assert f"memory in {path}, line 2" in capsys.readouterr().err
