"""Node.js for the peer that js-libp2p makes, and the daemons it meets."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.process.conftest import package, start_daemon, start_swarm
from tests.support.requirements import unavailable

__all__ = ["package", "start_daemon", "start_swarm"]

FOLDER = Path(__file__).parent
OLDEST_NODE = 22


@pytest.fixture(scope="session")
def node_js() -> str:
    """The Node.js for the scripts here: the machine's own if it is new enough, else the one that npm brought."""
    if not (FOLDER / "node_modules" / "libp2p").is_dir():
        unavailable("js-libp2p is not installed: run `npm ci` in tests/interop (needs Node.js and npm)")
    for command in (shutil.which("node"), FOLDER / "node_modules" / ".bin" / "node"):
        if command is not None and Path(command).exists():
            version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
            if int(version.lstrip("v").split(".")[0]) >= OLDEST_NODE:
                return str(command)
    return unavailable(f"js-libp2p needs Node.js {OLDEST_NODE} or newer, which npm has for Linux only")
