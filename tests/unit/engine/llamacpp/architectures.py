"""Tiny random models as GGUF files, with the metadata and tensors that llama.cpp's converter writes."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.tiny_model import random_weights
from node.models.gguf_writer import GgufData, GgufValue, write_gguf

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INNER, VOCABULARY, EXPERTS, EXPERT_INNER = 64, 4, 2, 16, 96, 200, 8, 32
Q_RANK, RANK, UNROTATED, ROTATED = 64, 32, 32, 8
ROWS, KV_ROWS = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE

Shapes = dict[str, tuple[int, ...]]

_ATTENTION: Shapes = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (ROWS, HIDDEN),
    "attn_k.weight": (KV_ROWS, HIDDEN),
    "attn_v.weight": (KV_ROWS, HIDDEN),
    "attn_output.weight": (HIDDEN, ROWS),
    "ffn_norm.weight": (HIDDEN,),
}
_DENSE: Shapes = {
    "ffn_gate.weight": (INNER, HIDDEN),
    "ffn_up.weight": (INNER, HIDDEN),
    "ffn_down.weight": (HIDDEN, INNER),
}
_EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_exps.weight": (EXPERTS, EXPERT_INNER, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, EXPERT_INNER, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_INNER),
}
_BIASES: Shapes = {"attn_q.bias": (ROWS,), "attn_k.bias": (KV_ROWS,), "attn_v.bias": (KV_ROWS,)}
_HEAD_NORMS: Shapes = {"attn_q_norm.weight": (HEAD_SIZE,), "attn_k_norm.weight": (HEAD_SIZE,)}
_POST_NORMS: Shapes = {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
_LATENT_ATTENTION: Shapes = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q_a.weight": (Q_RANK, HIDDEN),
    "attn_q_a_norm.weight": (Q_RANK,),
    "attn_q_b.weight": (HEADS * (UNROTATED + ROTATED), Q_RANK),
    "attn_kv_a_mqa.weight": (RANK + ROTATED, HIDDEN),
    "attn_kv_a_norm.weight": (RANK,),
    "attn_k_b.weight": (HEADS, RANK, UNROTATED),
    "attn_v_b.weight": (HEADS, UNROTATED, RANK),
    "attn_output.weight": (HIDDEN, HEADS * UNROTATED),
    "ffn_norm.weight": (HIDDEN,),
}
_EXPERT_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_INNER}
_HEAD_KEYS = {"attention.key_length": HEAD_SIZE, "attention.value_length": HEAD_SIZE}


@dataclass(frozen=True)
class Architecture:
    """What a model has beside the sizes. `granularity`: at which blocks it may be cut. `first_block`: if it differs."""

    name: str
    block: Shapes
    keys: Mapping[str, Any] = field(default_factory=dict)
    outer: Shapes = field(default_factory=dict)
    blocks: int = 4
    tied: bool = False
    granularity: int = 1
    first_block: Shapes | None = None


ARCHITECTURES = {
    "llama3": Architecture(
        "llama", {**_ATTENTION, **_DENSE}, {"rope.freq_base": 500000.0}, {"rope_freqs.weight": (HEAD_SIZE // 2,)}
    ),
    "mistral": Architecture("llama", {**_ATTENTION, **_DENSE}, _HEAD_KEYS),
    "qwen2": Architecture("qwen2", {**_ATTENTION, **_BIASES, **_DENSE}, tied=True),
    "qwen3": Architecture("qwen3", {**_ATTENTION, **_HEAD_NORMS, **_DENSE}, _HEAD_KEYS),
    "qwen3moe": Architecture("qwen3moe", {**_ATTENTION, **_HEAD_NORMS, **_EXPERTS}, {**_HEAD_KEYS, **_EXPERT_KEYS}),
    "gemma2": Architecture(
        "gemma2",
        {**_ATTENTION, **_POST_NORMS, **_DENSE},
        {**_HEAD_KEYS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 8},
        tied=True,
        granularity=4,  # llama.cpp scales what comes into a span as if it were an embedding: only whole
    ),
    "gemma3": Architecture(
        "gemma3",
        {**_ATTENTION, **_HEAD_NORMS, **_POST_NORMS, **_DENSE},
        {**_HEAD_KEYS, "attention.sliding_window": 8, "rope.freq_base": 1000000.0},
        blocks=18,
        tied=True,
        granularity=6,
    ),
    "phi3": Architecture(
        "phi3",
        {
            "attn_norm.weight": (HIDDEN,),
            "attn_qkv.weight": (ROWS + 2 * KV_ROWS, HIDDEN),
            "attn_output.weight": (HIDDEN, ROWS),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_up.weight": (2 * INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        },
        {"rope.scaling.original_context_length": 512, "context_length": 1024},
        {"rope_factors_long.weight": (HEAD_SIZE // 2,), "rope_factors_short.weight": (HEAD_SIZE // 2,)},
    ),
    "gpt-oss": Architecture(
        "gpt-oss",
        {
            **{name: shape for name, shape in _ATTENTION.items() if name != "ffn_norm.weight"},
            **_BIASES,
            "attn_output.bias": (HIDDEN,),
            "attn_sinks.weight": (HEADS,),
            "post_attention_norm.weight": (HIDDEN,),
            **_EXPERTS,
            "ffn_gate_inp.bias": (EXPERTS,),
            "ffn_gate_exps.bias": (EXPERTS, EXPERT_INNER),
            "ffn_up_exps.bias": (EXPERTS, EXPERT_INNER),
            "ffn_down_exps.bias": (EXPERTS, HIDDEN),
        },
        {**_HEAD_KEYS, **_EXPERT_KEYS, "attention.sliding_window": 8},
        granularity=2,
    ),
    # Latent attention, a first block without experts, and an expert for every token.
    "deepseek2": Architecture(
        "deepseek2",
        {
            **_LATENT_ATTENTION,
            **_EXPERTS,
            "exp_probs_b.bias": (EXPERTS,),
            "ffn_gate_shexp.weight": (EXPERT_INNER, HIDDEN),
            "ffn_up_shexp.weight": (EXPERT_INNER, HIDDEN),
            "ffn_down_shexp.weight": (HIDDEN, EXPERT_INNER),
        },
        {
            **_EXPERT_KEYS,
            "attention.head_count_kv": 1,
            "attention.kv_lora_rank": RANK,
            "attention.q_lora_rank": Q_RANK,
            "attention.key_length": RANK + ROTATED,
            "attention.value_length": RANK,
            "attention.key_length_mla": UNROTATED + ROTATED,
            "attention.value_length_mla": UNROTATED,
            "rope.dimension_count": ROTATED,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
        },
        first_block={**_LATENT_ATTENTION, **_DENSE},
    ),
}

WIDE_HEADS = Architecture(
    "llama",
    {
        **_ATTENTION,
        "attn_q.weight": (HEADS * 32, HIDDEN),
        "attn_k.weight": (KV_HEADS * 32, HIDDEN),
        "attn_v.weight": (KV_HEADS * 32, HIDDEN),
        "attn_output.weight": (HIDDEN, HEADS * 32),
        **_DENSE,
    },
    {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32, "context_length": 1024},
)
"""Heads of whole blocks of q8_0, which has 32 elements in each."""

_COMMON: Mapping[str, Any] = {
    "context_length": 256,
    "embedding_length": HIDDEN,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": HEAD_SIZE,
    "rope.freq_base": 10000.0,
}


def write_model(architecture: Architecture, path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> Path:
    """Write a model's file, its matrices in a type."""
    keys = {**_COMMON, **architecture.keys, "block_count": architecture.blocks, "vocab_size": VOCABULARY}
    metadata = {f"{architecture.name}.{key}": typed(value) for key, value in keys.items()}
    metadata |= {"general.architecture": typed(architecture.name), "tokenizer.ggml.model": typed("no_vocab")}
    hidden = keys["embedding_length"]
    shapes = {"token_embd.weight": (VOCABULARY, hidden), "output_norm.weight": (hidden,), **architecture.outer}
    if not architecture.tied:
        shapes["output.weight"] = (VOCABULARY, hidden)
    for block in range(architecture.blocks):
        given = architecture.first_block if block == 0 and architecture.first_block else architecture.block
        shapes |= {f"blk.{block}.{name}": shape for name, shape in given.items()}
    kinds = {name: kind if _is_matrix(name, shape) else GGMLQuantizationType.F32 for name, shape in shapes.items()}
    tensors = [
        GgufData(name, shape, kinds[name], quantized(random_weights(name, shape).astype(np.float32), kinds[name]))
        for name, shape in shapes.items()
    ]
    write_gguf(path, metadata, tensors)
    return path


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and name.endswith(".weight")


def quantized(values: NDArray[np.float32], kind: GGMLQuantizationType) -> bytes:
    """Return values in a type of ggml, by ggml itself: the package gguf does not write all of them."""
    if kind is GGMLQuantizationType.F32:
        return values.tobytes()
    columns = values.shape[-1]
    rows = values.size // columns
    block, block_bytes = GGML_QUANT_SIZES[kind]
    out = np.zeros(values.size // block * block_bytes, np.uint8)
    importance = np.ones(columns, np.float32)
    quantize = load_library()._shared.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, out, importance)]
    sizes = [ctypes.c_int64(number) for number in (0, rows, columns)]
    quantize(ctypes.c_int(kind), *pointers[:2], *sizes, pointers[2])
    return out.tobytes()


def typed(value: Any) -> GgufValue:
    """Return a value with the type that the converter gives it."""
    match value:
        case bool():
            kind = (GGUFValueType.BOOL,)
        case int():
            kind = (GGUFValueType.UINT32,)
        case float():
            kind = (GGUFValueType.FLOAT32,)
        case _:
            kind = (GGUFValueType.STRING,)
    return GgufValue(value, kind)
