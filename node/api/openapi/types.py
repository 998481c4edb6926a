"""JSON Schemas of the types of answers: typed dictionaries and dataclasses become named schemas."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_PLAIN: Final[Mapping[Any, Mapping[str, Any]]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    NoneType: {"type": "null"},
    Any: {},
}


class TypeSchemas:
    """The schemas of types; those of classes are collected under their names."""

    def __init__(self) -> None:
        self.named: dict[str, dict[str, Any]] = {}

    def of(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type, which refers to those that have a name."""
        if is_typeddict(kind) or dataclasses.is_dataclass(kind):
            return self._of_class(kind)
        if isinstance(kind, type) and issubclass(kind, str):  # names that are strings, as a model's id
            return {"type": "string"}
        if kind in _PLAIN:
            return dict(_PLAIN[kind])
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in {Union, UnionType}:
            return {"anyOf": [self.of(each) for each in arguments]}
        if origin is tuple and Ellipsis not in arguments:
            return {"type": "array", "prefixItems": [self.of(each) for each in arguments], "minItems": len(arguments)}
        if origin in {list, tuple, Sequence}:
            return {"type": "array", "items": self.of(arguments[0])}
        if origin in {dict, Mapping}:
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if isinstance(kind, str) or hasattr(kind, "__supertype__"):
            return {"type": "string"}
        raise TypeError(f"no schema for {kind}")

    def _of_class(self, kind: Any) -> dict[str, Any]:
        name = kind.__name__
        if name not in self.named:
            self.named[name] = {}  # it may refer to itself
            hints = get_type_hints(kind)
            self.named[name] = {
                "type": "object",
                "description": inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " "),
                "properties": {field: self.of(hint) for field, hint in hints.items()},
                "required": list(hints),
                "additionalProperties": False,
            }
        return {"$ref": f"#/components/schemas/{name}"}
