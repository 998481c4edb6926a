import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from node.cli import local_node, run
from node.cli.options import read_config
from node.config import NodeConfig
from tests.unit.api.fakes import PEERS

STAND_IN = """
import json, os, sys, time
with open(sys.argv[2], "w") as file:
    json.dump([sys.argv[3:], dict(os.environ)], file)
print(
    json.dumps({"peer_id": sys.argv[1], "multiaddrs": [], "api_url": "http://127.0.0.1:1", "pid": os.getpid()}),
    flush=True,
)
time.sleep(60)
"""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nodes are stand-ins that record here what they were started with."""
    path = tmp_path / "started"

    def python(*arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-c", STAND_IN, PEERS[0], str(path), *arguments[3:])

    monkeypatch.setattr(local_node, "python", python)
    return path


def config_of(record: Path, monkeypatch: pytest.MonkeyPatch) -> NodeConfig:
    """Return the configuration of the node that was started."""
    flags, environment = json.loads(record.read_text())
    for name in os.environ:
        if name.startswith("METASWARM_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith("METASWARM_"):
            monkeypatch.setenv(name, value)
    return read_config(*(flag for flag in flags if flag != "--json"))


@pytest.mark.parametrize("place", ["environment", "file"])
def test_settings_of_own_node_apply_only_where_they_are_meant(
    place: str, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, cache = tmp_path / "keys", tmp_path / "cache"
    assert run(["keygen", "--api-key-name", "me", str(keys)]) == 0
    settings: dict[str, Any] = {
        "api": "0.0.0.0:8642", "api_key": "sesame", "api_keys": str(keys), "cors_origin": "*", "serve": "other",
        "draft": "small", "listen": "/ip4/0.0.0.0/tcp/4001", "log_format": "json",
        "cache_dir": str(cache), "memory": "3GiB", "device": "cpu", "epoch": 60, "no_catalogue": True,
    }  # fmt: skip
    if place == "file":
        lists = {name: [settings[name]] for name in ("cors_origin", "serve", "listen")}
        file = tmp_path / "node.toml"
        file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in (settings | lists).items()))
        monkeypatch.setenv("METASWARM_CONFIG", str(file))
    else:
        for name, value in settings.items():
            monkeypatch.setenv(f"METASWARM_{name.upper()}", str(value))
    with local_node.local_node("tiny", (), share_data_dir=False):
        pass
    config = config_of(record, monkeypatch)
    assert (config.api_key, config.api_keys, config.cors_origins, config.draft) == (None, (), (), None)
    assert (config.api_host, [spec.model for spec in config.serve]) == ("127.0.0.1", ["tiny"])
    assert config.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert (config.cache_dir, config.memory_bytes, config.epoch_s) == (cache, 3 << 30, 60.0)
    assert (config.device, config.no_catalogue, config.log_format) == ("cpu", True, "text")


def test_node_without_blocks_joins_from_every_address(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEERS[1]}"
    monkeypatch.setenv("METASWARM_DEVICE", "cuda")
    with local_node.local_node(None, (address,), share_data_dir=False):
        pass
    config = config_of(record, monkeypatch)
    assert (config.bootstrap, config.serve, config.device) == ((address,), (), "cpu")
    assert (config.api_host, config.listen) == ("127.0.0.1", ("/ip4/0.0.0.0/tcp/0",))
