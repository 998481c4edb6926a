"""The config that a GGUF file's metadata require, key by key, as llama.cpp interprets them.

`requirements` lists the attributes of the config and the keys that require them; a key that is not listed here for its
architecture, or has a value without a counterpart, is refused: it might change the result. Add a key only after reading
how llama.cpp handles it, and its absence.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from node.models.gguf_file import GgufError, GgufModel, Value, shorten
from node.models.gguf_rope import ROPE_KEYS, ROPE_TENSORS, Rope, read_rope

ConfigValue = bool | int | float | str | list[str] | list[int] | None


@dataclass(frozen=True, slots=True)
class Requirement:
    """The required value of a config attribute, and the key of the file that requires it."""

    attribute: str
    value: ConfigValue
    key: str


@dataclass(frozen=True, slots=True)
class Trivial:
    """A key that has no counterpart in the config: only these values, which change nothing, are accepted."""

    values: tuple[Value, ...]


_OFF: Final = Trivial((0, 0.0, False))
_OFF_OR_ONE: Final = Trivial((0, 0.0, 1, 1.0))
_HARMLESS: Final = None  # or read elsewhere
Rule = str | Trivial | None
"""The config attribute of a key, the values it may have, or None for a key that does not concern a decoder."""

# Keys with the same meaning for all architectures.
_MUST_BE_OFF: Final = (
    "attention.clamp_kqv attention.max_alibi_bias attention.scale attention.sliding_window "
    "attn_logit_softcapping expert_count expert_used_count final_logit_softcapping "
    "leading_dense_block_count nextn_predict_layers"
)
_MUST_BE_OFF_OR_ONE: Final = (
    "embedding_scale expert_group_count expert_group_used_count expert_weights_scale logit_scale residual_scale"
)
_COMMON: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(_MUST_BE_OFF.split(), _OFF),
    **dict.fromkeys(_MUST_BE_OFF_OR_ONE.split(), _OFF_OR_ONE),
    "attention.causal": Trivial((True,)),
    "attention.head_count": "num_attention_heads",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "tensor_data_layout": _HARMLESS,
    "vocab_size": "vocab_size",
}

_EXPERTS: Final[Mapping[str, Rule]] = {
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_gating_func": Trivial((0, 1)),  # unset, or softmax
    "expert_used_count": "num_experts_per_tok",
}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """An architecture. `epsilon`: the key and the attribute of its norms' epsilon.

    `defaults`: llama.cpp's defaults that differ from configs'. `derived`: attributes that llama.cpp calculates.
    """

    epsilon: tuple[str, str]
    rules: Mapping[str, Rule] = field(default_factory=dict)
    defaults: Mapping[str, Value] = field(default_factory=dict)
    derived: Callable[["GgufModel"], Mapping[str, ConfigValue]] = lambda _model: {}
    rotary: bool = True
    grouped_heads: bool = True


_RMS: Final = "attention.layer_norm_rms_epsilon"
_LAYER_NORM: Final = "attention.layer_norm_epsilon"


def _gemma_scale(largest_blocks: int) -> Callable[[GgufModel], Mapping[str, ConfigValue]]:
    """Queries are scaled by the head's size, except in the largest model, whose scale llama.cpp has built in."""

    def derived(model: GgufModel) -> Mapping[str, ConfigValue]:
        is_largest = model.integer("block_count") == largest_blocks
        size = model.integer("embedding_length") // model.integer("attention.head_count") if is_largest else 0
        return {"query_pre_attn_scalar": size or head_size(model)}

    return derived


def _gemma3(model: GgufModel) -> Mapping[str, ConfigValue]:
    key = "attention.sliding_window_pattern"
    pattern = model.get(key, 6)
    blocks = range(model.integer("block_count"))
    if isinstance(pattern, list) and len(pattern) >= len(blocks):
        slides = [bool(pattern[block]) for block in blocks]
    elif type(pattern) is int and pattern > 0:
        slides = [(block + 1) % pattern != 0 for block in blocks]
    else:
        raise model.unsupported(key)
    types = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    return {**_gemma_scale(62)(model), "layer_types": types}


def _falcon(model: GgufModel) -> Mapping[str, ConfigValue]:
    if model.integer("attention.head_count_kv", 1) != 1:
        raise model.unsupported("attention.head_count_kv")  # its query, key and value rows are ordered otherwise
    return {"multi_query": True, "new_decoder_architecture": False, "alibi": False, "parallel_attn": True}


_GEMMA2: Final[Mapping[str, Rule]] = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

