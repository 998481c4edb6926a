"""The fast paths give the reference's tokens, however sessions, parts of prompts and decode rows are mixed."""

import random
import sys
from collections.abc import Callable
from typing import cast

import pytest

from node.engine.interface import (
    REFERENCE,
    EngineError,
    EngineOptions,
    NoVariantMemory,
    SessionOptions,
    SliceInput,
    Variant,
)
from node.engine.kv_allocator import EXPIRY_ROUNDS
from node.engine.torch_shard import TorchShard
from protocol.identity import BlockRange
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import DEVICE, GREEDY, InProcess, decode, memory_for, pages_of, session, spans
from tests.unit.engine.tiny_models import BLOCKS, COUNT, PROMPT, TinyModel

MakeTinyModel = Callable[[str], TinyModel]
OPTIONS = EngineOptions(kv_positions=512, device=DEVICE)
FUSED, GRAPHS = Variant("fused", "fp32"), Variant("onnxruntime", "fp32")
EXACT = (FUSED, GRAPHS) if DEVICE == "cpu" else (FUSED,)
LOSSY = ["fused/bf16", "fused/int8", "fused/w8a8", *(["onnxruntime/int8"] if DEVICE == "cpu" else [])]
FAMILIES = ["llama", "llama, tied", "qwen2", "qwen2, sliding from block 2", "qwen3", "mistral"]


def engines_of(tiny: TinyModel, count: int, *variants: Variant) -> list[InProcess]:
    engines = [InProcess(TorchShard(tiny.source(blocks), blocks, OPTIONS)) for blocks in spans(BLOCKS, count)]
    for engine in engines:
        for variant in variants:
            engine.shard.prepare(variant)
    return engines


