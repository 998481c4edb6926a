"""Makes the tokenizer files of a GGUF file's vocabulary: `python -m node.engine.gguf_tokenizer SOURCE.gguf OUT_DIR`.

A process of its own, because what it interprets is untrusted, and because only this package may import
transformers, which knows most vocabularies. It reads no weights and imports no torch. A failure is reported as
`{"error": message}`, with the exit code 1. Without a vocabulary nothing is written.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from node.models.files import write_atomically
from node.models.gguf_file import GgufError, GgufModel, read_gguf
from node.models.manifest import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from node.util.child_process import report
from node.util.text import one_line
from protocol.canonical import canonical_json

# Pre-tokenizers by the name that llama.cpp gave them (`tokenizer.ggml.pre`), as it implements them.
_AS_GPT2: Final = frozenset({"default", "gpt-2", "gpt2", "jina-es", "jina-de", "mpt", "olmo", "phi-2"})
# As GPT-2, with each digit by itself.
_AS_GPT2_BY_DIGIT: Final = frozenset({"command-r", "codeshell", "exaone", "minerva-7b", "refact", "starcoder"})
# As well, but their vocabularies have no tokens of several digits, so that GPT-2's way gives the same but for runs of
# spaces before digits. The catalogue pins a model that was imported so.
_NEARLY_GPT2: Final = frozenset({"smollm"})
_AS_QWEN2: Final = frozenset({"stablelm2"})
# These begin a text with BOS by default, and take a word that is a token as that token.
_WHOLE_WORDS: Final = frozenset(
    {"falcon3", "falcon-h1", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral", "tekken"}
)
_NO_TOKENIZER: Final = frozenset({"none", "no_vocab", ""})
_SENTENCEPIECE_SPACE: Final = "▁"
# Types of tokens that llama.cpp takes whole wherever their text stands.
_CONTROL: Final = 3
_USER_DEFINED: Final = 4

# What transformers calls the values that it builds a vocabulary of.
_VOCABULARY_KEYS: Final = {
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
}
_ROLES: Final = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def write_tokenizer(file: GgufModel, out_dir: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, as far as the file has them.

    Raises GgufError for a vocabulary that would give other tokens than llama.cpp's.
    """
    if not _has_tokenizer(file):
        return
    try:
        backend, roles = _build(file)
        _correct(file, backend)
    except GgufError:
        raise
    except Exception as error:  # a damaged vocabulary makes tokenizers and transformers raise nearly anything
        raise _unreadable(file, error) from error
    template = file.metadata.get("tokenizer.chat_template")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(out_dir / TOKENIZER_FILE, backend.to_str(pretty=True).encode())
    write_atomically(out_dir / TOKENIZER_CONFIG_FILE, canonical_json(roles))
    if isinstance(template, str) and template:
        write_atomically(out_dir / CHAT_TEMPLATE_FILE, template.encode())


def _has_tokenizer(file: GgufModel) -> bool:
    """Return whether a file has a vocabulary. Raises GgufError for a kind of vocabulary that is not supported."""
    kind, pre = _kind(file)
    if kind in _NO_TOKENIZER:
        return False
    if kind not in {"gpt2", "llama"}:
        raise GgufError(f"{file.name} has a tokenizer of type {str(kind)[:40]!r}, which is not supported")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    by_itself = _AS_GPT2 | _AS_GPT2_BY_DIGIT | _NEARLY_GPT2 | _AS_QWEN2
    if kind == "gpt2" and pre not in by_itself and pre not in GGUF_PRE_TOKENIZER_SPLITS:
        raise GgufError(
            f"{file.name} has tokenizer.ggml.pre = {str(pre)[:40]!r}, a way of splitting texts that is not supported: "
            "import the model's safetensors checkpoint"
        )
    return True


def _correct(file: GgufModel, backend: Any) -> None:
    """Make transformers' tokenizer of a file split, begin and end texts as llama.cpp does. Raises GgufError.

    transformers knows how some pre-tokenizers split a text, takes GPT-2's way for all others, and leaves out some
    implications of a kind: which begin every text with a token, and which take a word in the vocabulary as it is. These
    are corrected here, or refused.
    """
    from tokenizers import pre_tokenizers

    kind, pre = _kind(file)
    if kind == "gpt2" and pre in _AS_GPT2_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if kind == "gpt2" and pre in _WHOLE_WORDS:
        backend.model.ignore_merges = True
    _check_space(file, backend, kind)
    _set_ends(file, backend, is_added=kind == "llama" or pre in _WHOLE_WORDS)


def _splits_as_qwen2(file: GgufModel) -> bool:
    """Return whether texts are split as for Qwen2, where the name of the file's way does not say it."""
    return _kind(file)[1] in _AS_QWEN2


def _unreadable(file: GgufModel, error: Exception) -> GgufError:
    """Return the error for a vocabulary that a library cannot read."""
    return GgufError(f"the tokenizer of {file.name} cannot be read: {one_line(error)}")


def _kind(file: GgufModel) -> tuple[object, object]:
    return file.metadata.get("tokenizer.ggml.model", ""), file.metadata.get("tokenizer.ggml.pre", "default")


