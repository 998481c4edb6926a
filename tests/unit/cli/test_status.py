import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from node.api.interface import ModelDocument
from node.cli import run
from node.cli.client import find_api
from node.cli.output import out
from node.cli.status_tables import _describe_problems, coverage_bar, render_models, render_status
from node.config import NodeReady, default_data_dir
from protocol.identity import peer_id_from_public_key
from tests.unit.api.fakes import MODEL, PEERS, FakeNode
from tests.unit.cli.conftest import ServeNode


@pytest.fixture
def api(serve: ServeNode) -> list[str]:
    return ["--api", serve(FakeNode())]


def test_prints_status(api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", *api]) == 0
    output = capsys.readouterr().out
    for fact in (
        PEERS[0],
        "serving",
        "0-4",
        "64/4096",
        "1.0 MiB",
        "4.0 KiB of model files from",
        "2 done",
        "3 failed",
        "5 rejected as client errors",
        "runs of trials: 0 running, 6 done, 8 interrupted, 9 rejected, 7 failed",
        "1 of 3 known reached, 1 banned",
        "9 opened, 2 refused, 1 failed, 1 held with 2.0 KiB",
        "4242",
        "7 observations",
        "5a5a5a5a5a5a,",
        "broken:1-3 is not served; to serve it on a node that can give it 3 MiB (--memory):",
        "--serve broken:1-3",
    ):
        assert fact in output


@pytest.mark.parametrize(
    ("verb", "method", "field"),
    [("status", "status_document", "jobs"), ("models", "models", "coverage"), ("explain", "explain", "reason")],
)
def test_node_of_another_version_is_told_by_the_missing_field(
    verb: str,
    method: str,
    field: str,
    serve: ServeNode,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = FakeNode()
    real = getattr(node, method)

    def without_field(document: Any) -> Any:
        documents = document if isinstance(document, list) else [document]
        for each in documents:
            del each[field]
        return document

    async def earlier_explain(*arguments: Any) -> Any:
        return without_field(await real(*arguments))

    def earlier() -> Any:
        return without_field(real())

    monkeypatch.setattr(node, method, earlier_explain if method == "explain" else earlier)
    url = serve(node)
    assert run([verb, "--api", url]) == 1
    error = f"metaswarm: the node at {url} runs another version of metaswarm (no {field!r} in its answer): restart it\n"
    assert capsys.readouterr().err == error


def test_prints_peers_and_spans(api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["peers", *api]) == 0
    output = capsys.readouterr().out
    for fact in (PEERS[1], "192.0.2.7:4001", "connected", "1.2 ms", "tiny:4-8"):
        assert fact in output


def test_prints_refusals_and_failures_of_peers() -> None:
    (peer,) = FakeNode().peers()
    said = _describe_problems(peer)
    for fact in (
        "banned for 7.00 s: a bad signature",
        "2 sessions refused: full",
        "1 session failed: engine",
        "4 faults",
        "holds 64 positions and 2.0 KiB in 1 session",
        "2 jobs failed",
        "1 job lagged",
        "avoided for 30 s",
    ):
        assert fact in said


@pytest.mark.parametrize(("serve", "words"), [([], "--serve MODEL serves some"), (["tiny"], "no blocks yet of tiny")])
def test_prints_why_nothing_is_served(serve: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = FakeNode().status_document()
    status["spans"], status["serve"] = [], serve
    out().print(render_status(status))
    assert words in " ".join(capsys.readouterr().out.split())


def test_prints_what_is_being_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    status = FakeNode().status_document()
    status["loading"] = [{"model": MODEL, "name": "tiny", "start": 4, "end": 8}]
    out().print(render_status(status))
    assert "loading blocks 4-8 of tiny" in " ".join(capsys.readouterr().out.split())
    status["spans"], status["serve"] = [], ["tiny"]
    out().print(render_status(status))
    printed = " ".join(capsys.readouterr().out.split())
    assert "no blocks yet of tiny: loading blocks 4-8 of tiny" in printed
    assert "the log" not in printed


def test_prints_problems_of_the_node(capsys: pytest.CaptureFixture[str]) -> None:
    status = FakeNode(has_problems=("the disk of /data is full",)).status_document()
    out().print(render_status(status))
    assert "problem   the disk of /data is full" in capsys.readouterr().out


def test_prints_that_the_clock_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    status = FakeNode().status_document()
    for ahead_s, words in ((-90.0, "is 90 s behind those of connected peers"), (3.0, None), (None, None)):
        status["clock_ahead_s"] = ahead_s
        out().print(render_status(status))
        printed = " ".join(capsys.readouterr().out.split())
        assert words in printed if words else "clock" not in printed


def test_prints_coverage_by_block(api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", *api]) == 0
    tiny, broken = (line.split() for line in capsys.readouterr().out.splitlines() if "complete" in line)
    assert tiny == ["tiny", MODEL[:16], "8", "11112222", "complete"]
    assert broken == ["broken", ("cd" * 32)[:16], "4", "1..1", "1-3", "incomplete"]


@pytest.mark.parametrize("verb", ["status", "peers", "models"])
def test_json_is_api_document(verb: str, api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    node = FakeNode()
    assert run([verb, "--json", *api]) == 0
    expected = {"status": node.status_document(), "peers": {"peers": node.peers()}, "models": {"models": node.models()}}
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected[verb]))


def test_watch_repeats(api: list[str]) -> None:
    command = [sys.executable, "-c", "import node.cli.status as s, node.cli as c; s.WATCH_INTERVAL_S = 0; c.main()"]
    command += ["status", "--watch", "--json", *api]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        process.kill()
    assert json.loads(first) == json.loads(second)


def test_error_for_url_without_node(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve(FakeNode())
    assert run(["status", "--api", f"{url}/other"]) == 1
    assert capsys.readouterr().err.startswith("metaswarm: ")


def test_replaces_control_characters_in_names(api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model: ModelDocument = {
        "model": "ab" * 32,
        "name": "\x1b[2J[bold]x",
        "block_count": 12,
        "max_positions": 8192,
        "coverage": [0, 9, 10, 1000] * 3,
        "uncovered": [],
        "apart": [],
        "complete": True,
        "local": True,
        "size_bytes": 1 << 20,
        "format": "gguf",
        "architecture": "llama",
        "weight_type": "q4_1",
        "quality": {},
    }
    out().print(render_models({"models": [model]}))
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "[bold]x" in output
    assert coverage_bar(model["coverage"]) in output


class TestFindingTheNode:
    ready = NodeReady(peer_id=peer_id_from_public_key(bytes(32)), multiaddrs=(), api_url="http://127.0.0.1:4242", pid=1)

    def test_flag_takes_precedence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("METASWARM_API", "127.0.0.1:7")
        for text in ("http://swarm.example.org/", "http://swarm.example.org/v1", "http://swarm.example.org/v1/"):
            assert find_api(text) == "http://swarm.example.org"
        assert find_api(None) == "http://127.0.0.1:7"

    def test_accepts_listen_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert find_api("0.0.0.0:8642") == "http://127.0.0.1:8642"
        assert find_api("[::]:8642") == "http://[::1]:8642"

    def test_reads_node_json(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("METASWARM_DATA_DIR", str(tmp_path))
        assert find_api(None) == "http://127.0.0.1:8642"
        self.ready.write(tmp_path)
        assert find_api(None) == "http://127.0.0.1:4242"
        monkeypatch.delenv("METASWARM_DATA_DIR")
        assert default_data_dir() != tmp_path

    @pytest.mark.parametrize("text", ["127.0.0.1:0", "ftp://127.0.0.1", "http://", "http://[::1", "127.0.0.1:x"])
    def test_refuses_invalid_url(self, text: str) -> None:
        assert run(["status", "--api", text]) == 2
