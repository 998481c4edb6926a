"""Types of fields, each with its bounds: those that several messages and records share, and those packed by hand."""

import struct
from typing import Annotated

from protocol import fields
from protocol.errors import RemoteProtocolError
from protocol.limits import (
    MAX_HARDWARE_BYTES,
    MAX_HISTORY_TOKENS,
    MAX_INTEGER,
    MAX_LOGIT_BIAS,
    MAX_NAME_BYTES,
    MAX_NUMBER,
    MAX_PENALTY,
    MAX_POSITIONS,
    MAX_PREFIX_BYTES,
    MAX_RECORD_BYTES,
    MAX_REQUEST_ID_BYTES,
    MAX_SCORE,
    MAX_SECONDS,
    MAX_SWITCH_BYTES,
    MAX_TEXT_BYTES,
    MAX_TRACE_PARENT_BYTES,
    MAX_UINT64,
    MAX_VOCABULARY,
    PREFIX_HASH_BYTES,
    SIGNATURE_BYTES,
)
from protocol.schema import Form, Range, name, raw, text


def _presentable(message: str) -> str:
    """Replace control characters and cut to the maximum length, so that a failure is reported whatever its text."""
    printable = fields.CONTROL_CHARACTERS.sub(" ", message)
    return printable.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _envelope(value: object, what: str) -> bytes:
    if type(value) is not bytes or not 0 < len(value) <= MAX_RECORD_BYTES:
        raise RemoteProtocolError(f"{what}: an envelope is not 1 to {MAX_RECORD_BYTES} bytes")
    return value


def _context_value(value: object, what: str) -> str | float:
    if isinstance(value, str):
        return fields.text(value, MAX_NAME_BYTES, what)
    return fields.number(value, -MAX_NUMBER, MAX_NUMBER, what)


def _context_dump(value: str | float) -> str | float:
    return value if isinstance(value, str) else float(value)


def _prefix(value: object, what: str) -> bytes:
    if type(value) is not bytes or len(value) > MAX_PREFIX_BYTES or len(value) % PREFIX_HASH_BYTES:
        raise RemoteProtocolError(f"{what} is not hashes of {PREFIX_HASH_BYTES} bytes each")
    return value


def _packed_tokens(value: object, what: str) -> tuple[int, ...]:
    if type(value) is not bytes or not 0 < len(value) <= 4 * MAX_HISTORY_TOKENS or len(value) % 4:
        raise RemoteProtocolError(f"{what} is not 1 to {MAX_HISTORY_TOKENS} token ids of 4 bytes each")
    tokens = struct.unpack(f"<{len(value) // 4}I", value)
    if max(tokens) >= MAX_VOCABULARY:
        raise RemoteProtocolError(f"{what}: a token id is not from 0 to {MAX_VOCABULARY - 1}")
    return tokens


def _pack_tokens(tokens: tuple[int, ...]) -> bytes:
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise ValueError(f"token history: a token id is not an unsigned 32-bit integer: {error}") from None


ContextValue = Annotated[str | float, Form(_context_value, _context_dump)]
Counter = Annotated[int, Range(0, MAX_INTEGER)]
Digest = Annotated[bytes, raw(fields.SHA256_BYTES)]
Envelope = Annotated[bytes, Form(_envelope)]
"""A signed record, not verified."""
Explanation = Annotated[str, text(MAX_TEXT_BYTES)._replace(dump=_presentable)]
"""Text for people, which is made presentable when it is sent."""
Hardware = Annotated[str, name(MAX_HARDWARE_BYTES)]
LogitBias = Annotated[float, Range(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)]
Name = Annotated[str, name(MAX_NAME_BYTES)]
Nonce = Annotated[int, Range(0, MAX_UINT64)]
PackedTokens = Annotated[tuple[int, ...], Form(_packed_tokens, _pack_tokens)]
"""Token ids, which travel as 4 bytes each, little-endian."""
Penalty = Annotated[float, Range(-MAX_PENALTY, MAX_PENALTY)]
Position = Annotated[int, Range(0, MAX_POSITIONS - 1)]
PositionCount = Annotated[int, Range(0, MAX_POSITIONS)]
PrefixHashes = Annotated[bytes, Form(_prefix)]
RequestId = Annotated[str, text(MAX_REQUEST_ID_BYTES)]
Score = Annotated[float, Range(-MAX_SCORE, MAX_SCORE)]
Seconds = Annotated[float, Range(0.0, MAX_SECONDS)]
Share = Annotated[float, Range(0.0, 1.0)]
Signature = Annotated[bytes, raw(SIGNATURE_BYTES)]
Switch = Annotated[str, name(MAX_SWITCH_BYTES)]
TokenId = Annotated[int, Range(0, MAX_VOCABULARY - 1)]
TraceParent = Annotated[str, text(MAX_TRACE_PARENT_BYTES)]
