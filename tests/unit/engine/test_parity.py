"""However a model is cut into spans, greedy tokens are those of transformers' generate, for every architecture."""

from collections.abc import Callable

import pytest

from node.engine.interface import REFERENCE, EngineOptions, Variant
from node.engine.torch_shard import TorchShard
from protocol.identity import BlockRange
from tests.unit.engine.driving import DEVICE, InProcess, Part, decode, spans
from tests.unit.engine.tiny_models import BLOCKS, COUNT, FAMILIES, PROMPT, TinyModel

OPTIONS = EngineOptions(kv_positions=64, device=DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
async def test_spans_give_the_tokens_of_generate(family: str, make_tiny_model: Callable[[str], TinyModel]) -> None:
    tiny = make_tiny_model(family)
    shards: dict[BlockRange, InProcess] = {}
    for count in range(1, BLOCKS + 1):
        for blocks in spans(BLOCKS, count):
            if blocks not in shards:
                shards[blocks] = InProcess(TorchShard(tiny.source(blocks), blocks, OPTIONS))
        engines = [shards[blocks] for blocks in spans(BLOCKS, count)]
        assert await decode(engines, PROMPT, COUNT) == tiny.tokens, f"{count} spans"
    # The cuts above are 1, 2, 3 and 4 spans; a prompt that arrives in parts must not matter either.
    assert await decode(engines, PROMPT, COUNT, chunk=4) == tiny.tokens


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "falcon, alibi", "opt", "mixtral"])
async def test_spans_that_overlap_may_be_cut_anywhere(family: str, make_tiny_model: Callable[[str], TinyModel]) -> None:
    tiny = make_tiny_model(family)
    whole, front, back = (
        InProcess(TorchShard(tiny.source(blocks), blocks, OPTIONS))
        for blocks in (BlockRange(0, BLOCKS), BlockRange(0, 3), BlockRange(1, BLOCKS))
    )
    variants = [REFERENCE]
    if family in {"llama", "mistral"}:
        variants.append(Variant("fused", "fp32"))
        for engine in (whole, front, back):
            await engine.prepare(variants[-1])
    for variant in variants:
        for cut in (1, 2, 3):
            parts = [Part(front, BlockRange(0, cut)), Part(back, BlockRange(cut, BLOCKS))]
            assert await decode(parts, PROMPT, COUNT, variant=variant) == tiny.tokens, f"cut at {cut}"
        parts = [Part(whole, BlockRange(0, 1)), Part(back, BlockRange(1, 3)), Part(whole, BlockRange(3, BLOCKS))]
        assert await decode(parts, PROMPT, COUNT, variant=variant, chunk=4) == tiny.tokens
