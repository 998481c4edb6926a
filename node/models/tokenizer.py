"""Text to tokens and back: the model's own tokenizer and chat template, and text as it streams out of a job.

No part of transformers is needed at this end: a peer without weights submits jobs with a manifest and these files.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import tokenizers

from node.models.chat_template import ChatTemplate, ChatTemplateError
from node.models.errors import ModelError
from node.models.manifest import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Json
from node.models.store import Package
from protocol.limits import MAX_STOP_TOKENS

_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What ends a turn in the usual chat formats. Where a template writes one of these, the model writes it, too, whatever
# its generation config says.
_ENDS_OF_TURN: Final = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eom_id|>")

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """A model's tokenizer. Methods may be called from any thread; long texts take their time, so use one."""

    def __init__(
        self,
        definition: str,
        config: Mapping[str, Json] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """Build a tokenizer from the contents of its files; raise ModelError when they are broken.

        `definition` is tokenizer.json, `config` tokenizer_config.json; `eos_token_ids` come from the manifest.
        """
        with _library_errors("the model's tokenizer is broken"):
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.vocabulary_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
            added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, description in added.items() if description.special)
        self._pieces: dict[int, bytes] = {}
        self.is_byte_level = _is_byte_level(definition)
        """Whether each token is some bytes of UTF-8, whatever stands before and after it."""
        self.special_tokens = _special_tokens(config or {})
        """Their texts by role: `bos_token`, `eos_token`, …"""
        self._chat_template = None if chat_template is None else ChatTemplate(chat_template)
        self.stop_tokens = self._find_stop_tokens(eos_token_ids, chat_template or "")
        """Token ids after which the model has nothing more to say."""

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids, with the tokens that the model wants around a text (such as BOS) by default."""
        with _library_errors("the text cannot be tokenised"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens without special tokens. Ids that the vocabulary lacks have no text."""
        with _library_errors("the tokens cannot be turned into text"):
            text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
            return text

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the prompt tokens of a conversation: mappings with `role` and `content`.

        Raises ChatTemplateError, a ValueError, where the model has no chat template or its template refuses.
        """
        return self.encode(self.render_chat_text(messages), add_special_tokens=False)

    def render_chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt of a conversation as text, special tokens included."""
        if self._chat_template is None:
            raise ChatTemplateError("the model has no chat template: give it a plain prompt")
        return self._chat_template.render(messages, self.special_tokens)

    def text_of(self, token: int) -> str | None:
        """Return a token as the vocabulary has it; None for special tokens and unknown ids, which have no text."""
        return None if token in self._special else self._tokenizer.id_to_token(token)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token of a byte-level vocabulary adds to the text."""
        piece = self._pieces.get(token)
        if piece is None:
            text = self.text_of(token)
            piece = self._pieces[token] = b"" if text is None else _bytes_of(text)
        return piece

    def _find_stop_tokens(self, eos_token_ids: Sequence[int], chat_template: str) -> tuple[int, ...]:
        texts = [text for text in _ENDS_OF_TURN if text in chat_template]
        if "eos_token" in self.special_tokens:
            texts.append(self.special_tokens["eos_token"])
        found = (self._tokenizer.token_to_id(text) for text in texts)
        return tuple(sorted({*eos_token_ids, *(token for token in found if token is not None)})[:MAX_STOP_TOKENS])


class NoTokenizer(Tokenizer):
    """Stands in for the tokenizer of a model that has none: it is given token ids and answers in token ids."""

    def __init__(self, eos_token_ids: Sequence[int] = ()) -> None:
        self.vocabulary_size = 0
        self.is_byte_level = True
        self.special_tokens = {}
        self._pieces = {}
        self.stop_tokens = tuple(sorted(eos_token_ids)[:MAX_STOP_TOKENS])
        self._chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raise ModelError."""
        raise ModelError("the model has no tokenizer: give it token ids (the API takes a list of them as prompt)")

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raise ModelError."""
        return self.encode("")

    def decode(self, tokens: Sequence[int]) -> str:
        """Return no text."""
        return ""

    def text_of(self, token: int) -> str | None:
        """Return no text."""
        return None


def load_tokenizer(package: Package) -> Tokenizer:
    """Return the tokenizer of a package, which must have its tokenizer files if it has any. Raises ModelError."""
    if not package.manifest.tokenizer_files:
        return NoTokenizer(package.manifest.eos_token_ids)
    contents: dict[str, str] = {}
    for file in package.manifest.tokenizer_files:
        try:
            contents[file.name] = package.path_of(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"model {package.model_id[:12]}: {file.name} cannot be read: {error}") from None
    if TOKENIZER_FILE not in contents:
        raise ModelError(f"model {package.model_id[:12]}: its tokenizer has no {TOKENIZER_FILE}")
    try:
        config: Json = json.loads(contents.get(TOKENIZER_CONFIG_FILE, "{}"))
        return Tokenizer(
            contents[TOKENIZER_FILE],
            config if isinstance(config, dict) else {},
            contents.get(CHAT_TEMPLATE_FILE),
            package.manifest.eos_token_ids,
        )
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model {package.model_id[:12]}: {error}") from None


class StreamDecoder:
    """Turns tokens into text as they come. All of it together equals `Tokenizer.decode` of all tokens.

    A character is given out when it is complete; each token is decoded a constant number of times.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The library replaces what is no UTF-8 as this decoder does: one mark for each longest valid beginning.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._anchor: list[int] = []
        self._anchor_text = ""
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """Return the text that is certain with this token; may be empty."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.bytes_of(token))
        text = self._tokenizer.text_of(token)
        if text is None:
            return ""
        self._held.append(token)
        # Bytes are turned into characters, or into marks, all together when their run ends.
        return "" if _BYTE_TOKEN.fullmatch(text) else self._release()

    def finish(self) -> str:
        """Return the rest, when no more tokens come."""
        return self._utf8.decode(b"", final=True) + self._release()

    def _release(self) -> str:
        """Return what the held tokens add after the one before them, for a text begins differently than it goes on."""
        text = self._tokenizer.decode(self._anchor + self._held)[len(self._anchor_text) :]
        last = self._held[-1:]
        self._held = []
        last_text = self._tokenizer.decode(last)
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
        keep = next((n for n in range(min(len(text), self._longest - 1), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


def _bytes_of(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in text)
    except KeyError:  # an added token, which stands for itself
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 characters stand for their bytes, the next free ones for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_CHARACTER: Final = _byte_alphabet()


def _is_byte_level(definition: str) -> bool:
    decoder = json.loads(definition).get("decoder") or {}
    if decoder.get("type") == "Sequence" and len(decoder.get("decoders", ())) == 1:
        decoder = decoder["decoders"][0]
    return bool(decoder.get("type") == "ByteLevel")


def _special_tokens(config: Mapping[str, Json]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for role in _SPECIAL_TOKENS:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


@contextmanager
def _library_errors(failure: str) -> Iterator[None]:
    """Contain whatever the tokenizers library raises on a file or text that it did not foresee."""
    try:
        yield
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{failure}: {' '.join(str(error).split())[:300]}") from error
    except BaseException as error:
        # A panic of the library's Rust code is no Exception, lest it be swallowed; here it is a broken file's fault.
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{failure}: {' '.join(str(error).split())[:300]}") from error
