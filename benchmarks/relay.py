"""Throughput and latency of a circuit beside a direct connection, and what a relay holds under a flood through it.

    python -m benchmarks.relay [--mib N] [--seconds N] [--json]

Four processes on loopback: a relay without a bound on its rate, a peer that can be dialled, one that is reached through
the relay alone, and this one, which sends to both in turns. Then a hostile process with many identities floods the
relay: it asks for more reservations than the relay gives, fills the windows of as many circuits as it gets and stops
reading at both of their ends, and asks for circuits to peers that are not there. The relay's limits for each address
are lifted, as though every identity came from an address of its own.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from statistics import median
from typing import Any

import click
import psutil
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from benchmarks.common import describe_machine, verdict
from node.network.guarded_host import GuardedHost
from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError, Stream
from node.network.message_stream import MessageStream
from node.network.relay_ledger import RelayLimits
from node.network.relay_messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HopMessage,
    HopType,
    Peer,
    Status,
    StopMessage,
    StopType,
)
from node.network.traversal import TraversalOptions
from node.util.token_bucket import Allowance
from protocol.announcements import Verdict
from protocol.identity import PeerId

LISTEN = "/ip4/127.0.0.1/tcp/0"
SINK = "/metaswarm/sink/1"
ECHO = "/metaswarm/echo/1"
LIMITS = RelayLimits(
    bytes_per_s=1 << 40, reservations_per_origin=64, circuits_per_origin=64, requests=Allowance(per_s=1000, burst=1000)
)
ROUNDS = 5
ECHOES = 100
ECHO_BYTES = 4096
WRITE_BYTES = 256 << 10
IDENTITIES = 80
"""Of the hostile process: more than a relay has reservations."""
CIRCUITS_EACH = 2
JOINING = 4
"""Identities that join at a time."""
RESERVE_S = 90.0
"""How long they may take for that together."""
READ_BYTES = 2 << 20
"""What either end of a hostile circuit reads, which widens the windows, before it stops."""
SAMPLE_S = 0.25
TARGET_SHARE = 0.15
TARGET_MIB = 256.0


@click.command()
@click.option("--mib", type=click.IntRange(1), default=64, show_default=True, help="Sent in each round.")
@click.option("--seconds", type=click.IntRange(5), default=30, show_default=True, help="How long the flood lasts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--role", type=(str, str), hidden=True, help="For the other processes: role, multiaddr of the relay.")
def main(mib: int, seconds: int, as_json: bool, role: tuple[str, str] | None) -> None:
    """Measure a relay."""
    if role is not None:
        trio.run(ROLES[role[0]], role[1])
        return
    result = trio.run(measure, mib, seconds)
    click.echo(json.dumps(result) if as_json else report(result))


# The peers


def peer(verdict_: Verdict, limits: RelayLimits | None = LIMITS) -> Libp2pNetwork:
    """Return a peer that takes streams; one that is private is reached through relays alone."""
    listen = [LISTEN] if verdict_ is Verdict.PUBLIC else []
    options = TraversalOptions(relay=limits, verdict=verdict_)
    network = Libp2pNetwork(os.urandom(32), listen=listen, traversal=options)
    network.set_stream_handler(ECHO, echo)
    network.set_stream_handler(SINK, sink)
    return network


async def echo(stream: Stream) -> None:
    """Send back what arrives."""
    while data := await stream.receive_some():
        await stream.send_all(data)


async def sink(stream: Stream) -> None:
    """Read as many bytes as the first eight say, then answer."""
    left = int.from_bytes(await receive_exactly(stream, 8), "big")
    while left > 0:
        left -= len(await stream.receive_some())
    await stream.send_all(b"\1")


async def receive_exactly(stream: Stream, size: int) -> bytes:
    """Return so many bytes."""
    received = b""
    while len(received) < size:
        data = await stream.receive_some(size - len(received))
        assert data, "the stream has ended"
        received += data
    return received


async def run_relay(_: str) -> None:
    """Relay, and print again and again how many reservations and circuits there are."""
    network = peer(Verdict.PUBLIC)
    async with network.running():
        print(network.multiaddrs[0], flush=True)
        server = network._traversal._relay  # noqa: SLF001  # nothing else tells
        assert server is not None
        while True:
            await trio.sleep(SAMPLE_S)
            load = {
                "reservations": len(server.ledger.reserved(trio.current_time())),
                "circuits": server.ledger.circuits,
                "mib": server.relayed_bytes >> 20,
            }
            print(json.dumps(load), flush=True)


async def run_open(_: str) -> None:
    """Be a peer that can be dialled."""
    network = peer(Verdict.PUBLIC, None)
    async with network.running():
        print(network.multiaddrs[0], flush=True)
        await trio.sleep_forever()


async def run_hidden(relay: str) -> None:
    """Be a peer behind the relay."""
    network = peer(Verdict.PRIVATE)
    async with network.running():
        await network.connect(relay)
        while not network.reachability.relays:
            await trio.sleep(0.05)
        print(network.multiaddrs[0], flush=True)
        await trio.sleep_forever()


async def run_flood(relay: str) -> None:
    """Have many identities join and ask for reservations; then flood the relay with all of them."""
    reserved: list[ID] = []
    turns, joined = trio.CapacityLimiter(JOINING), trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(IDENTITIES):
            nursery.start_soon(be_hostile, relay, reserved, turns, joined)
        with trio.move_on_after(RESERVE_S):
            while len(reserved) < LIMITS.reservations:
                await trio.sleep(SAMPLE_S)
        print("begun", flush=True)
        joined.set()


async def be_hostile(relay: str, reserved: list[ID], turns: trio.CapacityLimiter, joined: trio.Event) -> None:
    """Be one identity: reserve, then fill circuits from both their ends."""
    network = peer(Verdict.PRIVATE)
    async with network.running():
        host = network._host  # noqa: SLF001  # a hostile peer speaks the protocols as it likes
        assert host is not None
        host.set_stream_handler(TProtocol(STOP_PROTOCOL), accept_and_fill)
        async with turns:
            await join(network, relay)
            with trio.move_on_after(5):
                while not network.reachability.relays:
                    await trio.sleep(SAMPLE_S)
                reserved.append(host.get_id())
        await joined.wait()
        async with trio.open_nursery() as nursery:
            for _ in range(CIRCUITS_EACH):
                nursery.start_soon(ask_and_fill, network, host, relay, reserved)


async def join(network: Libp2pNetwork, relay: str) -> None:
    """Connect to the relay, whenever it lets us."""
    while True:
        with suppress(NetworkError):
            await network.connect(relay)
            return
        await trio.sleep(1)


async def ask_and_fill(network: Libp2pNetwork, host: GuardedHost, relay: str, reserved: list[ID]) -> None:
    """Ask for circuits for ever, now and then to a peer that is not there."""
    relay_id = ID.from_base58(relay.rpartition("/")[2])
    while True:
        target = random.choice([*reserved, relay_id])
        with suppress(Exception):  # whatever the relay does to us
            connection = host.swarm.direct_connection(relay_id)
            assert connection is not None
            async with MessageStream(await host.open_stream_on(connection, HOP_PROTOCOL)) as messages:
                await messages.send(HopMessage(type=HopType.CONNECT, peer=Peer(id=target.to_bytes())))
                if (await messages.receive(HopMessage)).status is Status.OK:
                    await fill(messages)
        await join(network, relay)
        await trio.sleep(SAMPLE_S)


async def accept_and_fill(stream: INetStream) -> None:
    """Accept a circuit."""
    with suppress(Exception):
        async with MessageStream(stream) as messages:
            await messages.receive(StopMessage)
            await messages.send(StopMessage(type=StopType.STATUS, status=Status.OK))
            await fill(messages)


async def fill(messages: MessageStream) -> None:
    """Write into a circuit for ever; read from it until its windows are wide, and then no more."""

    async def read() -> None:
        left = READ_BYTES
        while left > 0:
            left -= len(await messages.muxed.read())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        while True:
            await messages.muxed.write(bytes(WRITE_BYTES))


ROLES = {"relay": run_relay, "open": run_open, "hidden": run_hidden, "flood": run_flood}


# The measurement


@asynccontextmanager
async def process(role: str, relay: str = "") -> AsyncIterator[tuple[trio.Process, str]]:
    """Run a peer in a process of its own; yield it and the first line that it prints."""
    command = [sys.executable, "-m", "benchmarks.relay", "--role", role, relay]
    running = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert running.stdout is not None
    try:
        line = b""
        with trio.fail_after(120):
            while not line.endswith(b"\n"):
                data = await running.stdout.receive_some()
                assert data, f"the process of the {role} has ended"
                line += data
        yield running, line.decode().splitlines()[0]
    finally:
        running.kill()
        with trio.CancelScope(shield=True):
            await running.wait()
            await running.stdout.aclose()


async def measure(mib: int, seconds: int) -> dict[str, Any]:
    """Return throughput and latency of both ways, and the relay's memory, reservations and circuits in the flood."""
    network = peer(Verdict.PRIVATE)
    async with (
        process("relay") as (relay, relay_address),
        process("open") as (_, open_address),
        process("hidden", relay_address) as (_, hidden_address),
        network.running(),
    ):
        direct, relayed = await network.connect(open_address), await network.connect(hidden_address)
        ways = {"direct": direct, "relayed": relayed}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        cpu_s = psutil.Process(relay.pid).cpu_times().user
        for _ in range(ROUNDS + 1):
            for way, target in ways.items():
                rates[way].append(await send(network, target, mib))
        cpu_s = psutil.Process(relay.pid).cpu_times().user - cpu_s
        trips = {way: await round_trip_ms(network, target) for way, target in ways.items()}
        machine = describe_machine()
        flood = await flooded(relay, relay_address, seconds)
    mib_per_s = {way: median(each[1:]) for way, each in rates.items()}
    share = mib_per_s["relayed"] / mib_per_s["direct"]
    return {
        **machine,
        "mib_per_s": mib_per_s,
        "share": share,
        "relay_cpu_ms_per_mib": 1000 * cpu_s / (mib * (ROUNDS + 1)),
        "echo_of_4_kib_ms": trips,
        "flood": flood,
        "verdict": {
            "share": verdict(TARGET_SHARE, share),
            "memory": verdict(flood["memory_mib"]["grown"], TARGET_MIB),
            "reservations": verdict(flood["reservations"], LIMITS.reservations),
        },
    }


