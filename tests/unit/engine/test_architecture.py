"""Whatever stands around the blocks is found and served, and what cannot be split is refused, with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from node.engine.architecture import (
    COUNT,
    ORIGINAL_POSITIONS,
    PROMPTS,
    check_architecture,
    package_of,
    references_of,
    shrink,
    tiny_model,
)
from node.engine.interface import EngineError, EngineOptions, SliceInput, source_from_package
from node.engine.loading import describe
from node.engine.torch_shard import TorchShard
from node.models.layout import BY_NAME
from node.models.manifest import constant_positions
from node.models.store import Package
from protocol.identity import BlockRange
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import DEVICE, InProcess, decode, session, spans

OPTIONS = EngineOptions(kv_positions=256, device=DEVICE)

LONGROPE: dict[str, Any] = {
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [4.0] * 48},
}


def model_type(content: object) -> str:
    return content["model_type"] if isinstance(content, dict) else ""


def shards_of(package: Package, count: int) -> list[InProcess]:
    return [
        InProcess(TorchShard(source_from_package(package, blocks), blocks, OPTIONS))
        for blocks in spans(package.manifest.block_count, count)
    ]


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("xglm", {"lm_head", "layer_norm"}),
        ("gpt2", {"lm_head", "ln_f"}),
        ("modernbert-decoder", {"final_norm", "lm_head.dense", "lm_head.norm", "decoder"}),
        ("olmo", {"lm_head"}),
        ("gpt_neox_japanese", {"embed_out", "final_layer_norm"}),
    ],
)
def test_modules_behind_the_last_block_are_found_by_tracing(model_type: str, head: set[str]) -> None:
    assert describe({"model_type": model_type}).names.head == head


@pytest.mark.parametrize("model_type", ["xglm", "biogpt"])
async def test_final_norm_of_any_name_is_served_by_the_last_span(model_type: str, tmp_path: Path) -> None:
    described = describe({"model_type": model_type})
    model = tiny_model(shrink(described.config))
    package = package_of(model, tmp_path, described.names)
    (reference,) = references_of(model, [PROMPTS[0]])
    for count in (1, 2, 3):
        tokens = await decode(shards_of(package, count), reference.prompt, len(reference.tokens), chunk=4)
        assert tokens == list(reference.tokens), f"{count} spans"


def test_last_span_whose_file_lacks_the_final_norm_is_not_served(tmp_path: Path) -> None:
    described = describe({"model_type": "xglm", "tie_word_embeddings": False})
    package = package_of(tiny_model(shrink(described.config)), tmp_path, BY_NAME)
    count = package.manifest.block_count
    last = BlockRange(count - 1, count)
    with pytest.raises(EngineError, match=r"files lack model\.layer_norm"):
        TorchShard(source_from_package(package, last), last, OPTIONS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model_type": "qwen3_next"}, r"Qwen3-Next \(qwen3_next\) uses linear attention, which cannot be split"),
        ({"model_type": "minimax"}, "linear attention"),
        ({"model_type": "jamba"}, r"state-space \(Mamba\) layers"),
        ({"model_type": "falcon_h1"}, r"state-space \(Mamba\) layers"),
        ({"model_type": "mamba"}, r"state-space \(Mamba\) layers"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 16}, "convolutions"),
        ({"model_type": "gemma3n_text"}, "Gemma3n"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 0}, "Gemma3n"),
        ({"model_type": "rwkv"}, "RWKV"),
        ({"model_type": "deepseek_v32"}, "sparse attention"),
        ({"model_type": "bart"}, "only decoders are served"),
        ({"model_type": "bert"}, "not a plain stack"),
    ],
    ids=model_type,
)
def test_unsupported_architecture_is_refused_by_its_config(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(EngineError, match=reason) as refusal:
        check_architecture(content)
    assert "Layer" not in str(refusal.value)


def test_architecture_with_other_logits_when_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.starcoder2 import modeling_starcoder2

    # As if the blocks also looked at what only the first span has.
    forward = modeling_starcoder2.Starcoder2DecoderLayer.forward
    monkeypatch.setattr(
        modeling_starcoder2.Starcoder2DecoderLayer,
        "forward",
        lambda self, hidden, **options: forward(self, hidden, **options) * (1 + 0.1 * options["position_ids"].shape[1]),
    )
    with pytest.raises(EngineError, match="cannot be split into spans here: in one piece it gives other logits"):
        check_architecture({"model_type": "starcoder2"})


@pytest.mark.parametrize("content", [LONGROPE, {"model_type": "xglm"}, {"model_type": "gemma3_text"}], ids=model_type)
def test_supported_architecture_passes_its_check(content: dict[str, Any]) -> None:
    check_architecture(content)


def test_sessions_of_different_lengths_share_steps_under_longrope(tmp_path: Path) -> None:
    described = describe(LONGROPE)
    model = tiny_model(shrink(described.config))
    package = package_of(model, tmp_path, described.names)
    prompts = [list(range(7, 7 + length)) for length in (3, 11, ORIGINAL_POSITIONS - COUNT)]
    references = references_of(model, prompts)
    engines = shards_of(package, 2)
    for number, prompt in enumerate(prompts):
        for engine in engines:
            engine.open_now(session(number), len(prompt) + COUNT)
    texts = [list(prompt) for prompt in prompts]
    starts = [0] * len(texts)
    for _ in range(COUNT):
        rows = [tensor_from_tokens(text[start:]) for text, start in zip(texts, starts, strict=True)]
        for engine in engines:
            slices = [
                SliceInput(session=session(number), position=starts[number], tensor=tensor, draws=1)
                for number, tensor in enumerate(rows)
            ]
            rows = [output.tensor for output in engine.step_now(slices).outputs]
        for number, tensor in enumerate(rows):
            starts[number] = len(texts[number])
            texts[number] += tokens_from_tensor(tensor)
    assert [text[-COUNT:] for text in texts] == [list(reference.tokens) for reference in references]


def test_context_ends_where_rotary_frequencies_would_change(tmp_path: Path) -> None:
    described = describe(LONGROPE)
    package = package_of(tiny_model(shrink(described.config)), tmp_path, described.names)
    (engine,) = shards_of(package, 1)
    assert engine.info.max_positions == package.manifest.max_positions == ORIGINAL_POSITIONS
    with pytest.raises(EngineError, match=f"a session has 1 to {ORIGINAL_POSITIONS} positions"):
        engine.open_now(session(0), ORIGINAL_POSITIONS + 1)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 8192, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 8192),
        (LONGROPE, 4096),
        ({"text_config": LONGROPE}, 4096),
        (
            {
                "max_position_embeddings": 8192,
                "rope_parameters": {
                    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 2048},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            2048,
        ),
        ({"max_position_embeddings": 8192, "rope_scaling": {"rope_type": ["longrope"], "factor": 4.0}}, 8192),
        ({}, None),
    ],
    ids=range(8),
)
def test_context_up_to_which_kv_does_not_depend_on_length(config: dict[str, Any], positions: int | None) -> None:
    assert constant_positions(config) == positions


def test_large_experts_are_described_without_memory() -> None:
    described = describe({"model_type": "deepseek_v3"})
    weights = list(described.model.parameters())
    assert sum(weight.numel() for weight in weights) > 500e9
    assert all(weight.is_meta for weight in weights)
    rotary: Any = described.base.rotary_emb
    assert torch.isfinite(rotary.inv_freq).all()


def test_shrunk_config_keeps_what_decides_which_code_runs() -> None:
    gemma = shrink(AutoConfig.for_model("gemma3_text"))
    assert gemma["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
    assert gemma["num_hidden_layers"] == len(gemma["layer_types"])
    assert 0 < gemma["sliding_window"] < 10
    experts = shrink(AutoConfig.for_model("deepseek_v3"))
    assert experts["first_k_dense_replace"] == 1 < experts["num_hidden_layers"]
    assert experts["n_group"] <= experts["n_routed_experts"] <= 8
    describe(shrink(describe({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 32}).config))
    grouped = shrink(AutoConfig.for_model("qwen2_moe", num_attention_heads=16, num_key_value_heads=4))
    assert grouped["num_attention_heads"] > grouped["num_key_value_heads"] > 1
