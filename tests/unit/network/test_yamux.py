"""Our multiplexer: what it cures, beside the library's, and that it keeps to the specification.

A test named test_library_… shows a fault of the library; when an upgrade makes it fail, the cure may go.
"""

import random
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from node.network.yamux_stream import INITIAL_WINDOW_BYTES, YamuxLimits, YamuxStream

from .pipes import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    PipeConnection,
    RawPeer,
    connection_pair,
    librarys,
    ours,
    started,
)

CLOCK = trio.testing.MockClock


async def read_all(stream: IMuxedStream, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += await stream.read(size - len(received))
    return bytes(received)


async def open_both(dialler: IMuxedConn, listener: IMuxedConn) -> tuple[IMuxedStream, IMuxedStream]:
    near = await dialler.open_stream()
    await near.write(b"!")
    far = await listener.accept_stream()
    assert await far.read(1) == b"!"
    return near, far


# A pausing reader


async def test_library_resets_stream_whose_reader_pauses_five_seconds(virtual_clock: CLOCK) -> None:
    left, right = map(librarys, connection_pair())
    async with started(left, right):
        near, _ = await open_both(left, right)
        with pytest.raises(MuxedStreamError, match="5 seconds"):
            await near.write(bytes(8 * INITIAL_WINDOW_BYTES))


async def test_reader_may_pause_up_to_write_timeout(virtual_clock: CLOCK) -> None:
    payload = random.Random(1).randbytes(8 * INITIAL_WINDOW_BYTES)
    left, right = (ours(end, YamuxLimits(write_timeout_s=10)) for end in connection_pair())
    async with started(left, right), trio.open_nursery() as nursery:
        near, far = await open_both(left, right)
        nursery.start_soon(near.write, payload)
        await trio.sleep(9)
        assert await read_all(far, len(payload)) == payload


async def test_write_timeout_without_window_resets_only_the_stream(virtual_clock: CLOCK) -> None:
    left, right = map(ours, connection_pair())
    async with started(left, right):
        near, far = await open_both(left, right)
        with pytest.raises(MuxedStreamReset, match="accepted nothing for 10 s"):
            await near.write(bytes(8 * INITIAL_WINDOW_BYTES))
        with pytest.raises(MuxedStreamReset):
            await read_all(far, 8 * INITIAL_WINDOW_BYTES)
        await open_both(left, right)


# Cancellation


async def test_library_leaves_half_a_frame_when_write_is_cancelled() -> None:
    assert await _frames_around_a_cancelled_write(librarys) != [b"cancelled", b"after"]


async def test_cancelled_write_completes_its_frame() -> None:
    assert await _frames_around_a_cancelled_write(ours) == [b"cancelled", b"after"]


async def _frames_around_a_cancelled_write(make: Callable[[PipeConnection], IMuxedConn]) -> list[bytes]:
    """Cancel a write when half of its frame is out, then write again; return what the peer makes of it."""
    near_end, far_end = connection_pair()
    muxer = make(near_end)
    frames: list[bytes] = []
    async with started(muxer):
        raw = RawPeer(far_end)
        stream = await muxer.open_stream()
        await raw.receive_kind(WINDOW_UPDATE, SYN)
        near_end.gate = trio.Event()
        scope = trio.CancelScope()

        async def write() -> None:
            with scope:
                await stream.write(b"cancelled")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            near_end.gate.set()
            nursery.start_soon(stream.write, b"after")
            with trio.move_on_after(0.2):
                while len(frames) < 2:
                    frames.append((await raw.receive_kind(DATA))[4])
    return frames


async def test_available_bytes_of_several_frames_are_one_read() -> None:
    left, right = map(ours, connection_pair())
    async with started(left, right):
        near, far = await open_both(left, right)
        for part in (b"abc", b"defg", b"hi"):
            await near.write(part)
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(far, YamuxStream)
        assert await far.read_available(5) == b"abcde"
        assert await far.read_available(100) == b"fghi"


async def test_library_loses_bytes_when_read_is_cancelled() -> None:
    assert await _bytes_despite_cancelled_reads(*map(librarys, connection_pair())) < 50


async def test_cancelled_read_loses_no_bytes() -> None:
    assert await _bytes_despite_cancelled_reads(*map(ours, connection_pair())) == 50


async def _bytes_despite_cancelled_reads(left: IMuxedConn, right: IMuxedConn) -> int:
    """Cancel reads after one, two, three … steps of the scheduler; return how many of 50 bytes arrived."""
    received = bytearray()

    async def read(stream: IMuxedStream, scope: trio.CancelScope) -> None:
        with scope:
            received.extend(await stream.read(1))

    async with started(left, right):
        near, far = await open_both(left, right)
        await near.write(bytes(50))
        await near.close()
        await trio.testing.wait_all_tasks_blocked()
        for steps in range(25):
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()
                nursery.start_soon(read, far, scope)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        while True:
            try:
                received += await far.read(100)
            except MuxedStreamError:
                return len(received)


# Hostile peers


async def test_library_lets_peer_exceed_the_window() -> None:
    near_end, far_end = connection_pair()
    muxer = librarys(near_end)
    async with started(muxer):
        raw = RawPeer(far_end)
        await raw.send(WINDOW_UPDATE, SYN, 2, 0)
        await muxer.accept_stream()
        for _ in range(64):
            await raw.send(DATA, 0, 2, 1 << 16, bytes(1 << 16))
        await trio.testing.wait_all_tasks_blocked()
        assert len(muxer.stream_buffers[2]) == 64 << 16


async def test_exceeding_the_window_ends_the_connection() -> None:
    near_end, far_end = connection_pair()
    faults: list[str] = []
    muxer = ours(near_end, faults=faults)
    with trio.fail_after(5):
        async with started(muxer):
            raw = RawPeer(far_end)
            await raw.send(WINDOW_UPDATE, SYN, 2, 0)
            stream = await muxer.accept_stream()
            await raw.send(DATA, 0, 2, INITIAL_WINDOW_BYTES, bytes(INITIAL_WINDOW_BYTES))
            await raw.send(DATA, 0, 2, 1, b"x")
            kind, _, _, code, _ = await raw.receive_kind(GO_AWAY)
            assert (kind, code) == (GO_AWAY, 1)
            await raw.closed()
            with pytest.raises(MuxedStreamReset):
                await stream.read()
    assert faults == ["it sent more than the window of a stream allows"]


async def test_library_hangs_at_257th_stream(virtual_clock: CLOCK) -> None:
    left, right = map(librarys, connection_pair())
    async with started(left, right):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept_for_ever, right)
            for _ in range(256):
                await left.open_stream()
            with trio.move_on_after(3600) as scope:
                await left.open_stream()
            nursery.cancel_scope.cancel()
        assert scope.cancelled_caught


