"""`metaswarm doctor` beside real daemons: healthy, and with the other one dead."""

import json
import re
import subprocess
import sys
from typing import Any

import trio

from tests.process.daemons import StartDaemon


async def examine(*flags: str) -> tuple[int, Any]:
    command = [sys.executable, "-m", "node", "doctor", "--json", *flags]
    done = await trio.run_process(command, capture_stdout=True, check=False)
    return done.returncode, json.loads(done.stdout)


async def test_tells_healthy_node_from_one_without_swarm(start_daemon: StartDaemon) -> None:
    first = await start_daemon()
    second = await start_daemon("--bootstrap", first.multiaddr)
    code, told = await examine("--data-dir", str(second.data_dir))
    assert (code, told["healthy"], told["running"]) == (0, True, True)
    assert told["peers"] == [first.peer_id]
    await first.kill()
    code, told = await examine("--data-dir", str(second.data_dir))
    assert (code, told["healthy"], told["running"]) == (1, False, True)
    assert told["findings"][0]["fault"] == "closed-port"
    assert first.multiaddr in told["findings"][0]["message"]


async def test_prints_lines(start_daemon: StartDaemon) -> None:
    daemon = await start_daemon()
    command = [sys.executable, "-m", "node", "doctor", "--data-dir", str(daemon.data_dir)]
    done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.DEVNULL)
    told = " ".join(done.stdout.decode().split())  # lines are wrapped at the width of the terminal
    assert told.startswith("all is well: a node runs here")
    assert re.search(r" llama\.cpp: xllamacpp [\d.]+ for CPU \([A-Z0-9_, ]+\)$", told)
