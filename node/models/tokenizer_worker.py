"""Text to tokens and back, in the process that interprets a model's files: `python -m node.models.tokenizer_worker`.

They are untrusted: jinja2's sandbox isolates a template from Python, but neither it nor the tokenizers library
bounds time and memory. So the kernel bounds what they may cost: every request has a limit of processor time and one of
time, at which the process is killed by a signal that says which; its address space is bounded; it can write no file. It
has no state to save, and may be killed at any moment.

Started by `tokenizer_service`; requests on its stdin and answers on its stdout are maps of msgpack. It needs no part of
transformers, whose results it gives: a peer without weights submits jobs with a manifest and these files.
"""

import json
import os
import re
import resource
import signal
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgpack
import tokenizers

from node.models.chat_template import ChatTemplate
from node.models.errors import ChatTemplateError, ModelError
from node.models.manifest import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Json
from node.models.vocabulary import CHANNEL_MARK, TokenKind, Vocabulary
from node.util.heap import trim_heap
from node.util.text import one_line
from protocol.limits import MAX_STOP_TOKENS, MAX_VOCABULARY

MAX_DECODED_CHARACTERS: Final = 1 << 20
"""Of one answer to `decode`: a decoder may make long texts of short tokens."""

_MAX_OPEN_FILES = 64


_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Ends of turns in the usual chat formats: a model whose template writes one writes it, too, whatever its generation
# config says.
_ENDS_OF_TURN: Final = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eom_id|>")
# In OpenAI's harmony format `<|end|>` ends one message of several in a turn: after the analysis comes the answer.
_ENDS_OF_HARMONY_TURN: Final = ("<|return|>", "<|call|>")
_END_OF_HARMONY_MESSAGE: Final = "<|end|>"

_MARKS: Final = frozenset({
    "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"
})  # fmt: skip

_HARMONY_MARKS: Final = frozenset({CHANNEL_MARK, "<|start|>", "<|message|>", "<|constrain|>", "<|end|>"})

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TokenizerPanic(ModelError):
    """The library's Rust code panicked: its state is undefined afterwards."""


