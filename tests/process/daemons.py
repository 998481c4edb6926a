"""Runs real daemons on loopback, as child processes."""

import json
import resource
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

from node.util.interpreter import child_environment, python

MODEL = "smollm2-135m-instruct"
THIRDS = ("0-10", "10-20", "20-30")
START_TIMEOUT_S = 90


@dataclass
class Daemon:
    """A running daemon."""

    process: trio.Process
    peer_id: str
    multiaddr: str
    api_url: str
    data_dir: Path

    async def get(self, path: str) -> Any:
        async with httpx.AsyncClient(base_url=self.api_url, timeout=30) as client:
            answer = await client.get(path)
            answer.raise_for_status()
            return answer.json()

    async def complete(self, **body: Any) -> dict[str, Any]:
        """Return the whole answer of /v1/completions, greedy unless said otherwise."""
        async with httpx.AsyncClient(base_url=self.api_url, timeout=120) as client:
            answer = await client.post(
                "/v1/completions", json={"model": MODEL, "temperature": 0, "metaswarm": {}, **body}
            )
        result: dict[str, Any] = answer.json()
        return result

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


StartDaemon = Callable[..., Awaitable[Daemon]]


@asynccontextmanager
async def running_daemon(
    data_dir: Path,
    *flags: str,
    environment: dict[str, str] | None = None,
    file_limit_bytes: int | None = None,
    on_started: Callable[[trio.Process], None] = lambda _process: None,
) -> AsyncIterator[Daemon]:
    """Run `metaswarm node` until it is ready, and stop it at the end; what it logs goes to this process's stderr.

    With `file_limit_bytes` no file that it writes may grow beyond that, as on a full disk, until `limit_files` lifts
    it; its log goes to `log` in the data directory then. `on_started` is told of the process before it is ready.
    Without mDNS, unless the environment says METASWARM_NO_MDNS=0: daemons of other runs would join its swarm.
    """
    command = [*python("-m", "node", "node"), "--json", "--data-dir", str(data_dir)]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--device", "cpu", *flags]
    settings = {"METASWARM_NO_MDNS": "1", **(environment or {})}
    options: dict[str, Any] = {"env": child_environment(settings), "start_new_session": True}
    if file_limit_bytes is not None:
        await trio.Path(data_dir).mkdir(mode=0o700, exist_ok=True)
        options["preexec_fn"] = partial(limit_files, 0, file_limit_bytes)
    with (data_dir / "log").open("wb") if file_limit_bytes is not None else nullcontext() as log:
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=log, **options)
    on_started(process)
    assert process.stdout is not None
    try:
        line = b""
        with trio.fail_after(START_TIMEOUT_S):
            while not line.endswith(b"\n"):
                data = await process.stdout.receive_some()
                assert data, f"the daemon ended with {await process.wait()} before it was ready"
                line += data
        ready = json.loads(line)
        yield Daemon(process, ready["peer_id"], ready["multiaddrs"][0], ready["api_url"], data_dir)
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.terminate()
                with trio.move_on_after(15):
                    await process.wait()
                if process.poll() is None:
                    process.kill()
                    await process.wait()
            await process.stdout.aclose()


async def complete_swarm(
    start: StartDaemon, *spans: str, flags: Sequence[str] = (), model: str = MODEL
) -> list[Daemon]:
    """Start a daemon per span, each with the first as its bootstrap peer, and wait until it sees the whole model.

    `flags` are the first one's. Returns them in the order of the spans.
    """
    first = await start("--serve", f"{model}:{spans[0]}", *flags)
    daemons = {spans[0]: first}

    async def start_another(span: str) -> None:
        daemons[span] = await start("--serve", f"{model}:{span}", "--bootstrap", first.multiaddr)

    async with trio.open_nursery() as nursery:
        for span in spans[1:]:
            nursery.start_soon(start_another, span)
    await until(partial(is_complete, first))
    return [daemons[span] for span in spans]


def limit_files(pid: int, limit_bytes: int | None) -> None:
    """Let a process (0: this one) write no file beyond a size, or any again: it fails as on a full disk."""
    soft = resource.RLIM_INFINITY if limit_bytes is None else limit_bytes
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))


async def is_complete(daemon: Daemon) -> bool:
    """Whether the daemon sees every block of the model served."""
    models = (await daemon.get("/swarm/models"))["models"]
    return any(model["complete"] for model in models)


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30) -> None:
    """Wait for something that other processes will make true; they tell nobody, so it is asked for again and again."""
    with trio.fail_after(timeout_s):
        while not await condition():
            await trio.sleep(0.05)
