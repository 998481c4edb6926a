"""`metaswarm completion SHELL`: the script by which a shell completes the command line."""

from typing import Final

import click
from click.shell_completion import get_completion_class

from node.cli.output import json_option, print_json

SHELLS: Final = ("bash", "zsh", "fish")

VARIABLE: Final = "_METASWARM_COMPLETE"
"""Set by the shells' scripts; see click's documentation."""


_HELP: Final = """Print the completion script of a shell: of verbs, options, models and peers.

\b
bash: metaswarm completion bash > ~/.local/share/bash-completion/completions/metaswarm
zsh:  metaswarm completion zsh > ~/.zfunc/_metaswarm
      and in ~/.zshrc, before compinit: fpath+=~/.zfunc
fish: metaswarm completion fish > ~/.config/fish/completions/metaswarm.fish
"""


@click.command(help=_HELP)
@click.argument("shell", type=click.Choice(SHELLS))
@json_option
def completion(shell: str, as_json: bool) -> None:
    """Print the completion script of a shell."""
    from node.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    made = found(cli, {}, "metaswarm", VARIABLE)
    # Without `source()`, which starts the shell to find out its version.
    script = (made.source_template % made.source_vars()).strip()
    script = script.replace('string split ","', 'string split --max 1 ","')  # fish: a summary may have commas
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
