"""What a method's name says about its arithmetic, on which the roofline estimates rest."""

import numpy as np
import pytest

from selector.dataset import Contexts, Pairs
from selector.features import ContextTable, PairTable, arithmetic_of


@pytest.mark.parametrize(
    ("name", "weight_bits", "compute_bits"),
    [
        ("Q5_K_M", 5, 16),
        ("llama.cpp|iq2_xs", 2, 16),
        ("llama.cpp|q4_k_m", 4, 16),
        ("ollama|q8_0", 8, 16),
        ("bnb4", 4, 16),
        ("vllm|bitsandbytes", 4, 16),
        ("vllm|gptq-int8", 8, 16),
        ("vllm|awq", 4, 16),
        ("hf|nf4", 4, 16),
        ("8bit", 8, 16),
        ("load_in_4-bit", 4, 16),
        ("16bit", 16, 16),
        ("lmdeploy|w4a16", 4, 16),
        ("trtllm|w4a8", 4, 8),
        ("trtllm|sq", 8, 8),
        ("squeeze|fp16", 16, 16),
        ("vllm|fp8", 8, 8),
        ("trtllm|int8_wo|kvbf16", 8, 16),
        ("sglang|nvfp4|kvfp8", 4, 4),
        ("arithmetic=int8|engine=fused|speculation=draft-8", 8, 16),
        ("arithmetic=w8a8|engine=fused", 8, 8),
        ("arithmetic=fp32|activations=int8|prefill_chunk=64", 32, 32),
    ],
)
def test_reads_bits_of_weights_and_products_from_common_names(
    name: str, weight_bits: float, compute_bits: float
) -> None:
    found = arithmetic_of(name)
    assert (found.weight_bits, found.compute_bits) == (weight_bits, compute_bits)


@pytest.mark.parametrize("name", ["vllm|kvq8_0", "kv=q8_0", "lmdeploy|kvint8", "vllm|bf16|kvfp8"])
def test_reads_bits_of_keys_and_values(name: str) -> None:
    found = arithmetic_of(name)
    assert (found.weight_bits, found.kv_bits) == (16, 8)


@pytest.mark.parametrize(("name", "devices"), [("bf16_tp8", 8), ("bf16-tp2_pp2", 4), ("vllm|tp=8", 8), ("tp4|dp2", 4)])
def test_reads_the_devices_beside_the_arithmetic(name: str, devices: float) -> None:
    found = arithmetic_of(name)
    assert (found.devices, found.weight_bits) == (devices, 16)


@pytest.mark.filterwarnings("error")
def test_impossible_figures_are_missing_ones_without_a_warning() -> None:
    columns = ("l_params", "l_bw", "l_bf", "kvgb", "l_hidden", "l_link", "layers", "l_tp", "tiny")
    table = np.tile([4.0, 41, 49, 0.1, 12, 36, 32, 0, 0], (5, 1))
    table[:, -1] = np.arange(5) * 1e-200
    for row, column, value in ((1, "layers", 0), (2, "layers", -1), (3, "l_params", np.inf), (4, "l_tp", -5000)):
        table[row, columns.index(column)] = value
    contexts = Contexts(tuple("abcde"), {}, columns, table)
    pairs = Pairs(contexts, ("bf16", "fp8|tp2"), np.repeat(np.arange(5), 2), np.tile([0, 1], 5))
    matrix = PairTable().fit(pairs).transform(pairs, roofline=True)
    assert not np.isinf(matrix).any()
    assert np.isfinite(ContextTable.of(contexts).standardised(contexts)).all()