async def _accept_for_ever(muxer: IMuxedConn) -> None:
    while True:
        await muxer.accept_stream()


async def test_outbound_stream_limit_is_an_error_until_one_closes() -> None:
    left, _ = (ours(end, YamuxLimits(max_streams=3)) for end in connection_pair())
    async with started(left):
        streams = [await left.open_stream() for _ in range(3)]
        with pytest.raises(MuxedStreamError, match="3 streams to this peer are open already"):
            await left.open_stream()
        await streams[0].reset()
        await left.open_stream()


async def test_library_has_no_inbound_stream_limit() -> None:
    near_end, far_end = connection_pair()
    muxer = librarys(near_end)
    async with started(muxer), trio.open_nursery() as nursery:
        nursery.start_soon(_accept_for_ever, muxer)
        raw = RawPeer(far_end)
        for number in range(2000):
            await raw.send(WINDOW_UPDATE, SYN, 2 * number + 2, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert len(muxer.streams) == 2000
        nursery.cancel_scope.cancel()


async def test_inbound_stream_limit_resets_excess_streams() -> None:
    near_end, far_end = connection_pair()
    muxer = ours(near_end, YamuxLimits(max_streams=3))
    with trio.fail_after(5):
        async with started(muxer):
            raw = RawPeer(far_end)
            streams = []
            for number in (2, 4, 6):
                await raw.send(WINDOW_UPDATE, SYN, number, 0)
                streams.append(await muxer.accept_stream())
            await raw.send(WINDOW_UPDATE, SYN, 8, 0)
            assert (await raw.receive_kind(WINDOW_UPDATE, RST))[2] == 8
            await streams[0].reset()
            await raw.send(WINDOW_UPDATE, SYN, 10, 0)
            assert (await raw.receive_kind(WINDOW_UPDATE, ACK))[2] == 10


async def test_library_write_never_times_out(virtual_clock: CLOCK) -> None:
    near_end, _ = connection_pair(lockstep=True)
    muxer = librarys(near_end)
    async with started(muxer):
        with trio.move_on_after(3600) as scope:
            await muxer.open_stream()
        assert scope.cancelled_caught
        assert not muxer.is_closed


async def test_write_timeout_ends_connection_of_peer_that_reads_nothing(virtual_clock: CLOCK) -> None:
    near_end, _ = connection_pair(lockstep=True)
    faults: list[str] = []
    muxer = ours(near_end, YamuxLimits(write_timeout_s=10, keepalive_s=100), faults)
    async with started(muxer):
        stream = await muxer.open_stream()
        before = trio.current_time()
        with pytest.raises(MuxedStreamReset):
            await stream.write(b"anybody there?")
        assert trio.current_time() - before <= 10
        assert muxer.is_closed
    assert faults == ["it accepted nothing for 10 s"]


async def test_library_never_detects_silent_peer(virtual_clock: CLOCK) -> None:
    near_end, _ = connection_pair()
    muxer = librarys(near_end)
    async with started(muxer):
        await trio.sleep(3600)
        assert muxer.is_established


async def test_keepalive_timeout_ends_connection_of_silent_peer(virtual_clock: CLOCK) -> None:
    near_end, _ = connection_pair()
    faults: list[str] = []
    muxer = ours(near_end, YamuxLimits(keepalive_s=10), faults)
    async with started(muxer):
        stream = await muxer.open_stream()
        with pytest.raises(MuxedStreamReset):
            await stream.read()
        assert trio.current_time() <= 20
        assert muxer.is_closed
    assert faults == ["it was silent for 10 s after a ping"]


async def test_keepalive_keeps_peer_that_answers_pings(virtual_clock: CLOCK) -> None:
    left, right = map(ours, connection_pair())
    async with started(left, right):
        await trio.sleep(3600)
        assert left.is_established
        assert right.is_established


async def test_ping_flood_without_reading_ends_connection() -> None:
    near_end, far_end = connection_pair(lockstep=True)
    faults: list[str] = []
    muxer = ours(near_end, faults=faults)
    with trio.fail_after(5):
        async with started(muxer):
            ping = bytes([0, PING, 0, SYN]) + bytes(8)
            with suppress(ConnectionClosedError):
                await far_end.write(ping * 12_000)
            await muxer.event_closed.wait()
    assert faults == ["it does not read the answers it asks for"]


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"\x01" + bytes(11), id="another version"),
        pytest.param(b"\x00\x09" + bytes(10), id="unknown type"),
        pytest.param(b"\x00\x01\x00\x01" + (0).to_bytes(4, "big") + bytes(4), id="stream zero"),
        pytest.param(b"\x00\x01\x00\x01" + (3).to_bytes(4, "big") + bytes(4), id="a stream number of ours"),
        pytest.param(b"\x00\x00\x00\x00" + (2).to_bytes(4, "big") + b"\xff\xff\xff\xff", id="4 GiB of data"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
    ],
)
async def test_protocol_violation_ends_connection(frame: bytes) -> None:
    near_end, far_end = connection_pair()
    faults: list[str] = []
    muxer = ours(near_end, faults=faults)
    with trio.fail_after(5):
        async with started(muxer):
            await far_end.write(frame)
            await RawPeer(far_end).closed()
            await muxer.event_closed.wait()
    assert len(faults) == 1


