"""Values of options: click parameter types with the checks of this program, and the bootstrap file."""

import ipaddress
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from node.config import ApiKey, ServeSpec, parse_api_key, read_api_keys
from node.network.addresses import parse_address
from node.util.paths import expand, read_text
from protocol.figures import MAX_PRICE
from protocol.identity import parse_block_range, parse_peer_id

_ORIGIN: Final = re.compile(r"file://|[a-z][a-z0-9+.-]*://[^\s/?#@]+")
BOOTSTRAP_FILE: Final = "bootstrap_peers.yaml"

_DEVICE = re.compile(r"auto|all|cpu|mps|cuda|cuda:[0-9]{1,2}(,cuda:[0-9]{1,2})*")
_HEX_32_BYTES = re.compile(r"[0-9a-fA-F]{64}")
_SHARE = re.compile(r"[0-9]?\.?[0-9]{1,9}|[0-9]\.")
_PRICE = re.compile(r"[0-9]{1,7}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)")
_SIZE_UNITS = {"": 1, "B": 1} | {f"{p}B": 10 ** (3 * n) for n, p in enumerate("KMGT", 1)}
_SIZE_UNITS |= {f"{prefix}IB": 2 ** (10 * n) for n, prefix in enumerate("KMGT", 1)}


class Parsed(click.ParamType[Any]):
    """A text that a function turns into a value; its ValueError is the option's fault.

    `is_path`: a relative path in the configuration file starts at that file's folder. `is_number`: the file may also
    have a number.
    """

    name = "text"

    def __init__(self, parse: Callable[[str], Any], *, is_path: bool = False, is_number: bool = False) -> None:
        self._parse = parse
        self.is_path = is_path
        self.is_number = is_number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value, or raise BadParameter."""
        if not isinstance(value, str):
            self.fail(f"expected a text, not {value!r}", param, ctx)
        if not value:
            self.fail("expected a value, not an empty text", param, ctx)
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete files where the value is a path."""
        return [CompletionItem(incomplete, type="file")] if self.is_path else []

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """Split the values of an environment variable at commas."""
        return [part.strip() for part in rv.split(",") if part.strip()]


def _path(text: str) -> Path:
    return expand(text).absolute()


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    count = int(float(match[1]) * _SIZE_UNITS.get(match[2].upper(), 0)) if match else 0
    if count <= 0:
        raise ValueError(f"expected a size such as 4GiB, 512MiB or 1000000000, not {text!r}")
    return count


def _share(text: str) -> float:
    if not _SHARE.fullmatch(text) or float(text) > 1:
        raise ValueError(f"expected a fraction from 0 to 1 such as 0.1, not {text!r}")
    return float(text)


def _price(text: str) -> float:
    if not _PRICE.fullmatch(text) or float(text) > MAX_PRICE:
        raise ValueError(f"expected a number from 0 to {MAX_PRICE:,.0f} such as 1.5, not {text!r}")
    return float(text)


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"expected auto, all, cpu, cuda, cuda:N, cuda:N,cuda:M or mps, not {text!r}")
    names = text.split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"each GPU once, not {text!r}")
    return text


def _digest(text: str) -> bytes:
    if not _HEX_32_BYTES.fullmatch(text):
        raise ValueError(f"expected a hash of 64 hexadecimal digits, as `metaswarm status` shows it, not {text!r}")
    return bytes.fromhex(text)


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or "/" in host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT such as 127.0.0.1:8642 (port 0 takes a free one), not {text!r}")
    return host, int(port)


def _api_keys(text: str) -> tuple[tuple[ApiKey, ...], Path]:
    path = _path(text)
    return read_api_keys(path), path


def _cors_origin(text: str) -> str:
    """Return the origin of web pages, also of those in programs (`app://obsidian.md`), or `*`."""
    if text != "*" and not _ORIGIN.fullmatch(text):
        raise ValueError(f"expected an origin such as https://example.org or app://obsidian.md, or *, not {text!r}")
    return text


def _listen_address(text: str) -> str:
    match text.split("/"):
        case ["", "ip4" | "ip6", host, "tcp", _]:
            ipaddress.ip_address(host)
            parse_address(text)
            return text
    raise ValueError(f"expected /ip4/ADDRESS/tcp/PORT or /ip6/ADDRESS/tcp/PORT, not {text!r}")


