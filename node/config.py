"""What a node is told to do: from a file, the environment and flags, in rising precedence.

Every option has one name: `data_dir` is `data_dir = "…"` in the file, METASWARM_DATA_DIR in the environment and
`--data-dir` as a flag. A list given in one place replaces the list of a lower one. Everything is checked here, before
anything starts; a wrong value is a `ConfigError`, one line that says where it stands and what was expected. So is a
variable METASWARM_… that is no option.
"""

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

import platformdirs

from node.util.suggestions import did_you_mean
from protocol.identity import BlockRange, PeerId, parse_block_range, parse_peer_id
from protocol.limits import MAX_SPANS
from selector.consensus.clock import EPOCH_S

T = TypeVar("T")

APPLICATION: Final = "metaswarm"
ENVIRONMENT_PREFIX: Final = "METASWARM_"
DEFAULT_LISTEN: Final = ("/ip4/0.0.0.0/tcp/4001",)
DEFAULT_API: Final = "127.0.0.1:8642"
MIN_EPOCH_S: Final = 5
MAX_EPOCH_S: Final = 86_400
DEFAULT_EXPLORATION: Final = 0.1
MEMORY_SHARE: Final = 0.75
"""Of the device's memory that is free when the node starts, where `memory` says nothing."""

DEFAULT_DEVICE: Final = "auto"
BATCHING: Final = ("one", "static", "continuous")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
BOOTSTRAP_FILE: Final = "bootstrap_peers.yaml"
READY_FILE: Final = "node.json"
LOCK_FILE: Final = "node.lock"
"""Held by the node that runs in a data directory."""

OPTIONS: Final = (
    "data_dir", "cache_dir", "cache_limit", "listen", "api", "api_key", "bootstrap", "serve", "draft", "swarm_key",
    "memory", "no_catalogue", "no_mdns", "threads", "device", "batching", "epoch", "checkpoint", "exploration",
    "log_level",
)  # fmt: skip
"""The names of all options, the same in the file, the environment and (with dashes) on the command line."""

_VARIABLES: Final = (*OPTIONS, "config", "require_all", "test_device")
"""What the environment may name besides: the configuration file; the last two are the test-suite's."""

_MULTIADDR_START = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6|dnsaddr)/")
_SWARM_KEY = re.compile(r"[0-9a-fA-F]{64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_MEMORY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)")
_MEMORY_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_MEMORY_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,2})?")
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class ConfigError(Exception):
    """The user's configuration is wrong. The message is one line: where, what, and what was expected."""


class StartError(Exception):
    """The node cannot start on this machine as it is: a port is taken, a file cannot be had. One line for the user."""


