"""What a GGUF file's metadata ask of a config; what a config cannot say is refused, and the line names the key."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.models.gguf_file import GgufError, GgufModel, read_gguf
from node.models.gguf_metadata import requirements, ropes
from node.models.gguf_rope import Rope
from tests.unit.models.gguf_files import HEAD_SIZE, metadata, tensors, write_gguf


def model(tmp_path: Path, architecture: str = "llama", factors: dict[str, Any] | None = None, **own: Any) -> GgufModel:
    extra = {f"{name}.weight": np.array(values, np.float32) for name, values in (factors or {}).items()}
    keys = metadata(architecture, **own)
    return read_gguf(write_gguf(tmp_path / "tiny.gguf", keys, {**tensors(architecture), **extra}))


def wanted(file: GgufModel) -> dict[str, object]:
    return {need.attribute: need.value for need in requirements(file)}


def test_a_plain_llama_asks_for_its_shape(tmp_path: Path) -> None:
    assert wanted(model(tmp_path)) == {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_SIZE,
        "rms_norm_eps": float(np.float32(1e-5)),
        "sliding_window": None,
        "bos_token_id": 1,
        "pad_token_id": None,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "attention.sliding_window", 16),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.causal", False),
        ("llama", "logit_scale", 8.0),
        ("llama", "residual_scale", 0.2),
        ("llama", "embedding_scale", 12.0),
        ("llama", "expert_count", 8),
        ("llama", "expert_used_count", 2),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "attention.value_length", 16),
        ("llama", "attention.head_count_kv", [4, 2]),
        ("llama", "feed_forward_length", [64, 48]),
        ("llama", "rope.dimension_sections", [2, 2, 0, 0]),
        ("llama", "rope.freq_base_swa", 1e4),
        ("llama", "swiglu_clamp_exp", 7.0),
        ("llama", "pooling_type", 1),
        ("llama", "something.of.tomorrow", 1),
        ("qwen3moe", "expert_weights_scale", 2.5),
        ("qwen3moe", "expert_weights_norm", False),
        ("qwen3moe", "expert_gating_func", 2),
        ("qwen3moe", "expert_shared_count", 1),
        ("falcon", "attention.head_count_kv", 4),
        ("starcoder2", "attention.clamp_kqv", 8.0),
    ],
)
def test_gguf_key_without_config_equivalent_is_refused(tmp_path: Path, architecture: str, key: str, value: Any) -> None:
    file = model(tmp_path, architecture, **{key.replace(".", "__"): value})
    with pytest.raises(GgufError, match=rf"tiny.gguf has {architecture}\.{key} = .*which is not supported here"):
        requirements(file)


def test_values_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    plain = wanted(model(tmp_path))
    own: dict[str, Any] = {
        "attention__causal": True,
        "attention__clamp_kqv": 0.0,
        "attention__head_count_kv": [2, 2],
        "attention__key_length": HEAD_SIZE,
        "attention__sliding_window": 0,
        "expert_count": 0,
        "logit_scale": 1.0,
        "tensor_data_layout": "Meta AI original pth",
    }
    assert wanted(model(tmp_path, **own)) == plain


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("general.architecture", "granite", "architecture 'granite' are not supported .*: import the model's safetens"),
        ("general.type", "adapter", "is not a model: its general.type is 'adapter'"),
        ("adapter.type", "lora", "has the key adapter.type = 'lora'"),
        ("tokenizer.ggml.new", 1, "has the key tokenizer.ggml.new = 1, which is not supported"),
        ("tokenizer.ggml.eos_token_id", "two", "its special tokens are not token ids"),
        ("llama.attention.layer_norm_rms_epsilon", None, "lacks the key llama.attention.layer_norm_rms_epsilon"),
        ("llama.attention.head_count", 0, "has llama.attention.head_count = 0"),
    ],
)
def test_other_faults_of_metadata_are_refused(tmp_path: Path, key: str, value: Any, line: str) -> None:
    keys = {name: it for name, it in {**metadata(), key: value}.items() if it is not None}
    with pytest.raises(GgufError, match=line):
        requirements(read_gguf(write_gguf(tmp_path / "tiny.gguf", keys)))


def test_further_ends_of_text_are_kept(tmp_path: Path) -> None:
    keys = metadata() | {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    assert wanted(read_gguf(write_gguf(tmp_path / "tiny.gguf", keys)))["eos_token_id"] == [2, 5]
    without = metadata(tokenizer=False)
    needs = wanted(read_gguf(write_gguf(tmp_path / "tiny.gguf", without)))
    assert (needs["bos_token_id"], needs["eos_token_id"]) == (None, None)


def test_what_llama_cpp_takes_by_default_is_asked_for(tmp_path: Path) -> None:
    needs = wanted(model(tmp_path, "gemma2", attention__key_length=16))
    assert (needs["sliding_window"], needs["attn_logit_softcapping"], needs["final_logit_softcapping"]) == (
        4096,
        50,
        30,
    )
    assert needs["query_pre_attn_scalar"] == 16
    largest = wanted(model(tmp_path, "gemma2", attention__key_length=16, block_count=46))
    assert largest["query_pre_attn_scalar"] == 8
    assert wanted(model(tmp_path, attention__head_count_kv=None))["num_key_value_heads"] == 4


def published_llama3(dimensions: int, base: float, factor: float, low: float, high: float, context: int) -> list[float]:
    """The factors as llama.cpp's converter calculates them from a published config."""
    factors = []
    for number in range(dimensions // 2):
        wavelength = 2 * math.pi * base ** (2 * number / dimensions)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


@pytest.mark.parametrize(
    ("dimensions", "base", "factor", "low", "high", "context"),
    [
        (128, 500000.0, 8.0, 1.0, 4.0, 8192),
        (64, 500000.0, 32.0, 1.0, 4.0, 8192),
        (128, 500000.0, 16.0, 1.0, 1.5, 8192),
        (128, 500000.0, 4.0, 2.0, 9.0, 4096),
        (16, 10000.0, 8.0, 1.0, 4.0, 64),
        (8, 10000.0, 8.0, 1.0, 4.0, 32),
        (8, 10000.0, 6.0, 1.0, 4.0, 2048),
    ],
)
def test_llama3_scaling_is_reconstructed_from_its_factors(
    tmp_path: Path, dimensions: int, base: float, factor: float, low: float, high: float, context: int
) -> None:
    factors = published_llama3(dimensions, base, factor, low, high, context)
    own: dict[str, Any] = {
        "rope__freq_base": base,
        "rope__dimension_count": dimensions,
        "attention__key_length": dimensions,
    }
    (rope,) = ropes(model(tmp_path, factors={"rope_freqs": factors}, **own)).values()
    said = rope.parameters
    assert said["rope_type"] == "llama3"
    again = published_llama3(
        dimensions,
        base,
        said["factor"],  # type: ignore[arg-type]
        said["low_freq_factor"],  # type: ignore[arg-type]
        said["high_freq_factor"],  # type: ignore[arg-type]
        said["original_max_position_embeddings"],  # type: ignore[arg-type]
    )
    np.testing.assert_allclose(again, factors, rtol=4e-6)
    if (low, high, context) == (1.0, 4.0, 8192):
        assert (said["factor"], said["low_freq_factor"], said["high_freq_factor"]) == (factor, 1.0, 4.0)


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    (rope,) = ropes(model(tmp_path, factors={"rope_freqs": [1.0] * 4})).values()
    assert rope.parameters["rope_type"] == "default"


def test_linear_and_yarn_scaling_are_kept(tmp_path: Path) -> None:
    plain = Rope.plain(HEAD_SIZE, 10000.0).frequencies
    for own in (
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
        {"rope__scaling__factor": 4.0},
        {"rope__scale_linear": 4.0},
    ):
        (rope,) = ropes(model(tmp_path, **own)).values()
        assert rope.parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
        np.testing.assert_allclose(rope.frequencies, np.array(plain) / 4)
    yarn: dict[str, Any] = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 32,
        "rope__scaling__yarn_beta_fast": 16.0,
    }
    (rope,) = ropes(model(tmp_path, **yarn)).values()
    assert rope.parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
    }
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    (rope,) = ropes(model(tmp_path, rope__scaling__type="none", rope__scaling__factor=4.0)).values()
    assert rope.parameters["rope_type"] == "default"


