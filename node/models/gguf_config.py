"""The config of a package of GGUF files, with transformers' names for what the file's metadata say.

Nothing is calculated from it: llama.cpp reads the metadata. It is for those who plan, compare and show models, and
reads alike for both formats.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Final

from node.models.gguf_file import GgufError, GgufModel, Value, shorten
from node.models.gguf_layout import INPUT_MATRIX, LONG_FACTORS, OUTPUT_MATRIX
from node.models.gguf_metadata import special_tokens
from node.models.manifest import Json
from protocol.limits import MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH

# Where transformers' name of an architecture is another one than llama.cpp's.
_MODEL_TYPES: Final[Mapping[str, str]] = {
    "command-r": "cohere",
    "deepseek2": "deepseek_v2",
    "ernie4_5-moe": "ernie4_5_moe",
    "exaone-moe": "exaone_moe",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "glm4moe": "glm4_moe",
    "gpt-oss": "gpt_oss",
    "gptneox": "gpt_neox",
    "granitemoe": "granitemoe",
    "hunyuan-dense": "hunyuan_v1_dense",
    "hunyuan-moe": "hunyuan_v1_moe",
    "minimax-m2": "minimax_m2",
    "phi2": "phi",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "seed_oss": "seed_oss",
}

# Integers of the architecture's namespace. Where a key is a list, with a number for each block, the largest counts.
_INTEGERS: Final[Mapping[str, tuple[str, int]]] = {
    "attention.head_count": ("num_attention_heads", MAX_WIDTH),
    "attention.head_count_kv": ("num_key_value_heads", MAX_WIDTH),
    "attention.key_length": ("head_dim", MAX_WIDTH),
    "attention.sliding_window": ("sliding_window", MAX_POSITIONS),
    "context_length": ("max_position_embeddings", 1 << 40),
    "embedding_length": ("hidden_size", MAX_WIDTH),
    "expert_count": ("num_experts", MAX_WIDTH),
    "expert_feed_forward_length": ("moe_intermediate_size", MAX_VOCABULARY),
    "expert_used_count": ("num_experts_per_tok", MAX_WIDTH),
    "feed_forward_length": ("intermediate_size", MAX_VOCABULARY),
}
_REQUIRED: Final = ("attention.head_count", "embedding_length")


def read_config(model: GgufModel) -> dict[str, Json]:
    """Return the config of a model that has all its parts. Raises GgufError for impossible values."""
    found = {name: _integer(model, key, limit) for key, (name, limit) in _INTEGERS.items()}
    for key in _REQUIRED:
        if not found[_INTEGERS[key][0]]:
            raise GgufError(f"{model.name} lacks the key {model.architecture}.{key}")
    config: dict[str, Json] = {name: value for name, value in found.items() if value}
    heads, width = int(found["num_attention_heads"]), int(found["hidden_size"])
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", width // heads)
    config["model_type"] = _model_type(model)
    config["num_hidden_layers"] = block_count(model)
    config["tie_word_embeddings"] = OUTPUT_MATRIX not in model.tensors
    config["vocab_size"] = _vocabulary_size(model, width)
    config["weight_type"] = _weight_type(model)
    original = (
        _integer(model, "rope.scaling.original_context_length", MAX_POSITIONS) or found["max_position_embeddings"]
    )
    if original and LONG_FACTORS in model.tensors:  # beyond, rotary frequencies change for all positions of a text
        config["rope_scaling"] = {"rope_type": "longrope", "original_max_position_embeddings": original}
    return config


def block_count(model: GgufModel) -> int:
    """Return the number of blocks. Raises GgufError."""
    count = _integer(model, "block_count", MAX_WIDTH)
    if not count:
        raise GgufError(f"{model.name} lacks the key {model.architecture}.block_count")
    return count


def token_ids(model: GgufModel) -> tuple[int | None, tuple[int, ...]]:
    """Return the token that begins a text, if any, and those that end one, as far as they exist. Raises GgufError.

    Some files say with an id beyond the vocabulary that there is none; llama.cpp ignores those, too.
    """
    bos, eos = special_tokens(model)
    known = range(model.tensors[INPUT_MATRIX].shape[0])
    return bos if bos in known else None, tuple(sorted(token for token in eos if token in known))


def _model_type(model: GgufModel) -> str:
    if model.architecture == "llama" and model.get("expert_count"):
        return "mixtral"
    return _MODEL_TYPES.get(model.architecture, model.architecture)


def _integer(model: GgufModel, key: str, limit: int) -> int:
    """Return a number of the architecture's namespace, of a list the largest; 0 where it is absent."""
    value: Value = model.get(key, 0) or 0
    numbers = [it for it in (value if isinstance(value, list) else [value]) if type(it) is int and 0 <= it <= limit]
    if not numbers or (isinstance(value, list) and len(numbers) < len(value)):
        raise GgufError(f"{model.name} is damaged: its {model.architecture}.{key} is {shorten(value)}")
    return max(numbers)


def _vocabulary_size(model: GgufModel, width: int) -> int:
    """Return the number of tokens: the rows of the matrix that embeds them. Raises GgufError."""
    shape = model.tensors[INPUT_MATRIX].shape
    if len(shape) != 2 or shape[1] != width:
        raise GgufError(
            f"{model.name} is damaged: {INPUT_MATRIX} has shape {list(shape)}, and "
            f"{model.architecture}.embedding_length is {width}"
        )
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > shape[0]:
        raise GgufError(f"{model.name} is damaged: it has {len(tokens)} tokens, and {INPUT_MATRIX} {shape[0]} rows")
    return shape[0]


def _weight_type(model: GgufModel) -> str:
    """Return the type of most weights, as llama.cpp names it: Q4_K for Q4_K_M."""
    elements: Counter[str] = Counter()
    for name, tensor in model.tensors.items():
        elements[tensor.type.name] += math.prod(tensor.shape) if name.startswith("blk.") else 0
    return max(sorted(elements), key=elements.__getitem__)