@dataclass(frozen=True, slots=True)
class ServeSpec:
    """A model to serve, as the user named it, and which blocks; None leaves the choice to the node."""

    model: str
    blocks: BlockRange | None = None

    def __str__(self) -> str:
        return self.model if self.blocks is None else f"{self.model}:{self.blocks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Everything that `run_node` is told. Files that options name have been read; `bootstrap` is plain multiaddrs."""

    data_dir: Path
    cache_dir: Path
    listen: tuple[str, ...] = DEFAULT_LISTEN
    api_host: str = "127.0.0.1"
    api_port: int = 8642
    """0 lets the system choose a port."""
    api_key: str | None = field(default=None, repr=False)
    bootstrap: tuple[str, ...] = ()
    serve: tuple[ServeSpec, ...] = ()
    draft: str | None = None
    """The model that guesses what the served one will say, where its first blocks are served here."""
    swarm_key: str | None = field(default=None, repr=False)
    """64 lower-case hexadecimal digits; None for an open swarm."""
    swarm_key_file: Path | None = field(default=None, compare=False)
    """Where that was read, for the commands with which others join."""
    memory_bytes: int | None = None
    """What weights and KV caches may take together; None lets the node decide."""
    cache_limit_bytes: int | None = None
    """What weight files from peers may take on the disk; None for no bound."""
    no_catalogue: bool = False
    mdns: bool = False
    """Whether to look for peers on the local network, and to be found there."""
    threads: int | None = None
    """Threads of an engine; None lets the node decide."""
    device: str = DEFAULT_DEVICE
    """What an engine computes on: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    batching: str = "continuous"
    """How sessions share the steps of an engine."""
    epoch_s: float = EPOCH_S
    """The length of an epoch of the consensus; peers with another one agree among themselves only."""
    checkpoints: tuple[bytes, ...] = ()
    """Statements whose branch of a chain is stood by, however many have signed another."""
    exploration: float = DEFAULT_EXPLORATION
    """Of the time that jobs take, what trying methods may cost, from 0 to 1."""
    log_level: str = "info"

    def __post_init__(self) -> None:
        """Raise ConfigError for an API that strangers could use, and for a draft model that nobody would."""
        if self.draft is not None and all(spec.blocks is not None and spec.blocks.start for spec in self.serve):
            raise ConfigError(
                f"the draft model {self.draft} would never guess: only who serves a model's first blocks does; "
                "add --serve MODEL:0-N, or leave the draft model out"
            )
        if self.api_key is None and not is_loopback(self.api_host):
            raise ConfigError(
                f"the API may listen on {self.api_host}, which others can reach, only with an API key: "
                f"set {ENVIRONMENT_PREFIX}API_KEY, or listen on 127.0.0.1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReady:
    """What a running node is reached by; the content of `node.json` in its data directory."""

    peer_id: PeerId
    multiaddrs: tuple[str, ...]
    api_url: str
    pid: int

    def to_json(self) -> dict[str, Any]:
        """Return the values as they stand in `node.json`."""
        return {**asdict(self), "multiaddrs": list(self.multiaddrs)}

    def write(self, data_dir: Path) -> None:
        """Write `node.json`, whole or not at all, for its owner only. Raises StartError."""
        temporary = data_dir / f".{READY_FILE}.{self.pid}"
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(json.dumps(self.to_json(), indent=2) + "\n")
            temporary.replace(data_dir / READY_FILE)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StartError(f"cannot write {data_dir / READY_FILE}: {error.strerror}") from None

    @classmethod
    def parse(cls, text: str) -> "NodeReady":
        """Return what `to_json` gave, from its JSON. Raises ValueError where it is something else."""
        try:
            value = json.loads(text)
            return cls(
                peer_id=parse_peer_id(value["peer_id"]),
                multiaddrs=tuple(str(address) for address in value["multiaddrs"]),
                api_url=str(value["api_url"]),
                pid=int(value["pid"]),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"not what a ready node says of itself: {error}") from None

    @classmethod
    def read(cls, data_dir: Path) -> "NodeReady | None":
        """Return what the last node to use the directory wrote; None where there is nothing of use.

        The node may have died since: only asking its API tells.
        """
        try:
            return cls.parse((data_dir / READY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def default_data_dir() -> Path:
    """Return where a node keeps its identity and history. Two nodes on one machine need a directory each."""
    return Path(platformdirs.user_data_dir(APPLICATION, appauthor=False))


def default_cache_dir() -> Path:
    """Return where model packages are kept; nodes share it."""
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
    """Return whether `host` stands for every address of this machine: one may listen there, not dial it."""
    return host in {"0.0.0.0", "::"}  # noqa: S104 - recognised here, not bound


def load_config(
    flags: Mapping[str, object], environ: Mapping[str, str] | None = None, *, strict: bool = True
) -> NodeConfig:
    """Return the configuration that file, environment and flags make together. Raises ConfigError.

    `flags` maps an option's name (and `config`, the file's) to its value as given; None, an empty list and False mean
    that the flag was not given. `strict`: whether a variable METASWARM_… that is no option is an error.
    """
    environ = os.environ if environ is None else environ
    if strict and (faults := unknown_variables(environ)):
        raise ConfigError("; ".join(faults))
    given = _Options()
    file = flags.get("config") or environ.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    if file:
        given.add_file(Path(str(file)).expanduser())
    given.add_environment(environ)
    given.add_flags(flags)

    api_host, api_port = given.get("api", _parse_api) or _parse_api(_Given(DEFAULT_API, "the default"))
    bootstrap = given.get("bootstrap", _parse_bootstrap)
    exploration = given.get("exploration", _parse_share)
    return NodeConfig(
        data_dir=given.get("data_dir", _parse_path) or default_data_dir(),
        cache_dir=given.get("cache_dir", _parse_path) or default_cache_dir(),
        listen=given.get("listen", _parse_listen) or DEFAULT_LISTEN,
        api_host=api_host,
        api_port=api_port,
        api_key=given.get("api_key", _parse_api_key),
        bootstrap=_shipped_bootstrap() if bootstrap is None else bootstrap,
        serve=given.get("serve", _parse_serve) or (),
        draft=given.get("draft", _Given.text),
        swarm_key=given.get("swarm_key", _parse_swarm_key),
        swarm_key_file=given.get("swarm_key", _parse_path),
        memory_bytes=given.get("memory", _parse_memory),
        cache_limit_bytes=given.get("cache_limit", _parse_memory),
        no_catalogue=given.get("no_catalogue", _parse_boolean) or False,
        mdns=not given.get("no_mdns", _parse_boolean),
        threads=given.get("threads", _parse_threads),
        device=given.get("device", _parse_device) or DEFAULT_DEVICE,
        batching=given.get("batching", _parse_batching) or "continuous",
        epoch_s=given.get("epoch", _parse_epoch) or EPOCH_S,
        checkpoints=given.get("checkpoint", _parse_checkpoints) or (),
        exploration=DEFAULT_EXPLORATION if exploration is None else exploration,
        log_level=given.get("log_level", _parse_log_level) or "info",
    )


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return what is wrong with variables that look like options of this program, but are none, a line each."""
    environ = os.environ if environ is None else environ
    known = [name.upper() for name in _VARIABLES]
    named = sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and environ[name])
    return [
        f"unknown environment variable {name!r}{did_you_mean(option, known, ENVIRONMENT_PREFIX)}"
        for name in named
        if (option := name.removeprefix(ENVIRONMENT_PREFIX)) not in known
    ]


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as the user gave it, where it stands in words, and where relative paths in it start."""

    value: object
    where: str
    base: Path = field(default_factory=Path)

    def text(self) -> str:
        """Return the value as text."""
        if not isinstance(self.value, str) or not self.value:
            raise ConfigError(f"{self.where}: expected text, not {self.value!r}")
        return self.value

    def texts(self) -> tuple[str, ...]:
        """Return the value as a list of texts; a single text is a list of one."""
        values = [self.value] if isinstance(self.value, str) else self.value
        if not isinstance(values, list | tuple):
            raise ConfigError(f"{self.where}: expected a list of texts, not {self.value!r}")
        return tuple(_Given(value, self.where).text() for value in values)


class _Options:
    """The options given so far; a later `add_` prevails over an earlier one."""

    def __init__(self) -> None:
        self._given: dict[str, _Given] = {}

    def add_file(self, path: Path) -> None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the configuration file {path} is no valid TOML: {error}") from None
        for name, value in table.items():
            if name not in OPTIONS:
                meant = did_you_mean(name, OPTIONS)
                raise ConfigError(f"{path}: there is no option {name!r}{meant}; the options are {', '.join(OPTIONS)}")
            self._given[name] = _Given(value, f"{name} in {path}", path.parent)

    def add_environment(self, environ: Mapping[str, str]) -> None:
        for name in OPTIONS:
            variable = ENVIRONMENT_PREFIX + name.upper()
            value = environ.get(variable)
            if value:
                several = name in {"listen", "bootstrap", "serve", "checkpoint"}
                parts = [part.strip() for part in value.split(",") if part.strip()] if several else value
                self._given[name] = _Given(parts, variable)

    def add_flags(self, flags: Mapping[str, object]) -> None:
        for name in OPTIONS:
            value = flags.get(name)
            if value is not None and value is not False and value != () and value != []:
                self._given[name] = _Given(value, f"--{name.replace('_', '-')}")

    def get(self, name: str, parse: Callable[[_Given], T]) -> T | None:
        given = self._given.get(name)
        return None if given is None else parse(given)


def _parse_path(given: _Given) -> Path:
    return (given.base / Path(given.text()).expanduser()).absolute()


def _parse_boolean(given: _Given) -> bool:
    value = _BOOLEANS.get(str(given.value).lower())
    if value is None:
        raise ConfigError(f"{given.where}: expected true or false, not {given.value!r}")
    return value


def _parse_threads(given: _Given) -> int:
    text = str(given.value)
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= 1024:
        raise ConfigError(f"{given.where}: expected a number of threads from 1 to 1024, not {given.value!r}")
    return int(text)


def _parse_device(given: _Given) -> str:
    text = given.text()
    if not _DEVICE.fullmatch(text):
        raise ConfigError(f"{given.where}: expected auto, cpu, cuda, cuda:0 (or another number) or mps, not {text!r}")
    return text


def _parse_epoch(given: _Given) -> float:
    text = str(given.value)
    if not re.fullmatch(r"[0-9]{1,5}", text) or not MIN_EPOCH_S <= int(text) <= MAX_EPOCH_S:
        raise ConfigError(
            f"{given.where}: expected seconds from {MIN_EPOCH_S} to {MAX_EPOCH_S}, the same at every peer, "
            f"not {given.value!r}"
        )
    return float(text)


def _parse_checkpoints(given: _Given) -> tuple[bytes, ...]:
    for text in given.texts():
        if not _DIGEST.fullmatch(text):
            raise ConfigError(
                f"{given.where}: {text!r} is no statement: expected 64 hexadecimal digits, as `metaswarm status` shows"
            )
    return tuple(bytes.fromhex(text) for text in given.texts())


def _parse_share(given: _Given) -> float:
    text = str(given.value)
    if not re.fullmatch(r"[0-9]{0,4}\.?[0-9]{0,9}", text) or not re.search("[0-9]", text) or float(text) > 1:
        raise ConfigError(f"{given.where}: expected a share from 0 to 1 such as 0.1, not {given.value!r}")
    return float(text)


def _parse_batching(given: _Given) -> str:
    batching = given.text().lower()
    if batching not in BATCHING:
        raise ConfigError(f"{given.where}: expected one of {', '.join(BATCHING)}, not {given.value!r}")
    return batching


def _parse_log_level(given: _Given) -> str:
    level = given.text().lower()
    if level not in LOG_LEVELS:
        raise ConfigError(f"{given.where}: expected one of {', '.join(LOG_LEVELS)}, not {given.value!r}")
    return level


def _parse_memory(given: _Given) -> int:
    match = _MEMORY.fullmatch("" if isinstance(given.value, bool) else str(given.value))
    unit = _MEMORY_UNITS.get(match[2].upper()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count <= 0:
        raise ConfigError(f"{given.where}: expected bytes such as 4GiB, 512MiB or 1000000000, not {given.value!r}")
    return count


def _parse_api(given: _Given) -> tuple[str, int]:
    host, colon, port = given.text().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or "/" in host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(
            f"{given.where}: expected HOST:PORT, for example {DEFAULT_API} (port 0 takes a free one), "
            f"not {given.value!r}"
        )
    return host, int(port)


def _parse_api_key(given: _Given) -> str:
    key = given.text()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{given.where}: an API key is made of visible ASCII characters")
    return key


def _parse_listen(given: _Given) -> tuple[str, ...]:
    for address in given.texts():
        fault = _listen_fault(address)
        if fault:
            raise ConfigError(
                f"{given.where}: {address!r} is no address to listen on: {fault}; "
                f"expected /ip4/ADDRESS/tcp/PORT or /ip6/ADDRESS/tcp/PORT"
            )
    return given.texts()


def _listen_fault(address: str) -> str | None:
    match address.split("/"):
        case ["", "ip4" | "ip6" as family, host, "tcp", port]:
            return _host_fault(family, host) or _port_fault(port)
    return "wrong shape"


def _host_fault(family: str, host: str) -> str | None:
    try:
        if family == "ip4":
            ipaddress.IPv4Address(host)
        elif family == "ip6":
            ipaddress.IPv6Address(host)
    except ValueError:
        return f"{host!r} is no {family} address"
    return None if host else f"{family} names no host"


def _port_fault(port: str) -> str | None:
    return None if re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= 65535 else f"{port!r} is no port"


def _peer_address_fault(address: str) -> str | None:
    """Return what is wrong with a multiaddr at which a peer is to be dialled; None if nothing is."""
    match address.split("/"):
        case ["", family, host, "tcp" | "udp", port, *_, "p2p", peer] if _MULTIADDR_START.match(address):
            try:
                parse_peer_id(peer)
            except ValueError as error:
                return str(error)
            return _host_fault(family, host) or _port_fault(port)
        case ["", *_, "p2p", _]:
            return "it must begin with a host and a port, as in /ip4/203.0.113.7/tcp/4001"
    return "it must end in /p2p/ and the peer's id"


def _parse_serve(given: _Given) -> tuple[ServeSpec, ...]:
    texts = given.texts()
    if len(texts) > MAX_SPANS:  # what its heartbeats could not tell, nobody would ask it for
        raise ConfigError(
            f"{given.where}: {len(texts)} spans are too many for one node, which serves {MAX_SPANS} at most"
        )
    return tuple(_parse_serve_spec(text, given.where) for text in texts)


def _parse_serve_spec(text: str, where: str) -> ServeSpec:
    model, colon, blocks = text.partition(":")
    if not model:
        raise ConfigError(f"{where}: {text!r} names no model; expected MODEL or MODEL:START-END")
    try:
        return ServeSpec(model, parse_block_range(blocks) if colon else None)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _parse_swarm_key(given: _Given) -> str:
    path = _parse_path(given)
    key = _read_text(path, f"{given.where}: the swarm key").strip()
    if not _SWARM_KEY.fullmatch(key):
        raise ConfigError(
            f"{given.where}: {path} is no swarm key: expected 64 hexadecimal digits, as `metaswarm keygen` writes them"
        )
    return key.lower()


def _parse_bootstrap(given: _Given) -> tuple[str, ...]:
    addresses: list[str] = []
    for text in given.texts():
        if _MULTIADDR_START.match(text):
            fault = _peer_address_fault(text)
            if fault:
                raise ConfigError(f"{given.where}: {text!r} is no peer's address: {fault}")
            addresses.append(text)
        else:
            path = given.base / Path(text).expanduser()
            addresses += _parse_bootstrap_yaml(_read_text(path, f"{given.where}: the bootstrap file"), str(path))
    return tuple(dict.fromkeys(addresses))


def _parse_bootstrap_yaml(text: str, name: str) -> list[str]:
    """Return the multiaddrs of a file `peers: [multiaddr, …]`. Faults name the file and the line."""
    import yaml

    try:
        # Nodes rather than values: they know their lines, and an alias is not expanded.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}, line {line}: broken YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}, line 1: expected `peers:` and a list of multiaddrs")
    addresses: list[str] = []
    for key, value in root.value:
        if key.value != "peers":
            raise ConfigError(f"{name}, line {key.start_mark.line + 1}: expected `peers:`, not {key.value!r}")
        if isinstance(value, yaml.ScalarNode) and not value.value:
            continue  # `peers:` with every entry commented out
        if not isinstance(value, yaml.SequenceNode):
            raise ConfigError(f"{name}, line {value.start_mark.line + 1}: expected a list of multiaddrs")
        for entry in value.value:
            address = entry.value if isinstance(entry, yaml.ScalarNode) else ""
            fault = _peer_address_fault(address)
            if fault:
                line = entry.start_mark.line + 1
                raise ConfigError(f"{name}, line {line}: {address!r} is no peer's address: {fault}")
            addresses.append(address)
    return addresses


def _shipped_bootstrap() -> tuple[str, ...]:
    """Return the peers of the list that ships with the program: inside the wheel, or at the root of a checkout."""
    package = resources.files("node")
    for file in (package / BOOTSTRAP_FILE, package / ".." / BOOTSTRAP_FILE):
        if file.is_file():
            return tuple(_parse_bootstrap_yaml(file.read_text(encoding="utf-8"), str(file)))
    return ()


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {path} is no text file") from None
