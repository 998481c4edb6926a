"""Detokenises a stream: tokens become characters as soon as these are certain, and stop strings end the text."""

import codecs
from collections.abc import Sequence

from node.models.tokenizer_service import ModelTokenizer
from node.models.vocabulary import TokenKind


class StreamDecoder:
    """Turns tokens into text as they come. All of it together equals `Tokenizer.decode` of all tokens.

    A character is returned when it is complete; each token is decoded a constant number of times. Tokens of a
    byte-level vocabulary are looked up; for others the tokenizer gets all the context it needs, so that its process may
    be replaced in between.
    """

    def __init__(self, tokenizer: ModelTokenizer, *, shows_marks: bool = False) -> None:
        """`shows_marks`: special tokens that mark reasoning and tool calls are text, too."""
        self._marks = tokenizer.marks if shows_marks else {}
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.vocabulary
        # The library replaces invalid UTF-8 as this decoder does: one mark for each longest valid beginning.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._anchor: list[int] = []
        self._anchor_text = ""
        self._held: list[int] = []

    async def feed(self, token: int) -> str:
        """Return the text that is certain with this token; may be empty. Raises ModelError."""
        if token in self._marks:
            rest = await self.finish()
            self._utf8.reset()
            return rest + self._marks[token]
        if self._vocabulary.is_byte_level:
            return self._utf8.decode(self._vocabulary.bytes_of(token))
        kind = self._vocabulary.kind_of(token)
        if kind is TokenKind.NO_TEXT:
            return ""
        self._held.append(token)
        # Bytes are turned into characters, or into marks, all together when their run ends.
        return "" if kind is TokenKind.BYTE else await self._release()

    async def finish(self) -> str:
        """Return the rest, when no more tokens come. Raises ModelError."""
        return self._utf8.decode(b"", final=True) + await self._release()

    async def _release(self) -> str:
        """Return the text of the held tokens after the one before them: a text begins differently than it continues."""
        if not self._held:
            return ""
        last = self._held[-1:]
        whole, last_text = await self._tokenizer.decode(self._anchor + self._held, last)
        text = whole[len(self._anchor_text) :]
        self._held = []
        if last_text or not self._anchor:
            self._anchor, self._anchor_text = last, last_text
        return text


class StopFinder:
    """Finds the first stop string in a text that comes in pieces, however it is cut.

    The stop that is complete first wins, and of several complete at once the longest. What might be the beginning of
    one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """Return the text that is certain to come before any stop string; nothing once one was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(index + len(stop), index, stop) for stop in self._stops if (index := text.find(stop)) >= 0]
        if ends:
            _, index, self.found = min(ends)
            self._held = ""
            return text[:index]
        lengths = range(min(len(text), self._longest - 1), 0, -1)
        keep = next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text held back, at the end."""
        held, self._held = self._held, ""
        return held
