import io
import json
import signal
import sys
from pathlib import Path

import pytest

from node.api.interface import ModelDocument
from node.cli import run
from node.coordinator.chat import ChatMessage
from node.coordinator.submission import JobError, JobErrorCode
from tests.unit.api.fakes import MODEL, FakeNode
from tests.unit.cli.conftest import ServeNode
from tests.unit.cli.terminal import on_terminal


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def api(node: FakeNode, serve: ServeNode) -> list[str]:
    return ["--api", serve(node)]


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


class Typed(io.TextIOWrapper):
    """Keys, as from a terminal."""

    def isatty(self) -> bool:
        return True


def type_keys(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(text.encode())))


def said(node: FakeNode, number: int = -1) -> list[tuple[str, str]]:
    """The messages of a request."""
    messages = node.submitter.requests[number].messages
    assert messages is not None
    return [(message.role, message.content) for message in messages]


def test_piped_lines_are_one_conversation(
    node: FakeNode, api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, 'Hi\n\n"""two\nlines"""\n')
    assert run(["chat", "--system", "Be brief.", "--max-tokens", "7", *api]) == 0
    assert capsys.readouterr() == ("Hello, wörld\nHello, wörld\n", "")
    assert said(node, 0) == [("system", "Be brief."), ("user", "Hi")]
    assert said(node) == [*said(node, 0), ("assistant", "Hello, wörld"), ("user", "two\nlines")]
    assert node.submitter.requests[0].max_tokens == 7
    assert node.submitter.requests[0].messages == (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Hi"),
    )


def test_json_has_a_document_for_each_answer(
    api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "Hi\nAnd?\n")
    assert run(["chat", "--json", *api]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["Hello, wörld"] * 2


def test_commands(
    node: FakeNode, api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    type_keys(
        monkeypatch,
        "Hi\n/clear\n/system Be kind.\nOnce more\n"
        f"/save {file}\n/model\n/model {MODEL[:12]}\nAgain\n/help\n/bye\nunsaid",
    )
    assert run(["chat", *api]) == 0
    assert said(node, 1) == [("system", "Be kind."), ("user", "Once more")]
    assert json.loads(file.read_text()) == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Once more"},
            {"role": "assistant", "content": "Hello, wörld"},
        ],
    }
    assert node.submitter.requests[2].model == MODEL[:12]
    assert len(node.submitter.requests) == 3
    assert "/system [TEXT]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/sytem x", "no such command '/sytem'; did you mean '/system'?"),
        ("/model tinny", "no model 'tinny' in the swarm; did you mean 'tiny'?"),
        ("/model broken", "no peer serves blocks 1-3 of broken"),
        ("/save", "/save takes the name of a file"),
        ("/save /nowhere/at/all", "cannot write /nowhere/at/all"),
    ],
)
def test_wrong_command_says_what_was_meant(
    line: str, says: str, api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_keys(monkeypatch, line)
    assert run(["chat", *api]) == 0
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("reply", "is_written"), [("n\n", False), ("\n", False), ("y\n", True), ("", False)])
def test_save_asks_before_it_overwrites(
    reply: str, is_written: bool, api: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    file.write_text("mine")
    type_keys(monkeypatch, f"/save {file}\n{reply}")
    assert run(["chat", *api]) == 0
    assert (file.read_text() != "mine") == is_written


def test_piped_text_is_never_a_command(
    node: FakeNode, api: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    pipe(monkeypatch, f"/save {file}\n/bye\n")
    assert run(["chat", *api]) == 0
    assert not file.exists()
    assert [content for role, content in said(node) if role == "user"] == [f"/save {file}", "/bye"]


def test_node_here_is_not_waited_for(
    node: FakeNode, api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It knows its swarm: a model that is not there is told at once, whomever --bootstrap names."""
    asked = 0
    models = node.models()

    def count_and_answer() -> list[ModelDocument]:
        nonlocal asked
        asked += 1
        return models

    monkeypatch.setattr(node, "models", count_and_answer)
    monkeypatch.setattr("node.cli.target.DISCOVERY_TIMEOUT_S", 0.5)
    monkeypatch.setattr("node.cli.target.DISCOVERY_INTERVAL_S", 0.01)
    monkeypatch.setenv("METASWARM_API", api[1])
    assert run(["chat", "--model", "tinny", "--bootstrap", "peers.yaml"]) == 1
    assert "did you mean 'tiny'?" in capsys.readouterr().err
    assert asked == 2


def test_unknown_model_is_refused_before_anything_is_typed(api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--model", "tinny", *api]) == 1
    assert "did you mean 'tiny'?" in capsys.readouterr().err


def test_ctrl_c_stops_answer_and_ctrl_d_leaves(node: FakeNode, api: list[str]) -> None:
    node.submitter.hang = True
    with on_terminal("chat", *api) as terminal:
        terminal.wait_for(">>> ")
        terminal.type("Hi\n")
        place = terminal.wait_for("Hello, wörld")
        terminal.type("\x03")
        place = terminal.wait_for(">>> ", terminal.wait_for("(stopped)", place))
        node.submitter.hang = False
        terminal.type("\x1b[A\n")  # arrow up: the line before
        place = terminal.wait_for("3 tokens, 33.3 tokens/s, the first after 0.25 s, over 2 peers", place)
        place = terminal.wait_for(">>> ", place)
        terminal.type("half a line")
        place = terminal.wait_for("half a line", place)  # else the terminal drops it, and nothing is interrupted
        terminal.wait_for(">>> ", terminal.interrupt("(Ctrl-D leaves)", place))
        terminal.type("\x04")
        assert terminal.wait_exit() == 0
    assert said(node) == [("user", "Hi"), ("assistant", "Hello, wörld"), ("user", "Hi")]


def test_failure_keeps_chat_on_terminal(node: FakeNode, api: list[str]) -> None:
    node.submitter.refuse = JobError(JobErrorCode.CONTEXT_LENGTH, "too long a talk")
    node.submitter.refusals = 1
    with on_terminal("chat", *api) as terminal:
        terminal.wait_for(">>> ")
        terminal.type("Hi\n")
        place = terminal.wait_for("metaswarm: too long a talk")
        place = terminal.wait_for(">>> ", place)
        terminal.type("Hi again\n")
        terminal.wait_for(">>> ", terminal.wait_for("Hello, wörld", place))
        terminal.type("\x04")
        assert terminal.wait_exit() == 0
    assert said(node) == [("user", "Hi again")]


def test_ended_from_outside_leaves_no_traceback(node: FakeNode, api: list[str]) -> None:
    node.submitter.words, node.submitter.hang = ("Once", " upon"), True
    with on_terminal("chat", *api) as terminal:
        terminal.wait_for(">>> ")
        terminal.type("Tell me\n")
        terminal.wait_for("Once upon")
        terminal.process.terminate()
        assert terminal.wait_exit() == 128 + signal.SIGTERM
    assert "Traceback" not in terminal.raw
