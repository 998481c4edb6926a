import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from node import demo
from node.cli import run
from node.cli.demo import _print_report
from node.models import catalogue, importer
from selector.task import BASELINE
from tests.unit.api.fakes import PEERS

PREPARE = """if True:
    import sys
    from types import SimpleNamespace
    from node import demo
    from node.cli import main
    from node.models import catalogue, importer
    demo.COMMAND = (sys.executable, "-m", "tests.unit.daemon_stand_in")
    catalogue.DEMO_MODEL = "tiny"
    importer.import_model = lambda *_, **__: SimpleNamespace(manifest=SimpleNamespace(block_count=8))
    main()
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(manifest=SimpleNamespace(block_count=8))
    monkeypatch.setattr(demo, "COMMAND", (sys.executable, "-m", "tests.unit.daemon_stand_in"))
    monkeypatch.setattr(catalogue, "DEMO_MODEL", "tiny")
    monkeypatch.setattr(importer, "import_model", lambda *_, **__: package)
    monkeypatch.setenv("STAND_IN", "well")


def test_prints_answer_route_and_timing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--nodes", "2", "--prompt", "Hi there"]) == 0
    output = capsys.readouterr().out
    assert "> Hi there\nHello, wörld\n" in output
    for fact in (*PEERS, "0-4", "4-8", "127.0.0.1:4001", "127.0.0.1:4002", "0.10 s", "0.20 s", "arithmetic=fp32"):
        assert fact in output
    for fact in ("33.3 tokens/s", "first token after 0.25 s", "0.50 s in all", "until every block was served"):
        assert fact in output


def test_json_has_job_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--nodes", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["text"], report["finish_reason"]) == ("Hello, wörld", "stop")
    assert [(stage["peer"], stage["start"], stage["end"], stage["compute_s"]) for stage in report["stages"]] == [
        (PEERS[0], 0, 4, 0.1),
        (PEERS[1], 4, 8, 0.2),
    ]
    assert report["start_s"] > 0
    assert report["speedup"] == {"predicted": None, "actual": 1.0}  # both are the fake's one answer
    for name, predicted, said in (
        (BASELINE.name, 1.0, "none: this is the baseline, as the swarm has measured too little so far"),
        ("engine=fused", 1.5, "1.50x predicted over the baseline, 1.00x measured"),
    ):
        report["method"]["name"], report["speedup"]["predicted"] = name, predicted
        _print_report(report)
        assert f"speed-up  {said}" in capsys.readouterr().out


def test_prints_log_of_dead_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STAND_IN", "dies")
    assert run(["demo", "--nodes", "2"]) == 1
    errors = capsys.readouterr().err
    assert "no more\ufffd of this\n" in errors
    assert errors.endswith("metaswarm: peer 2 of 2, blocks 4-8, exited with code 1\n")


def test_refuses_more_peers_than_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--nodes", "9"]) == 2
    assert "1 to 8 peers, not 9" in capsys.readouterr().err


def test_keep_runs_until_ctrl_c() -> None:
    command = [sys.executable, "-c", PREPARE, "demo", "--nodes", "2", "--keep"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        while not lines or "/v1" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "the demo ended by itself"
        (chat,) = (line for line in lines if "metaswarm chat" in line)
        assert run(["submit", "Hi", "--api", chat.split()[-1]]) == 0
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
