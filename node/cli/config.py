"""`metaswarm config`: what is configured and from where, and every fault of it at once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import click
from click.core import ParameterSource

from node.cli.options import NODE_OPTIONS, SETTINGS, NodeOption, file_of, make_config, unknown_variables
from node.cli.output import EXIT_USAGE, json_option, new_table, out, print_error, print_json, printable
from node.config import DEFAULT_API, ENVIRONMENT_PREFIX, ConfigError, NodeConfig, default_cache_dir, default_data_dir

SECRET: Final = "(not shown)"  # noqa: S105 - in place of a secret

_STANDARD: Final = NodeConfig(data_dir=default_data_dir(), cache_dir=default_cache_dir())
_DEFAULTS: Final[Mapping[str, object]] = {
    "data_dir": _STANDARD.data_dir,
    "cache_dir": _STANDARD.cache_dir,
    "listen": ", ".join(_STANDARD.listen),
    "no_port_mapping": "no",
    "no_relay": "no",
    "relay_rate": f"{_STANDARD.relay_bytes_per_s >> 20}MiB",
    "api": DEFAULT_API,
    "bootstrap": "the list that ships with the program",
    "memory": "3/4 of what is free",
    "no_mdns": "no",
    "no_catalogue": "no",
    "threads": "the node's choice",
    "device": _STANDARD.device,
    "batching": _STANDARD.batching,
    "epoch": f"{_STANDARD.epoch_s:g}",
    "exploration": _STANDARD.exploration,
    "price": f"{_STANDARD.price:g}",
    "log_level": _STANDARD.log_level,
    "log_format": _STANDARD.log_format,
}

_CHECKED_TOGETHER: Final = frozenset({"config", "api", "api_key", "api_keys", "cors_origin", "serve", "draft"})
"""Options that NodeConfig checks against each other: without the value of one its faults may not be."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An option, its value as it was given, and where that is from."""

    option: str
    value: str
    source: str


@dataclass(slots=True)
class Configuration:
    """All settings, and what is wrong with them, a line each."""

    settings: list[Setting]
    faults: list[str]


class _Lenient(click.Command):
    """A command that reads its options one by one, so that one fault hides no other."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read every option, and note the faults."""
        parser = self.make_parser(ctx)
        given, rest, order = parser.parse_args(args=args)
        if rest:
            ctx.fail(f"unexpected argument {rest[0]!r}")
        found, faulty = Configuration([], []), set[str | None]()
        for parameter in click.core.iter_params_for_processing(order, self.get_params(ctx)):
            try:
                parameter.handle_parse_result(ctx, given, rest)
            except click.UsageError as error:
                found.faults.append(error.format_message().rstrip("."))
                if isinstance(error, click.BadParameter):  # not for a file that has unknown options besides
                    faulty.add(parameter.name)
        found.settings += [_setting(ctx, option, given) for option in NODE_OPTIONS]
        found.faults += unknown_variables()
        if not faulty & _CHECKED_TOGETHER:
            try:
                make_config({name: value for name, value in ctx.params.items() if _is_given(ctx, name)})
            except ConfigError as error:
                found.faults.append(str(error))
        ctx.params = {"configuration": found, "as_json": ctx.params.get("as_json", False)}
        return []


def _is_given(context: click.Context, name: str) -> bool:
    return name != "as_json" and context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _setting(context: click.Context, option: NodeOption, given: Mapping[str, Any]) -> Setting:
    value, source = option.consume_value(context, given)
    name, file = option.name, file_of(context)
    if source is ParameterSource.DEFAULT:
        return Setting(name, str(_DEFAULTS.get(name, "none")), "default")
    where = {
        ParameterSource.COMMANDLINE: f"flag {option.opts[0]}",
        ParameterSource.ENVIRONMENT: f"environment {ENVIRONMENT_PREFIX}{name.upper()}",
        ParameterSource.DEFAULT_MAP: f"file {file.place_of(name)}" if file else "file",
    }
    values = value if isinstance(value, list | tuple) else [value]
    shown = SECRET if name == "api_key" else ", ".join(map(str, values))
    return Setting(name, {"True": "yes", "False": "no"}.get(shown, shown), where.get(source, source.name.lower()))


def _fail_for(faults: Sequence[str]) -> int:
    for fault in faults:
        print_error(fault)
    return EXIT_USAGE if faults else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def config() -> None:
    """Show or check the configuration of a node: file, environment and flags.

    Takes the options of `metaswarm node`. Exit code 2 for a faulty configuration.
    """


@config.command(cls=_Lenient, params=[*NODE_OPTIONS], context_settings=SETTINGS)
@json_option
def show(configuration: Configuration, as_json: bool) -> int:
    """Show every option, its value, and where that is from: default, file, environment or flag."""
    if as_json:
        print_json({"settings": [asdict(each) for each in configuration.settings], "faults": configuration.faults})
    else:
        table = new_table("option", "value", "from")
        for each in configuration.settings:
            table.add_row(each.option, printable(each.value), printable(each.source))
        out().print(table)
    return _fail_for(configuration.faults)


@config.command(cls=_Lenient, params=[*NODE_OPTIONS], context_settings=SETTINGS)
@json_option
def check(configuration: Configuration, as_json: bool) -> int:
    """Check the configuration, and name every fault at once; `metaswarm doctor` looks at the machine and the swarm."""
    if as_json:
        print_json({"valid": not configuration.faults, "faults": configuration.faults})
    elif not configuration.faults:
        given = [each for each in configuration.settings if each.source != "default"]
        click.echo(f"the configuration is valid: {len(given)} {'option' if len(given) == 1 else 'options'} set")
    return _fail_for(configuration.faults)
