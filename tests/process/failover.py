"""A swarm of real daemons with a spare for each stage, in which stages are killed in the middle of a job."""

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.process.daemons import MODEL, THIRDS, Daemon, running_daemon, until

QUIET = ("--exploration", "0")
"""No trials: whoever has a session has the job's."""


@dataclass(frozen=True)
class Outcome:
    """A job during which a stage was lost. `pause_s`: the longest wait for a token after that."""

    text: str
    tokens: list[int]
    pause_s: float
    replays: int


@dataclass
class SparedSwarm:
    """A coordinator that serves nothing, and two peers for each third of the blocks."""

    folder: Path
    stack: AsyncExitStack
    coordinator: Daemon
    peers: dict[int, list[Daemon]] = field(default_factory=lambda: {0: [], 1: [], 2: []})
    started: int = 0

    async def start_peer(self, stage: int) -> None:
        self.started += 1
        flags = ["--serve", f"{MODEL}:{THIRDS[stage]}", "--threads", "1", *QUIET]
        flags += ["--bootstrap", self.coordinator.multiaddr]
        daemon = await self.stack.enter_async_context(running_daemon(self.folder / f"peer-{self.started}", *flags))
        self.peers[stage].append(daemon)

    async def replenish(self) -> None:
        """Start again whoever was lost, and wait until that is known."""
        async with trio.open_nursery() as nursery:
            for stage, peers in self.peers.items():
                for _ in range(2 - len(peers)):
                    nursery.start_soon(self.start_peer, stage)
        await self.settle()

    async def settle(self) -> None:
        """Wait until the coordinator knows exactly the peers that live."""
        expected = {daemon.peer_id for peers in self.peers.values() for daemon in peers}

        async def knows() -> bool:
            peers = (await self.coordinator.get("/swarm/peers"))["peers"]
            return {peer["peer_id"] for peer in peers if peer["spans"]} == expected

        await until(knows, timeout_s=60)

    async def serving(self, stage: int) -> Daemon | None:
        """Return the peer that has a session of the only job there is; None if it is over by now."""
        for daemon in self.peers[stage]:
            spans = (await daemon.get("/swarm/status"))["spans"]
            if any(span["sessions"] for span in spans):
                return daemon
        return None

    async def run(self, prompt: str, tokens: int, *, lose: tuple[int, int, int] | None = None) -> Outcome:
        """Run a greedy job. `lose`: (stage, words, signal): the signal that its peer gets after so many words.

        Words, not events: on a busy machine an event has several tokens. Nobody is lost where the last have come all at
        once.
        """
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        body["metaswarm"] = {"ignore_eos": True}
        text, came_s, lost_at_s, result = "", [trio.current_time()], -1.0, dict[str, Any]()
        victim: Daemon | None = None
        async with (
            httpx.AsyncClient(base_url=self.coordinator.api_url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                result = event.get("metaswarm") or result
                text += "".join(choice["text"] for choice in event["choices"])
                came_s.append(trio.current_time())
                if lose is None or victim is not None or len(text.split()) < lose[1]:
                    continue
                if victim := await self.serving(lose[0]):
                    lost_at_s = trio.current_time()
                    os.killpg(victim.process.pid, lose[2])
        if victim is not None:
            if lose is not None and lose[2] == signal.SIGSTOP:
                os.killpg(victim.process.pid, signal.SIGKILL)
            await victim.process.wait()
            self.peers[lose[0] if lose else 0].remove(victim)
        waits = [b - max(a, lost_at_s) for a, b in pairwise(came_s) if b > lost_at_s]
        return Outcome(text, result["token_ids"], max(waits, default=0.0), result.get("replays", 0))


@asynccontextmanager
async def spared_swarm(folder: Path) -> AsyncIterator[SparedSwarm]:
    """Run the swarm inside the block, begun once everybody serves and is known."""
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(running_daemon(folder / "coordinator", *QUIET))
        swarm = SparedSwarm(folder, stack, coordinator)
        await swarm.replenish()
        yield swarm
