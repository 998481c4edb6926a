"""Embeddings are pooled from transformers' last hidden states, however a model is cut and its prompt arrives."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModel

from node.engine.interface import REFERENCE, EngineError, EngineOptions, SliceInput, Variant
from node.engine.pooling import Pool
from node.engine.torch_shard import TorchShard
from protocol.identity import BlockRange
from protocol.messages import Sampling
from protocol.tensors import Pooling, embedding_from_tensor, tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import DEVICE, AnyEngine, InProcess, decode, session, spans, start, step
from tests.unit.engine.tiny_models import BLOCKS, PROMPT, TinyModel

MakeTinyModel = Callable[[str], TinyModel]


async def embed(
    engines: Sequence[AnyEngine], prompt: Sequence[int], pooling: Pooling, variant: Variant, chunk: int
) -> list[float]:
    """Return the embedding of a prompt that arrives in chunks."""
    of = session(7)
    for engine in engines:
        await start(engine, of, len(prompt) + 1, Sampling(max_tokens=1, pooling=pooling), variant=variant)
    for position in range(0, len(prompt), chunk):
        part = prompt[position : position + chunk]
        output = await step(engines, of, position, part, int(position + chunk >= len(prompt)))
    for engine in engines:
        await engine.close(of)
    return list(embedding_from_tensor(output))


def last_states(tiny: TinyModel) -> npt.NDArray[Any]:
    model = AutoModel.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states: npt.NDArray[Any] = model(torch.tensor([PROMPT])).last_hidden_state[0].numpy()
    return states


@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen3", "mistral", "gemma3", "gpt2", "mixtral"])
async def test_pools_the_last_hidden_states_of_transformers(family: str, make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model(family)
    states = last_states(tiny)
    variants = [REFERENCE]
    if family in {"llama", "llama, tied", "qwen3", "mistral"}:
        variants += [Variant("fused", "fp32"), Variant("onnxruntime", "fp32")]
    for count in (1, 2, 3):
        options = EngineOptions(kv_positions=256, device=DEVICE)
        engines = [InProcess(TorchShard(tiny.source(blocks), blocks, options)) for blocks in spans(BLOCKS, count)]
        for variant in variants:
            for engine in engines:
                await engine.prepare(variant)
            for chunk in (4, len(PROMPT)):
                mean = await embed(engines, PROMPT, Pooling.MEAN, variant, chunk)
                assert mean == pytest.approx(states.mean(axis=0), abs=2e-5), f"{count} spans, {variant}"
                last = await embed(engines, PROMPT, Pooling.LAST, variant, chunk)
                assert last == pytest.approx(states[-1], abs=2e-5)
        assert await decode(engines, PROMPT, len(tiny.tokens)) == tiny.tokens, "texts are as before"


async def test_texts_and_embeddings_share_steps(make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("llama")
    blocks = BlockRange(0, BLOCKS)
    engine = InProcess(TorchShard(tiny.source(blocks), blocks, EngineOptions(kv_positions=256, device=DEVICE)))
    fused = Variant("fused", "fp32")
    await engine.prepare(fused)
    await start(engine, session(1), 40, Sampling(max_tokens=1), variant=fused)
    await start(engine, session(2), 40, Sampling(max_tokens=1, pooling=Pooling.MEAN), variant=fused)
    rows = tensor_from_tokens(PROMPT)
    result = await engine.step([SliceInput(session(number), 0, rows, 1) for number in (1, 2)])
    text, embedding = (output.tensor for output in result.outputs)
    assert tokens_from_tensor(text) == tiny.tokens[:1]
    assert list(embedding_from_tensor(embedding)) == pytest.approx(last_states(tiny).mean(axis=0), abs=2e-5)


def test_every_row_counts_once() -> None:
    pool = Pool(Pooling.MEAN)
    pool.add(0, np.ones((3, 2), np.float32))
    with pytest.raises(EngineError, match="3 rows so far"):
        pool.add(1, np.ones((1, 2), np.float32))
    pool.add(3, np.full((1, 2), 5.0, np.float32))
    assert pool.embedding().tolist() == [[2.0, 2.0]]
    pool.add(4, np.full((1, 2), np.inf, np.float32))
    with pytest.raises(EngineError, match="not finite"):
        pool.embedding()