async def test_half_open_stream_is_reset_after_linger_timeout(virtual_clock: CLOCK) -> None:
    left, right = (ours(end, YamuxLimits(max_streams=1, linger_s=60)) for end in connection_pair())
    async with started(left, right):
        near, far = await open_both(left, right)
        await near.close()
        with pytest.raises(MuxedStreamError):
            await left.open_stream()
        await trio.sleep(75)
        await left.open_stream()
        with pytest.raises(MuxedStreamEOF):
            await far.read()


async def test_half_open_stream_stays_while_its_other_half_is_read(virtual_clock: CLOCK) -> None:
    left, right = (ours(end, YamuxLimits(linger_s=60)) for end in connection_pair())
    async with started(left, right):
        near, far = await open_both(left, right)
        await near.close()
        for _ in range(10):
            await trio.sleep(40)
            await far.write(b"more")
            assert await near.read() == b"more"


async def test_receive_window_grows_within_its_bound() -> None:
    near_end, far_end = connection_pair()
    muxer = ours(near_end, YamuxLimits(max_window_bytes=1 << 20, max_window_growth_bytes=1 << 20))
    with trio.fail_after(10):
        async with started(muxer):
            raw = RawPeer(far_end)
            await raw.send(WINDOW_UPDATE, SYN, 2, 0)
            stream = await muxer.accept_stream()
            await raw.receive_kind(WINDOW_UPDATE, ACK)
            window, largest = INITIAL_WINDOW_BYTES, 0
            for _ in range(200):
                await raw.send(DATA, 0, 2, 1 << 16, bytes(1 << 16))
                window -= 1 << 16
                await read_all(stream, 1 << 16)
                await trio.testing.wait_all_tasks_blocked()
                while window < 1 << 17:
                    window += (await raw.receive_kind(WINDOW_UPDATE))[3]
                largest = max(largest, window)
            assert INITIAL_WINDOW_BYTES < largest <= 1 << 20


