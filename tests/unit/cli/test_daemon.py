import json
from collections.abc import Callable
from pathlib import Path

import pytest

from node import app
from node.cli import daemon, logs, run
from node.cli.daemon import best_address
from node.config import NodeConfig, NodeReady, ServeSpec, StartError
from protocol.identity import BlockRange, peer_id_from_public_key

PEER = peer_id_from_public_key(bytes(32))
LOOPBACK = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"
ELSEWHERE = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"


class FakeNode:
    """Takes the place of `run_node`: is ready at once, and ends."""

    def __init__(self) -> None:
        self.multiaddrs: tuple[str, ...] = (LOOPBACK, ELSEWHERE)
        self.error: Exception | None = None
        self.config: NodeConfig | None = None

    async def run(self, config: NodeConfig, on_ready: Callable[[NodeReady], None], _progress: object) -> None:
        self.config = config
        if self.error:
            raise self.error
        on_ready(NodeReady(peer_id=PEER, multiaddrs=self.multiaddrs, api_url="http://127.0.0.1:8642", pid=7))


@pytest.fixture
def fake_node(monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    fake = FakeNode()
    monkeypatch.setattr(app, "run_node", fake.run)
    monkeypatch.setattr(logs, "configure_logging", lambda level: None)
    return fake


def test_flags_make_the_configuration(fake_node: FakeNode, tmp_path: Path) -> None:
    flags = [
        "--data-dir",
        str(tmp_path),
        "--serve",
        "tiny:0-4",
        "--serve",
        "other",
        "--memory",
        "1GiB",
        "--no-catalogue",
    ]
    assert run(["node", *flags, "--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0"]) == 0
    config = fake_node.config
    assert config is not None
    assert (config.data_dir, config.listen, config.api_port) == (tmp_path, ("/ip4/127.0.0.1/tcp/0",), 0)
    assert config.serve == (ServeSpec("tiny", BlockRange(0, 4)), ServeSpec("other"))
    assert (config.memory_bytes, config.no_catalogue) == (1 << 30, True)


def test_a_ready_node_tells_how_another_machine_joins(fake_node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--serve", "tiny:0-4"]) == 0
    output = capsys.readouterr().out
    for fact in (PEER, LOOPBACK, ELSEWHERE, "http://127.0.0.1:8642", "tiny:0-4"):
        assert fact in output
    assert output.endswith(f"to join on another machine:\n  metaswarm node --bootstrap {ELSEWHERE}\n")


def test_who_joins_a_private_swarm_needs_its_key(
    fake_node: FakeNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "my swarm.key"
    assert run(["keygen", str(key)]) == 0
    assert run(["node", "--swarm-key", str(key)]) == 0
    assert capsys.readouterr().out.endswith(f"metaswarm node --bootstrap {ELSEWHERE} --swarm-key '{key}'\n")


def test_a_node_that_only_its_machine_can_reach_says_so(
    fake_node: FakeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_node.multiaddrs = (LOOPBACK,)
    assert run(["node"]) == 0
    assert "to join from this machine only" in capsys.readouterr().out
    assert best_address(()) is None


def test_json_is_one_line_the_content_of_node_json(fake_node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "peer_id": PEER,
        "multiaddrs": [LOOPBACK, ELSEWHERE],
        "api_url": "http://127.0.0.1:8642",
        "pid": 7,
    }


def test_a_node_that_cannot_start_is_one_line(fake_node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    fake_node.error = StartError("port 4001 is taken")
    assert run(["node"]) == 1
    assert capsys.readouterr() == ("", "metaswarm: port 4001 is taken\n")


def test_a_wrong_configuration_is_one_line_and_exit_code_2(
    fake_node: FakeNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peers.yaml").write_text("peers:\n  - [\n")
    assert run(["node", "--bootstrap", str(tmp_path / "peers.yaml")]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert "peers.yaml, line 3" in output.err
    assert fake_node.config is None


def test_the_environment_is_heard(fake_node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASWARM_SERVE", "tiny:0-4,other")
    assert run(["node"]) == 0
    assert fake_node.config is not None
    assert len(fake_node.config.serve) == 2


def test_every_option_of_the_configuration_has_a_flag() -> None:
    from node.config import OPTIONS

    assert {parameter.name for parameter in daemon.node.params} == {*OPTIONS, "config", "as_json"}
