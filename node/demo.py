"""Starts and stops a swarm of daemons on this machine, each with a data directory of its own."""

import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import psutil
import trio

from node.config import ENVIRONMENT_PREFIX, MEMORY_SHARE, ConfigError, NodeReady, StartError
from node.identity import load_or_create
from node.util.child_process import Child, start
from node.util.interpreter import child_environment, python
from protocol.identity import BlockRange

COMMAND: Final = python("-m", "node", "node")
"""Runs a daemon with this interpreter."""
START_TIMEOUT_S: Final = 180.0
STOP_TIMEOUT_S: Final = 20.0
"""Longest wait for a daemon to exit before it is killed."""
LOG_LINES: Final = 15
"""Lines of a dead daemon's log that are shown."""
MAX_READY_BYTES: Final = 64 << 10


class DaemonDiedError(StartError):
    """A daemon of the local swarm exited; `log_lines` are the last of its log."""

    def __init__(self, message: str, log_lines: list[str]) -> None:
        super().__init__(message)
        self.log_lines = log_lines


@dataclass(frozen=True, slots=True)
class LocalPeer:
    """A running daemon of the local swarm."""

    ready: NodeReady
    blocks: BlockRange
    data_dir: Path


def split_evenly(block_count: int, parts: int) -> list[BlockRange]:
    """Return `parts` ranges that cover all blocks, equal up to one block."""
    if not 1 <= parts <= block_count:
        raise ConfigError(f"a model of {block_count} blocks can be split over 1 to {block_count} peers, not {parts}")
    bounds = [block_count * part // parts for part in range(parts + 1)]
    return [BlockRange(start, end) for start, end in pairwise(bounds)]


@asynccontextmanager
async def local_swarm(
    model: str, block_count: int, peers: int, cache_dir: Path, progress: Callable[[str, int, int], None]
) -> AsyncIterator[list[LocalPeer]]:
    """Run a swarm inside the block, which begins once every daemon has loaded its blocks.

    All start at the same time: the first one's address is chosen beforehand, and the others dial it until it answers.
    When a daemon exits early, the block is cancelled and DaemonDiedError raised.
    """
    spans = split_evenly(block_count, peers)
    # By default each would take the share of a node that has the machine to itself.
    memory_bytes = int(psutil.virtual_memory().available * MEMORY_SHARE) // peers
    causes: list[BaseException] = []
    daemons: list[_Daemon] = []
    with TemporaryDirectory(prefix="metaswarm-demo-", ignore_cleanup_errors=True) as folder:
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(_on_signals, causes, nursery.cancel_scope)
                for daemon in _plan(Path(folder), model, spans):
                    daemons.append(daemon)
                    await daemon.start(cache_dir, max(1, (os.cpu_count() or 1) // peers), memory_bytes)
                    nursery.start_soon(_watch, daemon, causes, nursery.cancel_scope)
                progress("start peers", 0, peers)
                running: list[LocalPeer] = []
                with trio.move_on_after(START_TIMEOUT_S) as timeout:
                    for daemon in daemons:
                        running.append(await daemon.wait_ready())
                        progress("start peers", len(running), peers)
                if timeout.cancelled_caught:
                    raise StartError(
                        f"the peers were not ready within {START_TIMEOUT_S:.0f} seconds; use fewer --nodes"
                    )
                yield running
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await _stop(daemons)
            if causes:
                raise causes[0]


class _Daemon:
    """One `metaswarm node` process."""

    def __init__(self, name: str, data_dir: Path, blocks: BlockRange, arguments: list[str]) -> None:
        self.name = name
        self.blocks = blocks
        self.child: Child | None = None
        self._data_dir = data_dir
        self.log = data_dir / "log"
        self._arguments = arguments

    async def start(self, cache_dir: Path, threads: int, memory_bytes: int) -> None:
        # The settings of the user's own node do not apply here.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        environment = child_environment({f"{ENVIRONMENT_PREFIX}CACHE_DIR": str(cache_dir)}, base=inherited)
        command = [*COMMAND, "--json", "--no-catalogue", "--no-mdns", "--data-dir", str(self._data_dir)]
        command += ["--device", "cpu"]  # each would take most of one GPU's memory
        command += ["--api", "127.0.0.1:0", "--threads", str(threads), "--memory", str(memory_bytes), *self._arguments]
        with self.log.open("wb") as log:
            self.child = await start(command, what=self.name, environment=environment, stdout=True, log=log)

    async def wait_ready(self) -> LocalPeer:
        """Return the peer once the daemon prints `node.json`; wait forever if it exits before."""
        assert self.child is not None
        output = bytearray()
        while b"\n" not in output and len(output) < MAX_READY_BYTES:
            chunk = await self.child.stdout.receive_some()
            if not chunk:
                await trio.sleep_forever()  # `_watch` reports the exit
            output += chunk
        return LocalPeer(ready=NodeReady.parse(output.decode()), blocks=self.blocks, data_dir=self._data_dir)


def _plan(folder: Path, model: str, spans: list[BlockRange]) -> list[_Daemon]:
    daemons: list[_Daemon] = []
    bootstrap = ""
    for number, blocks in enumerate(spans, 1):
        data_dir = folder / f"peer-{number}"
        data_dir.mkdir(mode=0o700)
        serve = ["--serve", f"{model}:{blocks}"]
        if bootstrap:
            network = ["--listen", "/ip4/127.0.0.1/tcp/0", "--bootstrap", bootstrap]
        else:
            address = f"/ip4/127.0.0.1/tcp/{_free_port()}"
            bootstrap = f"{address}/p2p/{load_or_create(data_dir).peer_id}"
            network = ["--listen", address]
        daemons.append(_Daemon(f"peer {number} of {len(spans)}", data_dir, blocks, network + serve))
    return daemons


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def _on_signals(
    causes: list[BaseException],
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """End the swarm on SIGTERM and SIGHUP, as on Ctrl-C; it would outlive this process otherwise."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            causes.append(KeyboardInterrupt())
            scope.cancel()


async def _watch(daemon: _Daemon, causes: list[BaseException], scope: trio.CancelScope) -> None:
    assert daemon.child is not None
    code = await daemon.child.process.wait()
    message = f"{daemon.name}, blocks {daemon.blocks}, exited with code {code}"
    log_lines = daemon.log.read_text(encoding="utf-8", errors="replace").splitlines()
    causes.append(DaemonDiedError(message, log_lines[-LOG_LINES:]))
    scope.cancel()


async def _stop(daemons: list[_Daemon]) -> None:
    """Terminate the daemons, wait for them, and kill the rest."""
    children = [daemon.child for daemon in daemons if daemon.child is not None]
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    with trio.move_on_after(STOP_TIMEOUT_S):
        for child in children:
            await child.process.wait()
    for child in children:
        await child.kill()
