"""SmolLM2 Q4_1 in spans gives what llama.cpp alone gives on the whole file: with batches, chunks, caches and drafts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from node.engine.interface import EngineOptions, SessionOptions, SliceInput
from node.engine.llamacpp import context
from node.engine.llamacpp.context import SequenceRows
from node.engine.llamacpp.shard import LLAMACPP
from node.engine.shard import Array
from protocol.identity import BlockRange
from protocol.messages import Sampling
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import InProcess, decode, session, start
from tests.unit.engine.llamacpp.jobs import decode_cached, decode_drafted, decode_replayed, decode_together
from tests.unit.engine.llamacpp.packages import POSITIONS, Alone, GgufFiles

TEXT = [
    504, 913, 4834, 6601, 638, 913, 7488, 826, 260, 5065, 28, 260, 1512, 284, 260, 1666, 30, 378, 2388, 32143, 260,
    2376, 282, 260, 3426, 28, 284, 634, 282, 260, 913, 46327, 30, 1032, 260, 3091, 1512, 13685, 357, 33381, 28, 284,
    260, 35053, 9560, 4883, 618, 5383, 11859, 28, 527, 392, 963, 347, 10695, 30, 1550, 260, 11859, 1075, 4591, 502,
    2332, 347, 5249, 355, 5806, 30, 2015, 282, 260, 5249, 588, 5701, 618, 260, 2118, 284, 17586, 260, 5190, 282, 2109,
]  # fmt: skip
"""The water cycle describes how water moves between the ocean, the air and the land. The sun heats the surface …"""

PROMPT = TEXT[:17]


def engines(files: GgufFiles, cuts: Sequence[int]) -> list[InProcess]:
    return [InProcess(shard) for shard in files.shards(cuts)]


def noise(count: int, seed: int) -> list[int]:
    """Return random tokens: they take as long as any others."""
    tokens: list[int] = np.random.default_rng(seed).integers(1000, 40000, count).tolist()
    return tokens


PROMPTS = [TEXT[: 17 + 8 * number] for number in range(8)]


@pytest.mark.parametrize("cuts", [[], [15], [10, 20]])
async def test_spans_give_the_tokens_of_the_whole_file(smol: GgufFiles, smol_alone: Alone, cuts: list[int]) -> None:
    assert await decode(engines(smol, cuts), PROMPT, 24, variant=LLAMACPP) == smol_alone.decode(PROMPT, 24)


def test_every_span_knows_the_vocabulary(smol: GgufFiles) -> None:
    """Drafts pass through all spans, and each refuses those that the model does not have."""
    assert {shard.info.vocabulary_size for shard in smol.shards([10, 20])} == {smol.vocabulary_size}


def test_rows_do_not_depend_on_the_rows_beside_them(smol: GgufFiles, smol_alone: Alone) -> None:
    [shard] = smol.shards([])
    rows = [SequenceRows(number, 0, np.array(text, np.int32), 1) for number, text in enumerate(PROMPTS)]
    for text, logits in zip(PROMPTS, shard._kv[LLAMACPP].context.run(rows), strict=True):
        assert np.abs(logits - smol_alone.logits(text)).max() == 0.0


def test_logits_are_those_of_the_whole_file_to_the_bit(smol: GgufFiles, smol_alone: Alone) -> None:
    shards = smol.shards([10, 20])
    rows: Array = np.array(PROMPT)
    for shard in shards:
        rows = shard.run_alone(LLAMACPP, rows, draws=len(PROMPT))
    assert np.abs(rows - smol_alone.logits(PROMPT, outputs=len(PROMPT))).max() == 0.0


async def test_chunked_prefill_changes_no_token(smol: GgufFiles, smol_alone: Alone) -> None:
    prompt = noise(80, seed=3)
    cut = engines(smol, [15])
    wanted = smol_alone.decode(prompt, 6)
    for chunk in (7, 64):
        assert await decode(cut, prompt, 6, chunk=chunk, variant=LLAMACPP) == wanted


async def test_prompt_longer_than_a_pass(smol: GgufFiles, smol_alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "BATCH_ROWS", 256)
    prompt = noise(260, seed=5)
    assert await decode(engines(smol, [15]), prompt, 1, variant=LLAMACPP) == smol_alone.decode(prompt, 1)


async def test_eight_sessions_at_once_get_the_tokens_of_each_alone(smol: GgufFiles, smol_alone: Alone) -> None:
    wanted = [smol_alone.decode(text, 8) for text in PROMPTS]
    assert await decode_together(engines(smol, [10, 20]), PROMPTS, 8) == wanted


async def test_prefix_cache_changes_no_token(smol: GgufFiles, smol_alone: Alone) -> None:
    cut = engines(smol, [15])
    shared = noise(96, seed=7)
    prompts = [[*shared, *text] for text in PROMPTS[:3]]
    found = [await decode_cached(cut, session(n), prompt, 6) for n, prompt in enumerate(prompts)]
    assert [tokens for _, tokens in found] == [smol_alone.decode(prompt, 6) for prompt in prompts]
    assert [cached for cached, _ in found] == [0, 96, 96]


async def test_prefix_cache_survives_its_session_until_its_pages_are_needed(smol: GgufFiles, smol_alone: Alone) -> None:
    options = EngineOptions(threads=1, kv_positions=256)
    cut = [InProcess(shard) for shard in smol.shards([15], options)]
    text = noise(100, seed=9)
    wanted = smol_alone.decode(text, 4)
    assert await decode_cached(cut, session(1), text, 4) == (0, wanted)
    assert await decode_cached(cut, session(2), text, 4) == (96, wanted)
    other = noise(220, seed=10)  # takes nearly all pages
    assert await decode_cached(cut, session(3), other, 4) == (0, smol_alone.decode(other, 4))
    cached, tokens = await decode_cached(cut, session(4), text, 4)
    assert tokens == wanted
    assert cached < 96


async def test_rejected_drafts_leave_no_trace(smol: GgufFiles, smol_alone: Alone) -> None:
    wanted = smol_alone.decode(PROMPT, 10)
    assert await decode_drafted(engines(smol, [10, 20]), session(1), PROMPT, wanted) == wanted


async def test_replayed_stages_leave_no_trace(smol: GgufFiles, smol_alone: Alone) -> None:
    assert await decode_replayed(engines(smol, [10, 20]), session(1), PROMPT, 24) == smol_alone.decode(PROMPT, 24)


async def test_seeded_sampling_is_repeated_on_other_cuts(smol: GgufFiles) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=4)
    texts = [
        await decode(engines(smol, cuts), PROMPT, 12, sampling=sampling, variant=LLAMACPP) for cuts in ([], [7, 21])
    ]
    assert texts[0] == texts[1]


async def test_session_that_runs_a_part_of_the_span_disturbs_no_other(smol: GgufFiles, smol_alone: Alone) -> None:
    whole, rest = InProcess(smol.shards([])[0]), InProcess(smol.shards([12])[1])
    texts = [PROMPTS[0][:], PROMPTS[1][:]]
    wanted = [smol_alone.decode(text, 6) for text in texts]
    await start(whole, session(0), 48, variant=LLAMACPP)
    found, done = [whole_text[:] for whole_text in texts], [0, 0]
    for turn in range(6):
        rows = [tensor_from_tokens(text[position:]) for text, position in zip(found, done, strict=True)]
        slices = [SliceInput(session(number), done[number], rows[number], 1) for number in range(2)]
        if turn == 0:  # it joins when the other one has rows in the KV memory, and alone runs only 12 blocks
            head = await whole.step(slices[:1])
            await whole.open(session(1), 48)
            await whole.begin(session(1), SessionOptions(variant=LLAMACPP, blocks=BlockRange(0, 12)))
            await start(rest, session(1), 48, variant=LLAMACPP)
            outputs = [head.outputs[0], (await whole.step(slices[1:])).outputs[0]]
        else:
            outputs = list((await whole.step(slices)).outputs)
        last = await rest.step([replace(slices[1], tensor=outputs[1].tensor)])
        done = [len(text) for text in found]
        for text, output in zip(found, (outputs[0], last.outputs[0]), strict=True):
            text += tokens_from_tensor(output.tensor)
    assert [text[len(prompt) :] for text, prompt in zip(found, texts, strict=True)] == wanted


def test_kv_memory_grows_without_changing_a_bit(smol: GgufFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [np.random.default_rng(seed).integers(1000, 40000, 150).astype(np.int32) for seed in range(3)]
    following = [SequenceRows(number, 150, text[:1], 1) for number, text in enumerate(texts)]
    found = []
    for first_positions in (256, POSITIONS):
        monkeypatch.setattr(context, "FIRST_POSITIONS", first_positions)
        span = smol.alone(sequences=3).context
        for number, text in enumerate(texts):
            span.run([SequenceRows(number, 0, text, 1)])
        found.append(np.concatenate(span.run(following)))
    assert np.array_equal(found[0], found[1])
