import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from node import cli
from node.cli import VERBS, run
from node.cli.client import find_api
from node.cli.options import read_config
from node.cli.output import CommandError
from node.config import ConfigError, NodeReady, StartError
from node.network.interface import NetworkError
from protocol.identity import peer_id_from_public_key


def test_help_lists_verbs_without_heavy_imports() -> None:
    program = (
        "import sys; from node.cli import run; code = run(['--help']);"
        "print(code, sorted({'httpx', 'rich', 'trio', 'starlette', 'numpy', 'torch', 'libp2p'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    *lines, last = output.splitlines()
    assert last == "0 []"
    assert [line.split()[0] for line in lines[-len(VERBS) :]] == list(VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert f"metaswarm {verb}" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("text", ["'a line'", "'many lines' * 10_000"])
def test_output_that_cannot_be_written_is_one_line(text: str) -> None:
    program = f"import click; from node import cli; cli.cli.main = lambda *_, **__: click.echo({text}); cli.main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.decode() == "metaswarm: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("place", ["environment", "file"])
def test_every_verb_looks_for_the_node_where_it_was_configured(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("METASWARM_DATA_DIR", raising=False)
    (tmp_path / "x").mkdir()
    ready = NodeReady(peer_id=peer_id_from_public_key(bytes(32)), multiaddrs=(), api_url="http://127.0.0.1:1", pid=1)
    ready.write(tmp_path / "x")
    if place == "file":
        (tmp_path / "node.toml").write_text('data_dir = "~/x"\n')
        monkeypatch.setenv("METASWARM_CONFIG", str(tmp_path / "node.toml"))
    else:
        monkeypatch.setenv("METASWARM_DATA_DIR", "~/x")
    assert find_api(None) == ready.api_url
    assert run(["history", "export"]) == 1
    assert f"no history in {tmp_path / 'x'}: " in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminal_that_is_not_utf8_gets_what_it_can_show(encoding: str) -> None:
    program = (
        "import sys; from node import cli; from node.cli.output import print_json;"
        "cli.run = lambda arguments: print_json({'text': 'wörld…'}) or print('wörld…');"
        "cli.main()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment).stdout
    document, text = shown.decode(encoding).splitlines()
    assert json.loads(document) == {"text": "wörld…"}
    assert text == ("w?rld?" if encoding == "ascii" else "wörld?")


@pytest.mark.parametrize("verb", sorted({*VERBS} - {"config", "history", "model"}))
def test_every_verb_has_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["status", "--nonsense"], ["submit"], ["node", "--threads", "x"]])
def test_usage_error_is_one_line_with_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("metaswarm: ")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CommandError("It broke."), 1),
        (StartError("It broke."), 1),
        (NetworkError("It broke."), 1),
        (ExceptionGroup("", [ExceptionGroup("", [StartError("It broke.")])]), 1),
        (ConfigError("It broke."), 2),
    ],
)
def test_known_error_is_one_line(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_a_verb(error, monkeypatch)
    assert run(["status"]) == code
    assert capsys.readouterr() == ("", "metaswarm: It broke.\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("", [KeyboardInterrupt()])])
def test_interrupt_is_exit_code_130(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_in_a_verb(error, monkeypatch)
    assert run(["status"]) == 130


def test_unexpected_exception_propagates(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_in_a_verb(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run(["status"])


def raise_in_a_verb(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def verb() -> None:
        raise error

    monkeypatch.setattr(cli._Verbs, "get_command", lambda *_: verb)


def test_unknown_variable_is_error_for_node_and_warning_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METASWARM_MEMROY", "1GiB")
    fault = "unknown environment variable 'METASWARM_MEMROY'; did you mean 'METASWARM_MEMORY'?"
    for verb in ("node", "doctor"):
        assert run([verb]) == 2
        assert capsys.readouterr().err == f"metaswarm: {fault}; see `metaswarm {verb} --help`\n"
    assert run(["model", "list", "--json"]) == 0
    assert capsys.readouterr().err == f"metaswarm: warning: {fault}\n"


def test_url_of_another_node_is_no_address_to_listen_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METASWARM_API", "http://192.0.2.7:8642")
    assert run(["config", "check"]) == 0
    assert run(["config", "show", "--json"]) == 0
    assert {"option": "api", "value": "127.0.0.1:8642", "source": "default"} in json.loads(
        capsys.readouterr().out.splitlines()[-1]
    )["settings"]
    assert run(["doctor", "--exploration", "2"]) == 2
    assert "METASWARM_API" not in capsys.readouterr().err
    assert run(["node"]) == 2
    assert capsys.readouterr().err == (
        "metaswarm: METASWARM_API names the node at 'http://192.0.2.7:8642', which other verbs ask: "
        "unset it, or say with --api HOST:PORT where this node listens; see `metaswarm node --help`\n"
    )


def test_url_of_another_node_does_not_matter_beside_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASWARM_API", "http://192.0.2.7:8642")
    assert read_config("--api", "127.0.0.1:0").api_port == 0


@pytest.mark.parametrize("verb", ["node", "doctor"])
def test_wrong_log_level_in_environment_is_usage_error(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METASWARM_LOG_LEVEL", "loud")
    assert run([verb]) == 2
    assert "Invalid value for METASWARM_LOG_LEVEL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stauts"], "no such verb 'stauts'; did you mean 'status'?; see `metaswarm --help`"),
        (["pull", "tiny"], "no such verb 'pull'; did you mean 'model import'?"),
        (["bogus"], "no such verb 'bogus'; see `metaswarm --help`"),
        (["model", "lst"], "no such verb 'lst'; did you mean 'list'?; see `metaswarm model --help`"),
        (["submit", "Hi", "--modle", "x"], "no such option '--modle'; did you mean '--model'?"),
        (["node", "--port", "9"], "no such option '--port'; did you mean '--api' or '--listen'?; see"),
        (["submit", "Hi", "--host", "x"], "no such option '--host'; did you mean '--api'?; see"),
        (["node", "--workers", "2"], "no such option '--workers'; see"),
        (["submit", "Hi", "--quality", "exat"], "'exat' is not one of 'exact', 'near', 'any'"),
    ],
)
def test_says_what_was_meant(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_every_verb_names_options_alike() -> None:
    """What means the same has the same name, argument and help everywhere, except where a node itself is configured."""
    seen: dict[str, set[tuple[str, str | None, str | None]]] = {}
    for verb in VERBS.keys() - {"node", "doctor", "config"}:
        command = cli.cli.get_command(click.Context(cli.cli), verb)
        assert command is not None
        for each in command.commands.values() if isinstance(command, click.Group) else [command]:
            for option in each.params:
                if isinstance(option, click.Option) and option.opts[0] in {
                    *("--api", "--bootstrap", "--model", "--json", "--quality", "--cache-dir", "--data-dir")
                }:
                    seen.setdefault(option.opts[0], set()).add((str(option.type), option.metavar, option.help))
    assert {name: len(kinds) for name, kinds in seen.items()} == dict.fromkeys(seen, 1)
    assert {"--api", "--bootstrap", "--model", "--json"} <= seen.keys()


def test_jobs_that_fail_together_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_a_verb(ExceptionGroup("", [CommandError("gone"), CommandError("gone")]), monkeypatch)
    assert run(["status"]) == 1
    assert capsys.readouterr().err == "metaswarm: gone\n"
