"""The command line: `metaswarm VERB`. Each verb is a module of its own, imported only when it is called."""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Final

import click

from node.cli.output import CommandError, print_error

VERBS: Final[Mapping[str, tuple[str, str]]] = {
    "demo": ("node.cli.demo:demo", "Run a small swarm on this machine and ask it a question."),
    "node": ("node.cli.daemon:node", "Run the daemon: join a swarm and serve blocks of models."),
    "submit": ("node.cli.submit:submit", "Submit a prompt and stream the text."),
    "status": ("node.cli.status:status", "Show the status of a node."),
    "peers": ("node.cli.status:peers", "Show the peers of the swarm and what they serve."),
    "models": ("node.cli.status:models", "Show which models are complete, block by block."),
    "explain": ("node.cli.explain:explain", "Show which method a task would be served with, and why."),
    "model": ("node.cli.models:model", "Import, list, show, verify and remove model packages."),
    "bench": ("node.cli.bench:bench", "Measure methods over a grid of workloads."),
    "history": ("node.cli.history:history_group", "Export, import and verify the history of observations."),
    "doctor": ("node.cli.doctor:doctor", "Diagnose a node that cannot join, be reached or serve."),
    "evaluate": ("node.cli.evaluate:evaluate", "Evaluate the meta-model and baselines on a dataset."),
    "config": ("node.cli.config:config", "Show or check the configuration of a node."),
    "keygen": ("node.cli.keygen:keygen", "Write the key of a private swarm."),
}
"""Module and help of each verb: `metaswarm --help` imports none of them."""

_CONFIGURED: Final = frozenset({"node", "doctor", "config"})
"""Verbs that refuse unknown METASWARM_… variables; others print a warning."""

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name][0].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, summary) for verb, (_, summary) in VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="metaswarm", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Peer-to-peer inference of large language models."""
    if context.invoked_subcommand not in _CONFIGURED and any(name.startswith("METASWARM_") for name in os.environ):
        from node.cli.options import unknown_variables

        for fault in unknown_variables():
            print_error(f"warning: {fault}")


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    # Also for processes that libraries start: no imports from the current directory.
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one verb and return the exit code; an error is one line on stderr."""
    try:
        result = cli.main(list(arguments), prog_name="metaswarm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except CommandError as error:
        print_error(error.message)
        return EXIT_FAILED
    except click.ClickException as error:
        verb = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "metaswarm"
        print_error(f"{error.format_message().rstrip('.')}; see `{verb} --help`")
        return EXIT_USAGE
    except BrokenPipeError:
        # The reader closed the pipe. Python would raise again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (Exception, BaseExceptionGroup) as error:
        code = _report(error)
        if code is None:
            raise
        return code
    return result if isinstance(result, int) else 0


def _report(error: BaseException) -> int | None:
    """Print an error that is meant for the user and return its exit code; None for anything else, a bug."""
    from node.config import ConfigError, StartError
    from node.engine.interface import EngineError
    from node.models.errors import ModelError
    from node.network.interface import NetworkError

    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:  # nurseries wrap what passes them
        error = error.exceptions[0]
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, CommandError | ConfigError | StartError | EngineError | ModelError | NetworkError):
        print_error(str(error))
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    return None
