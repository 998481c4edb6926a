"""Chat templates of models, rendered as transformers does: only in processes with limits, see `tokenizer_worker`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from node.models.errors import ChatTemplateError
from node.models.turns import mended_turns
from node.util.text import one_line

MAX_PROMPT_CHARACTERS: Final = 8 << 20

_END_OF_MESSAGE: Final = "\ue000end of the last message\ue000"
"""Where the last message ends in a rendered conversation, before what the template puts behind it."""


class ChatTemplate:
    """A compiled chat template, rendered as transformers does."""

    def __init__(self, source: str) -> None:
        """Compile a template; raise ChatTemplateError when it is not valid."""
        with _contained("is broken"):  # compiling folds constants, and so may take as long as rendering
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
            )
            environment.filters["tojson"] = _tojson
            environment.globals["raise_exception"] = _raise_exception
            environment.globals["strftime_now"] = lambda layout: datetime.now().astimezone().strftime(layout)
            self._template = environment.from_string(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        *,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt of a conversation: it ends where the assistant's answer begins.

        `special_tokens` maps names such as `bos_token` to their text. `options`: further variables.
        `continue_final_message`: it ends where the last message does, which the answer continues. A conversation that
        the template refuses is rendered as `mended_turns` makes it. Raises ChatTemplateError.
        """
        turns = messages
        while True:
            try:
                return self._render(turns, special_tokens, tools, options, continue_final_message)
            except ChatTemplateError as error:
                mended = mended_turns(turns, str(error))
                if mended is None:
                    raise
                turns = mended

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None,
        continue_final_message: bool,
    ) -> str:
        turns = [dict(message) for message in messages]
        if continue_final_message:
            turns[-1]["content"] += _END_OF_MESSAGE
        values = {
            **(options or {}),
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
            **special_tokens,
            "messages": turns,
            "add_generation_prompt": not continue_final_message,
        }
        with _contained("fails on these messages"):
            text = "".join(_limited(self._template.generate(values)))
            text.encode()  # a template can spell half a surrogate pair, which no tokenizer takes
        if not continue_final_message:
            return text
        before, mark, _ = text.rpartition(_END_OF_MESSAGE)
        if not mark:
            raise ChatTemplateError("the model's chat template leaves out the last message: it cannot be continued")
        return before


@contextmanager
def _contained(failure: str) -> Iterator[None]:
    try:
        yield
    except (ChatTemplateError, MemoryError):
        raise
    except Exception as error:  # a template can make Python raise anything that code without I/O can
        raise ChatTemplateError(f"the model's chat template {failure}: {one_line(error)}") from error


def _limited(pieces: Iterable[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_PROMPT_CHARACTERS:
            raise ChatTemplateError("the model's chat template makes too long a prompt")
        yield piece


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training. For a prompt it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own, transformers' filter escapes nothing for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
