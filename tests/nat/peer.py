"""A bare peer in a namespace: no models, the network alone. It takes one command a line and answers in JSON.

addresses | connect MULTIADDR | learn PEER MULTIADDR... | echo PEER BYTES | way PEER | relay PEER | reach | peers
rejoin SEED: leave, and come back as another peer
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import trio

from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError, Stream
from node.network.relay_ledger import RelayLimits
from node.network.traversal import TraversalOptions

ECHO = "/metaswarm/echo/1"


async def serve_echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def echo(network: Libp2pNetwork, peer: Any, size: int) -> float:
    """Send bytes to a peer and read them back over a new stream; return the seconds."""
    started_s = time.monotonic()
    stream = await network.open_stream(peer, ECHO)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(size))
        left = size
        while left:
            data = await stream.receive_some()
            assert data
            left -= len(data)
    await stream.aclose()
    return time.monotonic() - started_s


async def answer(network: Libp2pNetwork, words: Sequence[str]) -> Any:
    match words:
        case ["addresses"]:
            return network.multiaddrs
        case ["connect", address]:
            return await network.connect(address)
        case ["learn", peer, *addresses]:
            network.add_addresses(peer, addresses)  # type: ignore[arg-type]
            return None
        case ["echo", peer, size]:
            return await echo(network, peer, int(size))
        case ["way", peer]:
            way = network.way_to(peer)  # type: ignore[arg-type]
            return None if way is None else "relayed" if way.relay else "punched" if way.punched else "direct"
        case ["relay", peer]:
            way = network.way_to(peer)  # type: ignore[arg-type]
            return None if way is None else way.relay
        case ["reach"]:
            known = network.reachability
            return {"verdict": known.verdict, "observed": known.observed, "relays": known.relays}
        case ["peers"]:
            return network.connected_peers()
    raise ValueError(f"unknown command {words}")


async def main(*arguments: str) -> None:
    seed, *announce = arguments
    lines = trio.wrap_file(sys.stdin)
    while seed:
        network = Libp2pNetwork(
            int(seed).to_bytes(32, "big"),
            listen=["/ip4/0.0.0.0/tcp/4001"],
            announce=announce,
            traversal=TraversalOptions(relay=RelayLimits(bytes_per_s=1 << 30)),
        )
        network.set_stream_handler(ECHO, serve_echo)
        async with network.running():
            print(json.dumps(network.peer_id), flush=True)
            seed = await serve(network, lines)


async def serve(network: Libp2pNetwork, lines: trio._file_io.AsyncIOWrapper[TextIO]) -> str:
    """Take commands until the end, or until one says to come back; return with which seed."""
    while line := await lines.readline():
        match line.split():
            case ["rejoin", seed]:
                return seed
            case words:
                try:
                    result = {"ok": await answer(network, words)}
                except NetworkError as error:
                    result = {"error": str(error)}
                print(json.dumps(result), flush=True)
    return ""


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
