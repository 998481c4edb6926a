import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from node.cli import VERBS, run
from node.cli.completion_script import SHELLS
from tests.unit.api.fakes import PEERS, FakeNode
from tests.unit.cli.conftest import ServeNode


def complete(line: str, **environment: str) -> list[str]:
    """Return what the shell would offer behind a command line."""
    words = f"metaswarm {line}"
    done = subprocess.run(
        [sys.executable, "-c", "from node.cli import main; main()"],
        env={
            **os.environ,
            "_METASWARM_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    return [each.partition(",")[2] for each in done.stdout.splitlines()]


@pytest.fixture
def api(serve: ServeNode) -> str:
    return serve(FakeNode())


def test_completes_verbs_and_options() -> None:
    assert complete("sta") == ["status"]
    assert complete("model ver") == ["verify"]
    assert complete("submit --boo") == ["--bootstrap"]


def test_verbs_come_with_their_whole_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    in_fish = {"_METASWARM_COMPLETE": "fish_complete", "COMP_WORDS": "metaswarm mode", "COMP_CWORD": "mode"}
    summaries = dict(each.split("\t") for each in complete("", **in_fish))
    assert summaries["model"] == VERBS["model"][1]
    assert run(["completion", "fish"]) == 0
    assert 'string split --max 1 "," $completion' in capsys.readouterr().out, "a summary may have commas"


def test_completes_models_of_swarm_cache_and_catalogue(api: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"mine": "%s"}' % ("ef" * 32))
    settings = {"METASWARM_API": api, "METASWARM_CACHE_DIR": str(tmp_path)}
    everything = ["broken", "mine", "smollm2-135m-instruct", "tiny"]
    for line in ("submit --model ", "chat --model ", "run ", "node --serve "):
        assert complete(line, **settings) == everything
    assert complete("run ti", **settings) == ["tiny"]
    assert complete("model show m", **settings) == ["mine"]


def test_completes_peers(api: str) -> None:
    offered = complete("node --bootstrap /ip4", METASWARM_API=api)
    assert [address.rpartition("/")[2] for address in offered] == list(PEERS)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "ftp://x", "http://[", "https://127.0.0.1:1"])
def test_fails_in_silence(url: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text("[")
    settings = {"METASWARM_API": url, "METASWARM_CACHE_DIR": str(tmp_path)}
    assert complete("run ", **settings) == ["smollm2-135m-instruct"]


@pytest.mark.parametrize("shell", SHELLS)
def test_prints_script_that_the_shell_accepts(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert "_METASWARM_COMPLETE" in script.read_text()
    if found := shutil.which(shell):
        subprocess.run([found, "-n", str(script)], check=True)
