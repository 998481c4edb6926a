"""Renders a model's chat template as transformers does, without trusting it.

A template is a program, and it comes with the model, which may come from strangers. jinja2's sandbox keeps it away from
Python; what the sandbox does not bound is time and memory. So every template runs on a budget here: loops and calls
cost steps, texts cost characters, and both are charged before the work is done.
"""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARACTERS: Final = 1 << 20
MAX_OUTPUT_CHARACTERS: Final = 8 << 20
MAX_STEPS: Final = 200_000
MAX_WORK_CHARACTERS: Final = 64 << 20
MAX_RENDER_S: Final = 5.0

_MAX_INTEGER_BITS = 64
_MAX_WIDTH = 1000
_ITEM_CHARACTERS = 48  # what an item of a list costs, though its text be short
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\d{4,}|\*)")

# Methods that make long texts out of short ones.
_FORBIDDEN_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill"})
_QUICK_FILTERS = frozenset({"count", "d", "default", "first", "items", "last", "length"})
_FORBIDDEN_FILTERS = ("attr", "format", "pprint", "random", "urlize", "wordwrap", "xmlattr")


class ChatTemplateError(ValueError):
    """The conversation cannot be rendered: the template refuses it or is broken. The message is one line."""


class ChatTemplate:
    """A compiled chat template. `render` may be called from any thread."""

    def __init__(self, source: str) -> None:
        """Compile a template; raise ChatTemplateError when it is none."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ChatTemplateError("the model's chat template is too long")
        environment = _new_environment()
        with _spending(), _contained("is broken"):  # jinja2 already computes what is constant
            tree = _Charged(environment).visit(environment.parse(source))
            self._template = jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)

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
        with _spending(), _contained("fails on these messages"):
            return "".join(_limited(self._template.generate(values)))


@dataclass(slots=True)
class _Budget:
    """What is left to one rendering."""

    steps: int
    characters: int
    deadline_s: float = 0.0

    def __post_init__(self) -> None:
        self.deadline_s = time.monotonic() + MAX_RENDER_S

    def charge(self, *, steps: int = 0, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0 or time.monotonic() > self.deadline_s:
            raise ChatTemplateError("the model's chat template takes too much time or memory")


_budget: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def _spending() -> Iterator[None]:
    token = _budget.set(_Budget(steps=MAX_STEPS, characters=MAX_WORK_CHARACTERS))
    try:
        yield
    finally:
        _budget.reset(token)


@contextmanager
def _contained(failure: str) -> Iterator[None]:
    try:
        yield
    except ChatTemplateError:
        raise
    except Exception as error:  # a template can make Python raise anything that code without I/O can
        raise ChatTemplateError(f"the model's chat template {failure}: {_one_line(error)}") from error


def _limited(pieces: Iterable[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_OUTPUT_CHARACTERS:
            raise ChatTemplateError("the model's chat template makes too long a prompt")
        yield piece


def _charge_value(value: object) -> None:
    """Charge what a value's text would take, at least; containers may hold one long text many times."""
    budget = _budget.get()
    todo: list[Iterable[object]] = [(value,)]
    while todo:
        for item in todo.pop():
            if isinstance(item, str):
                budget.charge(characters=len(item) + 1)
            elif isinstance(item, Mapping):
                budget.charge(characters=_cost(item))
                todo += [item.keys(), item.values()]
            elif isinstance(item, (list, tuple)):
                budget.charge(characters=_cost(item))
                todo.append(item)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a price on whatever makes values larger."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            if operator == "**" or _bits(left) + _bits(right) > _MAX_INTEGER_BITS:
                raise ChatTemplateError("the model's chat template calculates with numbers that are too large")
        elif operator == "*":
            times, sequence = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(sequence, (str, list, tuple)):
                _budget.get().charge(characters=_cost(sequence) * max(times, 0))
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise ChatTemplateError("the model's chat template formats texts that are too wide")
        else:
            _charge_value(right) if operator == "%" else _budget.get().charge(characters=_cost(left) + _cost(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as the base class
        budget = _budget.get()
        budget.charge(steps=1)
        _check_widths(args, kwargs)
        owner, method = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if method in {"join", "replace"}:
                return _FILTERS_WITH_PRICE[method](*((args[0], owner) if method == "join" else (owner, *args)))
            budget.charge(characters=len(owner))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is not None:
            raise ChatTemplateError("the model's chat template formats texts in a way that is not supported")
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        forbidden = isinstance(obj, (str, bytes)) and attr in _FORBIDDEN_METHODS
        return not forbidden and super().is_safe_attribute(obj, attr, value)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training. For a prompt it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Charged(NodeTransformer):
    """Sends loops and concatenations, which the sandbox does not see, through filters that charge for them."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2 names it after the node
        if node.recursive:
            raise ChatTemplateError("the model's chat template has a recursive loop, which is not supported")
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "_charge_loop")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filtered(nodes.List(node.nodes), "_concatenate")

    def _filtered(self, value: nodes.Node, name: str) -> nodes.Filter:
        filtered = nodes.Filter(value, name, [], [], None, None)
        filtered.set_environment(self._environment)
        return filtered


def _charge_loop(items: Iterable[object]) -> list[object]:
    budget = _budget.get()
    taken = list(itertools.islice(items, MAX_STEPS + 1))
    budget.charge(steps=len(taken) + 1)
    return taken


def _concatenate(items: Sequence[object]) -> str:
    _charge_value(items)
    return "".join(map(str, items))


def _join(items: Iterable[object], separator: object = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        raise ChatTemplateError("the model's chat template joins by attribute, which is not supported")
    taken = _charge_loop(items)
    _charge_value(taken)
    _budget.get().charge(characters=len(str(separator)) * len(taken))
    return str(separator).join(map(str, taken))


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    _charge_value(text)
    text, old, new = str(text), str(old), str(new)
    _budget.get().charge(characters=len(text) + len(new) * (text.count(old) + 1))
    return text.replace(old, new, -1 if count is None else count)


def _string(value: object) -> str:
    _charge_value(value)
    return str(value)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own, transformers' filter escapes nothing for HTML.
    if indent is not None and not 0 <= indent <= 16:
        raise ChatTemplateError("the model's chat template indents too far")
    _charge_value(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_FILTERS_WITH_PRICE: Final[Mapping[str, Callable[..., Any]]] = {
    "join": _join,
    "replace": _replace,
    "string": _string,
    "tojson": _tojson,
    "_charge_loop": _charge_loop,
    "_concatenate": _concatenate,
}


def _new_environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    for name in _FORBIDDEN_FILTERS:
        del environment.filters[name]
    for name in environment.filters.keys() - _QUICK_FILTERS:
        environment.filters[name] = _with_price(environment.filters[name])
    environment.filters.update(_FILTERS_WITH_PRICE)
    environment.finalize = _finalize
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    for name in ("cycler", "joiner", "lipsum"):
        del environment.globals[name]
    return environment


def _with_price(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that charges for its input, and refuses arguments that could make its output huge."""

    def charged(*args: Any, **kwargs: Any) -> Any:
        _check_widths(args, kwargs)
        _budget.get().charge(steps=1, characters=sum(_cost(argument) for argument in args))
        return function(*args, **kwargs)

    if hasattr(function, "jinja_pass_arg"):  # how jinja2 marks filters that want its context as first argument
        charged.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return charged


def _check_widths(args: Iterable[object], kwargs: Mapping[str, object]) -> None:
    """Refuse large integers among the arguments of a call or filter; `range` has a limit of its own."""
    for argument in itertools.chain(args, kwargs.values()):
        if isinstance(argument, int) and abs(argument) > MAX_STEPS:
            raise ChatTemplateError("the model's chat template uses numbers that are too large")


def _finalize(value: object) -> object:
    """Charge for what is about to be written out."""
    _charge_value(value)
    return value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    if len(layout) > _MAX_WIDTH or re.search(r"\d{3,}", layout):
        raise ChatTemplateError("the model's chat template formats the date too wide")
    return datetime.now().astimezone().strftime(layout)


def _cost(value: object) -> int:
    """Return what looking at each part of a value once costs, in characters."""
    if isinstance(value, str):
        return len(value) + 1
    return _ITEM_CHARACTERS * (len(value) + 1) if isinstance(value, (list, tuple, dict, range)) else 1


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
