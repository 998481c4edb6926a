from typing import Any

import pytest

from node.cli.output import out
from node.cli.watch import Overview
from tests.unit.api.fakes import MODEL, PEERS, FakeNode
from tests.unit.cli.conftest import ServeNode
from tests.unit.cli.terminal import on_terminal

JOB: dict[str, Any] = {
    "job_id": "0123456789abcdef" * 2,
    "model": MODEL,
    "name": "tiny",
    "state": "running",
    "trial": False,
    "task": "generate",
    "submitted_at": 1_700_000_000.0,
    "prompt_tokens": 5,
    "tokens": 10,
    "route": [{"peer": PEERS[0], "start": 0, "end": 4}, {"peer": PEERS[1], "start": 4, "end": 8}],
    "method": None,
}


def shown(overview: Overview, capsys: pytest.CaptureFixture[str], now_s: float, tokens: int, compute_s: float) -> str:
    node = FakeNode()
    status = node.status_document()
    status["spans"][0]["compute_s"] = compute_s
    out().print(overview.render(status, node.peers(), node.models(), [JOB | {"tokens": tokens}], now_s))
    return capsys.readouterr().out


def test_rates_are_of_the_time_between_two_looks(capsys: pytest.CaptureFixture[str]) -> None:
    overview = Overview(None)  # type: ignore[arg-type]
    assert "0.0 tokens/s" in shown(overview, capsys, 100.0, 10, 3.0)
    text = shown(overview, capsys, 102.0, 60, 4.0)
    assert "25.0 tokens/s" in text
    assert "load 50%" in text
    for fact in (PEERS[1][-8:], "tiny:4-8", "this node", "1.2 ms", "11112222", "1-3 not served", JOB["job_id"][:8]):
        assert fact in text


def test_q_quits_and_leaves_terminal_as_it_was(serve: ServeNode) -> None:
    with on_terminal("status", "--watch", "--api", serve(FakeNode())) as terminal:
        place = terminal.wait_for("q quits")
        assert "\x1b[?1049h" in terminal.raw
        terminal.resize(60, 12)
        place = terminal.wait_for(PEERS[0][:20], place)
        terminal.type("q")
        assert terminal.wait_exit() == 0
    assert terminal.raw.endswith("\x1b[?25h\x1b[?1049l"), "the cursor and the former screen are back"


def test_node_that_is_gone_is_waited_for() -> None:
    with on_terminal("peers", "--watch", "--api", "127.0.0.1:1") as terminal:
        terminal.wait_for("trying again; q quits")
        terminal.type("q")
        assert terminal.wait_exit() == 0
