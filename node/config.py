"""The values that configure a node, and what a running node is reached by.

`node.cli.options` reads them from a file, the environment and flags.
"""

import hashlib
import ipaddress
import json
import os
import re
import tomllib
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import platformdirs

from node.util.paths import expand, read_text
from protocol.figures import USUAL_PRICE
from protocol.identity import BlockRange, PeerId, parse_peer_id
from selector.consensus.clock import EPOCH_S

APPLICATION: Final = "metaswarm"
ENVIRONMENT_PREFIX: Final = "METASWARM_"
DEFAULT_API: Final = "127.0.0.1:8642"
MEMORY_SHARE: Final = 0.75
"""Fraction of the device's free memory that a node uses where `memory` is not set."""

READY_FILE: Final = "node.json"
LOCK_FILE: Final = "node.lock"
"""Locked by the node that runs in a data directory."""


class ConfigError(Exception):
    """The configuration is wrong. The message is one line: where, what, and what was expected."""


class StartError(Exception):
    """The node cannot start on this machine as it is, for example as a port is taken. One line for the user."""


@dataclass(frozen=True, slots=True)
class ServeSpec:
    """A model to serve, as the user named it, and which blocks; None leaves the choice to the node."""

    model: str
    blocks: BlockRange | None = None

    def __str__(self) -> str:
        return self.model if self.blocks is None else f"{self.model}:{self.blocks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key of the HTTP API, by the SHA-256 of its text, and its limits; None for none."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    concurrency: int | None = None
    """Answers under way at a time."""


def parse_api_key(text: str) -> str:
    """Return an API key without the space around it: files that secrets are mounted from end in a newline.

    Raises ValueError, without the key, for what a header cannot carry.
    """
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("expected visible ASCII characters without spaces")
    return key


