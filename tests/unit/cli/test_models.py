import json
import os
from pathlib import Path
from typing import Any

import pytest

from node.cli import run
from node.models.eviction import in_use
from node.models.files import lock_file, part_of
from node.models.store import ModelStore
from tests.unit.models.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("METASWARM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("METASWARM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "tiny"))


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """Run `metaswarm model … --json`: one document and nothing else on stdout."""
    assert run(["model", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_imports_lists_shows_verifies_and_removes_package(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    imported = run_json(capsys, "import", folder, "--name", "mine")
    assert imported["name"] == "mine"
    assert (imported["blocks"], imported["blocks_present"], imported["complete"]) == (3, ["0-3"], True)
    listed = run_json(capsys, "list")
    assert [model["id"] for model in listed["models"]] == [imported["id"]]
    assert [entry["name"] for entry in listed["catalogue"]] == ["smollm2-135m-instruct"]
    shown = run_json(capsys, "show", imported["id"][:8])
    assert shown["config"]["model_type"] == "llama"
    assert sum(file["size"] for file in shown["files"]) == shown["size_bytes"] == imported["size_bytes"]
    assert run_json(capsys, "verify", "mine")["ok"] is True
    removed = run_json(capsys, "remove", "mine")
    assert (removed["id"], removed["removed"]) == (imported["id"], True)
    assert removed["freed_bytes"] > imported["size_bytes"]
    assert run_json(capsys, "list")["models"] == []


def test_package_that_a_node_serves_from_is_removed_only_by_force(
    capsys: pytest.CaptureFixture[str], folder: str, cache: Path
) -> None:
    model_id = run_json(capsys, "import", folder)["id"]
    package = ModelStore(cache).get(model_id)
    (package.path / "block-002.safetensors").unlink()
    with in_use(package, package.manifest.blocks[:1]):
        assert run(["model", "remove", "tiny"]) == 1
        assert "a node on this machine serves tiny from this package" in capsys.readouterr().err
        assert package.path.exists()
        assert run_json(capsys, "remove", "tiny", "--force")["removed"]
    assert not package.path.exists()


def test_package_whose_files_a_node_fetches_is_removed_only_by_force(
    capsys: pytest.CaptureFixture[str], folder: str, cache: Path
) -> None:
    package = ModelStore(cache).get(run_json(capsys, "import", folder)["id"])
    path = package.path / "block-002.safetensors"
    path.rename(part_of(path))
    with lock_file(part_of(path)):  # as a fetch does
        assert run(["model", "remove", "tiny"]) == 1
        assert "or fetches its files: stop it first, or --force" in capsys.readouterr().err
        assert package.path.exists()
        assert run_json(capsys, "remove", "tiny", "--force")["removed"]
    assert not package.path.exists()


def test_prints_names_and_sizes(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    assert run(["model", "import", folder]) == 0
    captured = capsys.readouterr()
    assert "tiny: 3 blocks" in captured.out
    assert "split" in captured.err
    assert run(["model", "list"]) == 0
    out = capsys.readouterr().out
    assert "tiny" in out
    assert "3 of 3" in out
    assert "not imported" in out
    for verb in ("show", "verify", "remove"):
        assert run(["model", verb, "tiny"]) == 0
        assert "tiny" in capsys.readouterr().out


def test_list_has_damaged_packages(capsys: pytest.CaptureFixture[str], folder: str, cache: Path) -> None:
    model_id = run_json(capsys, "import", folder)["id"]
    manifest = cache / "models" / model_id / "manifest.json"
    manifest.write_text("{}")
    listed = run_json(capsys, "list")
    assert listed["models"] == []
    (damaged,) = listed["damaged"]
    assert (damaged["id"], damaged["name"]) == (model_id, "tiny")
    assert damaged["size_bytes"] > 1000
    assert "is damaged" in damaged["fault"]
    manifest.unlink()
    assert run(["model", "list"]) == 0
    assert "unusable" in capsys.readouterr().out


def test_verify_names_damaged_block(capsys: pytest.CaptureFixture[str], folder: str, cache: Path) -> None:
    model_id = run_json(capsys, "import", folder)["id"]
    path = cache / "models" / model_id / "block-001.safetensors"
    path.write_bytes(b"x" * path.stat().st_size)
    (path.parent / "block-002.safetensors").unlink()
    found = run_json(capsys, "verify", "tiny", code=1)
    assert (found["ok"], found["corrupt"], found["missing"]) == (
        False,
        ["block-001.safetensors"],
        ["block-002.safetensors"],
    )
    assert run_json(capsys, "show", "tiny")["blocks_present"] == ["0-2"]
    assert run(["model", "verify", "tiny"]) == 1
    assert "metaswarm: damaged: block-001.safetensors; `metaswarm model remove" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["import", "nonsense"], 1, "'nonsense' is not a folder, file, hub repository id"),
        (["import", "Downloads/tiny.gguf"], 1, "there is no file Downloads/tiny.gguf"),
        (["import", "~nosuchuser/m.gguf"], 1, "'~nosuchuser/m.gguf' is not a folder, file, hub"),
        (["import", "FOLDER", "--name", "Not A Name"], 1, "cannot be a model's name"),
        (["show", "nobody"], 1, "there is no model 'nobody'"),
        (["verify", "smollm2-135m-instruct"], 1, "is not in"),
        (["remove", "0" * 64], 1, "is not in"),
        (["show"], 2, "Missing argument 'MODEL'"),
        (["list", "--nonsense"], 2, "no such option"),
        (["nonsense"], 2, "no such verb"),
    ],
)
def test_error_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], folder: str, arguments: list[str], code: int, line: str
) -> None:
    assert run(["model", *(folder if argument == "FOLDER" else argument for argument in arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("metaswarm: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["import", "list", "show", "verify", "remove"])
def test_every_verb_has_help_text(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run(["model", verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out
