"""Memory and slowdown that a flooding peer causes in a daemon and in other peers' jobs.

    python -m benchmarks.flood [--seconds N] [--json]

A daemon serves the whole demo model and runs one job after another: undisturbed; then beside a process that only uses
as many cores as the flooding peer will; then under the flood. The flooding peer uses every protocol at once: as much
signed garbage on all gossip topics as it can produce; garbage and well-formed nonsense on sync, job and blob streams;
and requests for the largest block file whose answers it never reads. When it is disconnected it returns under a new
identity.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import click
import httpx
import psutil
import trio
import trio.lowlevel

from benchmarks.common import demo_package, describe_machine, spread_of, verdict, whole_model
from node.config import NodeReady
from node.models.catalogue import DEMO_MODEL
from node.models.store import Package
from node.network.host import Libp2pNetwork
from node.network.interface import Network, NetworkError
from protocol import blobs, canonical, connection, sync
from protocol.announcements import HEARTBEAT_TOPIC
from protocol.capabilities import CAPABILITY_TOPIC
from protocol.framing import FrameType, encode_frame
from protocol.identity import BlockRange, PeerId
from protocol.observations import OBSERVATIONS_TOPIC

TOPICS = (HEARTBEAT_TOPIC, CAPABILITY_TOPIC, OBSERVATIONS_TOPIC)
PROTOCOLS = (sync.PROTOCOL_ID, connection.PROTOCOL_ID, blobs.PROTOCOL_ID)
HANDS = 16
"""Streams of each kind that the flooding peer has open at a time."""
PROMPT_TOKENS = 32
MAX_TOKENS = 24
SAMPLE_S = 0.25
TARGET_MIB = 256.0
TARGET_RATIO = 2.0


@click.command()
@click.option("--seconds", type=click.IntRange(5), default=30, show_default=True, help="How long the flood lasts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--flood", type=(str, str), hidden=True, help="For the other process: multiaddr, sha256 of a file.")
def main(seconds: int, as_json: bool, flood: tuple[str, str] | None) -> None:
    """Measure the effect of a flooding peer."""
    if flood is not None:
        if not flood[0]:
            spin()
        trio.run(flood_for_ever, *flood)
        return
    result = trio.run(measure, demo_package(), seconds)
    click.echo(json.dumps(result) if as_json else report(result))


# The flooding peer


def spin() -> None:
    """Use a core until killed: a remote flooding peer would use none of this machine's."""
    while True:
        pass


async def flood_for_ever(multiaddr: str, sha256: str) -> None:
    """Flood a daemon until killed; print counts every second."""
    done: dict[str, int] = {}
    while True:
        network = Libp2pNetwork(os.urandom(32), listen=["/ip4/127.0.0.1/tcp/0"])
        for topic in TOPICS:
            network.join_topic(topic, lambda peer, data: True)
        with suppress(NetworkError):
            async with network.running():
                await attack(network, await network.connect(multiaddr), bytes.fromhex(sha256), done)
        done["identities"] = done.get("identities", 0) + 1
        await trio.sleep(0.1)


async def attack(network: Network, target: PeerId, sha256: bytes, done: dict[str, int]) -> None:
    """Flood all protocols concurrently until the target disconnects us."""

    async def repeat(name: str, action: Callable[[], Awaitable[None]]) -> None:
        while True:
            done[name] = done.get(name, 0) + 1
            with suppress(NetworkError):
                await action()
            await trio.lowlevel.checkpoint()

    async def gossip() -> None:
        await network.publish(random.choice(TOPICS), random.randbytes(random.choice((64, 2048, 60_000))))

    async def nonsense() -> None:
        stream = await network.open_stream(target, random.choice(PROTOCOLS))
        try:
            for _ in range(4):
                await stream.send_all(
                    random.choice(
                        (
                            random.randbytes(65536),
                            encode_frame(FrameType.CONTROL, canonical.encode({"type": "hello", "n": list(range(99))})),
                            encode_frame(FrameType.CONTROL, random.randbytes(4096)),
                        )
                    )
                )
        finally:
            await stream.reset()

    async def ask_and_never_read() -> None:
        stream = await network.open_stream(target, blobs.PROTOCOL_ID)
        try:
            request = blobs.BlobRequest(sha256=sha256.hex(), offset=0, length=1 << 30)
            await stream.send_all(blobs.BlobInitiator().request(request))
            await trio.sleep(5)
        finally:
            await stream.reset()

    async def tell() -> None:
        while True:
            await trio.sleep(1)
            print(json.dumps(done), flush=True)
            if target not in network.connected_peers():
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        nursery.start_soon(repeat, "gossip messages", gossip)  # one: it can sign no more, and more leave no time
        for _ in range(HANDS):
            nursery.start_soon(repeat, "streams of nonsense", nonsense)
            nursery.start_soon(repeat, "unread answers", ask_and_never_read)


