"""Detokenises a stream: tokens become characters as soon as these are certain, and stop strings end the text."""

import codecs
from collections.abc import Sequence
from itertools import islice
from typing import Final

from node.models.tokenizer_service import ModelTokenizer
from node.models.vocabulary import TokenKind

_REPLACEMENT: Final = "\ufffd"
"""What stands for a byte that is not part of a character."""

_LONGEST_CHARACTER: Final = 4
"""Bytes of it in UTF-8."""

_TAIL_TOKENS: Final = 2 * _LONGEST_CHARACTER
"""Tokens with text at the end of a prompt that are looked at."""

_MOST_SEARCHED: Final = 1024
"""Tokens at the end of a prompt among which those with text are looked for."""


class StreamDecoder:
    """Turns tokens into text as they come. All of it together is what they add to `Tokenizer.decode` of the prompt.

    But for tokens that are bytes each (`<0xE2>`): a character is text once it is complete, and remains so where bytes
    follow that are not valid UTF-8, for which the library replaces all bytes of the run.

    Each token is decoded a constant number of times. Tokens of a byte-level vocabulary are looked up; for others the
    tokenizer gets all the context it needs, so that its process may be replaced in between.
    """

    def __init__(self, tokenizer: ModelTokenizer, *, prompt: Sequence[int] = (), shows_marks: bool = False) -> None:
        """`prompt`: whose text goes on; without it a text begins, from which many tokenizers take the first space.

        `shows_marks`: special tokens that mark reasoning and tool calls are text, too.
        """
        self._marks = tokenizer.marks if shows_marks else {}
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.vocabulary
        # The library replaces invalid UTF-8 as this decoder does: one mark for each longest valid beginning.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # What comes is decoded behind the anchor, whose text is cut off: a text begins differently than it continues.
        self._anchor: list[int] = []
        self._anchor_text = ""
        self._bytes: list[int] = []
        """Of a character that is not complete, or from the first invalid one of a run to its end."""
        self._prompt = prompt[-_MOST_SEARCHED:]
        self._prompt_end = ""
        """What the prompt's text has for bytes at its end that are not a character, until more text comes."""

    async def feed(self, token: int) -> str:
        """Return the text that is certain with this token; may be empty. Raises ModelError."""
        if self._prompt:
            await self._read_prompt()
        return self._without_prompt(await self._feed(token))

    def finish(self) -> str:
        """Return the rest, when no more tokens come."""
        return self._without_prompt(self._end())

    async def _read_prompt(self) -> None:
        """Take up the end of the prompt: its last token that is not a byte, and the bytes behind it."""
        prompt, self._prompt = self._prompt, ()
        tail = list(islice(filter(self._vocabulary.has_text, reversed(prompt)), _TAIL_TOKENS))[::-1]
        if not self._vocabulary.is_byte_level:
            kinds = list(map(self._vocabulary.kind_of, tail))
            if TokenKind.TEXT in kinds:
                tail = tail[-1 - kinds[::-1].index(TokenKind.TEXT) :]
            elif tail:
                spelt = await self._tokenizer.token_bytes(tail)
                tail = tail[next((index for index, byte in enumerate(spelt) if not _continues(byte)), 0) :]
        for token in tail:
            await self._feed(token)
        self._prompt_end = _REPLACEMENT * max(len(self._bytes), bool(self._utf8.getstate()[0]))

    def _without_prompt(self, text: str) -> str:
        if text and self._prompt_end:
            text, self._prompt_end = text.removeprefix(self._prompt_end), ""
        return text

    async def _feed(self, token: int) -> str:
        if token in self._marks:
            rest = self._end()
            self._utf8.reset()
            return rest + self._marks[token]
        if self._vocabulary.is_byte_level:
            return self._utf8.decode(self._vocabulary.bytes_of(token))
        match self._vocabulary.kind_of(token):
            case TokenKind.NO_TEXT:
                return ""
            case TokenKind.BYTE:
                return await self._feed_byte(token)
            case _:
                return self._end_bytes() + await self._feed_text(token)

    def _end(self) -> str:
        return self._utf8.decode(b"", final=True) + self._end_bytes()

    async def _feed_text(self, token: int) -> str:
        text, alone = await self._decode([token])
        if alone or not self._anchor:
            self._anchor, self._anchor_text = [token], alone
        elif self._anchor_text == _REPLACEMENT:  # bytes behind it would be replaced, too
            self._anchor, self._anchor_text = [*self._anchor, token], self._anchor_text + text
        return text

    async def _feed_byte(self, token: int) -> str:
        """Return the character that is complete with this byte, if one is."""
        self._bytes.append(token)
        if len(self._bytes) > _LONGEST_CHARACTER:
            return ""
        text, alone = await self._decode(self._bytes)
        if alone == _REPLACEMENT * len(self._bytes):
            return ""
        if alone or not self._anchor:
            self._anchor, self._anchor_text = self._bytes, alone
        self._bytes = []
        return text

    def _end_bytes(self) -> str:
        """Return what stands for bytes that did not become a character."""
        held, self._bytes = self._bytes, []
        if held and not self._anchor:
            self._anchor, self._anchor_text = held[:1], _REPLACEMENT
        return _REPLACEMENT * len(held)

    async def _decode(self, tokens: list[int]) -> tuple[str, str]:
        """Return the text of tokens where they are, and alone."""
        whole, alone = await self._tokenizer.decode(self._anchor + tokens, tokens)
        return whole[len(self._anchor_text) :], alone


def _continues(byte: bytes) -> bool:
    """Return whether a byte is not the first one of a character."""
    return byte[0] & 0xC0 == 0x80


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
