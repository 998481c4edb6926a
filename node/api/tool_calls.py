"""Tool calls as models write them, each family in its own form.

What a model writes is not trusted: a call that no client could read stays text.
"""

import json
import math
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from node.api.errors import ApiError
from node.api.fields import check_depth
from node.coordinator.chat import ToolFormat

MISTRAL_BEGIN: Final = "[TOOL_CALLS]"

MAX_CALLS: Final = 128
"""Tool calls of one answer that are read; the rest stays text."""

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON Schema of each tool's arguments, by its name."""

_BETWEEN_CALLS: Final = re.compile(rf"[ \t\r\n;,]*(?:{re.escape(MISTRAL_BEGIN)})?\s*")  # matches anything
# White space is bounded, as a model may write thousands of it in a row, which patterns would try in every division.
_MISTRAL_CALL: Final = re.compile(r"\s{0,16}([\w.-]{1,256})\s{0,16}(?:\[ARGS\])?\s{0,16}(?=\{)")
_NAME: Final = re.compile(r"[\w.-]{1,256}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. `arguments` is a JSON object."""

    id: str
    name: str
    arguments: str

    @property
    def argument_object(self) -> dict[str, Any]:
        """The arguments as an object, for protocols that have them so."""
        return dict(json.loads(self.arguments))


def decode_arguments(text: str) -> dict[str, Any] | None:
    """Return the object that arguments are as JSON; {} where there are none, None for what no request may have."""
    try:
        value = _decode(text) if text.strip() else None
        check_depth("arguments", value)
    except (ValueError, RecursionError, ApiError):
        return None
    return {} if value is None else value if isinstance(value, dict) else None


def new_id(tool_format: ToolFormat | None) -> str:
    """Return the id of a new call."""
    if tool_format is ToolFormat.MISTRAL:  # its templates take ids of nine letters and digits only
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def parse_calls(body: str, tool_format: ToolFormat | None, tools: Tools) -> list[tuple[str, str]]:
    """Return names and arguments of the calls in a text; none where it is anything else."""
    body = body.strip()
    try:
        if tool_format is ToolFormat.HERMES and not body.startswith(("{", "[")):
            values = [_xml_call(body, tools) or _glm_call(body, tools)]
        else:
            values = _json_calls(body, tool_format)
        calls = [_call_of(value) for value in values]
    except (ValueError, RecursionError):
        return []
    # Without a mark around it, an object that looks like a call may be what was asked for.
    is_marked = tool_format in {ToolFormat.HARMONY, ToolFormat.HERMES, ToolFormat.MISTRAL}
    return calls if is_marked or all(name in tools for name, _ in calls) else []


def may_become_call(text: str) -> bool:
    """Return whether a text may begin a call in the form that a JSON Schema makes."""
    begin = '{"name": "'
    return text.startswith(begin) or begin.startswith(text)


def _json_calls(body: str, tool_format: ToolFormat | None) -> list[Any]:
    """Return the values that calls are written as. Raises ValueError."""
    values: list[Any] = []
    position = 0
    for _ in range(MAX_CALLS):  # empty lists make no calls, and cost as much
        if position >= len(body):
            break
        named = _MISTRAL_CALL.match(body, position) if tool_format is ToolFormat.MISTRAL else None
        value, position = _DECODER.raw_decode(body, named.end() if named else position)
        if named:
            values.append({"name": named[1], "arguments": value})
        else:
            values += value if isinstance(value, list) else [value]
        between = _BETWEEN_CALLS.match(body, position)
        position = between.end() if between else position
    if position < len(body) or len(values) > MAX_CALLS:
        raise ValueError("too many calls")
    return values


def _xml_call(body: str, tools: Tools) -> Any:
    """Return a call as Qwen3-Coder writes it: `<function=NAME><parameter=KEY>VALUE</parameter>…</function>`."""
    if not (body.startswith("<function=") and body.endswith("</function>")):
        return None
    name, position = _between(body, 0, "<function=", ">")
    arguments = []
    while body.find("<parameter=", position) >= 0:
        key, position = _between(body, position, "<parameter=", ">")
        value, position = _between(body, position, "", "</parameter>")
        arguments.append((key, value.removeprefix("\n").removesuffix("\n")))
    return _with_types(name, arguments, tools)


def _glm_call(body: str, tools: Tools) -> Any:
    """Return a call as GLM writes it: `NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…`."""
    name, mark, _ = body.partition("<arg_key>")
    name, position = name.strip(), len(name)
    if not _NAME.fullmatch(name) or not (mark or name in tools):
        return None
    arguments = []
    while body.find("<arg_key>", position) >= 0:
        key, position = _between(body, position, "<arg_key>", "</arg_key>")
        value, position = _between(body, position, "<arg_value>", "</arg_value>")
        arguments.append((key, value))
    return _with_types(name, arguments, tools)


def _between(text: str, position: int, begin: str, end: str) -> tuple[str, int]:
    """Return what is between two marks behind a position, and the position behind it. Raises ValueError."""
    start = text.index(begin, position) + len(begin)
    stop = text.index(end, start)
    return text[start:stop], stop + len(end)


def _with_types(name: str, arguments: Sequence[tuple[str, str]], tools: Tools) -> dict[str, Any]:
    """Return a call whose arguments are text: those that are not declared as text are read as JSON."""
    properties = tools.get(name, {}).get("properties")
    declared = properties if isinstance(properties, dict) else {}
    values: dict[str, Any] = {}
    for key, text in arguments:
        schema = declared.get(key)
        values[key] = text
        if not (isinstance(schema, dict) and schema.get("type") == "string"):
            try:
                values[key] = _decode(text.strip())
            except (ValueError, RecursionError):
                values[key] = text
    return {"name": name, "arguments": values}


def _call_of(value: Any) -> tuple[str, str]:
    """Return name and arguments of a call. Raises ValueError for anything else."""
    found = value if isinstance(value, dict) else {}
    name, key = found.get("name"), "arguments" if "arguments" in found else "parameters"
    if not isinstance(name, str) or not name or key not in found:
        raise ValueError("no call")
    arguments = decode_arguments(found[key] if isinstance(found[key], str) else _encode(found[key]))
    if arguments is None:  # the call would be refused when it comes back with its result
        raise ValueError("no object")
    name.encode()
    return name, _encode(arguments)


def _encode(value: Any) -> str:
    """Return JSON that can be sent. Raises ValueError, also for half a surrogate pair."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def _decode(text: str) -> Any:
    """Return a JSON value. Raises ValueError, also for what Python takes for JSON beyond it."""
    value, end = _DECODER.raw_decode(text)
    if text[end:].strip():
        raise ValueError("more than a value")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)
