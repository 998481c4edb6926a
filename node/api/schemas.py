"""JSON Schemas that a text must follow, as clients give them and as tools make them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from node.api.fields import check_depth, form, refuse
from protocol.limits import MAX_JSON_SCHEMA_BYTES

ANY_OBJECT: Final = '{"type": "object"}'
"""Any JSON object."""

# What says nothing of which texts follow: descriptions can be longer than all the rest.
_ANNOTATIONS: Final = frozenset({
    "$comment", "$id", "$schema", "title", "description", "examples", "example", "default", "deprecated", "readOnly",
    "writeOnly",
})  # fmt: skip
_MAPS_OF_SCHEMAS: Final = frozenset({
    "properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies",
})  # fmt: skip
_VALUES: Final = frozenset({"const", "enum"})


@form({"type": "object", "description": "A JSON Schema."})
def parse_schema(param: str, schema: Any) -> str:
    """Return a JSON Schema as it travels. Raises ApiError."""
    if not isinstance(schema, dict):
        refuse(param, "must be a JSON Schema, an object")
    check_depth(param, schema)
    return _encoded(param, _essential(schema, "#"), "has")


def call_schema(param: str, tools: Iterable[Mapping[str, Any]], otherwise: str = "") -> str:
    """Return the JSON Schema of a call of one of these tools, or of what follows another schema, if one is given.

    Each schema keeps its own references: it is a definition, and what pointed to its root points to that. Raises
    ApiError, which names `param`.
    """
    definitions: dict[str, Any] = {}
    forms: list[dict[str, Any]] = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        place = f"#/$defs/{number}"
        definitions[str(number)] = _essential(function.get("parameters") or {"type": "object"}, place)
        forms.append({
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": place}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    if otherwise:
        definitions["text"] = _essential(json.loads(otherwise), "#/$defs/text")
        forms.append({"$ref": "#/$defs/text"})
    form = forms[0] if len(forms) == 1 else {"anyOf": forms}
    return _encoded(param, {"$defs": definitions, **form}, "make a JSON Schema of")


def _essential(schema: Any, root: str) -> Any:
    """Return a schema without annotations, whose root lies at `root` in the document that it becomes a part of."""
    if isinstance(schema, list):
        return [_essential(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            kept[key] = {name: _essential(each, root) for name, each in value.items()}
        elif key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            kept[key] = root + value[1:]
        elif key not in _ANNOTATIONS:
            kept[key] = value if key in _VALUES else _essential(value, root)
    return kept


def _encoded(param: str, schema: Any, verb: str) -> str:
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if (size := len(text.encode())) > MAX_JSON_SCHEMA_BYTES:
        refuse(param, f"{verb} {size} bytes, descriptions left out; at most {MAX_JSON_SCHEMA_BYTES} can be followed")
    return text
