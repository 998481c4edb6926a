"""`metaswarm node`: the daemon."""

import shlex
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.output import json_option, passing_progress_bars, print_json

if TYPE_CHECKING:
    from node.config import NodeConfig, NodeReady

SERVES_NOTHING: Final = "no blocks: start it with --serve MODEL to serve some"


@click.command()
@click.option("--data-dir", metavar="DIR", help="Where identity and history are kept; two nodes need two.")
@click.option("--cache-dir", metavar="DIR", help="Where model packages are kept; nodes share it.")
@click.option(
    "--cache-limit",
    metavar="BYTES",
    help="What weight files from peers may take there, e.g. 50GiB; those used least recently go, never what is served.",
)
@click.option(
    "--listen",
    metavar="MULTIADDR",
    multiple=True,
    help="Where other peers reach this one, e.g. /ip4/0.0.0.0/tcp/4001 (the default); port 0 takes a free one.",
)
@click.option(
    "--api", metavar="HOST:PORT", help="Where the HTTP API listens (default 127.0.0.1:8642); port 0 takes a free one."
)
@click.option(
    "--api-key",
    metavar="KEY",
    help="What clients of the API must present; needed on any but a loopback address. Others on this machine can see "
    "flags: METASWARM_API_KEY is better.",
)
@click.option(
    "--bootstrap",
    metavar="FILE_OR_MULTIADDR",
    multiple=True,
    help="Peers to dial first: a multiaddr that ends in /p2p/ and an id, or a YAML file `peers: [...]`.",
)
@click.option(
    "--serve",
    metavar="MODEL[:START-END]",
    multiple=True,
    help="Serve blocks START up to, not including, END of a model; without a range the node chooses.",
)
@click.option(
    "--draft",
    metavar="MODEL",
    help="A model that is kept whole beside the first blocks, and guesses what the served one will say: it should be "
    "several times quicker, and must have the same tokenizer.",
)
@click.option("--swarm-key", metavar="FILE", help="Key of a private swarm, from `metaswarm keygen`.")
@click.option("--config", metavar="FILE", help="TOML file with any of these options, dashes as underscores.")
@click.option(
    "--memory",
    metavar="BYTES",
    help="What weights, KV caches and kept outputs may take, e.g. 4GiB; on a GPU, the first two of its memory.",
)
@click.option("--no-mdns", is_flag=True, help="Neither look for peers on the local network nor be found there.")
@click.option("--no-catalogue", is_flag=True, help="Never download a model from its source, only from peers.")
@click.option("--threads", metavar="N", help="Threads of the engine.")
@click.option(
    "--device", metavar="NAME", help="What computes: auto (the default: a GPU where torch has one), cpu, cuda:N or mps."
)
@click.option(
    "--batching", metavar="HOW", help="How sessions share the engine: one, static or continuous (the default)."
)
@click.option(
    "--epoch", metavar="SECONDS", help="Length of an epoch of the consensus (default 600), the same at every peer."
)
@click.option(
    "--checkpoint",
    metavar="STATEMENT",
    multiple=True,
    help="Stand by the branch with this statement, as `metaswarm status` shows it, whoever signed another.",
)
@click.option(
    "--exploration", metavar="SHARE", help="Part of the jobs' time that trying methods may cost, 0 to 1 [default: 0.1]."
)
@click.option("--log-level", metavar="LEVEL", help="debug, info (the default), warning or error.")
@json_option
def node(as_json: bool, **flags: Any) -> None:
    """Run the daemon: take part in a swarm and serve blocks of models.

    Every option can also stand in the --config file or in the environment, as METASWARM_ and its name
    (METASWARM_DATA_DIR; commas between several values). A flag prevails over the environment, that over the file.

    SIGTERM or Ctrl-C: finish the jobs at hand and leave; a second one leaves at once. With --json one line of JSON, the
    content of node.json, is printed when the node is ready.
    """
    from node.config import load_config

    config = load_config(flags)

    import trio

    from node.app import run_node
    from node.cli.logs import configure_logging

    configure_logging(config.log_level)
    announce = _announce_as_json if as_json else partial(_announce, config)
    with passing_progress_bars() as progress:
        trio.run(run_node, config, announce, progress)


def _announce_as_json(ready: "NodeReady") -> None:
    print_json(ready.to_json())


def _announce(config: "NodeConfig", ready: "NodeReady") -> None:
    from node.joining import join_elsewhere, join_here

    lines = [
        f"peer     {ready.peer_id}",
        f"api      {ready.api_url}",
        *(f"address  {address}" for address in ready.multiaddrs),
        *([f"serves   {spec}" for spec in config.serve] or [f"serves   {SERVES_NOTHING}"]),
        *([f"guesses  with {config.draft}"] if config.draft else []),
        f"data     {config.data_dir}",
    ]
    click.echo("\n".join(lines))
    if not ready.multiaddrs:
        return
    click.echo(f"\nto join from another terminal of this machine:\n  {shlex.join(join_here(config, ready))}")
    command = join_elsewhere(config, ready)
    if command is None:
        click.echo(
            "\nother machines cannot reach this node: start it with --listen /ip4/0.0.0.0/tcp/4001 if they are to join"
        )
        return
    key = "" if config.swarm_key_file is None else f" that has a copy of {config.swarm_key_file}"
    click.echo(f"\nto join from another machine{key}:\n  {shlex.join(command)}")
