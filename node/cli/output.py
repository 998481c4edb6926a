"""Output of all verbs: results on stdout, everything else on stderr, errors as one line.

rich is imported where it is used, to keep `metaswarm --help` fast.
"""

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import IO, TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, TaskID
    from rich.table import Table

WIDTH_OF_A_FILE: Final = 200
"""Width of tables in files and pipes."""

ProgressCallback = Callable[[str, int, int], None]
"""Called with (stage, done, total), from any thread; a total of 0 means unknown."""


class CommandError(click.ClickException):
    """The verb failed, with exit code 1. The message is one line: what failed and what to do."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line."""
        print_error(self.format_message(), file)


json_option = click.option(
    "--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON, and nothing else, on stdout."
)
"""The `--json` that every verb has; the verb's argument is `as_json`."""

api_option = click.option("--api", metavar="URL", help="URL of the node's API (default: the node on this machine).")
"""The `--api` of every verb that talks to a running node."""


model_option = click.option(
    "--model", metavar="MODEL", help="Name or id (8 digits or more); optional if exactly one model is fully served."
)
"""The `--model` of every verb that runs jobs."""


def print_error(message: str, file: IO[Any] | None = None) -> None:
    """Print `metaswarm: message` as one line on stderr."""
    click.echo(f"metaswarm: {printable(' '.join(message.split()))}", file=file, err=True)


def print_json(value: object) -> None:
    """Print one JSON document on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


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

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def new_table(*columns: str, title: str | None = None) -> "Table":
    """Return an empty table; columns that start with `>` are right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """Show a progress bar for each stage on stderr; one line for each stage if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield _print_stages()
        return

    from rich.progress import Progress

    with Progress(*_progress_columns(), console=err()) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(printable(stage), total=total or None)
            progress.update(tasks[stage], completed=done, total=total or None)

        yield show


def _progress_columns() -> tuple["ProgressColumn", ...]:
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    description = TextColumn("{task.description}", markup=False)
    return SpinnerColumn(), description, BarColumn(), TaskProgressColumn(), TimeRemainingColumn()


@contextmanager
def passing_progress_bars() -> Iterator[ProgressCallback]:
    """Show progress bars that disappear when done, for a daemon; none if stderr is not a terminal."""
    from rich.progress import Progress

    if not sys.stderr.isatty():
        yield lambda _stage, _done, _total: None
        return
    lock = Lock()
    shown = Progress(*_progress_columns(), console=err(), transient=True)
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        with lock:
            if stage not in tasks:
                shown.start()
                tasks[stage] = shown.add_task(printable(stage), total=total or None)
            shown.update(tasks[stage], completed=done, total=total or None)
            if done >= total > 0:
                shown.remove_task(tasks.pop(stage))
            if not tasks:
                shown.stop()

    try:
        yield show
    finally:
        shown.stop()


def _print_stages() -> ProgressCallback:
    seen: set[str] = set()

    def show(stage: str, done: int, total: int) -> None:
        del done, total
        if stage not in seen:
            seen.add(stage)
            click.echo(printable(stage), err=True)

    return show


def format_bytes(count: float) -> str:
    """Format a size in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Format a duration: `0.35 s`, `12 s`, `5 min`, `3.2 h`, `4 d`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} d"