def test_longrope_of_phi3_is_kept(tmp_path: Path) -> None:
    factors = {"rope_factors_short": [1.0, 1.5, 2.0, 3.0], "rope_factors_long": [1.0, 4.0, 9.0, 16.0]}
    own: dict[str, Any] = {
        "rope__scaling__type": "longrope",
        "rope__scaling__attn_factor": 1.25,
        "rope__scaling__original_context_length": 32,
    }
    (rope,) = ropes(model(tmp_path, "phi3", factors, **own)).values()
    assert rope.parameters["long_factor"] == [1.0, 4.0, 9.0, 16.0]
    assert rope.parameters["short_factor"] == [1.0, 1.5, 2.0, 3.0]
    assert rope.parameters["original_max_position_embeddings"] == 32
    assert rope.attention_factor == 1.25


@pytest.mark.parametrize(
    ("architecture", "own", "factors", "line"),
    [
        ("llama", {"rope__scaling__type": "dynamic"}, {}, "rope.scaling.type = 'dynamic', a RoPE scaling"),
        ("llama", {"rope__scaling__type": "longrope"}, {}, "rope.scaling.type = 'longrope', a RoPE scaling"),
        ("llama", {"rope__scaling__factor": -1.0}, {}, "rope.scaling.factor = -1.0, a RoPE scaling"),
        ("llama", {"rope__scaling__factor": math.nan}, {}, "rope.scaling.factor = nan, a RoPE scaling"),
        ("llama", {"rope__scaling__attn_factor": 1.2}, {}, "rope.scaling.attn_factor = 1.2.*, a RoPE scaling"),
        ("llama", {"rope__scaling__yarn_log_multiplier": 0.1}, {}, "rope.scaling.yarn_log_multiplier"),
        (
            "llama",
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__yarn_ext_factor": 0.5},
            {},
            "rope.scaling.yarn_ext_factor = 0.5, a RoPE scaling",
        ),
        ("llama", {}, {"rope_freqs": [1.0, 3.0, 2.0, 8.0]}, "rope_freqs.weight is not that of Llama 3"),
        ("llama", {}, {"rope_freqs": [1.0, 8.0]}, "rope_freqs.weight does not fit its 4 frequencies"),
        ("llama", {}, {"rope_freqs": [1.0, math.nan, 8.0, 8.0]}, "does not fit its 4 frequencies"),
        ("llama", {"rope__scaling__factor": 4.0}, {"rope_freqs": [1.0, 8.0, 8.0, 8.0]}, "by both rope_freqs.weight"),
        ("qwen2", {}, {"rope_freqs": [1.0, 8.0, 8.0, 8.0]}, "of this architecture, cannot be kept"),
        ("llama", {}, {"rope_factors_long": [1.0] * 4, "rope_factors_short": [1.0] * 4}, "a RoPE scaling which"),
        ("phi3", {}, {"rope_factors_long": [1.0] * 4}, "a RoPE scaling which"),
        ("gpt2", {}, {"rope_freqs": [1.0] * 4}, "rope_freqs.weight has no meaning for gpt2 models"),
    ],
)
def test_scaling_that_cannot_be_kept_is_refused(
    tmp_path: Path, architecture: str, own: dict[str, Any], factors: dict[str, Any], line: str
) -> None:
    with pytest.raises(GgufError, match=line) as error:
        ropes(model(tmp_path, architecture, factors, **own))
    assert "\n" not in str(error.value)
