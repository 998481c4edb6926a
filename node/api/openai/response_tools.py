"""Tools of the OpenAI API's `/v1/responses`: functions, also those that a namespace groups, as Codex has them."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from node.api.fields import Field, Fields, ObjectForm, check_depth, form, list_of, one_of, parse_object, refuse
from node.api.openai.messages import DESCRIPTION, IS_FUNCTION, MAX_TOOLS, NAME, PARAMETERS, described_tool
from node.api.shared_fields import tool_choice
from protocol.limits import MAX_NAME_BYTES

_TURN_OFF: Final = 'turn it off in the client (web search in Codex: web_search = "disabled" in its config.toml)'


class FunctionName(NamedTuple):
    """What a client calls a function: its name, in a namespace or in none."""

    name: str
    namespace: str | None = None

    @property
    def for_model(self) -> str:
        """What the model calls it, whose chat template knows no namespaces."""
        return self.name if self.namespace is None else f"{self.namespace}__{self.name}"


class ResponseTool(NamedTuple):
    """A function that the model may call. `described`: as chat templates take it."""

    name: FunctionName
    described: Mapping[str, Any]


_CHOICE: Final = ObjectForm(IS_FUNCTION, NAME, required=[IS_FUNCTION, NAME])


def _chosen_name(fields: Fields) -> str:
    fields.require(IS_FUNCTION)
    return fields.require(NAME)


TOOL_CHOICE: Final = Field("tool_choice", tool_choice(_CHOICE, _chosen_name))

_FUNCTION: Final = ObjectForm(
    IS_FUNCTION, NAME, DESCRIPTION, PARAMETERS, required=[IS_FUNCTION, NAME], ignored=["strict", "output_schema"],
    neutral={"async": (False,), "defer_loading": (False,), "allowed_callers": (["direct"],)},
)  # fmt: skip


@form(_FUNCTION.schema)
def _parse_function(param: str, value: Any) -> Fields:
    check_depth(param, value)
    kind = parse_object(param, value).get("type")
    if isinstance(kind, str) and kind != "function":  # before its other fields, which only that type has
        refuse(f"{param}.type", f"{kind[:MAX_NAME_BYTES]!a} is not supported: only functions are; {_TURN_OFF}")
    return _FUNCTION.parse(param, value)


_IS_NAMESPACE: Final = Field("type", one_of("namespace"))
_FUNCTIONS: Final = Field("tools", list_of(_parse_function, "tools", MAX_TOOLS))
_NAMESPACE: Final = ObjectForm(_IS_NAMESPACE, NAME, DESCRIPTION, _FUNCTIONS, required=[_IS_NAMESPACE, NAME, _FUNCTIONS])


@form({"anyOf": [_FUNCTION.schema, _NAMESPACE.schema]})
def _parse_tool(param: str, value: Any) -> tuple[ResponseTool, ...]:
    """Return the functions of an entry of the list: one, or those of a namespace."""
    if parse_object(param, value).get("type") != "namespace":
        return (_described(_parse_function(param, value)),)
    namespace = _NAMESPACE.parse(param, value)
    name = namespace.require(NAME)
    return tuple(_described(function, name) for function in namespace.require(_FUNCTIONS))


def _described(function: Fields, namespace: str | None = None) -> ResponseTool:
    name = FunctionName(function.require(NAME), namespace)
    described = described_tool(name.for_model, function.get(DESCRIPTION), function.get(PARAMETERS) or {})
    return ResponseTool(name, described)


_parse_entries: Final = list_of(_parse_tool, "tools", MAX_TOOLS)


@form(_parse_entries.schema)
def _parse_tools(param: str, value: Any) -> tuple[ResponseTool, ...]:
    tools = tuple(tool for entry in _parse_entries(param, value) for tool in entry)
    if len(tools) > MAX_TOOLS:
        refuse(param, f"has {len(tools)} functions; at most {MAX_TOOLS} are supported")
    names = {tool.name.for_model: tool.name for tool in tools}
    for tool in tools:
        if names[tool.name.for_model] != tool.name:
            refuse(param, f"has two functions that the model would call {tool.name.for_model}")
    return tools


TOOLS: Final = Field("tools", _parse_tools)
