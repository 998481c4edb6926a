import json
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from node import app
from node.cli import logs, run
from node.config import NodeConfig, NodeReady, ServeSpec, StartError
from node.joining import best_address, join_elsewhere, join_here, port_conflicts
from node.models.catalogue import DEMO_MODEL
from node.models.importer import import_model
from node.models.store import ModelStore
from protocol.identity import BlockRange, peer_id_from_public_key
from tests.unit.models.checkpoints import write_checkpoint

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
    monkeypatch.setattr(logs, "configure_logging", lambda level, log_format: None)
    return fake


def test_flags_set_configuration(fake_node: FakeNode, tmp_path: Path) -> None:
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


def printed_commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if line.startswith("  ")]


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_prints_join_command_for_other_machine(fake_node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--serve", f"{DEMO_MODEL}:0-4"]) == 0
    output = capsys.readouterr().out
    for fact in (PEER, LOOPBACK, ELSEWHERE, "http://127.0.0.1:8642", f"{DEMO_MODEL}:0-4"):
        assert fact in output
    end = f"to join from another machine:\n  metaswarm node --bootstrap {ELSEWHERE} --serve {DEMO_MODEL}\n"
    assert output.endswith(end)


def test_printed_join_command_starts_second_node(
    fake_node: FakeNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as first_api:
        port, api_port = first.getsockname()[1], first_api.getsockname()[1]
        options = ["--listen", f"/ip4/127.0.0.1/tcp/{port}", "--api", f"127.0.0.1:{api_port}"]
        data_dir = tmp_path / "my node"
        data_dir.mkdir()
        assert run(["node", "--data-dir", str(data_dir), *options, "--serve", DEMO_MODEL]) == 0
        here, _ = printed_commands(capsys.readouterr().out)
        assert here[1] == "node"
        assert run(here[1:]) == 0, "it can be pasted"
        second = fake_node.config
        assert second is not None
        assert second.bootstrap == (LOOPBACK,)
        assert second.serve == (ServeSpec(DEMO_MODEL),)
        assert second.data_dir == tmp_path / "my node-2"
        assert not port_conflicts(second)
        assert not {port, api_port} & {int(second.listen[0].split("/")[4]), second.api_port}


def test_join_command_names_models_by_id(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    model = import_model(str(write_checkpoint(tmp_path / "mine")), store, name="mine").model_id
    config = NodeConfig(data_dir=tmp_path, cache_dir=tmp_path, serve=(ServeSpec("mine"),), epoch_s=60.0)
    ready = NodeReady(peer_id=PEER, multiaddrs=(LOOPBACK, ELSEWHERE), api_url="", pid=7)
    elsewhere, here = join_elsewhere(config, ready), join_here(config, ready)
    assert elsewhere is not None
    assert option(elsewhere, "--serve") == model
    assert option(here, "--serve") == "mine"
    assert option(here, "--cache-dir") == str(tmp_path)
    assert option(elsewhere, "--epoch") == option(here, "--epoch") == "60"
    gap = ServeSpec("mine", BlockRange(0, 1))
    elsewhere, here = join_elsewhere(config, ready, gap), join_here(config, ready, gap)
    assert elsewhere is not None
    assert (option(elsewhere, "--serve"), option(here, "--serve")) == (f"{model}:0-1", "mine:0-1")


@pytest.mark.parametrize("from_environment", [False, True])
def test_join_command_includes_swarm_key(
    fake_node: FakeNode,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    from_environment: bool,
) -> None:
    key = tmp_path / "my swarm.key"
    assert run(["keygen", str(key)]) == 0
    if from_environment:
        monkeypatch.setenv("METASWARM_SWARM_KEY", str(key))
    assert run(["node", *([] if from_environment else ["--swarm-key", str(key)])]) == 0
    output = capsys.readouterr().out
    here, elsewhere = printed_commands(output)
    assert option(here, "--swarm-key") == str(key)
    assert option(elsewhere, "--swarm-key") == "my swarm.key"
    assert f"from another machine that has a copy of {key}" in output


def test_prints_that_loopback_node_is_unreachable(fake_node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    fake_node.multiaddrs = (LOOPBACK,)
    assert run(["node"]) == 0
    output = capsys.readouterr().out
    assert len(printed_commands(output)) == 1
    assert "other machines cannot reach this node; --listen" in output
    assert best_address(()) is None


def test_prints_that_nothing_is_served(fake_node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node"]) == 0
    output = capsys.readouterr().out
    assert "serves   no blocks; --serve MODEL serves some" in output
    assert all("--serve" in command for command in printed_commands(output))


def test_json_prints_node_json(fake_node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "peer_id": PEER,
        "multiaddrs": [LOOPBACK, ELSEWHERE],
        "api_url": "http://127.0.0.1:8642",
        "pid": 7,
    }


def test_start_error_is_one_line(fake_node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    fake_node.error = StartError("port 4001 is taken")
    assert run(["node"]) == 1
    assert capsys.readouterr() == ("", "metaswarm: port 4001 is taken\n")


def test_config_error_is_one_line_with_exit_code_2(
    fake_node: FakeNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peers.yaml").write_text("peers:\n  - [\n")
    assert run(["node", "--bootstrap", str(tmp_path / "peers.yaml")]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert "peers.yaml, line 3" in output.err
    assert fake_node.config is None


def test_reads_environment(fake_node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASWARM_SERVE", "tiny:0-4,other")
    assert run(["node"]) == 0
    assert fake_node.config is not None
    assert len(fake_node.config.serve) == 2