def _build(file: GgufModel) -> tuple[Any, dict[str, str]]:
    """Return transformers' tokenizer of a file and its special tokens by their role."""
    from tokenizers import AddedToken
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    stated = {
        name: file.metadata[f"tokenizer.ggml.{key}"]
        for key, name in _VOCABULARY_KEYS.items()
        if f"tokenizer.ggml.{key}" in file.metadata
    }
    if _splits_as_qwen2(file):
        stated["pre_tokenizer_type"] = "qwen2"
    # Gemma's vocabularies are alike, and transformers knows only some by their architecture's name.
    architecture = "gemma" if file.architecture.startswith("gemma") else file.architecture
    backend, _ = convert_gguf_tokenizer(architecture, stated)
    backend = _with_whole_tokens(file, backend)
    roles = {}
    for role, key in _ROLES.items():
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        text = backend.id_to_token(token) if type(token) is int and token >= 0 else None
        if text is not None:
            roles[role] = text
    known = {str(token.content) for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([AddedToken(text, special=True) for text in roles.values() if text not in known])
    return backend, roles


def _with_whole_tokens(file: GgufModel, backend: Any) -> Any:
    """Return the tokenizer with each control and user-defined token as one token. Raises GgufError.

    transformers spells tokens of a byte-level vocabulary in the byte alphabet, and leaves those as pieces whose text
    has other characters, such as DeepSeek's, with full-width bars, or runs of spaces.
    """
    from tokenizers import AddedToken

    texts: Any = file.metadata.get("tokenizer.ggml.tokens", ())
    types: Any = file.metadata.get("tokenizer.ggml.token_type", ())
    types_by_text = {text: each for text, each in zip(texts, types, strict=False) if text}
    whole = {text: token for token, text in enumerate(texts) if types_by_text.get(text) in {_CONTROL, _USER_DEFINED}}
    is_byte_level = _kind(file)[0] == "gpt2"
    lost = _lost(backend, whole)
    if is_byte_level:  # what merges give, they give only where nothing else merges with it
        added = {str(each.content) for each in backend.get_added_tokens_decoder().values()}
        lost |= {text: token for text, token in whole.items() if text not in added}
    if not lost:
        return backend
    if is_byte_level:
        definition = json.loads(backend.to_str())
        spelt = {token: text for text, token in definition["model"]["vocab"].items()}
        # Of two tokens with one spelling, as two spaces and `ĠĠ`, only one was left.
        spelt = {token: text if text in lost else spelt.get(token, text) for token, text in enumerate(texts)}
        definition["model"]["vocab"] = {text: token for token, text in spelt.items()}
        # transformers adds GPT-2's end of text to a vocabulary that lacks it.
        definition["added_tokens"] = [each for each in definition["added_tokens"] if each["content"] in types_by_text]
        backend = type(backend).from_str(json.dumps(definition))
    for added_type, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        known = [text for text in lost if types_by_text[text] == added_type and backend.token_to_id(text) == lost[text]]
        add([AddedToken(text, normalized=False, special=added_type == _CONTROL) for text in known])
    for text, token in _lost(backend, whole).items():
        raise GgufError(
            f"{file.name} has a token {token}, {text[:40]!r}, that would be read as other tokens: import the model's "
            "safetensors checkpoint"
        )
    return backend


def _lost(backend: Any, tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the tokens whose text is not read as they are."""
    read = backend.encode_batch(list(tokens), add_special_tokens=False)
    return {text: tokens[text] for text, encoding in zip(tokens, read, strict=True) if encoding.ids != [tokens[text]]}


def _check_space(file: GgufModel, backend: Any, kind: object) -> None:
    if kind != "llama":
        return
    wanted = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    first = backend.encode("a", add_special_tokens=False).tokens[:1]
    if first and first[0].startswith(_SENTENCEPIECE_SPACE) is not wanted:
        raise GgufError(
            f"{file.name} has tokenizer.ggml.add_space_prefix = {wanted}, which is not supported for "
            f"{file.architecture} models: import the model's safetensors checkpoint"
        )


def _set_ends(file: GgufModel, backend: Any, *, is_added: bool) -> None:
    from tokenizers import processors

    bos = _token(file, "bos", is_added=is_added, backend=backend)
    eos = _token(file, "eos", is_added=False, backend=backend)
    plain = backend.encode("a", add_special_tokens=False).ids
    wanted = [*([bos[1]] if bos else []), *plain, *([eos[1]] if eos else [])]
    if backend.encode("a").ids == wanted:
        return
    pieces = [*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]
    specials = [token for token in (bos, eos) if token]
    backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=specials)


def _token(file: GgufModel, which: str, *, is_added: bool, backend: Any) -> tuple[str, int] | None:
    key = f"tokenizer.ggml.{which}_token_id"
    token = file.metadata.get(key)
    if not file.metadata.get(f"tokenizer.ggml.add_{which}_token", is_added) or type(token) is not int:
        return None
    text = backend.id_to_token(token)
    if text is None:
        raise GgufError(f"{file.name} has {key} = {token}, which its vocabulary lacks")
    return text, token


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.engine.gguf_tokenizer", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        write_tokenizer(read_gguf(options.source), options.out_dir)
    except (GgufError, OSError) as error:
        report(error=one_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
