"""`metaswarm chat`: a conversation, line by line."""

import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.job_options import check_text, job_options, make_body
from node.cli.output import (
    CommandError,
    api_option,
    bootstrap_option,
    json_option,
    model_option,
    print_error,
    print_json,
)
from node.cli.target import node_for_command, on_node
from node.config import chosen_data_dir
from node.util.paths import expand
from node.util.suggestions import did_you_mean

if TYPE_CHECKING:
    from node.cli.client import ApiClient

PROMPT: Final = ">>> "
CONTINUED: Final = "... "
QUOTES: Final = '"""'
"""Around a message of several lines."""
HISTORY_FILE: Final = "chat_history"
HISTORY_LINES: Final = 1000

COMMANDS: Final[Mapping[str, str]] = {
    "/system [TEXT]": "set the system message, or show it",
    "/model [NAME]": "change the model, or show which there are",
    "/clear": "forget the conversation, but not the system message",
    "/save FILE": "write the conversation to FILE, as JSON",
    "/help": "show this",
    "/bye": "leave, as Ctrl-D does",
}


@click.command()
@model_option
@api_option
@bootstrap_option
@click.option("--system", metavar="TEXT", help="System message.")
@job_options(temperature=0.7, max_tokens=None)
@json_option
def chat(
    model: str | None, api: str | None, bootstrap: tuple[str, ...], system: str | None, as_json: bool, **options: Any
) -> None:
    """Converse with a model.

    Ctrl-C stops an answer, Ctrl-D leaves; /help shows the commands. Without a terminal each line of stdin is a message
    and never a command; with --json each answer is the document of `metaswarm submit --json`.
    """
    with node_for_command(api, bootstrap) as (url, is_new):
        name = on_node(url, _choose(model, is_new=is_new))
        converse(url, Conversation(name, options, system), as_json=as_json)


def _choose(model: str | None, *, is_new: bool) -> Callable[["ApiClient"], Awaitable[str]]:
    from node.cli.target import DISCOVERY_TIMEOUT_S, choose_model, require_complete

    async def choose(client: "ApiClient") -> str:
        chosen = await choose_model(client, model, DISCOVERY_TIMEOUT_S if is_new else 0.0)
        return require_complete(await client.models(), chosen)

    return choose


@dataclass(slots=True)
class Conversation:
    """What was said so far, and with which model and options it goes on."""

    model: str
    options: Mapping[str, Any]
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages, that of the system first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def body(self) -> dict[str, Any]:
        """Return the body of the request for the next answer."""
        return make_body({**self.options, "model": self.model}, self.model, self.messages)