async def send(network: Libp2pNetwork, target: PeerId, mib: int) -> float:
    """Return MiB per second to a peer."""
    stream = await network.open_stream(target, SINK)
    started_s = time.monotonic()
    await stream.send_all((mib << 20).to_bytes(8, "big"))
    for _ in range((mib << 20) // WRITE_BYTES):
        await stream.send_all(bytes(WRITE_BYTES))
    await receive_exactly(stream, 1)
    took_s = time.monotonic() - started_s
    await stream.aclose()
    return mib / took_s


async def round_trip_ms(network: Libp2pNetwork, target: PeerId) -> float:
    """Return the median time of an echo of the size of a token's hidden states."""
    stream = await network.open_stream(target, ECHO)
    times_s = []
    for _ in range(ECHOES):
        started_s = time.monotonic()
        await stream.send_all(bytes(ECHO_BYTES))
        await receive_exactly(stream, ECHO_BYTES)
        times_s.append(time.monotonic() - started_s)
    await stream.aclose()
    return 1000 * median(times_s)


async def flooded(relay: trio.Process, address: str, seconds: int) -> dict[str, Any]:
    """Return what the relay held in the flood."""
    watched = psutil.Process(relay.pid)
    before_mib = peak_mib = watched.memory_info().rss / 2**20
    told = bytearray()

    async def listen() -> None:
        assert relay.stdout is not None
        async for data in relay.stdout:
            told.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        async with process("flood", address):
            with trio.move_on_after(seconds):
                while True:
                    peak_mib = max(peak_mib, watched.memory_info().rss / 2**20)
                    await trio.sleep(SAMPLE_S)
        nursery.cancel_scope.cancel()
    loads = [json.loads(line) for line in bytes(told).splitlines()[1:-1]]
    return {
        "seconds": seconds,
        "identities": IDENTITIES,
        "memory_mib": {"before": before_mib, "peak": peak_mib, "grown": peak_mib - before_mib},
        "reservations": max(each["reservations"] for each in loads),
        "circuits": max(each["circuits"] for each in loads),
        "relayed_mib": loads[-1]["mib"] - loads[0]["mib"],
    }


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    rate, trip, flood = result["mib_per_s"], result["echo_of_4_kib_ms"], result["flood"]
    memory, met = flood["memory_mib"], result["verdict"]
    return "\n".join(
        [
            f"load average {result['load_average']:.1f} on {result['cores']} cores",
            f"throughput, MiB/s: {rate['direct']:.0f} directly, {rate['relayed']:.0f} through the relay",
            f"the relay's computing: {result['relay_cpu_ms_per_mib']:.1f} ms a MiB",
            f"4 KiB there and back, ms: {trip['direct']:.2f} directly, {trip['relayed']:.2f} through the relay",
            f"the relay's memory, MiB: {memory['before']:.0f} before the flood, {memory['peak']:.0f} at most in it",
            (
                f"{flood['identities']} identities had {flood['reservations']} reservations, {flood['circuits']}"
                f" circuits; {flood['relayed_mib']} MiB relayed in {flood['seconds']} s"
            ),
            "",
            f"target: at least {TARGET_SHARE:g} of direct ({result['share']:.2f}): {met['share']}",
            f"target: at most {TARGET_MIB:.0f} MiB more in the flood ({memory['grown']:.0f}): {met['memory']}",
            f"target: at most {LIMITS.reservations} reservations: {met['reservations']}",
        ]
    )


if __name__ == "__main__":
    main()
