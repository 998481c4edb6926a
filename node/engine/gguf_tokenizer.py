"""The tokenizer of a GGUF file, as transformers rebuilds it, with corrections.

transformers knows how some pre-tokenizers split a text, takes GPT-2's way for all others, and leaves out some
implications of a kind: which begin every text with a token, and which take a word in the vocabulary as it is. These
are corrected here, or refused.
"""

from typing import Any, Final

from node.models.gguf_file import GgufError, GgufModel
from node.util.text import one_line

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


def read_tokenizer(file: GgufModel) -> Any:
    """Return transformers' tokenizer of a GGUF file, None for a file without. Raises GgufError."""
    kind = file.metadata.get("tokenizer.ggml.model", "")
    if kind in _NO_TOKENIZER:
        return None
    name = file.name
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if kind not in {"gpt2", "llama"}:
        raise GgufError(f"{name} has a tokenizer of type {str(kind)[:40]!r}, which is not supported")
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, set_split_regex

    by_itself = _AS_GPT2 | _AS_GPT2_BY_DIGIT | _NEARLY_GPT2 | _AS_QWEN2
    if kind == "gpt2" and pre not in by_itself and pre not in GGUF_PRE_TOKENIZER_SPLITS:
        raise GgufError(
            f"{name} has tokenizer.ggml.pre = {str(pre)[:40]!r}, a way of splitting texts that is not supported: "
            "import the model's safetensors checkpoint"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.paths[0].parent, gguf_file=name)
        if pre in _AS_QWEN2:
            set_split_regex(tokenizer, {"pre_tokenizer_type": "qwen2"})
        backend = tokenizer.backend_tokenizer
        if kind == "gpt2" and pre in _AS_GPT2_BY_DIGIT:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        if kind == "gpt2" and pre in _WHOLE_WORDS:
            backend.model.ignore_merges = True
        _check_space(file, backend, kind)
        _set_ends(file, backend, is_added=kind == "llama" or pre in _WHOLE_WORDS)
    except GgufError:
        raise
    except Exception as error:  # a damaged vocabulary makes gguf, tokenizers and transformers raise nearly anything
        text = one_line(error)
        raise GgufError(f"the tokenizer of {name} cannot be read: {text}") from error
    return tokenizer


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
