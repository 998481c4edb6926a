"""`metaswarm keygen`: writes the key of a private swarm."""

import os
import secrets
from pathlib import Path

import click

from node.cli.output import CommandError, json_option, print_json


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=Path("swarm.key"))
@json_option
def keygen(file: Path, as_json: bool) -> None:
    """Write the key of a new private swarm to FILE (default: swarm.key), mode 0600.

    Only nodes with the same `--swarm-key FILE` can connect to each other.
    """
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
