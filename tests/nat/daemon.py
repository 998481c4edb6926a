"""Real daemons in the lab's namespaces, asked through their API from inside."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node.util.interpreter import child_environment, python

from .lab import Lab

API = "http://127.0.0.1:8642"
MODEL = "smollm2-135m-instruct"
START_TIMEOUT_S = 120

_ASK = """
import json, sys, urllib.request
url, body = sys.argv[1], sys.argv[2].encode() or None
request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
try:
    answer = urllib.request.urlopen(request, timeout=120)
except urllib.error.HTTPError as error:
    answer = error
sys.stdout.buffer.write(answer.read())
"""

_STREAM = """
import json, sys, time, urllib.request
request = urllib.request.Request(sys.argv[1], data=sys.argv[2].encode(), headers={"Content-Type": "application/json"})
for line in urllib.request.urlopen(request, timeout=120):
    if line.startswith(b"data: "):
        print(time.monotonic(), line[6:].decode().strip(), flush=True)
"""


class LabDaemon:
    """A daemon in a namespace, with the demo model in the user's cache and no way to get another."""

    def __init__(self, lab: Lab, space: str, folder: Path, *flags: str) -> None:
        self.lab, self.space = lab, space
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log = folder / "log"
        command = [*python("-m", "node", "node"), "--json", "--data-dir", str(folder), "--no-mdns", "--device", "cpu"]
        command += ["--threads", "1", "--exploration", "0", "--no-catalogue", *flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                lab.inside(space, *command), stdout=subprocess.PIPE, stderr=log, env=child_environment(), text=True
            )
        self._ready: dict[str, Any] | None = None

    @property
    def ready(self) -> dict[str, Any]:
        """What the daemon printed when it was ready."""
        if self._ready is None:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line, f"the daemon in {self.space} ended: {self.log.read_text()[-2000:]}"
            self._ready = json.loads(line)
        return self._ready

    @property
    def id(self) -> str:
        """The peer's id."""
        return str(self.ready["peer_id"])

    def address(self, host: str) -> str:
        """Return where peers dial it."""
        return f"/ip4/{host}/tcp/4001/p2p/{self.id}"

    def ask(self, path: str, **body: Any) -> Any:
        """Return the answer of the API, also of a request that failed."""
        script = (sys.executable, "-I", "-S", "-c", _ASK, API + path, json.dumps(body) if body else "")
        done = subprocess.run(self.lab.inside(self.space, *script), capture_output=True, check=True)
        return json.loads(done.stdout)

    def complete(self, prompt: str = "The sea is", tokens: int = 6) -> dict[str, Any]:
        """Return the answer to a job, and the seconds that it took."""
        started_s = time.monotonic()
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "metaswarm": {}}
        answer: dict[str, Any] = self.ask("/v1/completions", **body)
        return {**answer, "took_s": time.monotonic() - started_s}

    def stream(self, prompt: str, tokens: int) -> subprocess.Popen[str]:
        """Begin a job; what is printed are lines of a time and a part of the answer."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        script = (sys.executable, "-I", "-S", "-c", _STREAM, API + "/v1/completions", json.dumps(body))
        return subprocess.Popen(self.lab.inside(self.space, *script), stdout=subprocess.PIPE, text=True)

    def way(self, peer: str) -> str | None:
        """Return how a peer is reached from here."""
        found: str | None = self.peer(peer).get("way")
        return found

    def peer(self, peer: str) -> dict[str, Any]:
        """Return what is known here of a peer."""
        return next((each for each in self.ask("/swarm/peers")["peers"] if each["peer_id"] == peer), {})

    def is_complete(self) -> bool:
        """Return whether the model is complete as seen from here."""
        return any(model["complete"] for model in self.ask("/swarm/models")["models"])

    def apart(self) -> list[list[str]]:
        """Return the pairs of peers that serve the model and cannot reach each other, as seen from here."""
        return [pair for model in self.ask("/swarm/models")["models"] for pair in model["apart"]]

    def reach(self) -> dict[str, Any]:
        """Return how this node can be reached."""
        found: dict[str, Any] = self.ask("/swarm/status")["reachability"]
        return found

    def kill(self) -> None:
        """Kill the daemon and what it started: nobody is told."""
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        """Have the daemon leave."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill()


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    """Wait for something that other processes will make true."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not {what} after {timeout_s:g} s"
        time.sleep(0.3)
