"""Commands with which other nodes join, and conflicts with a node on the same machine."""

import errno
import os
import shutil
import socket
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Final

from node.config import NodeConfig, NodeReady, ServeSpec, default_cache_dir, is_loopback, is_unspecified
from node.models.catalogue import CATALOGUE, DEMO_MODEL
from node.models.errors import ModelError
from node.models.store import ModelStore
from node.network.addresses import is_private
from selector.consensus.clock import EPOCH_S

PORTS_TRIED: Final = 200


def best_address(multiaddrs: tuple[str, ...]) -> str | None:
    """Return the multiaddr that other machines can most likely dial; None without any.

    A public one, else a circuit through a relay, else a private one.
    """

    def order(multiaddr: str) -> tuple[bool, bool, bool]:
        host = multiaddr.split("/")[2]
        return is_loopback(host), is_private(host), "/p2p-circuit" in multiaddr

    return min(multiaddrs, key=order, default=None)


def is_loopback_address(multiaddr: str) -> bool:
    """Return whether only the same machine can dial a multiaddr."""
    parts = multiaddr.split("/")
    return len(parts) > 2 and is_loopback(parts[2])


def join_here(config: NodeConfig, ready: NodeReady, serve: ServeSpec | None = None) -> list[str]:
    """Return the command that joins from this machine, with a free data directory and free ports.

    `serve`: what it serves; None for the models of this node.
    """
    address = max(ready.multiaddrs, key=is_loopback_address)
    command = [_program(), "node", "--bootstrap", address]
    served = [str(serve)] if serve else [spec.model for spec in config.serve] or [DEMO_MODEL]
    for each in served:
        command += ["--serve", each]
    command += second_node(config)
    if config.cache_dir != default_cache_dir():
        command += ["--cache-dir", str(config.cache_dir)]
    if config.swarm_key_file is not None:
        command += ["--swarm-key", str(config.swarm_key_file)]
    return command + _shared(config)


def join_elsewhere(config: NodeConfig, ready: NodeReady, serve: ServeSpec | None = None) -> list[str] | None:
    """Return the command that joins from another machine; None if this node is not reachable. `serve`: as above."""
    address = best_address(ready.multiaddrs)
    if address is None or is_loopback_address(address):
        return None
    command = ["metaswarm", "node", "--bootstrap", address]
    names = dict.fromkeys(spec.model for spec in config.serve) or [DEMO_MODEL]
    for each in [serve] if serve else [ServeSpec(name) for name in names]:
        command += ["--serve", str(replace(each, model=_name_for_others(each.model, config.cache_dir)))]
    if config.swarm_key_file is not None:
        command += ["--swarm-key", config.swarm_key_file.name]
    return command + _shared(config)


def second_node(config: NodeConfig) -> list[str]:
    """Return options with a free data directory and free ports for a second node on this machine."""
    hosts = [address.split("/")[1:3] for address in config.listen]
    ports = [int(address.split("/")[4]) for address in config.listen]
    taken = {*ports, config.api_port}
    listen = _free_port(hosts[0][1], ports[0] or 4000, taken)
    api = _free_port(config.api_host, config.api_port or 8642, {*taken, listen})
    api_host = f"[{config.api_host}]" if ":" in config.api_host else config.api_host
    return [
        *chain.from_iterable(("--listen", f"/{family}/{host}/tcp/{listen}") for family, host in hosts),
        *("--api", f"{api_host}:{api}"),
        *("--data-dir", str(_free_data_dir(config.data_dir))),
    ]


def port_conflicts(config: NodeConfig) -> list[tuple[str, str]]:
    """Return for each port of the configuration that is in use the option that sets it, and a line about it."""
    wanted = [(parts[2], int(parts[4]), "--listen") for parts in (address.split("/") for address in config.listen)]
    wanted.append((config.api_host, config.api_port, "--api"))
    taken = [(host, port, option) for host, port, option in wanted if port and _is_taken(host, port)]
    return [(option, f"port {port} on {host} is taken ({option})") for host, port, option in taken]


def _shared(config: NodeConfig) -> list[str]:
    """Return the options that must be equal at all peers."""
    return [] if config.epoch_s == EPOCH_S else ["--epoch", f"{config.epoch_s:.0f}"]


def _program() -> str:
    """Return the command that starts this program: its name if it is on PATH, else its path."""
    program = Path(sys.argv[0]).absolute()
    found = shutil.which("metaswarm")
    if found is None and program.name == "metaswarm" and os.access(program, os.X_OK):
        return str(program)
    is_found = found is None or program.name != "metaswarm" or Path(found).resolve() == program.resolve()
    return "metaswarm" if is_found else str(program)


def _name_for_others(name: str, cache_dir: Path) -> str:
    """Return a catalogue name as it is, and the id for a local name."""
    if name in CATALOGUE:
        return name
    try:
        return ModelStore(cache_dir).resolve(name)
    except ModelError:
        return name


def _free_data_dir(data_dir: Path) -> Path:
    numbered = (data_dir.with_name(f"{data_dir.name}-{number}") for number in range(2, 10_000))
    return next(path for path in numbered if not path.exists())


def _free_port(host: str, after: int, taken: set[int]) -> int:
    """Return a free port above another; 0, for any, if none is found nearby."""
    above = (port for port in range(after + 1, min(after + PORTS_TRIED, 65536)) if port not in taken)
    return next((port for port in above if not _is_taken(host, port)), 0)


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if is_unspecified(host):
        host = ""
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
