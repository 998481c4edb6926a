"""The command line: `metaswarm VERB`. Each verb is a module of its own, imported only when it is called."""

import errno
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Final

import click
from click.shell_completion import CompletionItem

from node.cli.output import EXIT_USAGE, CommandError, is_utf8, print_error
from node.util.suggestions import did_you_mean, suggestion

VERBS: Final[Mapping[str, tuple[str, str]]] = {
    "demo": ("node.cli.demo:demo", "Run a small swarm on this machine and ask it a question."),
    "node": ("node.cli.daemon:node", "Run the daemon: join a swarm and serve blocks of models."),
    "run": ("node.cli.run_model:run", "Run a model: start what is needed, and answer."),
    "chat": ("node.cli.chat:chat", "Converse with a model of the swarm."),
    "submit": ("node.cli.submit:submit", "Submit a prompt, or a file of them."),
    "status": ("node.cli.status:status", "Show the status of a node."),
    "peers": ("node.cli.status:peers", "Show the peers of the swarm and what they serve."),
    "models": ("node.cli.status:models", "Show which models of the swarm are complete, block by block."),
    "explain": ("node.cli.explain:explain", "Show which method a task would be served with, and why."),
    "model": ("node.cli.models:model", "Import, list, show, verify and remove packages on this machine."),
    "bench": ("node.cli.bench:bench", "Measure methods over a grid of workloads."),
    "history": ("node.cli.history:history_group", "Export, import and verify the history of observations."),
    "doctor": ("node.cli.doctor:doctor", "Diagnose a node that cannot join, be reached or serve."),
    "evaluate": ("node.cli.evaluate:evaluate", "Evaluate the meta-model and baselines on a dataset."),
    "config": ("node.cli.config:config", "Show or check the configuration of a node."),
    "keygen": ("node.cli.keygen:keygen", "Write the key of a private swarm, or an API key."),
    "completion": ("node.cli.completion_script:completion", "Print the completion script of a shell."),
}
"""Module and help of each verb: `metaswarm --help` imports none of them."""

ELSEWHERE: Final[Mapping[str, str]] = {
    "serve": "node", "start": "node", "join": "node --bootstrap", "pull": "model import", "import": "model import",
    "list": "model list", "ls": "model list", "rm": "model remove", "show": "model show", "ps": "status",
    "top": "status --watch", "generate": "submit", "complete": "submit", "ask": "run", "help": "--help",
    "version": "--version", "export": "history export", "plot": "evaluate --plot",
}  # fmt: skip
"""What other tools' verbs are called here."""

OPTIONS_ELSEWHERE: Final[Mapping[str, Sequence[str]]] = {
    "--host": ("--api",), "--port": ("--api", "--listen"), "--model": ("--serve",)
}  # fmt: skip
"""The options for what other tools' options say."""

_CONFIGURED: Final = frozenset({"node", "doctor", "config"})
"""Verbs that refuse unknown METASWARM_… variables; others print a warning."""

_UNWRITABLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""The errors of a stdout that takes nothing more, such as a file on a full disk."""

EXIT_FAILED: Final = 1
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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete verbs with their summaries: click would import all of them to read their help."""
        verbs = [CompletionItem(verb, help=what) for verb, (_, what) in VERBS.items() if verb.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in VERBS and not name.startswith("-") and not ctx.resilient_parsing:
            found = name if name in ELSEWHERE else suggestion(name, [*VERBS, *ELSEWHERE])
            hint = f"; did you mean {ELSEWHERE.get(found, found)!r}?" if found else ""
            raise click.UsageError(f"no such verb {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

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
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not is_utf8(stream):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def _open_standard_streams() -> None:
    """Open /dev/null for what was closed (`>&-`): Python has None there, and a socket would get its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def run(arguments: Sequence[str]) -> int:
    """Run one verb and return the exit code; an error is one line on stderr."""
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        if code == 0 and not isinstance(error, BrokenPipeError):  # the reader closed the pipe
            _report(error)
        # Python would raise again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or EXIT_FAILED
    return code


def _run(arguments: Sequence[str]) -> int:
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
        print_error(f"{_message(error).rstrip('.')}; see `{verb} --help`")
        return EXIT_USAGE
    except BrokenPipeError:
        return EXIT_FAILED
    except (Exception, BaseExceptionGroup) as error:
        code = _report(error)
        if code is None:
            raise
        return code
    return result if isinstance(result, int) else 0


def _message(error: click.ClickException) -> str:
    """Return the message of a usage error, with what was most likely meant."""
    if isinstance(error, click.NoSuchOption):
        parameters = error.ctx.command.get_params(error.ctx) if error.ctx else []
        known = [name for each in parameters if isinstance(each, click.Option) for name in each.opts]
        if here := [repr(name) for name in OPTIONS_ELSEWHERE.get(error.option_name, ()) if name in known]:
            return f"no such option {error.option_name!r}; did you mean {' or '.join(here)}?"
        # Without dashes, which all names have in common.
        found = did_you_mean(error.option_name.lstrip("-"), [name.lstrip("-") for name in known], "--")
        return f"no such option {error.option_name!r}{found}"
    if isinstance(error, click.exceptions.NoSuchCommand):
        hint = f"; did you mean {error.possibilities[0]!r}?" if error.possibilities else ""
        return f"no such verb {error.command_name!r}{hint}"
    message = error.format_message()
    if isinstance(error, click.UsageError) and error.ctx and message.startswith("Got unexpected extra argument"):
        parameters = error.ctx.command.get_params(error.ctx)
        takes_none = not any(isinstance(each, click.Argument) for each in parameters)
        if takes_none and any("--output" in each.opts for each in parameters):
            message += ": a file to write is given as --output FILE"
    return message


def _report(error: BaseException) -> int | None:
    """Print an error that is meant for the user and return its exit code; None for anything else, a bug."""
    from node.config import ConfigError, StartError
    from node.engine.interface import EngineError
    from node.models.errors import ModelError
    from node.network.interface import NetworkError

    known = (CommandError, ConfigError, StartError, EngineError, ModelError, NetworkError)
    leaves = list(_leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return EXIT_INTERRUPTED
    failed = [leaf.strerror for leaf in leaves if isinstance(leaf, OSError) and leaf.errno in _UNWRITABLE]
    if len(failed) == len(leaves):
        print_error(f"cannot write the output: {failed[0]}")
        return EXIT_FAILED
    if not all(isinstance(leaf, known) for leaf in leaves):
        return None
    for message in dict.fromkeys(map(str, leaves)):  # of jobs that ran together each reports that the node is gone
        print_error(message)
    return EXIT_USAGE if isinstance(leaves[0], ConfigError) else EXIT_FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in nested groups: nurseries wrap what passes them."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
