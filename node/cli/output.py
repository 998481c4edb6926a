"""How every verb speaks: results on stdout, everything else on stderr, an error as one line.

rich is imported where it is used: `metaswarm --help` should not wait for it.
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
"""In a file or a pipe a table's lines are as long as they need to be."""

ProgressCallback = Callable[[str, int, int], None]
"""Told (stage, done, total) as work goes on, from any thread; a total of 0 means that nobody knows."""


class CommandError(click.ClickException):
    """The verb failed. The message is one line: what is wrong and what to do. Exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line, as every other error of this program."""
        print_error(self.format_message(), file)


json_option = click.option(
    "--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON, and nothing else, on stdout."
)
"""The `--json` that every verb has; the verb's argument is `as_json`."""

api_option = click.option("--api", metavar="URL", help="URL of the node's API (default: the node on this machine).")
"""The `--api` of every verb that talks to a running node."""


def print_error(message: str, file: IO[Any] | None = None) -> None:
    """Print `metaswarm: message` as one line on stderr."""
    click.echo(f"metaswarm: {printable(' '.join(message.split()))}", file=file, err=True)


def print_json(value: object) -> None:
    """Print one JSON document on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


def printable(text: str) -> str:
    r"""Return `text` without control characters other than \n and \t.

    Models and remote peers choose what is printed here; none of it may drive the user's terminal.
    """
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def out() -> "Console":
    """Return a console on stdout, for results. Colours only on a terminal; NO_COLOR is respected."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_A_FILE
    return Console(highlight=False, markup=False, emoji=False, width=width)


def err() -> "Console":
    """Return a console on stderr, for everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def new_table(*columns: str, title: str | None = None) -> "Table":
    """Return an empty table in this program's look; a column that starts with `>` is set right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """Show one bar with an estimate for each stage, on stderr; where that is no terminal, one line for each stage."""
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
    """Show bars as `progress_bars` does, but only while there is something to do: for what runs on and on.

    Where stderr is no terminal nothing is shown, as what runs on has a log.
    """
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
    """Return a byte count for people, in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Return a duration for people: `0.35 s`, `12 s`, `5 min`, `3.2 h`, `4 d`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} d"
