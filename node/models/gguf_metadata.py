"""Metadata of GGUF files beside their architecture's: what kind of file one is, and its special tokens."""

from typing import Final

from node.models.gguf_file import GgufError, GgufModel, shorten

# Tokenizer metadata that its import reads, or that only matters to other uses of the model.
_GGML_KEYS: Final = (
    "add_bos_token add_eos_token add_sep_token add_space_prefix bos_token_id cls_token_id eom_token_id eos_token_id "
    "eot_token_id fim_mid_token_id fim_pad_token_id fim_pre_token_id fim_rep_token_id fim_sep_token_id "
    "fim_suf_token_id mask_token_id merges middle_token_id model padding_token_id pre prefix_token_id "
    "remove_extra_whitespaces scores seperator_token_id suffix_token_id token_type token_type_count tokens "
    "unknown_token_id"
)
_TOKENIZER_KEYS: Final = frozenset(
    {"tokenizer.chat_template", "tokenizer.chat_templates", "tokenizer.huggingface.json"}
) | {f"tokenizer.ggml.{key}" for key in _GGML_KEYS.split()}
_TEMPLATE_PREFIX: Final = "tokenizer.chat_template."
_BOS_KEY: Final = "tokenizer.ggml.bos_token_id"
_EOS_KEYS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# A sentencepiece vocabulary begins and ends its texts with these where the file does not say.
_SENTENCEPIECE_BOS, _SENTENCEPIECE_EOS = 1, 2


def check_namespaces(model: GgufModel) -> None:
    """Refuse files that are not a whole decoder, and unknown keys of the tokenizer."""
    kind = model.metadata.get("general.type", "model")
    if kind != "model":
        raise GgufError(f"{model.name} is not a model: its general.type is {str(kind)[:40]!r}")
    for key, value in model.metadata.items():
        unknown = key.startswith("tokenizer.") and not key.startswith(_TEMPLATE_PREFIX) and key not in _TOKENIZER_KEYS
        if unknown or key.startswith("adapter."):
            raise GgufError(f"{model.name} has the key {key[:80]} = {shorten(value)}, which is not supported")


def special_tokens(model: GgufModel) -> tuple[int | None, tuple[int, ...]]:
    """Return the token that begins a text, if any, and those that end one. Raises GgufError."""
    is_sentencepiece = model.metadata.get("tokenizer.ggml.model") == "llama"
    bos = model.metadata.get(_BOS_KEY, _SENTENCEPIECE_BOS if is_sentencepiece else None)
    ends = [model.metadata.get(name) for name in _EOS_KEYS]
    if ends[0] is None and is_sentencepiece:
        ends[0] = _SENTENCEPIECE_EOS
    if not all(token is None or type(token) is int for token in (bos, *ends)):
        raise GgufError(f"{model.name} is damaged: its special tokens are not token ids")
    eos = tuple(dict.fromkeys(token for token in ends if type(token) is int))
    return bos if type(bos) is int else None, eos
