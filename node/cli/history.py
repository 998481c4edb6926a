"""`metaswarm history …`: exports, imports and verifies the history, also while a node runs in the data directory."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import click

from node.cli.output import CommandError, format_duration, json_option, plural, print_error, print_json, progress_bars
from node.config import chosen_data_dir
from node.util.paths import expand

if TYPE_CHECKING:
    from node.storage.verification import HistoryVerification
    from protocol.observations import SignedObservation

MAX_SHOWN: Final = 20
"""Faults that are listed; the rest are counted. A file with none but other lines before is refused as a whole."""

BATCH: Final = 500

Progress = Callable[[int, int], None]


def _read_data_dir(_context: click.Context, _option: click.Parameter, flag: str | None) -> Path:
    return chosen_data_dir() if flag is None else expand(flag)


_data_dir_option = click.option(
    "--data-dir",
    metavar="DIR",
    callback=_read_data_dir,
    help="Data directory of the node [default: METASWARM_DATA_DIR, the configuration file's, or the user's].",
)


@click.group("history")
def history_group() -> None:
    """Export, import and verify the history of performance observations."""


@history_group.command()
@_data_dir_option
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Output file [default: stdout]."
)
@json_option
def export(data_dir: Path, output: Path | None, as_json: bool) -> None:
    """Write the observations as JSON lines.

    Each has readable fields and, as `record`, the signed original, which `metaswarm history import` reads.
    `pandas.read_json(FILE, lines=True)` loads the file.
    """
    path = _existing(data_dir)
    if output is not None and output.suffix == ".parquet":
        raise click.UsageError(
            f"{output} would hold JSON lines, not Parquet: write FILE.jsonl, and convert it with "
            "pandas.read_json(FILE, lines=True).to_parquet(...)"
        )
    if output is None:
        with _as_command_errors():
            _export(path, sys.stdout, lambda done, total: None)
        return
    with _as_command_errors(output), _atomic_write(output) as lines, progress_bars() as progress:
        count = _export(path, lines, partial(progress, f"exporting to {output}"))
    if as_json:
        print_json({"exported": count, "file": str(output.absolute())})
    else:
        click.echo(f"exported {plural(count, 'observation')} to {output}")


@history_group.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_data_dir_option
@json_option
def import_(file: Path, data_dir: Path, as_json: bool) -> int:
    """Add the observations in FILE, as written by `metaswarm history export`.

    Invalid lines are reported and skipped, and the exit code is 1.
    """
    from node.storage.database import DATABASE_FILE

    with _as_command_errors(file), progress_bars() as progress:
        result = _import(data_dir / DATABASE_FILE, file, partial(progress, f"importing {file}"))
    for number, reason in list(result.rejected.items())[:MAX_SHOWN]:
        print_error(f"{file}, line {number}: {reason}")
    if len(result.rejected) > MAX_SHOWN:
        print_error(f"and {len(result.rejected) - MAX_SHOWN} more invalid lines")
    if as_json:
        rejected = [{"line": number, "reason": reason} for number, reason in result.rejected.items()]
        print_json({"read": result.read, "new": result.new, "known": result.known, "rejected": rejected})
    else:
        click.echo(
            f"read {plural(result.read, 'observation')}: {result.new} new, {result.known} known already, "
            f"{len(result.rejected)} rejected"
        )
    return 1 if result.rejected else 0


@history_group.command()
@_data_dir_option
@click.option("--repair", is_flag=True, help="Delete invalid records; they are re-synced from peers.")
@json_option
def verify(data_dir: Path, repair: bool, as_json: bool) -> int:
    """Verify all signatures, ids and digests of the history."""
    path = _existing(data_dir)
    began_s = time.monotonic()
    with _as_command_errors(), progress_bars() as progress:
        found, digest = _verify(path, repair, partial(progress, "verifying"))
    faults = [{"id": content_id.hex(), "reason": reason} for content_id, reason in found.faults.items()]
    for fault in faults[:MAX_SHOWN]:
        print_error(f"observation {fault['id'][:16]}…: {fault['reason']}")
    if as_json:
        counts = {"observations": found.count, "countersigned": found.countersigned, "digest": digest.hex()}
        print_json({**counts, "faults": faults, "repaired": repair})
    else:
        took = format_duration(time.monotonic() - began_s)
        click.echo(
            f"verified {plural(found.count, 'observation')} in {took}: "
            f"{found.countersigned} countersigned by every stage, "
            f"{len(faults)} invalid{' and deleted' if faults and repair else ''}; digest {digest.hex()}"
        )
    return 1 if faults and not repair else 0


@dataclass(slots=True)
class _Import:
    """Counts of an import; `rejected`: faults by line number, from 1."""

    read: int = 0
    new: int = 0
    known: int = 0
    rejected: dict[int, str] = field(default_factory=dict)


def _export(path: Path, file: IO[str], progress: Progress) -> int:
    import trio

    from node.storage.database import open_database
    from node.storage.dataset import to_row
    from node.storage.history import HistoryStore
    from protocol.observations import decode_verified_observation

    async def run() -> int:
        done = 0
        async with open_database(path, set_aside=False) as database:
            store = HistoryStore(database)
            total = sum((await store.count_by_observer()).values())
            async with aclosing(store.pages()) as pages:
                async for page in pages:
                    for stored in page:
                        row = to_row(decode_verified_observation(stored.envelope))
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    done += len(page)
                    progress(done, total)
        return done

    return trio.run(run)


def _import(path: Path, file: Path, progress: Progress) -> _Import:
    import trio

    from node.storage.database import open_database
    from node.storage.history import HistoryStore

    result = _Import()

    async def run() -> None:
        async with open_database(path, set_aside=False) as database:
            store = HistoryStore(database)
            observations = _verified(file, result, progress)
            while batch := list(islice(observations, BATCH)):
                new = await store.add_many(batch)
                result.new += len(new)
                result.known += len(batch) - len(new)

    trio.run(run)
    return result


def _verify(path: Path, repair: bool, progress: Progress) -> tuple["HistoryVerification", bytes]:
    import trio

    from node.storage.database import open_database
    from node.storage.history import HistoryStore
    from node.storage.verification import verify_history

    async def run() -> tuple["HistoryVerification", bytes]:
        async with open_database(path, set_aside=False) as database:
            store = HistoryStore(database)
            total = sum((await store.count_by_observer()).values())
            found = await verify_history(database, store, lambda done: progress(done, total))
            if repair:
                await store.discard(found.faults)
            return found, (await store.digest()).digest

    return trio.run(run)


def _verified(file: Path, result: _Import, progress: Progress) -> Iterator["SignedObservation"]:
    """Yield the valid observations of a dataset; count all, and note the faults of the others."""
    from node.storage.dataset import DatasetError, NotAnObservationError, from_line

    others = 0

    def refuse_other_files() -> None:
        if others and others == result.read:
            raise DatasetError(f"{file} has no observation: FILE is JSON lines from `metaswarm history export`")

    size = file.stat().st_size
    for number, line in enumerate(_lines(file, progress, size), 1):
        if line == b"\n":
            continue
        result.read += 1
        try:
            yield from_line(line, time.time())
        except DatasetError as error:
            result.rejected[number] = str(error)
            others += isinstance(error, NotAnObservationError)
        if result.read == MAX_SHOWN:
            refuse_other_files()
    if result.read < MAX_SHOWN:
        refuse_other_files()
    progress(size, size)


def _lines(file: Path, progress: Progress, size: int) -> Iterator[bytes]:
    from node.storage.dataset import MAX_LINE_BYTES

    done = 0
    with file.open("rb") as opened:
        while line := opened.readline(MAX_LINE_BYTES + 2):
            done += len(line)
            if len(line) > MAX_LINE_BYTES + 1:
                # Skip the rest of an overlong line without buffering it.
                while rest := opened.readline(MAX_LINE_BYTES):
                    done += len(rest)
                    if rest.endswith(b"\n"):
                        break
            progress(done, size)
            yield line


def _existing(data_dir: Path) -> Path:
    from node.storage.database import DATABASE_FILE

    path = data_dir / DATABASE_FILE
    if not path.exists():
        raise CommandError(f"no history in {data_dir}: set --data-dir to the data directory of a node")
    return path


@contextmanager
def _atomic_write(output: Path) -> Iterator[IO[str]]:
    """Yield a temporary file that replaces the output at the end, or is deleted on errors."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _as_command_errors(path: Path | None = None) -> Iterator[None]:
    """Turn errors into CommandError. `path`: the file that is read or written: a failed write does not name it."""
    from node.storage.database import StorageError
    from node.storage.dataset import DatasetError
    from protocol.errors import RemoteProtocolError

    try:
        yield
    except (StorageError, DatasetError) as error:
        raise CommandError(str(error)) from None
    except RemoteProtocolError as error:
        raise CommandError(f"invalid record in the history ({error}): run `metaswarm history verify`") from None
    except OSError as error:
        where = error.filename or path
        if where is None:  # of stdout, which the command line reports
            raise
        raise CommandError(f"cannot use {where}: {error.strerror}") from None
