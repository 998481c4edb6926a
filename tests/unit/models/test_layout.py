from dataclasses import dataclass

import pytest

from node.models.layout import arrange, block_file, input_matrix, output_matrix, part_of


@dataclass(frozen=True)
class Architecture:
    """How one architecture names its tensors; `{}` is the block's number."""

    embed: tuple[str, ...]
    head: tuple[str, ...]
    block: tuple[str, ...]
    tied: bool = False


LLAMA_BLOCK = (
    "model.layers.{}.input_layernorm.weight",
    "model.layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.mlp.down_proj.weight",
)
LLAMA = Architecture(("model.embed_tokens.weight",), ("lm_head.weight", "model.norm.weight"), LLAMA_BLOCK)

ARCHITECTURES = {
    "llama": LLAMA,
    "qwen2": Architecture(LLAMA.embed, LLAMA.head, (*LLAMA_BLOCK, "model.layers.{}.self_attn.q_proj.bias")),
    "qwen3": Architecture(LLAMA.embed, LLAMA.head, (*LLAMA_BLOCK, "model.layers.{}.self_attn.q_norm.weight")),
    "mistral": LLAMA,
    "olmo2": LLAMA,
    "gemma3": Architecture(LLAMA.embed, ("model.norm.weight",), LLAMA_BLOCK, tied=True),
    "gemma3 beside a vision tower": Architecture(
        ("model.language_model.embed_tokens.weight",),
        ("model.language_model.norm.weight",),
        ("model.language_model.layers.{}.mlp.up_proj.weight",),
        tied=True,
    ),
    "gpt2": Architecture(
        ("transformer.wte.weight", "transformer.wpe.weight"),
        ("transformer.ln_f.weight", "transformer.ln_f.bias"),
        ("transformer.h.{}.ln_1.bias", "transformer.h.{}.attn.c_attn.bias", "transformer.h.{}.attn.c_attn.weight"),
        tied=True,
    ),
    "gpt2 as on the hub": Architecture(
        ("wte.weight", "wpe.weight"), ("ln_f.weight", "ln_f.bias"), ("h.{}.attn.c_attn.bias",), tied=True
    ),
    "phi": Architecture(
        ("model.embed_tokens.weight",),
        ("lm_head.weight", "lm_head.bias", "model.final_layernorm.weight", "model.final_layernorm.bias"),
        ("model.layers.{}.self_attn.dense.bias", "model.layers.{}.mlp.fc1.weight"),
    ),
    "falcon": Architecture(
        ("transformer.word_embeddings.weight",),
        ("transformer.ln_f.weight", "transformer.ln_f.bias"),
        ("transformer.h.{}.self_attention.query_key_value.weight", "transformer.h.{}.self_attention.dense.bias"),
        tied=True,
    ),
    "mixtral": Architecture(
        LLAMA.embed, LLAMA.head, (*LLAMA_BLOCK, "model.layers.{}.block_sparse_moe.experts.7.w1.weight")
    ),
    "qwen3_moe": Architecture(
        LLAMA.embed, LLAMA.head, (*LLAMA_BLOCK, "model.layers.{}.mlp.experts.7.gate_proj.weight")
    ),
    "bloom": Architecture(
        (
            "transformer.word_embeddings.weight",
            "transformer.word_embeddings_layernorm.weight",
            "transformer.word_embeddings_layernorm.bias",
        ),
        ("transformer.ln_f.weight", "transformer.ln_f.bias"),
        ("transformer.h.{}.self_attention.query_key_value.bias",),
        tied=True,
    ),
    "gpt_neox": Architecture(
        ("gpt_neox.embed_in.weight",),
        ("embed_out.weight", "gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"),
        ("gpt_neox.layers.{}.attention.dense.bias", "gpt_neox.layers.{}.post_attention_layernorm.weight"),
    ),
    "opt": Architecture(
        (
            "model.decoder.embed_tokens.weight",
            "model.decoder.embed_positions.weight",
            "model.decoder.project_in.weight",
        ),
        (
            "model.decoder.final_layer_norm.weight",
            "model.decoder.final_layer_norm.bias",
            "model.decoder.project_out.weight",
        ),
        ("model.decoder.layers.{}.final_layer_norm.bias", "model.decoder.layers.{}.fc1.weight"),
        tied=True,
    ),
    "stablelm": Architecture(LLAMA.embed, (*LLAMA.head, "model.norm.bias"), LLAMA_BLOCK),
}

NEEDED_BY_NO_DECODER = [
    "h.0.attn.bias",
    "transformer.h.11.attn.masked_bias",
    "gpt_neox.layers.3.attention.bias",
    "gpt_neox.layers.3.attention.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    "model.vision_tower.vision_model.encoder.layers.0.layer_norm1.bias",
    "model.visual.blocks.0.norm1.weight",
    "multi_modal_projector.mm_input_projection_weight.weight",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture_splits_into_embed_blocks_and_head(architecture: Architecture) -> None:
    blocks = [sorted(name.format(block) for name in architecture.block) for block in range(12)]
    names = [*architecture.head, *(name for block in blocks for name in block), *architecture.embed]
    layout = arrange([*names, *NEEDED_BY_NO_DECODER], 12, tied=architecture.tied)
    assert layout.embed == tuple(sorted(architecture.embed))
    assert layout.head == tuple(sorted(architecture.head))
    assert [list(block) for block in layout.blocks] == blocks
    assert input_matrix(names) == architecture.embed[0]
    assert output_matrix(names) == (None if architecture.tied else architecture.head[0])


@pytest.mark.parametrize("name", NEEDED_BY_NO_DECODER)
def test_constants_and_other_modalities_are_left_out(name: str) -> None:
    assert part_of(name) is None


@pytest.mark.parametrize(("output", "bias"), [("lm_head.weight", "lm_head.bias"), ("embed_out.weight", "lm_head.bias")])
def test_a_copy_of_a_tied_embedding_is_dropped_and_nothing_else(output: str, bias: str) -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.x.weight", "model.norm.weight", output, bias]
    assert arrange(names, 1, tied=True).head == (bias, "model.norm.weight")
    assert output in arrange(names, 1, tied=False).head


def test_layers_beyond_the_decoder_are_left_out() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.x.weight", "model.layers.1.mtp.weight", "model.norm.weight"]
    layout = arrange(names, 1, tied=True)
    assert layout.blocks == (("model.layers.0.x.weight",),)
    assert "model.layers.1.mtp.weight" not in layout.embed + layout.head


def test_an_incomplete_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensors of block 1, where 3 blocks are expected"):
        arrange(["wte.weight", "h.0.x.weight", "h.2.x.weight"], 3, tied=True)
    with pytest.raises(ValueError, match="no token embedding"):
        arrange(["h.0.x.weight", "ln_f.weight"], 1, tied=True)


def test_block_files_sort_in_the_order_of_the_blocks() -> None:
    names = [block_file(block) for block in range(200)]
    assert names[7] == "block-007.safetensors"
    assert names == sorted(names)