def _announced_address(text: str) -> str:
    match text.split("/"):
        case ["", "ip4" | "ip6" | "dns" | "dns4" | "dns6", host, "tcp", port] if host not in {"0.0.0.0", "::"}:  # noqa: S104
            parse_address(text)
            if int(port) > 0:
                return text
    raise ValueError(f"expected /ip4/ADDRESS/tcp/PORT, /ip6/… or /dns4/NAME/tcp/PORT, not {text!r}")


def _peer_address(text: str) -> str:
    match text.split("/"):
        case ["", family, host, "tcp" | "udp", port, *_, "p2p", peer]:
            parse_address(f"/{family}/{host}/tcp/{port}")
            parse_peer_id(peer)
            return text
    raise ValueError(f"expected the address of a peer such as /ip4/203.0.113.7/tcp/4001/p2p/PEER-ID, not {text!r}")


def _serve_spec(text: str) -> ServeSpec:
    if "/" in text:
        raise ValueError(f"{text!r} is a source: `metaswarm model import {text}` first, then serve it by its name")
    model, colon, blocks = text.partition(":")
    if not model:
        raise ValueError(f"expected MODEL or MODEL:START-END, not {text!r}")
    return ServeSpec(model, parse_block_range(blocks) if colon else None)


def _swarm_key(text: str) -> tuple[str, Path]:
    path = _path(text)
    key = read_text(path).strip()
    if not _HEX_32_BYTES.fullmatch(key):
        raise ValueError(f"{path} is not a swarm key: expected 64 hexadecimal digits from `metaswarm keygen`")
    return key.lower(), path


def _bootstrap(text: str) -> list[str]:
    """Return one address, or those of a file."""
    if text.startswith(("/ip4/", "/ip6/", "/dns")):
        return [_peer_address(text)]
    path = expand(text)
    return parse_bootstrap_yaml(read_text(path), str(path))


def parse_bootstrap_yaml(text: str, name: str) -> list[str]:
    """Return the multiaddrs of a file `peers: [multiaddr, …]`. Raises ValueError with the file's name and the line."""
    import yaml

    try:
        # Nodes rather than values: they know their lines, and an alias is not expanded.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{name}, line {line}: malformed YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: malformed YAML: {' '.join(str(error).split())}") from None

    def refuse(node: yaml.Node | None, fault: str) -> ValueError:
        return ValueError(f"{name}, line {node.start_mark.line + 1 if node else 1}: {fault}")

    if not isinstance(root, yaml.MappingNode):
        raise refuse(None, "expected `peers:` and a list of multiaddrs")
    addresses: list[str] = []
    for key, value in root.value:
        if key.value != "peers":
            raise refuse(key, f"expected `peers:`, not {key.value!r}")
        if isinstance(value, yaml.ScalarNode) and not value.value:
            continue  # `peers:` with every entry commented out
        if not isinstance(value, yaml.SequenceNode):
            raise refuse(value, "expected a list of multiaddrs")
        for entry in value.value:
            try:
                addresses.append(_peer_address(entry.value if isinstance(entry, yaml.ScalarNode) else ""))
            except ValueError as error:
                raise refuse(entry, str(error)) from None
    return addresses


def shipped_bootstrap() -> list[str]:
    """Return the peers of the list that ships with the program: inside the wheel, or at the root of a checkout."""
    package = resources.files("node")
    for file in (package / BOOTSTRAP_FILE, package / ".." / BOOTSTRAP_FILE):
        if file.is_file():
            return parse_bootstrap_yaml(file.read_text(encoding="utf-8"), str(file))
    return []


TEXT: Final = Parsed(str)
PATH: Final = Parsed(_path, is_path=True)
SIZE: Final = Parsed(_size, is_number=True)
SHARE: Final = Parsed(_share, is_number=True)
PRICE: Final = Parsed(_price, is_number=True)
DEVICE: Final = Parsed(_device)
DIGEST: Final = Parsed(_digest)
HOST_AND_PORT: Final = Parsed(_host_and_port)
API_KEY: Final = Parsed(parse_api_key)
API_KEYS: Final = Parsed(_api_keys, is_path=True)
CORS_ORIGIN: Final = Parsed(_cors_origin)
ANNOUNCED_ADDRESS: Final = Parsed(_announced_address)
LISTEN_ADDRESS: Final = Parsed(_listen_address)
SERVE_SPEC: Final = Parsed(_serve_spec)
SWARM_KEY: Final = Parsed(_swarm_key, is_path=True)
BOOTSTRAP: Final = Parsed(_bootstrap, is_path=True)
