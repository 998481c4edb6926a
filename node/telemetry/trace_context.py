"""W3C Trace Context: the `traceparent` that joins the spans of several programs into one trace."""

import re
import secrets
from dataclasses import dataclass
from typing import Final

TRACE_PARENT_HEADER: Final = "traceparent"

_FORM: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span's place in a trace. `is_sampled`: whether it is to be recorded."""

    trace_id: str
    span_id: str
    is_sampled: bool = True

    @classmethod
    def parse(cls, text: str) -> "TraceContext | None":
        """Return the context in a `traceparent`; None where it is not valid."""
        match = _FORM.fullmatch(text)
        return cls(match[1], match[2], bool(int(match[3], 16) & 1)) if match else None

    @classmethod
    def below(cls, parent: "TraceContext | None") -> "TraceContext":
        """Return the context of a new span: a child of `parent`, or the root of a new trace."""
        span_id = secrets.token_hex(8)
        if parent is None:
            return cls(secrets.token_hex(16), span_id)
        return cls(parent.trace_id, span_id, parent.is_sampled)

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"
