"""`metaswarm keygen`: writes the key of a private swarm, or a new key of the HTTP API."""

import os
import secrets
from pathlib import Path

import click

from node.cli.output import CommandError, json_option, print_json
from node.config import hash_api_key


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option(
    "--api-key-name", "name", metavar="NAME", help="Add an API key to FILE (default: api.keys), and print it."
)
@click.option("--requests-per-minute", type=click.IntRange(1, 999_999_999), metavar="N", help="Limit of the API key.")
@click.option(
    "--concurrency", type=click.IntRange(1, 999_999_999), metavar="N", help="Answers at a time with the API key."
)
@json_option
def keygen(
    file: Path | None, name: str | None, requests_per_minute: int | None, concurrency: int | None, as_json: bool
) -> None:
    """Write the key of a new private swarm to FILE (default: swarm.key), mode 0600.

    Only nodes with the same `--swarm-key FILE` can connect to each other.

    With --api-key-name, a line with the hash of a new API key is added to FILE (default: api.keys), for
    `metaswarm node --api-keys FILE`; the key is printed this once.
    """
    limits = {"requests_per_minute": requests_per_minute, "concurrency": concurrency}
    if name is not None:
        _add_api_key(file or Path("api.keys"), name, limits, as_json=as_json)
        return
    if any(limit is not None for limit in limits.values()):
        raise click.UsageError("--requests-per-minute and --concurrency belong to --api-key-name NAME")
    file = file or Path("swarm.key")
    try:
        # O_EXCL: never overwrite a key. The mode is set at creation, so that it is never readable by others.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise CommandError(f"{file} exists: choose another file") from None
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as opened:
        opened.write(secrets.token_hex(32) + "\n")
    if as_json:
        print_json({"swarm_key": str(file.absolute())})
    else:
        click.echo(f"wrote {file}; members of the swarm start `metaswarm node --swarm-key {file}`")


def _add_api_key(file: Path, name: str, limits: dict[str, int | None], *, as_json: bool) -> None:
    """Add a line with the hash of a new key, and print the key."""
    if not name.isprintable() or len(name.split()) != 1 or "#" in name:
        raise click.UsageError(f"--api-key-name: expected a name without spaces, not {name!r}")
    key = f"msk-{secrets.token_urlsafe(32)}"
    words = [name, hash_api_key(key), *(f"{option}={value}" for option, value in limits.items() if value is not None)]
    try:
        with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as opened:
            size = opened.seek(0, os.SEEK_END)
            is_torn = size > 0 and os.pread(opened.fileno(), 1, size - 1) != b"\n"
            opened.write(("\n" * is_torn + " ".join(words) + "\n").encode())
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}") from None
    if as_json:
        print_json({"api_keys": str(file.absolute()), "name": name, "key": key})
    else:
        click.echo(key)
        how = f"start `metaswarm node --api-keys {file}`, or send SIGHUP to the one that runs with it"
        click.echo(f"wrote its hash to {file}; {how}", err=True)
