from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from node.cli import local_node, run, run_model
from node.models import importer
from node.models.store import ModelStore
from tests.unit.api.fakes import MODEL, FakeNode
from tests.unit.cli.conftest import ServeNode

Started = list[tuple[str | None, tuple[str, ...], bool]]


@pytest.fixture
def started(serve: ServeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """What nodes were started: each is a fake node that has its model complete, which is not in the cache before."""
    found: Started = []
    monkeypatch.setenv("METASWARM_CACHE_DIR", str(tmp_path))
    ModelStore(tmp_path).set_name("tiny", MODEL)

    @contextmanager
    def start(model: str | None, bootstrap: tuple[str, ...], *, share_data_dir: bool) -> Iterator[str]:
        found.append((model, bootstrap, share_data_dir))
        yield serve(FakeNode())

    def import_model(name: str, store: ModelStore, **options: object) -> object:
        assert name in {"tiny", "owner/tiny"}
        return SimpleNamespace(model_id=MODEL)

    monkeypatch.setattr(run_model, "local_node", start)
    monkeypatch.setattr(importer, "import_model", import_model)
    return found


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No node runs on this machine."""
    monkeypatch.setenv("METASWARM_API", "127.0.0.1:1")


def test_running_node_with_the_model_is_asked(
    started: Started, serve: ServeNode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = FakeNode()
    monkeypatch.setenv("METASWARM_API", serve(node))
    assert run(["run", "tiny", "Why?", "--seed", "5"]) == 0
    assert capsys.readouterr().out == "Hello, wörld\n"
    (job,) = node.submitter.requests
    assert (job.model, job.seed, job.messages and job.messages[0].content) == ("tiny", 5, "Why?")
    assert started == []


@pytest.mark.parametrize("name", ["tiny", "owner/tiny"])
def test_imports_model_and_starts_node_that_serves_it(
    name: str, nobody: None, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", name, "Why?"]) == 0
    assert capsys.readouterr().out == "Hello, wörld\n"
    assert started == [("tiny", (), True)]


def test_node_without_the_model_is_joined(started: Started, serve: ServeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    models = [model for model in node.models() if model["name"] != "tiny"]
    monkeypatch.setattr(node, "models", lambda: models)
    monkeypatch.setenv("METASWARM_API", serve(node))
    assert run(["run", "tiny", "Why?"]) == 0
    assert started == [("tiny", tuple(node.status_document()["multiaddrs"]), False)]


def test_swarm_of_bootstrap_is_joined_without_blocks(nobody: None, started: Started) -> None:
    assert run(["run", "tiny", "Why?", "--bootstrap", "peers.yaml"]) == 0
    assert started == [(None, ("peers.yaml",), False)]


def test_api_is_never_replaced_by_a_node_here(
    started: Started, serve: ServeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", "tinny", "Why?", "--api", serve(FakeNode())]) == 1
    assert "no model 'tinny' in the swarm; did you mean 'tiny'?" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("place", ["environment", "file"])
def test_setting_that_is_not_valid_is_wrong_usage(
    place: str,
    nobody: None,
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_model, "local_node", local_node.local_node)
    file = tmp_path / "node.toml"
    if place == "file":
        file.write_text('memory = "much"\n')
        monkeypatch.setenv("METASWARM_CONFIG", str(file))
    else:
        monkeypatch.setenv("METASWARM_MEMORY", "much")
    assert run(["run", "tiny", "Why?"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    named = f"memory in {file}, line 1" if place == "file" else "METASWARM_MEMORY"
    assert f"{named}: expected a size" in line
    assert line.endswith("see `metaswarm node --help`")


@pytest.mark.usefixtures("nobody")
def test_unknown_model_suggests_a_known_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("METASWARM_CACHE_DIR", str(tmp_path))
    assert run(["run", "smollm2", "Why?"]) == 1
    assert "there is no model 'smollm2'; did you mean 'smollm2-135m-instruct'?" in capsys.readouterr().err
