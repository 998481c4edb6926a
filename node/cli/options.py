"""The options of a node, each declared once: flag, environment variable, key of the configuration file, type and help.

`data_dir` is `--data-dir` as a flag, METASWARM_DATA_DIR in the environment and `data_dir = "…"` in the file; click
looks them up in this order. A list given in one place replaces the list of a lower one. Every fault is a usage error of
one line that names the place.
"""

import os
import re
import tomllib
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from node.cli import option_types as types
from node.cli.completion import complete_models, complete_peers
from node.config import ENVIRONMENT_PREFIX, NodeConfig, default_cache_dir, default_data_dir
from node.util.paths import expand, read_text
from node.util.suggestions import did_you_mean
from protocol.limits import MAX_SPANS

_KEY: Final = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")

SETTINGS: Final[dict[str, Any]] = {"auto_envvar_prefix": ENVIRONMENT_PREFIX.rstrip("_")}
"""Context settings of the commands that take these options."""

TEST_VARIABLES: Final = ("REQUIRE_ALL", "TEST_DEVICE")
"""Environment variables of the test suite, without the prefix."""


class NodeOption(click.Option):
    """An option whose errors name the place where its value stands."""

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the flag, the environment variable or the key and its file."""
        source = ctx.get_parameter_source(self.name) if ctx else None
        if source is ParameterSource.ENVIRONMENT:
            return f"{ENVIRONMENT_PREFIX}{self.name.upper()}"
        if ctx and source is ParameterSource.DEFAULT_MAP:
            return f"{self.name} in {ctx.meta[__name__].place_of(self.name)}"
        return self.opts[0]


class _ApiOption(NodeOption):
    """`--api`: where the node listens. In METASWARM_API other verbs have the URL of the node that they ask."""

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Return the address; for verbs that run no node None where the variable is a URL."""
        value = super().value_from_envvar(ctx)
        return None if ctx.command.name != "node" and _is_url(value) else value

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the address. Raises UsageError for a URL in the environment."""
        if _is_url(value) and ctx.get_parameter_source(self.name) is ParameterSource.ENVIRONMENT:
            fault = f"{ENVIRONMENT_PREFIX}API names the node at {value!r}, which other verbs ask"
            raise click.UsageError(f"{fault}: unset it, or say with --api HOST:PORT where this node listens", ctx)
        return super().process_value(ctx, value)


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and "://" in value


class ConfigurationFile:
    """The configuration file of a command: its path, and on which line each option stands."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self._lines: dict[str, int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if match := _KEY.match(line):
                self._lines.setdefault(match[1], number)

    def place_of(self, name: str) -> str:
        """Return the file, and the line if it is known: keys may also stand in ways that this does not read."""
        return f"{self.path}, line {self._lines[name]}" if name in self._lines else str(self.path)


def file_of(context: click.Context) -> ConfigurationFile | None:
    """Return the configuration file that a command has read, if any."""
    found = context.meta.get(__name__)
    return found if isinstance(found, ConfigurationFile) else None


