"""Daemons on one network find each other though nobody told them an address."""

import socket
import struct

import pytest

from tests.process.daemons import Daemon, StartDaemon, until

MULTICAST_DNS = ("224.0.0.251", 5353)


def multicast_reaches_loopback() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", 0))
        try:
            group = struct.pack("4s4s", socket.inet_aton(MULTICAST_DNS[0]), socket.inet_aton("127.0.0.1"))
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            listener.settimeout(2)
            listener.sendto(b"heard", (MULTICAST_DNS[0], listener.getsockname()[1]))
            return listener.recv(16) == b"heard"
        except OSError:
            return False


@pytest.mark.skipif(not multicast_reaches_loopback(), reason="this machine's loopback interface carries no multicast")
async def test_mdns_discovers_peers_of_same_swarm_key_only(start_daemon: StartDaemon) -> None:
    on = {"METASWARM_NO_MDNS": "0"}
    first = await start_daemon(environment=on)
    second = await start_daemon(environment=on)
    private = await start_daemon(environment={**on, "METASWARM_SWARM_KEY": key_beside(first)})

    async def have_met() -> bool:
        return second.peer_id in await peers_of(first) and first.peer_id in await peers_of(second)

    await until(have_met, timeout_s=60)
    assert await peers_of(private) == set()


async def peers_of(daemon: Daemon) -> set[str]:
    return {peer["peer_id"] for peer in (await daemon.get("/swarm/peers"))["peers"] if peer["connected"]}


def key_beside(daemon: Daemon) -> str:
    """Write a swarm key where a daemon can read it."""
    path = daemon.data_dir.parent / "swarm.key"
    path.write_text("5a" * 32 + "\n")
    return str(path)
