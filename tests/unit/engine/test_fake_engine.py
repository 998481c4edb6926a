"""The fake engine notices every row, block, position and order, and does not notice how the model is cut."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from node.engine.interface import REFERENCE, EngineCrashed, EngineError, EngineFull, SessionOptions, SliceInput
from node.testing.fake_engine import FakeEngine, expected_tokens, fake_span_info
from protocol.identity import BlockRange
from protocol.messages import Sampling
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import Part, decode, session, spans, start, step

BLOCKS = 12
PROMPT = [5, 7, 11, 13, 17, 19]
INFO = fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS)


def engines(count: int) -> list[FakeEngine]:
    return [FakeEngine(fake_span_info(blocks, block_count=BLOCKS)) for blocks in spans(BLOCKS, count)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("chunk", [None, 1, 4])
async def test_any_cut_and_any_chunks_give_the_same_tokens(count: int, chunk: int | None) -> None:
    assert tuple(await decode(engines(count), PROMPT, 8, chunk=chunk)) == expected_tokens(INFO, PROMPT, 8)


async def test_spans_that_overlap_may_be_cut_anywhere() -> None:
    front, back = (FakeEngine(fake_span_info(blocks, block_count=BLOCKS)) for blocks in (BlockRange(0, 8), INFO.blocks))
    for cut in (1, 4, 8):
        parts = [Part(front, BlockRange(0, cut)), Part(back, BlockRange(cut, BLOCKS))]
        assert tuple(await decode(parts, PROMPT, 8)) == expected_tokens(INFO, PROMPT, 8)
    with pytest.raises(EngineError, match="not a part of"):
        Part(front, BlockRange(4, 9))


async def test_sampled_tokens_depend_on_the_seed_and_are_replayed() -> None:
    for seed in (1, 2):
        sampling = Sampling(max_tokens=1, temperature=1.0, seed=seed)
        assert tuple(await decode(engines(3), PROMPT, 8, sampling=sampling)) == expected_tokens(
            INFO, PROMPT, 8, sampling
        )
    assert expected_tokens(INFO, PROMPT, 8, sampling) != expected_tokens(INFO, PROMPT, 8)


async def test_rewind_gives_the_same_tokens_again() -> None:
    three, tokens = engines(3), expected_tokens(INFO, PROMPT, 8)
    for engine in three:
        await start(engine, session(1), 30)
    await step(three, session(1), 0, [*PROMPT, 1, 2, 3], 1)
    rows = await step(three, session(1), 4, [*PROMPT[4:], *tokens[:-1]], 8)
    assert tuple(tokens_from_tensor(rows)) == tokens


@pytest.mark.parametrize(
    "prompt", [PROMPT[1:], PROMPT[:-1], [*PROMPT[1::-1], *PROMPT[2:]], [6, *PROMPT[1:]], [*PROMPT, 0]]
)
def test_every_row_counts(prompt: Sequence[int]) -> None:
    assert expected_tokens(INFO, prompt, 3) != expected_tokens(INFO, PROMPT, 3)


async def test_swapped_row_or_skipped_span_changes_the_token() -> None:
    three = engines(3)
    for engine in three:
        await start(engine, session(1), 30)
        await start(engine, session(2), 30)
    await step(three, session(1), 0, PROMPT, 1)
    await step(three, session(2), 0, PROMPT[::-1], 1)
    right, wrong = [
        await step(three, session(number), len(PROMPT), expected_tokens(INFO, PROMPT, 1), 1) for number in (1, 2)
    ]
    assert right != wrong
    skipped = await step([three[0], three[2]], session(1), len(PROMPT), expected_tokens(INFO, PROMPT, 1), 1)
    assert skipped != right


async def test_fake_engine_admits_like_the_real_one() -> None:
    engine = FakeEngine(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS, kv_positions=96, max_positions=100))
    for positions in (0, 101):
        with pytest.raises(EngineError, match="has 1 to 100 positions"):
            await start(engine, session(1), positions)
    await engine.open(session(1), 1)
    with pytest.raises(EngineError, match="needs sampling options"):
        await engine.begin(session(1), SessionOptions(variant=REFERENCE))
    await start(engine, session(1), 33)
    with pytest.raises(EngineFull, match="32 of 96 are free"):
        await start(engine, session(2), 33)
    with pytest.raises(EngineError, match="open already"):
        await start(engine, session(1), 1)
    with pytest.raises(EngineError, match="not below 1000"):
        await step([engine], session(1), 0, [1000], 1)
    assert engine.statistics().reserved_positions == 0


async def test_steps_take_their_time_one_after_another(virtual_clock: trio.testing.MockClock) -> None:
    engine = FakeEngine(INFO, step_s=1.0, row_s=0.5)
    ended: list[tuple[float, int]] = []

    async def take(number: int) -> None:
        await start(engine, session(number), 10)
        await step([engine], session(number), 0, PROMPT[: number + 1], 1)
        ended.append((trio.current_time() - started, number))

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(take, number)
            await trio.testing.wait_all_tasks_blocked()
    assert ended == [(1.5, 0), (3.5, 1), (6.0, 2)]
    assert engine.statistics().compute_s == 6.0


async def test_a_crash_ends_every_call_and_frees_every_session(virtual_clock: trio.testing.MockClock) -> None:
    engine = FakeEngine(INFO, step_s=10.0)
    await start(engine, session(1), 10)

    async def crash() -> None:
        await trio.sleep(1)
        engine.crash("lightning")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(crash)
        rows = SliceInput(session=session(1), position=0, tensor=tensor_from_tokens(PROMPT), draws=1)
        with pytest.raises(EngineCrashed, match="lightning"):
            await engine.step([rows])
    assert trio.current_time() < 5
    assert await engine.wait_crashed() == "lightning"
    assert engine.statistics().reserved_positions == 0
    with pytest.raises(EngineCrashed):
        await start(engine, session(2), 1)
    await engine.close(session(1))


async def test_hidden_states_survive_bfloat16() -> None:
    engine = FakeEngine(fake_span_info(BlockRange(0, 4), block_count=BLOCKS))
    await start(engine, session(1), 10)
    rows: Tensor = await step([engine], session(1), 0, PROMPT, 0)
    assert rows.shape == (len(PROMPT), INFO.hidden_size)
    # The last two bytes of an f32 are what bf16 drops.
    assert all(rows.data[index] == 0 for start in range(0, len(rows.data), 4) for index in (start, start + 1))