def _use_file(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Make the configuration file the source of options that neither flag nor environment gives."""
    if path is None:
        return
    try:
        text = read_text(path)
        file = context.meta[__name__] = ConfigurationFile(path, text)
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise click.BadParameter(f"{path} is not valid TOML: {error}", context, option) from None
    except ValueError as error:
        raise click.BadParameter(str(error), context, option) from None
    known = {each.name: each for each in NODE_OPTIONS if each is not option}
    unknown = [name for name in table if name not in known]
    context.default_map = {
        name: _value_in_file(known[name], value, path.parent) for name, value in table.items() if name in known
    }
    if unknown:
        meant = {name: did_you_mean(name, known) for name in unknown}
        faults = [f"{file.place_of(name)}: unknown option {name!r}{hint}" for name, hint in meant.items()]
        if not all(meant.values()):
            faults.append(f"the options are {', '.join(known)}")
        raise click.UsageError("; ".join(faults), context)


def _value_in_file(option: click.Option, value: Any, folder: Path) -> Any:
    """Return a value of the file as click takes it; text options refuse what is not a text in the file."""
    kind = option.type
    values = value if isinstance(value, list) and option.multiple else [value]
    if not isinstance(kind, types.Parsed) or kind.is_number:
        values = [str(each) for each in values]
    elif kind.is_path:
        values = [str(folder / expand(each)) if each and isinstance(each, str) else each for each in values]
    return values if option.multiple else values[0]


def _all_addresses(context: click.Context, option: click.Parameter, lists: tuple[list[str], ...]) -> tuple[str, ...]:
    """Return the addresses of all values; where no place has any, of the list that ships with the program."""
    if context.get_parameter_source(option.name) is ParameterSource.DEFAULT:
        lists = (types.shipped_bootstrap(),)
    return tuple(dict.fromkeys(chain.from_iterable(lists)))


def _check_span_count(context: click.Context, option: click.Parameter, specs: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(specs) > MAX_SPANS:  # a heartbeat cannot carry more
        raise click.BadParameter(f"{len(specs)} spans; a node serves at most {MAX_SPANS}", context, option)
    return specs


def _option(flag: str, kind: click.ParamType[Any], metavar: str, text: str, **settings: Any) -> NodeOption:
    return NodeOption([flag], type=kind, metavar=metavar, help=text, **settings)


_BATCHING: Final = click.Choice(["one", "static", "continuous"], case_sensitive=False)
_LOG_FORMAT: Final = click.Choice(["text", "json"], case_sensitive=False)
_LOG_LEVEL: Final = click.Choice(["debug", "info", "warning", "error"], case_sensitive=False)

_CONFIG: Final = _option(
    *("--config", types.PATH, "FILE"),
    "TOML file with any of these options, dashes as underscores.",
    is_eager=True,
    expose_value=False,
    callback=_use_file,
)

NODE_OPTIONS: Final[tuple[NodeOption, ...]] = (
    _option("--data-dir", types.PATH, "DIR", "Folder of identity and history; one for each node."),
    _option("--cache-dir", types.PATH, "DIR", "Folder of model packages; nodes may share it."),
    _option(
        *("--cache-limit", types.SIZE, "BYTES"),
        "Maximum size of weights fetched from peers, e.g. 50GiB (LRU eviction; served files are kept).",
    ),
    _option(
        *("--listen", types.LISTEN_ADDRESS, "MULTIADDR"),
        "Address for peers [default: port 4001 of all IPv4 and IPv6 interfaces]; port 0 takes a free one.",
        multiple=True,
    ),
    _option(
        *("--announce", types.ANNOUNCED_ADDRESS, "MULTIADDR"),
        "Address at which others reach this node besides its own, e.g. a forwarded port: /ip4/203.0.113.7/tcp/4001, or "
        "/dns4/NAME/tcp/PORT.",
        multiple=True,
    ),
    NodeOption(["--no-port-mapping"], is_flag=True, help="Do not ask the gateway to forward the port (UPnP)."),
    NodeOption(["--no-relay"], is_flag=True, help="Do not relay between peers that cannot reach each other."),
    _option(
        *("--relay-rate", types.SIZE, "BYTES"),
        "Bytes per second relayed for others in all, e.g. 4MiB [default: 16MiB].",
    ),
    _ApiOption(
        ["--api"],
        type=types.HOST_AND_PORT,
        metavar="HOST:PORT",
        help="Address of the HTTP API [default: 127.0.0.1:8642]; port 0 takes a free one.",
    ),
    _option(
        *("--api-key", types.API_KEY, "KEY"),
        "API key; required unless --api is loopback. Prefer METASWARM_API_KEY: flags show up in `ps`.",
    ),
    _option(
        *("--api-keys", types.API_KEYS, "FILE"),
        "Hashed API keys with limits, one a line, from `metaswarm keygen --api-key-name NAME FILE`; SIGHUP reloads it.",
    ),
    _option(
        *("--cors-origin", types.CORS_ORIGIN, "ORIGIN"),
        "Origin of web pages (or app://…) that may use the API, besides those of this machine; * for any.",
        multiple=True,
    ),
    _option(
        *("--bootstrap", types.BOOTSTRAP, "FILE_OR_MULTIADDR"),
        "Peers to dial first: a multiaddr with /p2p/PEER-ID, or a YAML file `peers: [...]`.",
        multiple=True,
        shell_complete=complete_peers,
        callback=_all_addresses,
    ),
    _option(
        *("--serve", types.SERVE_SPEC, "MODEL[:START-END]"),
        "Model to serve; blocks START to END (exclusive), by default the node's choice.",
        multiple=True,
        shell_complete=complete_models,
        callback=_check_span_count,
    ),
    _option(
        *("--draft", types.TEXT, "MODEL"),
        "Draft model for speculative decoding (same tokenizer, several times faster).",
        shell_complete=complete_models,
    ),
    _option("--swarm-key", types.SWARM_KEY, "FILE", "Key of a private swarm, from `metaswarm keygen`."),
    _CONFIG,
    _option(
        *("--memory", types.SIZE, "BYTES"),
        "Memory limit for weights, KV cache and replay buffers, e.g. 4GiB [default: 3/4 of what is free]; on GPUs, "
        "memory of each for weights and KV cache. `metaswarm status` says how much unserved blocks need.",
    ),
    NodeOption(["--no-mdns"], is_flag=True, help="Disable peer discovery on the local network."),
    NodeOption(["--no-catalogue"], is_flag=True, help="Fetch models from peers only, never from their source."),
    _option("--threads", click.IntRange(1, 1024), "N", "Most threads of the engine."),
    _option(
        *("--device", types.DEVICE, "NAME"),
        "Device of the engine: auto (default: a CUDA GPU if any), cpu, cuda:N, cuda:N,cuda:M, all (every GPU) or mps.",
    ),
    _option("--batching", _BATCHING, "HOW", "Batching of sessions: one, static or continuous (default)."),
    _option(
        *("--epoch", click.IntRange(5, 86_400), "SECONDS"),
        "Length of a consensus epoch, the same at every peer [default: 600].",
    ),
    _option(
        *("--checkpoint", types.DIGEST, "HASH"),
        "Pin the chain to the branch that contains this hash (shown by `metaswarm status --json`).",
        multiple=True,
    ),
    _option(
        *("--exploration", types.SHARE, "FRACTION"),
        "Fraction of job time that may be spent exploring methods, 0 to 1 [default: 0.1].",
    ),
    _option(
        *("--price", types.PRICE, "NUMBER"),
        "Price of a second of computing here, by which jobs with --budget or --objective cost choose [default: 1].",
    ),
    _option("--log-level", _LOG_LEVEL, "LEVEL", "Log level: debug, info (default), warning or error."),
    _option("--log-format", _LOG_FORMAT, "FORMAT", "Log format: text (default) or json, an object a line."),
)

_FIELD_OF: Final[Mapping[str, str]] = {
    "memory": "memory_bytes",
    "cache_limit": "cache_limit_bytes",
    "checkpoint": "checkpoints",
    "cors_origin": "cors_origins",
    "relay_rate": "relay_bytes_per_s",
}
"""Options whose field of NodeConfig has another name."""


def make_config(values: Mapping[str, Any]) -> NodeConfig:
    """Return the configuration from the values of options; None and () stand for the default. Raises ConfigError."""
    given = {name: value for name, value in values.items() if value is not None and value != ()}
    config: dict[str, Any] = {"data_dir": default_data_dir(), "cache_dir": default_cache_dir()}
    for field in ("mdns", "port_mapping", "relay"):
        config[field] = not given.pop(f"no_{field}", False)
    if api := given.pop("api", None):
        config["api_host"], config["api_port"] = api
    if epoch := given.pop("epoch", None):
        config["epoch_s"] = float(epoch)
    if swarm_key := given.pop("swarm_key", None):
        config["swarm_key"], config["swarm_key_file"] = swarm_key
    if api_keys := given.pop("api_keys", None):
        config["api_keys"], config["api_keys_file"] = api_keys
    return NodeConfig(**config | {_FIELD_OF.get(name, name): value for name, value in given.items()})


def read_config(*arguments: str) -> NodeConfig:
    """Return the configuration from these flags, the environment and the file. Raises UsageError or ConfigError."""
    command = click.Command("node", params=list(NODE_OPTIONS), context_settings=SETTINGS)
    return make_config(command.make_context("metaswarm", list(arguments)).params)


def read_cache_dir(flag: str | None = None) -> Path:
    """Return the cache directory from the flag, the environment or the file. Raises UsageError or ConfigError."""
    # Other options are not looked at: METASWARM_API may be another node's URL.
    options: list[click.Parameter] = [each for each in NODE_OPTIONS if each.name == "cache_dir" or each is _CONFIG]
    command = click.Command("node", params=options, context_settings=SETTINGS)
    arguments = [] if flag is None else [f"--cache-dir={flag}"]
    return make_config(command.make_context("metaswarm", arguments).params).cache_dir


def environment_without(names: Collection[str]) -> dict[str, str]:
    """Return what environment and file say of the other options, as environment variables. Raises UsageError.

    A file cannot be passed on in part.
    """
    context = click.Context(click.Command("node"), info_name="metaswarm node", **SETTINGS)
    _CONFIG.handle_parse_result(context, {}, [])
    found = {}
    for option in NODE_OPTIONS:
        value, source = option.consume_value(context, {})
        is_given = source in {ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP}
        if is_given and option is not _CONFIG and option.name not in names:
            option.handle_parse_result(context, {}, [])  # refuses what is not valid
            values = value if isinstance(value, list | tuple) else [value]
            found[f"{ENVIRONMENT_PREFIX}{option.name.upper()}"] = ",".join(map(str, values))
    return found


def refuse_unknown_variables() -> None:
    """Raise UsageError for variables METASWARM_… that are not options."""
    if faults := unknown_variables():
        raise click.UsageError("; ".join(faults))


def unknown_variables() -> list[str]:
    """Return a line for each variable METASWARM_… that is not an option."""
    known = [*(option.name.upper() for option in NODE_OPTIONS), *TEST_VARIABLES]
    named = sorted(name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX) and os.environ[name])
    return [
        f"unknown environment variable {name!r}{did_you_mean(option, known, ENVIRONMENT_PREFIX)}"
        for name in named
        if (option := name.removeprefix(ENVIRONMENT_PREFIX)) not in known
    ]
