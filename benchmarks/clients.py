"""Many clients at once, and clients that go away: how each ends, and what they leave behind at the peers.

    python -m benchmarks.clients [--clients N] [--disconnects N] [--tokens N] [--json]

Three peers serve a third of the demo model each. N clients stream a chat from all three at the same time. Then clients
go away at a random moment, 50 at a time: most of them before the first token. The peers' memory (PSS with all their
processes), sessions and open files are compared with those before, after a few clients. Figures come as they are known.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click
import httpx
import psutil
import trio

from benchmarks.common import demo_package, describe_machine, spread_of, whole_swarm
from node.config import NodeReady
from node.models.catalogue import DEMO_MODEL
from node.models.store import Package

MIB: Final = 2**20
WARM_UP_CLIENTS: Final = 24
CLIENTS_THAT_LEAVE: Final = 50
"""At a time."""

LEAVE_WITHIN_S: Final = 1.0
SETTLE_S: Final = 420.0
"""Peers give back within a minute what sessions had taken, and after five to six what cached prompts had."""

TRAINED_TIMEOUT_S: Final = 900.0
"""By then a model that is trained on what the clients' jobs showed has been unloaded, too."""

ENDED_TIMEOUT_S: Final = 60.0


@click.command()
@click.option("--clients", type=click.IntRange(1), default=200, show_default=True, help="Clients at the same time.")
@click.option("--disconnects", type=click.IntRange(0), default=2000, show_default=True, help="Clients that go away.")
@click.option("--tokens", type=click.IntRange(1), default=16, show_default=True, help="Longest answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(clients: int, disconnects: int, tokens: int, as_json: bool) -> None:
    """Measure many clients at once, and clients that go away."""
    result = trio.run(measure, demo_package(), clients, disconnects, tokens)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(package: Package, clients: int, disconnects: int, tokens: int) -> dict[str, Any]:
    """Return how the clients ended, and what the peers took before and after."""
    async with whole_swarm(package, 3) as peers:
        await Load(peers, tokens).run(WARM_UP_CLIENTS)
        before = await resources_of(peers)
        load = Load(peers, tokens)
        began_s = time.perf_counter()
        await load.run(clients)
        took_s = time.perf_counter() - began_s
        first = spread_of(load.first_byte_s)
        note(f"{clients} clients ended in {took_s:.0f} s: {dict(load.endings)}; first event: {first}")
        after = await resources_of(peers)
        note(f"before {before}, after {after}")
        await load.leave(disconnects)
        left = await resources_of(peers)
        note(f"after disconnects {left}")
        return {
            **describe_machine(),
            "clients": clients,
            "disconnects": disconnects,
            "endings": dict(load.endings),
            "took_s": took_s,
            "first_byte_s": {"median": first.median, "p99": first.p99},
            "before": before,
            "after": after,
            "after_disconnects": left,
        }


def note(line: str) -> None:
    """Tell what is known so far."""
    click.echo(line, err=True)


class Load:
    """The clients, and how they ended."""

    def __init__(self, peers: Sequence[NodeReady], tokens: int) -> None:
        self.endings: Counter[str] = Counter()
        self.first_byte_s: list[float] = []
        self._urls = [f"{peer.api_url}/v1/chat/completions" for peer in peers]
        self._tokens = tokens

    async def run(self, clients: int) -> None:
        """Run so many clients at the same time until each has ended."""
        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(self._client, number)

    async def leave(self, clients: int) -> None:
        """Run so many clients that go away."""
        limiter = trio.CapacityLimiter(CLIENTS_THAT_LEAVE)
        draws = random.Random(1)

        async def client(number: int, leaves_s: float) -> None:
            async with limiter:
                with trio.move_on_after(leaves_s):
                    await self._stream(number, Counter())

        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(client, number, draws.uniform(0.0, LEAVE_WITHIN_S))

    async def _client(self, number: int) -> None:
        try:
            await self._stream(number, self.endings)
        except httpx.HTTPError as error:
            self.endings[type(error).__name__] += 1

    async def _stream(self, number: int, endings: Counter[str]) -> None:
        """Stream one chat on a connection of its own, and count how it ended."""
        body = {
            "model": DEMO_MODEL,
            "messages": [{"role": "user", "content": f"Tell me something about the number {number}."}],
            "max_tokens": self._tokens,
            "stream": True,
        }
        began_s = time.perf_counter()
        ending = "cut off"
        async with (
            httpx.AsyncClient(timeout=300, verify=False) as client,  # no TLS: a context takes 20 ms to make
            client.stream("POST", self._urls[number % len(self._urls)], json=body) as answer,
        ):
            if answer.status_code != 200:
                endings[str(answer.status_code)] += 1
                return
            has_begun = False
            async for line in answer.aiter_lines():
                if line.startswith('data: {"id"') and not has_begun:
                    has_begun = True
                    self.first_byte_s.append(time.perf_counter() - began_s)
                if line.startswith('data: {"error"'):
                    ending = f"{json.loads(line.removeprefix('data: '))['error']['code']} in the stream"
                elif line == "data: [DONE]":
                    ending = "answer"
        endings[ending] += 1


async def resources_of(peers: Sequence[NodeReady]) -> dict[str, Any]:
    """Return what the peers hold once their sessions have ended: memory in MiB, sessions and open files."""
    with trio.move_on_after(ENDED_TIMEOUT_S):
        while await sessions_of(peers):
            await trio.sleep(0.5)
    await trio.sleep(SETTLE_S)
    processes = [psutil.Process(peer.pid) for peer in peers]
    with trio.move_on_after(TRAINED_TIMEOUT_S):
        while any("node.selection.training_worker" in memory_of(process) for process in processes):
            await trio.sleep(10)
    return {
        "mib": [memory_of(process) for process in processes],
        "sessions": await sessions_of(peers),
        "files": [process.num_fds() for process in processes],
    }


def memory_of(daemon: psutil.Process) -> dict[str, float]:
    """Return the PSS in MiB of a daemon itself and of each of its child processes, by module."""
    found = {"node": daemon.memory_full_info().pss / MIB}
    for process in daemon.children(recursive=True):
        module = next(word for word in process.cmdline() if word.startswith("node."))
        found[module] = found.get(module, 0.0) + process.memory_full_info().pss / MIB
    return found


async def sessions_of(peers: Sequence[NodeReady]) -> int:
    """Return how many sessions the peers have."""
    count = 0
    async with httpx.AsyncClient(timeout=60) as client:
        for peer in peers:
            status = (await client.get(f"{peer.api_url}/swarm/status")).raise_for_status().json()
            count += sum(span["sessions"] for span in status["spans"])
    return count


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    endings = ", ".join(f"{count} {ending}" for ending, count in sorted(result["endings"].items()))
    first = result["first_byte_s"]
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores",
        f"{result['clients']} clients: {endings}, in {result['took_s']:.0f} s",
        f"first event: median {first['median']:.1f} s, p99 {first['p99']:.1f} s",
        f"{'':<28}{'memory of each peer, MiB':<28}{'sessions':<10}open files",
    ]
    rows = {
        f"after {WARM_UP_CLIENTS} clients": result["before"],
        f"after {result['clients']} clients": result["after"],
        f"after {result['disconnects']} disconnects": result["after_disconnects"],
    }
    for name, row in rows.items():
        memory = " ".join(f"{sum(mib.values()):.0f}" for mib in row["mib"])
        lines.append(f"{name:<28}{memory:<28}{row['sessions']:<10}{' '.join(map(str, row['files']))}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