# The measurement


async def measure(package: Package, seconds: int) -> dict[str, Any]:
    """Return job times in seconds and the daemon's memory in MiB, before and during the flood."""
    largest = max(
        package.manifest.files_for(BlockRange(0, package.manifest.block_count)), key=lambda file: file.size_bytes
    )
    async with whole_model(package, 1) as daemon:
        await submit_for(daemon, 5)  # what is loaded at first use is not the flood's
        quiet_s = await submit_for(daemon, seconds / 2)
        process = psutil.Process(daemon.pid)
        before_mib = process.memory_info().rss / 2**20
        command = [sys.executable, "-m", "benchmarks.flood", "--flood"]
        busy = await trio.lowlevel.open_process([*command, "", ""])
        try:
            busy_s = await submit_for(daemon, seconds / 2)
        finally:
            busy.kill()
            with trio.CancelScope(shield=True):
                await busy.wait()
        command += [daemon.multiaddrs[0], largest.sha256]
        flooder = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        assert flooder.stdout is not None
        output = bytearray()
        peaks_mib: list[float] = []
        flooded_s: list[float] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, flooder.stdout, output)
            while output.count(b"\n") < 2:
                await trio.sleep(0.1)
            nursery.start_soon(watch, process, peaks_mib)
            flooded_s = await submit_for(daemon, seconds)
            machine = describe_machine()
            flooder.kill()
            await flooder.wait()
            nursery.cancel_scope.cancel()
        await flooder.stdout.aclose()
        quiet_again_s = await submit_for(daemon, 5)
    quiet, flooded, beside = (spread_of(times_s).median for times_s in (quiet_s, flooded_s, busy_s))
    grown_mib, ratio = max(peaks_mib) - before_mib, flooded / quiet
    return {
        **machine,
        "seconds": seconds,
        "flood": json.loads(bytes(output).splitlines()[-1]),
        "job_s": {
            "quiet": quiet,
            "beside_a_busy_process": beside,
            "flooded": flooded,
            "afterwards": spread_of(quiet_again_s).median,
        },
        "jobs": {"quiet": len(quiet_s), "flooded": len(flooded_s)},
        "ratio": ratio,
        "ratio_to_busy": flooded / beside,
        "target_ratio": TARGET_RATIO,
        "memory_mib": {"before": before_mib, "peak": max(peaks_mib), "grown": grown_mib},
        "target_mib": TARGET_MIB,
        "verdict": {"memory": verdict(grown_mib, TARGET_MIB), "jobs": verdict(ratio, TARGET_RATIO)},
    }


async def submit_for(daemon: NodeReady, seconds: float) -> list[float]:
    """Submit one job after another for a time; return their durations."""
    prompts = random.Random(0)
    times_s: list[float] = []
    end_s = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=daemon.api_url, timeout=120) as client:
        while time.monotonic() < end_s or not times_s:
            prompt = prompts.choices(range(1000, 40_000), k=PROMPT_TOKENS)
            body = {"model": DEMO_MODEL, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
            started_s = time.monotonic()
            answer = await client.post("/v1/completions", json=body | {"metaswarm": {"ignore_eos": True}})
            answer.raise_for_status()
            times_s.append(time.monotonic() - started_s)
    return times_s


async def watch(process: psutil.Process, peaks_mib: list[float]) -> None:
    """Sample the daemon's memory repeatedly."""
    while True:
        peaks_mib.append(process.memory_info().rss / 2**20)
        await trio.sleep(SAMPLE_S)


async def collect(stream: trio.abc.ReceiveStream, output: bytearray) -> None:
    """Collect the output of a process."""
    with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
        async for data in stream:
            output += data


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    job, memory = result["job_s"], result["memory_mib"]
    flood = ", ".join(f"{count} {name}" for name, count in result["flood"].items())
    return "\n".join(
        [
            f"load average {result['load_average']:.1f} on {result['cores']} cores",
            f"the flood of {result['seconds']} s: {flood}",
            "",
            (
                f"a job of {PROMPT_TOKENS} tokens in, {MAX_TOKENS} out, s: {job['quiet']:.2f} in peace,"
                f" {job['beside_a_busy_process']:.2f} beside a busy process,"
                f" {job['flooded']:.2f} in the flood, {job['afterwards']:.2f} afterwards"
            ),
            f"the daemon's memory, MiB: {memory['before']:.0f} before, {memory['peak']:.0f} at most",
            "",
            (
                f"target: jobs at most {result['target_ratio']:g} times as slow as in peace ({result['ratio']:.2f};"
                f" beside a busy process {result['ratio_to_busy']:.2f}):"
                f" {result['verdict']['jobs']}"
            ),
            (
                f"target: at most {result['target_mib']:.0f} MiB more ({memory['grown']:.0f}):"
                f" {result['verdict']['memory']}"
            ),
        ]
    )


if __name__ == "__main__":
    main()
