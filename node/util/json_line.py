"""JSON documents on one line each: of streams, files and stdout."""

import json
from typing import Any, Final

_UNICODE_LINE_ENDS: Final = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def json_line(document: Any, *, compact: bool = False) -> str:
    """Return a document as JSON that every reader takes for one line.

    JSON may have U+0085, U+2028 and U+2029 as they are, but `str.splitlines`, and with it httpx's `iter_lines`, ends
    lines there. `compact`: without spaces.
    """
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":") if compact else None)
    for character, escape in _UNICODE_LINE_ENDS.items():
        text = text.replace(character, escape)
    return text
