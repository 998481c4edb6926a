"""JSON Schemas that a text must follow, as clients give them."""

import json
from typing import Any, Final

from node.api.fields import check_depth, form, refuse
from protocol.limits import MAX_JSON_SCHEMA_BYTES

ANY_OBJECT: Final = '{"type": "object"}'
"""Any JSON object."""


@form({"type": "object", "description": "A JSON Schema."})
def parse_schema(param: str, schema: Any) -> str:
    """Return a JSON Schema as it travels."""
    if not isinstance(schema, dict):
        refuse(param, "must be a JSON Schema, an object")
    check_depth(param, schema)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode(errors="surrogatepass")) > MAX_JSON_SCHEMA_BYTES:
        refuse(param, f"has more than {MAX_JSON_SCHEMA_BYTES} bytes")
    return text
