"""Renders a model's chat template as transformers does.

A template is a program from strangers. jinja2's sandbox isolates it from Python, but does not bound time and memory. So
only `tokenizer_worker` uses this module, in a process with limits.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from node.models.errors import ChatTemplateError
from node.util.text import one_line

MAX_OUTPUT_CHARACTERS: Final = 8 << 20


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        """Compile a template; raise ChatTemplateError when it is not valid."""
        with _contained("is broken"):  # compiling folds constants, and so may take as long as rendering
            self._template = _new_environment().from_string(source)

    def render(self, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
        """Return the prompt of a conversation, ending where the assistant's answer begins.

        `special_tokens` maps names such as `bos_token` to their text. Raises ChatTemplateError.
        """
        values = {
            "tools": None,
            "documents": None,
            **special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": True,
        }
        with _contained("fails on these messages"):
            text = "".join(_limited(self._template.generate(values)))
            text.encode()  # a template can spell half a surrogate pair, which no tokenizer takes
            return text


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
        if length > MAX_OUTPUT_CHARACTERS:
            raise ChatTemplateError("the model's chat template makes too long a prompt")
        yield piece


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training. For a prompt it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _new_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


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


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)
