from pathlib import Path

import pytest

from node.config import NodeReady
from protocol.identity import peer_id_from_public_key

PEER = peer_id_from_public_key(bytes(32))
ADDRESS = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"


class TestReadyFile:
    ready = NodeReady(peer_id=PEER, multiaddrs=(ADDRESS,), api_url="http://127.0.0.1:8642", pid=17)

    def test_round_trip(self, tmp_path: Path) -> None:
        self.ready.write(tmp_path)
        assert NodeReady.read(tmp_path) == self.ready
        assert [path.name for path in tmp_path.iterdir()] == ["node.json"]

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"peer_id": 7}', "\x00", None])
    def test_ignores_malformed_or_missing_file(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "node.json").write_text(content)
        assert NodeReady.read(tmp_path) is None