def converse(url: str, conversation: Conversation, *, as_json: bool = False) -> None:
    """Read messages and commands until the end of the input, and answer them.

    Without a terminal nothing is a command, as the text may be anybody's, and the first failure ends it: what follows
    would be answered out of context.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        click.secho(f"{conversation.model}; /help shows the commands", dim=True, err=True)
    with _line_editing(is_terminal):
        for text, is_command in _read_messages(is_terminal):
            try:
                if not is_command:
                    answer(url, conversation, text, as_json=as_json)
                elif not _run_command(url, conversation, text):
                    return
            except click.ClickException as error:
                if not is_terminal:
                    raise
                print_error(error.format_message())
            except (KeyboardInterrupt, click.Abort):  # the latter at a question
                if not is_terminal:
                    raise


def answer(url: str, conversation: Conversation, text: str, *, as_json: bool = False) -> None:
    """Answer one message, as it comes; Ctrl-C stops it, and what came until then stays part of the conversation."""
    from node.cli.client import ApiClient, Completion
    from node.cli.submit import stream_text, summary

    check_text(text)
    conversation.turns.append({"role": "user", "content": text})
    completion = Completion()
    body = conversation.body()

    async def ask(client: ApiClient) -> None:
        if as_json:
            print_json((await client.complete(body, completion=completion)).document())
        else:
            await stream_text(client, body, completion)

    is_answered = False
    try:
        on_node(url, ask)
        is_answered = True
    except KeyboardInterrupt:
        click.secho("(stopped)", dim=True, err=True)
        raise
    else:
        if sys.stderr.isatty() and not as_json:
            click.secho(summary(completion), dim=True, err=True)
    finally:
        if completion.text or is_answered:
            conversation.turns.append({"role": "assistant", "content": completion.text})
        else:  # it failed, or was stopped before it began: the message would be asked twice
            conversation.turns.pop()


def _read_messages(is_terminal: bool) -> Iterator[tuple[str, bool]]:
    """Yield what is typed, and whether it is a command: a line, or several lines in triple quotes."""
    while (line := _read_line(PROMPT, is_terminal)) is not None:
        text = line.strip()
        is_quoted = text.startswith(QUOTES)
        if is_quoted:
            text = text.removeprefix(QUOTES)
            while not text.endswith(QUOTES):
                if (line := _read_line(CONTINUED, is_terminal)) is None:
                    break
                text += f"\n{line}"
            text = text.removesuffix(QUOTES).strip("\n")
        if text:
            yield text, is_terminal and text.startswith("/") and not is_quoted


def _read_line(prompt: str, is_terminal: bool) -> str | None:
    """Return the next line; None at the end of the input. On a terminal Ctrl-C discards the line."""
    while True:
        try:
            if is_terminal and sys.stdout.isatty():
                return input(prompt)
            if is_terminal:  # stdout, to which `input` would write, is for the answers
                click.echo(prompt, nl=False, err=True)
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        except EOFError:
            click.echo(err=True)
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            click.secho("\n(Ctrl-D leaves)", dim=True, err=True)
        except UnicodeDecodeError as error:
            raise CommandError(f"the input is not UTF-8 text: {error}") from None


def _run_command(url: str, conversation: Conversation, line: str) -> bool:
    """Run a command of the conversation; return whether that goes on. Raises ClickException."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/bye" | "/exit" | "/quit":
            return False
        case "/help" | "/?":
            width = max(map(len, COMMANDS))
            lines = [f"{command:<{width}}  {what}" for command, what in COMMANDS.items()]
            click.echo("\n".join([*lines, f"{QUOTES} begins and ends a message of several lines."]), err=True)
        case "/system":
            if argument:
                conversation.system = argument
            click.echo(conversation.system or "no system message; /system TEXT sets one", err=True)
        case "/model":
            _change_model(url, conversation, argument)
        case "/clear":
            conversation.turns.clear()
            click.echo("conversation cleared", err=True)
        case "/save":
            _save(conversation, argument)
        case _:
            names = [command.partition(" ")[0] for command in COMMANDS]
            hint = did_you_mean(name, names) or "; /help shows them"
            raise click.UsageError(f"no such command {name!r}{hint}")
    return True


def _change_model(url: str, conversation: Conversation, name: str) -> None:
    from node.cli.client import ApiClient
    from node.cli.target import complete_names, require_complete

    models = on_node(url, ApiClient.models)
    if name:
        conversation.model = require_complete(models, name)
    else:
        click.echo("\n".join(complete_names(models)), err=True)
    click.echo(f"the model is {conversation.model}", err=True)


def _save(conversation: Conversation, name: str) -> None:
    if not name:
        raise click.UsageError("/save takes the name of a file")
    document = {"model": conversation.model, "messages": conversation.messages}
    path = expand(name)
    if path.is_file() and not click.confirm(f"{path} exists: overwrite it?", err=True):
        return
    try:
        path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    click.echo(f"wrote {len(conversation.messages)} messages to {path}", err=True)


@contextmanager
def _line_editing(is_terminal: bool) -> Iterator[None]:
    """Let lines be edited and recalled inside the block; what was typed is in the history of the next conversation."""
    try:
        import readline
    except ImportError:  # Python was built without it
        is_terminal = False
    if not is_terminal:
        yield
        return
    names = [command.partition(" ")[0] for command in COMMANDS]

    def complete(text: str, number: int) -> str | None:
        return next(iter([name for name in names if name.startswith(text)][number:]), None)

    path = chosen_data_dir() / HISTORY_FILE
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            readline.write_history_file(path)
