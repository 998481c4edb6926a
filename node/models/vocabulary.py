"""A model's vocabulary, known without asking its tokenizer: the bytes, if any, that each token adds to a text."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Final, Self

from node.models.errors import ModelError

MAX_TOKEN_BYTES: Final = 4096
"""Of one token; the longest in use are some hundred spaces."""

CHANNEL_MARK: Final = "<|channel|>"
"""The token before a channel's name in OpenAI's harmony format: models that have it write in channels."""

MAX_TABLE_BYTES: Final = 32 << 20
"""Of all tokens: the daemon keeps the table in memory."""


class TokenKind(IntEnum):
    """Kinds of tokens, for decoding."""

    NO_TEXT = 0
    """A special token, or an id that the vocabulary lacks."""
    TEXT = 1
    BYTE = 2
    """One byte, which becomes text together with the bytes around it: `<0xE2>`."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model by their ids, in little memory."""

    is_byte_level: bool
    """Whether each token is some bytes of UTF-8, independent of its neighbours."""
    kinds: bytes
    pieces: bytes
    """The bytes of all tokens one after the other, where the vocabulary is byte-level."""
    ends: "array[int]"
    """Where those of each token end."""

    @classmethod
    def build(cls, kinds: bytes, pieces: Iterable[bytes] | None) -> Self:
        """Return the vocabulary of tokens in the order of their ids; `pieces`: None where it is not byte-level."""
        joined = bytearray()
        ends = array("I")
        for token, piece in enumerate(pieces or ()):
            if len(piece) > MAX_TOKEN_BYTES:
                raise ModelError(f"token {token} of the model has {len(piece)} bytes; at most {MAX_TOKEN_BYTES} can be")
            joined += piece
            ends.append(len(joined))
            if len(joined) + len(ends) * ends.itemsize > MAX_TABLE_BYTES:
                raise ModelError(f"the model's vocabulary takes more than {MAX_TABLE_BYTES >> 20} MiB")
        return cls(pieces is not None, kinds, bytes(joined), ends)

    @classmethod
    def from_map(cls, values: Mapping[str, Any]) -> Self:
        """Return the vocabulary of a map from `to_map`."""
        ends = array("I")
        ends.frombytes(values["ends"])
        return cls(values["is_byte_level"], values["kinds"], values["pieces"], ends)

    def to_map(self) -> dict[str, Any]:
        """Return it as a map of plain values."""
        return {**asdict(self), "ends": self.ends.tobytes()}

    def kind_of(self, token: int) -> TokenKind:
        """Return the kind of a token."""
        return TokenKind(self.kinds[token]) if 0 <= token < len(self.kinds) else TokenKind.NO_TEXT

    def has_text(self, token: int) -> bool:
        """Return whether a token adds to a text."""
        return bool(self.bytes_of(token)) if self.is_byte_level else self.kind_of(token) is not TokenKind.NO_TEXT

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token of a byte-level vocabulary adds to the text."""
        if not 0 <= token < len(self.ends):
            return b""
        return self.pieces[self.ends[token - 1] if token else 0 : self.ends[token]]


NO_TOKENS: Final = Vocabulary(True, b"", b"", array("I"))
"""The vocabulary of a model without tokenizer."""
