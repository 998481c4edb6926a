"""The tiny model of a published shape: every axis shrinks to that of the same meaning, also where sizes are equal."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from node.engine.llamacpp.tiny_model import write_tiny_model
from node.models.gguf_file import GgufError, GgufModel, GgufTensor, Value, read_gguf
from tests.unit.engine.llamacpp.architectures import Shapes, typed

_DENSE = {"key_length": 128, "value_length": 128}
PUBLISHED: Mapping[str, tuple[str, Mapping[str, Value]]] = {
    "Llama-3.3-70B": ("llama", {"hidden": 8192, "heads": 64, "kv_heads": 8, "inner": 28672, "vocabulary": 128256}),
    "Mistral-7B": ("llama", {"hidden": 4096, "heads": 32, "kv_heads": 8, "inner": 14336, "vocabulary": 32768}),
    "Qwen3-8B": ("qwen3", {"hidden": 4096, "heads": 32, "kv_heads": 8, "inner": 12288, "vocabulary": 151936, **_DENSE}),
    "Qwen3-30B-A3B": (
        "qwen3moe",
        {"hidden": 2048, "heads": 32, "kv_heads": 4, "inner": 6144, "vocabulary": 151936, **_DENSE, "expert_count": 128,
         "expert_used_count": 8, "expert_feed_forward_length": 768},
    ),
    "Gemma-3-12B": (
        "gemma3",
        {"hidden": 3840, "heads": 16, "kv_heads": 8, "inner": 15360, "vocabulary": 262208, "key_length": 256,
         "value_length": 256, "sliding_window": 1024},
    ),
    "gpt-oss-20b": (
        "gpt-oss",
        {"hidden": 2880, "heads": 64, "kv_heads": 8, "inner": 2880, "vocabulary": 201088, "key_length": 64,
         "value_length": 64, "sliding_window": 128, "expert_count": 32, "expert_used_count": 4,
         "expert_feed_forward_length": 2880},
    ),
    "DeepSeek-V3": (
        "deepseek2",
        {"hidden": 7168, "heads": 128, "kv_heads": 1, "inner": 18432, "vocabulary": 129280, "key_length": 576,
         "value_length": 512, "key_length_mla": 192, "value_length_mla": 128, "kv_lora_rank": 512, "q_lora_rank": 1536,
         "rotated": 64, "expert_count": 256, "expert_used_count": 8, "expert_feed_forward_length": 2048,
         "expert_shared_count": 1, "expert_group_count": 8, "expert_group_used_count": 4, "nextn_predict_layers": 1},
    ),
}  # fmt: skip

_KEYS = {
    "hidden": "embedding_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "inner": "feed_forward_length",
    "vocabulary": "vocab_size",
    "rotated": "rope.dimension_count",
    **{
        name: f"attention.{name}"
        for name in ("key_length", "value_length", "key_length_mla", "value_length_mla", "kv_lora_rank", "q_lora_rank",
                     "sliding_window")
    },
}  # fmt: skip


def shapes_of(architecture: str, get: Mapping[str, int]) -> Shapes:
    """Return the tensors around the blocks and of the first one, as llama.cpp's converter writes them."""
    hidden, heads, kv_heads = get["hidden"], get["heads"], get["kv_heads"]
    key = get.get("key_length", hidden // heads)
    value = get.get("value_length", key)
    shapes: Shapes = {"token_embd.weight": (get["vocabulary"], hidden), "output_norm.weight": (hidden,)}
    block: Shapes = {"attn_norm.weight": (hidden,)}
    if "kv_lora_rank" in get:
        rank, queries, rotated = get["kv_lora_rank"], get["q_lora_rank"], get["rotated"]
        key, value = get["key_length_mla"], get["value_length_mla"]
        block |= {
            "attn_q_a.weight": (queries, hidden),
            "attn_q_b.weight": (heads * key, queries),
            "attn_kv_a_mqa.weight": (rank + rotated, hidden),
            "attn_k_b.weight": (heads, rank, key - rotated),
            "attn_v_b.weight": (heads, value, rank),
            "nextn.eh_proj.weight": (hidden, 2 * hidden),
        }
    else:
        block |= {"attn_q.weight": (heads * key, hidden), "attn_k.weight": (kv_heads * key, hidden)}
        block |= {"attn_v.weight": (kv_heads * value, hidden)}
    block["attn_output.weight"] = (hidden, heads * value)
    if architecture == "llama":
        shapes["rope_freqs.weight"] = (key // 2,)
    if architecture.startswith(("qwen3", "gemma3")):
        block["attn_q_norm.weight"] = (key,)
    if architecture == "gpt-oss":
        block |= {"attn_sinks.weight": (heads,), "attn_k.bias": (kv_heads * key,)}
    if "expert_count" in get:
        count, inner = get["expert_count"], get["expert_feed_forward_length"]
        block |= {"ffn_gate_inp.weight": (count, hidden), "ffn_up_exps.weight": (count, inner, hidden)}
        if shared := get.get("expert_shared_count"):
            block["ffn_up_shexp.weight"] = (inner * shared, hidden)
    if "expert_count" not in get or "expert_shared_count" in get:
        block |= {"ffn_up.weight": (get["inner"], hidden), "ffn_down.weight": (hidden, get["inner"])}
    return shapes | {f"blk.0.{name}": shape for name, shape in block.items()}


def header(architecture: str, sizes: Mapping[str, Value], shapes: Shapes) -> GgufModel:
    """Return a model of which only the header is there."""
    stated = {f"{architecture}.{_KEYS.get(name, name)}": typed(value) for name, value in sizes.items()}
    stated |= {"general.architecture": typed(architecture), f"{architecture}.block_count": typed(1)}
    tensors = {
        name: GgufTensor(name, shape, GGMLQuantizationType.F16, Path("published.gguf"), 0, 2 * int(np.prod(shape)))
        for name, shape in shapes.items()
    }
    metadata = {key: value.value for key, value in stated.items()}
    return GgufModel(metadata, tensors, (Path("published.gguf"),), {key: value.type for key, value in stated.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_axes_of_published_shapes_keep_their_meaning(name: str, tmp_path: Path) -> None:
    architecture, stated = PUBLISHED[name]
    large = {key: value for key, value in stated.items() if isinstance(value, int)}
    write_tiny_model(header(architecture, stated, shapes_of(architecture, large)), tmp_path / "tiny.gguf")
    tiny = read_gguf(tmp_path / "tiny.gguf")
    small = {key: tiny.integer(_KEYS.get(key, key)) for key in large}
    assert small["hidden"] < large["hidden"] / 2
    assert {name: tensor.shape for name, tensor in tiny.tensors.items()} == shapes_of(architecture, small)
    assert sum(tensor.size_bytes for tensor in tiny.tensors.values()) < 16 << 20, "of a block"


def test_axis_that_does_not_follow_from_the_metadata_is_named(tmp_path: Path) -> None:
    architecture, stated = PUBLISHED["Mistral-7B"]
    large = {key: value for key, value in stated.items() if isinstance(value, int)}
    shapes = {**shapes_of(architecture, large), "blk.0.attn_extra.weight": (4097, 4096)}
    with pytest.raises(GgufError, match=r"'blk.0.attn_extra.weight' has an axis of 4097, which does not follow"):
        write_tiny_model(header(architecture, stated, shapes), tmp_path / "tiny.gguf")
