"""`metaswarm status`, `peers` and `models`: the status pages of a node."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from node.cli.output import api_option, json_option, out, print_json
from node.cli.status_tables import WATCH_INTERVAL_S, render_models, render_peers, render_status

if TYPE_CHECKING:
    from rich.console import RenderableType


_Verb = Callable[[str | None, bool, bool], None]
_Render = Callable[[Any], "RenderableType"]


def _page_options(verb: _Verb) -> _Verb:
    """Add the options of a verb that shows a page."""
    watch_option = click.option("--watch", is_flag=True, help="Refresh every two seconds, until q or Ctrl-C.")
    return api_option(watch_option(json_option(verb)))


@click.command()
@_page_options
def status(api: str | None, watch: bool, as_json: bool) -> None:
    """Show the status of a node.

    With --watch on a terminal: peers, blocks, jobs, tokens per second and load, as they change.
    """
    _show("/swarm/status", api, render_status, watch=watch, as_json=as_json)


@click.command()
@_page_options
def peers(api: str | None, watch: bool, as_json: bool) -> None:
    """Show the peers of the swarm and what they serve."""
    _show("/swarm/peers", api, render_peers, watch=watch, as_json=as_json)


@click.command()
@_page_options
def models(api: str | None, watch: bool, as_json: bool) -> None:
    """Show which models of the swarm are complete, block by block.

    One digit for each block: the number of peers that serve it. `metaswarm model list` shows the packages of this
    machine.
    """
    _show("/swarm/models", api, render_models, watch=watch, as_json=as_json)


def _show(path: str, api: str | None, render: _Render, *, watch: bool, as_json: bool) -> None:
    """Show a page of the API; with `watch` again and again: as a live view on a terminal."""
    import trio

    from node.cli.client import find_api, open_client

    async def run() -> None:
        async with open_client(find_api(api)) as client:

            async def fetch() -> "RenderableType":
                return render(await client.request("GET", path))

            if watch and sys.stdout.isatty() and not as_json:
                from node.cli.watch import Overview
                from node.cli.watch import watch as watch_live

                await watch_live(Overview(client).fetch if path == "/swarm/status" else fetch)
                return
            while True:
                document = await client.request("GET", path)
                print_json(document) if as_json else out().print(render(document))
                if not watch:
                    return
                await trio.sleep(WATCH_INTERVAL_S)

    trio.run(run)
