"""Output of all verbs: results on stdout, everything else on stderr, errors as one line.

rich is imported where it is used, to keep `metaswarm --help` fast.
"""

import codecs
import json
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Final, TextIO

import click

from node.cli.completion import complete_models, complete_peers
from node.util.json_line import json_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

EXIT_USAGE: Final = 2
"""What the command line exits with where it was used wrongly."""
WIDTH_OF_A_FILE: Final = 200
"""Width of tables in files and pipes."""

ProgressCallback = Callable[[str, int, int], None]
"""Called with (stage, done, total), from any thread; a total of 0 means unknown, an empty stage that all are over."""


class CommandError(click.ClickException):
    """The verb failed, with exit code 1. The message is one line: what failed and what to do."""


json_option = click.option(
    "--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON, and nothing else, on stdout."
)
"""The `--json` that every verb has; the verb's argument is `as_json`."""

api_option = click.option("--api", metavar="URL", help="URL of the node's API [default: the node on this machine].")
"""The `--api` of every verb that talks to a running node."""

bootstrap_option = click.option(
    "--bootstrap",
    multiple=True,
    metavar="FILE_OR_MULTIADDR",
    shell_complete=complete_peers,
    help="If no node runs here, join the swarm there for this command. Honours METASWARM_SWARM_KEY.",
)
"""The `--bootstrap` of every verb that runs jobs."""

model_option = click.option(
    "--model",
    metavar="MODEL",
    shell_complete=complete_models,
    help="Name or id (8 digits or more, 16 if only peers have it); optional if exactly one model is fully served.",
)
"""The `--model` of every verb that runs jobs."""


def print_error(message: str) -> None:
    """Print `metaswarm: message` as one line on stderr."""
    click.echo(f"metaswarm: {printable(' '.join(message.split()))}", err=True)


def print_json(value: object) -> None:
    """Print one JSON document on one line of stdout, in ASCII where that is not UTF-8."""
    click.echo(json_line(value) if is_utf8(sys.stdout) else json.dumps(value))


def is_utf8(stream: TextIO) -> bool:
    """Return whether a stream takes every character."""
    return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name == "utf-8"


def printable(text: str) -> str:
    r"""Return `text` without control characters other than \n and \t.

    Text from models and peers must not control the terminal.
    """
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def out() -> "Console":
    """Return a console on stdout, for results; coloured on terminals, unless NO_COLOR is set."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_A_FILE
    return Console(highlight=False, markup=False, emoji=False, width=width)


def err() -> "Console":
    """Return a console on stderr."""
    from rich.console import Console

    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else WIDTH_OF_A_FILE
    return Console(stderr=True, highlight=False, markup=False, emoji=False, width=width)


def new_table(*columns: str, title: str | None = None) -> "Table":
    """Return an empty table; columns that start with `>` are right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


@contextmanager
def progress_bars(*, transient: bool = False) -> Iterator[ProgressCallback]:
    """Show a progress bar for each stage on stderr; one line for each stage if stderr is not a terminal.

    `transient`, for a daemon: bars disappear when done, those of unknown length when another stage reports, and all at
    an empty stage; only a terminal shows any.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    description = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), description, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    is_terminal = sys.stderr.isatty()
    progress = Progress(*columns, console=err(), transient=transient, disable=not is_terminal)
    tasks: dict[str, TaskID] = {}
    endless: set[str] = set()
    lock = Lock()

    def end(stages: Iterable[str]) -> None:
        for stage in stages:
            progress.remove_task(tasks.pop(stage))
            endless.discard(stage)

    def show(stage: str, done: int, total: int) -> None:
        with lock:
            if transient:
                end(list(endless - {stage}) if stage else list(tasks))
            if stage and stage not in tasks:
                progress.start()
                tasks[stage] = progress.add_task(printable(stage), total=total or None)
                if not is_terminal and not transient:
                    click.echo(printable(stage), err=True)
            if stage:
                progress.update(tasks[stage], completed=done, total=total or None)
                (endless.discard if total else endless.add)(stage)
            if transient and done >= total > 0:
                end([stage])
            if not tasks:
                progress.stop()

    try:
        yield show
    finally:
        progress.stop()


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """Format a size in binary units: `1.5 GiB`."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(4, int(math.log2(count)) // 10)
    return f"{count / 1024**power:.1f} {'BKMGT'[power]}iB"


def format_duration(seconds: float) -> str:
    """Format a duration: `0.35 s`, `12 s`, `5 min`, `3.2 h`, `4 d`."""
    scales = ((10, 1, ".2f", "s"), (120, 1, ".0f", "s"), (7200, 60, ".0f", "min"), (172800, 3600, ".1f", "h"))
    below = (scale[1:] for scale in scales if seconds < scale[0])
    size, form, unit = next(below, (86400, ".0f", "d"))
    return f"{seconds / size:{form}} {unit}"