_ARCHITECTURES: Final[Mapping[str, _Architecture]] = {
    "llama": _Architecture((_RMS, "rms_norm_eps"), derived=lambda _model: {"sliding_window": None}),
    "qwen2": _Architecture((_RMS, "rms_norm_eps")),
    "qwen2moe": _Architecture(
        (_RMS, "rms_norm_eps"),
        {
            **_EXPERTS,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            "expert_weights_norm": _OFF,
        },
        derived=lambda _model: {"norm_topk_prob": False},
    ),
    "qwen3": _Architecture((_RMS, "rms_norm_eps")),
    "qwen3moe": _Architecture(
        (_RMS, "rms_norm_eps"),
        {**_EXPERTS, "expert_weights_norm": Trivial((True,))},
        derived=lambda _model: {"norm_topk_prob": True},
    ),
    "phi3": _Architecture((_RMS, "rms_norm_eps"), {"attention.sliding_window": "sliding_window"}),
    "gemma2": _Architecture(
        (_RMS, "rms_norm_eps"),
        _GEMMA2,
        {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _gemma_scale(46),
    ),
    "gemma3": _Architecture(
        (_RMS, "rms_norm_eps"),
        {
            **_GEMMA2,
            "attn_logit_softcapping": _OFF,
            "attention.sliding_window_pattern": _HARMLESS,
            "rope.freq_base_swa": _HARMLESS,
        },
        derived=_gemma3,
    ),
    "starcoder2": _Architecture((_LAYER_NORM, "norm_epsilon"), derived=lambda _model: {"sliding_window": None}),
    "stablelm": _Architecture((_LAYER_NORM, "layer_norm_eps"), {"use_parallel_residual": "use_parallel_residual"}),
    "nemotron": _Architecture((_LAYER_NORM, "norm_eps")),
    "falcon": _Architecture(
        (_LAYER_NORM, "layer_norm_epsilon"),
        {"feed_forward_length": "ffn_hidden_size"},
        derived=_falcon,
        grouped_heads=False,
    ),
    "gpt2": _Architecture(
        (_LAYER_NORM, "layer_norm_epsilon"), {"feed_forward_length": "n_inner"}, rotary=False, grouped_heads=False
    ),
    # Its positions are linear biases (ALiBi), whose slope llama.cpp has built in, and reach as far as one likes.
    "bloom": _Architecture(
        (_LAYER_NORM, "layer_norm_epsilon"),
        {
            "attention.max_alibi_bias": Trivial((8.0,)),
            "context_length": _HARMLESS,
            "feed_forward_length": _HARMLESS,  # four times the width in every Bloom; another one would not fit
        },
        rotary=False,
        grouped_heads=False,
    ),
}

# Tokenizer metadata that its import reads, or that only matters to other uses of the model.
_GGML_KEYS: Final = (
    "add_bos_token add_eos_token add_space_prefix bos_token_id cls_token_id eom_token_id eos_token_id "
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
_PADDING_KEY: Final = "tokenizer.ggml.padding_token_id"
_EOS_KEYS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# A sentencepiece vocabulary begins and ends its texts with these where the file does not say.
_SENTENCEPIECE_BOS, _SENTENCEPIECE_EOS = 1, 2


def requirements(model: GgufModel) -> tuple[Requirement, ...]:
    """Return the attributes that make a config equivalent to llama.cpp, except for the rotary embedding.

    Raises GgufError, naming the key, for metadata without an equivalent.
    """
    architecture = _architecture_of(model)
    rules = {**_COMMON, **architecture.rules, architecture.epsilon[0]: architecture.epsilon[1]}
    check_namespaces(model)
    found: list[Requirement] = []
    prefix = f"{model.architecture}."
    known = {"attention.head_count_kv", "attention.key_length", "attention.value_length"}
    known |= ROPE_KEYS if architecture.rotary else set()
    stated = {key.removeprefix(prefix) for key in model.metadata if key.startswith(prefix)}
    for key in sorted(stated | architecture.defaults.keys()):
        if key in known:
            continue
        value = model.get(key, architecture.defaults.get(key))
        rule = rules.get(key, Trivial(()))
        if isinstance(rule, Trivial) and value not in rule.values:
            raise model.unsupported(key)
        if isinstance(rule, str):
            scalar = model.integer(key) if isinstance(value, list) else value
            is_off = rule == "sliding_window" and scalar == 0
            found.append(Requirement(rule, None if is_off else scalar, prefix + key))
    if architecture.epsilon[0] not in stated:
        raise GgufError(f"{model.name} lacks the key {prefix}{architecture.epsilon[0]}")
    found += _head_requirements(model, architecture)
    found += [Requirement(name, value, "llama.cpp's default") for name, value in architecture.derived(model).items()]
    return (*found, *_token_requirements(model))


def ropes(model: GgufModel) -> Mapping[str | None, Rope]:
    """Return the file's rotary embeddings by kind of layer; None stands for all layers.

    Raises GgufError, naming the key or tensor, for one without an equivalent config.
    """
    architecture = _architecture_of(model)
    extra = ROPE_TENSORS.intersection(model.tensors)
    if not architecture.rotary:
        if extra:
            raise GgufError(f"{model.name}: tensor {min(extra)} has no meaning for {model.architecture} models")
        return {}
    dimensions = model.integer("rope.dimension_count", head_size(model))
    full = read_rope(model, dimensions, _floats(model))
    if model.architecture != "gemma3":
        return {None: full}
    local = Rope.plain(dimensions, model.number("rope.freq_base_swa", 10000.0))
    return {"full_attention": full, "sliding_attention": local}


def head_size(model: GgufModel) -> int:
    """Return the width of a query's and a key's head."""
    return model.integer(
        "attention.key_length", model.integer("embedding_length") // model.integer("attention.head_count")
    )


def _architecture_of(model: GgufModel) -> _Architecture:
    name = model.architecture
    if name not in _ARCHITECTURES:
        raise GgufError(
            f"GGUF files of architecture {name[:80]!r} are not supported (supported: {', '.join(_ARCHITECTURES)}): "
            "import the model's safetensors checkpoint"
        )
    return _ARCHITECTURES[name]


def check_namespaces(model: GgufModel) -> None:
    """Refuse files that are not a whole decoder, and unknown keys of the tokenizer."""
    kind = model.metadata.get("general.type", "model")
    if kind != "model":
        raise GgufError(f"{model.name} is not a model: its general.type is {str(kind)[:40]!r}")
    for key, value in model.metadata.items():
        unknown = key.startswith("tokenizer.") and not key.startswith(_TEMPLATE_PREFIX) and key not in _TOKENIZER_KEYS
        if unknown or key.startswith("adapter."):
            raise GgufError(f"{model.name} has the key {key[:80]} = {shorten(value)}, which is not supported")


def _head_requirements(model: GgufModel, architecture: _Architecture) -> list[Requirement]:
    prefix = f"{model.architecture}.attention."
    heads, size = model.integer("attention.head_count"), head_size(model)
    if model.integer("attention.value_length", size) != size:
        raise model.unsupported("attention.value_length")
    found = [Requirement("head_dim", size, f"{prefix}key_length")]
    groups = model.integer("attention.head_count_kv", heads)
    if architecture.grouped_heads:
        found.append(Requirement("num_key_value_heads", groups, f"{prefix}head_count_kv"))
    elif groups not in {1 if model.architecture == "falcon" else heads, heads}:
        raise model.unsupported("attention.head_count_kv")
    return found


def special_tokens(model: GgufModel) -> tuple[int | None, tuple[int, ...], int | None]:
    """Return the tokens that begin, end and pad a text, as far as there are any. Raises GgufError."""
    is_sentencepiece = model.metadata.get("tokenizer.ggml.model") == "llama"
    bos = model.metadata.get(_BOS_KEY, _SENTENCEPIECE_BOS if is_sentencepiece else None)
    ends = [model.metadata.get(name) for name in _EOS_KEYS]
    if ends[0] is None and is_sentencepiece:
        ends[0] = _SENTENCEPIECE_EOS
    padding = model.metadata.get(_PADDING_KEY)
    if not all(token is None or type(token) is int for token in (bos, padding, *ends)):
        raise GgufError(f"{model.name} is damaged: its special tokens are not token ids")
    eos = tuple(dict.fromkeys(token for token in ends if type(token) is int))
    return bos if type(bos) is int else None, eos, padding if type(padding) is int else None


def _token_requirements(model: GgufModel) -> list[Requirement]:
    bos, eos, padding = special_tokens(model)
    return [
        Requirement("bos_token_id", bos, _BOS_KEY),
        Requirement("pad_token_id", padding, _PADDING_KEY),
        Requirement("eos_token_id", list(eos) if len(eos) > 1 else eos[0] if eos else None, _EOS_KEYS[0]),
    ]


def _floats(model: GgufModel) -> dict[str, tuple[float, ...]]:
    """Return the small tensors with factors of rotary frequencies."""
    found: dict[str, tuple[float, ...]] = {}
    for name in ROPE_TENSORS.intersection(model.tensors):
        tensor = model.tensors[name]
        if tensor.type.name != "F32" or len(tensor.shape) != 1:
            raise GgufError(f"{tensor.path.name}: tensor {name} is not a list of 32-bit floats")
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            found[name] = struct.unpack(f"<{tensor.shape[0]}f", file.read(tensor.size_bytes))
    return found
