"""A user-space TCP relay that emulates the latency, jitter, bandwidth and stalls of a real link.

`python -m benchmarks.link 127.0.0.1:4001 --delay-ms 20` prints the port on which it listens; dial that instead. It
needs no privileges, unlike the kernel's netem. Packet loss is emulated as a stall, which is how users of TCP see it.
"""

import argparse
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import trio

CHUNK_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class LinkShape:
    """Properties of a link, each way. `bytes_per_s` 0: unlimited; `stall_every_s`: on average."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    stall_every_s: float = 0.0
    stall_s: float = 0.2


@asynccontextmanager
async def shaped_link(host: str, port: int, shape: LinkShape, *, seed: int = 1) -> AsyncIterator[int]:
    """Relay connections to an address inside the block; yield the port on loopback to dial instead."""
    rng = random.Random(seed)
    async with trio.open_nursery() as nursery:
        serve = partial(_carry, host, port, shape, rng)
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def _carry(host: str, port: int, shape: LinkShape, rng: random.Random, near: trio.SocketStream) -> None:
    try:
        far = await trio.open_tcp_stream(host, port)
    except OSError:
        return
    async with far, trio.open_nursery() as nursery:
        for source, sink in ((near, far), (far, near)):
            # What is under way: never more than the link's delay and width have room for, and some buffer.
            room = 64 + int(shape.delay_s * max(shape.bytes_per_s, 100e6) / CHUNK_BYTES)
            entrance, exit_ = trio.open_memory_channel[tuple[float, bytes]](room)
            nursery.start_soon(_take_in, source, entrance, shape, rng)
            nursery.start_soon(_let_out, sink, exit_, nursery.cancel_scope)


async def _take_in(
    source: trio.SocketStream,
    entrance: trio.MemorySendChannel[tuple[float, bytes]],
    shape: LinkShape,
    rng: random.Random,
) -> None:
    """Stamp incoming chunks with their arrival time."""
    free_s = trio.current_time()  # when the link has sent what it was given so far
    next_stall_s = free_s + _until_stall_s(shape, rng)
    async with entrance:
        while True:
            try:
                data = await source.receive_some(CHUNK_BYTES)
            except trio.BrokenResourceError:
                return
            if not data:
                return
            free_s = max(free_s, trio.current_time())
            if shape.bytes_per_s:
                free_s += len(data) / shape.bytes_per_s
            if free_s >= next_stall_s:
                free_s += shape.stall_s
                next_stall_s = free_s + _until_stall_s(shape, rng)
            await entrance.send((free_s + shape.delay_s + rng.uniform(0, shape.jitter_s), data))


async def _let_out(
    sink: trio.SocketStream, exit_: trio.MemoryReceiveChannel[tuple[float, bytes]], scope: trio.CancelScope
) -> None:
    try:
        async for due_s, data in exit_:
            await trio.sleep_until(due_s)
            await sink.send_all(data)
        await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        scope.cancel()


def _until_stall_s(shape: LinkShape, rng: random.Random) -> float:
    return rng.expovariate(1 / shape.stall_every_s) if shape.stall_every_s else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.link", description=__doc__)
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--jitter-ms", type=float, default=0.0)
    parser.add_argument("--bytes-per-s", type=float, default=0.0)
    parser.add_argument("--stall-every-s", type=float, default=0.0)
    parser.add_argument("--stall-ms", type=float, default=200.0)
    arguments = parser.parse_args()
    host, _, port = arguments.target.rpartition(":")
    shape = LinkShape(
        delay_s=arguments.delay_ms / 1000,
        jitter_s=arguments.jitter_ms / 1000,
        bytes_per_s=arguments.bytes_per_s,
        stall_every_s=arguments.stall_every_s,
        stall_s=arguments.stall_ms / 1000,
    )

    async def relay() -> None:
        async with shaped_link(host, int(port), shape) as listening:
            print(listening, flush=True)
            await trio.sleep_forever()

    try:
        trio.run(relay)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
