"""Parts of the cost of a hop, each measured alone on the actual frame: one row of hidden states.

A process that has computed for a while, as a worker does, waits for a core where others compete for it. So the fifth
percentile shows the cost of the code, and the median what the machine adds.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from benchmarks.common import Spread, spread_of, times_ms
from node.engine import worker_protocol
from node.engine.client import start_engine
from node.engine.interface import EngineOptions, SessionOptions, SliceInput, reference_variant
from node.models.store import Package
from node.network.host import Libp2pNetwork
from node.network.interface import Stream
from protocol.connection import JobConnection
from protocol.identity import BlockRange, JobId, SessionId
from protocol.messages import Hello, Slice, Step
from protocol.states import Role
from protocol.tensors import DType, Tensor

ECHO_PROTOCOL = "/metaswarm/benchmark-echo/1.0.0"
LISTEN = ("/ip4/127.0.0.1/tcp/0",)
WINDOW_BYTES = 1 << 26

HIDDEN_SIZE = 576
SESSION = SessionId(JobId("00" * 16), 1)
ROW = Tensor(DType.FLOAT32, (1, HIDDEN_SIZE), bytes(4 * HIDDEN_SIZE))
STEP = Step(slices=(Slice(session=SESSION, position=100, rows=1),), tensor=ROW)

WARM_UP = 20
"""First values that are thrown away."""


async def measure_parts(package: Package, blocks: BlockRange, count: int) -> dict[str, Spread]:
    """Return the spread of each part, in milliseconds. `blocks`: a span in the middle of the model."""
    connections = _connected_pair()
    frame = b"".join(connections[0].send(STEP))
    connections[1].receive_data(frame)
    encryption_ms = times_ms(_crypto(frame), count)
    crypto_ms = spread_of(encryption_ms).median
    crossings_ms = [round_trip_ms / 2 - crypto_ms for round_trip_ms in await _round_trips_ms(frame, count)]
    return {
        "serialisation": spread_of(times_ms(_serialisation(*connections), count)[WARM_UP:]),
        "crypto": spread_of(encryption_ms[WARM_UP:]),
        "transport": spread_of(crossings_ms[WARM_UP:]),
        "worker_codec": spread_of(times_ms(_worker_codec(), count)[WARM_UP:]),
        "worker": spread_of((await _worker_detours_ms(package, blocks, count))[WARM_UP:]),
    }


def _connected_pair() -> tuple[JobConnection, JobConnection]:
    """Return the two ends of a job stream after the handshake."""
    sender = JobConnection(Role.INITIATOR, agent="benchmark", window_bytes=WINDOW_BYTES)
    receiver = JobConnection(Role.RESPONDER, agent="benchmark", window_bytes=WINDOW_BYTES)
    hello = Hello(agent="benchmark", window_bytes=WINDOW_BYTES)
    for one, other in ((sender, receiver), (receiver, sender)):
        other.receive_data(b"".join(one.send(hello)))
    return sender, receiver


def _serialisation(sender: JobConnection, receiver: JobConnection) -> Callable[[], None]:
    """Return a function that serialises a step and parses it again."""

    def run() -> None:
        (message,) = receiver.receive_data(b"".join(sender.send(STEP)))
        assert isinstance(message, Step)

    return run


def _crypto(frame: bytes) -> Callable[[], None]:
    """Return a function that encrypts and decrypts a frame with the cipher of Noise."""
    cipher = ChaCha20Poly1305(ChaCha20Poly1305.generate_key())
    nonce = bytes(12)

    def run() -> None:
        cipher.decrypt(nonce, cipher.encrypt(nonce, frame, None), None)

    return run


def _worker_codec() -> Callable[[], None]:
    """Return a function that sends a step's rows through a socket pair and back, within this process."""
    near, far = socket.socketpair()
    rows = SliceInput(session=SESSION, position=100, tensor=ROW, draws=0)

    def run() -> None:
        for one, other in ((near, far), (far, near)):
            for buffer in worker_protocol.encode_step(1, [rows]):
                one.sendall(buffer)
            prefix = other.recv(worker_protocol.PREFIX.size, socket.MSG_WAITALL)
            header_bytes, payload_bytes = worker_protocol.PREFIX.unpack(prefix)
            header = worker_protocol.decode_header(other.recv(header_bytes, socket.MSG_WAITALL))
            worker_protocol.decode_step(header, memoryview(other.recv(payload_bytes, socket.MSG_WAITALL)))

    return run


async def _worker_detours_ms(package: Package, blocks: BlockRange, count: int) -> list[float]:
    """Return the time of each decode step of a real worker beyond its forward pass."""
    detours_ms = []
    async with start_engine(package, blocks, EngineOptions(threads=1, kv_positions=count)) as engine:
        await engine.open(SESSION, count)
        await engine.begin(SESSION, SessionOptions(variant=reference_variant(package.manifest.format)))
        for position in range(count):
            start_s = time.perf_counter()
            result = await engine.step([SliceInput(session=SESSION, position=position, tensor=ROW, draws=0)])
            detours_ms.append((time.perf_counter() - start_s - result.compute_s) * 1e3)
        await engine.close(SESSION)
    return detours_ms


async def _round_trips_ms(frame: bytes, count: int) -> list[float]:
    """Return round-trip times of a frame to another process over libp2p."""
    round_trips_ms = []
    network = Libp2pNetwork(os.urandom(32), listen=LISTEN)
    async with _echo_process() as multiaddr, network.running():
        stream = await network.open_stream(await network.connect(multiaddr), ECHO_PROTOCOL)
        for _ in range(count):
            start_s = time.perf_counter()
            await stream.send_all(frame)
            received = 0
            while received < len(frame):
                received += len(await stream.receive_some())
            round_trips_ms.append((time.perf_counter() - start_s) * 1e3)
        await stream.aclose()
    return round_trips_ms


@asynccontextmanager
async def _echo_process() -> AsyncIterator[str]:
    """Run a libp2p echo host in a process of its own; yield its address."""
    process = await trio.lowlevel.open_process([sys.executable, "-m", "benchmarks.parts"], stdout=subprocess.PIPE)
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

    network = Libp2pNetwork(os.urandom(32), listen=LISTEN)
    network.set_stream_handler(ECHO_PROTOCOL, handle)
    async with network.running():
        print(network.multiaddrs[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(echo)