@pytest.mark.parametrize("variant", EXACT, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
async def test_spans_give_the_tokens_of_generate(family: str, variant: Variant, make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model(family)
    for count in (1, 2, 3):
        engines = engines_of(tiny, count, variant)
        assert await decode(engines, PROMPT, COUNT, variant=variant) == tiny.tokens, f"{count} spans"
    assert await decode(engines, PROMPT, COUNT, chunk=4, variant=variant) == tiny.tokens


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("seed", range(3))
async def test_continuous_batching_gives_the_tokens_of_each_session_alone(
    family: str, seed: int, make_tiny_model: MakeTinyModel
) -> None:
    chance = random.Random(seed)
    engines = engines_of(make_tiny_model(family), chance.choice([1, 2, 3]), *EXACT)
    shared = [chance.randrange(97) for _ in range(40)]
    texts = [
        shared[: chance.choice([0, 34, 40])] + [chance.randrange(97) for _ in range(chance.randrange(1, 20))]
        for _ in range(8)
    ]
    expected = [await decode(engines, text, 6, of=session(100 + number)) for number, text in enumerate(texts)]
    wholes = [list(text) for text in texts]
    done = [0] * 8
    waiting, running = list(range(8)), list[int]()
    while waiting or running:
        while waiting and (not running or chance.random() < 0.5):
            number = waiting.pop()
            running.append(number)
            for engine in engines:
                await engine.open(session(number), len(texts[number]) + 6, pages_of(texts[number]))
                variant = (REFERENCE, FUSED, FUSED, EXACT[-1])[number % 4]
                sampling = GREEDY if engine.info.is_last else None
                cached = await engine.begin(session(number), SessionOptions(sampling=sampling, variant=variant))
            done[number] = min(cached, len(texts[number]) - 1)
        chosen = chance.sample(running, chance.randrange(1, len(running) + 1))
        ends = [min(len(wholes[n]), done[n] + chance.choice([1, 3, 50])) for n in chosen]
        inputs = [
            SliceInput(
                session=session(n),
                position=done[n],
                tensor=tensor_from_tokens(wholes[n][done[n] : end]),
                draws=int(end == len(wholes[n])),
            )
            for n, end in zip(chosen, ends, strict=True)
        ]
        for engine in engines:
            outputs = (await engine.step(inputs)).outputs
            inputs = [
                SliceInput(session=i.session, position=i.position, tensor=o.tensor, draws=i.draws)
                for i, o in zip(inputs, outputs, strict=True)
            ]
        for n, end, output in zip(chosen, ends, outputs, strict=True):
            done[n] = end
            wholes[n] += tokens_from_tensor(output.tensor)
            if len(wholes[n]) == len(texts[n]) + 6:
                running.remove(n)
                for engine in engines:
                    await engine.close(session(n))
                    engine.trim_now()
    assert [whole[len(text) :] for whole, text in zip(wholes, texts, strict=True)] == expected
    assert all(engine.pages.reserved_positions == 0 for engine in engines)


async def test_fragmented_pages_give_the_same_tokens(make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("llama")
    for variant in (REFERENCE, *EXACT):
        engine = engines_of(tiny, 1, *EXACT)[0]
        for number in range(16):
            await engine.open(session(number), 32)
        for number in range(1, 16, 2):
            await engine.close(session(number))
        text = [*range(3, 60)]
        alone = await decode(engines_of(tiny, 1, *EXACT), text, 8, variant=variant)
        assert await decode([engine], text, 8, of=session(50), chunk=20, variant=variant) == alone


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives pages back at once")
async def test_memory_of_sessions_that_are_over_is_given_back_but_for_cached_prompts(
    make_tiny_model: MakeTinyModel,
) -> None:
    engine = engines_of(make_tiny_model("qwen3"), 1, FUSED)[0]
    text = [number % 97 for number in range(120)]
    written = [block.keys for block in cast("TorchShard", engine.shard)._kv.blocks]
    for _ in range(2):
        tokens = await decode([engine], text, 4, variant=FUSED)
        assert all(keys[32:88].any(dim=(1, 2)).all() for keys in written)
        engine.trim_now()
        assert not any(keys[32:88].any() for keys in written)
    options = SessionOptions(sampling=GREEDY, variant=FUSED)
    for number, cached in [(2, 0), (3, 96)]:
        await engine.open(session(number), 124, pages_of(text))
        assert await engine.begin(session(number), options) == cached
        rest = SliceInput(session=session(number), position=cached, tensor=tensor_from_tokens(text[cached:]), draws=1)
        assert tokens_from_tensor((await engine.step([rest])).outputs[0].tensor) == tokens[:1]
        await engine.close(session(number))
        engine.trim_now()
    for _ in range(EXPIRY_ROUNDS + 1):
        engine.pages.expire()
    engine.trim_now()
    assert not any(keys[32:88].any() for keys in written)


async def test_speculative_decoding_does_not_change_the_text(make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("llama")
    engine = engines_of(tiny, 1, FUSED)[0]
    engine.open_now(session(1), 60, SessionOptions(sampling=GREEDY, variant=FUSED))
    drafts = [*tiny.tokens[:3], 96, 96]
    rows = SliceInput(
        session=session(1), position=0, tensor=tensor_from_tokens([*PROMPT, *drafts]), draws=6, drafts=tuple(drafts)
    )
    drawn = tokens_from_tensor(engine.step_now([rows]).outputs[0].tensor)
    assert drawn == tiny.tokens[: len(drawn)]
    assert len(drawn) >= 4


@pytest.mark.parametrize("name", LOSSY)
async def test_lossy_arithmetic_stays_close(name: str, make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("llama")
    lossy = Variant(*name.split("/"))
    text = PROMPT + tiny.tokens[:-1]
    hits = 0
    engine = engines_of(tiny, 1, lossy)[0]
    for chunk in (len(text), 1):
        drawn: list[int] = []
        engine.open_now(session(1), 60, SessionOptions(sampling=GREEDY, variant=lossy))
        for position in range(0, len(text), chunk):
            part = text[position : position + chunk]
            rows = SliceInput(session=session(1), position=position, tensor=tensor_from_tokens(part), draws=len(part))
            drawn += tokens_from_tensor(engine.step_now([rows]).outputs[0].tensor)
        engine.close_now(session(1))
        hits += sum(one == other for one, other in zip(drawn[-COUNT:], tiny.tokens, strict=True))
    assert hits >= COUNT * 2 * 0.7


async def test_the_wire_may_round(make_tiny_model: MakeTinyModel) -> None:
    engines = engines_of(make_tiny_model("llama"), 2, FUSED)
    assert len(await decode(engines, PROMPT, 4, variant=FUSED, activations="bf16")) == 4


def test_unavailable_variant_names_its_reason(make_tiny_model: MakeTinyModel) -> None:
    blocks = BlockRange(0, BLOCKS)
    with pytest.raises(EngineError, match="gemma3_text models have no fast path"):
        engines_of(make_tiny_model("gemma3"), 1, FUSED)
    tiny = make_tiny_model("llama")
    with pytest.raises(EngineError, match="no variant fused/fp4"):
        engines_of(tiny, 1, Variant("fused", "fp4"))
    with pytest.raises(EngineError, match="no variant onnxruntime/w8a8"):
        engines_of(tiny, 1, Variant("onnxruntime", "w8a8"))
    info = TorchShard(tiny.source(blocks), blocks, OPTIONS).info
    memory_bytes = memory_for(tiny.source(blocks), info, 80)
    shard = TorchShard(tiny.source(blocks), blocks, EngineOptions(memory_bytes=memory_bytes, device=DEVICE))
    shard.prepare(FUSED)  # it takes what the published weights take, and those are not kept
    with pytest.raises(EngineError, match=r"fused/bf16 takes .* bytes of memory"):
        shard.prepare(Variant("fused", "bf16"))
    assert shard.variants() == {REFERENCE, FUSED}


def test_dropped_variant_makes_room_for_another_one(make_tiny_model: MakeTinyModel) -> None:
    tiny, blocks = make_tiny_model("llama"), BlockRange(0, BLOCKS)
    info = TorchShard(tiny.source(blocks), blocks, OPTIONS).info
    memory_bytes = memory_for(tiny.source(blocks), info, 80)
    shard = TorchShard(tiny.source(blocks), blocks, EngineOptions(memory_bytes=memory_bytes, device=DEVICE))
    int8, w8a8 = Variant("fused", "int8"), Variant("fused", "w8a8")
    shard.prepare(int8)
    shard.prepare(w8a8)
    with pytest.raises(NoVariantMemory):
        shard.prepare(FUSED)
    shard.drop(int8)
    with pytest.raises(NoVariantMemory):  # the other one computes with the same weights
        shard.prepare(FUSED)
    shard.drop(w8a8)
    shard.drop(w8a8)
    shard.prepare(FUSED)
    assert shard.variants() == {REFERENCE, FUSED}
    with pytest.raises(NoVariantMemory):
        shard.prepare(int8)
