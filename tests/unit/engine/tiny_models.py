"""Tiny random models of each architecture, packed as model packages are, and what `generate` makes of a prompt."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from node.engine.interface import ShardSource
from node.models.layout import part_of
from protocol.identity import BlockRange, ModelId

VOCABULARY = 97
BLOCKS = 4
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
COUNT = 16
"""Tokens to generate: past the sliding windows below."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 128,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SHAPE},
    "llama, tied": {"model_type": "llama", **_SHAPE, "tie_word_embeddings": True},
    "llama, gelu": {"model_type": "llama", **_SHAPE, "hidden_act": "gelu"},
    "qwen2": {"model_type": "qwen2", **_SHAPE},
    "qwen2, sliding from block 2": {
        "model_type": "qwen2",
        **_SHAPE,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", **_SHAPE, "head_dim": 16},
    "qwen3, dynamic RoPE": {
        "model_type": "qwen3",
        **_SHAPE,
        "head_dim": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", **_SHAPE, "sliding_window": 6},
    "gemma3": {
        "model_type": "gemma3_text",
        **_SHAPE,
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {"model_type": "gpt2", **_GPT2_SHAPE, "scale_attn_by_inverse_layer_idx": True},
    "phi": {"model_type": "phi", **_SHAPE},
    "falcon": {"model_type": "falcon", **_SHAPE, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon, alibi": {
        "model_type": "falcon",
        **_SHAPE,
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
    },
    "olmo2": {"model_type": "olmo2", **_SHAPE},
    "mixtral": {"model_type": "mixtral", **_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SHAPE,
        **_EXPERTS,
        "head_dim": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "phi3": {"model_type": "phi3", **_SHAPE, "pad_token_id": 0},
    "gpt_neox": {"model_type": "gpt_neox", **_SHAPE},
    "gemma2": {"model_type": "gemma2", **_SHAPE, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "stablelm": {"model_type": "stablelm", **_SHAPE},
    "starcoder2": {"model_type": "starcoder2", **_SHAPE},
    "granite": {
        "model_type": "granite",
        **_SHAPE,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
    },
    "bloom": {"model_type": "bloom", **_SHAPE, "n_layer": BLOCKS, "n_head": 4},
    "opt": {"model_type": "opt", **_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **_GPT2_SHAPE},
    "cohere": {"model_type": "cohere", **_SHAPE, "logit_scale": 0.5},
    "gemma": {"model_type": "gemma", **_SHAPE, "head_dim": 16},
    "olmoe": {"model_type": "olmoe", **_SHAPE, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_SHAPE,
        **_EXPERTS,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_SHAPE,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_SHAPE,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "llama4": {
        "model_type": "llama4_text",
        **_SHAPE,
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "pad_token_id": 0,
    },
    "gptj": {"model_type": "gptj", **_GPT2_SHAPE, "rotary_dim": 8},
    "mpt": {
        "model_type": "mpt",
        "d_model": 32,
        "n_heads": 4,
        "n_layers": BLOCKS,
        "vocab_size": VOCABULARY,
        "max_seq_len": 128,
        "tie_word_embeddings": False,
    },
    "smollm3": {"model_type": "smollm3", **_SHAPE, "pad_token_id": 0, "no_rope_layers": [1, 0, 1, 0]},
}


@dataclass(frozen=True)
class TinyModel:
    """A model's config, where its package's files lie, and the greedy tokens that `generate` gives after PROMPT."""

    config: dict[str, Any]
    folder: Path
    tokens: list[int]

    def source(self, blocks: BlockRange) -> ShardSource:
        """Return the files that a span needs."""
        first, last = blocks.start == 0, blocks.end == BLOCKS
        return ShardSource(
            model=ModelId("0" * 64),
            config=self.config,
            block_files={block: self.folder / f"{block}.safetensors" for block in range(blocks.start, blocks.end)},
            embed_file=self.folder / "embed.safetensors"
            if first or (last and self.config["tie_word_embeddings"])
            else None,
            head_file=self.folder / "head.safetensors" if last else None,
        )


def tiny_model(family: str, folder: Path) -> TinyModel:
    """Make the tiny model of a family in a folder, with weights that make it say many different tokens."""
    content = dict(FAMILIES[family])
    model_type = content.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **content))
    model.eval()
    for seed in range(30):
        _randomise(model, seed)
        tokens = _generate(model)
        if len(set(tokens)) >= COUNT // 2:
            break
    else:
        raise AssertionError(f"no seed makes {family} say enough different tokens to compare")
    model.save_pretrained(folder)
    parts: defaultdict[object, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts[part_of(name)][name] = tensor
    for part, tensors in parts.items():
        save_file(tensors, folder / f"{part}.safetensors")
    return TinyModel({"model_type": model_type, **content}, folder, tokens)


def narrowed(tiny: TinyModel, dtype: torch.dtype, folder: Path) -> TinyModel:
    """Return a model as if it had been published in a narrow type, with the tokens that its rounded weights give."""
    return changed(tiny, lambda _, tensor: tensor.to(dtype), folder)


def changed(tiny: TinyModel, change: Callable[[str, torch.Tensor], torch.Tensor], folder: Path) -> TinyModel:
    """Return a model with other weights, and the tokens that these give in fp32."""
    for file in tiny.folder.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    shutil.copy(tiny.folder / "config.json", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return TinyModel(tiny.config, folder, _generate(model.eval()))


def _generate(model: Any) -> list[int]:
    """Return the greedy tokens of a whole model (Any: the annotations of `generate` contradict each other)."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    mask = torch.ones(1, len(PROMPT), dtype=torch.long)
    tokens = model.generate(torch.tensor([PROMPT]), attention_mask=mask, max_new_tokens=COUNT, do_sample=False)
    return [int(token) for token in tokens[0, len(PROMPT) :]]


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Fill a model with large weights: those of its own initialisation make it repeat two or three tokens."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
