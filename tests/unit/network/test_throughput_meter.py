"""What bursts tell of a connection's rate, and what they do not."""

import pytest
import trio
import trio.testing

from node.capabilities.traffic import TrafficMeter
from node.network.interface import Stream
from node.network.throughput_meter import GAP_S, ThroughputMeter

from .conftest import limited
from .hosts import our_host
from .pipes import connection_pair, ours, started
from .test_yamux import open_both, read_all


class Reports(list[tuple[int, float]]):
    def __call__(self, size: int, seconds: float) -> None:
        self.append((size, seconds))

    def rate(self) -> float:
        return sum(size for size, _ in self) / sum(seconds for _, seconds in self)


def test_burst_is_timed_from_first_arrival() -> None:
    reports = Reports()
    clock = ThroughputMeter(reports)
    clock.begin(10.0)
    clock.arrived(100_000, 10.5)  # as slow as the latency: it starts the clock and no more
    clock.arrived(100_000, 10.6)
    clock.end(10.65)
    clock.arrived(50_000, 10.66)
    assert [size for size, _ in reports] == [100_000, 50_000]
    assert [seconds for _, seconds in reports] == pytest.approx([0.1, 0.06])


def test_pause_of_sender_is_not_counted() -> None:
    reports = Reports()
    clock = ThroughputMeter(reports)
    for start_s in (0.0, 1.0, 2.0):
        clock.begin(start_s)
        clock.arrived(100_000, start_s + 0.01)
        clock.end(start_s + 0.01)
    assert not reports
    clock.arrived(100_000, 2.01 + 2 * GAP_S)  # of what was small, long after
    assert not reports


async def test_both_ends_measure_throughput(virtual_clock: trio.testing.MockClock) -> None:
    left, right = connection_pair()
    rate = 10e6
    send = left.stream.send_stream.send_all

    async def send_slowly(data: bytes) -> None:
        await trio.sleep(len(data) / rate)
        await send(data)

    left.stream.send_stream.send_all = send_slowly
    sent, received = Reports(), Reports()
    dialler, listener = ours(left, on_sent=sent), ours(right, on_received=received)
    async with started(dialler, listener):
        near, far = await open_both(dialler, listener)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.write, bytes(8 << 20))
            await read_all(far, 8 << 20)
        assert sent.rate() == pytest.approx(rate, rel=0.15)
        assert received.rate() == pytest.approx(rate, rel=0.05)
        before = len(sent), len(received)
        for _ in range(200):  # tokens of a job: they say nothing of what the connection could carry
            await near.write(bytes(4096))
            await read_all(far, 4096)
            await trio.sleep(0.005)
        assert (len(sent), len(received)) == before


async def test_hosts_report_throughput_of_real_traffic() -> None:
    meters = TrafficMeter(), TrafficMeter()
    host, dialler = (
        our_host(number, on_sent=meter.sent, on_received=meter.received)
        for number, meter in zip((1, 2), meters, strict=True)
    )
    arrived = trio.Event()

    async def swallow(stream: Stream) -> None:
        while await stream.receive_some():
            pass
        arrived.set()

    host.set_stream_handler("/test/swallow/1", swallow)
    with limited(20):
        async with host.running(), dialler.running():
            await dialler.connect(host.multiaddrs[0])
            stream = await dialler.open_stream(host.peer_id, "/test/swallow/1")
            await stream.send_all(bytes(16 << 20))
            await stream.aclose()
            await arrived.wait()
            (there,), (here,) = (meter.links((host.peer_id, dialler.peer_id)).neighbours for meter in meters)
            assert (there.peer, here.peer) == (dialler.peer_id, host.peer_id)
            assert there.download_bytes_per_s is not None
            assert here.upload_bytes_per_s is not None
            assert 1e6 < here.upload_bytes_per_s < 1e10
            assert 1e6 < there.download_bytes_per_s < 1e10
            assert here.download_bytes_per_s is there.upload_bytes_per_s is None
