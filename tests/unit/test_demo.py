import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from node import demo
from node.config import ConfigError
from node.demo import DaemonDiedError, LocalPeer, local_swarm, split_evenly
from protocol.identity import BlockRange
from tests.unit.api.fakes import PEERS


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(demo, "COMMAND", (sys.executable, "-m", "tests.unit.daemon_stand_in"))
    return "well"


@pytest.fixture(autouse=True)
def stand_in(behaviour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", behaviour)
    monkeypatch.setenv("METASWARM_SERVE", "what the user's own node serves")


def is_alive(peer: LocalPeer) -> bool:
    try:
        os.kill(peer.ready.pid, 0)
    except ProcessLookupError:
        return False
    return True


def ignore(stage: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize(
    ("blocks", "parts", "bounds"), [(30, 3, [10, 20, 30]), (30, 4, [7, 15, 22, 30]), (2, 1, [2]), (3, 3, [1, 2, 3])]
)
def test_splits_blocks_evenly(blocks: int, parts: int, bounds: list[int]) -> None:
    spans = split_evenly(blocks, parts)
    assert [span.end for span in spans] == bounds
    assert [span.start for span in spans] == [0, *bounds[:-1]]


def test_refuses_more_parts_than_blocks() -> None:
    with pytest.raises(ConfigError, match="1 to 2 peers, not 3"):
        split_evenly(2, 3)


async def test_peers_bootstrap_from_first_and_cover_all_blocks(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    async with local_swarm("tiny", 8, 2, tmp_path, lambda *stage: told.append(stage)) as peers:
        assert [peer.ready.peer_id for peer in peers] == list(PEERS)
        assert [peer.blocks for peer in peers] == [BlockRange(0, 4), BlockRange(4, 8)]
        first, second = (json.loads((peer.data_dir / "arguments.json").read_text()) for peer in peers)
        settings = [json.loads((peer.data_dir / "settings.json").read_text()) for peer in peers]
        assert all(is_alive(peer) for peer in peers)
    assert settings == [{"METASWARM_CACHE_DIR": str(tmp_path)}] * 2  # and nothing that configures the user's own node
    assert (first[first.index("--serve") + 1], second[second.index("--serve") + 1]) == ("tiny:0-4", "tiny:4-8")
    assert "--bootstrap" not in first
    assert second[second.index("--bootstrap") + 1].startswith(first[first.index("--listen") + 1] + "/p2p/")
    assert told == [("start peers", done, 2) for done in range(3)]
    assert not any(is_alive(peer) for peer in peers)
    assert not any(peer.data_dir.exists() for peer in peers)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
async def test_stops_peers_on_any_error(error: type[BaseException], tmp_path: Path) -> None:
    peers: list[LocalPeer] = []
    with pytest.RaisesGroup(error):
        async with local_swarm("tiny", 8, 2, tmp_path, ignore) as peers:
            raise error
    assert len(peers) == 2
    assert not any(is_alive(peer) for peer in peers)


class TestOneThatDies:
    @pytest.fixture(params=["dies", "dies late"])
    def behaviour(self, behaviour: str, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    async def test_reports_log_and_stops_others(self, tmp_path: Path) -> None:
        peers: list[LocalPeer] = []
        with pytest.raises(DaemonDiedError, match="peer 2 of 2, blocks 4-8, exited with code 1") as caught:
            async with local_swarm("tiny", 8, 2, tmp_path, ignore) as peers:
                await trio.sleep_forever()
        assert caught.value.log_lines[0] == "all is well so far"
        assert caught.value.log_lines[1].startswith("no more")
        assert not any(is_alive(peer) for peer in peers)


class TestOneThatWillNotGo:
    @pytest.fixture
    def behaviour(self, behaviour: str) -> str:
        return "stubborn"

    async def test_kills_stubborn_peer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.1)
        async with local_swarm("tiny", 8, 2, tmp_path, ignore) as peers:
            pass
        assert not any(is_alive(peer) for peer in peers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_peers(number: signal.Signals, tmp_path: Path) -> None:
    program = f"""if True:
        import sys, trio
        from pathlib import Path
        from node import demo
        demo.COMMAND = (sys.executable, "-m", "tests.unit.daemon_stand_in")
        async def main():
            async with demo.local_swarm("tiny", 8, 2, Path({str(tmp_path)!r}), lambda *_: None) as peers:
                print(*(peer.ready.pid for peer in peers), flush=True)
                await trio.sleep_forever()
        trio.run(main)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