def hash_api_key(key: str) -> str:
    """Return the hash of an API key, hexadecimal."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file: a line each, `NAME SHA256 [requests_per_minute=N] [concurrency=N]`.

    Raises ValueError, which names the file and the line.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, digest, *limits = words if len(words) > 1 else (words[0], "")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ValueError(f"{path}, line {number}: expected NAME SHA256 [requests_per_minute=N] [concurrency=N]")
        values: dict[str, int] = {}
        for limit in limits:
            option, _, value = limit.partition("=")
            if option not in {"requests_per_minute", "concurrency"} or not re.fullmatch(r"[1-9][0-9]{0,8}", value):
                raise ValueError(
                    f"{path}, line {number}: expected requests_per_minute=N or concurrency=N, not {limit!r}"
                )
            values[option] = int(value)
        keys.append(ApiKey(name=name, sha256=digest.lower(), **values))
    if not keys:  # the API would be open, which is not what somebody who names such a file means
        raise ValueError(f"{path} has no API key: add one with `metaswarm keygen --api-key-name NAME {path}`")
    if len({key.sha256 for key in keys}) < len(keys):
        raise ValueError(f"{path}: two lines have the same key")
    return tuple(keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """The configuration of a node. Files that options name have been read; `bootstrap` is plain multiaddrs."""

    data_dir: Path
    cache_dir: Path
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001")
    announce: tuple[str, ...] = ()
    """Addresses that others are told besides those of the interfaces."""
    port_mapping: bool = True
    """Whether to have the gateway forward the port (UPnP)."""
    relay: bool = True
    """Whether to relay between peers that cannot reach each other, where this node is public."""
    relay_bytes_per_s: int = 16 << 20
    """Of all circuits together."""
    api_host: str = "127.0.0.1"
    api_port: int = 8642
    """0 lets the system choose a port."""
    api_key: str | None = field(default=None, repr=False)
    api_keys: tuple[ApiKey, ...] = ()
    """Further keys, each with limits of its own."""
    api_keys_file: Path | None = field(default=None, compare=False)
    """The file they were read from, and are read from again on SIGHUP."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the API, besides those of this machine; `*` for any."""
    bootstrap: tuple[str, ...] = ()
    serve: tuple[ServeSpec, ...] = ()
    draft: str | None = None
    """Draft model for speculative decoding, loaded where the first blocks of a model are served."""
    swarm_key: str | None = field(default=None, repr=False)
    """64 lower-case hexadecimal digits; None for an open swarm."""
    swarm_key_file: Path | None = field(default=None, compare=False)
    """The file it was read from, for the commands with which others join."""
    memory_bytes: int | None = None
    """Limit for weights, KV caches and replay buffers; None lets the node decide."""
    cache_limit_bytes: int | None = None
    """Limit for weight files from peers on the disk; None for none."""
    no_catalogue: bool = False
    mdns: bool = False
    """Whether to discover peers on the local network, and to be discovered there."""
    threads: int | None = None
    """Threads of an engine; None lets the node decide."""
    device: str = "auto"
    """Devices of the engines; see `node.engine.device.find_devices`."""
    batching: str = "continuous"
    """How sessions share the steps of an engine: `one`, `static` or `continuous`."""
    epoch_s: float = EPOCH_S
    """Length of a consensus epoch; peers with another length form a consensus of their own."""
    checkpoints: tuple[bytes, ...] = ()
    """Hashes of consensus statements: only branches that contain them are followed."""
    exploration: float = 0.1
    """Fraction of job time that may be spent on exploring methods, 0 to 1."""
    price: float = USUAL_PRICE
    """Announced price of a second of computing here, in units that the swarm's owners agree on."""
    log_level: str = "info"
    log_format: str = "text"
    """`text` or `json`."""

    def __post_init__(self) -> None:
        """Raise ConfigError for an open API without a key, and for a draft model that would never be used."""
        faults = []
        if self.draft is not None and all(spec.blocks is not None and spec.blocks.start for spec in self.serve):
            faults.append(
                f"the draft model {self.draft} would never be used: it runs beside a model's first blocks; "
                "add --serve MODEL:0-N, or leave out --draft"
            )
        if self.api_key is None and not self.api_keys:
            if "*" in self.cors_origins:
                faults.append(
                    "--cors-origin * opens the API to every web page: set an API key, too, or name the origins"
                )
            if not is_loopback(self.api_host):
                faults.append(
                    f"the API at {self.api_host} is not loopback and needs an API key: "
                    f"set {ENVIRONMENT_PREFIX}API_KEY or --api-keys FILE, or use --api {DEFAULT_API}"
                )
        if faults:
            raise ConfigError("; ".join(faults))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReady:
    """Addresses of a running node; the content of `node.json` in its data directory."""

    peer_id: PeerId
    multiaddrs: tuple[str, ...]
    api_url: str
    pid: int

    def write(self, data_dir: Path) -> None:
        """Write `node.json`, whole or not at all, for its owner only. Raises StartError."""
        temporary = data_dir / f".{READY_FILE}.{self.pid}"
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(json.dumps(asdict(self), indent=2) + "\n")
            temporary.replace(data_dir / READY_FILE)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StartError(f"cannot write {data_dir / READY_FILE}: {error.strerror}") from None

    @classmethod
    def parse(cls, text: str) -> "NodeReady":
        """Parse the JSON document. Raises ValueError."""
        try:
            value = json.loads(text)
            return cls(
                peer_id=parse_peer_id(value["peer_id"]),
                multiaddrs=tuple(str(address) for address in value["multiaddrs"]),
                api_url=str(value["api_url"]),
                pid=int(value["pid"]),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a {READY_FILE}: {error}") from None

    @classmethod
    def read(cls, data_dir: Path) -> "NodeReady | None":
        """Return what the last node in the directory wrote; None where that is missing or malformed.

        The node may have died since; ask its API.
        """
        try:
            return cls.parse((data_dir / READY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def default_data_dir() -> Path:
    """Return the default folder for identity and history. Two nodes on one machine need a folder each."""
    return Path(platformdirs.user_data_dir(APPLICATION, appauthor=False))


def chosen_data_dir() -> Path:
    """Return where the verbs look for a node: as the environment, its configuration file, or the default has it.

    What is wrong with the file is told by the verbs that start a node.
    """
    if named := os.environ.get(f"{ENVIRONMENT_PREFIX}DATA_DIR"):
        return expand(named).absolute()
    with suppress(OSError, ValueError):
        if file := os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG"):
            path = expand(file).absolute()
            named = tomllib.loads(path.read_text(encoding="utf-8")).get("data_dir")
            if named and isinstance(named, str):
                return path.parent / expand(named)
    return default_data_dir()


def default_cache_dir() -> Path:
    """Return the default folder of model packages; nodes share it."""
    return Path(platformdirs.user_cache_dir(APPLICATION, appauthor=False))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_unspecified(host: str) -> bool:
    """Return whether `host` stands for all addresses of this machine: valid to listen on, not to dial."""
    return host in {"0.0.0.0", "::"}  # noqa: S104 - recognised here, not bound