# Both kinds understand each other, and the specification's half-close


@pytest.mark.parametrize("dialler", [ours, librarys])
@pytest.mark.parametrize("listener", [ours, librarys])
async def test_megabyte_round_trip_until_eof(dialler: type, listener: type) -> None:
    payload = random.Random(3).randbytes(1 << 20)
    left_end, right_end = connection_pair()
    left, right = dialler(left_end), listener(right_end)

    async def answer() -> None:
        stream = await right.accept_stream()
        try:
            while data := await stream.read(65536):
                await stream.write(data)
        except MuxedStreamEOF:
            await stream.close()

    with trio.fail_after(10):
        async with started(left, right), trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            stream = await left.open_stream()
            nursery.start_soon(stream.write, payload)
            assert await read_all(stream, len(payload)) == payload
            await stream.close()
            with pytest.raises(MuxedStreamEOF):
                await stream.read(1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=400), max_size=12), st.lists(st.integers(1, 50), min_size=1, max_size=20)
)
def test_stream_survives_any_fragmentation(writes: list[bytes], cuts: list[int]) -> None:
    """Frames that arrive in pieces of any size give the same bytes and the same end."""

    async def main() -> None:
        near_end, far_end = connection_pair()
        muxer = ours(near_end)
        async with started(muxer):
            wire = bytearray()
            for index, data in enumerate(writes):
                flags = SYN if index == 0 else 0
                wire += bytes([0, DATA]) + flags.to_bytes(2, "big") + (2).to_bytes(4, "big")
                wire += len(data).to_bytes(4, "big") + data
            flags = FIN | (SYN if not writes else 0)
            wire += bytes([0, WINDOW_UPDATE]) + flags.to_bytes(2, "big") + (2).to_bytes(4, "big") + bytes(4)
            position = turn = 0
            while position < len(wire):
                size = cuts[turn % len(cuts)]
                await far_end.stream.send_all(bytes(wire[position : position + size]))
                position, turn = position + size, turn + 1
                await trio.testing.wait_all_tasks_blocked()
            stream = await muxer.accept_stream()
            size = sum(map(len, writes))
            assert await read_all(stream, size) == b"".join(writes)
            with pytest.raises(MuxedStreamEOF):
                await stream.read()

    trio.run(main)
