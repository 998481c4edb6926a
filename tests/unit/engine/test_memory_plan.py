"""What spans take in memory, on paper: the models are made up, and have no weights."""

from collections.abc import Mapping
from typing import Any

import pytest

from node.engine.backends.interface import BACKENDS
from node.engine.backends.linear import ARITHMETICS
from node.engine.engine_costs import engine_costs
from node.engine.memory_plan import (
    GGUF_COSTS,
    PLANNED_POSITIONS,
    EngineCosts,
    ModelSizes,
    fitting_span,
    kv_elements,
    longest_spans,
    memory_plan,
    refusal,
)
from node.models.manifest import FileEntry, Manifest
from node.stages.memory_admission import longest_in, shortage, span_bytes_for
from protocol.identity import BlockRange, PeerId, Stage
from selector.cuts import Cuts
from selector.placement import Server, choose_span

MIB, GIB = 1 << 20, 1 << 30
Q4_0, Q6_K = 4.5 / 8, 6.5625 / 8
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip


def file(name: str, size: float) -> FileEntry:
    return FileEntry(name, int(size), "0" * 64)


def gguf(config: Mapping[str, Any], *, tied: bool = False) -> Manifest:
    """Return the manifest of a GGUF package in 4 bits, its head in 6, as they are usual."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    block = (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner) * Q4_0 + 2 * hidden * 4
    return Manifest(
        config=dict(config) | {"tie_word_embeddings": tied},
        bos_token_id=None,
        eos_token_ids=(),
        tokenizer_files=(),
        embed=file("embed.gguf", hidden * vocabulary * Q4_0),
        head=file("head.gguf", hidden * 4 + (0 if tied else hidden * vocabulary * Q6_K)),
        blocks=tuple(file(f"block-{number:03d}.gguf", block) for number in range(config["num_hidden_layers"])),
        common=file("common.gguf", 4096),
        format="gguf",
    )


def place(manifest: Manifest, memory_bytes: int) -> list[BlockRange]:
    """Return the spans of nodes that join one after another, until every block is served."""
    cuts, longest = manifest.cuts, longest_in(manifest, memory_bytes)
    servers: list[Server] = []
    while len({block for each in servers for block in range(each.stage.blocks.start, each.stage.blocks.end)}) < (
        manifest.block_count
    ):
        units = choose_span(cuts.unit_count, servers, longest, 1.0)
        servers.append(Server(Stage(PeerId(f"{len(servers):03}"), cuts.blocks_of(units)), 1 / len(units)))
    for each in servers:
        assert shortage(manifest, each.stage.blocks, memory_bytes) is None
    return [each.stage.blocks for each in servers]


def test_8b_in_4_bits_fits_into_four_nodes_of_1700_mib() -> None:
    manifest = gguf(LLAMA_8B)
    assert 4.4 * GIB > manifest.bytes_of(BlockRange(0, 32)) > 4.3 * GIB
    assert len(place(manifest, 1700 * MIB)) == 4


@pytest.mark.parametrize(("config", "machines"), [(LLAMA_8B, 1), (LLAMA_70B, 5)])
def test_machines_of_16_gb_for_4_bits(config: dict[str, Any], machines: int) -> None:
    free_bytes = 14 * GIB  # a desktop takes the rest
    assert len(place(gguf(config), int(0.75 * free_bytes))) <= machines


def test_embedding_and_head_count_only_where_they_are() -> None:
    manifest = gguf(LLAMA_8B)
    model, block = ModelSizes.of_manifest(manifest), manifest.blocks[0].size_bytes
    common = 4096
    weights = [memory_plan(model, BlockRange(*span), GGUF_COSTS).weight_bytes for span in ((0, 4), (4, 8), (28, 32))]
    around = [manifest.embed.size_bytes, 0, manifest.head.size_bytes]
    assert weights == [common + 4 * block + bytes_around for bytes_around in around]
    whole = memory_plan(model, BlockRange(0, 32), GGUF_COSTS)
    assert whole.weight_bytes == sum(weights) - 2 * common + 20 * block


def test_tied_embedding_is_held_by_the_last_span_too_but_once_by_a_whole_model() -> None:
    manifest = gguf(LLAMA_8B, tied=True)
    model, block = ModelSizes.of_manifest(manifest), manifest.blocks[0].size_bytes
    last, whole = (memory_plan(model, BlockRange(start, 32), GGUF_COSTS).weight_bytes for start in (31, 0))
    assert last == 4096 + block + manifest.embed.size_bytes + manifest.head.size_bytes
    assert whole - last == 31 * block


def test_keys_and_values_are_those_of_the_planned_tokens_in_the_engines_type() -> None:
    model = ModelSizes.of_manifest(gguf(LLAMA_8B))
    rows = PLANNED_POSITIONS * 4096 * 4  # queued
    f16 = memory_plan(model, BlockRange(8, 16), GGUF_COSTS).kv_bytes - rows
    assert f16 == PLANNED_POSITIONS * 8 * 2 * 8 * 128 * 2 * 5 // 4  # cells: a quarter more than positions
    f32 = memory_plan(model, BlockRange(8, 16), EngineCosts(1.0, 4.0)).kv_bytes - rows
    assert f32 == PLANNED_POSITIONS * 8 * 2 * 8 * 128 * 4
    short = ModelSizes.of_manifest(gguf(LLAMA_8B | {"max_position_embeddings": 64}))
    assert memory_plan(short, BlockRange(8, 16), GGUF_COSTS).positions == 64


@pytest.mark.parametrize(
    ("config", "elements"),
    [
        ({"hidden_size": 64, "num_attention_heads": 8}, [128] * 2),
        ({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}, [64] * 2),
        ({"hidden_size": 64, "num_attention_heads": [8, 4], "num_key_value_heads": [4, 1], "head_dim": 8}, [64, 16]),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1}}, [16] * 2),
        (
            {"hidden_size": 64, "num_attention_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
             "v_head_dim": 6, "num_key_value_heads": 4},
            [72] * 2,
        ),
    ],
)  # fmt: skip
def test_heads_of_keys_and_values_differ_by_architecture_and_block(config: Any, elements: list[int]) -> None:
    assert [kv_elements(config, block) for block in range(2)] == elements


def test_blocks_with_a_sliding_window_are_planned_with_all_positions() -> None:
    config = LLAMA_8B | {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 16}
    plans = [
        memory_plan(ModelSizes.of_manifest(gguf(each)), BlockRange(8, 10), GGUF_COSTS, 32_768).kv_bytes
        for each in (LLAMA_8B, config)
    ]
    assert plans[0] == plans[1]


def test_refusal_names_what_is_missing_and_what_would_fit() -> None:
    model = ModelSizes.of_manifest(gguf(LLAMA_8B))
    plan = memory_plan(model, BlockRange(24, 32), GGUF_COSTS)
    assert refusal(model, BlockRange(24, 32), plan.total_bytes, GGUF_COSTS) is None
    line = refusal(model, BlockRange(24, 32), plan.total_bytes - 200 * MIB, GGUF_COSTS)
    assert line is not None
    assert " are 200 MiB too little for " in line
    assert line.endswith("; blocks 24-31 would fit")  # without the head
    assert (refusal(model, BlockRange(24, 32), MIB, GGUF_COSTS) or "").endswith("not even its first block would fit")


def test_spans_that_fit_begin_and_end_where_the_model_may_be_cut() -> None:
    sizes = ModelSizes(
        config={"hidden_size": 64, "num_attention_heads": 8}, cuts=Cuts(9, 4),
        blocks=dict.fromkeys(range(9), 100 * MIB), embed=0, head=0, max_positions=32,
    )  # fmt: skip
    costs = EngineCosts(1.0, 2.0)
    assert list(longest_spans(sizes, 550 * MIB, costs)) == [1, 2, 1]
    assert fitting_span(sizes, BlockRange(0, 9), 700 * MIB, costs) == BlockRange(0, 4)
    assert fitting_span(sizes, BlockRange(4, 9), 550 * MIB, costs) == BlockRange(4, 9)
    assert fitting_span(sizes, BlockRange(0, 9), 300 * MIB, costs) is None


@pytest.mark.parametrize("blocks", [(0, 1), (0, 8), (8, 24), (0, 32)])
def test_hinted_memory_is_admitted_and_nothing_less(blocks: tuple[int, int]) -> None:
    manifest, span = gguf(LLAMA_8B), BlockRange(*blocks)
    hinted = span_bytes_for(manifest, span)
    assert shortage(manifest, span, hinted) is None
    assert "1 MiB more than it has" in (shortage(manifest, span, hinted - MIB) or "")


@pytest.mark.parametrize(("stored", "dtype"), [(2, "bfloat16"), (4, "float32"), (2, None), (4, "bfloat16")])
def test_weights_of_safetensors_are_held_as_published_whatever_the_config_says(stored: int, dtype: str | None) -> None:
    config = LLAMA_8B | {"dtype": dtype}
    size = config["hidden_size"] * config["vocab_size"] * stored + 200  # with a header
    embed = FileEntry("embed.safetensors", size, "0" * 64)
    manifest = Manifest(config, None, (), (), embed, embed, (embed,) * 32)
    assert engine_costs(manifest) == EngineCosts(1.0, 4.0)


def test_table_of_backends_states_the_packings_of_the_arithmetics() -> None:
    assert BACKENDS["fused"].packings == {arithmetic: packing for arithmetic, (packing, _) in ARITHMETICS.items()}
