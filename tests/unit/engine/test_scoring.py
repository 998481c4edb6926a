"""Scores of prompts are transformers' log probabilities, however a model is cut and its prompt arrives."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from node.engine import scoring
from node.engine.interface import REFERENCE, EngineOptions, SliceInput, Variant
from node.engine.scoring import scored_pieces
from node.engine.torch_shard import TorchShard
from protocol.identity import BlockRange
from protocol.messages import Sampling
from protocol.tensors import TokenLogprobs, logprobs_from_tensor, tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import DEVICE, AnyEngine, InProcess, session, spans, start
from tests.unit.engine.tiny_models import BLOCKS, PROMPT, TinyModel

MakeTinyModel = Callable[[str], TinyModel]
FUSED = Variant("fused", "fp32")


def wanted(prompt: Sequence[int], **values: Any) -> Sampling:
    return Sampling(**{"max_tokens": 0, "logprobs": 3, "prompt_length": len(prompt), "prompt_logprobs": True, **values})


async def score(
    engines: Sequence[AnyEngine], prompt: Sequence[int], sampling: Sampling, variant: Variant, chunk: int
) -> list[TokenLogprobs]:
    """Return the scores of a prompt that arrives in chunks, and what is drawn behind it."""
    of = session(7)
    for engine in engines:
        await start(engine, of, len(prompt) + sampling.max_tokens, sampling, variant=variant)
    found: list[TokenLogprobs] = []
    for position in range(0, len(prompt), chunk):
        tensor = tensor_from_tokens(prompt[position : position + chunk])
        draws = int(sampling.max_tokens > 0 and position + chunk >= len(prompt))
        for engine in engines:
            history = prompt if engine is engines[-1] and position == 0 else None
            result = await engine.step([SliceInput(of, position, tensor, draws, history=history)])
            [output] = result.outputs
            tensor = output.tensor
        found += logprobs_from_tensor(tensor)
    for engine in engines:
        await engine.close(of)
    return found


def reference(tiny: TinyModel) -> npt.NDArray[Any]:
    """Return transformers' log probabilities of every token behind each token of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: npt.NDArray[Any] = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].double(), -1).numpy()
    return found


def check(scores: Sequence[TokenLogprobs], tokens: Sequence[int], logprobs: npt.NDArray[Any]) -> None:
    """Compare scores of tokens, the first of which follows the first row of log probabilities."""
    assert [each.token for each in scores] == list(tokens)
    for each, row in zip(scores, logprobs, strict=False):
        assert each.logprob == pytest.approx(row[each.token], abs=1e-4)
        assert [logprob for _, logprob in each.likeliest] == pytest.approx(np.sort(row)[::-1][:2], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gemma3", "gpt2"])
async def test_scores_are_the_log_probabilities_of_transformers(
    family: str, make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model(family)
    logprobs = reference(tiny)
    variants = [REFERENCE, *([FUSED, Variant("onnxruntime", "fp32")] if family.startswith("llama") else [])]
    for count in (1, 2):
        options = EngineOptions(kv_positions=256, device=DEVICE)
        engines = [InProcess(TorchShard(tiny.source(blocks), blocks, options)) for blocks in spans(BLOCKS, count)]
        for variant in variants:
            for engine in engines:
                await engine.prepare(variant)
            for chunk, rows in ((4, 3), (len(PROMPT), 1000)):
                vocabulary = engines[-1].info.vocabulary_size
                monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * vocabulary * rows)
                check(await score(engines, PROMPT, wanted(PROMPT), variant, chunk), PROMPT[1:], logprobs)
                with_text = await score(engines, PROMPT, wanted(PROMPT, max_tokens=1), variant, chunk)
                check(with_text, [*PROMPT[1:], tiny.tokens[0]], logprobs)


async def test_several_prompts_and_texts_share_a_step(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("llama")
    logprobs, blocks = reference(tiny), BlockRange(0, BLOCKS)
    shard = TorchShard(tiny.source(blocks), blocks, EngineOptions(kv_positions=512, device=DEVICE))
    engine = InProcess(shard)
    await engine.prepare(FUSED)
    await start(engine, session(1), 40, Sampling(max_tokens=1), variant=FUSED)
    for number in (2, 3):
        await start(engine, session(number), 40, wanted(PROMPT), variant=FUSED)
    passes: list[int] = []
    compute = shard._compute

    def counted(variant: Variant, of: BlockRange, parts: Sequence[Any]) -> Sequence[npt.NDArray[np.float32]]:
        passes.append(len(parts))
        return compute(variant, of, parts)

    monkeypatch.setattr(shard, "_compute", counted)
    rows = tensor_from_tokens(PROMPT)
    prompts = [SliceInput(session(number), 0, rows, 0, history=PROMPT) for number in (2, 3)]
    result = await engine.step([SliceInput(session(1), 0, rows, 1), *prompts])
    text, *scores = (output.tensor for output in result.outputs)
    assert tokens_from_tensor(text) == tiny.tokens[:1]
    for each in scores:
        check(logprobs_from_tensor(each), PROMPT[1:], logprobs)
    assert sorted(passes) == [1, 2], "both prompts went through the model in one pass"


def test_logits_are_bounded_however_long_prompts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * 10 * 8)
    passes = list(scored_pieces([3, 20, 2], vocabulary_size=10))
    assert [sum(piece.end - piece.start for piece in pieces) for pieces in passes] == [8, 8, 8, 1]
    assert [piece.part for piece in passes[0]] == [0, 1]
    covered = {number: [each for pieces in passes for each in pieces if each.part == number] for number in range(3)}
    for number, length in enumerate([3, 20, 2]):
        assert [row for each in covered[number] for row in range(each.start, each.end)] == list(range(length))
