"""A browser, and swarms of daemons for it to look at."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright

from node.models.importer import import_model
from node.models.store import ModelStore
from node.util.interpreter import child_environment, python
from tests.support.requirements import unavailable

MODEL: Final = "smollm2-135m-instruct"
API_KEY: Final = "open-sesame"
START_TIMEOUT_S: Final = 90.0
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Daemon:
    """A running daemon."""

    process: subprocess.Popen[bytes]
    peer_id: str
    multiaddr: str
    api_url: str

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def running_daemon(data_dir: Path, *flags: str) -> Iterator[Daemon]:
    """Run `metaswarm node` inside the block, which begins once it is ready. Its log is in the data directory."""
    command = [*python("-m", "node", "node"), "--json", "--no-mdns", "--no-catalogue", "--data-dir", str(data_dir)]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--device", "cpu", "--threads", "1", *flags]
    data_dir.mkdir(mode=0o700)
    with (data_dir / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=child_environment(), start_new_session=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (data_dir / "log").read_text(encoding="utf-8")
        ready = json.loads(line)
        yield Daemon(process, ready["peer_id"], ready["multiaddrs"][0], ready["api_url"])
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def until(condition: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait for something that other processes will make true; they tell nobody, so it is asked for again and again."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not become true"
        time.sleep(0.05)


@contextmanager
def running_swarm(*blocks: str) -> Iterator[list[Daemon]]:
    """Run a daemon for each range of the demo model's blocks; the second one's API requires `API_KEY`."""
    import_model(MODEL, ModelStore())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metaswarm-browser-")))

        def start(number: int, *flags: str) -> Daemon:
            serve = ("--serve", f"{MODEL}:{blocks[number]}", *(("--api-key", API_KEY) if number == 1 else ()))
            return stack.enter_context(running_daemon(folder / f"peer-{number}", *serve, *flags))

        first = start(0)
        with ThreadPoolExecutor() as threads:
            others = [threads.submit(start, number, "--bootstrap", first.multiaddr) for number in range(1, len(blocks))]
            daemons = [first, *(other.result() for other in others)]
        until(lambda: is_complete(first))
        yield daemons


@pytest.fixture(scope="module")
def swarm() -> Iterator[list[Daemon]]:
    """Three daemons with a third of the model each."""
    with running_swarm("0-10", "10-20", "20-30") as daemons:
        yield daemons


def is_complete(daemon: Daemon) -> bool:
    models: list[dict[str, Any]] = httpx.get(f"{daemon.api_url}/swarm/models", timeout=30).json()["models"]
    return any(model["complete"] for model in models)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, as the system has it; METASWARM_CHROMIUM names another."""
    found = os.environ.get("METASWARM_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        unavailable("there is no Chromium: install the package `chromium`")
    with sync_playwright() as playwright:
        # Root has no sandbox, which containers run tests as.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()
