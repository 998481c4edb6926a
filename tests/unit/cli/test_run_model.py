from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from node.cli import local_node, run, run_model
from node.models import importer
from node.models.errors import ModelError
from node.models.source_index import record_source, source_of_files
from node.models.store import ModelStore, Package
from tests.unit.api.fakes import MODEL, FakeNode
from tests.unit.cli.conftest import ServeNode
from tests.unit.models.checkpoints import write_checkpoint

real_import = importer.import_model
Started = list[tuple[str | None, tuple[str, ...], bool]]


@pytest.fixture
def started(serve: ServeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """What nodes were started: each is a fake node that has its model complete, which is not in the cache before."""
    found: Started = []
    monkeypatch.setenv("METASWARM_CACHE_DIR", str(tmp_path))
    ModelStore(tmp_path).set_name("tiny", MODEL)
    record_source(tmp_path, "owner/tiny@c0ffee", MODEL)

    @contextmanager
    def start(model: str | None, bootstrap: tuple[str, ...], *, share_data_dir: bool) -> Iterator[str]:
        found.append((model, bootstrap, share_data_dir))
        yield serve(FakeNode())

    def import_model(name: str, store: ModelStore, **options: object) -> object:
        assert name in {"owner/tiny@c0ffee", "owner/tiny", "owner/tiny@v2", str(tmp_path / "tiny.gguf")}
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


@pytest.mark.parametrize("source", ["owner/tiny", "OWNER/Tiny", "owner/tiny@v2", "FILE"])
def test_running_node_is_asked_by_source_of_its_model(
    source: str, started: Started, serve: ServeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No second node, and no second import: also where only the import of `owner/tiny@v2` shows which model it is."""
    (tmp_path / "tiny.gguf").touch()
    recorded = source_of_files(tmp_path / "tiny.gguf")
    assert recorded is not None
    record_source(tmp_path, recorded, MODEL)
    source = source.replace("FILE", str(tmp_path / "tiny.gguf"))
    node = FakeNode()
    monkeypatch.setenv("METASWARM_API", serve(node))
    assert run(["run", source, "Why?"]) == 0
    assert started == []
    assert [job.model for job in node.submitter.requests] == ["tiny"]


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


@pytest.mark.parametrize("place", ["--api", "here", "--bootstrap"])
@pytest.mark.parametrize("wanted", ["0123456789ab", "01" * 32])
def test_id_that_the_node_does_not_list_is_for_the_node_to_resolve(
    wanted: str, place: str, started: Started, serve: ServeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lists only some of the models of which it has no manifest, and peers choose which."""
    monkeypatch.setattr("node.cli.target.DISCOVERY_TIMEOUT_S", 0.0)
    node = FakeNode()

    @contextmanager
    def start(model: str | None, bootstrap: tuple[str, ...], *, share_data_dir: bool) -> Iterator[str]:
        assert (model, bootstrap) == (None, ("peers.yaml",))
        yield serve(node)

    monkeypatch.setattr(run_model, "local_node", start)
    monkeypatch.setenv("METASWARM_API", serve(node) if place == "here" else "127.0.0.1:1")
    more = {"--api": ["--api", serve(node)], "here": [], "--bootstrap": ["--bootstrap", "peers.yaml"]}[place]
    assert run(["run", wanted, "Why?", *more]) == 0
    assert [job.model for job in node.submitter.requests] == [wanted]


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


@pytest.mark.parametrize("verb", [["run"], ["model", "import"]])
def test_empty_name_is_not_the_current_folder(
    verb: list[str], nobody: None, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*verb, ""]) == 2
    assert "expected a value, not an empty text" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody")
def test_unknown_model_suggests_a_known_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("METASWARM_CACHE_DIR", str(tmp_path))
    assert run(["run", "smollm2", "Why?"]) == 1
    assert "there is no model 'smollm2'; did you mean 'smollm2-135m-instruct'?" in capsys.readouterr().err


@pytest.fixture
def offline(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be imported."""

    def refuse(name: str, *_: object, **__: object) -> object:
        raise ModelError(f"cannot import {name}")

    monkeypatch.setattr(importer, "import_model", refuse)


@pytest.mark.usefixtures("nobody", "offline")
@pytest.mark.parametrize("source", ["owner/tiny", "owner/tiny-gguf:q4_k_m", "owner/tiny-gguf:Tiny-Q4_K_M.gguf", "FILE"])
def test_imported_source_is_not_imported_again(source: str, started: Started, tmp_path: Path) -> None:
    package = real_import(str(write_checkpoint(tmp_path / "tiny")), ModelStore(tmp_path), name="mini")
    record_source(tmp_path, "owner/tiny@c0ffee", package.model_id)
    record_source(tmp_path, "owner/tiny-gguf@c0ffee:Tiny-Q4_K_M", package.model_id)
    assert run(["run", source.replace("FILE", str(tmp_path / "tiny")), "Why?"]) == 1, "the fake node has another model"
    assert started == [("mini", (), True)]


@pytest.mark.usefixtures("nobody", "offline")
@pytest.mark.parametrize(
    ("source", "imports"),
    [
        ("owner/tiny-gguf", "owner/tiny-gguf"),
        ("owner/tiny-gguf:Q8_0", "owner/tiny-gguf:Q8_0"),
        ("owner/tiny@main", "owner/tiny@main"),
        ("mini", "owner/tiny@c0ffee"),
    ],
)
def test_other_source_or_incomplete_package_is_imported(
    source: str, imports: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = real_import(str(write_checkpoint(tmp_path / "tiny")), ModelStore(tmp_path), name="mini")
    record_source(tmp_path, "owner/tiny@c0ffee", package.model_id)
    record_source(tmp_path, "owner/tiny-gguf@c0ffee:Tiny-Q4_K_M", package.model_id)
    package.path_of(package.manifest.head).unlink()
    assert run(["run", source, "Why?"]) == 1
    assert f"cannot import {imports}\n" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody", "offline")
def test_changed_file_is_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    real_import(str(folder), ModelStore(tmp_path))
    (folder / "config.json").write_text("{}")
    assert run(["run", str(folder), "Why?"]) == 1
    assert f"cannot import {folder}" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody", "offline")
def test_incomplete_model_without_source_names_missing_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package: Package = real_import(str(write_checkpoint(tmp_path / "tiny")), ModelStore(tmp_path), name="mini")
    package.path_of(package.manifest.blocks[1]).unlink()
    assert run(["run", "mini", "Why?"]) == 1
    assert "cannot run mini: what blocks 1-2 need is not on this machine, and its source" in capsys.readouterr().err
