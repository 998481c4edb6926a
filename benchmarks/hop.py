"""What one more stage costs a decode step, over the engine's own time, and what that cost consists of.

    python -m benchmarks.hop [--rounds N] [--tokens N] [--json]

Three swarms of real daemons on loopback hold the whole model in one, two and three stages. Jobs take turns between
them, so that a noisy minute is noisy for all. The overhead of a token is its time minus what the stages' forward passes
took; the cost of a hop is how much it grows with each stage. The parts of a hop are measured beside it, on the very
frame that crosses it: one row of hidden states.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import click
import httpx
import trio
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from node.config import default_cache_dir
from node.demo import local_swarm
from node.engine import wire
from node.engine.interface import SliceInput
from node.models.catalogue import DEMO_MODEL
from node.network.host import Libp2pNetwork
from node.network.interface import Stream
from protocol.connection import JobConnection
from protocol.identity import JobId, SessionId
from protocol.messages import Hello, Slice, Step
from protocol.states import Role
from protocol.tensors import DType, Tensor

BLOCKS = 30
HIDDEN_SIZE = 576
TARGET_S = 0.003
ECHO_PROTOCOL = "/metaswarm/benchmark-echo/1.0.0"

SESSION = SessionId(JobId("00" * 16), 1)
ROW = Tensor(DType.FLOAT32, (1, HIDDEN_SIZE), os.urandom(4 * HIDDEN_SIZE))
STEP = Step(slices=(Slice(session=SESSION, position=100, rows=1),), tensor=ROW)


@click.command()
@click.option("--rounds", default=7, show_default=True, help="Jobs for each number of stages.")
@click.option("--tokens", default=32, show_default=True, help="New tokens of a job.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(rounds: int, tokens: int, as_json: bool) -> None:
    """Measure the cost of a hop."""
    result = trio.run(measure, rounds, tokens)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"load average {result['load_average']:.1f} on {os.cpu_count()} cores; medians, milliseconds a token\n")
    click.echo("stages   time   in the engine   overhead")
    for row in result["stages"]:
        click.echo(f"{row['stages']:6} {row['token_ms']:6.1f} {row['engine_ms']:15.1f} {row['overhead_ms']:10.2f}")
    click.echo(
        f"\none more stage costs {result['hop_ms']:.2f} ms (target: at most {TARGET_S * 1e3:.0f} ms). Its parts:"
    )
    for name, value in result["parts_ms"].items():
        click.echo(f"  {name:<44} {value:6.3f}")


async def measure(rounds: int, tokens: int) -> dict[str, Any]:
    """Return all figures."""
    load_average = os.getloadavg()[0]
    samples: dict[int, list[tuple[float, float]]] = {1: [], 2: [], 3: []}
    async with AsyncExitStack() as stack:
        urls = {}
        for stages in samples:
            swarm = local_swarm(DEMO_MODEL, BLOCKS, stages, default_cache_dir(), lambda *_: None)
            peers = await stack.enter_async_context(swarm)
            # Submitted where the first stage is, so that one more stage is one more peer and nothing else.
            urls[stages] = peers[0].ready.api_url
        for round_number in range(rounds + 1):
            for stages, url in urls.items():
                sample = await run_job(url, tokens)
                if round_number:  # the first round warms up
                    samples[stages].append(sample)
    rows: list[dict[str, float]] = []
    for stages, of_stages in samples.items():
        token_s = statistics.median(token_s for token_s, _ in of_stages)
        engine_s = statistics.median(engine_s for _, engine_s in of_stages)
        overhead_s = statistics.median(token_s - engine_s for token_s, engine_s in of_stages)
        rows.append(
            {"stages": stages, "token_ms": token_s * 1e3, "engine_ms": engine_s * 1e3, "overhead_ms": overhead_s * 1e3}
        )
    hop_ms = (rows[-1]["overhead_ms"] - rows[0]["overhead_ms"]) / 2
    return {
        "load_average": load_average,
        "stages": rows,
        "hop_ms": hop_ms,
        "target_ms": TARGET_S * 1e3,
        "parts_ms": {name: seconds * 1e3 for name, seconds in (await measure_parts()).items()},
    }


async def run_job(url: str, tokens: int) -> tuple[float, float]:
    """Return the seconds that a token took, and those of them inside the stages' forward passes."""
    body = {
        "model": DEMO_MODEL,
        "prompt": "Once",
        "max_tokens": tokens,
        "temperature": 0,
        "metaswarm": {"ignore_eos": True},
    }
    async with httpx.AsyncClient(timeout=300) as client:
        answer = (await client.post(f"{url}/v1/completions", json=body)).raise_for_status().json()["metaswarm"]
    # Each token, the first included, is one step of one row: the prompt is one token.
    engine_s = sum(stage["compute_s"] for stage in answer["route"]) / tokens
    return answer["timing"]["tpot_s"], engine_s


