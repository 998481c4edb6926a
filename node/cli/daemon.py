"""`metaswarm node`: the daemon."""

import shlex
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.options import NODE_OPTIONS, SETTINGS, make_config, refuse_unknown_variables
from node.cli.output import json_option, print_json, progress_bars

if TYPE_CHECKING:
    from node.config import NodeConfig, NodeReady

SERVES_NOTHING: Final = "no blocks; --serve MODEL serves some"


@click.command(params=[*NODE_OPTIONS], context_settings=SETTINGS)
@json_option
def node(as_json: bool, **options: Any) -> None:
    """Run the daemon: join a swarm and serve blocks of models.

    Options can also be set in the --config file or the environment (METASWARM_DATA_DIR; commas separate values).
    Precedence: flag > environment > file.

    SIGTERM or Ctrl-C drains sessions and leaves; a second one leaves at once. SIGHUP reads --api-keys again; a node
    that was started in a terminal takes it for the end of that and drains. --json prints the content of node.json as
    one line when the node is ready.
    """
    refuse_unknown_variables()
    config = make_config(options)

    import trio

    from node.app import run_node
    from node.cli.logs import ProgressLog, configure_logging

    configure_logging(config.log_level, config.log_format)
    with progress_bars(transient=True) as bars:
        progress = bars if sys.stderr.isatty() and config.log_format == "text" else ProgressLog()
        trio.run(run_node, config, partial(_announce, config, as_json), progress)


def _announce(config: "NodeConfig", as_json: bool, ready: "NodeReady") -> None:
    from node.joining import join_elsewhere, join_here

    if as_json:
        print_json(asdict(ready))
        return
    lines = [
        f"peer     {ready.peer_id}",
        f"api      {ready.api_url}",
        *(f"address  {address}" for address in ready.multiaddrs),
        *([f"serves   {spec}" for spec in config.serve] or [f"serves   {SERVES_NOTHING}"]),
        *([f"draft    {config.draft}"] if config.draft else []),
        f"data     {config.data_dir}",
    ]
    click.echo("\n".join(lines))
    if not ready.multiaddrs:
        return
    click.echo(f"\nto join from another terminal of this machine:\n  {shlex.join(join_here(config, ready))}")
    command = join_elsewhere(config, ready)
    if command is None:
        click.echo("\nother machines cannot reach this node; --listen /ip4/0.0.0.0/tcp/4001 lets them join")
        return
    key = "" if config.swarm_key_file is None else f" that has a copy of {config.swarm_key_file}"
    click.echo(f"\nto join from another machine{key}:\n  {shlex.join(command)}")
