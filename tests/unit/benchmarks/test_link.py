"""The shaped link delays, holds back, and loses nothing."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from benchmarks.link import LinkShape, shaped_link


@asynccontextmanager
async def echo_through(shape: LinkShape) -> AsyncIterator[trio.SocketStream]:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, echo, 0)
        port = listeners[0].socket.getsockname()[1]
        async with (
            shaped_link("127.0.0.1", port, shape) as near,
            await trio.open_tcp_stream("127.0.0.1", near) as stream,
        ):
            yield stream
        nursery.cancel_scope.cancel()


async def round_trip_s(stream: trio.SocketStream, data: bytes) -> float:
    began_s = trio.current_time()
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        while len(received) < len(data):
            received += await stream.receive_some()
    assert bytes(received) == data
    return trio.current_time() - began_s


@pytest.mark.parametrize(
    ("shape", "size", "least_s"),
    [
        (LinkShape(delay_s=0.03, jitter_s=0.01), 100, 0.06),
        (LinkShape(bytes_per_s=1e6), 200_000, 0.2),
        (LinkShape(stall_every_s=1e-6, stall_s=0.05), 100, 0.1),
    ],
)
async def test_shaped_link_delays_and_delivers_all_bytes(shape: LinkShape, size: int, least_s: float) -> None:
    async with echo_through(shape) as stream:
        assert await round_trip_s(stream, os.urandom(size)) >= least_s