async def measure_parts() -> dict[str, float]:
    """Return the median seconds of each part of a hop."""
    round_trip_s = await measure_round_trip()
    crypto_s = median_s(crypto())
    return {
        "serialisation: the job stream's step, both ends": median_s(serialisation()),
        "worker pipe: to the engine and back, both ends": median_s(worker_pipe()),
        "crypto: ChaCha20-Poly1305, both ends": crypto_s,
        "transport: half a libp2p round trip, less crypto": round_trip_s / 2 - crypto_s,
    }


def median_s(action: Callable[[], None], count: int = 1000) -> float:
    """Return the median time of an action."""
    times = []
    for _ in range(count):
        start_s = time.perf_counter()
        action()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def serialisation() -> Callable[[], None]:
    """Return what turns a step into bytes and back."""
    sender = JobConnection(Role.INITIATOR, agent="benchmark", window_bytes=1 << 26)
    receiver = JobConnection(Role.RESPONDER, agent="benchmark", window_bytes=1 << 26)
    for one, other in ((sender, receiver), (receiver, sender)):
        other.receive_data(b"".join(one.send(Hello(agent="benchmark", window_bytes=1 << 26))))

    def run() -> None:
        (message,) = receiver.receive_data(b"".join(sender.send(STEP)))
        assert isinstance(message, Step)

    return run


def worker_pipe() -> Callable[[], None]:
    """Return what takes a step's rows through a socket pair as they go to a worker, twice, for there and back."""
    near, far = socket.socketpair()
    frame = b"".join(wire.encode_step(1, [SliceInput(session=SESSION, position=100, tensor=ROW, draws=1)]))
    received = bytearray(len(frame))

    def run() -> None:
        for one, other in ((near, far), (far, near)):
            one.sendall(b"".join(wire.encode_step(1, [SliceInput(session=SESSION, position=100, tensor=ROW, draws=1)])))
            other.recv_into(received, len(frame), socket.MSG_WAITALL)

    return run


def crypto() -> Callable[[], None]:
    """Return what encrypts and decrypts a frame as Noise does."""
    cipher = ChaCha20Poly1305(ChaCha20Poly1305.generate_key())
    frame, nonce = bytes(ROW.data) + bytes(120), bytes(12)

    def run() -> None:
        cipher.decrypt(nonce, cipher.encrypt(nonce, frame, None), None)

    return run


async def measure_round_trip(count: int = 300) -> float:
    """Return the median round trip of a frame between two processes over libp2p."""
    async with echo_process() as multiaddr:
        network = Libp2pNetwork(os.urandom(32), listen=["/ip4/127.0.0.1/tcp/0"])
        async with network.running():
            stream = await network.open_stream(await network.connect(multiaddr), ECHO_PROTOCOL)
            frame, times = bytes(ROW.data) + bytes(120), []
            for _ in range(count):
                start_s = time.perf_counter()
                await stream.send_all(frame)
                received = 0
                while received < len(frame):
                    received += len(await stream.receive_some())
                times.append(time.perf_counter() - start_s)
            await stream.aclose()
    return statistics.median(times)


@asynccontextmanager
async def echo_process() -> AsyncIterator[str]:
    """Run a libp2p host that echoes, in a process of its own; give its address."""
    command = [sys.executable, "-c", "import trio; from benchmarks.hop import echo; trio.run(echo)"]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield (await process.stdout.receive_some()).decode().strip()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def echo() -> None:
    """Echo on every stream until killed."""

    async def handle(stream: Stream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)

    network = Libp2pNetwork(os.urandom(32), listen=["/ip4/127.0.0.1/tcp/0"])
    network.set_stream_handler(ECHO_PROTOCOL, handle)
    async with network.running():
        print(network.multiaddrs[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    main()