class Tokenizer:
    """A model's tokenizer."""

    def __init__(
        self,
        definition: str,
        config: Mapping[str, Json] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """Build it from tokenizer.json, tokenizer_config.json and the template; raise ModelError if they are broken."""
        with _library_errors("the model's tokenizer is broken"):
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            added = self._tokenizer.get_added_tokens_decoder()
            self._is_byte_level = _is_byte_level(definition)
        self._special = frozenset(token for token, description in added.items() if description.special)
        self.special_tokens = _special_tokens(config or {})
        """Their texts by role: `bos_token`, `eos_token`, …"""
        self.template_source = chat_template
        """The text of the chat template, or None."""
        self._chat_template: ChatTemplate | None = None
        self._has_channels = CHANNEL_MARK in (chat_template or "")
        self.tool_format = _tool_format(chat_template or "")
        """How the model writes tool calls: `harmony`, `hermes`, `llama3`, `mistral`, or None."""
        self.reasons = self._has_channels or "<think>" in (chat_template or "")
        """Whether the model writes reasoning."""
        self.reasoning_tokens = self._find_reasoning_tokens() if self.reasons else None
        """The tokens that begin and end reasoning, if each mark is one token."""
        marks = _MARKS | _HARMONY_MARKS if self._has_channels else _MARKS
        self.marks = {
            token: description.content
            for token, description in added.items()
            if description.special and description.content in marks
        }
        """Special tokens that mark reasoning and tool calls."""
        self.stop_tokens = self._find_stop_tokens(eos_token_ids, chat_template or "")
        """Token ids after which the model has nothing more to say."""

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self.template_source is not None

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

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token by itself, a special token by its name; none where there is no such token."""
        with _library_errors("the tokens cannot be turned into text"):
            text: str | None = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if token in self._special:
            return text.encode(errors="replace")
        if self._is_byte_level:
            return _bytes_of(text)
        if _BYTE_TOKEN.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return text.replace("\u2581", " ").encode(errors="replace")

    def render_chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        *,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt of a conversation, mappings with `role` and `content`, with special tokens as text.

        Raises ChatTemplateError, a ValueError, where the model has no chat template or its template refuses.
        """
        if self.template_source is None:
            raise ChatTemplateError("the model has no chat template: give it a plain prompt")
        if self._chat_template is None:
            # Compiled on demand, as compiling may take for ever: plain prompts do not need it.
            self._chat_template = ChatTemplate(self.template_source)
        return self._chat_template.render(
            messages, self.special_tokens, tools, options, continue_final_message=continue_final_message
        )

    def vocabulary(self) -> Vocabulary:
        """Return the bytes or kinds of all tokens. Raises ModelError for tokens too large for the daemon."""
        with _library_errors("the model's vocabulary cannot be read"):
            tokens = self._tokenizer.get_vocab(with_added_tokens=True)
        texts: list[str | None] = [None] * (
            1 + max((token for token in tokens.values() if token < MAX_VOCABULARY), default=-1)
        )
        for text, token in tokens.items():
            if token < MAX_VOCABULARY and token not in self._special:
                texts[token] = text
        if self._is_byte_level:
            return Vocabulary.build(b"", (b"" if text is None else _bytes_of(text) for text in texts))
        return Vocabulary.build(bytes(map(_kind_of, texts)), None)

    def _find_stop_tokens(self, eos_token_ids: Sequence[int], chat_template: str) -> tuple[int, ...]:
        texts = [text for text in _ENDS_OF_TURN if text in chat_template]
        if "eos_token" in self.special_tokens:
            texts.append(self.special_tokens["eos_token"])
        found = {*eos_token_ids, *map(self._tokenizer.token_to_id, texts)}
        if self._has_channels:
            found |= set(map(self._tokenizer.token_to_id, _ENDS_OF_HARMONY_TURN))
            found.discard(self._tokenizer.token_to_id(_END_OF_HARMONY_MESSAGE))
        return tuple(sorted(token for token in found if token is not None)[:MAX_STOP_TOKENS])

    def _find_reasoning_tokens(self) -> tuple[int, int] | None:
        begin, end = (self._tokenizer.token_to_id(text) for text in ("<think>", "</think>"))
        return None if begin is None or end is None else (begin, end)


def read_tokenizer(folder: Path, names: Sequence[str], eos_token_ids: Sequence[int]) -> Tokenizer:
    """Return the tokenizer in these files of a folder. Raises ModelError."""
    contents: dict[str, str] = {}
    for name in names:
        try:
            contents[name] = (folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{name} cannot be read: {error}") from None
    if TOKENIZER_FILE not in contents:
        raise ModelError("it has no tokenizer: it can only be given token ids")
    try:
        config: Json = json.loads(contents.get(TOKENIZER_CONFIG_FILE, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{TOKENIZER_CONFIG_FILE} is broken: {error}") from None
    return Tokenizer(
        contents[TOKENIZER_FILE],
        config if isinstance(config, dict) else {},
        contents.get(CHAT_TEMPLATE_FILE),
        eos_token_ids,
    )


def _tool_format(chat_template: str) -> str | None:
    """Return how a model writes tool calls, by the marks in its chat template."""
    if "tools" not in chat_template:
        return None
    if CHANNEL_MARK in chat_template:
        return "harmony"
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    if "<tool_call>" in chat_template:
        return "hermes"
    return "llama3" if "<|python_tag|>" in chat_template or '"parameters"' in chat_template else None


def _kind_of(text: str | None) -> TokenKind:
    if text is None:
        return TokenKind.NO_TEXT
    return TokenKind.BYTE if _BYTE_TOKEN.fullmatch(text) else TokenKind.TEXT


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
    values = {role: config.get(role) for role in _SPECIAL_TOKENS}
    texts = {role: value.get("content") if isinstance(value, dict) else value for role, value in values.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str)}


@contextmanager
def _library_errors(failure: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{failure}: {one_line(error)}") from error
    except BaseException as error:
        # A panic of the library's Rust code is not an Exception; here a broken file is at fault.
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerPanic(f"{failure}: {one_line(error)}") from error


def main() -> None:
    """Answer requests until the daemon closes its end."""
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    for kind, bound in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        resource.setrlimit(kind, (bound, bound))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    tokenizer: Tokenizer | None = None
    for request in msgpack.Unpacker(requests, max_buffer_size=0):
        with _limits(request["cpu_s"], request["wall_s"]):
            try:
                if request["do"] == "load":
                    _limit_memory(request["load_bytes"])
                    tokenizer = read_tokenizer(Path(request["folder"]), request["files"], request["eos_token_ids"])
                    trim_heap()  # parsing took twice what the tokenizer takes
                    answer = _facts(tokenizer) if request["is_first"] else {}
                    _limit_memory(_address_space() + request["work_bytes"])
                else:
                    assert tokenizer is not None
                    answer = _answer(tokenizer, request)
                data = msgpack.packb(answer)
            except MemoryError:
                data = msgpack.packb({"error": "memory"})
            except TokenizerPanic as error:
                data = msgpack.packb({"error": "panic", "message": str(error)})
            except (ModelError, ChatTemplateError) as error:
                data = msgpack.packb({"error": "refused", "message": str(error).encode(errors="replace").decode()})
        try:
            answers.write(data)
            answers.flush()
        except BrokenPipeError:
            break
    sys.stderr.flush()
    os._exit(0)


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocabulary": tokenizer.vocabulary().to_map(),
        "has_chat_template": tokenizer.has_chat_template,
        "stop_tokens": tokenizer.stop_tokens,
        "tool_format": tokenizer.tool_format,
        "reasons": tokenizer.reasons,
        "reasoning_tokens": tokenizer.reasoning_tokens,
        "marks": sorted(tokenizer.marks.items()),
        "chat_template": tokenizer.template_source or "",
    }


def _answer(tokenizer: Tokenizer, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "render":
            names = ("messages", "tools", "options", "continue_final_message")
            return {"text": tokenizer.render_chat_text(**{name: request[name] for name in names})}
        case "encode":
            tokens = tokenizer.encode(request["text"], add_special_tokens=request["add_special_tokens"])
            if len(tokens) > request["max_tokens"]:
                raise ModelError(f"the prompt has {len(tokens)} tokens; at most {request['max_tokens']} can be")
            return {"tokens": array("I", tokens).tobytes()}
        case "decode":
            texts = [tokenizer.decode(array("I", data)) for data in request["sequences"]]
            if sum(map(len, texts)) > MAX_DECODED_CHARACTERS:
                raise ModelError(
                    f"the model's tokenizer makes more than {MAX_DECODED_CHARACTERS} characters of a token"
                )
            return {"texts": texts}
        case "token_bytes":
            return {"texts": [tokenizer.token_bytes(token) for token in array("I", request["tokens"])]}
        case "check_schema":
            from node.models.json_schema import schema_fault  # a library that few requests need

            return {"fault": schema_fault(request["schema"])}
        case unknown:
            raise AssertionError(f"{unknown} cannot be asked for")


@contextmanager
def _limits(cpu_s: float, wall_s: float) -> Iterator[None]:
    """Have the kernel end this process when the block takes longer."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(size_bytes: int) -> None:
    with suppress(ValueError, OSError):  # as on macOS, which has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, resource.RLIM_INFINITY))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30


if __name__ == "__main__":
    main()
